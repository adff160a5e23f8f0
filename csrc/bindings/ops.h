// The operators, once for every device. Schemas stand in fusedskip/ops.py.
//
// A Device is made of x, or of the moments of one, and launches: batch_norm(args),
// batch_norm_backward(args), batch_norm_stats(args), batch_norm_merge(args), add_relu(...),
// add_relu_backward(...).

#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"

namespace fusedskip {

template <typename Device>
std::tuple<Tensor, Tensor> add_relu(const Tensor& x, const Tensor& residual, bool relu_first,
                                    bool save_mask) {
  const Device device(x);
  const View flat = flat_view_of(x);
  Tensor out = empty_like(x), mask = empty_mask(x, save_mask, flat);
  device.add_relu(dtype_of(x), x.numel(), relu_first, x.data_ptr(),
                  data_like(residual, x, "residual"), out.data_ptr(), mask_data(mask, x, flat));
  return {out, mask};
}

template <typename Device>
Tensor add_relu_backward(const Tensor& dout, const Tensor& mask) {
  const Device device(dout);
  const uint8_t* bits = mask_data(mask, dout, flat_view_of(dout));
  STD_TORCH_CHECK(bits, "mask: expected one, got none");
  Tensor dx = empty_like(dout);
  device.add_relu_backward(dtype_of(dout), dout.numel(), dout.data_ptr(), bits, dx.data_ptr());
  return dx;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const OptionalTensor& residual,
                                              const OptionalTensor& weight,
                                              const OptionalTensor& bias,
                                              const OptionalTensor& running_mean,
                                              const OptionalTensor& running_var, bool training,
                                              double momentum, double eps, bool relu,
                                              bool save_mask) {
  const Device device(x);
  const View view = view_of(x);
  STD_TORCH_CHECK(!training || x.numel() != x.size(1), "x: expected more than one value a channel");
  Tensor out = empty_like(x), mask = empty_mask(x, save_mask, view);
  Tensor statistics = empty_statistics(x, 1);
  device.batch_norm({
      .view = view,
      .dtype = dtype_of(x),
      .x = x.data_ptr(),
      .residual = residual ? data_like(*residual, x, "residual") : nullptr,
      .norm = norm_of(weight, bias, running_mean, running_var, momentum, eps, statistics, 0, x),
      .training = training,
      .relu = relu,
      .out = out.data_ptr(),
      .out_pitch = view.n_channels * view.n_inner,
      .mask = mask_data(mask, x, view),
  });
  return {out, mask, statistics};
}

template <typename Device>
Tensor batch_norm_inference(const Tensor& x, const OptionalTensor& residual,
                            const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& running_mean, const OptionalTensor& running_var,
                            double eps, bool relu) {
  const Device device(x);
  const View view = view_of(x);
  // Kernels leave statistics for a backward pass, which there is not.
  Tensor out = empty_like(x), statistics = empty_statistics(x, 1);
  device.batch_norm({
      .view = view,
      .dtype = dtype_of(x),
      .x = x.data_ptr(),
      .residual = residual ? data_like(*residual, x, "residual") : nullptr,
      .norm = norm_of(weight, bias, running_mean, running_var, 0, eps, statistics, 0, x),
      .training = false,
      .relu = relu,
      .out = out.data_ptr(),
      .out_pitch = view.n_channels * view.n_inner,
  });
  return out;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& dout, const Tensor& x, const OptionalTensor& mask, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& statistics, bool training, bool relu, bool need_dx,
    bool need_dresidual, bool need_dparams) {
  const Device device(x);
  const View view = view_of(x);
  Tensor dx = need_dx ? empty_like(x) : not_asked_for(x);
  Tensor dresidual = need_dresidual ? empty_like(x) : not_asked_for(x);
  Tensor dweight = empty_gradient(weight, x, need_dparams);
  Tensor dbias = empty_gradient(bias, x, need_dparams);
  device.batch_norm_backward({
      .view = view,
      .dtype = dtype_of(x),
      .dout = data_like(dout, x, "dout"),
      .x = x.data_ptr(),
      .mask = mask ? mask_data(*mask, x, view) : nullptr,
      .norm = norm_of(weight, bias, {}, {}, 0, 0, statistics, 0, x),
      .training = training,
      .relu = relu,
      .dx = need_dx ? dx.data_ptr() : nullptr,
      .dresidual = need_dresidual ? dresidual.data_ptr() : nullptr,
      .dweight = gradient_data(dweight, x, "dweight"),
      .dbias = gradient_data(dbias, x, "dbias"),
  });
  return {dx, dresidual, dweight, dbias};
}

template <typename Device>
Tensor batch_norm_relu_into(const Tensor& x, const OptionalTensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& running_mean,
                            const OptionalTensor& running_var, const Tensor& out, bool training,
                            double momentum, double eps) {
  const Device device(x);
  const View view = view_of(x);
  Tensor statistics = empty_statistics(x, 1);
  device.batch_norm({
      .view = view,
      .dtype = dtype_of(x),
      .x = x.data_ptr(),
      .norm = norm_of(weight, bias, running_mean, running_var, momentum, eps, statistics, 0, x),
      .training = training,
      .relu = true,
      .out = out.data_ptr(),
      .out_pitch = pitch_of(out, x, view),
  });
  return statistics;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> dual_batch_norm(
    const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& residual_weight,
    const OptionalTensor& residual_bias, const OptionalTensor& residual_running_mean,
    const OptionalTensor& residual_running_var, bool training, double momentum, double eps,
    double residual_momentum, double residual_eps, bool save_mask) {
  const Device device(x);
  const View view = view_of(x);
  Tensor out = empty_like(x), mask = empty_mask(x, save_mask, view);
  Tensor statistics = empty_statistics(x, 2);
  device.batch_norm({
      .view = view,
      .dtype = dtype_of(x),
      .x = x.data_ptr(),
      .residual = data_like(residual, x, "residual"),
      .norm = norm_of(weight, bias, running_mean, running_var, momentum, eps, statistics, 0, x),
      .residual_norm =
          norm_of(residual_weight, residual_bias, residual_running_mean, residual_running_var,
                  residual_momentum, residual_eps, statistics, 1, x),
      .training = training,
      .relu = true,
      .out = out.data_ptr(),
      .out_pitch = view.n_channels * view.n_inner,
      .mask = mask_data(mask, x, view),
  });
  return {out, mask, statistics};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dual_batch_norm_backward(
    const Tensor& dout, const Tensor& x, const Tensor& residual, const Tensor& mask,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual_weight,
    const OptionalTensor& residual_bias, const Tensor& statistics, bool training, bool need_dx,
    bool need_dresidual, bool need_dparams) {
  const Device device(x);
  const View view = view_of(x);
  const uint8_t* bits = mask_data(mask, x, view);
  STD_TORCH_CHECK(bits, "mask: expected one, got none");
  Tensor dx = need_dx ? empty_like(x) : not_asked_for(x);
  Tensor dresidual = need_dresidual ? empty_like(x) : not_asked_for(x);
  Tensor dweight = empty_gradient(weight, x, need_dparams);
  Tensor dbias = empty_gradient(bias, x, need_dparams);
  Tensor residual_dweight = empty_gradient(residual_weight, x, need_dparams);
  Tensor residual_dbias = empty_gradient(residual_bias, x, need_dparams);
  device.batch_norm_backward({
      .view = view,
      .dtype = dtype_of(x),
      .dout = data_like(dout, x, "dout"),
      .x = x.data_ptr(),
      .residual = data_like(residual, x, "residual"),
      .mask = bits,
      .norm = norm_of(weight, bias, {}, {}, 0, 0, statistics, 0, x),
      .residual_norm = norm_of(residual_weight, residual_bias, {}, {}, 0, 0, statistics, 1, x),
      .training = training,
      .relu = true,
      .dx = need_dx ? dx.data_ptr() : nullptr,
      .dresidual = need_dresidual ? dresidual.data_ptr() : nullptr,
      .dweight = gradient_data(dweight, x, "dweight"),
      .dbias = gradient_data(dbias, x, "dbias"),
      .residual_dweight = gradient_data(residual_dweight, x, "residual_dweight"),
      .residual_dbias = gradient_data(residual_dbias, x, "residual_dbias"),
  });
  return {dx, dresidual, dweight, dbias, residual_dweight, residual_dbias};
}

template <typename Device>
Tensor batch_norm_stats(const Tensor& x) {
  const Device device(x);
  Tensor moments = empty_vector(x, 2 * x.size(1) + 1, raw_statistics_dtype(x));
  device.batch_norm_stats({
      .view = view_of(x),
      .dtype = dtype_of(x),
      .x = x.data_ptr(),
      .moments = moments.data_ptr(),
  });
  return moments;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> batch_norm_merge(const Tensor& moments,
                                                    const OptionalTensor& running_mean,
                                                    const OptionalTensor& running_var,
                                                    double momentum) {
  const Dtype dtype = dtype_of(moments);
  STD_TORCH_CHECK(moments.dim() == 2 && moments.numel() > 0 && moments.size(1) % 2 == 1 &&
                      moments.is_contiguous() && dtype == statistics_of(dtype),
                  "moments: expected those that batch_norm_stats returned, a row for each rank");
  const Device device(moments);
  const int64_t n_channels = moments.size(1) / 2;
  Tensor mean = empty_vector(moments, n_channels, raw_dtype(moments));
  Tensor var = empty_vector(moments, n_channels, raw_dtype(moments));
  Tensor count = empty_vector(moments, 1, raw_dtype(moments));
  device.batch_norm_merge({
      .n_ranks = moments.size(0),
      .n_channels = n_channels,
      .dtype = dtype,
      .moments = moments.data_ptr(),
      .running_mean = channels(running_mean, n_channels, moments, "running_mean"),
      .running_var = channels(running_var, n_channels, moments, "running_var"),
      .momentum = momentum,
      .mean = mean.data_ptr(),
      .var = var.data_ptr(),
      .count = count.data_ptr(),
  });
  return {mean, var, count};
}

template <typename Device>
std::tuple<Tensor, Tensor> batch_norm_backward_apply(const Tensor& dout, const Tensor& x,
                                                     const OptionalTensor& mask,
                                                     const OptionalTensor& weight,
                                                     const OptionalTensor& bias,
                                                     const Tensor& statistics, const Tensor& means,
                                                     bool relu, bool need_dx, bool need_dresidual) {
  const Device device(x);
  const View view = view_of(x);
  Tensor dx = need_dx ? empty_like(x) : not_asked_for(x);
  Tensor dresidual = need_dresidual ? empty_like(x) : not_asked_for(x);
  device.batch_norm_backward({
      .view = view,
      .dtype = dtype_of(x),
      .dout = data_like(dout, x, "dout"),
      .x = x.data_ptr(),
      .mask = mask ? mask_data(*mask, x, view) : nullptr,
      .norm = norm_of(weight, bias, {}, {}, 0, 0, statistics, 0, x),
      .means = statistics_data(means, 2, x, "means: expected two a channel, like statistics"),
      .training = true,
      .relu = relu,
      .dx = need_dx ? dx.data_ptr() : nullptr,
      .dresidual = need_dresidual ? dresidual.data_ptr() : nullptr,
  });
  return {dx, dresidual};
}

// Registers the operators of one device with a torch::stable library.
template <typename Device, typename Library>
void implement(Library& library) {
  library.impl("add_relu", TORCH_BOX(&add_relu<Device>));
  library.impl("add_relu_backward", TORCH_BOX(&add_relu_backward<Device>));
  library.impl("batch_norm", TORCH_BOX(&batch_norm<Device>));
  library.impl("batch_norm_inference", TORCH_BOX(&batch_norm_inference<Device>));
  library.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward<Device>));
  library.impl("batch_norm_relu_into", TORCH_BOX(&batch_norm_relu_into<Device>));
  library.impl("dual_batch_norm", TORCH_BOX(&dual_batch_norm<Device>));
  library.impl("dual_batch_norm_backward", TORCH_BOX(&dual_batch_norm_backward<Device>));
  library.impl("batch_norm_stats", TORCH_BOX(&batch_norm_stats<Device>));
  library.impl("batch_norm_merge", TORCH_BOX(&batch_norm_merge<Device>));
  library.impl("batch_norm_backward_apply", TORCH_BOX(&batch_norm_backward_apply<Device>));
}

}  // namespace fusedskip

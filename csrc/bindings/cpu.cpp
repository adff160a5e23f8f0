// fusedskip._C: the compiled operators, bound through LibTorch's stable ABI (torch >= 2.11). The
// module itself and the operators on the CPU.

#include <Python.h>

#include "../cpu/batch_norm.h"
#ifdef USE_CUDA
#include "../cuda/batch_norm.h"
#endif
#include "ops.h"

namespace fusedskip {
namespace {

struct Cpu {
  explicit Cpu(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cpu() && x.numel() > 0, "x: expected elements on a CPU");
  }

  void add_relu(Dtype dtype, int64_t numel, bool relu_first, const void* x, const void* residual,
                void* out, uint8_t* mask) const {
    cpu::add_relu(dtype, numel, relu_first, x, residual, out, mask);
  }
  void add_relu_backward(Dtype dtype, int64_t numel, const void* dout, const uint8_t* mask,
                         void* dx) const {
    cpu::add_relu_backward(dtype, numel, dout, mask, dx);
  }
  void batch_norm(const BatchNormForward& args) const { cpu::batch_norm(args); }
  void batch_norm_backward(const BatchNormBackward& args) const { cpu::batch_norm_backward(args); }
  void batch_norm_stats(const BatchNormStats& args) const { cpu::batch_norm_stats(args); }
  void batch_norm_merge(const BatchNormMerge& args) const { cpu::batch_norm_merge(args); }
};

STABLE_TORCH_LIBRARY_IMPL(fusedskip, CPU, m) { implement<Cpu>(m); }

PyObject* cpu_instruction_set(PyObject*, PyObject*) {
  return PyUnicode_FromString(cpu::instruction_set());
}

#ifdef USE_CUDA
PyObject* cuda_set_launches(PyObject*, PyObject* preferred) {
  const long launches = PyLong_AsLong(preferred);
  if (launches == -1 && PyErr_Occurred()) return nullptr;
  return PyLong_FromLong(long(cuda::set_launches(cuda::Launches(launches))));
}

PyObject* cuda_launched(PyObject*, PyObject*) {
  return PyUnicode_FromString(cuda::last_launched());
}

PyObject* cuda_error(PyObject*, PyObject*) {
  const cudaError_t error = cuda::find_kernels();
  if (error == cudaSuccess) Py_RETURN_NONE;
  return PyUnicode_FromString(cudaGetErrorString(error));
}
#endif

PyMethodDef methods[] = {
    {"cpu_instruction_set", cpu_instruction_set, METH_NOARGS,
     "The instruction set that the CPU kernels chose: 'avx512', 'avx2' or 'baseline'."},
#ifdef USE_CUDA
    {"cuda_set_launches", cuda_set_launches, METH_O,
     "How many launches a training pass on a GPU is: 1, where it has room for that, or 2; or 0, "
     "whichever has been measured to be faster. Returns what held before."},
    {"cuda_launched", cuda_launched, METH_NOARGS,
     "How the last such pass was launched: 'one launch', 'one launch, in clusters', "
     "'two launches' or 'two launches, overlapping'."},
    {"cuda_error", cuda_error, METH_NOARGS,
     "Why the current GPU cannot run the kernels, which were compiled for others, or None."},
#endif
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace fusedskip

// `import fusedskip._C` runs the registrations above.
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&fusedskip::module); }

// The four stages on one tile, compiled for every instruction set and storage type.
//
// The elementwise stages (apply, bwd_apply) do not care about the layout beyond where a coefficient
// comes from. The reducing stages (stats, bwd_reduce) do: channels-first they fold the lanes at the
// end of the tile, channels-last they add row to row.

#pragma once

#include "apply.h"
#include "bwd_apply.h"
#include "bwd_reduce.h"
#include "stats.h"

namespace fusedskip::cpu::FUSEDSKIP_ISA {

template <typename T>
constexpr Kernels kernels_of() {
  return {stats<T>, apply<T>, bwd_reduce<T>, bwd_apply<T>};
}

extern const Kernels kKernels[kDtypes] = {kernels_of<double>(), kernels_of<float>(),
                                          kernels_of<BFloat16>(), kernels_of<Float16>()};

}  // namespace fusedskip::cpu::FUSEDSKIP_ISA

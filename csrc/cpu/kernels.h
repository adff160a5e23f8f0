// The four stages on one tile, and the table through which an instruction set is chosen.
//
// A tile is a number of runs, each contiguous in memory, of a dense (n_outer, n_channels, n_inner)
// tensor. Channels-first, a run lies within one channel, and its coefficients are one number each.
// Channels-last (n_inner == 1) a run is a row of all channels, and the coefficients are arrays.

#pragma once

#include <cstdint>

#include "../args.h"

namespace fusedskip::cpu {

// How a gradient passes the ReLU: freely, by the saved bits, or by the sign of the recomputed
// output.
enum class Gate { kNone, kMask, kRecompute };

// Where the ReLU stands: nowhere, before the residual is added, or behind the sum.
enum class Relu { kNone, kFirst, kLast };

struct Runs {
  int64_t count;
  int64_t length;              // in elements
  int64_t stride;              // between the starts of two runs, in elements
  int64_t mask_stride;         // likewise in the 1-bit mask, in bytes
  int64_t channel_stride = 0;  // likewise in channels, of an elementwise stage channels-first
  int64_t prefetch = 0;        // from an element to what to fetch; 0: the hardware will know
  bool streams;                // results go past the caches; every run starts on a cache line
  bool per_lane = false;       // coefficients differ within a run (channels-last)
};

// The coefficients of one norm in statistics precision S: double for fp64, else float. Forward:
// y = (x - mean)·scale + bias. Backward: dx = scale·g + k2·(x - mean) + k3, or scale·g.
struct Affine {
  const void* mean;  // null where there is no norm
  const void* scale;
  const void* bias;
  const void* k2;  // for bwd_apply alone, null in evaluation
  const void* k3;
};

struct StatsTile {
  Runs runs;
  const void* x;
  double* sum;  // Σx per channel of the tile
  double* m2;   // Σ(x - tile mean)², likewise
};

struct ApplyTile {
  Runs runs;
  const void* x;
  const void* residual;  // or null
  void* out;
  int64_t out_stride;  // as that of the runs, which out may part further
  uint8_t* mask;       // or null
  Affine affine;       // absent in add_relu
  Affine residual_affine;
  Relu relu;
};

// What both backward stages read.
struct BwdTile {
  Runs runs;
  const void* dout;
  const void* x;
  const void* residual;  // null but where it has a norm of its own
  const uint8_t* mask;
  Affine affine;
  Affine residual_affine;
  Gate gate;
};

struct BwdReduceTile : BwdTile {
  double* sums[3];  // Σg, Σg·(x - mean) and, with a residual, likewise its own, per channel
};

struct BwdApplyTile : BwdTile {
  void* dx;         // or null
  void* dresidual;  // or null
};

struct Kernels {
  void (*stats)(const StatsTile&);
  void (*apply)(const ApplyTile&);
  void (*bwd_reduce)(const BwdReduceTile&);
  void (*bwd_apply)(const BwdApplyTile&);
};

// One table an instruction set, indexed by Dtype. All but baseline's exist on x86-64 alone.
namespace baseline {
extern const Kernels kKernels[kDtypes];
}
namespace avx2 {
extern const Kernels kKernels[kDtypes];
}
namespace avx512 {
extern const Kernels kKernels[kDtypes];
}

// Those of the instruction set that was chosen for this processor.
const Kernels& kernels(Dtype);

}  // namespace fusedskip::cpu

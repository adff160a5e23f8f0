// The kernels for AVX-512 F, BW, DQ, VL and VBMI: Ice Lake, Zen 4 and later. The processors before
// them lower their clock for vectors of 512 bits, and run AVX2.
//
// What other headers define inline comes before the target pragma: compiled behind it, the linker
// could choose that copy for every file, and an older processor would stop at it.

#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels.h"
#include "merge.h"
#include "storage.h"

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c")
#endif

// GCC's own AVX-512 headers start from a register that they leave undefined on purpose.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define FUSEDSKIP_ISA avx512
#define FUSEDSKIP_AVX512

#include "stages.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif

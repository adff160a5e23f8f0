// The kernels for AVX2, FMA and F16C (x86-64-v3).
//
// What other headers define inline comes before the target pragma: compiled behind it, the linker
// could choose that copy for every file, and an older processor would stop at it.

#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels.h"
#include "merge.h"
#include "storage.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FUSEDSKIP_ISA avx2
#define FUSEDSKIP_AVX2

#include "stages.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif

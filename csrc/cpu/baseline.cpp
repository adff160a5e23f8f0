// The kernels for any processor: SSE2 on x86-64, or whatever the target has at the least.

#define FUSEDSKIP_ISA baseline

#include "stages.h"

// Which of the compiled instruction sets this processor runs.

#include <cstdlib>
#include <string_view>

#include "batch_norm.h"
#include "kernels.h"

namespace fusedskip::cpu {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
};

// ATEN_CPU_CAPABILITY holds torch's own kernels to a lesser instruction set, and so these.
InstructionSet choose_instruction_set() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view capability = variable ? variable : "avx512";
  const bool allows_avx2 = capability != "default", allows_avx512 = capability == "avx512";
  if (allows_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi"))
    return {"avx512", avx512::kKernels};
  if (allows_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return {"avx2", avx2::kKernels};
#endif
  return {"baseline", baseline::kKernels};
}

const InstructionSet kInstructionSet = choose_instruction_set();

}  // namespace

const Kernels& kernels(Dtype dtype) { return kInstructionSet.kernels[int(dtype)]; }

const char* instruction_set() { return kInstructionSet.name; }

}  // namespace fusedskip::cpu

// What GPUs have measured: nothing yet. Written by `make choices`.

#pragma once

#include <array>

#include "choice.h"

namespace fusedskip::cuda {

// clang-format off
inline constexpr std::array<Measured, 0> kMeasured = {{
}};
// clang-format on

}  // namespace fusedskip::cuda

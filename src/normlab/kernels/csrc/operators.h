// The operators of `normlab.kernels.library` on a CPU.
#pragma once

#include <cstdint>
#include <functional>

namespace normlab {

// Hands them to torch, for good. address: where a function of torch's is in memory.
void register_operators(const std::function<uintptr_t(const char* name)>& address);

}  // namespace normlab

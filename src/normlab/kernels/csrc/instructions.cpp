// Which of the compiled sets of loops runs: what this machine has is asked once, when the module is loaded.
#include "instructions.h"

#include <cstring>

namespace normlab {

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> found = [] {
    std::vector<InstructionSet> sets = {{"plain", &kLoopsPlain}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) sets.push_back({"AVX2", &kLoopsAvx2});
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      sets.push_back({"AVX-512", &kLoopsAvx512});
    }
#endif
    return sets;
  }();
  return found;
}

const AllLoops* loops_in_use = instruction_sets().back().loops;

void use_instructions(const char* name) {
  for (const InstructionSet& set : instruction_sets()) {
    if (std::strcmp(set.name, name) == 0) loops_in_use = set.loops;
  }
}

}  // namespace normlab

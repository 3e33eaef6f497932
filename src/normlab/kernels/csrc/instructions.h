// Which of the compiled sets of loops runs: the best that this machine has instructions for.
#pragma once

#include <tuple>
#include <vector>

#include "loops.h"

namespace normlab {

struct InstructionSet {
  const char* name;
  const AllLoops* loops;
};

// All that this machine has, the best one last.
const std::vector<InstructionSet>& instruction_sets();

extern const AllLoops* loops_in_use;

// For tests; while no kernel runs.
void use_instructions(const char* name);

template <class T>
const Loops<T>& loops() {
  return std::get<Loops<T>>(*loops_in_use);
}

}  // namespace normlab

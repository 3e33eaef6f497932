// The table of all loops. Compiled once for each instruction set, under the name NORMLAB_LOOPS; `instructions.cpp`
// chooses one.
#include "../loops.h"

#include "affine.h"
#include "gradient.h"
#include "moments.h"
#include "positions.h"

namespace normlab {
namespace {

template <class T>
constexpr Loops<T> loops() {
  return {moments<T>,
          moments_rows<T>,
          distances<T>,
          distances_rows<T>,
          affine<T>,
          affine_rows<T>,
          gate<T>,
          products<T>,
          products_rows<T>,
          combine<T>,
          combine_rows<T>,
          position_forward<T>,
          position_backward<T>,
          position_forward_rows<T>,
          position_backward_rows<T>};
}

}  // namespace

const AllLoops NORMLAB_LOOPS = {loops<float>(), loops<BFloat16>(), loops<Float16>()};

}  // namespace normlab

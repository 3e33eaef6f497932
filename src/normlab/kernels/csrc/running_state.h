// The state of running batch norm. Each buffer is listed once; from the list come the pointers for the passes, and the
// facts that `operators.cpp` checks.
#pragma once

#include <cstdint>
#include <type_traits>

namespace normlab {

// `normlab.kernels.running.State`, in its order: each buffer's type, name, and number of values for each channel, or 0
// for one value in all. A forward pass writes the statistics and reads the averages, a backward pass writes the rest.
#define NORMLAB_STATISTICS(BUFFER)        \
  BUFFER(float, running_mean, 1)          \
  BUFFER(float, running_var, 1)           \
  BUFFER(int64_t, num_batches_tracked, 0) \
  BUFFER(float, share, 0)                 \
  BUFFER(float, innovation, 1)            \
  BUFFER(float, gradient_share, 0)

#define NORMLAB_AVERAGES(BUFFER)     \
  BUFFER(float, gradient_average, 2) \
  BUFFER(float, gradient_latest, 2)

#define NORMLAB_STEPS(BUFFER)           \
  BUFFER(float, parameters_before, 2)   \
  BUFFER(float, parameters_gradient, 2) \
  BUFFER(float, log_learning_rate, 0)   \
  BUFFER(float, learning_rate_steps, 0) \
  BUFFER(float, output_square, 0)       \
  BUFFER(float, step_length, 0)         \
  BUFFER(float, latest_gradient_share, 0)

// The facts about a buffer.
struct Buffer {
  const char* name;
  bool is_int64;  // else float32
  int64_t each;
};
#define NORMLAB_POINTER(type, name, each) type* name;
#define NORMLAB_FACTS(type, name, each) {#name, std::is_same_v<type, int64_t>, each},

struct Statistics {
  NORMLAB_STATISTICS(NORMLAB_POINTER)
  static constexpr Buffer kBuffers[] = {NORMLAB_STATISTICS(NORMLAB_FACTS)};
};
struct Averages {
  NORMLAB_AVERAGES(NORMLAB_POINTER)
  static constexpr Buffer kBuffers[] = {NORMLAB_AVERAGES(NORMLAB_FACTS)};
};
struct Steps {
  NORMLAB_STEPS(NORMLAB_POINTER)
  static constexpr Buffer kBuffers[] = {NORMLAB_STEPS(NORMLAB_FACTS)};
};

}  // namespace normlab

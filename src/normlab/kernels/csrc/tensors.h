// What a norm reads and writes: the tensors of a pass, as pointers, and how x lies in memory. Each norm has a struct of
// its pointers, which Python lists in the order of the fields: see `launch.forward` and `launch.backward`.
#pragma once

#include <cstdint>

#include "loops.h"

namespace normlab {

// A tensor of (images, channels, space). Each channel of each image is a run of `space` values; or, if `last`, channels
// are last in memory, and each image has `space` rows of them.
struct Shape {
  int64_t images, channels, space;
  bool last;

  int64_t values() const { return images * space; }  // of a channel
  int64_t numel() const { return images * channels * space; }

  // What one thread takes at a time: with channels last some rows of an image, else a run. Sums are taken segment by
  // segment and then added in order, so that they are the same for any number of threads.
  static constexpr int64_t kRows = 256;
  int64_t segments_per_image() const { return last ? (space + kRows - 1) / kRows : 1; }
  int64_t segments() const { return images * segments_per_image(); }
};

// How x lies in memory. Tensors of its shape lie like it: y, a residual, the gradients of all three.
struct Layout {
  int type;  // 0: float32, 1: bfloat16, 2: float16
  Shape shape;
};

struct Forward {
  const void* x;
  void* y;
  const float *weight, *bias;  // of each channel, or null for 1 and 0
  float* saved;                // written: means, then 1/√(variance + eps)
};

struct Backward {
  const void *grad, *x;
  void* grad_x;  // written, as are the last two
  const float *weight, *bias, *saved;
  float *grad_weight, *grad_bias;
};

inline float or_one(const float* values, int64_t i) { return values ? values[i] : 1.0f; }

template <class T>
const T* of_type(const void* values) {
  return static_cast<const T*>(values);
}
template <class T>
T* of_type(void* values) {
  return static_cast<T*>(values);
}

// Calls f with these pointers, typed. type: as in `Layout`.
template <class F, class... Values>
void with_type(int type, F f, Values*... values) {
  switch (type) {
    case 0:
      return f(of_type<float>(values)...);
    case 1:
      return f(of_type<BFloat16>(values)...);
    default:
      return f(of_type<Float16>(values)...);
  }
}

}  // namespace normlab

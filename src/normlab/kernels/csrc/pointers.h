// What Python hands over, pointers and types as numbers, and what is made of statistics on the way to the loops.
#pragma once

#include <cstdint>
#include <vector>

#include "loops.h"
#include "norms.h"

namespace normlab {

template <class T>
T* at(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

// Calls f with a null pointer of the type of the values.
template <class F>
auto with_type(int type, F f) {
  switch (type) {
    case 0:
      return f(static_cast<float*>(nullptr));
    case 1:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<Float16*>(nullptr));
  }
}

inline float lerp(float from, float to, float share) {
  return share < 0.5f ? from + share * (to - from) : to - (to - from) * (1 - share);
}

inline float or_one(const float* values, int64_t i) { return values ? values[i] : 1.0f; }

// z = weight (x − mean) inverse + bias, with the activation after it. For use before the thread's next call.
inline Gates gates(int64_t channels, const float* inverse, const float* weight, const float* bias, double slope) {
  thread_local std::vector<float> scale, zeros;
  scale.resize(channels);
  zeros.resize(channels);
  for (int64_t c = 0; c < channels; ++c) scale[c] = inverse[c] * or_one(weight, c);
  return {scale.data(), bias ? bias : zeros.data(), static_cast<float>(slope)};
}

}  // namespace normlab

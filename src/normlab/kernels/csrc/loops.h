// The loops over all values of a tensor, one set for each type of value and instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace normlab {

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

inline float to_float(float value) { return value; }
inline float to_float(Float16 value) { return static_cast<float>(value); }
inline float to_float(BFloat16 value) {
  const uint32_t word = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

// How many sums `products` takes.
constexpr int kSums = 5;

// The activation after a norm's z = scale (x − mean) + bias: z where z > 0, else slope·z, with a slope from 0 (ReLU) to
// 1 (none). Its gradient passes where z > 0, else slope times as long; z is computed again for it, not kept.
struct Gate {
  float scale, bias, slope;
};
struct Gates {
  const float *scale, *bias;
  float slope;
  Gates at(int64_t offset) const { return {scale + offset, bias + offset, slope}; }
  Gate of(int64_t channel) const { return {scale[channel], bias[channel], slope}; }
};

// Each loop comes in two forms. In the first, n values of one channel lie next to each other. In the second, n rows of
// all channels do, and what belongs to a channel is an array.
template <class T>
struct Loops {
  // sums: Σd, Σd² with d = x − shift.
  void (*moments)(const T* x, int64_t n, float shift, float* sums);
  void (*moments_rows)(const T* x, int64_t n, int64_t channels, const float* shift, float* sums);

  // y: z and the activation after it.
  void (*affine)(const T* x, T* y, int64_t n, float mean, Gate z);
  void (*affine_rows)(const T* x, T* y, int64_t n, int64_t channels, const float* mean, Gates z);

  // sums: Σg, Σgd, Σg², Σd, Σd² with d = x − mean, and g what the activation after z lets through.
  void (*products)(const T* g, const T* x, int64_t n, float mean, Gate z, float* sums);
  void (*products_rows)(const T* g, const T* x, int64_t n, int64_t channels, const float* mean, Gates z, float* sums);

  // out = factor·p·g + q (x − mean) + r, and g as above.
  void (*combine)(const T* g, const T* x, T* out, int64_t n, float factor, float mean, Gate z, float p, float q,
                  float r);
  void (*combine_rows)(const T* g, const T* x, T* out, int64_t n, int64_t channels, float factor, const float* mean,
                       Gates z, const float* p, const float* q, const float* r);
};

struct AllLoops {
  Loops<float> of_float;
  Loops<BFloat16> of_bfloat16;
  Loops<Float16> of_float16;
};

// Sums in the second form are [channel][sum], in the first [sum].
extern const AllLoops kLoopsPlain;
#if defined(__x86_64__)
extern const AllLoops kLoopsAvx2;
extern const AllLoops kLoopsAvx512;
#endif

}  // namespace normlab

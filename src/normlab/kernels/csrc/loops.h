// The loops over all values of a tensor: what each computes. There is a table of them for each type of value and each
// instruction set; the code is in `loops/`.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>

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

// How many sums `products` takes; the gradient of a norm needs the first two.
constexpr int kSums = 5, kOfGradient = 2;

// How many positions a norm of positions takes at a time.
constexpr int64_t kPositions = 256;

// The activation after a norm's z = scale (x − mean) + bias: z where z > 0, else slope·z, with a slope from 0 (ReLU) to
// 1 (none). Its gradient passes where z > 0, else slope times as long; z is computed again for it, not kept.
struct Gates {
  const float *scale, *bias;
  float slope;
  Gates at(int64_t offset) const { return {scale + offset, bias + offset, slope}; }
};

// Runs of a tensor, from `first` to before `last`: `space` values each, run i of channel i % channels.
struct Runs {
  int64_t first, last, channels, space;
};

// A norm of each position over its channels. weight, bias: null for 1 and 0. centred: the mean is subtracted.
struct PositionNorm {
  int64_t channels;
  const float *weight, *bias;
  bool centred;
  float eps;
};

// Each loop comes in two forms. In the first, the values of a channel of an image are a run. In the second, n rows of
// all channels lie next to each other. What belongs to a channel is an array.
template <class T>
struct Loops {
  // sums: Σd, Σd² with d = x − shift, [run][sum] or [channel][sum].
  void (*moments)(const T* x, Runs runs, const float* shift, float* sums);
  void (*moments_rows)(const T* x, int64_t n, int64_t channels, const float* shift, float* sums);

  // sums: Σd, of runs of few values.
  void (*distances)(const T* x, Runs runs, const float* mean, float* sums);
  void (*distances_rows)(const T* x, int64_t n, int64_t channels, const float* mean, float* sums);

  // y: z, plus `residual` unless that is null, and the activation after it.
  void (*affine)(const T* x, const T* residual, T* y, Runs runs, const float* mean, Gates z);
  void (*affine_rows)(const T* x, const T* residual, T* y, int64_t n, int64_t channels, const float* mean, Gates z);
  // out: the n values of g that the activation lets through. y: what the activation gave.
  void (*gate)(const T* y, const T* g, T* out, int64_t n, float slope);

  // sums: Σg, Σgd, Σg², Σd, Σd² with d = x − mean, and g what the activation after z lets through; as for `moments`.
  // all: take every sum, or only those that the gradient needs.
  void (*products)(bool all, const T* g, const T* x, Runs runs, const float* mean, Gates z, float* sums);
  void (*products_rows)(bool all, const T* g, const T* x, int64_t n, int64_t channels, const float* mean, Gates z,
                        float* sums);

  // out = factor·p·g + q (x − mean) + r, and g as above. factor: of each image, or null for 1; in rows of one image.
  void (*combine)(const T* g, const T* x, T* out, Runs runs, const float* factor, const float* mean, Gates z,
                  const float* p, const float* q, const float* r);
  void (*combine_rows)(const T* g, const T* x, T* out, int64_t n, int64_t channels, float factor, const float* mean,
                       Gates z, const float* p, const float* q, const float* r);

  // Norms of n positions, next to each other, at most kPositions of them; a channel lies `stride` after the one before.
  // mean, inverse: of each position, written by the forward pass. sums: Σg x̂ and Σg of each channel, [sum][channel].
  void (*position_forward)(const T* x, T* y, int64_t n, int64_t stride, const PositionNorm& norm, float* mean,
                           float* inverse);
  void (*position_backward)(const T* g, const T* x, T* out, int64_t n, int64_t stride, const PositionNorm& norm,
                            const float* mean, const float* inverse, float* sums);
  void (*position_forward_rows)(const T* x, T* y, int64_t n, const PositionNorm& norm, float* mean, float* inverse);
  void (*position_backward_rows)(const T* g, const T* x, T* out, int64_t n, const PositionNorm& norm, const float* mean,
                                 const float* inverse, float* sums);
};

using AllLoops = std::tuple<Loops<float>, Loops<BFloat16>, Loops<Float16>>;

extern const AllLoops kLoopsPlain;
#if defined(__x86_64__)
extern const AllLoops kLoopsAvx2;
extern const AllLoops kLoopsAvx512;
#endif

}  // namespace normlab

// Loops that write y, or pass a gradient through the activation: one multiplication and addition for each value.
#pragma once

#include <cstdint>

#include "parts.h"
#include "simd.h"

namespace normlab {
namespace {

// The values of `residual`, if it is there.
template <int W, bool Added, class T, class Floats>
Floats plus(Floats value, const T* residual, int64_t i) {
  if constexpr (Added) value = value + Register<W>::load(residual + i);
  return value;
}

template <int W, bool Gated, bool Added, class T>
void affine_part(const T* x, const T* residual, T* y, int64_t i, int64_t end, float mean, Gate z) {
  using R = Register<W>;
  for (; i + W <= end; i += W) {
    const auto value = plus<W, Added>((R::load(x + i) - mean) * z.scale + z.bias, residual, i);
    R::store(y + i, Gated ? gated(value, value, z.slope) : value);
  }
  if constexpr (W > 1) affine_part<W / 2, Gated, Added>(x, residual, y, i, end, mean, z);
}

template <bool Gated, bool Added, class T>
void affine_runs(const T* x, const T* residual, T* y, Runs runs, const float* mean, Gates z) {
  each_run(runs, [&](int64_t, int64_t, int64_t c, int64_t offset) {
    const T* added = Added ? residual + offset : nullptr;
    affine_part<kWidth, Gated, Added>(x + offset, added, y + offset, 0, runs.space, mean[c], gate(z, c));
  });
}

template <class T>
void affine(const T* x, const T* residual, T* y, Runs runs, const float* mean, Gates z) {
  const auto alone = z.slope == 1 ? affine_runs<false, false, T> : affine_runs<true, false, T>;
  const auto added = z.slope == 1 ? affine_runs<false, true, T> : affine_runs<true, true, T>;
  (residual ? added : alone)(x, residual, y, runs, mean, z);
}

template <int W, bool Gated, bool Added, class T>
void affine_rows_part(const T* x, const T* residual, T* y, int64_t n, int64_t channels, int64_t c, const float* mean,
                      Gates z) {
  using R = Register<W>;
  for (; c + W <= channels; c += W) {
    const auto m = R::load(mean + c), s = R::load(z.scale + c), b = R::load(z.bias + c);
    for (int64_t j = c; j < n * channels; j += channels) {
      const auto value = plus<W, Added>((R::load(x + j) - m) * s + b, residual, j);
      R::store(y + j, Gated ? gated(value, value, z.slope) : value);
    }
  }
  if constexpr (W > 1) affine_rows_part<W / 2, Gated, Added>(x, residual, y, n, channels, c, mean, z);
}

template <int W, bool Gated, bool Added, class T>
void affine_row_part(const T* x, const T* residual, T* y, int64_t channels, int64_t c, const float* mean, Gates z) {
  using R = Register<W>;
  for (; c + W <= channels; c += W) {
    const auto alone = (R::load(x + c) - R::load(mean + c)) * R::load(z.scale + c) + R::load(z.bias + c);
    const auto value = plus<W, Added>(alone, residual, c);
    R::store(y + c, Gated ? gated(value, value, z.slope) : value);
  }
  if constexpr (W > 1) affine_row_part<W / 2, Gated, Added>(x, residual, y, channels, c, mean, z);
}

template <bool Gated, bool Added, class T>
void affine_of_rows(const T* x, const T* residual, T* y, int64_t n, int64_t channels, const float* mean, Gates z) {
  if (channels < kLongRow) {
    return affine_rows_part<kWidth, Gated, Added>(x, residual, y, n, channels, 0, mean, z);
  }
  for (int64_t j = 0; j < n * channels; j += channels) {
    affine_row_part<kWidth, Gated, Added>(x + j, Added ? residual + j : nullptr, y + j, channels, 0, mean, z);
  }
}

template <class T>
void affine_rows(const T* x, const T* residual, T* y, int64_t n, int64_t channels, const float* mean, Gates z) {
  const auto alone = z.slope == 1 ? affine_of_rows<false, false, T> : affine_of_rows<true, false, T>;
  const auto added = z.slope == 1 ? affine_of_rows<false, true, T> : affine_of_rows<true, true, T>;
  (residual ? added : alone)(x, residual, y, n, channels, mean, z);
}

template <class T>
void gate(const T* y, const T* g, T* out, int64_t n, float slope) {
  in_steps<kWidth>(n, [&](auto width, int64_t i) {
    using R = Register<width.value>;
    R::store(out + i, gated(R::load(y + i), R::load(g + i), slope));
  });
}

}  // namespace
}  // namespace normlab

// Loops that read x for its statistics: sums of distances and of their squares.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parts.h"
#include "simd.h"

namespace normlab {
namespace {

template <int W, class T>
void moments_part(const T* x, int64_t i, int64_t end, float shift, double* sums) {
  using R = Register<W>;
  if (i + W <= end) {
    typename R::Floats sum = {}, squares = {};
    for (; i + W <= end; i += W) {
      auto d = R::load(x + i) - shift;
      sum += d;
      squares += d * d;
    }
    sums[0] += R::sum(sum);
    sums[1] += R::sum(squares);
  }
  if constexpr (W > 1) moments_part<W / 2>(x, i, end, shift, sums);
}

template <class T>
void moments(const T* x, Runs runs, const float* shift, float* sums) {
  each_run(runs, [&](int64_t run, int64_t, int64_t c, int64_t offset) {
    double total[2] = {};
    for (int64_t i = 0; i < runs.space; i += kBlock) {
      moments_part<kWidth>(x + offset, i, std::min(i + kBlock, runs.space), shift[c], total);
    }
    std::copy_n(total, 2, sums + run * 2);
  });
}

template <int W, class T>
void moments_rows_part(const T* x, int64_t n, int64_t channels, int64_t c, const float* shift, float* sums) {
  using R = Register<W>;
  for (; c + W <= channels; c += W) {
    const auto m = R::load(shift + c);
    typename R::Floats sum = {}, squares = {};
    for (const T* row = x + c; row < x + n * channels; row += channels) {
      auto d = R::load(row) - m;
      sum += d;
      squares += d * d;
    }
    for (int i = 0; i < W; ++i) {
      sums[2 * (c + i)] = at(sum, i);
      sums[2 * (c + i) + 1] = at(squares, i);
    }
  }
  if constexpr (W > 1) moments_rows_part<W / 2>(x, n, channels, c, shift, sums);
}

// Adds a value to each of W sums in memory.
template <int W, int Rows, class T>
void moments_row_part(const T* x, int64_t stride, int64_t channels, int64_t c, const float* shift, float* sums) {
  using R = Register<W>;
  for (; c + W <= channels; c += W) {
    const auto s = R::load(shift + c);
    typename R::Floats sum = {}, squares = {};
    for (int row = 0; row < Rows; ++row) {
      const auto d = R::load(x + row * stride + c) - s;
      sum += d;
      squares += d * d;
    }
    add_to<W>(sums + c, sum);
    add_to<W>(sums + channels + c, squares);
  }
  if constexpr (W > 1) moments_row_part<W / 2, Rows>(x, stride, channels, c, shift, sums);
}

template <class T>
void moments_rows(const T* x, int64_t n, int64_t channels, const float* shift, float* sums) {
  if (channels < kLongRow) return moments_rows_part<kWidth>(x, n, channels, 0, shift, sums);
  thread_local std::vector<float> total;
  each_piece(channels, [&](int64_t c, int64_t length) {
    total.assign(2 * length, 0);
    const auto add = [&](auto part) {
      return [&, part](int64_t at) { part(x + c + at, channels, length, 0, shift + c, total.data()); };
    };
    each_rows(n, channels, add(moments_row_part<kWidth, kRows, T>), add(moments_row_part<kWidth, 1, T>));
    transpose(total, length, sums + 2 * c);
  });
}

template <int W, class T>
float distance_part(const T* x, int64_t i, int64_t end, float mean) {
  using R = Register<W>;
  float total = 0;
  if (i + W <= end) {
    typename R::Floats sum = {};
    for (; i + W <= end; i += W) sum += R::load(x + i) - mean;
    total = R::sum(sum);
  }
  if constexpr (W > 1) total += distance_part<W / 2>(x, i, end, mean);
  return total;
}

template <int W, class T>
void distances_runs(const T* x, Runs runs, const float* mean, float* sums) {
  each_run(runs, [&](int64_t run, int64_t, int64_t c, int64_t offset) {
    sums[run] = distance_part<W>(x + offset, 0, runs.space, mean[c]);
  });
}

template <class T>
void distances(const T* x, Runs runs, const float* mean, float* sums) {
  constexpr int kMost = kRegister < 16 ? kRegister : 16, kLeast = kMost < 4 ? kMost : 4;
  (runs.space < kMost ? distances_runs<kLeast, T> : distances_runs<kMost, T>)(x, runs, mean, sums);
}

template <int W, class T>
void distances_rows_part(const T* x, int64_t n, int64_t channels, int64_t c, const float* mean, float* sums) {
  using R = Register<W>;
  for (; c + W <= channels; c += W) {
    const auto m = R::load(mean + c);
    typename R::Floats sum = {};
    for (int64_t j = c; j < n * channels; j += channels) sum += R::load(x + j) - m;
    R::store(sums + c, sum);
  }
  if constexpr (W > 1) distances_rows_part<W / 2>(x, n, channels, c, mean, sums);
}

template <class T>
void distances_rows(const T* x, int64_t n, int64_t channels, const float* mean, float* sums) {
  distances_rows_part<kWidth>(x, n, channels, 0, mean, sums);
}

}  // namespace
}  // namespace normlab

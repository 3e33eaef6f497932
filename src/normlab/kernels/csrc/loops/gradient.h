// Loops of the backward pass: the sums of g and of its products with x, and the gradient of x that is made of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parts.h"
#include "simd.h"

namespace normlab {
namespace {

// The first N sums of `products`, as many values at a time as there are in Floats.
template <int N, class Floats>
struct Products {
  Floats sum = {}, product = {}, squares = {}, distance = {}, distances = {};

  void add(Floats grad, Floats d) {
    sum += grad;
    product += grad * d;
    if constexpr (N > 2) {
      squares += grad * grad;
      distance += d;
      distances += d * d;
    }
  }
  // Calls part(i, sum) for each.
  template <class Part>
  void each(Part part) const {
    part(0, sum);
    part(1, product);
    if constexpr (N > 2) {
      part(2, squares);
      part(3, distance);
      part(4, distances);
    }
  }
};

template <int W, bool Gated, int N, class T>
void products_part(const T* g, const T* x, int64_t i, int64_t end, float mean, Gate z, double* sums) {
  using R = Register<W>;
  if (i + W <= end) {
    Products<N, typename R::Floats> of;
    for (; i + W <= end; i += W) {
      const auto grad = R::load(g + i), d = R::load(x + i) - mean;
      of.add(Gated ? gated(d * z.scale + z.bias, grad, z.slope) : grad, d);
    }
    of.each([&](int at, const auto& values) { sums[at] += R::sum(values); });
  }
  if constexpr (W > 1) products_part<W / 2, Gated, N>(g, x, i, end, mean, z, sums);
}

template <bool Gated, int N, class T>
void products_runs(const T* g, const T* x, Runs runs, const float* mean, Gates z, float* sums) {
  each_run(runs, [&](int64_t run, int64_t, int64_t c, int64_t offset) {
    double total[N] = {};
    for (int64_t i = 0; i < runs.space; i += kBlock) {
      const int64_t end = std::min(i + kBlock, runs.space);
      products_part<kWidth, Gated, N>(g + offset, x + offset, i, end, mean[c], gate(z, c), total);
    }
    std::copy_n(total, N, sums + run * N);
  });
}

template <class T>
void products(bool all, const T* g, const T* x, Runs runs, const float* mean, Gates z, float* sums) {
  const auto some = z.slope == 1 ? products_runs<false, kOfGradient, T> : products_runs<true, kOfGradient, T>;
  const auto every = z.slope == 1 ? products_runs<false, kSums, T> : products_runs<true, kSums, T>;
  (all ? every : some)(g, x, runs, mean, z, sums);
}

template <int W, bool Gated, int N, class T>
void products_rows_part(const T* g, const T* x, int64_t n, int64_t channels, int64_t c, const float* mean, Gates z,
                        float* sums) {
  using R = Register<W>;
  for (; c + W <= channels; c += W) {
    const auto m = R::load(mean + c), s = R::load(z.scale + c), b = R::load(z.bias + c);
    Products<N, typename R::Floats> of;
    for (int64_t j = c; j < n * channels; j += channels) {
      const auto grad = R::load(g + j), d = R::load(x + j) - m;
      of.add(Gated ? gated(d * s + b, grad, z.slope) : grad, d);
    }
    of.each([&](int sum, const auto& values) {
      for (int i = 0; i < W; ++i) sums[N * (c + i) + sum] = at(values, i);
    });
  }
  if constexpr (W > 1) products_rows_part<W / 2, Gated, N>(g, x, n, channels, c, mean, z, sums);
}

template <int W, bool Gated, int N, int Rows, class T>
void products_row_part(const T* g, const T* x, int64_t stride, int64_t channels, int64_t c, const float* mean, Gates z,
                       float* sums) {
  using R = Register<W>;
  for (; c + W <= channels; c += W) {
    const auto m = R::load(mean + c);
    Products<N, typename R::Floats> of;
    for (int row = 0; row < Rows; ++row) {
      const auto d = R::load(x + row * stride + c) - m;
      auto grad = R::load(g + row * stride + c);
      if constexpr (Gated) grad = gated(d * R::load(z.scale + c) + R::load(z.bias + c), grad, z.slope);
      of.add(grad, d);
    }
    of.each([&](int sum, const auto& values) { add_to<W>(sums + sum * channels + c, values); });
  }
  if constexpr (W > 1) products_row_part<W / 2, Gated, N, Rows>(g, x, stride, channels, c, mean, z, sums);
}

template <bool Gated, int N, class T>
void products_of_rows(const T* g, const T* x, int64_t n, int64_t channels, const float* mean, Gates z, float* sums) {
  if (channels < kLongRow) return products_rows_part<kWidth, Gated, N>(g, x, n, channels, 0, mean, z, sums);
  thread_local std::vector<float> total;
  each_piece(channels, [&](int64_t c, int64_t length) {
    total.assign(N * length, 0);
    const auto add = [&](auto part) {
      return
          [&, part](int64_t at) { part(g + c + at, x + c + at, channels, length, 0, mean + c, z.at(c), total.data()); };
    };
    each_rows(n, channels, add(products_row_part<kWidth, Gated, N, kRows, T>),
              add(products_row_part<kWidth, Gated, N, 1, T>));
    transpose(total, length, sums + N * c);
  });
}

template <class T>
void products_rows(bool all, const T* g, const T* x, int64_t n, int64_t channels, const float* mean, Gates z,
                   float* sums) {
  const auto some = z.slope == 1 ? products_of_rows<false, kOfGradient, T> : products_of_rows<true, kOfGradient, T>;
  const auto every = z.slope == 1 ? products_of_rows<false, kSums, T> : products_of_rows<true, kSums, T>;
  (all ? every : some)(g, x, n, channels, mean, z, sums);
}

template <int W, bool Gated, class T>
void combine_part(const T* g, const T* x, T* out, int64_t i, int64_t end, float mean, Gate z, float p, float q,
                  float r) {
  using R = Register<W>;
  for (; i + W <= end; i += W) {
    const auto grad = R::load(g + i), d = R::load(x + i) - mean;
    R::store(out + i, (Gated ? gated(d * z.scale + z.bias, grad, z.slope) : grad) * p + (d * q + r));
  }
  if constexpr (W > 1) combine_part<W / 2, Gated>(g, x, out, i, end, mean, z, p, q, r);
}

template <bool Gated, class T>
void combine_runs(const T* g, const T* x, T* out, Runs runs, const float* factor, const float* mean, Gates z,
                  const float* p, const float* q, const float* r) {
  each_run(runs, [&](int64_t, int64_t image, int64_t c, int64_t offset) {
    const float of_g = factor ? factor[image] * p[c] : p[c];
    combine_part<kWidth, Gated>(g + offset, x + offset, out + offset, 0, runs.space, mean[c], gate(z, c), of_g, q[c],
                                r[c]);
  });
}

template <class T>
void combine(const T* g, const T* x, T* out, Runs runs, const float* factor, const float* mean, Gates z, const float* p,
             const float* q, const float* r) {
  (z.slope == 1 ? combine_runs<false, T> : combine_runs<true, T>)(g, x, out, runs, factor, mean, z, p, q, r);
}

template <int W, bool Gated, class T>
void combine_rows_part(const T* g, const T* x, T* out, int64_t n, int64_t channels, int64_t c, float factor,
                       const float* mean, Gates z, const float* p, const float* q, const float* r) {
  using R = Register<W>;
  for (; c + W <= channels; c += W) {
    const auto m = R::load(mean + c), of_g = R::load(p + c) * factor, of_x = R::load(q + c), rest = R::load(r + c);
    const auto s = R::load(z.scale + c), b = R::load(z.bias + c);
    for (int64_t j = c; j < n * channels; j += channels) {
      const auto grad = R::load(g + j), d = R::load(x + j) - m;
      R::store(out + j, (Gated ? gated(d * s + b, grad, z.slope) : grad) * of_g + (d * of_x + rest));
    }
  }
  if constexpr (W > 1) combine_rows_part<W / 2, Gated>(g, x, out, n, channels, c, factor, mean, z, p, q, r);
}

template <int W, bool Gated, class T>
void combine_row_part(const T* g, const T* x, T* out, int64_t channels, int64_t c, float factor, const float* mean,
                      Gates z, const float* p, const float* q, const float* r) {
  using R = Register<W>;
  for (; c + W <= channels; c += W) {
    const auto grad = R::load(g + c), d = R::load(x + c) - R::load(mean + c);
    const auto passed = Gated ? gated(d * R::load(z.scale + c) + R::load(z.bias + c), grad, z.slope) : grad;
    R::store(out + c, passed * (R::load(p + c) * factor) + (d * R::load(q + c) + R::load(r + c)));
  }
  if constexpr (W > 1) combine_row_part<W / 2, Gated>(g, x, out, channels, c, factor, mean, z, p, q, r);
}

template <class T>
void combine_rows(const T* g, const T* x, T* out, int64_t n, int64_t channels, float factor, const float* mean, Gates z,
                  const float* p, const float* q, const float* r) {
  if (channels < kLongRow) {
    const auto part = z.slope == 1 ? combine_rows_part<kWidth, false, T> : combine_rows_part<kWidth, true, T>;
    part(g, x, out, n, channels, 0, factor, mean, z, p, q, r);
  } else {
    const auto part = z.slope == 1 ? combine_row_part<kWidth, false, T> : combine_row_part<kWidth, true, T>;
    for (int64_t j = 0; j < n * channels; j += channels) {
      part(g + j, x + j, out + j, channels, 0, factor, mean, z, p, q, r);
    }
  }
}

}  // namespace
}  // namespace normlab

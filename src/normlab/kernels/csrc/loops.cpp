// Compiled once for each instruction set: NORMLAB_LOOPS names its table of loops, see also `simd.h`.
#include "loops.h"

#include <algorithm>
#include <vector>

#include "position_loops.h"
#include "simd.h"

namespace normlab {
namespace {

// Single precision sums over this many values are added up in double precision.
constexpr int64_t kBlock = 4096;

// Rows of so many channels are gone through a few at a time, in pieces whose sums stay in the first-level cache: in
// columns, each value would be a step far from the last.
constexpr int64_t kLongRow = 128, kPiece = 512;
constexpr int kRows = 4;

// What there is of `Gates` for one channel.
struct Gate {
  float scale, bias, slope;
};
inline Gate gate(const Gates& z, int64_t channel) { return {z.scale[channel], z.bias[channel], z.slope}; }

// In each loop below a part takes as many values as it can W at a time and leaves the rest to the part of half the
// width. In the first form these are values of a channel, from `i` to `end`; in the second channels, from `c`.

// Calls part(run, image, channel, offset) for each run.
template <class Part>
void each_run(Runs runs, Part part) {
  int64_t image = runs.first / runs.channels, c = runs.first % runs.channels;
  for (int64_t run = runs.first; run < runs.last; ++run) {
    part(run, image, c, run * runs.space);
    if (++c == runs.channels) c = 0, ++image;
  }
}

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

// Calls several(offset) for each kRows of n rows, and one(offset) for those left over.
template <class Several, class One>
void each_rows(int64_t n, int64_t stride, Several several, One one) {
  int64_t row = 0;
  for (; row + kRows <= n; row += kRows) several(row * stride);
  for (; row < n; ++row) one(row * stride);
}

// Calls part(c, length) for each piece of a long row: the sums of a piece stay in the first-level cache.
template <class Part>
void each_piece(int64_t channels, Part part) {
  for (int64_t c = 0; c < channels; c += kPiece) part(c, std::min(kPiece, channels - c));
}

// From [sum][channel] to [channel][sum].
void transpose(const std::vector<float>& from, int64_t channels, float* to) {
  const int64_t each = static_cast<int64_t>(from.size()) / channels;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t sum = 0; sum < each; ++sum) *to++ = from[sum * channels + c];
  }
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

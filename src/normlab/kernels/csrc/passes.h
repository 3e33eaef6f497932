// The passes over a tensor that norms with statistics of channels are made of. Each shares out its segments to threads
// and picks the form of the loop (`loops.h`) that suits the tensor's layout.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "instructions.h"
#include "loops.h"
#include "pages.h"
#include "tensors.h"
#include "threads.h"

namespace normlab {

// Calls `rows(segment, image, offset, n)` for each segment of rows, or `some_runs(runs)` for some at a time.
template <class EachRows, class SomeRuns>
void each_segment(const Shape& shape, EachRows rows, SomeRuns some_runs) {
  if (shape.last) {
    const int64_t per_image = shape.segments_per_image();
    parallel_for(shape.segments(), shape.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t segment = begin; segment < end; ++segment) {
        const int64_t image = segment / per_image, first = segment % per_image * Shape::kRows;
        const int64_t n = std::min(Shape::kRows, shape.space - first);
        rows(segment, image, (image * shape.space + first) * shape.channels, n);
      }
    });
  } else {
    parallel_for(shape.images * shape.channels, shape.numel(),
                 [&](int64_t begin, int64_t end) { some_runs(Runs{begin, end, shape.channels, shape.space}); });
  }
}

// The same tensor, if images need not be told apart. With the channels last they become one image.
inline Shape without_images(const Shape& shape) {
  return shape.last ? Shape{1, shape.channels, shape.values(), true} : shape;
}

// Runs so short that a call for each takes longer than its values do. Such a tensor is gone through in rows instead: an
// image is a row, in which every position of every channel is a column of its own.
constexpr int64_t kShort = 64, kManyImages = 16, kMostColumns = 1 << 14;
inline bool has_short_runs(const Shape& shape) {
  return !shape.last && shape.space < kShort && shape.images >= kManyImages &&
         shape.channels * shape.space <= kMostColumns;
}
inline Shape rows_of_columns(const Shape& shape) { return {1, shape.channels * shape.space, shape.images, true}; }

// Repeats what belongs to a channel for each of its columns. For tensors with short runs, which have few columns.
class Columns {
 public:
  explicit Columns(const Shape& shape) : shape_(shape), columns_(shape.channels * shape.space) {
    values_.clear();
    if (has_short_runs(shape)) values_.reserve(kMost * columns_);  // what operator() returned stays where it is
  }
  const float* operator()(const float* of_channels) {
    for (int64_t c = 0; c < shape_.channels; ++c) values_.insert(values_.end(), shape_.space, of_channels[c]);
    return values_.data() + values_.size() - columns_;
  }
  Gates operator()(Gates z) { return {(*this)(z.scale), (*this)(z.bias), z.slope}; }

 private:
  static constexpr int64_t kMost = 6;
  const Shape shape_;
  const int64_t columns_;
  inline static thread_local std::vector<float> values_;
};

// Adds up the sums of all segments of `shape`, which has the channels of `tensor`, or its columns. each: how many sums
// a channel has.
inline void add_segments(const Shape& tensor, const Shape& shape, int64_t each, const float* sums, double* total) {
  const int64_t columns = shape.channels / tensor.channels;
  for (int64_t segment = 0; segment < shape.segments(); ++segment) {
    for (double* to = total; to < total + tensor.channels * each; to += each) {
      for (int64_t column = 0; column < columns; ++column) {
        for (int64_t i = 0; i < each; ++i) to[i] += *sums++;
      }
    }
  }
}

// Mean and biased variance of each channel.
template <class T>
void moments(const Shape& tensor, const T* x, float* mean, float* var) {
  const bool in_columns = has_short_runs(tensor);
  const Shape shape = in_columns ? rows_of_columns(tensor) : without_images(tensor);
  const int64_t channels = tensor.channels;
  thread_local std::vector<float> shift, sums;
  thread_local std::vector<double> total;
  shift.resize(channels);
  sums.resize(shape.segments() * shape.channels * 2);
  total.assign(channels * 2, 0);
  // Squares of the distance from a value of the channel, so that a mean far from 0 cancels nothing.
  for (int64_t c = 0; c < channels; ++c) shift[c] = to_float(x[tensor.last ? c : c * tensor.space]);
  Columns columns(tensor);
  const float* shifts = in_columns ? columns(shift.data()) : shift.data();
  float* to = sums.data();
  each_segment(
      shape,
      [&](int64_t segment, int64_t, int64_t offset, int64_t n) {
        loops<T>().moments_rows(x + offset, n, shape.channels, shifts, to + segment * shape.channels * 2);
      },
      [&](Runs runs) { loops<T>().moments(x, runs, shifts, to); });
  add_segments(tensor, shape, 2, to, total.data());
  const double n = static_cast<double>(tensor.values());
  for (int64_t c = 0; c < channels; ++c) {
    const double distance = total[2 * c] / n;
    mean[c] = static_cast<float>(shift[c] + distance);
    const double variance = total[2 * c + 1] / n - distance * distance;
    var[c] = static_cast<float>(variance < 0 ? 0 : variance);  // NaN stays
  }
}

// y: z, plus `residual` unless that is null, and the activation after it, see `Gates`.
template <class T>
void affine(const Shape& tensor, const T* x, const T* residual, T* y, const float* mean, Gates z) {
  prefer_large_pages(y, tensor.numel() * sizeof(T));
  const bool in_columns = has_short_runs(tensor);
  const Shape shape = in_columns ? rows_of_columns(tensor) : without_images(tensor);
  Columns columns(tensor);
  if (in_columns) mean = columns(mean), z = columns(z);
  each_segment(
      shape,
      [&](int64_t, int64_t, int64_t offset, int64_t n) {
        const T* added = residual ? residual + offset : nullptr;
        loops<T>().affine_rows(x + offset, added, y + offset, n, shape.channels, mean, z);
      },
      [&](Runs runs) { loops<T>().affine(x, residual, y, runs, mean, z); });
}

// out: what the activation lets through of g. y: what the activation gave.
template <class T>
void gate(int64_t n, const T* y, const T* g, T* out, float slope) {
  prefer_large_pages(out, n * sizeof(T));
  constexpr int64_t kPart = 1 << 12;
  parallel_for((n + kPart - 1) / kPart, n, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPart, last = std::min(end * kPart, n);
    loops<T>().gate(y + first, g + first, out + first, last - first, slope);
  });
}

// The sums of `Loops::products`, [segment][channel][sum], all of them or those that the gradient needs.
template <class T>
void products(bool all, const Shape& shape, const T* g, const T* x, const float* mean, Gates z, float* sums) {
  const int64_t channels = shape.channels, each = channels * (all ? kSums : kOfGradient);
  each_segment(
      shape,
      [&](int64_t segment, int64_t, int64_t offset, int64_t n) {
        loops<T>().products_rows(all, g + offset, x + offset, n, channels, mean, z, sums + segment * each);
      },
      [&](Runs runs) { loops<T>().products(all, g, x, runs, mean, z, sums); });
}

// The same sums over all images, [channel][sum].
template <class T>
void total_products(bool all, const Shape& tensor, const T* g, const T* x, const float* mean, Gates z, double* total) {
  const bool in_columns = has_short_runs(tensor);
  const Shape shape = in_columns ? rows_of_columns(tensor) : without_images(tensor);
  Columns columns(tensor);
  if (in_columns) mean = columns(mean), z = columns(z);
  thread_local std::vector<float> sums;
  const int64_t each = all ? kSums : kOfGradient;
  sums.resize(shape.segments() * shape.channels * each);
  products(all, shape, g, x, mean, z, sums.data());
  add_segments(tensor, shape, each, sums.data(), total);
}

// Whether images are small: then the sums of each image take longer than those of the whole batch and, where they are
// needed, Σg² and Σd of each image.
inline bool has_small_images(const Shape& shape) {
  return shape.last ? shape.images >= kManyImages && shape.space < kShort / 4 : has_short_runs(shape);
}

// Σg² of each image.
template <class T>
void image_squares(const Shape& shape, const T* g, float* squares) {
  const int64_t row = shape.channels * shape.space;
  const float zero = 0;
  parallel_for(shape.images, shape.numel(), [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      float sums[2];
      loops<T>().moments(g + image * row, {0, 1, 1, row}, &zero, sums);
      squares[image] = sums[1];
    }
  });
}

// Σd of each channel of each image, [image][channel].
template <class T>
void image_distances(const Shape& shape, const T* x, const float* mean, float* distances) {
  const int64_t channels = shape.channels, row = channels * shape.space;
  parallel_for(shape.images, shape.numel(), [&](int64_t begin, int64_t end) {
    if (!shape.last) {
      return loops<T>().distances(x, {begin * channels, end * channels, channels, shape.space}, mean, distances);
    }
    for (int64_t image = begin; image < end; ++image) {
      loops<T>().distances_rows(x + image * row, shape.space, channels, mean, distances + image * channels);
    }
  });
}

// out = factor·p·g + q (x − mean) + r, where g is what the activation after z lets through. factor: one for each image,
// or null for 1.
template <class T>
void combine(const Shape& tensor, const T* g, const T* x, T* out, const float* factor, const float* mean, Gates z,
             const float* p, const float* q, const float* r) {
  prefer_large_pages(out, tensor.numel() * sizeof(T));
  Shape shape = tensor;
  Columns columns(tensor);
  if (has_short_runs(tensor)) {
    shape = {tensor.images, tensor.channels * tensor.space, 1, true};
    mean = columns(mean), z = columns(z), p = columns(p), q = columns(q), r = columns(r);
  }
  if (!factor) shape = without_images(shape);
  each_segment(
      shape,
      [&](int64_t, int64_t image, int64_t offset, int64_t n) {
        const float f = factor ? factor[image] : 1.0f;
        loops<T>().combine_rows(g + offset, x + offset, out + offset, n, shape.channels, f, mean, z, p, q, r);
      },
      [&](Runs runs) { loops<T>().combine(g, x, out, runs, factor, mean, z, p, q, r); });
}

inline float lerp(float from, float to, float share) {
  return share < 0.5f ? from + share * (to - from) : to - (to - from) * (1 - share);
}

// z = weight (x − mean) inverse + bias, with the activation after it. What is returned lasts until this thread's next
// call.
template <class Pass>
Gates gates(const Layout& layout, const Pass& pass, double slope) {
  const int64_t channels = layout.shape.channels;
  const float* inverse = pass.saved + channels;
  thread_local std::vector<float> scale, zeros;
  scale.resize(channels);
  zeros.resize(channels);
  for (int64_t c = 0; c < channels; ++c) scale[c] = inverse[c] * or_one(pass.weight, c);
  return {scale.data(), pass.bias ? pass.bias : zeros.data(), static_cast<float>(slope)};
}

// The output of a norm of channels, once mean and 1/√(var + eps) are saved: z, plus `residual`, and the activation.
inline void normalize(const Layout& layout, const Forward& pass, const void* residual, double slope) {
  const Gates z = gates(layout, pass, slope);
  const auto of_type = [&](auto* x, auto* residual, auto* y) { affine(layout.shape, x, residual, y, pass.saved, z); };
  with_type(layout.type, of_type, pass.x, residual, pass.y);
}

}  // namespace normlab

// Norms whose statistics are of channels: the passes over a tensor that they are made of.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "loops.h"
#include "pages.h"
#include "threads.h"

namespace normlab {

// A tensor of (images, channels, space), as one run of `space` values for each image and channel, or, if `last`, with
// the channels last in memory: `space` rows for each image.
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

template <class T>
const Loops<T>& loops();

// Calls `rows(segment, image, offset, n)` for each segment of rows, or `run(segment, channel, offset)` for each run.
template <class Rows, class Run>
void each_segment(const Shape& shape, Rows rows, Run run) {
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
    parallel_for(shape.images * shape.channels, shape.numel(), [&](int64_t begin, int64_t end) {
      int64_t segment = begin / shape.channels, channel = begin % shape.channels;
      for (int64_t i = begin; i < end; ++i) {
        run(segment, channel, i * shape.space);
        if (++channel == shape.channels) channel = 0, ++segment;
      }
    });
  }
}

// Where images need not be told apart, with the channels last, they are one.
inline Shape without_images(const Shape& shape) {
  return shape.last ? Shape{1, shape.channels, shape.values(), true} : shape;
}

// Mean and biased variance of each channel.
template <class T>
void moments(const Shape& tensor, const T* x, float* mean, float* var) {
  const Shape shape = without_images(tensor);
  const int64_t channels = shape.channels;
  thread_local std::vector<float> shift, sums;
  thread_local std::vector<double> total;
  shift.resize(channels);
  sums.resize(shape.segments() * channels * 2);
  total.assign(channels * 2, 0);
  // Squares of the distance from a value of the channel, so that a mean far from 0 cancels nothing.
  for (int64_t c = 0; c < channels; ++c) shift[c] = to_float(x[shape.last ? c : c * shape.space]);
  const float* shifts = shift.data();
  float* to = sums.data();
  each_segment(
      shape,
      [&](int64_t segment, int64_t, int64_t offset, int64_t n) {
        loops<T>().moments_rows(x + offset, n, channels, shifts, to + segment * channels * 2);
      },
      [&](int64_t segment, int64_t c, int64_t offset) {
        loops<T>().moments(x + offset, shape.space, shifts[c], to + (segment * channels + c) * 2);
      });
  for (int64_t segment = 0; segment < shape.segments(); ++segment) {
    for (int64_t i = 0; i < channels * 2; ++i) total[i] += sums[segment * channels * 2 + i];
  }
  const double n = static_cast<double>(shape.values());
  for (int64_t c = 0; c < channels; ++c) {
    const double distance = total[2 * c] / n;
    mean[c] = static_cast<float>(shift[c] + distance);
    const double variance = total[2 * c + 1] / n - distance * distance;
    var[c] = static_cast<float>(variance < 0 ? 0 : variance);  // NaN stays
  }
}

// y: z and the activation after it, see `Gate`.
template <class T>
void affine(const Shape& tensor, const T* x, T* y, const float* mean, Gates z) {
  prefer_large_pages(y, tensor.numel() * sizeof(T));
  const Shape shape = without_images(tensor);
  each_segment(
      shape,
      [&](int64_t, int64_t, int64_t offset, int64_t n) {
        loops<T>().affine_rows(x + offset, y + offset, n, shape.channels, mean, z);
      },
      [&](int64_t, int64_t c, int64_t offset) {
        loops<T>().affine(x + offset, y + offset, shape.space, mean[c], z.of(c));
      });
}

// The sums of `Loops::products`, [segment][channel][sum].
template <class T>
void products(const Shape& shape, const T* g, const T* x, const float* mean, Gates z, float* sums) {
  const int64_t channels = shape.channels;
  each_segment(
      shape,
      [&](int64_t segment, int64_t, int64_t offset, int64_t n) {
        loops<T>().products_rows(g + offset, x + offset, n, channels, mean, z, sums + segment * channels * kSums);
      },
      [&](int64_t segment, int64_t c, int64_t offset) {
        float* to = sums + (segment * channels + c) * kSums;
        loops<T>().products(g + offset, x + offset, shape.space, mean[c], z.of(c), to);
      });
}

// out = factor·p·g + q (x − mean) + r, with a factor for each image, or 1 if `factor` is null, and g what the
// activation after z lets through.
template <class T>
void combine(const Shape& shape, const T* g, const T* x, T* out, const float* factor, const float* mean, Gates z,
             const float* p, const float* q, const float* r) {
  prefer_large_pages(out, shape.numel() * sizeof(T));
  each_segment(
      shape,
      [&](int64_t, int64_t image, int64_t offset, int64_t n) {
        const float f = factor ? factor[image] : 1.0f;
        loops<T>().combine_rows(g + offset, x + offset, out + offset, n, shape.channels, f, mean, z, p, q, r);
      },
      [&](int64_t image, int64_t c, int64_t offset) {
        const float f = factor ? factor[image] : 1.0f;
        loops<T>().combine(g + offset, x + offset, out + offset, shape.space, f, mean[c], z.of(c), p[c], q[c], r[c]);
      });
}

}  // namespace normlab

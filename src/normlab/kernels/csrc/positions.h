// Layer norm and RMS norm: each position of each image has statistics, over its channels. Positions are gone through
// some at a time, since with the channels first the values of one lie far apart.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "instructions.h"
#include "loops.h"
#include "pages.h"
#include "tensors.h"
#include "threads.h"

namespace normlab {

// How often `each_positions` calls. With the channels last a call may have positions of several images.
inline int64_t position_segments(const Shape& shape) {
  const int64_t parts = shape.last ? 1 : shape.images, positions = shape.values() / parts;
  return parts * ((positions + kPositions - 1) / kPositions);
}

// Calls part(segment, position, offset, n) for n positions at a time, some in each thread.
template <class Part>
void each_positions(const Shape& shape, Part part) {
  const int64_t segments = position_segments(shape);
  if (shape.last) {
    const int64_t rows = shape.values();
    parallel_for(segments, shape.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t segment = begin; segment < end; ++segment) {
        const int64_t first = segment * kPositions;
        part(segment, first, first * shape.channels, std::min(kPositions, rows - first));
      }
    });
    return;
  }
  const int64_t per_image = segments / shape.images;
  parallel_for(segments, shape.numel(), [&](int64_t begin, int64_t end) {
    for (int64_t segment = begin; segment < end; ++segment) {
      const int64_t image = segment / per_image, first = segment % per_image * kPositions;
      const int64_t n = std::min(kPositions, shape.space - first);
      part(segment, image * shape.space + first, image * shape.channels * shape.space + first, n);
    }
  });
}

// saved: means, then 1/√(var + eps), of each position.
template <class T>
void position_forward_of(const Shape& shape, const PositionNorm& norm, const T* x, T* y, float* saved) {
  prefer_large_pages(y, shape.numel() * sizeof(T));
  float *means = saved, *inverses = saved + shape.values();
  each_positions(shape, [&](int64_t, int64_t at, int64_t offset, int64_t n) {
    if (shape.last) {
      loops<T>().position_forward_rows(x + offset, y + offset, n, norm, means + at, inverses + at);
    } else {
      loops<T>().position_forward(x + offset, y + offset, n, shape.space, norm, means + at, inverses + at);
    }
  });
}

template <class T>
void position_backward_of(const Shape& shape, const PositionNorm& norm, const Backward& pass, const T* g, const T* x,
                          T* out) {
  prefer_large_pages(out, shape.numel() * sizeof(T));
  const int64_t channels = shape.channels;
  const float *means = pass.saved, *inverses = means + shape.values();
  thread_local std::vector<float> sums;
  const int64_t segments = position_segments(shape);
  sums.resize(segments * 2 * channels);
  float* to = sums.data();
  each_positions(shape, [&](int64_t segment, int64_t at, int64_t offset, int64_t n) {
    float* of = to + segment * 2 * channels;
    const float *mean = means + at, *inverse = inverses + at;
    if (shape.last) {
      loops<T>().position_backward_rows(g + offset, x + offset, out + offset, n, norm, mean, inverse, of);
    } else {
      loops<T>().position_backward(g + offset, x + offset, out + offset, n, shape.space, norm, mean, inverse, of);
    }
  });
  thread_local std::vector<double> total;
  total.assign(2 * channels, 0);
  for (int64_t segment = 0; segment < segments; ++segment) {
    for (int64_t i = 0; i < 2 * channels; ++i) total[i] += *to++;
  }
  for (int64_t c = 0; c < channels; ++c) {
    pass.grad_weight[c] = static_cast<float>(total[c]);
    pass.grad_bias[c] = static_cast<float>(total[channels + c]);
  }
}

// centred: layer norm, else RMS norm. No activation: the slope is 1.
inline void position_forward(const Layout& layout, const Forward& pass, double, bool centred, double eps) {
  const PositionNorm norm{layout.shape.channels, pass.weight, pass.bias, centred, static_cast<float>(eps)};
  const auto of_type = [&](auto* x, auto* y) { position_forward_of(layout.shape, norm, x, y, pass.saved); };
  with_type(layout.type, of_type, pass.x, pass.y);
}

inline void position_backward(const Layout& layout, const Backward& pass, double, bool centred) {
  const PositionNorm norm{layout.shape.channels, pass.weight, pass.bias, centred, 0};
  const auto of_type = [&](auto* grad, auto* x, auto* grad_x) {
    position_backward_of(layout.shape, norm, pass, grad, x, grad_x);
  };
  with_type(layout.type, of_type, pass.grad, pass.x, pass.grad_x);
}

}  // namespace normlab

// Loops of norms whose statistics are of each position, over the channels: some positions at a time, or, with the
// channels last, one after another.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace normlab {
namespace {

inline float of_weight(const PositionNorm& norm, int64_t c) { return norm.weight ? norm.weight[c] : 1.0f; }
inline float of_bias(const PositionNorm& norm, int64_t c) { return norm.bias ? norm.bias[c] : 0.0f; }

// The mean and 1/√(var + eps) from Σd and Σd² over the channels, with d = x − shift. Without centring the mean is 0.
inline void position_moments(const PositionNorm& norm, float shift, float sum, float squares, float* mean,
                             float* inverse) {
  const float n = static_cast<float>(norm.channels), distance = sum / n;
  const float var = norm.centred ? squares / n - distance * distance : squares / n;
  *mean = norm.centred ? shift + distance : 0.0f;
  *inverse = 1 / std::sqrt((var < 0 ? 0.0f : var) + norm.eps);
}

template <class T>
void position_forward(const T* x, T* y, int64_t n, int64_t stride, const PositionNorm& norm, float* mean,
                      float* inverse) {
  float shift[kPositions], sum[kPositions] = {}, squares[kPositions] = {};
  for (int64_t i = 0; i < n; ++i) shift[i] = norm.centred ? to_float(x[i]) : 0.0f;
  for (int64_t c = 0; c < norm.channels; ++c) {
    const T* from = x + c * stride;
    in_steps<kWidth>(n, [&](auto width, int64_t i) {
      using R = Register<width.value>;
      const auto d = R::load(from + i) - R::load(shift + i);
      add_to<width.value>(sum + i, d);
      add_to<width.value>(squares + i, d * d);
    });
  }
  for (int64_t i = 0; i < n; ++i) position_moments(norm, shift[i], sum[i], squares[i], mean + i, inverse + i);
  for (int64_t c = 0; c < norm.channels; ++c) {
    const T* from = x + c * stride;
    T* to = y + c * stride;
    const float weight = of_weight(norm, c), bias = of_bias(norm, c);
    in_steps<kWidth>(n, [&](auto width, int64_t i) {
      using R = Register<width.value>;
      const auto x_hat = (R::load(from + i) - R::load(mean + i)) * R::load(inverse + i);
      R::store(to + i, x_hat * weight + bias);
    });
  }
}

template <class T>
void position_backward(const T* g, const T* x, T* out, int64_t n, int64_t stride, const PositionNorm& norm,
                       const float* mean, const float* inverse, float* sums) {
  float of_h[kPositions] = {}, of_product[kPositions] = {};  // Σh and Σh x̂ over the channels, with h = weight·g
  for (int64_t c = 0; c < norm.channels; ++c) {
    float product[kWidth] = {}, sum[kWidth] = {};
    const T *grad = g + c * stride, *from = x + c * stride;
    const float weight = of_weight(norm, c);
    in_steps<kWidth>(n, [&](auto width, int64_t i) {
      constexpr int W = width.value;
      using R = Register<W>;
      const auto x_hat = (R::load(from + i) - R::load(mean + i)) * R::load(inverse + i), of_g = R::load(grad + i);
      const auto both = of_g * x_hat;
      add_to<W>(sum, of_g);
      add_to<W>(product, both);
      add_to<W>(of_h + i, of_g * weight);
      add_to<W>(of_product + i, both * weight);
    });
    sums[c] = Register<kWidth>::sum(Register<kWidth>::load(product));
    sums[norm.channels + c] = Register<kWidth>::sum(Register<kWidth>::load(sum));
  }
  const float share = 1 / static_cast<float>(norm.channels);
  for (int64_t i = 0; i < n; ++i) {
    of_h[i] *= norm.centred ? share : 0.0f;
    of_product[i] *= share;
  }
  for (int64_t c = 0; c < norm.channels; ++c) {
    const T *grad = g + c * stride, *from = x + c * stride;
    T* to = out + c * stride;
    const float weight = of_weight(norm, c);
    in_steps<kWidth>(n, [&](auto width, int64_t i) {
      using R = Register<width.value>;
      const auto scale = R::load(inverse + i), x_hat = (R::load(from + i) - R::load(mean + i)) * scale;
      const auto h = R::load(grad + i) * weight;
      R::store(to + i, (h - R::load(of_h + i) - x_hat * R::load(of_product + i)) * scale);
    });
  }
}

// The weights of W channels; 1 if there are none.
template <int W>
auto weights(const PositionNorm& norm, int64_t c) {
  using R = Register<W>;
  return norm.weight ? R::load(norm.weight + c) : typename R::Floats{} + 1.0f;
}

template <class T>
void position_forward_rows(const T* x, T* y, int64_t n, const PositionNorm& norm, float* mean, float* inverse) {
  for (int64_t row = 0; row < n; ++row, x += norm.channels, y += norm.channels) {
    float sum[kWidth] = {}, squares[kWidth] = {};
    const float shift = norm.centred ? to_float(*x) : 0.0f;
    in_steps<kWidth>(norm.channels, [&](auto width, int64_t c) {
      const auto d = Register<width.value>::load(x + c) - shift;
      add_to<width.value>(sum, d);
      add_to<width.value>(squares, d * d);
    });
    using Whole = Register<kWidth>;
    position_moments(norm, shift, Whole::sum(Whole::load(sum)), Whole::sum(Whole::load(squares)), mean + row,
                     inverse + row);
    const float m = mean[row], scale = inverse[row];
    in_steps<kWidth>(norm.channels, [&](auto width, int64_t c) {
      using R = Register<width.value>;
      const auto z = (R::load(x + c) - m) * scale * weights<width.value>(norm, c);
      R::store(y + c, norm.bias ? z + R::load(norm.bias + c) : z);
    });
  }
}

template <class T>
void position_backward_rows(const T* g, const T* x, T* out, int64_t n, const PositionNorm& norm, const float* mean,
                            const float* inverse, float* sums) {
  std::fill_n(sums, 2 * norm.channels, 0.0f);
  const float share = 1 / static_cast<float>(norm.channels);
  for (int64_t row = 0; row < n; ++row, g += norm.channels, x += norm.channels, out += norm.channels) {
    float of_h[kWidth] = {}, of_product[kWidth] = {};
    const float m = mean[row], scale = inverse[row];
    in_steps<kWidth>(norm.channels, [&](auto width, int64_t c) {
      constexpr int W = width.value;
      using R = Register<W>;
      const auto grad = R::load(g + c), product = grad * ((R::load(x + c) - m) * scale), weight = weights<W>(norm, c);
      add_to<W>(sums + c, product);
      add_to<W>(sums + norm.channels + c, grad);
      add_to<W>(of_h, grad * weight);
      add_to<W>(of_product, product * weight);
    });
    using Whole = Register<kWidth>;
    const float h_mean = norm.centred ? Whole::sum(Whole::load(of_h)) * share : 0.0f;
    const float product_mean = Whole::sum(Whole::load(of_product)) * share;
    in_steps<kWidth>(norm.channels, [&](auto width, int64_t c) {
      using R = Register<width.value>;
      const auto x_hat = (R::load(x + c) - m) * scale, h = R::load(g + c) * weights<width.value>(norm, c);
      R::store(out + c, (h - h_mean - x_hat * product_mean) * scale);
    });
  }
}

}  // namespace
}  // namespace normlab

// Group norm: statistics of each image by itself, over groups of channels and space. A group's channels lie next to
// each other: with the channels first a group is one run, else its sums are made of those of its channels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "passes.h"
#include "tensors.h"

namespace normlab {

// Statistics of `count` values about a shift, as mean and sum of squared distances from it.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  static Moments of(double count, float shift, const float* sums) {
    const double distance = sums[0] / count;
    return {count, shift + distance, sums[1] - count * distance * distance};
  }
  // Chan, Golub and LeVeque 1979.
  void add(const Moments& other) {
    const double total = count + other.count, distance = other.mean - mean;
    squares += other.squares + distance * distance * count * other.count / total;
    mean += distance * other.count / total;
    count = total;
  }
  double inverse(double eps) const { return 1 / std::sqrt((squares < 0 ? 0 : squares / count) + eps); }
};

// y = weight (x − mean) inverse + bias and the activation after it, see `Gates`. saved: [image][group].
template <class T>
void group_forward_of(const Shape& shape, const Forward& pass, const T* x, T* y, float slope, int64_t groups,
                      double eps) {
  prefer_large_pages(y, shape.numel() * sizeof(T));
  const int64_t channels = shape.channels, members = channels / groups, space = shape.space;
  const float *weight = pass.weight, *bias = pass.bias;
  float *means = pass.saved, *inverses = means + shape.images * groups;
  const int64_t all = shape.images * channels;
  thread_local std::vector<float> shifts, sums, mean, scales, biases;
  for (auto* part : {&shifts, &mean, &scales, &biases}) part->resize(all);
  float *to_mean = mean.data(), *to_scale = scales.data(), *to_bias = biases.data();
  // Writes what the channels of group i are scaled with, once its statistics are there.
  auto factors = [&](int64_t i, const Moments& m) {
    means[i] = static_cast<float>(m.mean);
    inverses[i] = static_cast<float>(m.inverse(eps));
    for (int64_t at = i * members; at < (i + 1) * members; ++at) {
      const int64_t c = at % channels;
      to_mean[at] = means[i];
      to_scale[at] = weight ? weight[c] * inverses[i] : inverses[i];
      to_bias[at] = bias ? bias[c] : 0.0f;
    }
  };
  if (!shape.last) {
    parallel_for(shape.images * groups, shape.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* from = x + i * members * space;
        const float shift = to_float(*from);
        float of_group[2];
        loops<T>().moments(from, {0, 1, 1, members * space}, &shift, of_group);
        factors(i, Moments::of(static_cast<double>(members * space), shift, of_group));
        loops<T>().affine(x, nullptr, y, {i * members, (i + 1) * members, all, space}, to_mean,
                          {to_scale, to_bias, slope});
      }
    });
    return;
  }
  sums.resize(shape.segments() * channels * 2);
  for (int64_t image = 0; image < shape.images; ++image) {
    for (int64_t c = 0; c < channels; ++c) shifts[image * channels + c] = to_float(x[image * space * channels + c]);
  }
  const float* of_shift = shifts.data();
  float* to = sums.data();
  const auto no_runs = [](Runs) {};
  each_segment(
      shape,
      [&](int64_t segment, int64_t image, int64_t offset, int64_t n) {
        loops<T>().moments_rows(x + offset, n, channels, of_shift + image * channels, to + segment * channels * 2);
      },
      no_runs);
  const int64_t per_image = shape.segments_per_image();
  for (int64_t i = 0; i < shape.images * groups; ++i) {
    const int64_t image = i / groups, first = i % groups * members;
    Moments m;
    for (int64_t c = first; c < first + members; ++c) {
      for (int64_t segment = 0; segment < per_image; ++segment) {
        const double n = static_cast<double>(std::min(Shape::kRows, space - segment * Shape::kRows));
        const float* of = to + ((image * per_image + segment) * channels + c) * 2;
        m.add(Moments::of(n, of_shift[image * channels + c], of));
      }
    }
    factors(i, m);
  }
  each_segment(
      shape,
      [&](int64_t, int64_t image, int64_t offset, int64_t n) {
        const int64_t at = image * channels;
        const Gates z = {to_scale + at, to_bias + at, slope};
        loops<T>().affine_rows(x + offset, nullptr, y + offset, n, channels, to_mean + at, z);
      },
      no_runs);
}

// grad_x = inverse (h − mean h − x̂ mean h x̂) in each group, with x̂ = (x − mean) inverse and h = weight·g, where g is
// what the activation lets through.
template <class T>
void group_backward_of(const Shape& shape, const Backward& pass, const T* g, const T* x, T* out, float slope,
                       int64_t groups) {
  prefer_large_pages(out, shape.numel() * sizeof(T));
  const int64_t channels = shape.channels, members = channels / groups, space = shape.space;
  const int64_t per_image = shape.segments_per_image(), all = shape.images * channels;
  const float *weight = pass.weight, *bias = pass.bias;
  const float *means = pass.saved, *inverses = means + shape.images * groups;
  thread_local std::vector<float> mean, scale, shift, sums, p, q, r, of_weight, of_bias;
  for (auto* part : {&mean, &scale, &shift, &p, &q, &r, &of_weight, &of_bias}) part->resize(all);
  sums.resize(shape.segments() * channels * kOfGradient);
  float *to_mean = mean.data(), *to = sums.data(), *to_p = p.data(), *to_q = q.data(), *to_r = r.data();
  float *to_weight = of_weight.data(), *to_bias = of_bias.data();
  for (int64_t i = 0; i < all; ++i) {
    const int64_t c = i % channels;
    to_mean[i] = means[i / members];
    scale[i] = inverses[i / members] * (weight ? weight[c] : 1);
    shift[i] = bias ? bias[c] : 0;
  }
  const Gates z = {scale.data(), shift.data(), slope};
  // Writes the factors of the channels of group i, once the sums of its segments are there.
  auto factors = [&](int64_t i) {
    const int64_t image = i / groups, first = i % groups * members;
    const double inverse = inverses[i];
    double sum = 0, product = 0;
    for (int64_t c = first; c < first + members; ++c) {
      double of_g = 0, of_product = 0;
      for (int64_t segment = image * per_image; segment < (image + 1) * per_image; ++segment) {
        of_g += to[(segment * channels + c) * kOfGradient];
        of_product += to[(segment * channels + c) * kOfGradient + 1] * inverse;
      }
      to_bias[image * channels + c] = static_cast<float>(of_g);
      to_weight[image * channels + c] = static_cast<float>(of_product);
      const double w = weight ? weight[c] : 1;
      sum += w * of_g;
      product += w * of_product;
    }
    const double n = static_cast<double>(members * space);
    for (int64_t c = first; c < first + members; ++c) {
      to_p[image * channels + c] = static_cast<float>(inverse * (weight ? weight[c] : 1));
      to_q[image * channels + c] = static_cast<float>(-inverse * inverse * product / n);
      to_r[image * channels + c] = static_cast<float>(-inverse * sum / n);
    }
  };
  if (!shape.last) {
    parallel_for(shape.images * groups, shape.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Runs of_group{i * members, (i + 1) * members, all, space};
        loops<T>().products(false, g, x, of_group, to_mean, z, to);
        factors(i);
        loops<T>().combine(g, x, out, of_group, nullptr, to_mean, z, to_p, to_q, to_r);
      }
    });
  } else {
    const auto no_runs = [](Runs) {};
    each_segment(
        shape,
        [&](int64_t segment, int64_t image, int64_t at, int64_t n) {
          float* sum = to + segment * channels * kOfGradient;
          const int64_t c = image * channels;
          loops<T>().products_rows(false, g + at, x + at, n, channels, to_mean + c, z.at(c), sum);
        },
        no_runs);
    for (int64_t i = 0; i < shape.images * groups; ++i) factors(i);
    each_segment(
        shape,
        [&](int64_t, int64_t image, int64_t at, int64_t n) {
          const int64_t c = image * channels;
          const float *of_p = to_p + c, *of_q = to_q + c, *of_r = to_r + c;
          loops<T>().combine_rows(g + at, x + at, out + at, n, channels, 1, to_mean + c, z.at(c), of_p, of_q, of_r);
        },
        no_runs);
  }
  thread_local std::vector<double> total;
  total.assign(2 * channels, 0);
  for (int64_t i = 0; i < all; ++i) {
    total[i % channels] += to_weight[i];
    total[channels + i % channels] += to_bias[i];
  }
  for (int64_t c = 0; c < channels; ++c) {
    pass.grad_weight[c] = static_cast<float>(total[c]);
    pass.grad_bias[c] = static_cast<float>(total[channels + c]);
  }
}

inline void group_forward(const Layout& layout, const Forward& pass, double slope, int64_t groups, double eps) {
  const auto of_type = [&](auto* x, auto* y) {
    group_forward_of(layout.shape, pass, x, y, static_cast<float>(slope), groups, eps);
  };
  with_type(layout.type, of_type, pass.x, pass.y);
}

inline void group_backward(const Layout& layout, const Backward& pass, double slope, int64_t groups) {
  const auto of_type = [&](auto* grad, auto* x, auto* grad_x) {
    group_backward_of(layout.shape, pass, grad, x, grad_x, static_cast<float>(slope), groups);
  };
  with_type(layout.type, of_type, pass.grad, pass.x, pass.grad_x);
}

}  // namespace normlab

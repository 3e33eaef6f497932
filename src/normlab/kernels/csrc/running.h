// The rule of running batch norm: the twin of `normlab.kernels.running` on a CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "channels.h"
#include "norms.h"
#include "pointers.h"

namespace normlab {

// `normlab.kernels.running.Constants`, in its order; set when the module is loaded.
struct Constants {
  double least_share, least_gradient_share, tolerated_drift, steps_remembered, steady_images, along, pull;
};
inline Constants constants;

// The cosine of two vectors, of which the products are added one by one.
struct Cosine {
  double product = 0, length = 0, other_length = 0;

  void add(double value, double other) {
    product += value * other;
    length += value * value;
    other_length += other * other;
  }
  double value() const {
    return product / std::max<double>(std::sqrt(length * other_length), std::numeric_limits<float>::min());
  }
};

// A share that has grown by so much, kept between `least` and 1; NaN stays.
inline float grown(float share, double growth, double least) {
  const double w = share * std::exp(growth);
  return static_cast<float>(w < least ? least : w > 1 ? 1 : w);
}

// Returns the share of this batch in the averages of the backward pass,
// see `normlab.kernels.running.take_in`.
double running_forward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x, Pointer y,
                       Pointer weight, Pointer bias, Pointer saved, Pointer residual, Pointer running_mean,
                       Pointer running_var, Pointer num_batches_tracked, Pointer share, Pointer innovation,
                       Pointer gradient_share, Pointer gradient_average, Pointer gradient_latest, double slope,
                       double momentum, double eps, bool recomputing) {
  const Shape shape{images, channels, space, last};
  float *mean = at<float>(saved), *inverse = mean + channels;
  float *kept_mean = at<float>(running_mean), *kept_var = at<float>(running_var);
  int64_t& batches = *at<int64_t>(num_batches_tracked);
  const auto epsilon = static_cast<float>(eps);
  const int64_t seen = batches + (recomputing ? 0 : 1);
  double rate = *at<float>(gradient_share);
  if (recomputing) {
    std::copy_n(kept_mean, channels, mean);
    std::copy_n(kept_var, channels, inverse);
  } else {
    with_type(type, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      moments(shape, at<const T>(x), mean, inverse);
    });
    thread_local std::vector<float> innovations;
    innovations.resize(channels);
    float* last_innovation = at<float>(innovation);
    const float *average = at<float>(gradient_average), *latest = at<float>(gradient_latest);
    Cosine with_last, with_drift;
    for (int64_t c = 0; c < channels; ++c) {
      const float scale = 1 / std::sqrt(kept_var[c] + epsilon), e = (mean[c] - kept_mean[c]) * scale;
      innovations[c] = e;
      with_last.add(e, last_innovation[c]);
      with_drift.add(e, (average[c] - latest[c]) * scale * scale * or_one(at<float>(weight), c));
    }
    const double gain = std::max(momentum, 1.0 / static_cast<double>(seen));
    const float new_share = grown(*at<float>(share), with_last.value() * gain, constants.least_share * momentum);
    const float new_gradient_share =
        grown(*at<float>(gradient_share), (with_drift.value() - constants.tolerated_drift / static_cast<double>(images)) * gain,
              constants.least_gradient_share * momentum);
    bool finite = std::isfinite(new_share) && std::isfinite(new_gradient_share);
    for (int64_t c = 0; c < channels; ++c) {
      const float distance = mean[c] - kept_mean[c], beside = (1 - new_share) * distance;
      inverse[c] = lerp(kept_var[c], inverse[c] + beside * distance, new_share);
      mean[c] -= beside;
      finite &= std::isfinite(mean[c]) && std::isfinite(inverse[c]) && std::isfinite(innovations[c]);
    }
    if (finite) {
      std::copy_n(mean, channels, kept_mean);
      std::copy_n(inverse, channels, kept_var);
      std::copy_n(innovations.data(), channels, last_innovation);
      *at<float>(share) = new_share;
      *at<float>(gradient_share) = new_gradient_share;
      batches = seen;
    }
    rate = new_gradient_share;
  }
  for (int64_t c = 0; c < channels; ++c) inverse[c] = 1 / std::sqrt(inverse[c] + epsilon);
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    affine(shape, at<const T>(x), at<const T>(residual), at<T>(y), mean,
           gates(channels, inverse, at<float>(weight), at<float>(bias), slope));
  });
  return std::max(rate, 1.0 / static_cast<double>(std::max<int64_t>(seen, 1)));
}

// What is measured of the steps; last_rate: the share of the last batch in the averages, as long as its step was.
struct Measured {
  float log_lr, steps, output_square, step_length, last_rate;

  // Enters how γ and β have moved since the backward pass before, at which they were `before` and had this gradient.
  void enter_step(const std::vector<float>& now, const float* before, std::vector<float>& gradient) {
    double far = 0, force = 0, product = 0;
    for (std::size_t i = 0; i < now.size(); ++i) {
      const double moved = double{now[i]} - before[i];
      far += moved * moved;
      force += double{gradient[i]} * gradient[i];
      product += moved * gradient[i];
    }
    far = std::sqrt(far);
    force = std::sqrt(force);
    const bool shows = far > 0 && force > 0, along = shows && product < -static_cast<float>(constants.along) * far * force;
    const auto length = static_cast<float>(shows ? far / force : 1);
    if (shows) {
      steps += 1;
      log_lr = lerp(log_lr, std::log(length), std::max(1 / steps, 1 / static_cast<float>(constants.steps_remembered)));
    }
    if (along) {
      step_length = step_length > 0 ? lerp(step_length, length, last_rate) : length;
      last_rate *= length / step_length;
    }
    if (far > 0) std::fill(gradient.begin(), gradient.end(), 0.0f);
  }
};

// The backward pass of running batch norm, see `normlab.kernels.running.normalize_with_memory`. step_bound: below 0 for
// none. learns: weight and bias are there and both want a gradient.
void running_backward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer g, Pointer x,
                      Pointer out, Pointer weight, Pointer bias, Pointer saved, Pointer weight_grad, Pointer bias_grad,
                      Pointer gradient_average, Pointer gradient_latest, Pointer parameters_before,
                      Pointer parameters_gradient, Pointer log_learning_rate, Pointer learning_rate_steps,
                      Pointer output_square, Pointer step_length, Pointer latest_gradient_share, double slope,
                      double batch_rate, double step_bound, bool learns) {
  const Shape shape{images, channels, space, last};
  const float *mean = at<float>(saved), *inverse = mean + channels;
  const auto rate = static_cast<float>(batch_rate);
  const int64_t both = 2 * channels;
  thread_local std::vector<float> sums, of_images, distances, of_distance, squares, factor, p, q, r, now, gradient;
  thread_local std::vector<double> total, of_channels;
  factor.assign(images, 1);
  total.assign(both, 0);
  of_channels.assign(channels * kSums, 0);
  now.resize(both);
  gradient.assign(at<float>(parameters_gradient), at<float>(parameters_gradient) + both);
  for (auto* part : {&p, &q, &r}) part->resize(channels);
  const Gates z = gates(channels, inverse, at<float>(weight), at<float>(bias), slope);
  // What is needed of each image by itself comes with the sums of its channels, unless images are small.
  const int64_t per_image = shape.segments_per_image();
  const auto of_each_image = [&] {
    sums.resize(shape.segments() * channels * kSums);
    with_type(type, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      products(true, shape, at<const T>(g), at<const T>(x), mean, z, sums.data());
    });
  };
  const bool together = has_small_images(shape) && slope == 1;
  of_images.assign(images, 0);
  if (together) {
    with_type(type, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      total_products(true, shape, at<const T>(g), at<const T>(x), mean, z, of_channels.data());
    });
  } else {
    distances.assign(images * channels, 0);
    of_each_image();
    for (int64_t segment = 0; segment < shape.segments(); ++segment) {
      for (int64_t c = 0; c < channels; ++c) {
        const float* of = sums.data() + (segment * channels + c) * kSums;
        of_images[segment / per_image] += of[2];
        distances[segment / per_image * channels + c] += of[3];
      }
    }
  }

  Measured known{*at<float>(log_learning_rate), *at<float>(learning_rate_steps), *at<float>(output_square),
                 *at<float>(step_length), *at<float>(latest_gradient_share)};
  float pull = 0;
  bool bounded = false;
  if (learns) {
    std::copy_n(at<float>(weight), channels, now.data());
    std::copy_n(at<float>(bias), channels, now.data() + channels);
    known.enter_step(now, at<float>(parameters_before), gradient);
    const float lr = std::exp(known.log_lr);
    double size = 0;
    for (const float value : now) size += double{value} * value;
    const double of_parameters = std::sqrt(std::max(size, static_cast<double>(channels)));
    // The length of the gradient over its bound, from the square of the former.
    const auto excess = [&](double square) { return std::sqrt(square) * (lr / (of_parameters * step_bound)); };
    int64_t over = 0;
    if (step_bound >= 0) {
      // No image exceeds the bound if all of them together do not.
      double square = 0;
      for (int64_t c = 0; c < channels; ++c) square += of_channels[c * kSums + 2];
      if (together && !(excess(square) <= 1)) {
        with_type(type, [&](auto* t) {
          using T = std::remove_pointer_t<decltype(t)>;
          image_squares(shape, at<const T>(g), of_images.data());
        });
      }
      for (int64_t image = 0; image < images; ++image) {
        const double of_image = excess(of_images[image]);
        if (of_image > 1) factor[image] = static_cast<float>(1 / of_image), ++over;
      }
    }
    bounded = over > 0;

    // The mean squared length of the images' outputs, averaged over space.
    double length = 0;
    of_distance.resize(channels);
    for (int64_t c = 0; c < channels; ++c) of_distance[c] = inverse[c] * now[c] / static_cast<float>(space);
    if (together && space == 1) {
      for (int64_t c = 0; c < channels; ++c) {
        const double scale = of_distance[c], shift = now[channels + c], *of = &of_channels[c * kSums];
        length += scale * (scale * of[4] + 2 * shift * of[3]) + static_cast<double>(images) * shift * shift;
      }
    } else {
      if (together) {
        distances.resize(images * channels);
        with_type(type, [&](auto* t) {
          using T = std::remove_pointer_t<decltype(t)>;
          image_distances(shape, at<const T>(x), mean, distances.data());
        });
      }
      squares.assign(channels, 0);
      for (int64_t image = 0; image < images; ++image) {
        const float *of = distances.data() + image * channels, *shift = now.data() + channels;
        for (int64_t c = 0; c < channels; ++c) {
          const float pooled = of[c] * of_distance[c] + shift[c];
          squares[c] += pooled * pooled;
        }
      }
      for (const float square : squares) length += square;
    }
    known.output_square = lerp(known.output_square, static_cast<float>(length / static_cast<double>(images)), rate);
    if (step_bound >= 0) {
      const float tiny = std::numeric_limits<float>::min(), n = static_cast<float>(images);
      const float overshoot = 1 - n / std::max(lr * known.output_square, tiny);
      pull = static_cast<float>(over) / n * std::max(overshoot, 0.0f) * static_cast<float>(constants.pull) / std::max(lr, tiny);
    }
  }

  if (together && bounded && type == 0) {
    thread_local std::vector<float> bounded_grad;
    const int64_t row = channels * space;
    bounded_grad.resize(images * row);
    for (int64_t image = 0; image < images; ++image) {
      const float f = factor[image], *from = at<float>(g) + image * row;
      float* to = bounded_grad.data() + image * row;
      for (int64_t i = 0; i < row; ++i) to[i] = f * from[i];
    }
    of_channels.assign(channels * kSums, 0);
    total_products(true, shape, bounded_grad.data(), at<float>(x), mean, z, of_channels.data());
  } else if (!together || bounded) {
    if (together) of_each_image();
    of_channels.assign(channels * kSums, 0);
    for (int64_t segment = 0; segment < shape.segments(); ++segment) {
      const double f = factor[segment / per_image];
      for (int64_t c = 0; c < channels; ++c) {
        const float* of = sums.data() + (segment * channels + c) * kSums;
        of_channels[c * kSums] += f * of[0];
        of_channels[c * kSums + 1] += f * of[1];
        of_channels[c * kSums + 4] += of[4];
      }
    }
  }
  bool finite = true;
  float *average = at<float>(gradient_average), *latest = at<float>(gradient_latest);
  float *grad_weight = at<float>(weight_grad), *grad_bias = at<float>(bias_grad);
  const double n = static_cast<double>(shape.values());
  const float parameter_share =
      std::min(1.0f, std::sqrt(static_cast<float>(images) / static_cast<float>(constants.steady_images)));
  for (int64_t c = 0; c < channels; ++c) {
    const double of_bias = total[c] = of_channels[c * kSums];
    const double of_weight = total[channels + c] = of_channels[c * kSums + 1] * inverse[c];
    finite &= std::isfinite(static_cast<float>(of_bias)) && std::isfinite(static_cast<float>(of_weight));
    auto own = static_cast<float>(of_weight / n);
    own /= std::max(1.0f, rate * static_cast<float>(of_channels[c * kSums + 4] * inverse[c] * inverse[c] / n));
    const float scale = inverse[c] * or_one(at<float>(weight), c);
    const auto subtracted = [&](int64_t i, float own) {
      return lerp(lerp(average[i], latest[i], known.last_rate), own, rate) * scale;
    };
    p[c] = scale;
    q[c] = -subtracted(channels + c, own) * inverse[c];
    r[c] = -subtracted(c, static_cast<float>(of_bias / n));
    grad_weight[c] = static_cast<float>(of_weight) * parameter_share + (learns ? now[c] * pull : 0.0f);
    grad_bias[c] = static_cast<float>(of_bias) * parameter_share + (learns ? now[channels + c] * pull : 0.0f);
    gradient[c] += grad_weight[c];
    gradient[channels + c] += grad_bias[c];
  }
  if (finite) {
    for (int64_t i = 0; i < both; ++i) {
      average[i] = lerp(average[i], latest[i], known.last_rate);
      latest[i] = static_cast<float>(total[i] / n);
    }
    if (learns) std::copy_n(now.data(), both, at<float>(parameters_before));
    std::copy_n(gradient.data(), both, at<float>(parameters_gradient));
    *at<float>(log_learning_rate) = known.log_lr;
    *at<float>(learning_rate_steps) = known.steps;
    *at<float>(output_square) = known.output_square;
    *at<float>(step_length) = known.step_length;
    *at<float>(latest_gradient_share) = rate;
  }
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    combine(shape, at<const T>(g), at<const T>(x), at<T>(out), bounded ? factor.data() : nullptr, mean, z, p.data(),
            q.data(), r.data());
  });
}

}  // namespace normlab

// Running instance norm: γ ((1 − s) x̂ + s i) + β, the twin of `normlab.kernels.running` with a share s. Its sums are
// those of each channel of each image; what running batch norm needs of a channel is made of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "passes.h"
#include "running.h"
#include "running_state.h"
#include "tensors.h"

namespace normlab {

// Calls f(shape, offset, part) with what lies together: all images as one of as many channels, or with the channels
// last one image after the other. offset: of its first value. part: of its first channel, [image][channel].
template <class F>
void each_together(const Shape& shape, F f) {
  if (!shape.last) return f(Shape{1, shape.images * shape.channels, shape.space, false}, 0, 0);
  for (int64_t image = 0; image < shape.images; ++image) {
    const int64_t part = image * shape.channels;
    f(Shape{1, shape.channels, shape.space, true}, part * shape.space, part);
  }
}

// Calls f(i, channel, image) for each channel of each image; i is its place among [image][channel].
template <class F>
void each_part(const Shape& shape, F f) {
  int64_t i = 0;
  for (int64_t image = 0; image < shape.images; ++image) {
    for (int64_t channel = 0; channel < shape.channels; ++channel, ++i) f(i, channel, image);
  }
}

// What both passes keep in `saved`: the running statistics, (channels), and those of each image, [image][channel].
struct Mixed {
  int64_t channels, all;
  float *mean, *own_mean, *inverse, *own_inverse;

  Mixed(const Shape& shape, float* saved)
      : channels(shape.channels),
        all(shape.images * shape.channels),
        mean(saved),
        own_mean(saved + channels),
        inverse(saved + channels + all),
        own_inverse(inverse + channels) {}

  static int64_t parts(const Shape& shape) { return shape.channels + shape.images * shape.channels; }
};

// What s is made of: speed · gate, between 0 and 1, times how well a map knows its own mean.
struct Gate {
  const float* gate;
  double speed, known;
};

// s; γ (1 − s) of the running part, and γ s of the image's own.
struct MixedWeights {
  std::vector<float> share, running, own;

  MixedWeights(const float* weight, const Gate& of, int64_t channels)
      : share(channels), running(channels), own(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      const float open = of.gate[c] * static_cast<float>(of.speed);
      share[c] = (open < 0 ? 0 : open > 1 ? 1 : open) * static_cast<float>(of.known);
      running[c] = (1 - share[c]) * or_one(weight, c);
      own[c] = share[c] * or_one(weight, c);
    }
  }
};

// The gradient of gate, from that of s: 0 where s would leave 0 to 1.
inline float through_gate(float of_share, float gate, const Gate& of) {
  const bool outwards = of_share > 0 ? gate <= 0 : gate * static_cast<float>(of.speed) >= 1;
  return outwards ? 0 : of_share * static_cast<float>(of.speed * of.known);
}

// The output before the activation is scale (x − own_mean) + shift, [image][channel].
struct MixedScale {
  std::vector<float> scale, shift;

  MixedScale(const Shape& shape, const Mixed& of, const MixedWeights& weights, const float* bias)
      : scale(of.all), shift(of.all) {
    each_part(shape, [&](int64_t i, int64_t c, int64_t) {
      const float running = weights.running[c] * of.inverse[c];
      scale[i] = running + weights.own[c] * of.own_inverse[i];
      shift[i] = running * (of.own_mean[i] - of.mean[c]) + (bias ? bias[c] : 0);
    });
  }
  Gates at(int64_t part, double slope) const {
    return {scale.data() + part, shift.data() + part, static_cast<float>(slope)};
  }
};

struct MixedForward {
  Forward pass;
  const void* residual;  // added before the activation, or null
  const float* gate;
  Statistics kept;
  Averages averages;
};

// Returns the share of this batch in the averages of the backward pass. recomputing: it is in the statistics already.
inline double mixed_forward(const Layout& layout, const MixedForward& tensors, double gate_speed, double known,
                            double slope, double momentum, double eps, bool recomputing) {
  const Shape& shape = layout.shape;
  const Statistics& kept = tensors.kept;
  const Mixed to(shape, tensors.pass.saved);
  const int64_t channels = to.channels, seen = *kept.num_batches_tracked + (recomputing ? 0 : 1);
  const auto epsilon = static_cast<float>(eps);
  const MixedWeights weights(tensors.pass.weight, {tensors.gate, gate_speed, known}, channels);
  each_together(shape, [&](const Shape& some, int64_t offset, int64_t part) {
    const auto of_type = [&](auto* x) { moments(some, x + offset, to.own_mean + part, to.own_inverse + part); };
    with_type(layout.type, of_type, tensors.pass.x);
  });
  double rate = std::max(*kept.gradient_share, *kept.share);
  if (recomputing) {
    std::copy_n(kept.running_mean, channels, to.mean);
    std::copy_n(kept.running_var, channels, to.inverse);
  } else {
    const double images = static_cast<double>(shape.images);
    for (int64_t c = 0; c < channels; ++c) {
      double mean = 0, var = 0;
      for (int64_t i = c; i < to.all; i += channels) mean += to.own_mean[i] / images;
      for (int64_t i = c; i < to.all; i += channels) {
        const double distance = to.own_mean[i] - mean;
        var += (to.own_inverse[i] + distance * distance) / images;
      }
      to.mean[c] = static_cast<float>(mean);
      to.inverse[c] = static_cast<float>(var);
    }
    RunningForward running{tensors.pass, tensors.residual, kept, tensors.averages};
    running.pass.weight = weights.running.data();
    rate = take_in(running, shape, momentum, epsilon, to.mean, to.inverse);
  }
  for (int64_t c = 0; c < channels; ++c) to.inverse[c] = 1 / std::sqrt(to.inverse[c] + epsilon);
  for (int64_t i = 0; i < to.all; ++i) to.own_inverse[i] = 1 / std::sqrt(to.own_inverse[i] + epsilon);
  const MixedScale scale(shape, to, weights, tensors.pass.bias);
  each_together(shape, [&](const Shape& some, int64_t offset, int64_t part) {
    const auto of_type = [&](auto* x, auto* residual, auto* y) {
      const auto* added = residual ? residual + offset : nullptr;
      affine(some, x + offset, added, y + offset, to.own_mean + part, scale.at(part, slope));
    };
    with_type(layout.type, of_type, tensors.pass.x, tensors.residual, tensors.pass.y);
  });
  return std::max(rate, 1.0 / static_cast<double>(std::max<int64_t>(seen, 1)));
}

// The sums of `Loops::products` of each channel of each image, about its own mean: [image][channel][sum].
class MixedSums {
 public:
  MixedSums(const Layout& layout, const Backward& pass, const Mixed& of, const MixedScale& scale, double slope)
      : shape_(layout.shape), of_(of), space_(static_cast<double>(layout.shape.space)) {
    sums_.assign(of.all * kSums, 0);
    std::vector<float> segments;
    each_together(layout.shape, [&](const Shape& some, int64_t offset, int64_t part) {
      segments.resize(some.segments() * some.channels * kSums);
      const auto of_type = [&](auto* grad, auto* x) {
        const Gates z = scale.at(part, slope);
        products(true, some, grad + offset, x + offset, of.own_mean + part, z, segments.data());
      };
      with_type(layout.type, of_type, pass.grad, pass.x);
      add_segments(some, some, kSums, segments.data(), sums_.data() + part * kSums);
    });
  }

  // Of part i, which is of channel c.
  double grad(int64_t i) const { return sums_[i * kSums]; }                               // Σg
  double grad_own(int64_t i) const { return sums_[i * kSums + 1] * of_.own_inverse[i]; }  // Σ g i
  double grad_running(int64_t i, int64_t c) const {                                       // Σ g x̂
    return (sums_[i * kSums + 1] + distance(i, c) * grad(i)) * of_.inverse[c];
  }
  double running(int64_t i, int64_t c) const {  // Σ x̂
    return (sums_[i * kSums + 3] + space_ * distance(i, c)) * of_.inverse[c];
  }
  double running_square(int64_t i, int64_t c) const {  // Σ x̂²
    const double of = distance(i, c), inverse = of_.inverse[c];
    return (sums_[i * kSums + 4] + 2 * of * sums_[i * kSums + 3] + space_ * of * of) * inverse * inverse;
  }

  // Σg² of each image.
  template <class IsLittle>
  const float* squares(IsLittle) {
    squares_.assign(shape_.images, 0);
    each_part(shape_, [&](int64_t i, int64_t, int64_t image) {
      squares_[image] += static_cast<float>(sums_[i * kSums + 2]);
    });
    return squares_.data();
  }

  // The mean over images of the squared length of the output's mean over space. bias: β.
  double output_square(const float* weight, const float* bias) const {
    double length = 0;
    each_part(shape_, [&](int64_t i, int64_t c, int64_t) {
      const double pooled = running(i, c) / space_ * weight[c] + bias[c];
      length += pooled * pooled;
    });
    return length / static_cast<double>(shape_.images);
  }

 private:
  double distance(int64_t i, int64_t c) const { return double{of_.own_mean[i]} - of_.mean[c]; }

  const Shape& shape_;
  const Mixed& of_;
  const double space_;
  std::vector<double> sums_;
  std::vector<float> squares_;
};

struct MixedBackward {
  Backward pass;
  const float* gate;
  float* grad_gate;  // written
  Averages averages;
  Steps steps;
};

// The backward pass; arguments as in `running_backward`.
inline void mixed_backward(const Layout& layout, const MixedBackward& tensors, double batch_rate, double gate_speed,
                           double known, double slope, double step_bound, bool learns) {
  const Backward& pass = tensors.pass;
  const Shape& shape = layout.shape;
  const int64_t images = shape.images, channels = shape.channels, both = 2 * channels;
  const auto rate = static_cast<float>(batch_rate);
  const Mixed of(shape, const_cast<float*>(pass.saved));
  const Gate gate{tensors.gate, gate_speed, known};
  const MixedWeights weights(pass.weight, gate, channels);
  const MixedScale scale(shape, of, weights, pass.bias);
  MixedSums sums(layout, pass, of, scale, slope);

  Guards guards(tensors.steps, images, channels);
  if (learns) {
    guards.look(sums, pass, step_bound, rate, [&] {
      return sums.output_square(weights.running.data(), pass.bias);
    });
  }

  // The gradients of γ, β and s, and what the gradient of x is made of: p g + q (x − own_mean) + r.
  const float part = parameter_share(images);
  const double n = static_cast<double>(shape.values()), space = static_cast<double>(shape.space);
  std::vector<float> p(of.all), q(of.all), r(of.all);
  std::vector<double> total(both);  // Σg, then Σ g x̂
  bool finite = true;
  for (int64_t c = 0; c < channels; ++c) {
    double of_grad = 0, of_running = 0, of_own = 0, square = 0;
    for (int64_t image = 0, i = c; image < images; ++image, i += channels) {
      const double f = guards.factor[image];
      of_grad += f * sums.grad(i);
      of_running += f * sums.grad_running(i, c);
      of_own += f * sums.grad_own(i);
      square += sums.running_square(i, c);
    }
    total[c] = of_grad;
    total[channels + c] = of_running;
    finite &= std::isfinite(static_cast<float>(of_grad)) && std::isfinite(static_cast<float>(of_running));
    const float of_batch = static_cast<float>(of_running / n) / std::max(1.0f, rate * static_cast<float>(square / n));
    const double a = guards.subtracted(tensors.averages, c, static_cast<float>(of_grad / n), rate);
    const double b = guards.subtracted(tensors.averages, channels + c, of_batch, rate);
    const double s = weights.share[c], inverse = of.inverse[c], running = weights.running[c] * inverse;
    for (int64_t image = 0, i = c; image < images; ++image, i += channels) {
      const double f = guards.factor[image], own_inverse = of.own_inverse[i];
      const double own = weights.own[c] * own_inverse * f, distance = double{of.own_mean[i]} - of.mean[c];
      p[i] = static_cast<float>(running * f + own);
      q[i] = static_cast<float>(-running * b * inverse - own * own_inverse * sums.grad_own(i) / space);
      r[i] = static_cast<float>(-running * (a + b * inverse * distance) - own * sums.grad(i) / space);
    }
    const double of_weight = (1 - s) * of_running + s * of_own;
    const float of_share = static_cast<float>((of_own - of_running) * or_one(pass.weight, c));
    tensors.grad_gate[c] = through_gate(of_share, gate.gate[c], gate);
    pass.grad_weight[c] = static_cast<float>(of_weight) * part + guards.now[c] * guards.pull;
    pass.grad_bias[c] = static_cast<float>(of_grad) * part + guards.now[channels + c] * guards.pull;
    guards.gradient[c] += pass.grad_weight[c];
    guards.gradient[channels + c] += pass.grad_bias[c];
  }
  if (finite) guards.keep(tensors.averages, tensors.steps, total, n, rate, learns);
  each_together(shape, [&](const Shape& some, int64_t offset, int64_t at) {
    const auto write = [&](auto* grad, auto* x, auto* grad_x) {
      const float *of_p = p.data() + at, *of_q = q.data() + at, *of_r = r.data() + at;
      combine(some, grad + offset, x + offset, grad_x + offset, nullptr, of.own_mean + at, scale.at(at, slope), of_p,
              of_q, of_r);
    };
    with_type(layout.type, write, pass.grad, pass.x, pass.grad_x);
  });
}

}  // namespace normlab

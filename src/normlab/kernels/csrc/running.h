// The rule of running batch norm: the twin of `normlab.kernels.running` on a CPU, with its constants and both passes in
// the order that they have there.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "channels.h"
#include "passes.h"
#include "running_state.h"
#include "running_sums.h"
#include "tensors.h"

namespace normlab {

// `normlab.kernels.running.Constants`, in its order; set when the module is loaded.
struct Constants {
  double least_share, least_gradient_share, tolerated_drift, steps_remembered, steady_images, along, pull, unknown;
};
inline Constants constants;

// --- forward ---------------------------------------------------------------------------------------------------------

struct RunningForward {
  Forward pass;
  const void* residual;  // added before the activation, or null
  Statistics kept;
  Averages averages;
};

// The cosine of two vectors; their values are added pair by pair.
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

// The share times e^growth, kept between `least` and 1; NaN stays.
inline float grow(float share, double growth, double least) {
  const double w = share * std::exp(growth);
  return static_cast<float>(w < least ? least : w > 1 ? 1 : w);
}

// Enters a batch in the statistics, unless one would become infinite or NaN. mean, var: of the batch before the call,
// the statistics with the batch after it. Returns the batch's share in the averages, as it is after the first batches.
inline float take_in(const RunningForward& tensors, const Shape& shape, double momentum, float eps, float* mean,
                     float* var) {
  const Statistics& kept = tensors.kept;
  const Averages& averages = tensors.averages;
  const int64_t channels = shape.channels, seen = *kept.num_batches_tracked + 1;
  thread_local std::vector<float> innovation;
  innovation.resize(channels);
  Cosine with_last, with_drift;
  for (int64_t c = 0; c < channels; ++c) {
    const float scale = 1 / std::sqrt(kept.running_var[c] + eps), e = (mean[c] - kept.running_mean[c]) * scale;
    const float drift = averages.gradient_average[c] - averages.gradient_latest[c];
    innovation[c] = e;
    with_last.add(e, kept.innovation[c]);
    with_drift.add(e, drift * scale * scale * or_one(tensors.pass.weight, c));
  }
  const double gain = std::max(momentum, 1.0 / static_cast<double>(seen));
  const double tolerated = constants.tolerated_drift / static_cast<double>(shape.images);
  const float share = grow(*kept.share, with_last.value() * gain, constants.least_share * momentum);
  const float gradient_share =
      grow(*kept.gradient_share, (with_drift.value() - tolerated) * gain, constants.least_gradient_share * momentum);
  bool finite = std::isfinite(share) && std::isfinite(gradient_share);
  for (int64_t c = 0; c < channels; ++c) {
    const float distance = mean[c] - kept.running_mean[c], beside = (1 - share) * distance;
    var[c] = lerp(kept.running_var[c], var[c] + beside * distance, share);
    mean[c] -= beside;
    finite &= std::isfinite(mean[c]) && std::isfinite(var[c]) && std::isfinite(innovation[c]);
  }
  if (finite) {
    std::copy_n(mean, channels, kept.running_mean);
    std::copy_n(var, channels, kept.running_var);
    std::copy_n(innovation.data(), channels, kept.innovation);
    *kept.num_batches_tracked = seen;
    *kept.share = share;
    *kept.gradient_share = gradient_share;
  }
  return std::max(gradient_share, share);
}

// Returns the share of this batch in the averages of the backward pass. recomputing: it is in the statistics already.
inline double running_forward(const Layout& layout, const RunningForward& tensors, double slope, double momentum,
                              double eps, bool recomputing) {
  const Forward& pass = tensors.pass;
  const Statistics& kept = tensors.kept;
  const int64_t channels = layout.shape.channels, seen = *kept.num_batches_tracked + (recomputing ? 0 : 1);
  const auto epsilon = static_cast<float>(eps);
  float *mean = pass.saved, *var = mean + channels;
  double rate = std::max(*kept.gradient_share, *kept.share);
  if (recomputing) {
    std::copy_n(kept.running_mean, channels, mean);
    std::copy_n(kept.running_var, channels, var);
  } else {
    channel_moments(layout, {pass.x, pass.saved});
    rate = take_in(tensors, layout.shape, momentum, epsilon, mean, var);
  }
  for (int64_t c = 0; c < channels; ++c) var[c] = 1 / std::sqrt(var[c] + epsilon);
  normalize(layout, pass, tensors.residual, slope);
  return std::max(rate, 1.0 / static_cast<double>(std::max<int64_t>(seen, 1)));
}

// --- backward --------------------------------------------------------------------------------------------------------

struct RunningBackward {
  Backward pass;
  Averages averages;
  Steps steps;
};

// The numbers among `Steps`. A backward pass changes this copy, and keeps it if all gradients are finite.
struct Measured {
  float log_learning_rate, learning_rate_steps, output_square, step_length, latest_gradient_share;

  explicit Measured(const Steps& of)
      : log_learning_rate(*of.log_learning_rate),
        learning_rate_steps(*of.learning_rate_steps),
        output_square(*of.output_square),
        step_length(*of.step_length),
        latest_gradient_share(*of.latest_gradient_share) {}

  // rate: the share of this batch in the averages.
  void keep(const Steps& to, float rate) const {
    *to.log_learning_rate = log_learning_rate;
    *to.learning_rate_steps = learning_rate_steps;
    *to.output_square = output_square;
    *to.step_length = step_length;
    *to.latest_gradient_share = rate;
  }

  // Enters how far γ and β have moved since the last backward pass. before, gradient: theirs at that time. The gradient
  // is 0 afterwards if they have moved.
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
    const bool shows = far > 0 && force > 0;
    const bool along = shows && product < -static_cast<float>(constants.along) * far * force;
    const auto length = static_cast<float>(shows ? far / force : 1);
    if (shows && !along) {
      learning_rate_steps = 0;
      log_learning_rate = static_cast<float>(constants.unknown);
    }
    if (along) {
      learning_rate_steps += 1;
      const float share = std::max(1 / learning_rate_steps, 1 / static_cast<float>(constants.steps_remembered));
      log_learning_rate = lerp(log_learning_rate, std::log(length), share);
      step_length = step_length > 0 ? lerp(step_length, length, latest_gradient_share) : length;
      latest_gradient_share *= length / step_length;
    }
    if (far > 0) std::fill(gradient.begin(), gradient.end(), 0.0f);
  }
};

// Returns how many images have a gradient longer than the bound, and makes their factors less than 1. sums: those of
// the images, `Sums` or what has their squares. parameters: γ and β. lr: η.
template <class SumsOfImages>
int64_t bound_images(SumsOfImages& sums, const std::vector<float>& parameters, float lr, double step_bound,
                            std::vector<float>& factor) {
  double size = 0;
  for (const float value : parameters) size += double{value} * value;
  const double length = std::sqrt(std::max(size, static_cast<double>(parameters.size() / 2)));
  // The length of a gradient over its bound; takes the square of the length.
  const auto excess = [&](double square) { return std::sqrt(square) * (lr / (length * step_bound)); };
  const float* squares = sums.squares([&](double square) { return excess(square) <= 1; });
  int64_t over = 0;
  for (std::size_t image = 0; squares && image < factor.size(); ++image) {
    const double of_image = excess(squares[image]);
    if (of_image > 1) factor[image] = static_cast<float>(1 / of_image), ++over;
  }
  return over;
}

// k, the part of γ and β that is added to their gradient. over: how many images met the bound.
inline float pull_of(int64_t over, int64_t images, float lr, float output_square) {
  const float tiny = std::numeric_limits<float>::min(), n = static_cast<float>(images);
  const float overshoot = 1 - n / std::max(lr * output_square, tiny);
  return static_cast<float>(over) / n * std::max(overshoot, 0.0f) * static_cast<float>(constants.pull) /
         std::max(lr, tiny);
}

// p, the share of the learning rate at which γ and β learn from a batch of `images`.
inline float parameter_share(int64_t images) {
  return std::min(1.0f, std::sqrt(static_cast<float>(images) / static_cast<float>(constants.steady_images)));
}

// What guards a backward pass: how γ and β have moved, which images exceed the bound, and the pull.
struct Guards {
  std::vector<float>& factor;    // of each image
  std::vector<float>& now;       // γ and β if they learn, else 0
  std::vector<float>& gradient;  // theirs, summed since they moved
  Measured measured;
  int64_t over = 0;  // images that exceed the bound
  float pull = 0;

  Guards(const Steps& steps, int64_t images, int64_t channels)
      : factor(vector_of(0)), now(vector_of(1)), gradient(vector_of(2)), measured(steps) {
    factor.assign(images, 1);
    now.assign(2 * channels, 0);
    gradient.assign(steps.parameters_gradient, steps.parameters_gradient + 2 * channels);
    before_ = steps.parameters_before;
  }

  // Of γ and β that learn. output_square: the mean squared length of an image's output.
  template <class SumsOfImages, class OutputSquare>
  void look(SumsOfImages& sums, const Backward& pass, double step_bound, float rate, OutputSquare output_square) {
    const std::size_t channels = now.size() / 2;
    std::copy_n(pass.weight, channels, now.data());
    std::copy_n(pass.bias, channels, now.data() + channels);
    measured.enter_step(now, before_, gradient);
    const float lr = std::exp(measured.log_learning_rate);
    if (step_bound >= 0) over = bound_images(sums, now, lr, step_bound, factor);
    measured.output_square = lerp(measured.output_square, static_cast<float>(output_square()), rate);
    if (step_bound >= 0) pull = pull_of(over, static_cast<int64_t>(factor.size()), lr, measured.output_square);
  }

  // A or B, with this batch's own part of it.
  float subtracted(const Averages& of, int64_t i, float own, float rate) const {
    const float last = measured.latest_gradient_share;
    return lerp(lerp(of.gradient_average[i], of.gradient_latest[i], last), own, rate);
  }

  // Keeps what this pass found. total: Σg, then Σ g x̂, of n values.
  void keep(const Averages& of, const Steps& steps, const std::vector<double>& total, double n, float rate,
            bool learns) const {
    for (std::size_t i = 0; i < total.size(); ++i) {
      const float before = of.gradient_average[i], last = of.gradient_latest[i];
      of.gradient_average[i] = lerp(before, last, measured.latest_gradient_share);
      of.gradient_latest[i] = static_cast<float>(total[i] / n);
    }
    if (learns) std::copy_n(now.data(), now.size(), steps.parameters_before);
    std::copy_n(gradient.data(), gradient.size(), steps.parameters_gradient);
    measured.keep(steps, rate);
  }

 private:
  static std::vector<float>& vector_of(int i) {
    thread_local std::vector<float> vectors[3];
    return vectors[i];
  }
  const float* before_;
};

// The backward pass, see `normlab.kernels.running.normalize_with_memory`. batch_rate: what the forward pass returned.
// step_bound: below 0 for none. learns: weight and bias are there and both want a gradient.
inline void running_backward(const Layout& layout, const RunningBackward& tensors, double slope, double batch_rate,
                             double step_bound, bool learns) {
  const Backward& pass = tensors.pass;
  const Steps& steps = tensors.steps;
  const int64_t images = layout.shape.images, channels = layout.shape.channels, both = 2 * channels;
  const auto rate = static_cast<float>(batch_rate);
  const Gates z = gates(layout, pass, slope);
  thread_local Sums sums;
  sums.take(layout, pass, z);

  Guards guards(steps, images, channels);
  if (learns) guards.look(sums, pass, step_bound, rate, [&] { return sums.output_square(guards.now); });
  const float* factors = guards.over > 0 ? guards.factor.data() : nullptr;

  // The gradients of γ and β, and what the gradient of x is made of: p g + q (x − mean) + r.
  const std::vector<double>& of_channels = sums.of_channels(factors);
  const float *mean = pass.saved, *inverse = mean + channels, share = parameter_share(images);
  const double n = static_cast<double>(layout.shape.values());
  thread_local std::vector<float> p, q, r;
  thread_local std::vector<double> total;  // Σg, then Σ g x̂
  for (auto* part : {&p, &q, &r}) part->resize(channels);
  total.resize(both);
  bool finite = true;
  for (int64_t c = 0; c < channels; ++c) {
    const double* of = &of_channels[c * kSums];
    const double of_bias = total[c] = of[0], of_weight = total[channels + c] = of[1] * inverse[c];
    finite &= std::isfinite(static_cast<float>(of_bias)) && std::isfinite(static_cast<float>(of_weight));
    auto own = static_cast<float>(of_weight / n);
    own /= std::max(1.0f, rate * static_cast<float>(of[4] * inverse[c] * inverse[c] / n));
    const float scale = inverse[c] * or_one(pass.weight, c);
    const auto subtracted = [&](int64_t i, float own) {
      return guards.subtracted(tensors.averages, i, own, rate) * scale;
    };
    p[c] = scale;
    q[c] = -subtracted(channels + c, own) * inverse[c];
    r[c] = -subtracted(c, static_cast<float>(of_bias / n));
    pass.grad_weight[c] = static_cast<float>(of_weight) * share + guards.now[c] * guards.pull;
    pass.grad_bias[c] = static_cast<float>(of_bias) * share + guards.now[channels + c] * guards.pull;
    guards.gradient[c] += pass.grad_weight[c];
    guards.gradient[channels + c] += pass.grad_bias[c];
  }
  if (finite) guards.keep(tensors.averages, steps, total, n, rate, learns);
  const auto write = [&](auto* grad, auto* x, auto* grad_x) {
    combine(layout.shape, grad, x, grad_x, factors, mean, z, p.data(), q.data(), r.data());
  };
  with_type(layout.type, write, pass.grad, pass.x, pass.grad_x);
}

}  // namespace normlab

// Batch norm and frozen norm: each channel has statistics, of this batch or given. Other norms use the two steps that
// also stand here: the moments of a batch, and the gradient of an activation.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "passes.h"
#include "tensors.h"

namespace normlab {

struct MomentsOfChannels {
  const void* x;
  float* mean_and_var;  // written; the variance is biased
};

inline void channel_moments(const Layout& layout, const MomentsOfChannels& tensors) {
  float *mean = tensors.mean_and_var, *var = mean + layout.shape.channels;
  with_type(layout.type, [&](auto* x) { moments(layout.shape, x, mean, var); }, tensors.x);
}

struct BatchForward {
  Forward pass;
  const void* residual;              // added before the activation, or null
  float *running_mean, *running_var;  // or null, all three
  int64_t* num_batches;
};

// Enters a batch in the running statistics, unless its own are infinite or NaN. momentum: the share of the batch, or
// below 0 for the mean of all batches.
inline void enter_batch(const BatchForward& tensors, const Shape& shape, const float* mean, const float* var,
                        double momentum) {
  bool finite = true;
  for (int64_t c = 0; c < shape.channels; ++c) finite &= std::isfinite(mean[c]) && std::isfinite(var[c]);
  if (!finite) return;
  const double n = static_cast<double>(shape.values());
  const double batches = static_cast<double>(++*tensors.num_batches);
  const auto share = static_cast<float>(momentum < 0 ? 1 / batches : momentum);
  const auto unbias = static_cast<float>(n / std::max(n - 1, 1.0));
  float *to_mean = tensors.running_mean, *to_var = tensors.running_var;
  for (int64_t c = 0; c < shape.channels; ++c) {
    to_mean[c] = lerp(to_mean[c], mean[c], share);
    to_var[c] = lerp(to_var[c], var[c] * unbias, share);
  }
}

// Batch norm with the statistics of this batch.
inline void batch_forward(const Layout& layout, const BatchForward& tensors, double slope, double momentum,
                          double eps) {
  const Forward& pass = tensors.pass;
  const int64_t channels = layout.shape.channels;
  float *mean = pass.saved, *var = mean + channels;
  channel_moments(layout, {pass.x, pass.saved});
  if (tensors.running_mean) enter_batch(tensors, layout.shape, mean, var, momentum);
  for (int64_t c = 0; c < channels; ++c) var[c] = 1 / std::sqrt(var[c] + static_cast<float>(eps));
  normalize(layout, pass, tensors.residual, slope);
}

struct FrozenForward {
  Forward pass;
  const void* residual;  // added before the activation, or null
  const float *mean, *var;
};

// The norm with this mean and variance.
inline void frozen_forward(const Layout& layout, const FrozenForward& tensors, double slope, double eps) {
  const Forward& pass = tensors.pass;
  const int64_t channels = layout.shape.channels;
  float *mean = pass.saved, *inverse = mean + channels;
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = tensors.mean[c];
    inverse[c] = 1 / std::sqrt(tensors.var[c] + static_cast<float>(eps));
  }
  normalize(layout, pass, tensors.residual, slope);
}

// The gradient of both norms. share: 1 if mean and variance are the batch's, 0 if they are constants.
inline void batch_backward(const Layout& layout, const Backward& pass, double slope, double share) {
  const Shape& shape = layout.shape;
  const float *mean = pass.saved, *inverse = mean + shape.channels;
  thread_local std::vector<float> p, q, r;
  thread_local std::vector<double> total;
  total.assign(shape.channels * kOfGradient, 0);
  for (auto* part : {&p, &q, &r}) part->resize(shape.channels);
  const Gates z = gates(layout, pass, slope);
  const auto sum = [&](auto* grad, auto* x) { total_products(false, shape, grad, x, mean, z, total.data()); };
  with_type(layout.type, sum, pass.grad, pass.x);
  const double part = share / static_cast<double>(shape.values());
  for (int64_t c = 0; c < shape.channels; ++c) {
    pass.grad_bias[c] = static_cast<float>(total[kOfGradient * c]);
    pass.grad_weight[c] = static_cast<float>(total[kOfGradient * c + 1] * inverse[c]);
    p[c] = inverse[c] * or_one(pass.weight, c);
    q[c] = static_cast<float>(-part * p[c] * inverse[c] * pass.grad_weight[c]);
    r[c] = static_cast<float>(-part * p[c] * pass.grad_bias[c]);
  }
  const auto write = [&](auto* grad, auto* x, auto* grad_x) {
    combine(shape, grad, x, grad_x, nullptr, mean, z, p.data(), q.data(), r.data());
  };
  with_type(layout.type, write, pass.grad, pass.x, pass.grad_x);
}

struct ActivationBackward {
  const void *y, *grad;  // y: what the activation gave
  void* grad_x;          // written: what the activation lets through of `grad`
};

inline void activation_backward(const Layout& layout, const ActivationBackward& tensors, double slope) {
  const auto of_type = [&](auto* y, auto* grad, auto* grad_x) {
    gate(layout.shape.numel(), y, grad, grad_x, static_cast<float>(slope));
  };
  with_type(layout.type, of_type, tensors.y, tensors.grad, tensors.grad_x);
}

}  // namespace normlab

// The norms, forward and backward, on raw pointers; `normlab.kernels.native` calls them.
#include <nanobind/nanobind.h>

#include <cstring>
#include <limits>
#include <vector>

#include "channels.h"
#include "groups.h"
#include "norms.h"
#include "operators.h"
#include "positions.h"

namespace nb = nanobind;

namespace normlab {
namespace {

// The functions of this module have arguments in common. x, y: values, float32 (type 0), bfloat16 (1) or float16 (2),
// of so many images, channels and space, with the channels last in memory or not. weight, bias: float32 or null, as are
// all statistics. saved: means, then 1/√(variance + eps), written by the forward pass. g, out: the gradients of y and
// of x. weight_grad, bias_grad: written. residual: values added after the norm, before its activation, or null.

struct InstructionSet {
  const char* name;
  const AllLoops* loops;
};
const InstructionSet* in_use;

// Those that this machine has, the best one last.
const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> found = [] {
    std::vector<InstructionSet> sets = {{"plain", &kLoopsPlain}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) sets.push_back({"AVX2", &kLoopsAvx2});
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      sets.push_back({"AVX-512", &kLoopsAvx512});
    }
#endif
    return sets;
  }();
  return found;
}

// For tests; while no kernel runs.
void use_instructions(const char* name) {
  for (const InstructionSet& set : instruction_sets()) {
    if (std::strcmp(set.name, name) == 0) in_use = &set;
  }
}

// What `normlab.kernels.ops` says of the flagship's constants.
struct {
  float steps_remembered, steady_images, along, pull;
} constants;

template <class T>
T* at(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

// Calls f with a null pointer of the type of the values.
template <class F>
auto with_type(int type, F f) {
  switch (type) {
    case 0:
      return f(static_cast<float*>(nullptr));
    case 1:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<Float16*>(nullptr));
  }
}

float lerp(float from, float to, float share) {
  return share < 0.5f ? from + share * (to - from) : to - (to - from) * (1 - share);
}

float or_one(const float* values, int64_t i) { return values ? values[i] : 1.0f; }

// z = weight (x − mean) inverse + bias, with the activation after it. For use before the thread's next call.
Gates gates(int64_t channels, const float* inverse, const float* weight, const float* bias, double slope) {
  thread_local std::vector<float> scale, zeros;
  scale.resize(channels);
  zeros.resize(channels);
  for (int64_t c = 0; c < channels; ++c) scale[c] = inverse[c] * or_one(weight, c);
  return {scale.data(), bias ? bias : zeros.data(), static_cast<float>(slope)};
}

}  // namespace

// mean_and_var: of each channel, the variance biased.
void channel_moments(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x,
                     Pointer mean_and_var) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    moments(Shape{images, channels, space, last}, at<const T>(x), at<float>(mean_and_var),
            at<float>(mean_and_var) + channels);
  });
}

// Batch norm with the statistics of this batch, which enter the running ones, if there are any, unless they are
// infinite or NaN. saved: mean, 1/√(var + eps). momentum: below 0 for the mean of all batches.
void batch_forward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x, Pointer y,
                   Pointer weight, Pointer bias, Pointer saved, Pointer residual, Pointer running_mean,
                   Pointer running_var, Pointer num_batches, double slope, double momentum, double eps) {
  const Shape shape{images, channels, space, last};
  float *mean = at<float>(saved), *inverse = mean + channels;
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    moments(shape, at<const T>(x), mean, inverse);
  });
  bool finite = true;
  for (int64_t c = 0; c < channels; ++c) finite &= std::isfinite(mean[c]) && std::isfinite(inverse[c]);
  if (running_mean && finite) {
    const double n = static_cast<double>(shape.values());
    const double batches = static_cast<double>(++*at<int64_t>(num_batches));
    const auto share = static_cast<float>(momentum < 0 ? 1 / batches : momentum);
    const auto unbias = static_cast<float>(n / std::max(n - 1, 1.0));
    float *to_mean = at<float>(running_mean), *to_var = at<float>(running_var);
    for (int64_t c = 0; c < channels; ++c) {
      to_mean[c] = lerp(to_mean[c], mean[c], share);
      to_var[c] = lerp(to_var[c], inverse[c] * unbias, share);
    }
  }
  for (int64_t c = 0; c < channels; ++c) inverse[c] = 1 / std::sqrt(inverse[c] + static_cast<float>(eps));
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    affine(shape, at<const T>(x), at<const T>(residual), at<T>(y), mean,
           gates(channels, inverse, at<float>(weight), at<float>(bias), slope));
  });
}

// The gradient of weight (x − mean) inverse + bias and the activation after it, where the batch has the share `share`
// in mean and variance.
void batch_backward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer g, Pointer x,
                    Pointer out, Pointer weight, Pointer bias, Pointer saved, Pointer weight_grad, Pointer bias_grad,
                    double slope, double share) {
  const Shape shape{images, channels, space, last};
  const float *mean = at<float>(saved), *inverse = mean + channels;
  float *grad_weight = at<float>(weight_grad), *grad_bias = at<float>(bias_grad);
  thread_local std::vector<float> p, q, r;
  thread_local std::vector<double> total;
  total.assign(channels * kOfGradient, 0);
  for (auto* part : {&p, &q, &r}) part->resize(channels);
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const Gates z = gates(channels, inverse, at<float>(weight), at<float>(bias), slope);
    total_products(false, shape, at<const T>(g), at<const T>(x), mean, z, total.data());
    const double part = share / static_cast<double>(shape.values());
    for (int64_t c = 0; c < channels; ++c) {
      grad_bias[c] = static_cast<float>(total[kOfGradient * c]);
      grad_weight[c] = static_cast<float>(total[kOfGradient * c + 1] * inverse[c]);
      p[c] = inverse[c] * or_one(at<float>(weight), c);
      q[c] = static_cast<float>(-part * p[c] * inverse[c] * grad_weight[c]);
      r[c] = static_cast<float>(-part * p[c] * grad_bias[c]);
    }
    combine(shape, at<const T>(g), at<const T>(x), at<T>(out), nullptr, mean, z, p.data(), q.data(), r.data());
  });
}

// weight (x − mean) / √(var + eps) + bias. saved: mean, 1/√(var + eps).
void frozen_forward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x, Pointer y,
                    Pointer weight, Pointer bias, Pointer saved, Pointer residual, Pointer mean, Pointer var,
                    double slope, double eps) {
  const Shape shape{images, channels, space, last};
  float *saved_mean = at<float>(saved), *inverse = saved_mean + channels;
  for (int64_t c = 0; c < channels; ++c) {
    saved_mean[c] = at<float>(mean)[c];
    inverse[c] = 1 / std::sqrt(at<float>(var)[c] + static_cast<float>(eps));
  }
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const Gates z = gates(channels, inverse, at<float>(weight), at<float>(bias), slope);
    affine(shape, at<const T>(x), at<const T>(residual), at<T>(y), saved_mean, z);
  });
}

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
float grown(float share, double growth, double least) {
  const double w = share * std::exp(growth);
  return static_cast<float>(w < least ? least : w > 1 ? 1 : w);
}

// Running batch norm, see `RunningBatchNorm2d`; returns the share of this batch in the averages of the backward pass,
// which are `average` and `latest`, see `running_backward`.
double running_forward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x, Pointer y,
                       Pointer weight, Pointer bias, Pointer saved, Pointer residual, Pointer running_mean,
                       Pointer running_var, Pointer num_batches, Pointer share, Pointer innovation,
                       Pointer gradient_share, Pointer average, Pointer latest, double slope, double momentum,
                       double eps, double least_share, double least_gradient_share, double tolerated_drift,
                       bool recomputing) {
  const Shape shape{images, channels, space, last};
  float *mean = at<float>(saved), *inverse = mean + channels;
  float *kept_mean = at<float>(running_mean), *kept_var = at<float>(running_var);
  int64_t& batches = *at<int64_t>(num_batches);
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
    const float *grad_average = at<float>(average) + channels, *last_grad = at<float>(latest) + channels;
    Cosine with_last, with_push;
    for (int64_t c = 0; c < channels; ++c) {
      const float scale = 1 / std::sqrt(kept_var[c] + epsilon), e = (mean[c] - kept_mean[c]) * scale;
      innovations[c] = e;
      with_last.add(e, last_innovation[c]);
      with_push.add(e, (grad_average[c] - last_grad[c]) * scale * scale * or_one(at<float>(weight), c));
    }
    const double gain = std::max(momentum, 1.0 / static_cast<double>(seen));
    const float new_share = grown(*at<float>(share), with_last.value() * gain, least_share);
    const float new_gradient_share =
        grown(*at<float>(gradient_share), (with_push.value() - tolerated_drift / static_cast<double>(images)) * gain,
              least_gradient_share);
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

// `GradientMemory.measured`; last_rate: the share of the last batch in the averages, as long as its step was.
struct Measured {
  float log_lr, steps, squared_length, step_length, last_rate;

  // Enters how γ and β have moved since the backward pass before, at which they were `before` and were `pushed`.
  void enter_step(const std::vector<float>& now, const float* before, std::vector<float>& pushed) {
    double far = 0, force = 0, product = 0;
    for (std::size_t i = 0; i < now.size(); ++i) {
      const double moved = double{now[i]} - before[i];
      far += moved * moved;
      force += double{pushed[i]} * pushed[i];
      product += moved * pushed[i];
    }
    far = std::sqrt(far);
    force = std::sqrt(force);
    const bool shows = far > 0 && force > 0, along = shows && product < -constants.along * far * force;
    const auto length = static_cast<float>(shows ? far / force : 1);
    if (shows) {
      steps += 1;
      log_lr = lerp(log_lr, std::log(length), std::max(1 / steps, 1 / constants.steps_remembered));
    }
    if (along) {
      step_length = step_length > 0 ? lerp(step_length, length, last_rate) : length;
      last_rate *= length / step_length;
    }
    if (far > 0) std::fill(pushed.begin(), pushed.end(), 0.0f);
  }
};

// The backward pass of running batch norm, see `normlab.kernels.ops.normalize_with_memory`. step_bound: below 0 for
// none. learns: weight and bias are there and both want a gradient.
void running_backward(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer g, Pointer x,
                      Pointer out, Pointer weight, Pointer bias, Pointer saved, Pointer weight_grad, Pointer bias_grad,
                      Pointer average, Pointer latest, Pointer parameters, Pointer push, Pointer measured, double slope,
                      double batch_rate, double step_bound, bool learns) {
  const Shape shape{images, channels, space, last};
  const float *mean = at<float>(saved), *inverse = mean + channels;
  const auto rate = static_cast<float>(batch_rate);
  const int64_t both = 2 * channels;
  thread_local std::vector<float> sums, of_images, distances, of_distance, squares, factor, p, q, r, now, pushed;
  thread_local std::vector<double> total, of_channels;
  factor.assign(images, 1);
  total.assign(both, 0);
  of_channels.assign(channels * kSums, 0);
  now.resize(both);
  pushed.assign(at<float>(push), at<float>(push) + both);
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

  Measured known;
  std::memcpy(&known, at<float>(measured), sizeof known);
  float pull = 0;
  bool bounded = false;
  if (learns) {
    std::copy_n(at<float>(weight), channels, now.data());
    std::copy_n(at<float>(bias), channels, now.data() + channels);
    known.enter_step(now, at<float>(parameters), pushed);
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
    known.squared_length = lerp(known.squared_length, static_cast<float>(length / static_cast<double>(images)), rate);
    if (step_bound >= 0) {
      const float tiny = std::numeric_limits<float>::min(), n = static_cast<float>(images);
      const float overshoot = 1 - n / std::max(lr * known.squared_length, tiny);
      pull = static_cast<float>(over) / n * std::max(overshoot, 0.0f) * constants.pull / std::max(lr, tiny);
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
  float *to_average = at<float>(average), *to_latest = at<float>(latest);
  float *grad_weight = at<float>(weight_grad), *grad_bias = at<float>(bias_grad);
  const double n = static_cast<double>(shape.values());
  const float parameter_share = std::min(1.0f, std::sqrt(static_cast<float>(images) / constants.steady_images));
  for (int64_t i = 0; i < both; ++i) {
    const int64_t c = i % channels;
    total[i] = i < channels ? of_channels[c * kSums + 1] * inverse[c] : of_channels[c * kSums];
    finite &= std::isfinite(static_cast<float>(total[i]));
    auto own = static_cast<float>(total[i] / n);
    if (i < channels)
      own /= std::max(1.0f, rate * static_cast<float>(of_channels[c * kSums + 4] * inverse[c] * inverse[c] / n));
    const float scale = inverse[c] * or_one(at<float>(weight), c);
    const float subtracted = lerp(lerp(to_average[i], to_latest[i], known.last_rate), own, rate) * scale;
    if (i < channels) {
      p[c] = scale;
      q[c] = -subtracted * inverse[c];
    } else {
      r[c] = -subtracted;
    }
    const float given = static_cast<float>(total[i]) * parameter_share + (learns ? now[i] * pull : 0.0f);
    (i < channels ? grad_weight : grad_bias)[c] = given;
    pushed[i] += given;
  }
  if (finite) {
    for (int64_t i = 0; i < both; ++i) {
      to_average[i] = lerp(to_average[i], to_latest[i], known.last_rate);
      to_latest[i] = static_cast<float>(total[i] / n);
      if (learns) at<float>(parameters)[i] = now[i];
      at<float>(push)[i] = pushed[i];
    }
    known.last_rate = rate;
    std::memcpy(at<float>(measured), &known, sizeof known);
  }
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    combine(shape, at<const T>(g), at<const T>(x), at<T>(out), bounded ? factor.data() : nullptr, mean, z, p.data(),
            q.data(), r.data());
  });
}

// What the activation lets through of g, where y is what it gave.
void activation_backward(int type, int64_t images, int64_t channels, int64_t space, bool, Pointer y, Pointer g,
                         Pointer out, double slope) {
  const int64_t n = images * channels * space;
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    gate(n, at<const T>(y), at<const T>(g), at<T>(out), static_cast<float>(slope));
  });
}

void group_forward_of(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x, Pointer y,
                      Pointer weight, Pointer bias, Pointer saved, double slope, int64_t groups, double eps) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    group_forward({images, channels, space, last}, groups, at<const T>(x), at<T>(y), at<float>(weight), at<float>(bias),
                  at<float>(saved), static_cast<float>(slope), eps);
  });
}

void group_backward_of(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer g, Pointer x,
                       Pointer out, Pointer weight, Pointer bias, Pointer saved, Pointer weight_grad, Pointer bias_grad,
                       double slope, int64_t groups) {
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    group_backward({images, channels, space, last}, groups, at<const T>(g), at<const T>(x), at<T>(out),
                   at<float>(weight), at<float>(bias), at<float>(saved), at<float>(weight_grad), at<float>(bias_grad),
                   static_cast<float>(slope));
  });
}

// Norms of each position over the channels, `centred` or not.
void position_forward_of(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer x, Pointer y,
                         Pointer weight, Pointer bias, Pointer saved, double, bool centred, double eps) {
  const PositionNorm norm{channels, at<float>(weight), at<float>(bias), centred, static_cast<float>(eps)};
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    position_norm_forward({images, channels, space, last}, norm, at<const T>(x), at<T>(y), at<float>(saved));
  });
}

void position_backward_of(int type, int64_t images, int64_t channels, int64_t space, bool last, Pointer g, Pointer x,
                          Pointer out, Pointer weight, Pointer bias, Pointer saved, Pointer weight_grad,
                          Pointer bias_grad, double, bool centred) {
  const PositionNorm norm{channels, at<float>(weight), at<float>(bias), centred, 0};
  with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    position_norm_backward({images, channels, space, last}, norm, at<const T>(g), at<const T>(x), at<T>(out),
                           at<float>(saved), at<float>(weight_grad), at<float>(bias_grad));
  });
}

void set_openmp(Pointer parallel, Pointer max_threads, Pointer thread, Pointer threads, Pointer inside) {
  openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(parallel);
  openmp.max_threads = reinterpret_cast<decltype(openmp.max_threads)>(max_threads);
  openmp.thread = reinterpret_cast<decltype(openmp.thread)>(thread);
  openmp.threads = reinterpret_cast<decltype(openmp.threads)>(threads);
  openmp.inside = reinterpret_cast<decltype(openmp.inside)>(inside);
}

void set_constants(float steps_remembered, float steady_images, float along, float pull) {
  constants = {steps_remembered, steady_images, along, pull};
}

template <>
const Loops<float>& loops<float>() {
  return in_use->loops->of_float;
}
template <>
const Loops<BFloat16>& loops<BFloat16>() {
  return in_use->loops->of_bfloat16;
}
template <>
const Loops<Float16>& loops<Float16>() {
  return in_use->loops->of_float16;
}

}  // namespace normlab

NB_MODULE(_native, m) {
  using namespace normlab;
  in_use = &instruction_sets().back();
  m.doc() = "The loops of the compiled kernels; see `normlab.kernels.native`.";
  nb::list names;
  for (const InstructionSet& set : instruction_sets()) names.append(set.name);
  m.attr("instruction_sets") = nb::tuple(names);
  m.def("use_instructions", &use_instructions);
  m.def("set_openmp", &set_openmp);
  m.def("set_constants", &set_constants);
  m.def("register_operators", [](nb::callable address) {
    register_operators([&](const char* name) { return nb::cast<uintptr_t>(address(name)); });
  });
  const auto define = [&](const char* name, auto function) {
    m.def(name, function, nb::call_guard<nb::gil_scoped_release>());
  };
  define("activation_backward", &activation_backward);
  define("channel_moments", &channel_moments);
  define("batch_forward", &batch_forward);
  define("batch_backward", &batch_backward);
  define("frozen_forward", &frozen_forward);
  define("group_forward", &group_forward_of);
  define("group_backward", &group_backward_of);
  define("position_forward", &position_forward_of);
  define("position_backward", &position_backward_of);
  define("running_forward", &running_forward);
  define("running_backward", &running_backward);
}

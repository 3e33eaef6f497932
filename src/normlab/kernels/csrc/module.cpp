// The norms, forward and backward, on raw pointers; `normlab.kernels.native` calls them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>
#include <cstring>
#include <vector>

#include "channels.h"
#include "groups.h"
#include "norms.h"
#include "operators.h"
#include "pointers.h"
#include "positions.h"
#include "running.h"

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

// In the order of `normlab.kernels.running.Constants`.
void set_constants(const std::array<double, sizeof(Constants) / sizeof(double)>& values) {
  std::memcpy(&constants, values.data(), sizeof constants);
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

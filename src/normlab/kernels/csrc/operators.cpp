// The operators of `normlab.kernels.library` on a CPU, for torch to call without Python in between: on a small tensor
// Python takes longer than the kernel. An operator makes its results, and the struct of pointers that its norm takes.
#include "operators.h"

#include <array>
#include <cstring>
#include <iterator>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#include "channels.h"
#include "groups.h"
#include "input.h"
#include "running.h"
#include "running_instance.h"
#include "torch_interface.h"

namespace normlab {
namespace {

// What follows has the schemas of the operators. Tensors are on a CPU: torch goes elsewhere if one of them is not.
namespace operators {

struct Parameters {
  Tensor x;
  OptionalTensor weight, bias;
};

// The tensors of a struct of pointers of the running state.
template <class Struct>
using Buffers = std::array<Tensor, std::size(Struct::kBuffers)>;

using Outputs = std::array<Tensor, 2>;    // y, and what is saved
using Gradients = std::array<Tensor, 3>;  // of x, weight and bias

// parts: how many means and as many inverses are saved.
Outputs make_outputs(const Input& in, int64_t parts) {
  const int64_t sizes[] = {2, parts}, strides[] = {parts, 1};
  return {in.empty_like(), empty(2, sizes, strides, torch.types[0])};
}

Gradients make_gradients(const Input& in) {
  const int64_t channels = in.layout.shape.channels, stride = 1;
  const auto of_channels = [&] { return empty(1, &channels, &stride, torch.types[0]); };
  return {in.empty_like(), of_channels(), of_channels()};
}

Forward forward(const Input& in, const Parameters& of, const Outputs& to) {
  return {in.x(), data(to[0]), in.of_channels("weight", of.weight), in.of_channels("bias", of.bias),
          static_cast<float*>(data(to[1]))};
}

// copy: of `grad`, if one is needed; must live as long as what is returned.
Backward backward(const Tensor& grad, const Input& in, const Parameters& of, const Tensor& saved, int64_t parts,
                  const Gradients& to, Tensor& copy) {
  return {in.like_x("grad", grad, copy),
          in.x(),
          data(to[0]),
          in.of_channels("weight", of.weight),
          in.of_channels("bias", of.bias),
          values<float>("saved", saved, 2 * parts),
          static_cast<float*>(data(to[1])),
          static_cast<float*>(data(to[2]))};
}

template <class Struct>
Struct pointers(const Input& in, const Buffers<Struct>& buffers) {
  std::array<void*, std::size(Struct::kBuffers)> found;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const auto [name, is_int64, each] = Struct::kBuffers[i];
    const int64_t n = each ? each * in.layout.shape.channels : 1;
    if (is_int64) {
      found[i] = values<int64_t>(name, buffers[i], n);
    } else {
      found[i] = values<float>(name, buffers[i], n);
    }
  }
  Struct as_struct;
  static_assert(sizeof as_struct == sizeof found);
  std::memcpy(&as_struct, found.data(), sizeof found);
  return as_struct;
}

Outputs batch_forward(const Parameters& of, const OptionalTensor& residual, const OptionalTensor& running_mean,
                      const OptionalTensor& running_var, const OptionalTensor& num_batches, double slope,
                      double momentum, double eps) {
  check(!running_mean == !running_var && !running_mean == !num_batches, "statistics must be all there, or none");
  const Input in(of.x);
  Outputs found = make_outputs(in, in.layout.shape.channels);
  Tensor copy;
  const BatchForward tensors{forward(in, of, found), in.like_x("residual", residual, copy),
                             in.of_channels("running_mean", running_mean), in.of_channels("running_var", running_var),
                             values<int64_t>("num_batches_tracked", num_batches, 1)};
  normlab::batch_forward(in.layout, tensors, slope, momentum, eps);
  return found;
}

Outputs frozen_forward(const Parameters& of, const OptionalTensor& residual, const Tensor& mean, const Tensor& var,
                       double slope, double eps) {
  const Input in(of.x);
  Outputs found = make_outputs(in, in.layout.shape.channels);
  Tensor copy;
  const FrozenForward tensors{forward(in, of, found), in.like_x("residual", residual, copy),
                              in.of_channels("mean", mean), in.of_channels("var", var)};
  normlab::frozen_forward(in.layout, tensors, slope, eps);
  return found;
}

Gradients batch_backward(const Tensor& grad, const Parameters& of, const Tensor& saved, double slope, double share) {
  const Input in(of.x);
  Gradients found = make_gradients(in);
  Tensor copy;
  const Backward tensors = backward(grad, in, of, saved, in.layout.shape.channels, found, copy);
  normlab::batch_backward(in.layout, tensors, slope, share);
  return found;
}

std::array<Tensor, 3> running_forward(const Parameters& of, const OptionalTensor& residual,
                                      const Buffers<Statistics>& statistics, const Buffers<Averages>& averages,
                                      double slope, double momentum, double eps, bool recomputing) {
  const Input in(of.x);
  Outputs found = make_outputs(in, in.layout.shape.channels);
  Tensor rate = empty(0, nullptr, nullptr, torch.types[0]), copy;
  const RunningForward tensors{forward(in, of, found), in.like_x("residual", residual, copy),
                               pointers<Statistics>(in, statistics), pointers<Averages>(in, averages)};
  const double share = normlab::running_forward(in.layout, tensors, slope, momentum, eps, recomputing);
  *static_cast<float*>(data(rate)) = static_cast<float>(share);
  return {std::move(found[0]), std::move(found[1]), std::move(rate)};
}

Gradients running_backward(const Tensor& grad, const Parameters& of, const Tensor& saved, const Tensor& rate,
                           const Buffers<Averages>& averages, const Buffers<Steps>& steps, double slope,
                           double step_bound, bool learns) {
  check(!learns || (of.weight && of.bias), "weight and bias must be there to be learned");
  const Input in(of.x);
  Gradients found = make_gradients(in);
  Tensor copy;
  const RunningBackward tensors{backward(grad, in, of, saved, in.layout.shape.channels, found, copy),
                                pointers<Averages>(in, averages), pointers<Steps>(in, steps)};
  normlab::running_backward(in.layout, tensors, slope, *values<float>("rate", rate, 1), step_bound, learns);
  return found;
}

std::array<Tensor, 3> running_instance_forward(const Parameters& of, const Tensor& gate,
                                               const OptionalTensor& residual, const Buffers<Statistics>& statistics,
                                               const Buffers<Averages>& averages, double gate_speed, double known,
                                               double slope, double momentum, double eps, bool recomputing) {
  const Input in(of.x);
  Outputs found = make_outputs(in, Mixed::parts(in.layout.shape));
  Tensor rate = empty(0, nullptr, nullptr, torch.types[0]), copy;
  const MixedForward tensors{forward(in, of, found), in.like_x("residual", residual, copy),
                             in.of_channels("gate", gate), pointers<Statistics>(in, statistics),
                             pointers<Averages>(in, averages)};
  const double share = mixed_forward(in.layout, tensors, gate_speed, known, slope, momentum, eps, recomputing);
  *static_cast<float*>(data(rate)) = static_cast<float>(share);
  return {std::move(found[0]), std::move(found[1]), std::move(rate)};
}

std::array<Tensor, 4> running_instance_backward(const Tensor& grad, const Parameters& of, const Tensor& gate,
                                                const Tensor& saved, const Tensor& rate,
                                                const Buffers<Averages>& averages, const Buffers<Steps>& steps,
                                                double gate_speed, double known, double slope, double step_bound,
                                                bool learns) {
  check(!learns || (of.weight && of.bias), "weight and bias must be there to be learned");
  const Input in(of.x);
  Gradients found = make_gradients(in);
  const int64_t channels = in.layout.shape.channels, stride = 1;
  Tensor of_gate = empty(1, &channels, &stride, torch.types[0]), copy;
  const MixedBackward tensors{backward(grad, in, of, saved, Mixed::parts(in.layout.shape), found, copy),
                              in.of_channels("gate", gate), static_cast<float*>(data(of_gate)),
                              pointers<Averages>(in, averages), pointers<Steps>(in, steps)};
  const double share = *values<float>("rate", rate, 1);
  mixed_backward(in.layout, tensors, share, gate_speed, known, slope, step_bound, learns);
  return {std::move(found[0]), std::move(found[1]), std::move(found[2]), std::move(of_gate)};
}

// How many groups the batch has.
int64_t all_groups(const Input& in, int64_t groups) {
  const Shape& shape = in.layout.shape;
  check(groups > 0 && shape.channels % groups == 0, "num_groups must divide the channels");
  return shape.images * groups;
}

Outputs group_forward(const Parameters& of, int64_t groups, double slope, double eps) {
  const Input in(of.x);
  Outputs found = make_outputs(in, all_groups(in, groups));
  normlab::group_forward(in.layout, forward(in, of, found), slope, groups, eps);
  return found;
}

Gradients group_backward(const Tensor& grad, const Parameters& of, const Tensor& saved, int64_t groups, double slope) {
  const Input in(of.x);
  const int64_t parts = all_groups(in, groups);
  Gradients found = make_gradients(in);
  Tensor copy;
  const Backward tensors = backward(grad, in, of, saved, parts, found, copy);
  normlab::group_backward(in.layout, tensors, slope, groups);
  return found;
}

// Takes an argument from torch's stack. A tensor is ours from then on, and so is the box of one that may be None.
void take(Value*& next, Tensor& to) { to.reset(reinterpret_cast<Handle>(*next++)); }

void take(Value*& next, OptionalTensor& to) {
  const std::unique_ptr<Value> box(reinterpret_cast<Value*>(*next++));
  if (box) to.reset(reinterpret_cast<Handle>(*box));
}

void take(Value*& next, bool& to) { to = *next++ != 0; }

template <class T>
void take(Value*& next, T& number) {
  static_assert(sizeof number == sizeof *next);
  std::memcpy(&number, next++, sizeof number);
}

template <class T, std::size_t n>
void take(Value*& next, std::array<T, n>& to) {
  for (T& one : to) take(next, one);
}

void take(Value*& next, Parameters& to) {
  take(next, to.x);
  take(next, to.weight);
  take(next, to.bias);
}

// How many values an argument has on the stack. They are as large here as there, but for a bool.
template <class T>
constexpr uint64_t kValues = (sizeof(T) + sizeof(Value) - 1) / sizeof(Value);

template <std::size_t results, class... Arguments>
void call(std::array<Tensor, results> (*function)(Arguments...), Value* stack, uint64_t arguments) {
  constexpr uint64_t expected = (kValues<std::decay_t<Arguments>> + ...);
  check(arguments == expected, "an operator's schema is not that of the compiled module");
  Value* next = stack;
  std::tuple<std::decay_t<Arguments>...> taken;
  std::apply([&](auto&... each) { (take(next, each), ...); }, taken);
  for (Tensor& found : std::apply(function, taken)) *stack++ = reinterpret_cast<Value>(found.release());
}

// What torch calls: arguments are on the stack, and results take their place.
template <auto function>
void boxed(Value* stack, uint64_t arguments, uint64_t) {
  call(function, stack, arguments);
}

}  // namespace operators
}  // namespace

void register_operators(const std::function<uintptr_t(const char* name)>& address) {
  find_torch(address);
  Library library;
  check(!torch.open("normlab", "CPU", "operators.cpp", 0, &library), "torch takes no operators");
  const auto implement = [&](const char* name, Operator* function) {
    check(!torch.implement(library, name, function, kVersion), "torch takes no operators");
  };
  using operators::boxed;
  implement("batch_forward", boxed<operators::batch_forward>);
  implement("frozen_forward", boxed<operators::frozen_forward>);
  implement("batch_backward", boxed<operators::batch_backward>);
  implement("running_forward", boxed<operators::running_forward>);
  implement("running_backward", boxed<operators::running_backward>);
  implement("running_instance_forward", boxed<operators::running_instance_forward>);
  implement("running_instance_backward", boxed<operators::running_instance_backward>);
  implement("group_forward", boxed<operators::group_forward>);
  implement("group_backward", boxed<operators::group_backward>);
}

}  // namespace normlab

// The operators of `normlab.kernels.operators` on a CPU, for torch to call without Python in between: on a small tensor
// that takes longer than the kernel.
//
// Torch is not there when this is compiled. What is needed of it are functions of its stable C interface
// (torch/csrc/stable/c/shim.h and torch/csrc/inductor/aoti_torch/c/shim.h), looked up in memory at run time.
#include "operators.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "norms.h"

namespace normlab {
namespace {

using Handle = struct OpaqueTensor*;
using Library = struct OpaqueLibrary*;
using Value = uint64_t;   // an argument or a result, see `take`
using Failure = int32_t;  // 0 for none
using Operator = void(Value* stack, uint64_t arguments, uint64_t results);

// The version of the interface that is used here, torch 2.10's: the first that asks.
constexpr uint64_t kVersion = uint64_t{2} << 56 | uint64_t{10} << 48;

struct {
  Failure (*delete_tensor)(Handle);
  Failure (*dim)(Handle, int64_t*);
  Failure (*numel)(Handle, int64_t*);
  Failure (*sizes)(Handle, int64_t**);
  Failure (*strides)(Handle, int64_t**);
  Failure (*dtype)(Handle, int32_t*);
  Failure (*data)(Handle, void**);
  Failure (*storage_size)(Handle, int64_t*);  // in bytes
  Failure (*storage_offset)(Handle, int64_t*);
  Failure (*is_contiguous)(Handle, bool*);
  Failure (*empty_strided)(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device,
                           int32_t device_index, Handle*);
  Failure (*copy)(Handle to, Handle from, int32_t non_blocking);
  int32_t cpu, int64;
  std::array<int32_t, 3> types;  // in the order of the kernels
} torch;

// Exceptions are how torch's own macros for such operators report to it; Python sees a RuntimeError.
void check(bool met, const char* what) {
  if (!met) throw std::runtime_error(std::string("normlab: ") + what);
}

struct Delete {
  void operator()(Handle tensor) const { torch.delete_tensor(tensor); }
};
using Tensor = std::unique_ptr<OpaqueTensor, Delete>;
struct OptionalTensor : Tensor {
  using Tensor::Tensor;
};

// What a function of torch's says of a tensor.
template <class T>
T get(Failure (*function)(Handle, T*), const Tensor& tensor) {
  T found;
  check(!function(tensor.get(), &found), "a tensor is not in memory");
  return found;
}

Pointer data(const Tensor& tensor) { return reinterpret_cast<Pointer>(get(torch.data, tensor)); }

// Raises if the storage of a tensor was freed, as sharded training does between uses, or is shorter than its values
// need: torch gives a pointer all the same. name: for an error.
void check_storage(const Tensor& tensor, const char* name) {
  const int64_t dim = get(torch.dim, tensor), *sizes = get(torch.sizes, tensor), *strides = get(torch.strides, tensor);
  const int32_t dtype = get(torch.dtype, tensor);
  int64_t values = get(torch.storage_offset, tensor) + 1;  // up to the last of this tensor
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 0) return;
    values += (sizes[d] - 1) * strides[d];
  }
  const int64_t bytes = values * (dtype == torch.int64 ? 8 : dtype == torch.types[0] ? 4 : 2);
  const int64_t there = get(torch.storage_size, tensor);
  if (there < bytes) {
    throw std::runtime_error(std::string("normlab: ") + name + " needs " + std::to_string(bytes) +
                             " bytes of storage, and " + std::to_string(there) +
                             " are there: it was freed, or resized");
  }
}

// Of n values, or null if there is no tensor. name: for an error.
Pointer data(const Tensor& tensor, int32_t dtype, int64_t n, const char* name) {
  if (!tensor) return 0;
  if (get(torch.dtype, tensor) != dtype || get(torch.numel, tensor) != n || !get(torch.is_contiguous, tensor)) {
    const char* type = dtype == torch.int64 ? "int64" : "float32";
    throw std::runtime_error(std::string("normlab: ") + name + " must be contiguous, " + type + ", of size " +
                             std::to_string(n));
  }
  check_storage(tensor, name);
  return data(tensor);
}

Pointer single(const char* name, const Tensor& tensor) { return data(tensor, torch.types[0], 1, name); }

Tensor empty(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  Handle made;
  check(!torch.empty_strided(dim, sizes, strides, dtype, torch.cpu, 0, &made), "no memory for a tensor");
  return Tensor(made);
}

Tensor empty(int64_t n) {
  const int64_t stride = 1;
  return empty(1, &n, &stride, torch.types[0]);
}

// The input of a norm, in a layout that the kernels know: see `launch.describe`.
class Input {
 public:
  explicit Input(const Tensor& x)
      : given_(x), dtype_(get(torch.dtype, x)), dim_(get(torch.dim, x)), sizes_(get(torch.sizes, x)) {
    while (type < 3 && torch.types[type] != dtype_) ++type;
    check(type < 3, "x must be float32, bfloat16 or float16");
    const int64_t values = get(torch.numel, x);
    check(dim_ > 1 && values > 0, "x must be (N, C, *space), and not empty");
    check_storage(x, "x");
    images = sizes_[0];
    channels = sizes_[1];
    space = values / (images * channels);
    last = space == 1;
    if (lies(x)) return;
    channels_last_ = dim_ == 4 || dim_ == 5;  // as for torch
    if (channels_last_ && lies(x)) {
      last = true;
    } else {
      channels_last_ = false;
      copy_ = copied(x);
    }
  }

  const Tensor& x() const { return copy_ ? copy_ : given_; }

  Tensor empty_like() const { return empty(dim_, sizes_, get(torch.strides, x()), dtype_); }

  // A tensor like x, in its layout: itself or a copy, which is kept; null if there is none. name: for an error.
  Pointer like_x(const char* name, const Tensor& tensor, Tensor& copy) const {
    if (!tensor) return 0;
    copy = laid(tensor, name);
    return data(copy ? copy : tensor);
  }

  // Statistics or parameters: of each channel so many values.
  Pointer of_channels(const char* name, const Tensor& tensor, int64_t each = 1) const {
    return data(tensor, torch.types[0], each * channels, name);
  }

  int type = 0;
  int64_t images, channels, space;
  bool last;

 private:
  // The dimension of which `inner` lie further inside.
  int64_t dimension(int64_t inner) const {
    if (!channels_last_) return dim_ - 1 - inner;
    return inner == 0 ? 1 : inner == dim_ - 1 ? 0 : dim_ - inner;
  }

  // Whether a tensor of this shape has its dimensions in that order, without gaps.
  bool lies(const Tensor& tensor) const {
    const int64_t* strides = get(torch.strides, tensor);
    int64_t stride = 1;
    for (int64_t i = 0; i < dim_; ++i) {
      const int64_t d = dimension(i);
      if (sizes_[d] != 1 && strides[d] != stride) return false;
      stride *= sizes_[d];
    }
    return true;
  }

  // A copy in the layout of x; null if the tensor has that.
  Tensor laid(const Tensor& tensor, const char* name) const {
    if (get(torch.dtype, tensor) != dtype_ || get(torch.dim, tensor) != dim_ ||
        !std::equal(sizes_, sizes_ + dim_, get(torch.sizes, tensor))) {
      throw std::runtime_error(std::string("normlab: ") + name + " must have the type and the shape of x");
    }
    check_storage(tensor, name);
    return lies(tensor) ? Tensor() : copied(tensor);
  }

  Tensor copied(const Tensor& tensor) const {
    std::vector<int64_t> strides(dim_);
    int64_t stride = 1;
    for (int64_t i = 0; i < dim_; ++i) {
      const int64_t d = dimension(i);
      strides[d] = stride;
      stride *= sizes_[d];
    }
    Tensor copy = empty(dim_, sizes_, strides.data(), dtype_);
    check(!torch.copy(copy.get(), tensor.get(), 0), "a tensor cannot be copied");
    return copy;
  }

  const Tensor& given_;
  Tensor copy_;
  const int32_t dtype_;
  const int64_t dim_;
  const int64_t* const sizes_;  // of the tensor given
  bool channels_last_ = false;  // in memory
};

using Forward = std::array<Tensor, 2>;
using Backward = std::array<Tensor, 3>;

// By this kernel; parts: how many means are saved. rest: its arguments after these.
template <class Kernel, class... Rest>
Forward forward(Kernel kernel, const Input& in, const Tensor& weight, const Tensor& bias, int64_t parts, Rest... rest) {
  const int64_t sizes[] = {2, parts}, strides[] = {parts, 1};
  Forward found{in.empty_like(), empty(2, sizes, strides, torch.types[0])};
  kernel(in.type, in.images, in.channels, in.space, in.last, data(in.x()), data(found[0]),
         in.of_channels("weight", weight), in.of_channels("bias", bias), data(found[1]), rest...);
  return found;
}

template <class Kernel, class... Rest>
Backward backward(Kernel kernel, const Tensor& grad, const Input& in, const Tensor& weight, const Tensor& bias,
                  const Tensor& saved, int64_t parts, Rest... rest) {
  Tensor copy;
  Backward found{in.empty_like(), empty(in.channels), empty(in.channels)};
  kernel(in.type, in.images, in.channels, in.space, in.last, in.like_x("grad", grad, copy), data(in.x()),
         data(found[0]), in.of_channels("weight", weight), in.of_channels("bias", bias),
         data(saved, torch.types[0], 2 * parts, "saved"), data(found[1]), data(found[2]), rest...);
  return found;
}

// What follows has the schemas of the operators. Tensors are on a CPU: torch goes elsewhere if one of them is not.
namespace operators {

Forward batch_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& residual, const OptionalTensor& running_mean,
                      const OptionalTensor& running_var, const OptionalTensor& num_batches, double slope,
                      double momentum, double eps) {
  const Input in(x);
  Tensor copy;
  check(!running_mean == !running_var && !running_mean == !num_batches, "statistics must be all there, or none");
  return forward(normlab::batch_forward, in, weight, bias, in.channels, in.like_x("residual", residual, copy),
                 in.of_channels("running_mean", running_mean), in.of_channels("running_var", running_var),
                 data(num_batches, torch.int64, 1, "num_batches_tracked"), slope, momentum, eps);
}

Forward frozen_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual, const Tensor& mean, const Tensor& var, double slope,
                       double eps) {
  const Input in(x);
  Tensor copy;
  return forward(normlab::frozen_forward, in, weight, bias, in.channels, in.like_x("residual", residual, copy),
                 in.of_channels("mean", mean), in.of_channels("var", var), slope, eps);
}

Backward batch_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const Tensor& saved, double slope, double share) {
  const Input in(x);
  return backward(normlab::batch_backward, grad, in, weight, bias, saved, in.channels, slope, share);
}

std::array<Tensor, 3> running_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& residual, const Tensor& running_mean,
                                      const Tensor& running_var, const Tensor& num_batches, const Tensor& share,
                                      const Tensor& innovation, const Tensor& gradient_share, const Tensor& gradient_average,
                                      const Tensor& gradient_latest, double slope, double momentum, double eps,
                                      bool recomputing) {
  const Input in(x);
  Tensor copy;
  Tensor rate = empty(0, nullptr, nullptr, torch.types[0]);
  const auto kernel = [&](auto... arguments) {
    *reinterpret_cast<float*>(data(rate)) = static_cast<float>(normlab::running_forward(arguments...));
  };
  Forward found =
      forward(kernel, in, weight, bias, in.channels, in.like_x("residual", residual, copy),
              in.of_channels("running_mean", running_mean), in.of_channels("running_var", running_var),
              data(num_batches, torch.int64, 1, "num_batches_tracked"), single("share", share),
              in.of_channels("innovation", innovation), single("gradient_share", gradient_share),
              in.of_channels("gradient_average", gradient_average, 2),
              in.of_channels("gradient_latest", gradient_latest, 2), slope, momentum, eps, recomputing);
  return {std::move(found[0]), std::move(found[1]), std::move(rate)};
}

Backward running_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                          const Tensor& saved, const Tensor& rate, const Tensor& gradient_average,
                          const Tensor& gradient_latest, const Tensor& parameters_before,
                          const Tensor& parameters_gradient, const Tensor& log_learning_rate,
                          const Tensor& learning_rate_steps, const Tensor& output_square, const Tensor& step_length,
                          const Tensor& latest_gradient_share, double slope, double step_bound, bool learns) {
  const Input in(x);
  check(!learns || (weight && bias), "weight and bias must be there to be learned");
  const float batch_rate = *reinterpret_cast<const float*>(single("rate", rate));
  return backward(normlab::running_backward, grad, in, weight, bias, saved, in.channels,
                  in.of_channels("gradient_average", gradient_average, 2),
                  in.of_channels("gradient_latest", gradient_latest, 2),
                  in.of_channels("parameters_before", parameters_before, 2),
                  in.of_channels("parameters_gradient", parameters_gradient, 2),
                  single("log_learning_rate", log_learning_rate), single("learning_rate_steps", learning_rate_steps),
                  single("output_square", output_square), single("step_length", step_length),
                  single("latest_gradient_share", latest_gradient_share), slope, double{batch_rate}, step_bound, learns);
}

int64_t parts(const Input& in, int64_t groups) {
  check(groups > 0 && in.channels % groups == 0, "num_groups must divide the channels");
  return in.images * groups;
}

Forward group_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, int64_t groups,
                      double slope, double eps) {
  const Input in(x);
  return forward(group_forward_of, in, weight, bias, parts(in, groups), slope, groups, eps);
}

Backward group_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const Tensor& saved, int64_t groups, double slope) {
  const Input in(x);
  return backward(group_backward_of, grad, in, weight, bias, saved, parts(in, groups), slope, groups);
}

}  // namespace operators

// An argument as torch hands it over. A tensor is this function's from then on, and so is the box of what may be None.
template <class T>
T take(Value value) {
  if constexpr (std::is_same_v<T, Tensor>) {
    return Tensor(reinterpret_cast<Handle>(value));
  } else if constexpr (std::is_same_v<T, OptionalTensor>) {
    const std::unique_ptr<Value> box(reinterpret_cast<Value*>(value));
    return OptionalTensor(box ? reinterpret_cast<Handle>(*box) : nullptr);
  } else if constexpr (std::is_same_v<T, bool>) {
    return value != 0;
  } else {
    static_assert(sizeof(T) == sizeof value);
    T number;
    std::memcpy(&number, &value, sizeof number);
    return number;
  }
}

template <std::size_t results, class... Arguments>
void call(std::array<Tensor, results> (*function)(Arguments...), Value* stack, uint64_t arguments) {
  check(arguments == sizeof...(Arguments), "an operator's schema is not that of the compiled module");
  Value* next = stack;
  const std::tuple<std::decay_t<Arguments>...> taken{take<std::decay_t<Arguments>>(*next++)...};
  for (Tensor& found : std::apply(function, taken)) *stack++ = reinterpret_cast<Value>(found.release());
}

// Arguments are on the stack, and results take their place.
template <auto function>
void boxed(Value* stack, uint64_t arguments, uint64_t) {
  call(function, stack, arguments);
}

}  // namespace

void register_operators(const std::function<uintptr_t(const char* name)>& address) {
  const auto find = [&](auto*& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address(name));
  };
  const auto constant = [&](const char* name) {
    int32_t (*of_name)();
    find(of_name, name);
    return of_name();
  };
  Failure (*open)(const char* space, const char* key, const char* file, uint32_t line, Library*);
  Failure (*implement)(Library, const char* name, Operator*, uint64_t version);
  find(open, "aoti_torch_library_init_impl");
  find(implement, "torch_library_impl");
  find(torch.delete_tensor, "aoti_torch_delete_tensor_object");
  find(torch.dim, "aoti_torch_get_dim");
  find(torch.numel, "aoti_torch_get_numel");
  find(torch.sizes, "aoti_torch_get_sizes");
  find(torch.strides, "aoti_torch_get_strides");
  find(torch.dtype, "aoti_torch_get_dtype");
  find(torch.data, "aoti_torch_get_data_ptr");
  find(torch.storage_size, "aoti_torch_get_storage_size");
  find(torch.storage_offset, "aoti_torch_get_storage_offset");
  find(torch.is_contiguous, "aoti_torch_is_contiguous");
  find(torch.empty_strided, "aoti_torch_empty_strided");
  find(torch.copy, "aoti_torch_copy_");
  torch.cpu = constant("aoti_torch_device_type_cpu");
  torch.int64 = constant("aoti_torch_dtype_int64");
  torch.types = {constant("aoti_torch_dtype_float32"), constant("aoti_torch_dtype_bfloat16"),
                 constant("aoti_torch_dtype_float16")};
  Library library;
  check(!open("normlab", "CPU", "operators.cpp", 0, &library), "torch takes no operators");
  const auto implemented = [&](const char* name, Operator* function) {
    check(!implement(library, name, function, kVersion), "torch takes no operators");
  };
  implemented("batch_forward", boxed<operators::batch_forward>);
  implemented("frozen_forward", boxed<operators::frozen_forward>);
  implemented("batch_backward", boxed<operators::batch_backward>);
  implemented("running_forward", boxed<operators::running_forward>);
  implemented("running_backward", boxed<operators::running_backward>);
  implemented("group_forward", boxed<operators::group_forward>);
  implemented("group_backward", boxed<operators::group_backward>);
}

}  // namespace normlab

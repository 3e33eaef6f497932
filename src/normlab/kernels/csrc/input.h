// The input of a norm as torch hands it over, copied if the kernels do not know its layout, and the tensors that must
// fit it. `normlab.kernels.launch.describe` is the same in Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "tensors.h"
#include "torch_interface.h"

namespace normlab {

class Input {
 public:
  explicit Input(const Tensor& x)
      : given_(x), dtype_(get(torch.dtype, x)), dim_(get(torch.dim, x)), sizes_(get(torch.sizes, x)) {
    int type = 0;
    while (type < 3 && torch.types[type] != dtype_) ++type;
    check(type < 3, "x must be float32, bfloat16 or float16");
    const int64_t values = get(torch.numel, x);
    check(dim_ > 1 && values > 0, "x must be (N, C, *space), and not empty");
    check_storage(x, "x");
    const int64_t images = sizes_[0], channels = sizes_[1], space = values / (images * channels);
    layout = {type, {images, channels, space, space == 1}};
    if (lies(x)) return;
    channels_last_ = dim_ == 4 || dim_ == 5;  // as for torch
    if (channels_last_ && lies(x)) {
      layout.shape.last = true;
    } else {
      channels_last_ = false;
      copy_ = copied(x);
    }
  }

  const void* x() const { return data(laid()); }

  Tensor empty_like() const { return empty(dim_, sizes_, get(torch.strides, laid()), dtype_); }

  // The values of a tensor like x, in the layout of x; null if there is no tensor. copy: made if one is needed; must
  // live as long as they. name: for an error.
  const void* like_x(const char* name, const Tensor& tensor, Tensor& copy) const {
    if (!tensor) return nullptr;
    copy = laid(tensor, name);
    return data(copy ? copy : tensor);
  }

  // The values of a statistic or parameter, one a channel; null if there is none. name: for an error.
  float* of_channels(const char* name, const Tensor& tensor) const {
    return values<float>(name, tensor, layout.shape.channels);
  }

  Layout layout;

 private:
  const Tensor& laid() const { return copy_ ? copy_ : given_; }

  // Dimensions in their order in memory, from the innermost, 0.
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
      fail(std::string(name) + " must have the type and the shape of x");
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

}  // namespace normlab

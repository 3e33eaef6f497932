// The sums that the backward pass of running batch norm needs: those of each channel over the batch, and those of each
// image by itself.
#pragma once

#include <cstdint>
#include <vector>

#include "passes.h"
#include "tensors.h"

namespace normlab {

// The sums of `Loops::products`. Those of each image come with those of its channels, unless images are small: then
// they are taken when they are asked for.
class Sums {
 public:
  void take(const Layout& layout, const Backward& pass, const Gates& z) {
    layout_ = layout;
    pass_ = pass;
    z_ = z;
    small_ = has_small_images(layout.shape) && z.slope == 1;
    if (small_) {
      with_type(layout.type, [&](auto* grad, auto* x) { sum_channels(grad, x); }, pass.grad, pass.x);
    } else {
      sum_segments();
      squares_.assign(shape().images, 0);
      distances_.assign(shape().images * shape().channels, 0);
      each_of_segments([&](int64_t image, int64_t c, const float* of) {
        squares_[image] += of[2];
        distances_[image * shape().channels + c] += of[3];
      });
    }
  }

  // The sums of each channel, [channel][sum], with each image of g times its factor; null for 1.
  const std::vector<double>& of_channels(const float* factor) {
    if (small_ && !factor) return of_channels_;
    if (small_ && layout_.type == 0) {
      sum_channels(multiplied(factor), static_cast<const float*>(pass_.x));
      return of_channels_;
    }
    if (small_) sum_segments();
    of_channels_.assign(shape().channels * kSums, 0);
    each_of_segments([&](int64_t image, int64_t c, const float* of) {
      const double f = factor ? factor[image] : 1;
      double* to = &of_channels_[c * kSums];
      to[0] += f * of[0];
      to[1] += f * of[1];
      to[4] += of[4];
    });
    return of_channels_;
  }

  // Σg² of each image. Null where `is_little` says that no image can have much, since all of them together have little.
  template <class IsLittle>
  const float* squares(IsLittle is_little) {
    if (small_) {
      double square = 0;
      for (int64_t c = 0; c < shape().channels; ++c) square += of_channels_[c * kSums + 2];
      if (is_little(square)) return nullptr;
      squares_.resize(shape().images);
      with_type(layout_.type, [&](auto* grad) { image_squares(shape(), grad, squares_.data()); }, pass_.grad);
    }
    return squares_.data();
  }

  // The mean over images of the squared length of the output's mean over space. parameters: γ and β.
  double output_square(const std::vector<float>& parameters) {
    const int64_t channels = shape().channels, images = shape().images;
    const float *inverse = pass_.saved + channels, *shift = parameters.data() + channels;
    thread_local std::vector<float> scale, squares;
    scale.resize(channels);
    double length = 0;
    for (int64_t c = 0; c < channels; ++c) scale[c] = inverse[c] * parameters[c] / static_cast<float>(shape().space);
    if (small_ && shape().space == 1) {
      for (int64_t c = 0; c < channels; ++c) {
        const double by = scale[c], beside = shift[c], *of = &of_channels_[c * kSums];
        length += by * (by * of[4] + 2 * beside * of[3]) + static_cast<double>(images) * beside * beside;
      }
      return length / static_cast<double>(images);
    }
    if (small_) {
      distances_.resize(images * channels);
      const auto sum = [&](auto* x) { image_distances(shape(), x, pass_.saved, distances_.data()); };
      with_type(layout_.type, sum, pass_.x);
    }
    squares.assign(channels, 0);
    for (int64_t image = 0; image < images; ++image) {
      const float* of = distances_.data() + image * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const float pooled = of[c] * scale[c] + shift[c];
        squares[c] += pooled * pooled;
      }
    }
    for (const float square : squares) length += square;
    return length / static_cast<double>(images);
  }

 private:
  const Shape& shape() const { return layout_.shape; }

  template <class T>
  void sum_channels(const T* grad, const T* x) {
    of_channels_.assign(shape().channels * kSums, 0);
    total_products(true, shape(), grad, x, pass_.saved, z_, of_channels_.data());
  }

  void sum_segments() {
    of_segments_.resize(shape().segments() * shape().channels * kSums);
    const auto sum = [&](auto* grad, auto* x) {
      products(true, shape(), grad, x, pass_.saved, z_, of_segments_.data());
    };
    with_type(layout_.type, sum, pass_.grad, pass_.x);
  }

  // Calls part(image, c, sums) for each channel of each segment.
  template <class Part>
  void each_of_segments(Part part) const {
    const int64_t per_image = shape().segments_per_image();
    const float* of = of_segments_.data();
    for (int64_t segment = 0; segment < shape().segments(); ++segment) {
      const int64_t image = segment / per_image;
      for (int64_t c = 0; c < shape().channels; ++c, of += kSums) part(image, c, of);
    }
  }

  // Each image of g times its factor.
  const float* multiplied(const float* factor) const {
    thread_local std::vector<float> found;
    const int64_t row = shape().channels * shape().space;
    found.resize(shape().images * row);
    for (int64_t image = 0; image < shape().images; ++image) {
      const float f = factor[image], *from = static_cast<const float*>(pass_.grad) + image * row;
      float* to = found.data() + image * row;
      for (int64_t i = 0; i < row; ++i) to[i] = f * from[i];
    }
    return found.data();
  }

  Layout layout_;
  Backward pass_;
  Gates z_;
  bool small_;
  std::vector<float> of_segments_;   // [segment][channel][sum]
  std::vector<double> of_channels_;  // [channel][sum]
  std::vector<float> squares_;       // Σg², [image]
  std::vector<float> distances_;     // Σd, [image][channel]
};

}  // namespace normlab

// Arithmetic on a register of values at a time. Compiled once for each instruction set: NORMLAB_WIDTH says how many
// floats its registers have.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../loops.h"

namespace normlab {
namespace {

// Two registers at a time, since each addition waits for the one before.
constexpr int kRegister = NORMLAB_WIDTH, kWidth = 2 * kRegister;

// Some compilers want a vector's type to depend on the template, as its width does.
template <int W, class T>
struct Of {
  using type = T;
};

// W values at a time, whatever their type in memory.
template <int W>
struct Register {
  typedef typename Of<W, float>::type Floats __attribute__((vector_size(4 * W)));
  typedef typename Of<W, uint32_t>::type Words __attribute__((vector_size(4 * W)));
  typedef typename Of<W, uint16_t>::type Shorts __attribute__((vector_size(2 * W)));

  static Floats load(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static Floats load(const BFloat16* from) {
    Shorts half;
    std::memcpy(&half, from, sizeof half);
    Words word = __builtin_convertvector(half, Words) << 16;
    Floats value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
  static Floats load(const Float16* from) {
    Floats value;
    for (int i = 0; i < W; ++i) value[i] = static_cast<float>(from[i]);
    return value;
  }
  static void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }
  static void store(BFloat16* to, Floats value) {
    Words word;
    std::memcpy(&word, &value, sizeof word);
    Words rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;  // to the nearest, ties to even
    Words quiet = (word >> 16) | 0x40;
    Words is_nan = reinterpret_cast<Words>(value != value);
    Shorts half = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), Shorts);
    std::memcpy(to, &half, sizeof half);
  }
  static void store(Float16* to, Floats value) {
    for (int i = 0; i < W; ++i) to[i] = static_cast<Float16>(value[i]);
  }
  static float sum(Floats value) {
    if constexpr (W == 2)
      return value[0] + value[1];
    else
      return sum(value, std::make_integer_sequence<int, W / 2>());
  }

 private:
  template <int... I>
  static float sum(Floats value, std::integer_sequence<int, I...>) {
    const auto low = __builtin_shufflevector(value, value, I...);
    const auto high = __builtin_shufflevector(value, value, (I + W / 2)...);
    return Register<W / 2>::sum(low + high);
  }
};

template <>
struct Register<1> {
  using Floats = float;

  template <class T>
  static float load(const T* from) {
    return to_float(*from);
  }
  static void store(float* to, float value) { *to = value; }
  static void store(BFloat16* to, float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    to->bits = static_cast<uint16_t>(value != value ? (word >> 16) | 0x40 : (word + 0x7fff + ((word >> 16) & 1)) >> 16);
  }
  static void store(Float16* to, float value) { *to = static_cast<Float16>(value); }
  static float sum(float value) { return value; }
};

// Two registers' values. As one vector type of that size the compiler would keep them in memory.
template <class Floats>
struct Two {
  Floats low, high;

  friend Two operator+(Two a, Two b) { return {a.low + b.low, a.high + b.high}; }
  friend Two operator-(Two a, Two b) { return {a.low - b.low, a.high - b.high}; }
  friend Two operator*(Two a, Two b) { return {a.low * b.low, a.high * b.high}; }
  friend Two operator+(Two a, float b) { return {a.low + b, a.high + b}; }
  friend Two operator-(Two a, float b) { return {a.low - b, a.high - b}; }
  friend Two operator*(Two a, float b) { return {a.low * b, a.high * b}; }
  Two& operator+=(Two other) { return *this = *this + other; }
};

template <>
struct Register<kWidth> {
  using Half = Register<kRegister>;
  using Floats = Two<Half::Floats>;

  template <class T>
  static Floats load(const T* from) {
    return {Half::load(from), Half::load(from + kRegister)};
  }
  template <class T>
  static void store(T* to, Floats value) {
    Half::store(to, value.low);
    Half::store(to + kRegister, value.high);
  }
  static float sum(Floats value) { return Half::sum(value.low + value.high); }
};

// `value` where z > 0 or is NaN, else slope·value, which is 0 for a slope of 0 even if the value is infinite. In bits:
// GCC 12 makes a wrong choice of vectors out of `?:` where half precision is stored after it.
inline float gated(float z, float value, float slope) { return z <= 0 ? (slope == 0 ? 0 : value * slope) : value; }
template <class Floats>
Floats gated(Floats z, Floats value, float slope) {
  using Words = typename Register<sizeof(Floats) / sizeof(float)>::Words;
  const Floats below = slope == 0 ? Floats{} : value * slope;
  const Words closed = reinterpret_cast<Words>(z <= Floats{});
  return reinterpret_cast<Floats>((reinterpret_cast<Words>(below) & closed) |
                                  (reinterpret_cast<Words>(value) & ~closed));
}
template <class Floats>
Two<Floats> gated(Two<Floats> z, Two<Floats> value, float slope) {
  return {gated(z.low, value.low, slope), gated(z.high, value.high, slope)};
}

float at(float value, int) { return value; }
template <class Floats>
float at(const Floats& values, int i) {
  return values[i];
}
template <class Floats>
float at(const Two<Floats>& values, int i) {
  return i < kRegister ? at(values.low, i) : at(values.high, i - kRegister);
}

// Calls part(width, i) for as many values as it can W at a time, from `i` to before n, and for those left over with
// half the width.
template <int W, class Part>
void in_steps(int64_t n, const Part& part, int64_t i = 0) {
  for (; i + W <= n; i += W) part(std::integral_constant<int, W>(), i);
  if constexpr (W > 1) in_steps<W / 2>(n, part, i);
}

template <int W>
void add_to(float* sums, typename Register<W>::Floats value) {
  Register<W>::store(sums, Register<W>::load(sums) + value);
}

}  // namespace
}  // namespace normlab

// What the loops of norms of channels are made of. A loop calls parts: a part takes as many values as it can W at a
// time and leaves the rest to the part of half the width. In the first form (see `loops.h`) these are values of a
// channel, from `i` to `end`; in the second they are channels, from `c`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace normlab {
namespace {

// Single precision sums over this many values are added up in double precision.
constexpr int64_t kBlock = 4096;

// Rows of kLongRow channels or more are gone through kRows at a time, in pieces of kPiece channels. The sums of a piece
// stay in the first-level cache. In columns, each value would lie far from the last.
constexpr int64_t kLongRow = 128, kPiece = 512;
constexpr int kRows = 4;

// `Gates` for one channel.
struct Gate {
  float scale, bias, slope;
};
inline Gate gate(const Gates& z, int64_t channel) { return {z.scale[channel], z.bias[channel], z.slope}; }

// Calls part(run, image, channel, offset) for each run.
template <class Part>
void each_run(Runs runs, Part part) {
  int64_t image = runs.first / runs.channels, c = runs.first % runs.channels;
  for (int64_t run = runs.first; run < runs.last; ++run) {
    part(run, image, c, run * runs.space);
    if (++c == runs.channels) c = 0, ++image;
  }
}

// Calls several(offset) for each kRows of n rows, and one(offset) for those left over.
template <class Several, class One>
void each_rows(int64_t n, int64_t stride, Several several, One one) {
  int64_t row = 0;
  for (; row + kRows <= n; row += kRows) several(row * stride);
  for (; row < n; ++row) one(row * stride);
}

// Calls part(c, length) for each piece of a long row: the sums of a piece stay in the first-level cache.
template <class Part>
void each_piece(int64_t channels, Part part) {
  for (int64_t c = 0; c < channels; c += kPiece) part(c, std::min(kPiece, channels - c));
}

// Copies [sum][channel] to [channel][sum].
void transpose(const std::vector<float>& from, int64_t channels, float* to) {
  const int64_t each = static_cast<int64_t>(from.size()) / channels;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t sum = 0; sum < each; ++sum) *to++ = from[sum * channels + c];
  }
}

}  // namespace
}  // namespace normlab

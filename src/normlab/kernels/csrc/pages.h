// Pages of memory that is about to be written for the first time.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace normlab {

// A tensor larger than this is likely to be memory that the system has just given and will take back: to touch each of
// its pages of 4 KiB for the first time takes longer than the arithmetic.
constexpr std::size_t kFresh = 4 << 20, kLargePage = 2 << 20;

// Asks the system for large pages in those parts of a tensor that are large pages whole. Only a hint: it has no effect
// on values, and may be refused.
inline void prefer_large_pages(void* start, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kFresh) return;
  const auto begin = (reinterpret_cast<std::uintptr_t>(start) + kLargePage - 1) / kLargePage * kLargePage;
  const auto end = (reinterpret_cast<std::uintptr_t>(start) + bytes) / kLargePage * kLargePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace normlab

// Work shared out to threads of the OpenMP runtime that torch has loaded: a second runtime would not heed
// torch.set_num_threads.
#pragma once

#include <cstdint>

namespace normlab {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;  // GOMP_parallel
  int (*max_threads)() = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;
  int (*inside)() = nullptr;
};
inline OpenMP openmp;

// With fewer values than this, a team of threads takes longer to start than the work takes.
constexpr int64_t kWorthThreads = 1 << 15;

// Calls work(begin, end) for parts of 0 … items, one a thread; `values` is the size of the whole work.
template <class Work>
void parallel_for(int64_t items, int64_t values, const Work& work) {
  if (values < kWorthThreads || items < 2 || !openmp.parallel || openmp.inside() || openmp.max_threads() < 2) {
    work(0, items);
    return;
  }
  struct Shared {
    int64_t items;
    const Work& work;
  } shared{items, work};
  auto part = [](void* data) {
    const Shared& s = *static_cast<Shared*>(data);
    const int64_t thread = openmp.thread(), threads = openmp.threads();
    s.work(s.items * thread / threads, s.items * (thread + 1) / threads);
  };
  openmp.parallel(part, &shared, 0, 0);
}

}  // namespace normlab

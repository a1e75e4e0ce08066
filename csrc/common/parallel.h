// Splits work over torch's threads. Only files compiled for the baseline instruction set include this.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace genfast {

// Whether this process came from a fork, as a DataLoader's workers do: OpenMP's threads do not survive one, and libgomp
// would wait for them for ever. Work then runs on the calling thread.
bool in_forked_process();

// Calls body(slot, begin, end) on contiguous parts of [0, count), at most `threads` of them; no two that run at the
// same time have the same slot, a number below `threads`.
template <typename Body>
void parallel_slots(int64_t count, int threads, const Body& body) {
  if (count <= 0) return;
  const int64_t parts = threads < count ? threads : count;
#if defined(_OPENMP)
  if (parts > 1 && !omp_in_parallel() && !in_forked_process()) {
#pragma omp parallel num_threads(static_cast<int>(parts))
    {
      const int64_t team = omp_get_num_threads();
      const int64_t part = omp_get_thread_num();
      const int64_t begin = count * part / team;
      const int64_t end = count * (part + 1) / team;
      if (begin < end) body(part, begin, end);
    }
    return;
  }
#endif
  body(static_cast<int64_t>(0), static_cast<int64_t>(0), count);
}

// The same without the slot.
template <typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  parallel_slots(count, threads, [&](int64_t, int64_t begin, int64_t end) { body(begin, end); });
}

}  // namespace genfast

// Fresh output memory, and memory for intermediate results.
#pragma once

#include <cstdint>

namespace genfast {

// Asks for huge pages under an output of at least 4 MiB before its first touch: a page fault for every 4 KiB is most of
// the time of a large elementwise op otherwise (64 MiB: 16-20 ms, 4.5 with huge pages).
void advise_huge_pages(void* memory, int64_t bytes);

// Memory for one call, floats aligned to cache lines. The last one that was returned is kept for the next call (up to
// kKeptBytes), because the page faults of fresh memory would cost more than a small product.
class Workspace {
 public:
  explicit Workspace(int64_t floats);  // throws std::bad_alloc
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // The next `floats` of it; whole cache lines are used up.
  float* take(int64_t floats);

 private:
  static constexpr int64_t kKeptBytes = int64_t{64} << 20;
  char* memory_;
  int64_t bytes_, used_ = 0;
};

}  // namespace genfast

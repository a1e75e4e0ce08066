#include "common/memory.h"

#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace genfast {
namespace {

constexpr int64_t kLine = 64;

struct Kept {
  std::mutex mutex;
  char* memory = nullptr;
  int64_t bytes = 0;
};

Kept& kept() {
  static Kept* const one = new Kept;  // never destroyed: a thread may outlive static objects
  return *one;
}

}  // namespace

Workspace::Workspace(int64_t floats) : memory_(nullptr) {
  // Every take() may use up one line more than it asks for.
  bytes_ = (floats * static_cast<int64_t>(sizeof(float)) + 65 * kLine) / kLine * kLine;
  {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    if (kept().bytes >= bytes_) {
      memory_ = kept().memory;
      bytes_ = kept().bytes;
      kept().memory = nullptr;
      kept().bytes = 0;
    }
  }
  if (memory_ != nullptr) return;
  memory_ = static_cast<char*>(std::aligned_alloc(kLine, static_cast<size_t>(bytes_)));
  if (memory_ == nullptr) throw std::bad_alloc();
  advise_huge_pages(memory_, bytes_);
}

Workspace::~Workspace() {
  if (bytes_ <= kKeptBytes) {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    if (kept().bytes < bytes_) {
      char* const old = kept().memory;
      kept().memory = memory_;
      kept().bytes = bytes_;
      memory_ = old;
    }
  }
  std::free(memory_);
}

float* Workspace::take(int64_t floats) {
  float* const out = reinterpret_cast<float*>(memory_ + used_);
  used_ += (floats * static_cast<int64_t>(sizeof(float)) + kLine - 1) / kLine * kLine;
  if (used_ > bytes_) throw std::bad_alloc();
  return out;
}

void advise_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  if (memory == nullptr || bytes < (int64_t{1} << 22)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failure is no error
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace genfast

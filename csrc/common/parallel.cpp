#include "common/parallel.h"

#include <atomic>

namespace genfast {
namespace {

std::atomic<bool> ran_parallel{false};
std::atomic<bool> forked{false};

void after_fork_in_child() {
  if (ran_parallel.load()) forked.store(true);
}

}  // namespace

bool forked_after_parallel() { return forked.load(std::memory_order_relaxed); }

void note_parallel() {
  if (!ran_parallel.load(std::memory_order_relaxed)) {
    static const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);
    (void)registered;
    ran_parallel.store(true);
  }
}

}  // namespace genfast

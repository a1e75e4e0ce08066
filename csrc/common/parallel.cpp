#include "common/parallel.h"

#include <pthread.h>

#include <atomic>

namespace genfast {
namespace {

std::atomic<bool> forked{false};

void after_fork_in_child() { forked.store(true); }

// Registered when the library is loaded: whoever forks later may have run threads of the same OpenMP, torch included.
const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);

}  // namespace

bool in_forked_process() { return registered == 0 && forked.load(std::memory_order_relaxed); }

}  // namespace genfast

#include "common/threads.h"

#include <omp.h>
#include <pthread.h>

namespace dyncore {

namespace {
// What one thread of a current server does; only the order of magnitude matters.
constexpr double kFlopsPerSecond = 100e9;
constexpr double kBytesPerSecond = 15e9;
constexpr double kWorthWaking = 50e-6;  // a sleeping worker takes about 60 us to start, a spinning one about 1 us

// A forked child has the calling thread alone, while the OpenMP runtime (GNU's) still waits there for its old workers:
// the first region would never end. So a child works on one thread.
bool forked = false;
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });
}  // namespace

void Team::barrier() const {
  if (size > 1) {
#pragma omp barrier
  }
}

void parallel(int threads, void (*body)(void* context, const Team& team), void* context) {
  if (threads <= 1 || forked) {
    body(context, Team{0, 1});
    return;
  }
#pragma omp parallel num_threads(threads)
  body(context, Team{omp_get_thread_num(), omp_get_num_threads()});
}

int useful_threads(int requested, double flops, double bytes) {
  if (forked) return 1;
  const double compute = flops / kFlopsPerSecond;
  const double memory = bytes / kBytesPerSecond;
  return (compute > memory ? compute : memory) < kWorthWaking ? 1 : requested;
}

}  // namespace dyncore

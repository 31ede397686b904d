// Stands in for csrc/common/threads.cpp in the sanitizers' builds: plain threads and a barrier of a mutex, which
// ThreadSanitizer understands, as it does not the OpenMP runtime; and the smallest work is shared out.
#include "common/threads.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace dyncore {

namespace {

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int round = round_;
    if (++waiting_ == size_) {
      waiting_ = 0;
      ++round_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  const int size_;
  int waiting_ = 0, round_ = 0;
  std::mutex mutex_;
  std::condition_variable all_here_;
};

thread_local Barrier* barrier_of_region = nullptr;

}  // namespace

void Team::barrier() const {
  if (size > 1) barrier_of_region->wait();
}

void parallel(int threads, void (*body)(void* context, const Team& team), void* context) {
  if (threads <= 1) {
    body(context, Team{0, 1});
    return;
  }
  Barrier barrier(threads);
  const auto run = [&](int index) {
    barrier_of_region = &barrier;
    body(context, Team{index, threads});
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& other : others) other.join();
}

int useful_threads(int requested, double, double) {
  return requested;
}

}  // namespace dyncore

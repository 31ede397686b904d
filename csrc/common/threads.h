// Threads: one OpenMP region per op, with barriers between its stages. The only file that knows OpenMP.
#pragma once
#include <cstdint>

namespace dyncore {

// One thread's place in a parallel region.
struct Team {
  int index;
  int size;
  void barrier() const;
};

// Runs body(context, team) on `threads` threads; on the calling thread alone when threads <= 1.
void parallel(int threads, void (*body)(void* context, const Team& team), void* context);

// How many threads work of this size deserves: one below about 50 us, where waking the others costs more than it saves.
int useful_threads(int requested, double flops, double bytes);

// Hands out 0, 1, 2, ... to whichever thread asks next.
struct Counter {
  int64_t value = 0;
  int64_t next() { return __atomic_fetch_add(&value, 1, __ATOMIC_RELAXED); }
};

}  // namespace dyncore

// Threads: one OpenMP region per op, with barriers between its stages. The only file that knows OpenMP.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dyncore {

// One thread's place in a parallel region.
struct Team {
  int index;
  int size;
  void barrier() const;
};

// Runs body(context, team) on `threads` threads; on the calling thread alone when threads <= 1 or in a forked process.
void parallel(int threads, void (*body)(void* context, const Team& team), void* context);

// How many threads work of this size deserves: one below about 50 us, where waking the others costs more than it saves.
int useful_threads(int requested, double flops, double bytes);

// Hands out 0, 1, 2, ... to whichever thread asks next.
struct Counter {
  int64_t value = 0;
  int64_t next() { return __atomic_fetch_add(&value, 1, __ATOMIC_RELAXED); }
};

// Hands out 0 ... count-1 so that a thread first takes a range of its own in ascending order, which makes its reads of
// memory one stream that can be fetched ahead, and then helps the others with theirs.
class Items {
 public:
  static Items plan(int ranges) {
    Items items;
    items.count_ = ranges;
    return items;
  }
  size_t bytes() const { return count_ * sizeof(Range); }
  void place(void* at) { ranges_ = static_cast<Range*>(at); }

  // Shares `items` items out, while nobody takes any: each thread of the team sets its part of the ranges, or one all.
  void share(int64_t items, const Team& team = {0, 1});

  struct Item {
    int64_t index;
    bool continues;  // the item after it is expected to be this thread's too
    explicit operator bool() const { return index >= 0; }
  };

  // An item that nobody had yet; false when there is none.
  Item take(const Team& team);

 private:
  struct Range {
    int64_t next, end;
    char apart[48];  // a cache line each
  };
  int count_ = 0;
  Range* ranges_ = nullptr;
};

}  // namespace dyncore

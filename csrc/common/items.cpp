#include "common/threads.h"

namespace dyncore {

// Not in the header: instruction sets would share one inlined copy (csrc/cpu/check_symbols.cmake).
void Items::share(int64_t items, const Team& team) {
  for (int i = team.index; i < count_; i += team.size) ranges_[i] = {items * i / count_, items * (i + 1) / count_, {}};
}

Items::Item Items::take(const Team& team) {
  for (int i = 0; i < count_; ++i) {
    Range& range = ranges_[(team.index + i) % count_];
    const int64_t index = __atomic_fetch_add(&range.next, 1, __ATOMIC_RELAXED);
    if (index < range.end) return {index, i == 0 && index + 1 < range.end};
  }
  return {-1, false};
}

}  // namespace dyncore

// A plan that a test makes, and the slots it should come to.
#pragma once
#include <algorithm>
#include <vector>

#include "tests/numbers.h"

namespace dyncore::tests {

// Sorted as slots are.
struct Slot {
  int64_t group, row, source;
  bool operator<(const Slot& other) const {
    return group != other.group ? group < other.group : row != other.row ? row < other.row : source < other.source;
  }
};

struct MadePlan {
  Buffer<int32_t> rows, offsets, row_offsets, row_slots;
  PlanBuffers buffers;

  MadePlan(int64_t capacity, int64_t groups, int64_t num_rows)
      : rows(capacity), offsets(groups + 1), row_offsets(num_rows + 1), row_slots(capacity) {
    buffers = {rows.data(), offsets.data(), row_offsets.data(), row_slots.data(), capacity, groups, num_rows};
  }

  // Those past the capacity are dropped.
  void expect_slots(std::vector<Slot> slots) const {
    std::sort(slots.begin(), slots.end());
    if (static_cast<int64_t>(slots.size()) > buffers.capacity) slots.resize(static_cast<size_t>(buffers.capacity));
    const int64_t live = static_cast<int64_t>(slots.size());
    std::vector<int64_t> counts(static_cast<size_t>(buffers.groups), 0);
    std::vector<std::vector<int64_t>> slots_of(static_cast<size_t>(buffers.num_rows));
    bool good = offsets[0] == 0 && offsets[buffers.groups] == live;
    for (int64_t a = 0; a < buffers.capacity; ++a) {
      good = good && rows[a] == (a < live ? slots[static_cast<size_t>(a)].row : 0);
      if (a >= live) continue;
      ++counts[static_cast<size_t>(slots[static_cast<size_t>(a)].group)];
      slots_of[static_cast<size_t>(slots[static_cast<size_t>(a)].row)].push_back(a);
    }
    for (int64_t g = 0; g < buffers.groups; ++g)
      good = good && offsets[g + 1] - offsets[g] == counts[static_cast<size_t>(g)];
    int64_t next = 0;
    for (int64_t t = 0; t < buffers.num_rows; ++t) {
      good = good && row_offsets[t] == next;
      for (int64_t a : slots_of[static_cast<size_t>(t)]) good = good && row_slots[next++] == a;
    }
    for (; next < buffers.capacity; ++next) good = good && row_slots[next] == 0;
    expect(good && row_offsets[buffers.num_rows] == live, "slots");
  }
};

}  // namespace dyncore::tests

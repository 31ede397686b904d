#include "cpu/attention_order.h"

#include <algorithm>
#include <numeric>

namespace dyncore {

namespace {

// Indices of those that are live, then of the others.
int32_t partition(int64_t count, const uint8_t* live, int32_t* indices) {
  if (!live) {
    std::iota(indices, indices + count, 0);
    return static_cast<int32_t>(count);
  }
  int32_t first = 0;
  for (int64_t i = 0; i < count; ++i)
    if (live[i]) indices[first++] = static_cast<int32_t>(i);
  int32_t next = first;
  for (int64_t i = 0; i < count; ++i)
    if (!live[i]) indices[next++] = static_cast<int32_t>(i);
  return first;
}

// The position of index i is i where none are given.
struct Places {
  const int32_t* at;
  int32_t operator[](int32_t i) const { return at ? at[i] : i; }
};

void sort_by(const Places& places, int32_t* indices, int32_t count) {
  const auto before = [&](int32_t a, int32_t b) { return places[a] < places[b]; };
  if (!std::is_sorted(indices, indices + count, before)) std::stable_sort(indices, indices + count, before);
}

}  // namespace

AttentionLists::AttentionLists(const AttentionMarks& m)
    : keys_(m.batch * m.keys),
      key_counts_(m.batch),
      queries_(m.batch * m.queries),
      query_counts_(m.batch),
      limits_(m.batch * m.queries) {
  for (int64_t b = 0; b < m.batch; ++b) {
    int32_t *keys = keys_.data() + b * m.keys, *queries = queries_.data() + b * m.queries;
    int32_t* limits = limits_.data() + b * m.queries;
    const int32_t live = partition(m.keys, m.k_live ? m.k_live + b * m.keys : nullptr, keys);
    int32_t attending = partition(m.queries, m.q_live ? m.q_live + b * m.queries : nullptr, queries);
    if (m.causal) {
      const Places q{m.q_positions ? m.q_positions + b * m.q_positions_stride : nullptr};
      const Places k{m.k_positions ? m.k_positions + b * m.k_positions_stride : nullptr};
      sort_by(k, keys, live);
      sort_by(q, queries, attending);
      int32_t limit = 0;
      for (int32_t i = 0; i < attending; ++i) {
        while (limit < live && k[keys[limit]] <= q[queries[i]]) ++limit;
        limits[i] = limit;
      }
      // Those that attend to most keys come first, so that threads end together.
      std::reverse(queries, queries + attending);
      std::reverse(limits, limits + attending);
    } else {
      std::fill(limits, limits + attending, live);
    }
    while (attending > 0 && limits[attending - 1] == 0) --attending;
    std::fill(limits + attending, limits + m.queries, 0);
    key_counts_[b] = live;
    query_counts_[b] = attending;
  }
}

}  // namespace dyncore

#include "cpu/plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace dyncore {

namespace {

using std::to_string;

void check_offsets(const int32_t* offsets, int64_t groups, int64_t capacity) {
  bool rising = offsets[0] == 0;
  for (int64_t g = 0; g < groups; ++g) rising = rising && offsets[g] <= offsets[g + 1];
  if (rising && offsets[groups] <= capacity) return;
  std::string got;
  for (int64_t g = 0; g <= groups && g < 16; ++g) got += (g ? ", " : "") + to_string(offsets[g]);
  throw std::invalid_argument("plan.offsets: expected non-decreasing offsets from 0 to at most " + to_string(capacity) +
                              " slots, got [" + got + (groups > 15 ? ", ...]" : "]"));
}

// Throws unless min and max of values[0:count] lie in [0, limit).
void check_range(const char* name, const char* what, const int32_t* values, int64_t count, int64_t limit) {
  if (count == 0) return;
  int32_t low = values[0], high = values[0];
  for (int64_t i = 1; i < count; ++i) {
    low = std::min(low, values[i]);
    high = std::max(high, values[i]);
  }
  if (low < 0 || high >= limit)
    throw std::out_of_range(std::string(name) + ": expected " + what + " in [0, " + to_string(limit) +
                            "), got values from " + to_string(low) + " to " + to_string(high));
}

// Turns counts in plan.row_offsets[1:] into offsets, then lists each row's slots in ascending order.
void invert(const PlanBuffers& plan, int64_t live) {
  std::fill(plan.row_offsets, plan.row_offsets + plan.num_rows + 1, 0);
  for (int64_t a = 0; a < live; ++a) ++plan.row_offsets[plan.rows[a] + 1];
  for (int64_t t = 0; t < plan.num_rows; ++t) plan.row_offsets[t + 1] += plan.row_offsets[t];
  std::vector<int32_t> next(plan.row_offsets, plan.row_offsets + plan.num_rows);
  for (int64_t a = 0; a < live; ++a) plan.row_slots[next[plan.rows[a]]++] = static_cast<int32_t>(a);
  std::fill(plan.row_slots + live, plan.row_slots + plan.capacity, 0);
}

// Turns counts in offsets[1:] into offsets that stop at the capacity; returns the first slot of each group.
std::vector<int64_t> place_groups(const PlanBuffers& plan, const std::vector<int64_t>& counts) {
  std::vector<int64_t> first(plan.groups);
  int64_t total = 0;
  plan.offsets[0] = 0;
  for (int64_t g = 0; g < plan.groups; ++g) {
    first[g] = total;
    total += counts[g];
    plan.offsets[g + 1] = static_cast<int32_t>(std::min(total, plan.capacity));
  }
  return first;
}

template <class Index>
int64_t count_routed(const Index* expert, int64_t size, int64_t num_groups) {
  int64_t live = 0;
  for (int64_t i = 0; i < size; ++i) {
    live += expert[i] >= 0;
    if (expert[i] >= num_groups)
      throw std::out_of_range("expert: expected indices below num_groups=" + to_string(num_groups) + ", got " +
                              to_string(*std::max_element(expert, expert + size)));
  }
  return live;
}

template <class Index>
void route(const Index* expert, int64_t k, int32_t* sources, const PlanBuffers& plan) {
  const int64_t size = plan.num_rows * k;
  count_routed(expert, size, plan.groups);
  std::vector<int64_t> counts(plan.groups, 0);
  for (int64_t i = 0; i < size; ++i)
    if (expert[i] >= 0) ++counts[expert[i]];
  std::vector<int64_t> next = place_groups(plan, counts);
  int64_t i = 0;
  for (int64_t t = 0; t < plan.num_rows; ++t) {
    for (int64_t j = 0; j < k; ++j, ++i) {
      if (expert[i] < 0) continue;
      const int64_t a = next[expert[i]]++;
      if (a >= plan.capacity) continue;
      plan.rows[a] = static_cast<int32_t>(t);
      sources[a] = static_cast<int32_t>(i);
    }
  }
  const int64_t live = plan.offsets[plan.groups];
  std::fill(plan.rows + live, plan.rows + plan.capacity, 0);
  std::fill(sources + live, sources + plan.capacity, 0);
  invert(plan, live);
}

// Scores as unsigned integers of the same order, NaN above everything and the two zeros equal.
uint32_t ordered(float x) {
  if (std::isnan(x)) return ~uint32_t{0};
  const float plain = x == 0 ? 0.0f : x;
  uint32_t bits;
  std::memcpy(&bits, &plain, 4);
  return bits >> 31 ? ~bits : bits | uint32_t{1} << 31;
}

uint64_t ordered(double x) {
  if (std::isnan(x)) return ~uint64_t{0};
  const double plain = x == 0 ? 0.0 : x;
  uint64_t bits;
  std::memcpy(&bits, &plain, 8);
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}

template <class Score>
void topk(const Score* scores, int64_t batch, int64_t sequence, int64_t k, const PlanBuffers& plan) {
  using Key = decltype(ordered(Score{}));
  std::vector<std::pair<Key, int32_t>> ranked(sequence);
  std::vector<int32_t> best(k);
  const auto higher = [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  };
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t s = 0; s < sequence; ++s) ranked[s] = {ordered(scores[b * sequence + s]), static_cast<int32_t>(s)};
    if (k < sequence) std::nth_element(ranked.begin(), ranked.begin() + k, ranked.end(), higher);
    for (int64_t j = 0; j < k; ++j) best[j] = ranked[j].second;
    std::sort(best.begin(), best.end());
    for (int64_t j = 0; j < k; ++j) plan.rows[b * k + j] = static_cast<int32_t>(b * sequence + best[j]);
  }
  plan.offsets[0] = 0;
  plan.offsets[1] = static_cast<int32_t>(batch * k);
  invert(plan, batch * k);
}

}  // namespace

void check_plan(const Plan& plan, int64_t row_limit, bool uses_inverse) {
  check_offsets(plan.offsets, plan.groups, plan.capacity);
  const int64_t live = plan.live();
  check_range("plan.rows", "rows", plan.rows, live, row_limit);
  if (!uses_inverse) return;
  bool rising = plan.row_offsets[0] == 0;
  for (int64_t t = 0; t < plan.num_rows; ++t) rising = rising && plan.row_offsets[t] <= plan.row_offsets[t + 1];
  if (!rising || plan.row_offsets[plan.num_rows] != live)
    throw std::invalid_argument("plan.row_offsets: expected non-decreasing offsets from 0 to the " + to_string(live) +
                                " live slots, got an end of " + to_string(plan.row_offsets[plan.num_rows]));
  check_range("plan.row_slots", "slots", plan.row_slots, live, live);
}

int64_t count_mask(const uint8_t* mask, int64_t size) {
  int64_t live = 0;
  for (int64_t i = 0; i < size; ++i) live += mask[i] != 0;
  return live;
}

int64_t count_route(const void* expert, bool wide, int64_t size, int64_t num_groups) {
  return wide ? count_routed(static_cast<const int64_t*>(expert), size, num_groups)
              : count_routed(static_cast<const int32_t*>(expert), size, num_groups);
}

void plan_mask(const uint8_t* mask, const PlanBuffers& plan) {
  const int64_t groups = plan.groups;
  std::vector<int64_t> counts(groups, 0);
  for (int64_t t = 0; t < plan.num_rows; ++t)
    for (int64_t g = 0; g < groups; ++g) counts[g] += mask[t * groups + g] != 0;
  int64_t live = 0;
  for (int64_t count : counts) live += count;
  if (live > plan.capacity)
    throw std::invalid_argument("max_slots: the mask has " + to_string(live) + " slots, more than the capacity of " +
                                to_string(plan.capacity));
  std::vector<int64_t> next = place_groups(plan, counts);
  // Ascending groups within a row are ascending slots, so the inverse map is written on the way.
  int32_t written = 0;
  for (int64_t t = 0; t < plan.num_rows; ++t) {
    plan.row_offsets[t] = written;
    for (int64_t g = 0; g < groups; ++g) {
      if (mask[t * groups + g] == 0) continue;
      const int64_t a = next[g]++;
      plan.rows[a] = static_cast<int32_t>(t);
      plan.row_slots[written++] = static_cast<int32_t>(a);
    }
  }
  plan.row_offsets[plan.num_rows] = written;
  std::fill(plan.rows + live, plan.rows + plan.capacity, 0);
  std::fill(plan.row_slots + live, plan.row_slots + plan.capacity, 0);
}

void plan_route(const void* expert, bool wide, int64_t k, int32_t* sources, const PlanBuffers& plan) {
  if (wide) {
    route(static_cast<const int64_t*>(expert), k, sources, plan);
  } else {
    route(static_cast<const int32_t*>(expert), k, sources, plan);
  }
}

void plan_topk(const void* scores, bool wide, int64_t batch, int64_t sequence, int64_t k, const PlanBuffers& plan) {
  if (wide) {
    topk(static_cast<const double*>(scores), batch, sequence, k, plan);
  } else {
    topk(static_cast<const float*>(scores), batch, sequence, k, plan);
  }
}

void plan_inverse(const PlanBuffers& plan) {
  invert(plan, plan.offsets[plan.groups]);
}

}  // namespace dyncore

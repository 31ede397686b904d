// Making plans and checking them: passes over bytes and integers, written so that a compiler's baseline vectorises
// them.
#include "cpu/plan.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
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

// Throws unless values[0:count] lie in [0, limit). The sign bit of v | (limit-1 - v) is set for every other v; one that
// is ored together over all values is tested once, in a loop that any compiler vectorises.
void check_range(const char* name, const char* what, const int32_t* values, int64_t count, int64_t limit) {
  const uint32_t last = static_cast<uint32_t>(limit - 1);
  uint32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t v = static_cast<uint32_t>(values[i]);
    bits |= v | (last - v);
  }
  if (bits >> 31 == 0 || count == 0) return;
  const auto [low, high] = std::minmax_element(values, values + count);
  throw std::out_of_range(std::string(name) + ": expected " + what + " in [0, " + to_string(limit) +
                          "), got values from " + to_string(*low) + " to " + to_string(*high));
}

void check_row_offsets(const int32_t* row_offsets, int64_t num_rows, int64_t live) {
  // Values in [0, live] first, as above: then no difference of two overflows.
  uint32_t bits = static_cast<uint32_t>(row_offsets[0]) | static_cast<uint32_t>(-row_offsets[0]);
  for (int64_t t = 0; t < num_rows; ++t) {
    const uint32_t from = static_cast<uint32_t>(row_offsets[t]), to = static_cast<uint32_t>(row_offsets[t + 1]);
    bits |= to | (static_cast<uint32_t>(live) - to) | (to - from);
  }
  if (bits >> 31 == 0 && row_offsets[0] == 0 && row_offsets[num_rows] == live) return;
  throw std::invalid_argument("plan.row_offsets: expected non-decreasing offsets from 0 to the " + to_string(live) +
                              " live slots, got an end of " + to_string(row_offsets[num_rows]));
}

void fill_zero(int32_t* from, int32_t* end) {
  std::fill(from, end, 0);
}

// Lists each row's slots in ascending order. row_offsets come finished, serve as cursors and are put back.
void list_slots(const PlanBuffers& plan, int64_t live) {
  for (int64_t a = 0; a < live; ++a) plan.row_slots[plan.row_offsets[plan.rows[a]]++] = static_cast<int32_t>(a);
  std::memmove(plan.row_offsets + 1, plan.row_offsets, plan.num_rows * sizeof(int32_t));
  plan.row_offsets[0] = 0;
  fill_zero(plan.row_slots + live, plan.row_slots + plan.capacity);
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

// How many of 8 bytes are not 0.
inline int64_t count_bytes(const uint8_t* bytes) {
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7f, kOnes = 0x0101010101010101;
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  const uint64_t set = (((word & kLow) + kLow) | word) & ~kLow;  // the top bit of every byte that is not 0
  return static_cast<int64_t>(((set >> 7) * kOnes) >> 56);
}

inline bool any_byte(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  return word != 0;
}

// One group: slots are the rows themselves in order, and slot a is the a-th.
void mask_of_rows(const uint8_t* mask, int64_t live, const PlanBuffers& plan) {
  int32_t written = 0;
  int64_t t = 0;
  for (; written < live; ++t) {  // without branches on the mask: the next selected row overwrites this one
    plan.row_offsets[t] = written;
    plan.rows[written] = static_cast<int32_t>(t);
    written += mask[t] != 0;
  }
  std::fill(plan.row_offsets + t, plan.row_offsets + plan.num_rows + 1, written);
  for (int64_t a = 0; a < live; ++a) plan.row_slots[a] = static_cast<int32_t>(a);
  plan.offsets[0] = 0;
  plan.offsets[1] = written;
}

// Several groups: row_slots first hold the group of each slot by rows, then its place.
void mask_of_pairs(const uint8_t* mask, int32_t* sources, const PlanBuffers& plan) {
  const int64_t groups = plan.groups;
  int64_t written = 0;
  for (int64_t t = 0; t < plan.num_rows; ++t) {
    plan.row_offsets[t] = static_cast<int32_t>(written);
    const uint8_t* row = mask + t * groups;
    int64_t g = 0;
    while (g < groups) {
      if (groups - g >= 8 && !any_byte(row + g)) {
        g += 8;
        continue;
      }
      const int64_t end = std::min(g + 8, groups);
      if (written + 8 <= plan.capacity) {
        for (; g < end; ++g) {
          plan.row_slots[written] = static_cast<int32_t>(g);
          written += row[g] != 0;
        }
      } else {
        for (; g < end; ++g)
          if (row[g] != 0) plan.row_slots[written++] = static_cast<int32_t>(g);
      }
    }
  }
  plan.row_offsets[plan.num_rows] = static_cast<int32_t>(written);
  std::vector<int64_t> counts(groups, 0);
  for (int64_t i = 0; i < written; ++i) ++counts[plan.row_slots[i]];
  std::vector<int64_t> next = place_groups(plan, counts);
  // Ascending groups within a row are ascending slots.
  for (int64_t t = 0; t < plan.num_rows; ++t) {
    for (int64_t i = plan.row_offsets[t]; i < plan.row_offsets[t + 1]; ++i) {
      const int32_t g = plan.row_slots[i];
      const int64_t a = next[g]++;
      plan.rows[a] = static_cast<int32_t>(t);
      if (sources) sources[a] = static_cast<int32_t>(t * groups + g);
      plan.row_slots[i] = static_cast<int32_t>(a);
    }
  }
}

template <class Index>
int64_t count_routed(const Index* expert, int64_t size, int64_t num_groups) {
  using Bits = std::make_unsigned_t<Index>;
  constexpr int kSign = 8 * sizeof(Index) - 1;
  const Bits last = static_cast<Bits>(std::min<int64_t>(num_groups - 1, std::numeric_limits<Index>::max()));
  Bits beyond = 0, nowhere = 0;  // sign bits: of last - e where e is not negative, and how many e are
  for (int64_t i = 0; i < size; ++i) {
    const Bits e = static_cast<Bits>(expert[i]);
    beyond |= (last - e) & ~e;
    nowhere += e >> kSign;
  }
  if (beyond >> kSign)
    throw std::out_of_range("expert: expected indices below num_groups=" + to_string(num_groups) + ", got " +
                            to_string(*std::max_element(expert, expert + size)));
  return size - static_cast<int64_t>(nowhere);
}

template <class Index>
void route(const Index* expert, int64_t k, int32_t* sources, const PlanBuffers& plan) {
  const int64_t size = plan.num_rows * k;
  count_routed(expert, size, plan.groups);
  std::vector<int64_t> counts(plan.groups + 1, 0);  // the first is that of nowhere
  for (int64_t i = 0; i < size; ++i) ++counts[expert[i] < 0 ? 0 : expert[i] + 1];
  counts.erase(counts.begin());
  std::vector<int64_t> next = place_groups(plan, counts);
  int64_t i = 0;
  int32_t written = 0;
  for (int64_t t = 0; t < plan.num_rows; ++t) {
    plan.row_offsets[t] = written;
    for (int64_t j = 0; j < k; ++j, ++i) {
      if (expert[i] < 0) continue;
      const int64_t a = next[expert[i]]++;
      if (a >= plan.capacity) continue;
      plan.rows[a] = static_cast<int32_t>(t);
      sources[a] = static_cast<int32_t>(i);
      ++written;
    }
  }
  plan.row_offsets[plan.num_rows] = written;
  fill_zero(plan.rows + written, plan.rows + plan.capacity);
  fill_zero(sources + written, sources + plan.capacity);
  list_slots(plan, written);
}

// Scores as integers of the same order, NaN above everything and the two zeros equal.
int32_t ordered(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  constexpr int32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
  const int32_t magnitude = bits & kMagnitude;
  const int32_t key = magnitude == 0 ? 0 : bits ^ ((bits >> 31) & kMagnitude);
  return magnitude > kInfinity ? kMagnitude : key;
}

int64_t ordered(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, 8);
  constexpr int64_t kMagnitude = 0x7fffffffffffffff, kInfinity = 0x7ff0000000000000;
  const int64_t magnitude = bits & kMagnitude;
  const int64_t key = magnitude == 0 ? 0 : bits ^ ((bits >> 63) & kMagnitude);
  return magnitude > kInfinity ? kMagnitude : key;
}

template <class Key>
int64_t count_above(const std::vector<Key>& keys, Key bound) {
  int64_t count = 0;
  constexpr size_t kBlock = 1 << 16;  // counted in the width of a key, so that lanes need not be widened
  for (size_t from = 0; from < keys.size(); from += kBlock) {
    const size_t end = std::min(from + kBlock, keys.size());
    Key above = 0;
    for (size_t i = from; i < end; ++i) above += keys[i] > bound;
    count += above;
  }
  return count;
}

// A bound with at most k keys above it and at least k not below: those above and the first of those equal are the k
// best. Bisection: a pass counts 4 keys a cycle, and most bounds between two scores will do, so about 15 passes; with
// a partial sort of (key, index) pairs making a plan took 1.5 to 2 times as long.
template <class Key>
Key bound_of_best(const std::vector<Key>& keys, int64_t k) {
  Key below = std::numeric_limits<Key>::min(), bound = std::numeric_limits<Key>::max();  // no key is the least
  if (k == static_cast<int64_t>(keys.size())) return below;
  while (k > 0 && bound - 1 > below) {
    const Key middle = (below & bound) + ((below ^ bound) >> 1);  // their mean, without overflow
    const int64_t above = count_above(keys, middle);
    if (above == k) return middle;
    (above > k ? below : bound) = middle;
  }
  return bound;
}

template <class Score>
void topk(const Score* scores, int64_t batch, int64_t sequence, int64_t k, const PlanBuffers& plan) {
  using Key = decltype(ordered(Score{}));
  std::vector<Key> keys(sequence);
  int64_t written = 0;
  for (int64_t b = 0; b < batch && sequence > 0; ++b) {
    for (int64_t s = 0; s < sequence; ++s) keys[s] = ordered(scores[b * sequence + s]);
    const Key bound = bound_of_best(keys, k);
    int64_t ties = k - count_above(keys, bound);
    const int64_t end = written + k;
    int32_t* const row_offsets = plan.row_offsets + b * sequence;
    const auto choose = [&](auto chosen) {
      int64_t s = 0;
      for (; written < end; ++s) {  // without branches on the scores: the next chosen row overwrites this one
        row_offsets[s] = static_cast<int32_t>(written);
        plan.rows[written] = static_cast<int32_t>(b * sequence + s);
        written += chosen(keys[s]);
      }
      std::fill(row_offsets + s, row_offsets + sequence, static_cast<int32_t>(written));
    };
    if (ties == 0) {
      choose([&](Key key) { return key > bound; });
    } else {
      choose([&](Key key) {
        const bool tie = (key == bound) & (ties > 0);
        ties -= tie;
        return (key > bound) | tie;
      });
    }
  }
  plan.row_offsets[plan.num_rows] = static_cast<int32_t>(written);
  plan.offsets[0] = 0;
  plan.offsets[1] = static_cast<int32_t>(written);
  for (int64_t a = 0; a < written; ++a) plan.row_slots[a] = static_cast<int32_t>(a);
}

// Every slot stands once, in ascending order, in the list of its row: else some row would not be written, another
// twice.
void check_inverse(const Plan& plan) {
  bool agree = true;
  for (int64_t t = 0; t < plan.num_rows; ++t) {
    int32_t last = -1;
    for (int64_t s = plan.row_offsets[t]; s < plan.row_offsets[t + 1]; ++s) {
      const int32_t slot = plan.row_slots[s];
      agree &= plan.rows[slot] == t && slot > last;
      last = slot;
    }
  }
  if (!agree)
    throw std::invalid_argument("plan.row_slots: expected the slots of each row in plan.rows, ascending, got others");
}

}  // namespace

void check_plan(const Plan& plan, int64_t row_limit, bool uses_inverse) {
  check_offsets(plan.offsets, plan.groups, plan.capacity);
  const int64_t live = plan.live();
  // More rows than an int32 counts have no plan, and the last int32 stands for all that it cannot hold.
  check_range("plan.rows", "rows", plan.rows, live, std::min<int64_t>(row_limit, std::numeric_limits<int32_t>::max()));
  if (!uses_inverse) return;
  check_row_offsets(plan.row_offsets, plan.num_rows, live);
  check_range("plan.row_slots", "slots", plan.row_slots, live, live);
  check_inverse(plan);
}

int64_t count_mask(const uint8_t* mask, int64_t size) {
  int64_t live = 0, i = 0;
  for (; i + 8 <= size; i += 8) live += count_bytes(mask + i);
  for (; i < size; ++i) live += mask[i] != 0;
  return live;
}

int64_t count_route(const void* expert, bool wide, int64_t size, int64_t num_groups) {
  return wide ? count_routed(static_cast<const int64_t*>(expert), size, num_groups)
              : count_routed(static_cast<const int32_t*>(expert), size, num_groups);
}

void plan_mask(const uint8_t* mask, int32_t* sources, const PlanBuffers& plan) {
  const int64_t live = count_mask(mask, plan.num_rows * plan.groups);
  if (live > plan.capacity)
    throw std::invalid_argument("max_slots: the mask has " + to_string(live) + " slots, more than the capacity of " +
                                to_string(plan.capacity));
  plan.groups == 1 ? mask_of_rows(mask, live, plan) : mask_of_pairs(mask, sources, plan);
  fill_zero(plan.rows + live, plan.rows + plan.capacity);
  fill_zero(plan.row_slots + live, plan.row_slots + plan.capacity);
  if (!sources) return;
  if (plan.groups == 1) std::copy(plan.rows, plan.rows + live, sources);
  fill_zero(sources + live, sources + plan.capacity);
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
  const int64_t live = plan.offsets[plan.groups];
  std::fill(plan.row_offsets, plan.row_offsets + plan.num_rows + 1, 0);
  for (int64_t a = 0; a < live; ++a) ++plan.row_offsets[plan.rows[a] + 1];
  for (int64_t t = 0; t < plan.num_rows; ++t) plan.row_offsets[t + 1] += plan.row_offsets[t];
  list_slots(plan, live);
}

}  // namespace dyncore

// The CUDA kernels that make plans, run on the host (tests/cuda): the same lists in whichever order threads and blocks
// run, nothing touched outside of buffers, and as many launches as their files say.
#include <cmath>

#include "cuda/common/tiling.h"
#include "cuda/kernels.h"
#include "tests/cuda/cuda_runtime.h"
#include "tests/made_plan.h"
#include "tests/tests.h"

namespace dyncore::tests {

namespace {

using emulation::Order;

// Cases take the orders of threads and blocks in turn.
template <class Make>
void in_some_order(int most_launches, Make make) {
  static int turn = 0;
  constexpr Order kOrders[] = {Order::shuffled, Order::descending, Order::ascending};
  emulation::set_order(kOrders[turn++ % 3]);
  const int before = emulation::launches();
  make();
  expect(emulation::launches() - before <= most_launches, "launches");
}

std::string name_of_size(const char* op, int64_t rows, int64_t width, int64_t groups, int64_t capacity) {
  return std::string("cuda::") + op + " " + std::to_string(rows) + " x " + std::to_string(width) + ", groups " +
         std::to_string(groups) + ", capacity " + std::to_string(capacity);
}

// How a mask or routing is filled: nothing, about half, everything.
enum class Fill { none, some, all };
constexpr Fill kFills[] = {Fill::none, Fill::some, Fill::all};

bool takes(Fill fill, Random& random) {
  return fill == Fill::all || (fill == Fill::some && random.below(2) == 0);
}

void mask(int64_t num_rows, int64_t groups, Fill fill, Random& random) {
  Buffer<uint8_t> mask(num_rows * groups);
  std::vector<Slot> slots;
  for (int64_t i = 0; i < mask.size(); ++i) {
    mask[i] = takes(fill, random) ? static_cast<uint8_t>(1 + random.below(255)) : 0;
    if (mask[i]) slots.push_back({i % groups, i / groups, i});
  }
  std::sort(slots.begin(), slots.end());
  const int64_t live = static_cast<int64_t>(slots.size());
  for (int64_t capacity : {mask.size(), mask.size() + 3, live, live / 2}) {
    set_case(name_of_size("plan_mask", num_rows, groups, groups, capacity));
    const int launches = num_rows * groups <= cuda::kChunk / 2 ? 1 : 2;
    in_some_order(launches, [&] {
      MadePlan plan(capacity, groups, num_rows);
      Buffer<int32_t> sources(capacity), workspace(cuda::plan_mask_workspace(num_rows, groups));
      const bool wanted = capacity % 3 != 1;  // else a plan alone
      cuda::plan_mask(mask.data(), wanted ? sources.data() : nullptr, plan.buffers, workspace.data(), nullptr);
      plan.expect_slots(slots);
      bool good = true;
      for (int64_t a = 0; wanted && a < capacity; ++a)
        good = good && sources[a] == (a < live ? slots[static_cast<size_t>(a)].source : 0);
      expect(good, "sources");
    });
  }
}

template <class Index>
void route(int64_t num_rows, int64_t k, int64_t groups, Fill fill, Random& random) {
  Buffer<Index> expert(num_rows * k);
  std::vector<Slot> slots;
  for (int64_t i = 0; i < expert.size(); ++i) {
    const int64_t group = groups / 3 + random.below(groups - groups / 3);  // the first third is empty
    const int64_t nowhere[] = {-1, groups, sizeof(Index) == 8 ? (int64_t{1} << 32) + group : -2147483647 - 1};
    const bool goes = takes(fill, random);
    expert[i] = static_cast<Index>(goes ? group : nowhere[random.below(3)]);
    if (goes) slots.push_back({group, i / k, i});
  }
  std::sort(slots.begin(), slots.end());
  const int64_t live = static_cast<int64_t>(slots.size());
  for (int64_t capacity : {expert.size(), expert.size() + 3, live / 2}) {
    set_case(name_of_size("plan_route", num_rows, k, groups, capacity));
    in_some_order(num_rows * k <= cuda::kChunk / 2 ? 1 : 2, [&] {
      MadePlan plan(capacity, groups, num_rows);
      Buffer<int32_t> sources(capacity), workspace(cuda::plan_route_workspace(num_rows, k, groups));
      cuda::plan_route(expert.data(), sizeof(Index) == 8, k, sources.data(), plan.buffers, workspace.data(), nullptr);
      plan.expect_slots(slots);
      bool good = true;
      for (int64_t a = 0; a < capacity; ++a)
        good = good && sources[a] == (a < live ? slots[static_cast<size_t>(a)].source : 0);
      expect(good, "sources");
    });
  }
}

void route_topk(int64_t num_rows, int64_t groups, int64_t k, bool normalize, Random& random) {
  set_case(name_of_size("plan_route_topk", num_rows, k, groups, num_rows * k) + (normalize ? ", normalized" : ""));
  Buffer<float> logits(num_rows * groups);
  for (int64_t i = 0; i < logits.size(); ++i)
    logits[i] = static_cast<float>(i % 3 == 0 ? static_cast<double>(random.below(3)) : 2 * random.normal());
  for (int64_t i = 1; i < std::min(logits.size(), k); i += 2) logits[i] = NAN;
  std::vector<Slot> slots;
  Dense weights(num_rows, k), want_scale(num_rows * k, 1), scale_got(num_rows * k, 1);
  std::vector<int64_t> experts;
  for (int64_t t = 0; t < num_rows; ++t) {
    const float* row = logits.data() + t * groups;
    std::vector<int64_t> order;
    for (int64_t g = 0; g < groups; ++g) order.push_back(g);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t x, int64_t y) { return std::isnan(row[x]) ? !std::isnan(row[y]) : row[x] > row[y]; });
    const int64_t summed = normalize ? k : groups;
    double total = 0;
    for (int64_t j = 0; j < summed; ++j) total += std::exp(double{row[order[static_cast<size_t>(j)]]} - row[order[0]]);
    for (int64_t j = 0; j < k; ++j) {
      const int64_t g = order[static_cast<size_t>(j)];
      weights(t, j) = std::exp(double{row[g]} - row[order[0]]) / total;
      experts.push_back(g);
      slots.push_back({g, t, t * k + j});
    }
  }
  std::sort(slots.begin(), slots.end());
  in_some_order(2, [&] {
    MadePlan plan(num_rows * k, groups, num_rows);
    Buffer<int32_t> expert(num_rows * k), sources(num_rows * k);
    Buffer<int32_t> workspace(cuda::plan_route_topk_workspace(num_rows, k, groups));
    Buffer<float> scale(num_rows * k);
    cuda::plan_route_topk(logits.data(), k, normalize, expert.data(), sources.data(), scale.data(), plan.buffers,
                          workspace.data(), nullptr);
    plan.expect_slots(slots);
    bool good = true, nan = true;
    for (int64_t i = 0; i < num_rows * k; ++i) {
      const Slot& slot = slots[static_cast<size_t>(i)];
      good = good && expert[i] == experts[static_cast<size_t>(i)] && sources[i] == slot.source;
      const double want = weights(slot.row, slot.source % k);
      nan = nan && std::isnan(want) == std::isnan(scale[i]);
      want_scale(i, 0) = std::isnan(want) ? 0 : want;
      scale_got(i, 0) = std::isnan(scale[i]) ? 0 : double{scale[i]};
    }
    expect(good, "experts and sources");
    expect(nan, "NaN");
    expect_values("scale", scale_got, want_scale, Dtype::float32);
  });
}

void topk(int64_t batch, int64_t sequence, int64_t k, Dtype dtype, bool special, Random& random) {
  set_case(name_of_size("plan_topk", batch, sequence, 1, k) + " " + name_of(dtype));
  // Halves and bfloat16 are made by hand: sign, exponent and fraction of small numbers.
  Buffer<char> scores(batch * sequence * bytes_of(dtype));
  std::vector<double> values;
  for (int64_t i = 0; i < batch * sequence; ++i) {
    double value = rounded(special ? static_cast<double>(random.below(5) - 2) : random.normal(), dtype);
    if (special && i % 7 == 1) value = i % 2 == 0 ? NAN : i % 3 == 0 ? -HUGE_VAL : HUGE_VAL;
    if (special && i % 5 == 1) value = -0.0;
    values.push_back(value);
    const auto as_float = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &as_float, 4);
    if (dtype == Dtype::float32) std::memcpy(scores.data() + 4 * i, &bits, 4);
    if (dtype == Dtype::bfloat16) std::memcpy(scores.data() + 2 * i, reinterpret_cast<char*>(&bits) + 2, 2);
    if (dtype == Dtype::float16) {
      const auto half = static_cast<_Float16>(value);
      std::memcpy(scores.data() + 2 * i, &half, 2);
    }
  }
  std::vector<Slot> slots;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<int64_t> order;
    for (int64_t s = 0; s < sequence; ++s) order.push_back(b * sequence + s);
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
      const double left = values[static_cast<size_t>(x)], right = values[static_cast<size_t>(y)];
      return std::isnan(left) ? !std::isnan(right) : left > right;
    });
    for (int64_t i = 0; i < k; ++i) slots.push_back({0, order[static_cast<size_t>(i)], 0});
  }
  in_some_order(1, [&] {
    MadePlan plan(batch * k, 1, batch * sequence);
    cuda::plan_topk(scores.data(), dtype, batch, sequence, k, plan.buffers, nullptr);
    plan.expect_slots(slots);
  });
}

void inverse(int64_t num_rows, int64_t live, int64_t spare, Random& random) {
  set_case(name_of_size("plan_inverse", num_rows, live, 3, live + spare));
  MadePlan plan(live + spare, 3, num_rows);
  std::vector<Slot> slots;
  for (int64_t g = 0; g < 2; ++g)
    for (int64_t a = live * g / 2; a < live * (g + 1) / 2; ++a) slots.push_back({g, random.below(num_rows), 0});
  std::sort(slots.begin(), slots.end());
  const int64_t ends[] = {0, live / 2, live, live};
  std::copy(ends, ends + 4, plan.offsets.data());
  for (int64_t a = 0; a < live; ++a) plan.rows[a] = static_cast<int32_t>(slots[static_cast<size_t>(a)].row);
  const std::vector<int32_t> padding(static_cast<size_t>(spare), -7);
  in_some_order(7, [&] {
    std::copy(padding.begin(), padding.end(), plan.rows.data() + live);
    Buffer<int32_t> workspace(cuda::plan_inverse_workspace(live + spare));
    cuda::plan_inverse(plan.buffers, workspace.data(), nullptr);
    std::fill(plan.rows.data() + live, plan.rows.data() + live + spare, 0);
    plan.expect_slots(slots);
  });
}

// What the kernels count on: every row in one chunk, no tile without rows, no more counts than a block can add up.
void tilings() {
  for (int64_t rows : {int64_t{0}, int64_t{1}, int64_t{1000}, int64_t{16384}, int64_t{1} << 20, int64_t{0x7fffffff}}) {
    for (int64_t width : {1, 2, 8, 63, 1024}) {
      for (int64_t groups : {1, 2, 64, 128, 1000, 1024}) {
        set_case("tile " + std::to_string(rows) + " x " + std::to_string(width) + ", groups " + std::to_string(groups));
        const cuda::Tiling t = cuda::tile(rows, width, groups);
        const int64_t rows_per_tile = t.chunks_per_tile * t.rows_per_chunk;
        expect(t.rows_per_chunk >= 1 && t.rows_per_chunk * width <= cuda::kChunk, "a chunk's items");
        expect(t.tiles >= 1 && t.tiles * rows_per_tile >= rows, "every row in a tile");
        expect(rows == 0 || (t.tiles - 1) * rows_per_tile < rows, "a row in every tile");
        expect(t.tiles <= 256 && t.tiles * groups <= 32768, "counts");
        expect(t.workspace(groups) == (t.rows_per_chunk >= rows ? 0 : t.tiles * groups), "workspace");
      }
    }
  }
}

}  // namespace

void test_cuda_plans() {
  Random random;
  tilings();
  for (Fill fill : kFills) {
    for (int64_t groups : {1, 3, 32, 63}) {
      mask(0, groups, fill, random);
      mask(1, groups, fill, random);
      mask(100, groups, fill, random);
    }
    mask(2100, 1, fill, random);
    mask(5, 1024, fill, random);
    for (int64_t k : {1, 2, 3}) {
      route<int32_t>(0, k, 5, fill, random);
      route<int64_t>(100, k, 31, fill, random);
      route<int32_t>(700, k, 8, fill, random);
    }
  }
  mask(7, 0, Fill::none, random);
  route<int32_t>(7, 0, 3, Fill::none, random);
  route<int64_t>(37000, 1, 1000, Fill::some, random);  // two chunks a tile
  route<int32_t>(3, 1024, 4, Fill::some, random);
  for (bool normalize : {false, true}) {
    for (int64_t groups : {1, 3, 64, 65, 300}) {
      for (int64_t k : {int64_t{1}, int64_t{3}, std::min<int64_t>(groups, 32)}) {
        if (k > groups) continue;
        route_topk(0, groups, k, normalize, random);
        route_topk(1, groups, k, normalize, random);
        route_topk(70, groups, k, normalize, random);
      }
    }
  }
  route_topk(1400, 8, 2, true, random);
  for (Dtype dtype : kDtypes) {
    for (int64_t sequence : {1, 31, 100, 1500}) {
      for (int64_t k : {int64_t{0}, int64_t{1}, sequence / 3, sequence}) {
        topk(2, sequence, k, dtype, sequence < 200, random);
      }
    }
  }
  topk(1, 10300, 700, Dtype::float32, false, random);  // read again for each digit
  topk(0, 5, 2, Dtype::float32, false, random);
  topk(3, 0, 0, Dtype::float32, false, random);
  for (int64_t spare : {0, 5}) {
    inverse(1, 1, spare, random);
    inverse(50, 0, spare, random);
    inverse(1024, 300, spare, random);
    inverse(1025, 1300, spare, random);
  }
  inverse(3000000, 40, 3, random);
}

}  // namespace dyncore::tests

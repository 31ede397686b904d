// Making plans, counting first, and refusing those whose indices lead outside.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "cpu/plan.h"
#include "cpu/row_ranges.h"
#include "tests/made_plan.h"
#include "tests/tests.h"

namespace dyncore::tests {

namespace {

template <class Error, class Call>
void expect_throws(const std::string& what, Call call) {
  bool thrown = false;
  try {
    call();
  } catch (const Error&) {
    thrown = true;
  }
  expect(thrown, what + ": expected an exception");
}

void masks(int64_t num_rows, int64_t groups, int64_t one_in, Random& random) {
  set_case("plan_mask " + std::to_string(num_rows) + " x " + std::to_string(groups));
  Buffer<uint8_t> mask(num_rows * groups);
  std::vector<Slot> slots;
  for (int64_t i = 0; i < mask.size(); ++i) {
    mask[i] = random.below(one_in) == 0 ? static_cast<uint8_t>(1 + random.below(255)) : 0;
    if (mask[i]) slots.push_back({i % groups, i / groups, i});
  }
  std::sort(slots.begin(), slots.end());
  const int64_t live = count_mask(mask.data(), mask.size());
  expect(live == static_cast<int64_t>(slots.size()), "count_mask");
  for (int64_t spare : {0, 5}) {
    MadePlan plan(live + spare, groups, num_rows);
    Buffer<int32_t> sources(live + spare);
    plan_mask(mask.data(), nullptr, plan.buffers);
    plan.expect_slots(slots);
    plan_mask(mask.data(), sources.data(), plan.buffers);
    plan.expect_slots(slots);
    bool good = true;
    for (int64_t a = 0; a < live + spare; ++a)
      good = good && sources[a] == (a < live ? slots[static_cast<size_t>(a)].source : 0);
    expect(good, "sources");
    MadePlan inverse(live + spare, groups, num_rows);
    std::copy(plan.rows.data(), plan.rows.data() + plan.rows.size(), inverse.rows.data());
    std::copy(plan.offsets.data(), plan.offsets.data() + plan.offsets.size(), inverse.offsets.data());
    plan_inverse(inverse.buffers);
    inverse.expect_slots(slots);
  }
  if (live == 0) return;
  MadePlan tight(live - 1, groups, num_rows);
  expect_throws<std::invalid_argument>("too small a capacity", [&] { plan_mask(mask.data(), nullptr, tight.buffers); });
}

// Slots of so many bytes that 1200 rows are several ranges, which together are the plan.
void ranges(int64_t one_in, Random& random) {
  set_case("RowRanges, one pair in " + std::to_string(one_in));
  const int64_t num_rows = 1200, groups = 3;
  Buffer<uint8_t> mask(num_rows * groups);
  for (int64_t i = 0; i < mask.size(); ++i)
    mask[i] = i / groups % 7 > 0 && i % groups != 1 && random.below(one_in) == 0;
  const int64_t live = count_mask(mask.data(), mask.size());
  MadePlan whole(live + 3, groups, num_rows);
  plan_mask(mask.data(), nullptr, whole.buffers);
  Buffer<float> scale(live + 3);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t a = whole.offsets[g]; a < whole.offsets[g + 1]; ++a)
      scale[a] = static_cast<float>(whole.rows[a] * groups + g);
  const Plan plan{whole.rows.data(),
                  whole.offsets.data(),
                  scale.data(),
                  whole.row_offsets.data(),
                  whole.row_slots.data(),
                  live + 3,
                  groups,
                  num_rows};
  expect(RowRanges(plan, 0).count() == 1 && RowRanges(plan, 4).count() == 1, "few bytes stay whole");
  RowRanges cut(plan, 1 << 20);
  expect(cut.count() > 1 && cut.count() <= live / (2 * 128), "count");
  int64_t next = 0;
  for (int64_t i = 0; i < cut.count(); ++i) {
    const auto [first, part] = cut.range(i);
    expect(first == next && part.groups == groups && part.capacity == part.live(), "range");
    next = first + part.num_rows;
    std::vector<Slot> slots;
    for (int64_t t = first; t < next; ++t)
      for (int64_t g = 0; g < groups; ++g)
        if (mask[t * groups + g]) slots.push_back({g, t - first, 0});
    MadePlan made(part.capacity, groups, part.num_rows);
    std::copy(part.rows, part.rows + part.capacity, made.rows.data());
    std::copy(part.offsets, part.offsets + groups + 1, made.offsets.data());
    std::copy(part.row_offsets, part.row_offsets + part.num_rows + 1, made.row_offsets.data());
    std::copy(part.row_slots, part.row_slots + part.capacity, made.row_slots.data());
    made.expect_slots(slots);
    bool good = true;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t a = part.offsets[g]; a < part.offsets[g + 1]; ++a)
        good = good && part.scale[a] == static_cast<float>((part.rows[a] + first) * groups + g);
    expect(good, "scale");
  }
  expect(next == num_rows, "rows");
}

template <class Index>
void routes(int64_t num_rows, int64_t k, int64_t groups, Random& random) {
  set_case("plan_route " + std::to_string(num_rows) + " x " + std::to_string(k));
  constexpr bool kWide = sizeof(Index) == 8;
  Buffer<Index> expert(num_rows * k);
  std::vector<Slot> slots;
  for (int64_t i = 0; i < expert.size(); ++i) {
    expert[i] = static_cast<Index>(random.below(groups + 2) - 2);
    if (expert[i] >= 0) slots.push_back({static_cast<int64_t>(expert[i]), i / k, i});
  }
  const int64_t live = count_route(expert.data(), kWide, expert.size(), groups);
  expect(live == static_cast<int64_t>(slots.size()), "count_route");
  std::sort(slots.begin(), slots.end());
  for (int64_t capacity : {live, live + 4, live / 2}) {
    MadePlan plan(capacity, groups, num_rows);
    Buffer<int32_t> sources(capacity);
    plan_route(expert.data(), kWide, k, sources.data(), plan.buffers);
    plan.expect_slots(slots);
    bool good = true;
    for (int64_t a = 0; a < capacity; ++a)
      good = good && sources[a] == (a < live ? slots[static_cast<size_t>(a)].source : 0);
    expect(good, "sources");
  }
  if (expert.size() == 0) return;
  expert[expert.size() - 1] = static_cast<Index>(groups);
  expect_throws<std::out_of_range>("an unknown group",
                                   [&] { count_route(expert.data(), kWide, expert.size(), groups); });
}

template <class Score>
void topk(int64_t batch, int64_t sequence, int64_t k, Random& random) {
  set_case("plan_topk " + std::to_string(batch) + " x " + std::to_string(sequence) + ", k " + std::to_string(k));
  Buffer<Score> scores(batch * sequence);
  for (int64_t i = 0; i < scores.size(); ++i) scores[i] = static_cast<Score>(random.below(7) - 3);
  if (scores.size() > 3)
    scores[1] = static_cast<Score>(NAN), scores[2] = static_cast<Score>(HUGE_VAL), scores[3] = -0.0;
  std::vector<Slot> slots;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t s = 0; s < sequence; ++s) {
      const Score mine = scores[b * sequence + s];
      int64_t higher = 0;  // that rank before it
      for (int64_t o = 0; o < sequence; ++o) {
        const Score other = scores[b * sequence + o];
        const bool equal = other == mine || (std::isnan(other) && std::isnan(mine));
        higher += equal ? o < s : std::isnan(other) || other > mine;
      }
      if (higher < k) slots.push_back({0, b * sequence + s, 0});
    }
  }
  MadePlan plan(batch * k, 1, batch * sequence);
  plan_topk(scores.data(), sizeof(Score) == 8, batch, sequence, k, plan.buffers);
  plan.expect_slots(slots);
}

}  // namespace

void test_plans() {
  Random random;
  for (int64_t num_rows : {0, 1, 3, 63, 100})
    for (int64_t groups : {1, 3, 31})
      for (int64_t one_in : {1, 4, 1000000}) masks(num_rows, groups, one_in, random);
  for (int64_t num_rows : {0, 1, 33, 100}) {
    for (int64_t k : {1, 2, 3}) {
      routes<int32_t>(num_rows, k, 5, random);
      routes<int64_t>(num_rows, k, 31, random);
    }
  }
  for (int64_t sequence : {1, 31, 100}) {
    for (int64_t k : {int64_t{0}, int64_t{1}, sequence / 2, sequence}) {
      topk<float>(3, sequence, k, random);
      topk<double>(2, sequence, k, random);
    }
  }
  topk<float>(0, 5, 2, random);
  for (int64_t one_in : {1, 2}) ranges(one_in, random);
}

void test_check_plan() {
  Random random;
  set_case("check_plan");
  const auto refuses = [&](const std::string& what, bool range, auto change) {
    TestPlan plan = make_plan(random, what, 20, {3, 0, 30});
    check_plan(plan.view(true), plan.num_rows, true);
    change(plan);
    const auto call = [&] { check_plan(plan.view(true), plan.num_rows, true); };
    range ? expect_throws<std::out_of_range>(what, call) : expect_throws<std::invalid_argument>(what, call);
  };
  refuses("a negative row", true, [](TestPlan& p) { p.rows[4] = -1; });
  refuses("a row past the end", true, [](TestPlan& p) { p.rows[32] = 20; });
  refuses("falling offsets", false, [](TestPlan& p) { p.offsets[1] = 34; });
  refuses("offsets that do not begin at 0", false, [](TestPlan& p) { p.offsets[0] = 1; });
  refuses("offsets past the capacity", false, [](TestPlan& p) { p.offsets[3] = 36; });
  refuses("a slot past the end", true, [](TestPlan& p) { p.row_slots[0] = 33; });
  refuses("a negative slot", true, [](TestPlan& p) { p.row_slots[7] = -7; });
  refuses("falling row offsets", false, [](TestPlan& p) { p.row_offsets[5] = 40; });
  refuses("row offsets that end elsewhere", false, [](TestPlan& p) { p.row_offsets[20] = 32; });
}

}  // namespace dyncore::tests

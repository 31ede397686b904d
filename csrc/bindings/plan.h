// A plan's tensors as the bindings read them: one that is used, and one that is being made.
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <limits>
#include <string>

#include "bindings/tensor.h"

namespace dyncore::bindings {

// A plan's tensors; scale and the whole inverse map may be None.
struct PlanTensors {
  Indices rows, offsets;
  Scales scale;
  Indices row_offsets, row_slots;
  Plan plan;

  PlanTensors(py::handle rows_, py::handle offsets_, py::handle scale_, py::handle row_offsets_, py::handle row_slots_,
              int64_t num_rows, Device device = Device::cpu)
      : rows("plan.rows", rows_, Absence::refused, device),
        offsets("plan.offsets", offsets_, Absence::refused, device),
        scale("plan.scale", scale_, Absence::allowed, device),
        row_offsets("plan.row_offsets", row_offsets_, Absence::allowed, device),
        row_slots("plan.row_slots", row_slots_, row_offsets ? Absence::refused : Absence::allowed, device) {
    const int64_t capacity = rows.size(0);
    scale.expect_length(capacity, "entries, one a slot");
    row_slots.expect_length(capacity, "entries, one a slot");
    row_offsets.expect_length(num_rows + 1, "entries, one more than rows");
    if (offsets.size(0) < 1) offsets.expect_length(1, "entries at least");
    plan = {rows.list(),      offsets.list(), scale.list(),        row_offsets.list(),
            row_slots.list(), capacity,       offsets.size(0) - 1, num_rows};
  }
};

// T, from the row_offsets [T+1] of a plan.
inline int64_t rows_of(py::handle row_offsets, Device device = Device::cpu) {
  const Tensor t("plan.row_offsets", row_offsets, Absence::refused, device);
  t.expect_dims(1);
  if (t.size(0) < 1) t.expect_length(1, "entries at least");
  return t.size(0) - 1;
}

inline void expect_rows(const PlanTensors& p, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) t->expect_length(p.plan.num_rows, "rows");
}

inline void expect_slots(const PlanTensors& p, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) t->expect_length(p.plan.capacity, "slots");
}

// The lists of a plan being made: rows [A], offsets [G+1], row_offsets [T+1], row_slots [A], whose length is not known
// from elsewhere; 0 slots or more.
struct NewPlan {
  Output rows, offsets, row_offsets, row_slots;

  NewPlan(py::handle rows_, py::handle offsets_, py::handle row_offsets_, py::handle row_slots_,
          Device device = Device::cpu)
      : rows("rows", rows_, Absence::refused, device),
        offsets("offsets", offsets_, Absence::refused, device),
        row_offsets("row_offsets", row_offsets_, Absence::refused, device),
        row_slots("row_slots", row_slots_, Absence::refused, device) {
    for (const Output* list : {&rows, &offsets, &row_offsets, &row_slots}) list->expect_dims(1);
  }

  PlanBuffers expect(int64_t num_rows, int64_t groups, int64_t capacity) const {
    rows.expect(kInt32, {capacity});
    offsets.expect(kInt32, {groups + 1});
    row_offsets.expect(kInt32, {num_rows + 1});
    row_slots.expect(kInt32, {capacity});
    return {rows.data<int32_t>(),
            offsets.data<int32_t>(),
            row_offsets.data<int32_t>(),
            row_slots.data<int32_t>(),
            capacity,
            groups,
            num_rows};
  }
};

// The flat index into a mask of each slot of its plan, where asked for.
struct MaskSources : Output {
  MaskSources(py::handle source, const Tensor& mask, int64_t capacity, Device device = Device::cpu)
      : Output("sources", source, Absence::allowed, device) {
    if (!*this) return;
    expect(kInt32, {capacity});
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    if (mask.elements() > kMost)
      throw py::value_error("mask: expected at most " + std::to_string(kMost) + " entries, for sources are int32");
  }
};

inline void expect_indices(const Tensor& expert) {
  if (expert.type() != kInt32 && expert.type() != kInt64) throw py::type_error("expert: expected int32 or int64");
}

}  // namespace dyncore::bindings

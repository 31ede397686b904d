// dyncore._C.cuda: the CUDA kernels, on the device of their tensors and PyTorch's current stream there. Shapes are
// checked here; what indices hold is not, as that would wait for the device.
#include "bindings/cuda.h"

#include <algorithm>

#include "bindings/plan.h"
#include "cuda/kernels.h"

namespace dyncore::bindings {

namespace {

constexpr Absence kNeeded = Absence::refused, kMaybe = Absence::allowed;

// The one device of a call's tensors.
int device_of(std::initializer_list<const Tensor*> tensors) {
  const int device = (*tensors.begin())->device_id();
  for (const Tensor* t : tensors)
    if (*t && t->device_id() != device)
      throw py::value_error("expected tensors on one device, got cuda:" + std::to_string(device) +
                            " and cuda:" + std::to_string(t->device_id()));
  return device;
}

int device_of(const Tensor& first, const PlanTensors& p) {
  return device_of({&first, &p.rows, &p.offsets, &p.scale, &p.row_offsets, &p.row_slots});
}

int device_of(const Tensor& first, const NewPlan& p) {
  return device_of({&first, &p.rows, &p.offsets, &p.row_offsets, &p.row_slots});
}

// Calls a kernel with the stream to run on, without the GIL: a full queue makes the host wait.
template <class Call>
void run(int device, Call call) {
  void* const stream = current_stream(device);
  py::gil_scoped_release unlocked;
  const cuda::OnDevice on(device);
  call(stream);
}

struct Workspace : Output {
  Workspace(py::handle source, int64_t needed) : Output("workspace", source, kNeeded, Device::cuda) {
    expect_type(kInt32);
    expect_dims(1);
    if (size(0) < needed) expect_length(needed, "entries at least");
  }
};

Contiguous contiguous(const char* name, py::handle source) {
  return {name, source, kNeeded, Device::cuda};
}

void plan_mask(py::handle mask_, py::handle rows_, py::handle offsets_, py::handle row_offsets_, py::handle row_slots_,
               py::handle sources_, py::handle workspace_) {
  const Contiguous mask = contiguous("mask", mask_);
  if (mask.type() != kBool) throw py::type_error("mask: expected a bool tensor");
  if (mask.dims() != 1) mask.expect_dims(2);
  const NewPlan lists(rows_, offsets_, row_offsets_, row_slots_, Device::cuda);
  const PlanBuffers plan = lists.expect(mask.size(0), mask.dims() == 2 ? mask.size(1) : 1, lists.rows.size(0));
  const MaskSources sources(sources_, mask, plan.capacity, Device::cuda);
  const Workspace workspace(workspace_, cuda::plan_mask_workspace(plan.num_rows, plan.groups));
  run(device_of(mask, lists), [&](void* stream) {
    cuda::plan_mask(mask.data<const uint8_t>(), sources.data<int32_t>(), plan, workspace.data<int32_t>(), stream);
  });
}

void plan_route(py::handle expert_, py::handle rows_, py::handle offsets_, py::handle row_offsets_,
                py::handle row_slots_, py::handle sources_, py::handle workspace_) {
  const Contiguous expert = contiguous("expert", expert_);
  expert.expect_dims(2);
  expect_indices(expert);
  const NewPlan lists(rows_, offsets_, row_offsets_, row_slots_, Device::cuda);
  if (lists.offsets.size(0) < 1) lists.offsets.expect_length(1, "entries at least");
  const PlanBuffers plan = lists.expect(expert.size(0), lists.offsets.size(0) - 1, lists.rows.size(0));
  const Output sources("sources", sources_, kNeeded, Device::cuda);
  sources.expect(kInt32, {plan.capacity});
  const int64_t k = expert.size(1);
  const Workspace workspace(workspace_, cuda::plan_route_workspace(plan.num_rows, k, plan.groups));
  run(device_of(expert, lists), [&](void* stream) {
    cuda::plan_route(expert.data(), expert.type() == kInt64, k, sources.data<int32_t>(), plan,
                     workspace.data<int32_t>(), stream);
  });
}

void plan_route_topk(py::handle logits_, int64_t k, bool normalize, py::handle rows_, py::handle offsets_,
                     py::handle row_offsets_, py::handle row_slots_, py::handle sources_, py::handle scale_,
                     py::handle expert_, py::handle workspace_) {
  const Contiguous logits = contiguous("logits", logits_);
  logits.expect_dims(2);
  logits.expect_type(kFloat);
  const int64_t num_rows = logits.size(0), groups = logits.size(1), most = std::min(groups, cuda::kMostChosen);
  if (k < 1 || k > most) throw py::value_error("k: expected 1.." + std::to_string(most) + ", got " + std::to_string(k));
  const NewPlan lists(rows_, offsets_, row_offsets_, row_slots_, Device::cuda);
  const PlanBuffers plan = lists.expect(num_rows, groups, num_rows * k);
  const Output sources("sources", sources_, kNeeded, Device::cuda), scale("scale", scale_, kNeeded, Device::cuda),
      expert("expert", expert_, kNeeded, Device::cuda);
  sources.expect(kInt32, {plan.capacity});
  scale.expect(kFloat, {plan.capacity});
  expert.expect(kInt32, {num_rows, k});
  const Workspace workspace(workspace_, cuda::plan_route_topk_workspace(num_rows, k, groups));
  run(device_of(logits, lists), [&](void* stream) {
    cuda::plan_route_topk(logits.data<const float>(), k, normalize, expert.data<int32_t>(), sources.data<int32_t>(),
                          scale.data<float>(), plan, workspace.data<int32_t>(), stream);
  });
}

void plan_topk(py::handle scores_, int64_t k, py::handle rows_, py::handle offsets_, py::handle row_offsets_,
               py::handle row_slots_) {
  const Contiguous scores = contiguous("scores", scores_);
  scores.expect_dims(2);
  const int64_t batch = scores.size(0), sequence = scores.size(1);
  if (k < 0 || k > sequence)
    throw py::value_error("k: expected 0.." + std::to_string(sequence) + ", got " + std::to_string(k));
  const NewPlan lists(rows_, offsets_, row_offsets_, row_slots_, Device::cuda);
  const PlanBuffers plan = lists.expect(batch * sequence, 1, batch * k);
  const Dtype dtype = kernel_dtype(scores);
  run(device_of(scores, lists),
      [&](void* stream) { cuda::plan_topk(scores.data(), dtype, batch, sequence, k, plan, stream); });
}

void plan_inverse(py::handle rows_, py::handle offsets_, py::handle row_offsets_, py::handle row_slots_,
                  py::handle workspace_) {
  const Indices rows("plan.rows", rows_, kNeeded, Device::cuda),
      offsets("plan.offsets", offsets_, kNeeded, Device::cuda);
  if (offsets.size(0) < 1) offsets.expect_length(1, "entries at least");
  const Output row_offsets("row_offsets", row_offsets_, kNeeded, Device::cuda),
      row_slots("row_slots", row_slots_, kNeeded, Device::cuda);
  const int64_t num_rows = rows_of(row_offsets_, Device::cuda), capacity = rows.size(0);
  row_offsets.expect(kInt32, {num_rows + 1});
  row_slots.expect(kInt32, {capacity});
  const Workspace workspace(workspace_, cuda::plan_inverse_workspace(capacity));
  const PlanBuffers plan{
      rows.list(),         offsets.list(), row_offsets.data<int32_t>(), row_slots.data<int32_t>(), capacity,
      offsets.size(0) - 1, num_rows};
  run(device_of({&rows, &offsets, &row_offsets, &row_slots, &workspace}),
      [&](void* stream) { cuda::plan_inverse(plan, workspace.data<int32_t>(), stream); });
}

void gather_rows(py::handle x_, py::handle rows_, py::handle offsets_, py::handle out_) {
  const Rows x("x", x_, kNeeded, Device::cuda);
  const PlanTensors p(rows_, offsets_, py::none(), py::none(), py::none(), x.size(0), Device::cuda);
  const Output out("out", out_, kNeeded, Device::cuda);
  const int64_t width = x.size(1);
  out.expect(x.type(), {p.plan.capacity, width});
  const cuda::GatherRows op{p.plan, x.matrix(), {out.data(), width}, width, x.type().bits * x.type().lanes / 8};
  run(device_of(x, p), [&](void* stream) { cuda::gather_rows(op, stream); });
}

void scatter_rows(py::handle y_, py::handle base_, py::handle rows_, py::handle offsets_, py::handle scale_,
                  py::handle row_offsets_, py::handle row_slots_, py::handle out_) {
  const Rows y("y", y_, kNeeded, Device::cuda), base("base", base_, kMaybe, Device::cuda);
  const PlanTensors p(rows_, offsets_, scale_, row_offsets_, row_slots_, rows_of(row_offsets_, Device::cuda),
                      Device::cuda);
  const Output out("out", out_, kNeeded, Device::cuda);
  const int64_t width = y.size(1);
  expect_slots(p, {&y});
  base.expect_type_of(y);
  base.expect_shape({p.plan.num_rows, width});
  out.expect(y.type(), {p.plan.num_rows, width});
  const cuda::ScatterRows op{p.plan, kernel_dtype(y), y.matrix(), base.matrix(), {out.data(), width}, width};
  device_of({&y, &base, &out});
  run(device_of(y, p), [&](void* stream) { cuda::scatter_rows(op, stream); });
}

void scatter_rows_backward(py::handle grad_, py::handle y_, py::handle rows_, py::handle offsets_, py::handle scale_,
                           int64_t num_rows, py::handle dy_, py::handle dscale_) {
  const Rows grad("grad", grad_, kNeeded, Device::cuda), y("y", y_, kNeeded, Device::cuda);
  const PlanTensors p(rows_, offsets_, scale_, py::none(), py::none(), num_rows, Device::cuda);
  const Output dy("dy", dy_, kMaybe, Device::cuda), dscale("dscale", dscale_, kMaybe, Device::cuda);
  const int64_t width = y.size(1);
  expect_slots(p, {&y});
  grad.expect_type_of(y);
  grad.expect_shape({num_rows, width});
  dy.expect(y.type(), {p.plan.capacity, width});
  dscale.expect(kFloat, {p.plan.capacity});
  const cuda::ScatterRowsBackward op{p.plan,    kernel_dtype(y),      grad.matrix(), y.matrix(),
                                     dy.data(), dscale.data<float>(), width};
  device_of({&y, &grad, &dy, &dscale});
  run(device_of(y, p), [&](void* stream) { cuda::scatter_rows_backward(op, stream); });
}

}  // namespace

void define_cuda(py::module_& module) {
  py::module_ m = module.def_submodule("cuda", "CUDA kernels; dyncore/backends/cuda.py is their only caller.");
  m.attr("MOST_GROUPS") = cuda::kMostGroups;
  m.def("unusable", &cuda::unusable);
  m.def("plan_mask_workspace", &cuda::plan_mask_workspace);
  m.def("plan_mask", &plan_mask);
  m.def("plan_route_workspace", &cuda::plan_route_workspace);
  m.def("plan_route", &plan_route);
  m.attr("MOST_CHOSEN") = cuda::kMostChosen;
  m.def("plan_route_topk_workspace", &cuda::plan_route_topk_workspace);
  m.def("plan_route_topk", &plan_route_topk);
  m.def("plan_topk", &plan_topk);
  m.def("plan_inverse_workspace", &cuda::plan_inverse_workspace);
  m.def("plan_inverse", &plan_inverse);
  m.def("gather_rows", &gather_rows);
  m.def("scatter_rows", &scatter_rows);
  m.def("scatter_rows_backward", &scatter_rows_backward);
}

}  // namespace dyncore::bindings

// dyncore._C: Python's side of the kernels. Tensors are read (bindings/tensor.h), shapes and the plan are checked, then
// the kernels run without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/attention.h"
#include "bindings/cuda.h"
#include "bindings/plan.h"
#include "bindings/sparse.h"
#include "bindings/tensor.h"
#include "common/isa.h"
#include "cpu/plan.h"

namespace py = pybind11;
using namespace dyncore;
using namespace dyncore::bindings;

namespace {

// To be raised, here and in dyncore/backends/cpu.py, with every change to what these functions take or give: a module
// that was built from other sources is then refused when it is imported, and does not fail within a call.
constexpr int kInterface = 1;

// Checks the plan and runs the kernel, both without the GIL.
template <class Op>
void launch(void (*Kernels::*kernel)(const Op&), const Op& op, bool uses_inverse) {
  py::gil_scoped_release unlocked;
  check_plan(op.plan, op.plan.num_rows, uses_inverse);
  (kernels().*kernel)(op);
}

// Ops ----------------------------------------------------------------------------------------------------------------
// Arguments stand in the order of the op's schema (dyncore/backends/__init__.py), then outputs, then the thread count.
// An output is a fresh tensor or None.

void gather_rows(py::handle x_, py::handle rows_, py::handle offsets_, py::handle out_, int threads) {
  const Rows x("x", x_);
  const PlanTensors p(rows_, offsets_, py::none(), py::none(), py::none(), x.size(0));
  const Output out("out", out_);
  const int64_t width = x.size(1);
  out.expect(x.type(), {p.plan.capacity, width});
  const int element_bytes = x.type().bits * x.type().lanes / 8;
  const GatherRows op{p.plan, x.matrix(), {out.data(), width}, width, element_bytes, threads};
  launch(&Kernels::gather_rows, op, false);
}

void scatter_rows(py::handle y_, py::handle base_, py::handle rows_, py::handle offsets_, py::handle scale_,
                  py::handle row_offsets_, py::handle row_slots_, py::handle out_, int threads) {
  const Rows y("y", y_), base("base", base_, Absence::allowed);
  const PlanTensors p(rows_, offsets_, scale_, row_offsets_, row_slots_, rows_of(row_offsets_));
  const Output out("out", out_);
  const int64_t width = y.size(1);
  expect_slots(p, {&y});
  expect_rows(p, {&base});
  base.expect_type_of(y);
  base.expect_shape({p.plan.num_rows, width});
  out.expect(y.type(), {p.plan.num_rows, width});
  const ScatterRows op{p.plan, kernel_dtype(y), y.matrix(), base.matrix(), {out.data(), width}, width, threads};
  launch(&Kernels::scatter_rows, op, true);
}

void scatter_rows_backward(py::handle grad_, py::handle y_, py::handle rows_, py::handle offsets_, py::handle scale_,
                           int64_t num_rows, py::handle dy_, py::handle dscale_, int threads) {
  const Rows grad("grad", grad_), y("y", y_);
  const PlanTensors p(rows_, offsets_, scale_, py::none(), py::none(), num_rows);
  const Output dy("dy", dy_, Absence::allowed), dscale("dscale", dscale_, Absence::allowed);
  const int64_t width = y.size(1);
  expect_slots(p, {&y});
  expect_rows(p, {&grad});
  grad.expect_type_of(y);
  grad.expect_shape({num_rows, width});
  dy.expect(y.type(), {p.plan.capacity, width});
  dscale.expect(kFloat, {p.plan.capacity});
  const ScatterRowsBackward op{p.plan,    kernel_dtype(y),      grad.matrix(), y.matrix(),
                               dy.data(), dscale.data<float>(), width,         threads};
  launch(&Kernels::scatter_rows_backward, op, false);
}

void grouped_linear(py::handle x_, py::handle weight_, py::handle bias_, py::handle rows_, py::handle offsets_,
                    py::handle scale_, py::handle row_offsets_, py::handle row_slots_, int activation, bool gather,
                    bool scatter, py::handle out_, py::handle pre_, int threads) {
  const Rows x("x", x_), bias("bias", bias_, Absence::allowed);
  const Weights weight("weight", weight_);
  const PlanTensors p(rows_, offsets_, scale_, row_offsets_, row_slots_, rows_of(row_offsets_));
  const Output out("out", out_), pre("pre", pre_, Absence::allowed);
  const int64_t n = weight.size(1), k = weight.size(2);
  gather ? expect_rows(p, {&x}) : expect_slots(p, {&x});
  for (const Tensor* t : {static_cast<const Tensor*>(&weight), static_cast<const Tensor*>(&bias)}) t->expect_type_of(x);
  x.expect_shape({x.size(0), k});
  weight.expect_shape({p.plan.groups, n, k});
  bias.expect_shape({p.plan.groups, n});
  out.expect(x.type(), {scatter ? p.plan.num_rows : p.plan.capacity, n});
  pre.expect(x.type(), {p.plan.capacity, n});
  const GroupedLinear op{p.plan,     kernel_dtype(x), Activation(activation), gather,     scatter,    n,      k,
                         x.matrix(), weight.weight(), bias.matrix(),          out.data(), pre.data(), threads};
  launch(&Kernels::grouped_linear, op, scatter);
}

void grouped_linear_backward(py::handle grad_, py::handle x_, py::handle weight_, py::handle bias_, py::handle pre_,
                             py::handle rows_, py::handle offsets_, py::handle scale_, py::handle row_offsets_,
                             py::handle row_slots_, int activation, bool gather, bool scatter, py::handle dx_,
                             py::handle dweight_, py::handle dbias_, py::handle dscale_, int threads) {
  const Rows grad("grad", grad_), x("x", x_), bias("bias", bias_, Absence::allowed),
      pre("pre", pre_, Activation(activation) == Activation::none ? Absence::allowed : Absence::refused);
  const Weights weight("weight", weight_);
  const PlanTensors p(rows_, offsets_, scale_, row_offsets_, row_slots_, rows_of(row_offsets_));
  const Output dx("dx", dx_, Absence::allowed), dweight("dweight", dweight_, Absence::allowed),
      dbias("dbias", dbias_, Absence::allowed), dscale("dscale", dscale_, Absence::allowed);
  const int64_t n = weight.size(1), k = weight.size(2);
  gather ? expect_rows(p, {&x}) : expect_slots(p, {&x});
  scatter ? expect_rows(p, {&grad}) : expect_slots(p, {&grad});
  expect_slots(p, {&pre});
  const std::initializer_list<const Tensor*> alike{&grad, &weight, &bias, &pre};
  for (const Tensor* t : alike) t->expect_type_of(x);
  x.expect_shape({x.size(0), k});
  grad.expect_shape({grad.size(0), n});
  pre.expect_shape({p.plan.capacity, n});
  weight.expect_shape({p.plan.groups, n, k});
  bias.expect_shape({p.plan.groups, n});
  dx.expect(x.type(), {x.size(0), k});
  dweight.expect(x.type(), {p.plan.groups, n, k});
  dbias.expect(x.type(), {p.plan.groups, n});
  dscale.expect(kFloat, {p.plan.capacity});
  const GroupedLinearBackward op{p.plan,
                                 kernel_dtype(x),
                                 Activation(activation),
                                 gather,
                                 scatter,
                                 n,
                                 k,
                                 grad.matrix(),
                                 x.matrix(),
                                 weight.weight(),
                                 bias.matrix(),
                                 pre.matrix(),
                                 dx.data(),
                                 dweight.data(),
                                 dbias.data(),
                                 dscale.data<float>(),
                                 threads};
  launch(&Kernels::grouped_linear_backward, op, gather && dx);
}

// Whether the kernels multiply bfloat16 in pairs: a word of a panel holds two.
bool pairs() {
  return kernels().pairs;
}

// The weight with its panels, where there are any: see PackWeight.
Weight with_panels(const Weights& weight, int64_t parts, const Tensor& panels) {
  Weight w = weight.weight();
  if (!panels) return w;
  panels.expect_type(kFloat);
  const int64_t count = (weight.size(1) / parts + 31) / 32, k = weight.size(2);
  const int64_t words = kernel_dtype(weight) == Dtype::bfloat16 && kernels().pairs ? (k + 1) / 2 : k;
  panels.expect_shape({weight.size(0), parts, count, words, 32});
  w.panels = panels.data<const float>();
  w.panel = words * 32;
  w.panels_g = parts * count * w.panel;
  return w;
}

void pack_weight(py::handle weight_, int64_t parts, py::handle panels_, int threads) {
  const Weights weight("weight", weight_);
  if (parts < 1 || weight.size(1) % parts != 0)
    throw py::value_error("parts: expected a divisor of the weight's " + std::to_string(weight.size(1)) +
                          " outputs, got " + std::to_string(parts));
  const Output panels("panels", panels_);
  const Weight w = with_panels(weight, parts, panels);
  const PackWeight op{kernel_dtype(weight), weight.size(0), parts, weight.size(1), weight.size(2), w,
                      panels.data<float>(), threads};
  py::gil_scoped_release unlocked;
  kernels().pack_weight(op);
}

// in_panels, out_panels: of w_in and w_out, packed for the instruction set in use, or None.
void grouped_mlp(py::handle x_, py::handle w_in_, py::handle w_out_, py::handle b_in_, py::handle b_out_,
                 py::handle residual_, py::handle rows_, py::handle offsets_, py::handle scale_,
                 py::handle row_offsets_, py::handle row_slots_, int activation, py::handle in_panels_,
                 py::handle out_panels_, py::handle out_, py::handle pre_, int threads) {
  const Rows x("x", x_), b_in("b_in", b_in_, Absence::allowed), b_out("b_out", b_out_, Absence::allowed),
      residual("residual", residual_, Absence::allowed);
  const Weights w_in("w_in", w_in_), w_out("w_out", w_out_);
  const PlanTensors p(rows_, offsets_, scale_, row_offsets_, row_slots_, rows_of(row_offsets_));
  const Contiguous in_panels("in_panels", in_panels_, Absence::allowed),
      out_panels("out_panels", out_panels_, Absence::allowed);
  const Output out("out", out_), pre("pre", pre_, Absence::allowed);
  const int64_t h = w_out.size(1), i = w_out.size(2), width = is_gated(Activation(activation)) ? 2 * i : i;
  expect_rows(p, {&x, &residual});
  const std::initializer_list<const Tensor*> alike{&w_in, &w_out, &b_in, &b_out, &residual};
  for (const Tensor* t : alike) t->expect_type_of(x);
  x.expect_shape({p.plan.num_rows, h});
  residual.expect_shape({p.plan.num_rows, h});
  w_in.expect_shape({p.plan.groups, width, h});
  w_out.expect_shape({p.plan.groups, h, i});
  b_in.expect_shape({p.plan.groups, width});
  b_out.expect_shape({p.plan.groups, h});
  out.expect(x.type(), {p.plan.num_rows, h});
  pre.expect(x.type(), {p.plan.capacity, width});
  const GroupedMlp op{p.plan,
                      kernel_dtype(x),
                      Activation(activation),
                      h,
                      i,
                      x.matrix(),
                      with_panels(w_in, is_gated(Activation(activation)) ? 2 : 1, in_panels),
                      with_panels(w_out, 1, out_panels),
                      b_in.matrix(),
                      b_out.matrix(),
                      residual.matrix(),
                      out.data(),
                      pre.data(),
                      threads};
  launch(&Kernels::grouped_mlp, op, true);
}

// Whether the arguments of the public grouped_mlp would pass all its checks: CPU tensors of one kernel dtype in the
// right shapes. Takes 0.4 us, the checks in Python 3; those say what is wrong.
bool grouped_mlp_fits(py::handle x_, py::handle w_in, py::handle w_out_, py::handle b_in, py::handle b_out,
                      py::handle residual_, py::handle rows_, py::handle offsets_, int64_t num_rows, bool gated) {
  View x, w_out, residual, rows, offsets;
  if (!glance(x_, x) || !glance(w_out_, w_out) || !glance(rows_, rows) || !glance(offsets_, offsets)) return false;
  if (!has_kernels(x.type) || x.dims < 2 || w_out.dims != 3 || offsets.dims != 1) return false;
  int64_t leading = 1;
  for (int d = 0; d < x.dims - 1; ++d) leading *= x.sizes[d];
  if (leading != num_rows) return false;
  const int64_t groups = offsets.sizes[0] - 1, h = x.sizes[x.dims - 1], i = w_out.sizes[2], inner = gated ? 2 * i : i;
  if (!fits(w_out_, x.type, {groups, h, i}) || !fits(w_in, x.type, {groups, inner, h})) return false;
  if (!b_in.is_none() && !fits(b_in, x.type, {groups, inner})) return false;
  if (!b_out.is_none() && !fits(b_out, x.type, {groups, h})) return false;
  if (residual_.is_none()) return true;
  return glance(residual_, residual) && residual.type == x.type && residual.dims == x.dims &&
         std::equal(x.sizes, x.sizes + x.dims, residual.sizes);
}

void grouped_mlp_backward(py::handle grad_, py::handle x_, py::handle w_in_, py::handle w_out_, py::handle b_out_,
                          py::handle pre_, py::handle rows_, py::handle offsets_, py::handle scale_,
                          py::handle row_offsets_, py::handle row_slots_, int activation, bool dw_out_by_neuron,
                          py::handle dx_, py::handle dw_in_, py::handle dw_out_, py::handle db_in_, py::handle db_out_,
                          py::handle dscale_, int threads) {
  const Rows grad("grad", grad_), x("x", x_), b_out("b_out", b_out_, Absence::allowed), pre("pre", pre_);
  const Weights w_in("w_in", w_in_), w_out("w_out", w_out_);
  const PlanTensors p(rows_, offsets_, scale_, row_offsets_, row_slots_, rows_of(row_offsets_));
  const Output dx("dx", dx_, Absence::allowed), dw_in("dw_in", dw_in_, Absence::allowed),
      dw_out("dw_out", dw_out_, Absence::allowed), db_in("db_in", db_in_, Absence::allowed),
      db_out("db_out", db_out_, Absence::allowed), dscale("dscale", dscale_, Absence::allowed);
  const int64_t h = w_out.size(1), i = w_out.size(2), width = is_gated(Activation(activation)) ? 2 * i : i;
  expect_rows(p, {&grad, &x});
  expect_slots(p, {&pre});
  const std::initializer_list<const Tensor*> alike{&grad, &w_in, &w_out, &b_out, &pre};
  for (const Tensor* t : alike) t->expect_type_of(x);
  x.expect_shape({p.plan.num_rows, h});
  grad.expect_shape({p.plan.num_rows, h});
  w_in.expect_shape({p.plan.groups, width, h});
  w_out.expect_shape({p.plan.groups, h, i});
  b_out.expect_shape({p.plan.groups, h});
  pre.expect_shape({p.plan.capacity, width});
  dx.expect(x.type(), {p.plan.num_rows, h});
  dw_in.expect(x.type(), {p.plan.groups, width, h});
  dw_out.expect(x.type(), {p.plan.groups, dw_out_by_neuron ? i : h, dw_out_by_neuron ? h : i});
  db_in.expect(x.type(), {p.plan.groups, width});
  db_out.expect(x.type(), {p.plan.groups, h});
  dscale.expect(kFloat, {p.plan.capacity});
  const GroupedMlpBackward op{p.plan,
                              kernel_dtype(x),
                              Activation(activation),
                              h,
                              i,
                              grad.matrix(),
                              x.matrix(),
                              w_in.weight(),
                              w_out.weight(),
                              b_out.matrix(),
                              pre.matrix(),
                              dx.data(),
                              dw_in.data(),
                              dw_out.data(),
                              dw_out_by_neuron,
                              db_in.data(),
                              db_out.data(),
                              dscale.data<float>(),
                              threads};
  launch(&Kernels::grouped_mlp_backward, op, static_cast<bool>(dx));
}

void tree_route(py::handle x_, py::handle weight_, py::handle bias_, py::handle leaves_, int threads) {
  const Rows x("x", x_), weight("weight", weight_);
  const Contiguous bias("bias", bias_, Absence::allowed);
  const Output leaves("leaves", leaves_);
  const int64_t rows = x.size(0), width = x.size(1), nodes = weight.size(0);
  int depth = 0;
  while (depth < 30 && (int64_t{1} << depth) - 1 < nodes) ++depth;
  if ((int64_t{1} << depth) - 1 != nodes)
    throw py::value_error("weight: expected 2^depth - 1 nodes, got " + std::to_string(nodes));
  weight.expect_type_of(x);
  weight.expect_shape({nodes, width});
  bias.expect_type_of(x);
  bias.expect_shape({nodes});
  leaves.expect(kInt32, {rows});
  const TreeRoute op{
      kernel_dtype(x),        rows,   width, depth, x.matrix(), weight.matrix(), bias ? bias.data() : nullptr,
      leaves.data<int32_t>(), threads};
  py::gil_scoped_release unlocked;
  kernels().tree_route(op);
}

// Plans --------------------------------------------------------------------------------------------------------------

void make_plan_mask(py::handle mask_, py::handle rows_, py::handle offsets_, py::handle row_offsets_,
                    py::handle row_slots_, py::handle sources_) {
  const Contiguous mask("mask", mask_);
  if (mask.type() != kBool) throw py::type_error("mask: expected a bool tensor");
  if (mask.dims() != 1) mask.expect_dims(2);
  const NewPlan lists(rows_, offsets_, row_offsets_, row_slots_);
  const PlanBuffers plan = lists.expect(mask.size(0), mask.dims() == 2 ? mask.size(1) : 1, lists.rows.size(0));
  const MaskSources sources(sources_, mask, plan.capacity);
  py::gil_scoped_release unlocked;
  plan_mask(mask.data<const uint8_t>(), sources.data<int32_t>(), plan);
}

void make_plan_route(py::handle expert_, py::handle rows_, py::handle offsets_, py::handle row_offsets_,
                     py::handle row_slots_, py::handle sources_) {
  const Contiguous expert("expert", expert_);
  expert.expect_dims(2);
  expect_indices(expert);
  const NewPlan lists(rows_, offsets_, row_offsets_, row_slots_);
  if (lists.offsets.size(0) < 1) lists.offsets.expect_length(1, "entries at least");
  const PlanBuffers plan = lists.expect(expert.size(0), lists.offsets.size(0) - 1, lists.rows.size(0));
  const Output sources("sources", sources_);
  sources.expect(kInt32, {plan.capacity});
  py::gil_scoped_release unlocked;
  plan_route(expert.data<const void>(), expert.type() == kInt64, expert.size(1), sources.data<int32_t>(), plan);
}

void make_plan_topk(py::handle scores_, int64_t k, py::handle rows_, py::handle offsets_, py::handle row_offsets_,
                    py::handle row_slots_) {
  const Contiguous scores("scores", scores_);
  scores.expect_dims(2);
  if (scores.type() != kFloat && scores.type() != kDouble) throw py::type_error("scores: expected float32 or float64");
  if (k < 0 || k > scores.size(1))
    throw py::value_error("k: expected 0.." + std::to_string(scores.size(1)) + ", got " + std::to_string(k));
  const NewPlan lists(rows_, offsets_, row_offsets_, row_slots_);
  const PlanBuffers plan = lists.expect(scores.elements(), 1, scores.size(0) * k);
  py::gil_scoped_release unlocked;
  plan_topk(scores.data<const void>(), scores.type() == kDouble, scores.size(0), scores.size(1), k, plan);
}

void make_plan_inverse(py::handle rows_, py::handle offsets_, py::handle row_offsets_, py::handle row_slots_) {
  const Indices rows("plan.rows", rows_), offsets("plan.offsets", offsets_);
  if (offsets.size(0) < 1) offsets.expect_length(1, "entries at least");
  const Output row_offsets("row_offsets", row_offsets_), row_slots("row_slots", row_slots_);
  row_offsets.expect_dims(1);
  if (row_offsets.size(0) < 1) row_offsets.expect_length(1, "entries at least");
  row_offsets.expect(kInt32, {row_offsets.size(0)});
  row_slots.expect(kInt32, {rows.size(0)});
  const PlanBuffers b{rows.list(),  offsets.list(),      row_offsets.data<int32_t>(), row_slots.data<int32_t>(),
                      rows.size(0), offsets.size(0) - 1, row_offsets.size(0) - 1};
  py::gil_scoped_release unlocked;
  check_plan({b.rows, b.offsets, nullptr, nullptr, nullptr, b.capacity, b.groups, b.num_rows}, b.num_rows, false);
  plan_inverse(b);
}

int64_t count_selected(py::handle mask_) {
  const Contiguous mask("mask", mask_);
  return count_mask(mask.data<const uint8_t>(), mask.elements());
}

int64_t count_routed(py::handle expert_, int64_t num_groups) {
  const Contiguous expert("expert", expert_);
  expect_indices(expert);
  return count_route(expert.data<const void>(), expert.type() == kInt64, expert.elements(), num_groups);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels; dyncore/backends is their only caller.";
  m.attr("interface") = kInterface;
  find_tensor_api();
  m.def("supported_isas", &supported_isas);
  m.def("select_isa", &select_isa);
  m.def("selected_isa", &selected_isa);
  m.def("pairs", &pairs);
  m.def("pack_weight", &pack_weight);
  m.def("gather_rows", &gather_rows);
  m.def("scatter_rows", &scatter_rows);
  m.def("scatter_rows_backward", &scatter_rows_backward);
  m.def("grouped_linear", &grouped_linear);
  m.def("grouped_linear_backward", &grouped_linear_backward);
  m.def("grouped_mlp", &grouped_mlp);
  m.def("grouped_mlp_fits", &grouped_mlp_fits);
  m.def("grouped_mlp_backward", &grouped_mlp_backward);
  m.def("tree_route", &tree_route);
  define_attention(m);
  define_sparse(m);
#if defined(DYNCORE_WITH_CUDA)
  define_cuda(m);
#endif
  m.def("plan_mask", &make_plan_mask);
  m.def("plan_route", &make_plan_route);
  m.def("plan_topk", &make_plan_topk);
  m.def("plan_inverse", &make_plan_inverse);
  m.def("count_mask", &count_selected);
  m.def("count_route", &count_routed);
}

// dyncore._C: the only place that knows Python. Tensors arrive as integers (address, strides in elements; address 0
// where absent); plans are checked, then the kernels run without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/isa.h"
#include "cpu/plan.h"

namespace py = pybind11;
using namespace dyncore;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The plan as a tuple: rows, offsets, scale, row_offsets, row_slots (addresses), capacity, groups, num_rows.
Plan to_plan(const py::tuple& t) {
  const auto number = [&](size_t i) { return t[i].cast<int64_t>(); };
  const auto address = [&](size_t i) { return t[i].cast<Address>(); };
  return {at<const int32_t>(address(0)),
          at<const int32_t>(address(1)),
          at<const float>(address(2)),
          at<const int32_t>(address(3)),
          at<const int32_t>(address(4)),
          number(5),
          number(6),
          number(7)};
}

Matrix to_matrix(const py::tuple& t) {
  return {at<void>(t[0].cast<Address>()), t[1].cast<int64_t>()};
}

Weight to_weight(const py::tuple& t) {
  return {at<const void>(t[0].cast<Address>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

// Checks the plan and runs the kernel, both without the GIL.
template <class Op>
void launch(void (*Kernels::*kernel)(const Op&), const Op& op, int64_t row_limit, bool uses_inverse) {
  py::gil_scoped_release unlocked;
  check_plan(op.plan, row_limit, uses_inverse);
  (kernels().*kernel)(op);
}

void gather_rows(const py::tuple& plan, const py::tuple& x, Address out, int64_t width, int element_bytes,
                 int threads) {
  const GatherRows op{to_plan(plan), to_matrix(x), {at<void>(out), width}, width, element_bytes, threads};
  launch(&Kernels::gather_rows, op, op.plan.num_rows, false);
}

void scatter_rows(const py::tuple& plan, int dtype, const py::tuple& y, const py::tuple& base, Address out,
                  int64_t width, int threads) {
  const ScatterRows op{to_plan(plan),          Dtype(dtype), to_matrix(y), to_matrix(base),
                       {at<void>(out), width}, width,        threads};
  launch(&Kernels::scatter_rows, op, op.plan.num_rows, true);
}

void scatter_rows_backward(const py::tuple& plan, int dtype, const py::tuple& grad, const py::tuple& y, Address dy,
                           Address dscale, int64_t width, int threads) {
  const ScatterRowsBackward op{to_plan(plan), Dtype(dtype),      to_matrix(grad), to_matrix(y),
                               at<void>(dy),  at<float>(dscale), width,           threads};
  launch(&Kernels::scatter_rows_backward, op, op.plan.num_rows, false);
}

void grouped_linear(const py::tuple& plan, int dtype, int activation, bool gather, bool scatter, int64_t n, int64_t k,
                    const py::tuple& x, const py::tuple& weight, const py::tuple& bias, Address out, Address pre,
                    int threads) {
  const GroupedLinear op{
      to_plan(plan), Dtype(dtype),      Activation(activation), gather,        scatter,       n,      k,
      to_matrix(x),  to_weight(weight), to_matrix(bias),        at<void>(out), at<void>(pre), threads};
  launch(&Kernels::grouped_linear, op, op.plan.num_rows, scatter);
}

void grouped_linear_backward(const py::tuple& plan, int dtype, int activation, bool gather, bool scatter, int64_t n,
                             int64_t k, const py::tuple& grad, const py::tuple& x, const py::tuple& weight,
                             const py::tuple& bias, const py::tuple& pre, Address dx, Address dweight, Address dbias,
                             Address dscale, int threads) {
  const GroupedLinearBackward op{to_plan(plan),
                                 Dtype(dtype),
                                 Activation(activation),
                                 gather,
                                 scatter,
                                 n,
                                 k,
                                 to_matrix(grad),
                                 to_matrix(x),
                                 to_weight(weight),
                                 to_matrix(bias),
                                 to_matrix(pre),
                                 at<void>(dx),
                                 at<void>(dweight),
                                 at<void>(dbias),
                                 at<float>(dscale),
                                 threads};
  launch(&Kernels::grouped_linear_backward, op, op.plan.num_rows, gather && dx);
}

void grouped_mlp(const py::tuple& plan, int dtype, int activation, int64_t h, int64_t i, const py::tuple& x,
                 const py::tuple& w_in, const py::tuple& w_out, const py::tuple& b_in, const py::tuple& b_out,
                 const py::tuple& residual, Address out, Address pre, int threads) {
  const GroupedMlp op{to_plan(plan),
                      Dtype(dtype),
                      Activation(activation),
                      h,
                      i,
                      to_matrix(x),
                      to_weight(w_in),
                      to_weight(w_out),
                      to_matrix(b_in),
                      to_matrix(b_out),
                      to_matrix(residual),
                      at<void>(out),
                      at<void>(pre),
                      threads};
  launch(&Kernels::grouped_mlp, op, op.plan.num_rows, true);
}

void grouped_mlp_backward(const py::tuple& plan, int dtype, int activation, int64_t h, int64_t i, const py::tuple& grad,
                          const py::tuple& x, const py::tuple& w_in, const py::tuple& w_out, const py::tuple& b_out,
                          const py::tuple& pre, Address dx, Address dw_in, Address dw_out, Address db_in,
                          Address db_out, Address dscale, int threads) {
  const GroupedMlpBackward op{to_plan(plan),
                              Dtype(dtype),
                              Activation(activation),
                              h,
                              i,
                              to_matrix(grad),
                              to_matrix(x),
                              to_weight(w_in),
                              to_weight(w_out),
                              to_matrix(b_out),
                              to_matrix(pre),
                              at<void>(dx),
                              at<void>(dw_in),
                              at<void>(dw_out),
                              at<void>(db_in),
                              at<void>(db_out),
                              at<float>(dscale),
                              threads};
  launch(&Kernels::grouped_mlp_backward, op, op.plan.num_rows, dx != 0);
}

// Buffers of a plan being made, as a tuple: rows, offsets, row_offsets, row_slots, capacity, groups, num_rows.
PlanBuffers to_buffers(const py::tuple& t) {
  const auto number = [&](size_t i) { return t[i].cast<int64_t>(); };
  const auto list = [&](size_t i) { return at<int32_t>(t[i].cast<Address>()); };
  return {list(0), list(1), list(2), list(3), number(4), number(5), number(6)};
}

void make_plan_mask(Address mask, const py::tuple& plan) {
  const PlanBuffers buffers = to_buffers(plan);
  py::gil_scoped_release unlocked;
  plan_mask(at<const uint8_t>(mask), buffers);
}

void make_plan_route(Address expert, bool wide, int64_t k, Address sources, const py::tuple& plan) {
  const PlanBuffers buffers = to_buffers(plan);
  py::gil_scoped_release unlocked;
  plan_route(at<const void>(expert), wide, k, at<int32_t>(sources), buffers);
}

void make_plan_topk(Address scores, bool wide, int64_t batch, int64_t sequence, int64_t k, const py::tuple& plan) {
  const PlanBuffers buffers = to_buffers(plan);
  py::gil_scoped_release unlocked;
  plan_topk(at<const void>(scores), wide, batch, sequence, k, buffers);
}

void make_plan_inverse(const py::tuple& plan) {
  const PlanBuffers b = to_buffers(plan);
  py::gil_scoped_release unlocked;
  check_plan({b.rows, b.offsets, nullptr, nullptr, nullptr, b.capacity, b.groups, b.num_rows}, b.num_rows, false);
  plan_inverse(b);
}

int64_t count_selected(Address mask, int64_t size) {
  return count_mask(at<const uint8_t>(mask), size);
}

int64_t count_routed(Address expert, bool wide, int64_t size, int64_t num_groups) {
  return count_route(at<const void>(expert), wide, size, num_groups);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels; dyncore/backends/cpu.py is their only caller.";
  m.def("supported_isas", &supported_isas);
  m.def("select_isa", &select_isa);
  m.def("selected_isa", &selected_isa);
  m.def("gather_rows", &gather_rows);
  m.def("scatter_rows", &scatter_rows);
  m.def("scatter_rows_backward", &scatter_rows_backward);
  m.def("grouped_linear", &grouped_linear);
  m.def("grouped_linear_backward", &grouped_linear_backward);
  m.def("grouped_mlp", &grouped_mlp);
  m.def("grouped_mlp_backward", &grouped_mlp_backward);
  m.def("plan_mask", &make_plan_mask);
  m.def("plan_route", &make_plan_route);
  m.def("plan_topk", &make_plan_topk);
  m.def("plan_inverse", &make_plan_inverse);
  m.def("count_mask", &count_selected);
  m.def("count_route", &count_routed);
}

#include "bindings/sparse.h"

#include "bindings/tensor.h"
#include "common/isa.h"

namespace dyncore::bindings {

namespace {

template <class Op>
void launch(void (*Kernels::*kernel)(const Op&), const Op& op) {
  py::gil_scoped_release unlocked;
  (kernels().*kernel)(op);
}

// A bias [N] as a matrix of one row.
Matrix bias_of(const Contiguous& bias, int64_t n) {
  bias.expect_shape({n});
  return {bias.data(), n};
}

void sparse_linear(py::handle h_, py::handle weight_, py::handle bias_, float dense_from, py::handle out_,
                   int threads) {
  const Rows h("h", h_);
  const WeightMatrix weight("weight", weight_);
  const Contiguous bias("bias", bias_, Absence::allowed);
  const Output out("out", out_);
  const int64_t n = weight.size(0), k = weight.size(1);
  weight.expect_type_of(h);
  bias.expect_type_of(h);
  h.expect_shape({h.size(0), k});
  out.expect(h.type(), {h.size(0), n});
  const SparseLinear op{kernel_dtype(h),  h.size(0),  n,         k,      h.matrix(), weight.weight(),
                        bias_of(bias, n), dense_from, out.data(), threads};
  launch(&Kernels::sparse_linear, op);
}

}  // namespace

void define_sparse(py::module_& module) {
  module.def("sparse_linear", &sparse_linear);
}

}  // namespace dyncore::bindings

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
  const SparseLinear op{kernel_dtype(h), h.size(0),        n,          k,          h.matrix(),
                        weight.weight(), bias_of(bias, n), dense_from, out.data(), threads};
  launch(&Kernels::sparse_linear, op);
}

// The tensors of a Compressed activation [rows, i], all of them or none.
struct CompressedTensors {
  Output mask, row_offsets, values;
  Compressed compressed{};

  CompressedTensors(py::handle mask_, py::handle row_offsets_, py::handle values_, int64_t rows, int64_t i, bool gated,
                    const ElementType& type)
      : mask("mask", mask_, Absence::allowed),
        row_offsets("row_offsets", row_offsets_, mask ? Absence::refused : Absence::allowed),
        values("values", values_, mask ? Absence::refused : Absence::allowed) {
    if (!mask) return;
    mask.expect(kInt32, {rows, (i + 31) / 32});
    row_offsets.expect(kInt64, {rows + 1});
    values.expect_type(type);
    values.expect_dims(gated ? 2 : 1);
    const int64_t capacity = values.size(gated ? 1 : 0);
    if (gated) values.expect_shape({2, capacity});
    compressed = {mask.data<uint32_t>(), row_offsets.data<int64_t>(), values.data(), capacity};
  }
};

Activation relu_activation(int code) {
  const Activation a = Activation(code);
  if (a != Activation::relu && a != Activation::relu2 && a != Activation::reglu)
    throw py::value_error("activation: expected relu, relu2 or reglu");
  return a;
}

// out: None for the first half alone; the compressed activation and pre: None where not asked for. values must have
// room for all of [rows, i].
void sparse_mlp(py::handle x_, py::handle w_in_, py::handle w_out_, py::handle b_in_, py::handle b_out_, int activation,
                float dense_from, py::handle out_, py::handle mask_, py::handle values_, py::handle row_offsets_,
                py::handle pre_, int threads) {
  const Rows x("x", x_);
  const WeightMatrix w_in("w_in", w_in_), w_out("w_out", w_out_, Absence::allowed);
  const Contiguous b_in("b_in", b_in_, Absence::allowed), b_out("b_out", b_out_, Absence::allowed);
  const Output out("out", out_, Absence::allowed), pre("pre", pre_, Absence::allowed);
  const Activation act = relu_activation(activation);
  const bool gated = is_gated(act);
  const int64_t rows = x.size(0), h = w_in.size(1), width = w_in.size(0), i = gated ? width / 2 : width;
  x.expect_shape({rows, h});
  w_in.expect_shape({gated ? 2 * i : i, h});
  for (const Tensor* t : std::initializer_list<const Tensor*>{&w_in, &w_out, &b_in, &b_out}) t->expect_type_of(x);
  b_out.expect_shape({h});
  out.expect(x.type(), {rows, h});
  pre.expect(x.type(), {rows, width});
  const CompressedTensors saved(mask_, row_offsets_, values_, rows, i, gated, x.type());
  if (saved.mask && saved.compressed.capacity < rows * i) saved.values.expect_shape({rows * i});
  w_out.expect_shape({h, i});
  if (out && !w_out) throw py::value_error("w_out: expected a Tensor where out is asked for, got None");
  const SparseMlp op{kernel_dtype(x),
                     act,
                     rows,
                     h,
                     i,
                     x.matrix(),
                     w_in.weight(),
                     w_out ? w_out.weight() : Weight{},
                     bias_of(b_in, width),
                     bias_of(b_out, h),
                     dense_from,
                     out.data(),
                     saved.compressed,
                     pre.data(),
                     threads};
  launch(&Kernels::sparse_mlp, op);
}

}  // namespace

void define_sparse(py::module_& module) {
  module.def("sparse_linear", &sparse_linear);
  module.def("sparse_mlp", &sparse_mlp);
}

}  // namespace dyncore::bindings

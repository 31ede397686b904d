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

bool fits_plain(py::handle source, const ElementType& type, int64_t rows, int64_t columns) {
  View view;
  return glance_plain(source, view) && view.type == type && view.dims == 2 && view.sizes[0] == rows &&
         view.sizes[1] == columns;
}

bool bias_fits(py::handle source, const ElementType& type, int64_t size) {
  View view;
  return source.is_none() ||
         (glance_plain(source, view) && view.type == type && view.dims == 1 && view.sizes[0] == size);
}

// Whether these are plain CPU tensors of one dtype that has kernels, in the shapes that dyncore.sparse_linear asks: 0
// if not (Python says why), 2 if they are and only the weights of the one row's non-zeros are worth reading, else 1.
int sparse_linear_fits(py::handle h_, py::handle weight_, py::handle bias) {
  View h, weight;
  if (!glance_plain(h_, h) || !has_kernels(h.type) || h.dims < 2) return 0;
  if (!glance_plain(weight_, weight) || weight.type != h.type || weight.dims != 2) return 0;
  if (weight.sizes[1] != h.sizes[h.dims - 1] || !bias_fits(bias, h.type, weight.sizes[0])) return 0;
  return h.dims == 2 && h.sizes[0] == 1 && weight.strides[0] == 1 ? 2 : 1;
}

// The same for dyncore.sparse_mlp.
bool sparse_mlp_fits(py::handle x_, py::handle w_in, py::handle w_out_, py::handle b_in, py::handle b_out, bool gated) {
  View x, w_out;
  if (!glance_plain(x_, x) || !has_kernels(x.type) || x.dims < 2) return false;
  if (!glance_plain(w_out_, w_out) || w_out.type != x.type || w_out.dims != 2) return false;
  const int64_t h = x.sizes[x.dims - 1], width = gated ? 2 * w_out.sizes[1] : w_out.sizes[1];
  return w_out.sizes[0] == h && fits_plain(w_in, x.type, width, h) && bias_fits(b_in, x.type, width) &&
         bias_fits(b_out, x.type, h);
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

void sparse_linear_backward(py::handle grad_, py::handle h_, py::handle dweight_, int threads) {
  const Rows grad("grad", grad_), h("h", h_);
  const WeightOutput dweight("dweight", dweight_);
  const int64_t n = grad.size(1), k = h.size(1);
  grad.expect_type_of(h);
  grad.expect_length(h.size(0), "rows");
  if (!dweight) throw py::value_error("dweight: expected a Tensor, got None");
  dweight.expect(h.type(), {n, k});
  const SparseLinearBackward op{kernel_dtype(h), h.size(0),          n,      k, grad.matrix(),
                                h.matrix(),      dweight.gradient(), threads};
  launch(&Kernels::sparse_linear_backward, op);
}

// Refuses offsets that do not lead through `capacity` values, or disagree with the bits.
void check_offsets(const Compressed& c, int64_t rows, int64_t i) {
  const int64_t words = (i + 31) / 32;
  bool good = c.row_offsets[0] == 0 && c.row_offsets[rows] <= c.capacity;
  for (int64_t r = 0; r < rows && good; ++r) {
    int64_t count = 0;
    for (int64_t w = 0; w < words; ++w) count += __builtin_popcount(c.mask[r * words + w]);
    good = c.row_offsets[r + 1] - c.row_offsets[r] == count;
    if (words > 0 && i % 32 != 0) good = good && c.mask[r * words + words - 1] >> (i % 32) == 0;
  }
  if (!good) throw py::value_error("row_offsets: expected the ends of each row's values, as many as mask has bits");
}

void sparse_mlp_backward(py::handle grad_, py::handle x_, py::handle w_in_, py::handle w_out_, py::handle mask_,
                         py::handle values_, py::handle row_offsets_, int activation, py::handle dx_, py::handle dw_in_,
                         py::handle dw_out_, py::handle db_in_, py::handle db_out_, int threads) {
  const Rows grad("grad", grad_), x("x", x_);
  const WeightMatrix w_in("w_in", w_in_), w_out("w_out", w_out_);
  const Output dx("dx", dx_, Absence::allowed), db_in("db_in", db_in_, Absence::allowed),
      db_out("db_out", db_out_, Absence::allowed);
  const WeightOutput dw_in("dw_in", dw_in_), dw_out("dw_out", dw_out_);
  const Activation act = relu_activation(activation);
  const int64_t rows = x.size(0), h = w_out.size(0), i = w_out.size(1), width = is_gated(act) ? 2 * i : i;
  for (const Tensor* t : std::initializer_list<const Tensor*>{&grad, &w_in, &w_out}) t->expect_type_of(x);
  grad.expect_shape({rows, h});
  x.expect_shape({rows, h});
  w_in.expect_shape({width, h});
  dx.expect(x.type(), {rows, h});
  dw_in.expect(x.type(), {width, h});
  dw_out.expect(x.type(), {h, i});
  db_in.expect(x.type(), {width});
  db_out.expect(x.type(), {h});
  const CompressedTensors saved(mask_, row_offsets_, values_, rows, i, is_gated(act), x.type());
  if (!saved.mask) throw py::value_error("mask: expected a Tensor, got None");
  const SparseMlpBackward op{kernel_dtype(x),
                             act,
                             rows,
                             h,
                             i,
                             grad.matrix(),
                             x.matrix(),
                             w_in.weight(),
                             w_out.weight(),
                             saved.compressed,
                             dx.data(),
                             dw_in.gradient(),
                             dw_out.gradient(),
                             db_in.data(),
                             db_out.data(),
                             threads};
  py::gil_scoped_release unlocked;
  check_offsets(op.saved, rows, i);
  kernels().sparse_mlp_backward(op);
}

int64_t count_nonzeros(py::handle h_, int threads) {
  const Rows h("h", h_);
  py::gil_scoped_release unlocked;
  return kernels().count_nonzeros({kernel_dtype(h), false, h.size(0), h.size(1), h.matrix(), {}, threads});
}

// dense: [T, I], gated [T, 2I], of which the compressed tensors are, or become, what is left.
template <class Kernel>
void convert(Kernel kernel, const Tensor& dense, const Matrix& matrix, py::handle mask_, py::handle values_,
             py::handle row_offsets_, bool gated, bool reads, int threads) {
  const int64_t rows = dense.size(0), i = gated ? dense.size(1) / 2 : dense.size(1);
  if (gated) dense.expect_shape({rows, 2 * i});
  const CompressedTensors c(mask_, row_offsets_, values_, rows, i, gated, dense.type());
  if (!c.mask) throw py::value_error("mask: expected a Tensor, got None");
  if (!reads && c.compressed.capacity < rows * i) c.values.expect_shape({rows * i});
  const Compression op{kernel_dtype(dense), gated, rows, i, matrix, c.compressed, threads};
  py::gil_scoped_release unlocked;
  if (reads) check_offsets(c.compressed, rows, i);
  (kernels().*kernel)(op);
}

void compress(py::handle dense_, py::handle mask_, py::handle values_, py::handle row_offsets_, bool gated,
              int threads) {
  const Rows dense("pre", dense_);
  convert(&Kernels::compress, dense, dense.matrix(), mask_, values_, row_offsets_, gated, false, threads);
}

void expand(py::handle dense_, py::handle mask_, py::handle values_, py::handle row_offsets_, bool gated, int threads) {
  const Output dense("pre", dense_);
  dense.expect_dims(2);
  const Matrix matrix{dense.data(), dense.size(1)};
  convert(&Kernels::expand, dense, matrix, mask_, values_, row_offsets_, gated, true, threads);
}

}  // namespace

void define_sparse(py::module_& module) {
  module.def("sparse_linear", &sparse_linear);
  module.def("sparse_linear_fits", &sparse_linear_fits);
  module.def("sparse_mlp_fits", &sparse_mlp_fits);
  module.def("sparse_linear_backward", &sparse_linear_backward);
  module.def("sparse_mlp", &sparse_mlp);
  module.def("sparse_mlp_backward", &sparse_mlp_backward);
  module.def("count_nonzeros", &count_nonzeros);
  module.def("compress", &compress);
  module.def("expand", &expand);
}

}  // namespace dyncore::bindings

// Attention: tensors of heads, and the marks that say which pairs count.
#include "bindings/attention.h"

#include "bindings/tensor.h"
#include "common/isa.h"
#include "cpu/attention_order.h"

namespace dyncore::bindings {

namespace {

// [B, heads, N, D], the elements of D side by side.
struct HeadTensor : Tensor {
  HeadTensor(const char* name, py::handle source) : Tensor(name, source) {
    expect_dims(4);
    if (stride(3) != 1) convert("contiguous");
  }
  Heads heads() const { return {data(), stride(0), stride(1), stride(2)}; }
};

// The same for a kernel to write, never in a copy.
struct HeadOutput : Tensor {
  HeadOutput(const char* name, py::handle source, Absence absence = Absence::refused) : Tensor(name, source, absence) {
    expect_dims(4);
    if (*this && stride(3) != 1) throw py::value_error(std::string(name) + ": expected rows side by side");
  }
  Heads heads() const { return *this ? Heads{data(), stride(0), stride(1), stride(2)} : Heads{nullptr, 0, 0, 0}; }
};

// q, k and v and what says which of their pairs count.
struct AttentionInputs {
  HeadTensor q, k, v;
  Contiguous q_positions, k_positions, q_live, k_live, bias;
  int64_t batch, heads, kv_heads, queries, keys, d, e;

  AttentionInputs(py::handle q_, py::handle k_, py::handle v_, py::handle q_positions_, py::handle k_positions_,
                  py::handle q_live_, py::handle k_live_, py::handle bias_)
      : q("q", q_),
        k("k", k_),
        v("v", v_),
        q_positions("q_positions", q_positions_, Absence::allowed),
        k_positions("k_positions", k_positions_, Absence::allowed),
        q_live("q_live", q_live_, Absence::allowed),
        k_live("k_live", k_live_, Absence::allowed),
        bias("bias", bias_, Absence::allowed),
        batch(q.size(0)),
        heads(q.size(1)),
        kv_heads(k.size(1)),
        queries(q.size(2)),
        keys(k.size(2)),
        d(q.size(3)),
        e(v.size(3)) {
    k.expect_type_of(q);
    v.expect_type_of(q);
    k.expect_shape({batch, kv_heads, keys, d});
    v.expect_shape({batch, kv_heads, keys, e});
    if (kv_heads == 0 ? heads != 0 : heads % kv_heads != 0)
      throw py::value_error("k: expected a number of heads that divides " + std::to_string(heads));
    expect_positions(q_positions, queries);
    expect_positions(k_positions, keys);
    expect_marks(q_live, kBool, queries);
    expect_marks(k_live, kBool, keys);
    expect_marks(bias, kFloat, keys);
  }

  AttentionMarks marks(bool causal) const {
    return {batch,
            queries,
            keys,
            causal,
            q_positions.data<const int32_t>(),
            k_positions.data<const int32_t>(),
            q_positions && q_positions.size(0) != 1 ? queries : 0,
            k_positions && k_positions.size(0) != 1 ? keys : 0,
            q_live.data<const uint8_t>(),
            k_live.data<const uint8_t>()};
  }

 private:
  void expect_positions(const Contiguous& positions, int64_t count) const {
    positions.expect_dims(2);
    positions.expect_type(kInt32);
    positions.expect_shape({positions && positions.size(0) == 1 ? 1 : batch, count});
  }
  void expect_marks(const Contiguous& marks, const ElementType& type, int64_t count) const {
    marks.expect_type(type);
    marks.expect_shape({batch, count});
  }
};

void attention(py::handle q, py::handle k, py::handle v, py::handle q_positions, py::handle k_positions,
               py::handle q_live, py::handle k_live, py::handle bias, bool causal, float scale, py::handle out_,
               py::handle logarithm_, int threads) {
  const AttentionInputs in(q, k, v, q_positions, k_positions, q_live, k_live, bias);
  const HeadOutput out("out", out_);
  const Output logarithm("logarithm", logarithm_);
  out.expect_type_of(in.q);
  out.expect_shape({in.batch, in.heads, in.queries, in.e});
  logarithm.expect(kFloat, {in.batch, in.heads, in.queries});
  const Dtype dtype = kernel_dtype(in.q);
  py::gil_scoped_release unlocked;
  const AttentionLists lists(in.marks(causal));
  kernels().attention({dtype, in.batch, in.heads, in.kv_heads, in.queries, in.keys, in.d, in.e, in.q.heads(),
                       in.k.heads(), in.v.heads(), in.bias.data<const float>(), lists.order(), scale, out.heads(),
                       logarithm.data<float>(), threads});
}

void attention_backward(py::handle grad_, py::handle q, py::handle k, py::handle v, py::handle out_,
                        py::handle logarithm_, py::handle q_positions, py::handle k_positions, py::handle q_live,
                        py::handle k_live, py::handle bias, bool causal, float scale, py::handle dq_, py::handle dk_,
                        py::handle dv_, int threads) {
  const AttentionInputs in(q, k, v, q_positions, k_positions, q_live, k_live, bias);
  const HeadTensor grad("grad", grad_), out("out", out_);
  const Contiguous logarithm("logarithm", logarithm_);
  const HeadOutput dq("dq", dq_, Absence::allowed), dk("dk", dk_, Absence::allowed), dv("dv", dv_, Absence::allowed);
  for (const HeadTensor* t : {&grad, &out}) {
    t->expect_type_of(in.q);
    t->expect_shape({in.batch, in.heads, in.queries, in.e});
  }
  logarithm.expect_type(kFloat);
  logarithm.expect_shape({in.batch, in.heads, in.queries});
  for (const HeadOutput* t : {&dq, &dk, &dv}) t->expect_type_of(in.q);
  dq.expect_shape({in.batch, in.heads, in.queries, in.d});
  dk.expect_shape({in.batch, in.kv_heads, in.keys, in.d});
  dv.expect_shape({in.batch, in.kv_heads, in.keys, in.e});
  const Dtype dtype = kernel_dtype(in.q);
  py::gil_scoped_release unlocked;
  const AttentionLists lists(in.marks(causal));
  kernels().attention_backward({dtype,
                                in.batch,
                                in.heads,
                                in.kv_heads,
                                in.queries,
                                in.keys,
                                in.d,
                                in.e,
                                grad.heads(),
                                in.q.heads(),
                                in.k.heads(),
                                in.v.heads(),
                                out.heads(),
                                in.bias.data<const float>(),
                                logarithm.data<const float>(),
                                lists.order(),
                                scale,
                                dq.heads(),
                                dk.heads(),
                                dv.heads(),
                                threads});
}

}  // namespace

void define_attention(py::module_& m) {
  m.def("attention", &attention);
  m.def("attention_backward", &attention_backward);
}

}  // namespace dyncore::bindings

// The CPU kernels as the bindings see them: arguments are raw pointers, sizes and strides (in elements), and one table
// of functions exists per instruction set. Letters: T rows, A slots, G groups, H model width, I hidden width, N
// outputs.
#pragma once
#include "common/types.h"

namespace dyncore {

enum class Activation : int { none, relu, relu2, gelu, gelu_tanh, silu, swiglu, geglu, reglu };

inline bool is_gated(Activation a) {
  return a == Activation::swiglu || a == Activation::geglu || a == Activation::reglu;
}

// [G, N, K]; one of the two inner strides is 1.
struct Weight {
  const void* data;
  int64_t stride_g, stride_n, stride_k;
  const float* panels = nullptr;    // the same packed by pack_weight for this instruction set, or null
  int64_t panels_g = 0, panel = 0;  // words of a group's panels, and of one
};

// A weight to panels [G][parts][ceil(N / parts / 32)][words][32]; words: K, or of bfloat16 where `Kernels::pairs`,
// ceil(K / 2). A gated weight has two parts, its halves, for its products begin at either.
struct PackWeight {
  Dtype dtype;
  int64_t groups, parts, n, k;
  Weight weight;
  float* panels;
  int threads;
};

struct GatherRows {
  Plan plan;
  Matrix x, out;
  int64_t width;
  int element_bytes;
  int threads;
};

struct ScatterRows {
  Plan plan;
  Dtype dtype;
  Matrix y, base, out;
  int64_t width;
  int threads;
};

struct ScatterRowsBackward {
  Plan plan;
  Dtype dtype;
  Matrix grad, y;
  void* dy;       // [A, D] or null
  float* dscale;  // [A] or null
  int64_t width;
  int threads;
};

struct GroupedLinear {
  Plan plan;
  Dtype dtype;
  Activation activation;
  bool gather, scatter;
  int64_t n, k;
  Matrix x;
  Weight weight;
  Matrix bias;
  void* out;  // [T, N] or [A, N]
  void* pre;  // [A, N] or null
  int threads;
};

struct GroupedLinearBackward {
  Plan plan;
  Dtype dtype;
  Activation activation;
  bool gather, scatter;
  int64_t n, k;
  Matrix grad, x;
  Weight weight;
  Matrix bias, pre;
  void* dx;       // [T, K] or [A, K], or null
  void* dweight;  // [G, N, K] or null
  void* dbias;    // [G, N] or null
  float* dscale;  // [A] or null
  int threads;
};

struct GroupedMlp {
  Plan plan;
  Dtype dtype;
  Activation activation;
  int64_t h, i;
  Matrix x;
  Weight w_in, w_out;
  Matrix b_in, b_out, residual;
  void* out;  // [T, H]
  void* pre;  // [A, I or 2I] or null
  int threads;
};

struct GroupedMlpBackward {
  Plan plan;
  Dtype dtype;
  Activation activation;
  int64_t h, i;
  Matrix grad, x;
  Weight w_in, w_out;
  Matrix b_out, pre;
  void* dx;      // [T, H] or null
  void* dw_in;   // [G, I or 2I, H] or null
  void* dw_out;  // [G, H, I], or [G, I, H] where dw_out_by_neuron; or null
  bool dw_out_by_neuron;
  void* db_in;    // [G, I or 2I] or null
  void* db_out;   // [G, H] or null
  float* dscale;  // [A] or null
  int threads;
};

// A complete binary tree of decisions: see tree_route.cpp.
struct TreeRoute {
  Dtype dtype;
  int64_t rows, width;
  int depth;
  Matrix x, weight;  // [T, D], [2^depth - 1, D]
  const void* bias;  // [2^depth - 1] or null
  int32_t* leaves;   // [T]
  int threads;
};

// [B, heads, N, D]; the elements of D lie side by side.
struct Heads {
  void* data;  // null where absent
  int64_t stride_b, stride_h, stride_n;
};

// Which pairs of queries and keys count: of the keys, in this order, a prefix for each query (attention_order.h).
struct AttentionOrder {
  const int32_t* keys;          // [B, M]: live keys by position, then those that are not live
  const int32_t* key_counts;    // [B]: how many are live
  const int32_t* queries;       // [B, N]: those that attend to any key, by how many, most first; then the others
  const int32_t* query_counts;  // [B]: how many attend to any
  const int32_t* limits;        // [B, N]: queries[b][i] attends to keys[b][0 ... limits[b][i])
};

// softmax(scale q k^T + bias) v over the pairs that count; 0 for a query that has none.
struct Attention {
  Dtype dtype;
  int64_t batch, heads, kv_heads, queries, keys, d, e;
  Heads q, k, v;
  const float* bias;  // [B, M] or null
  AttentionOrder order;
  float scale;
  Heads out;         // [B, heads, N, E]
  float* logarithm;  // [B, heads, N]: log2 of the softmax's denominator; infinity for a query that has no pair
  int threads;
};

struct AttentionBackward {
  Dtype dtype;
  int64_t batch, heads, kv_heads, queries, keys, d, e;
  Heads grad, q, k, v, out;
  const float* bias;
  const float* logarithm;
  AttentionOrder order;
  float scale;
  Heads dq, dk, dv;  // in the shapes of q, k and v; data are null where a gradient is not asked for
  int threads;
};

// out = h weight^T + bias without the products of h's zeros. A row of whose elements more than dense_from (a share) are
// not 0 may get a dense product, in which its zeros meet the weights.
struct SparseLinear {
  Dtype dtype;
  int64_t rows, n, k;
  Matrix h;       // [T, K]
  Weight weight;  // [1, N, K]
  Matrix bias;
  float dense_from;
  void* out;  // [T, N]
  int threads;
};

// What a ReLU's zeros leave of a hidden activation [T, I].
struct Compressed {
  uint32_t* mask;        // [T, ceil(I / 32)]: a bit for every neuron that is not 0; may be null where T or I is 0
  int64_t* row_offsets;  // [T + 1]
  void* values;          // [capacity], or [2, capacity] where gated: gates, then the other half
  int64_t capacity;
};

// out = W_out act(W_in x + b_in) + b_out without what the zeros of relu, relu2 or the gate of reglu would multiply.
struct SparseMlp {
  Dtype dtype;
  Activation activation;
  int64_t rows, h, i;
  Matrix x;
  Weight w_in, w_out;  // [1, I or 2I, H], [1, H, I]
  Matrix b_in, b_out;
  float dense_from;
  void* out;         // [T, H], or null: the first half alone
  Compressed saved;  // row_offsets are null where it is not asked for
  void* pre;         // [T, I]: relu, or [T, 2I]: relu of the gates, the other half (0 where a gate is 0); or null
  int threads;
};

// The gradient of a weight [N, K], all of whose memory is written; null where it is not asked for.
struct WeightGradient {
  void* data;
  int64_t stride_n, stride_k;  // one of them is 1
};

struct SparseMlpBackward {
  Dtype dtype;
  Activation activation;
  int64_t rows, h, i;
  Matrix grad, x;
  Weight w_in, w_out;
  Compressed saved;  // as sparse_mlp left it
  void* dx;          // [T, H] or null
  WeightGradient dw_in, dw_out;
  void* db_in;   // [I or 2I] or null
  void* db_out;  // [H] or null
  int threads;
};

// dweight = grad^T h without the products of h's zeros.
struct SparseLinearBackward {
  Dtype dtype;
  int64_t rows, n, k;
  Matrix grad, h;
  WeightGradient dweight;
  int threads;
};

// Between [T, I], or [T, 2I] where gated, and what is left of it without the zeros of its first half.
struct Compression {
  Dtype dtype;
  bool gated;
  int64_t rows, i;
  Matrix dense;
  Compressed compressed;
  int threads;
};

// Every function writes its outputs completely and expects a plan that passed check_plan (csrc/cpu/plan.h).
struct Kernels {
  bool pairs;  // bfloat16 is multiplied in pairs: a word of a panel holds two
  void (*pack_weight)(const PackWeight&);
  void (*gather_rows)(const GatherRows&);
  void (*scatter_rows)(const ScatterRows&);
  void (*scatter_rows_backward)(const ScatterRowsBackward&);
  void (*grouped_linear)(const GroupedLinear&);
  void (*grouped_linear_backward)(const GroupedLinearBackward&);
  void (*grouped_mlp)(const GroupedMlp&);
  void (*grouped_mlp_backward)(const GroupedMlpBackward&);
  void (*tree_route)(const TreeRoute&);
  void (*attention)(const Attention&);
  void (*attention_backward)(const AttentionBackward&);
  void (*sparse_linear)(const SparseLinear&);
  void (*sparse_linear_backward)(const SparseLinearBackward&);
  void (*sparse_mlp)(const SparseMlp&);
  void (*sparse_mlp_backward)(const SparseMlpBackward&);
  int64_t (*count_nonzeros)(const Compression&);  // of the first half
  void (*compress)(const Compression&);
  void (*expand)(const Compression&);
};

}  // namespace dyncore

// The kernels of one instruction set, as a table for csrc/common/isa.cpp to choose from.
#include "cpu/common/vec.h"
#include "cpu/kernels.h"

namespace dyncore::DYNCORE_ISA {

void pack_weight(const PackWeight&);
void gather_rows(const GatherRows&);
void scatter_rows(const ScatterRows&);
void scatter_rows_backward(const ScatterRowsBackward&);
void grouped_linear(const GroupedLinear&);
void grouped_linear_backward(const GroupedLinearBackward&);
void grouped_mlp(const GroupedMlp&);
void grouped_mlp_backward(const GroupedMlpBackward&);
void tree_route(const TreeRoute&);
void attention(const Attention&);
void attention_backward(const AttentionBackward&);
void sparse_linear(const SparseLinear&);
void sparse_linear_backward(const SparseLinearBackward&);
void sparse_mlp(const SparseMlp&);
void sparse_mlp_backward(const SparseMlpBackward&);
int64_t count_nonzeros(const Compression&);
void compress(const Compression&);
void expand(const Compression&);

const Kernels& table();
const Kernels& table() {
  static const Kernels kernels{kPairs<bf16>,
                               pack_weight,
                               gather_rows,
                               scatter_rows,
                               scatter_rows_backward,
                               grouped_linear,
                               grouped_linear_backward,
                               grouped_mlp,
                               grouped_mlp_backward,
                               tree_route,
                               attention,
                               attention_backward,
                               sparse_linear,
                               sparse_linear_backward,
                               sparse_mlp,
                               sparse_mlp_backward,
                               count_nonzeros,
                               compress,
                               expand};
  return kernels;
}

}  // namespace dyncore::DYNCORE_ISA

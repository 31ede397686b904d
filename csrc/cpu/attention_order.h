// Which pairs of an attention count, brought into an order in which they are one prefix of the keys for each query.
// Linear where positions ascend already, else a sort: no instruction set of its own.
#pragma once
#include <vector>

#include "cpu/kernels.h"

namespace dyncore {

// What attention is told about its queries [B, N] and keys [B, M], each null where nothing is.
struct AttentionMarks {
  int64_t batch, queries, keys;
  bool causal;
  const int32_t *q_positions, *k_positions;
  int64_t q_positions_stride, k_positions_stride;  // from one sequence to the next; 0: one for all
  const uint8_t *q_live, *k_live;
};

// Owns the lists of an AttentionOrder.
class AttentionLists {
 public:
  explicit AttentionLists(const AttentionMarks& marks);
  AttentionOrder order() const {
    return {keys_.data(), key_counts_.data(), queries_.data(), query_counts_.data(), limits_.data()};
  }

 private:
  std::vector<int32_t> keys_, key_counts_, queries_, query_counts_, limits_;
};

}  // namespace dyncore

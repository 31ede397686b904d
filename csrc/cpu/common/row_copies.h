// Copies of a left operand's rows, for those that lie a multiple of 4096 bytes apart: all rows of a register tile then
// map to one set of the L1 cache, which has fewer ways than the tile has rows, and every broadcast comes from L2.
// Measured on Zen 4, 512 rows, one thread: K=1024 float 94.8 to 102 GFLOP/s, K=2048 bfloat16 pairs 199 to 212.
#pragma once
#include "cpu/common/pieces.h"

namespace dyncore::DYNCORE_ISA {

constexpr int kL1Ways = 8;
// Fewer output columns do not repay the copies.
constexpr int64_t kCopyColumns = 1024;
// Larger copies would take more than half of the scratch memory that a thread keeps between calls.
constexpr size_t kCopyBytes = 32 << 20;

template <class T>
class RowCopies {
 public:
  // For the products of `slots` slots at a time, in pieces of `plan`, with `columns` columns in all.
  static RowCopies plan(const Plan& plan, Left<T> rows, int64_t depth, int64_t columns, int64_t slots) {
    RowCopies c;
    c.rows_ = rows;
    c.depth_ = depth;
    // Rows that are widened are copied anyway, tile by tile.
    const bool crowd =
        !kWidenRows<T> && MR > kL1Ways && rows.stride != 0 && rows.stride * static_cast<int64_t>(sizeof(T)) % 4096 == 0;
    const Workspace<T> copies{slots, workspace_stride(depth)};
    if (crowd && columns >= kCopyColumns && copies.bytes() <= kCopyBytes && largest_group(plan) >= kDotRows<T>)
      c.copies_ = copies;
    return c;
  }

  size_t bytes() const { return copies_.bytes(); }
  void place(void* at) { copies_.place(at); }
  explicit operator bool() const { return bool(copies_); }

  // Each thread of the team copies its share of a block's rows.
  void make(const Pieces::Span& block, const Team& team) {
    for (int64_t i = 0; i < block.count; ++i) {
      const Piece& piece = block.pieces[i];
      if (!copied(piece.group_rows)) continue;
      const int64_t first = piece.first - block.first_slot(), end = piece.rows * (team.index + 1) / team.size;
      for (int64_t r = piece.rows * team.index / team.size; r < end; ++r)
        std::memcpy(copies_.row(first + r), rows_.row(piece.first + r), depth_ * sizeof(T));
    }
  }

  // The rows of a piece of the block, or of a part of one.
  Left<T> of(const Piece& piece, const Pieces::Span& block) const {
    if (copied(piece.group_rows)) return {copies_.row(piece.first - block.first_slot()), copies_.stride, nullptr};
    return rows_.from(piece.first);
  }

 private:
  // The dot form has few rows in a tile.
  bool copied(int64_t group_rows) const { return copies_ && group_rows >= kDotRows<T>; }

  Left<T> rows_ = {};  // by slot
  int64_t depth_ = 0;
  Workspace<T> copies_ = {};
};

}  // namespace dyncore::DYNCORE_ISA

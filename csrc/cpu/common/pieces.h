// How the work of a grouped op is cut: a plan's slots into blocks whose operands stay in cache, each block into pieces
// of one group, each piece into items: a panel of 32 columns for some of its rows.
#pragma once
#include "common/threads.h"
#include "cpu/common/team_scratch.h"

namespace dyncore::DYNCORE_ISA {

struct Piece {
  int64_t group, first, rows;  // slots [first, first + rows)
  int64_t group_rows;
};

class Pieces {
 public:
  // Blocks of at most `limit` slots, where a group that fits in one is not split: its weights are read once.
  static Pieces plan(const Plan& plan, int64_t limit) {
    Pieces p;
    p.plan_ = &plan;
    p.limit_ = limit;
    p.capacity_ = groups_with_slots(plan) + plan.live() / limit + 1;
    return p;
  }

  size_t bytes() const { return capacity_ * (sizeof(Piece) + sizeof(int64_t)) + sizeof(int64_t); }

  // Places the pieces and makes them.
  void place(void* at) {
    starts_ = static_cast<int64_t*>(at);
    pieces_ = reinterpret_cast<Piece*>(starts_ + capacity_ + 1);
    int64_t count = 0, in_block = 0;
    for (int64_t g = 0; g < plan_->groups; ++g) {
      const int64_t first = plan_->offsets[g], m = plan_->offsets[g + 1] - first;
      const int64_t parts = (m + limit_ - 1) / limit_;
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t begin = m * i / parts, rows = m * (i + 1) / parts - begin;
        if (blocks_ == 0 || in_block + rows > limit_) {
          starts_[blocks_++] = count;
          in_block = 0;
        }
        pieces_[count++] = {g, first + begin, rows, m};
        in_block += rows;
      }
    }
    starts_[blocks_] = count;
  }

  int64_t blocks() const { return blocks_; }

  // Some pieces, one after another.
  struct Span {
    const Piece* pieces;
    int64_t count;

    int64_t first_slot() const { return pieces[0].first; }
  };
  Span block(int64_t b) const { return {pieces_ + starts_[b], starts_[b + 1] - starts_[b]}; }
  Span all() const { return {pieces_, blocks_ ? starts_[blocks_] : 0}; }

 private:
  const Plan* plan_ = nullptr;
  int64_t limit_ = 0, capacity_ = 0;
  int64_t blocks_ = 0;
  int64_t* starts_ = nullptr;
  Piece* pieces_ = nullptr;
};

// The items of a span's products: each piece by panels of 32 of `columns` columns, and by parts of its rows where there
// are few panels for the threads. Weights are packed once more for every part; the sums are the same.
class Cut {
 public:
  Cut(const Pieces::Span& span, int64_t columns, int threads) : span_(span), columns_(columns) {
    int64_t largest = 0;
    for (int64_t i = 0; i < span.count; ++i)
      if (span.pieces[i].rows > largest) largest = span.pieces[i].rows;
    const int64_t undivided = span.count * panels_of(columns), wanted = 3 * static_cast<int64_t>(threads);
    const int64_t most = (largest + 2 * MR - 1) / (2 * MR);
    if (threads > 1 && undivided > 0) parts_ = (wanted - 1) / undivided + 1;
    if (parts_ > most) parts_ = most > 0 ? most : 1;
  }

  int64_t items() const { return span_.count * panels_of(columns_) * parts_; }

  struct Item {
    Piece piece;                  // of its rows, the item's
    int64_t n0;                   // first column
    int n;                        // columns
    bool continues;               // the same thread is expected to go on with
    int64_t next_group, next_n0;  // this
  };

  Item item(Items::Item taken) const {
    const int64_t at = taken.index / parts_, part = taken.index % parts_, panels = panels_of(columns_);
    Piece piece = span_.pieces[at / panels];
    const int64_t n0 = at % panels * NC, begin = piece.rows * part / parts_, end = piece.rows * (part + 1) / parts_;
    piece.first += begin;
    piece.rows = end - begin;
    const int64_t next = taken.continues && parts_ == 1 ? at + 1 : at;
    return {piece, n0, panel_width(columns_, n0), next > at, span_.pieces[next / panels].group, next % panels * NC};
  }

 private:
  Pieces::Span span_;
  int64_t columns_, parts_ = 1;
};

// The columns of a weight that the item after this one needs, if the same thread goes on with it; else null.
template <class T>
inline const T* next_columns(const Weight& w, const Cut::Item& item, bool transposed) {
  if (!item.continues) return nullptr;
  return weight_of_group<T>(w, item.next_group, transposed).from_column(item.next_n0).data;
}

}  // namespace dyncore::DYNCORE_ISA

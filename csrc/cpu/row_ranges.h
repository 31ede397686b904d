// A plan cut by rows: where rows have several slots, the results of a range's slots stay in cache until they are summed
// into its rows, and in the scratch memory that is kept between calls.
#pragma once
#include "common/types.h"

namespace dyncore {

class RowRanges {
 public:
  // slot_bytes: the results kept of a slot; 0 where the plan shall stay whole. Throws std::bad_alloc.
  RowRanges(const Plan& plan, int64_t slot_bytes);
  ~RowRanges();
  RowRanges(const RowRanges&) = delete;
  RowRanges& operator=(const RowRanges&) = delete;

  int64_t count() const { return count_; }

  struct Range {
    int64_t first_row;
    Plan plan;  // of the rows from first_row on, counted from there; without padding if there are several ranges
  };
  // Valid until the next call.
  Range range(int64_t i);

 private:
  const Plan& plan_;
  int64_t count_;
  int32_t* buffer_;
};

}  // namespace dyncore

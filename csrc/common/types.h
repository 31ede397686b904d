// What the kernels of every device are called with: element types, matrices and plans as raw pointers and sizes.
// Letters: T rows, A slots, G groups.
#pragma once
#include <cstdint>

namespace dyncore {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct Plan {
  const int32_t* rows;         // [A]
  const int32_t* offsets;      // [G+1]
  const float* scale;          // [A] or null
  const int32_t* row_offsets;  // [T+1]
  const int32_t* row_slots;    // [A]
  int64_t capacity;            // A, padding included
  int64_t groups;              // G
  int64_t num_rows;            // T

  int64_t live() const { return offsets[groups]; }
};

// A plan being made.
struct PlanBuffers {
  int32_t* rows;         // [capacity]
  int32_t* offsets;      // [groups+1]
  int32_t* row_offsets;  // [num_rows+1]
  int32_t* row_slots;    // [capacity]
  int64_t capacity, groups, num_rows;
};

struct Matrix {
  void* data;  // null where absent
  int64_t stride;
};

}  // namespace dyncore

// gather_rows: out[a] = x[rows[a]], padding slots 0. Bound by memory; any element size.
#include "common/threads.h"
#include "cpu/common/vec.h"
#include "cpu/kernels.h"

namespace dyncore::DYNCORE_ISA {

namespace {

void body(void* context, const Team& team) {
  const GatherRows& op = *static_cast<const GatherRows*>(context);
  const int64_t row_bytes = op.width * op.element_bytes, live = op.plan.live();
  const char* x = static_cast<const char*>(op.x.data);
  char* out = static_cast<char*>(op.out.data);
  const int64_t end = op.plan.capacity * (team.index + 1) / team.size;
  for (int64_t a = op.plan.capacity * team.index / team.size; a < end; ++a) {
    if (a < live) {
      std::memcpy(out + a * row_bytes, x + op.plan.rows[a] * op.x.stride * op.element_bytes, row_bytes);
    } else {
      std::memset(out + a * row_bytes, 0, row_bytes);
    }
  }
}

}  // namespace

void gather_rows(const GatherRows& op) {
  if (op.width == 0) return;  // nothing to write, and no memory to read
  const double bytes = 2.0 * op.plan.capacity * op.width * op.element_bytes;
  GatherRows context = op;
  parallel(useful_threads(op.threads, 0, bytes), body, &context);
}

}  // namespace dyncore::DYNCORE_ISA

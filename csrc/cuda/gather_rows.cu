// gather_rows: out[a] = x[rows[a]], padding slots 0; any element size. Bound by memory: words of 16 bytes where rows
// are aligned so, four in flight a thread.
#include "cuda/common/launch.h"
#include "cuda/common/rows.h"

namespace dyncore::cuda {

namespace {

constexpr int kWordsInFlight = 4;

template <class Word>
__global__ void __launch_bounds__(kRowThreads)
    copy_rows(const char* x, int64_t x_stride, const int32_t* rows, const int32_t* live, int64_t capacity, char* out,
              int64_t words, Team team) {
  const int64_t a = team.row();
  if (a >= capacity) return;
  Word* const to = reinterpret_cast<Word*>(out) + a * words;
  const Word* const from = a < *live ? reinterpret_cast<const Word*>(x + rows[a] * x_stride) : nullptr;
  const int64_t step = team.lanes();
  for (int64_t w0 = team.lane(); w0 < words; w0 += kWordsInFlight * step) {
    Word held[kWordsInFlight];
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i) {
      held[i] = Word{};
      if (from && w0 + i * step < words) held[i] = from[w0 + i * step];
    }
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i)
      if (w0 + i * step < words) to[w0 + i * step] = held[i];
  }
}

template <class Word>
void copy(const GatherRows& op, Stream stream) {
  const int64_t words = op.width * op.element_bytes / int64_t{sizeof(Word)};
  const Team team = team_for(words, kWordsInFlight, kRowThreads);
  launch("gather_rows", stream, ceil_div<int64_t>(op.plan.capacity, team.rows_per_block()), kRowThreads, 0,
         copy_rows<Word>, static_cast<const char*>(op.x.data), op.x.stride * op.element_bytes, op.plan.rows,
         op.plan.offsets + op.plan.groups, op.plan.capacity, static_cast<char*>(op.out.data), words, team);
}

}  // namespace

void gather_rows(const GatherRows& op, Stream stream) {
  if (op.width == 0) return;  // nothing to write
  const int64_t bytes = op.element_bytes;
  switch (word_bytes({address(op.x.data), address(op.out.data), op.x.stride * bytes, op.width * bytes})) {
    case 16:
      return copy<uint4>(op, stream);
    case 8:
      return copy<uint2>(op, stream);
    case 4:
      return copy<uint32_t>(op, stream);
    case 2:
      return copy<uint16_t>(op, stream);
    default:
      return copy<uint8_t>(op, stream);
  }
}

}  // namespace dyncore::cuda

// plan_topk: the k best rows of each sequence, one block a sequence. A radix selection of 8 bits at a time finds the
// k-th best key; a scan in the order of the rows then gives each row that is better, and the first of those equal, its
// slot. Bound by latency: five passes over the keys, which stay in shared memory up to about 10000 rows.
#include "cuda/common/block.h"
#include "cuda/common/elements.h"
#include "cuda/common/launch.h"

namespace dyncore::cuda {

namespace {

constexpr int kMostThreads = 1024;
constexpr int kDigits = 256;            // and the fewest threads: each looks after one
constexpr int64_t kMostStaged = 10240;  // keys, in 40 KB

struct Keys {
  const void* scores;  // of the block's sequence
  Dtype dtype;
  unsigned* staged;  // or null

  __device__ unsigned read(int s) const { return ordered(load_element(scores, dtype, s)); }
  __device__ unsigned operator()(int s) const { return staged ? staged[s] : read(s); }
};

// The key that exactly `k` keys reach or beat once ties are broken; *ties says how many of those equal to it count.
__device__ unsigned kth_best(const Keys& keys, int sequence, int k, int* ties) {
  static __shared__ int counts[kDigits];
  static __shared__ int found[2];  // the digit, and how many keys lie above it
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  unsigned bound = 0, decided = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (thread < kDigits) counts[thread] = 0;
    __syncthreads();
    for (int s0 = 0; s0 < sequence; s0 += threads) {
      const int s = s0 + thread;
      const unsigned key = s < sequence ? keys(s) : 0;
      const bool candidate = s < sequence && (key & decided) == bound;
      const unsigned digit = candidate ? key >> shift & (kDigits - 1) : kDigits;
      const unsigned peers = __match_any_sync(kAllLanes, digit);  // the exponents of most scores are alike
      if (candidate && (peers & lanes_below()) == 0) atomicAdd(counts + digit, __popc(peers));
    }
    __syncthreads();
    const int digit = kDigits - 1 - thread, count = thread < kDigits ? counts[digit] : 0;
    int total;
    const int above = sum_before_thread(count, &total);
    if (above < k && k <= above + count) {
      found[0] = digit;
      found[1] = above;
    }
    __syncthreads();
    bound |= static_cast<unsigned>(found[0]) << shift;
    decided |= static_cast<unsigned>(kDigits - 1) << shift;
    k -= found[1];
  }
  *ties = k;
  return bound;
}

__global__ void __launch_bounds__(kMostThreads, 1)
    select_best(const void* scores, Dtype dtype, int sequence, int k, bool stage, PlanBuffers plan) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t first = int64_t{blockIdx.x} * sequence;
  Keys keys{element_address(scores, dtype, first), dtype, nullptr};
  if (stage) {
    unsigned* const staged = shared_memory<unsigned>();
    for (int s = thread; s < sequence; s += threads) staged[s] = keys.read(s);
    keys.staged = staged;  // each thread will read those it wrote
  }
  int ties = 0;
  const unsigned bound = k > 0 ? kth_best(keys, sequence, k, &ties) : 0xffffffffu;

  int64_t counted = 0;  // keys above the bound in the low half, keys equal to it in the high half
  const int64_t slot0 = int64_t{blockIdx.x} * k;
  for (int s0 = 0; s0 < sequence; s0 += threads) {
    const int s = s0 + thread;
    const unsigned key = s < sequence ? keys(s) : 0;
    const bool above = s < sequence && key > bound, equal = s < sequence && key == bound;
    int64_t total;
    const int64_t before = counted + sum_before_thread<int64_t>(int64_t{above} | int64_t{equal} << 32, &total);
    counted += total;
    if (s >= sequence) continue;
    const int equal_before = static_cast<int>(before >> 32);
    const int64_t slot = slot0 + static_cast<int>(before) + min(equal_before, ties);
    plan.row_offsets[first + s] = static_cast<int32_t>(slot);
    if (above || (equal && equal_before < ties)) {
      plan.rows[slot] = static_cast<int32_t>(first + s);
      plan.row_slots[slot] = static_cast<int32_t>(slot);
    }
  }
  if (blockIdx.x == 0 && thread == 0) {
    plan.offsets[0] = 0;
    plan.offsets[1] = plan.row_offsets[plan.num_rows] = static_cast<int32_t>(plan.capacity);
  }
}

}  // namespace

void plan_topk(const void* scores, Dtype dtype, int64_t batch, int64_t sequence, int64_t k, const PlanBuffers& plan,
               Stream stream) {
  if (batch == 0 || sequence == 0) {
    clear("plan_topk", stream, plan.offsets, 2);
    return clear("plan_topk", stream, plan.row_offsets, plan.num_rows + 1);
  }
  const bool stage = sequence <= kMostStaged;
  const int threads = sequence <= 4 * kDigits ? kDigits : kMostThreads;
  launch("plan_topk", stream, batch, threads, stage ? sequence * int64_t{sizeof(unsigned)} : 0, select_best, scores,
         dtype, static_cast<int>(sequence), static_cast<int>(k), stage, plan);
}

}  // namespace dyncore::cuda

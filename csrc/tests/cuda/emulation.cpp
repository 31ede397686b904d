// Coroutines for the threads of a block: see cuda_runtime.h beside this.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "tests/cuda/cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace dyncore::cuda {
constexpr size_t kSharedMemory = 48 * 1024;
alignas(16) unsigned char dynamic_memory[kSharedMemory];
}  // namespace dyncore::cuda

#if defined(__x86_64__)
// swapcontext asks the system for the signal mask: 30 times what this takes. Callee-saved registers are all that a
// function call must keep.
extern "C" void emulation_switch(void** leave, void* enter);
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulation_switch, .-emulation_switch
)");
#endif

namespace emulation {

namespace {

#if defined(__x86_64__)
class Coroutine {
 public:
  void start(char* stack, size_t bytes, void (*body)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where body would return to; keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(body);
    stack_ = top - 6;
  }
  static void leave(Coroutine& from, Coroutine& to) { emulation_switch(&from.stack_, to.stack_); }

 private:
  void* stack_ = nullptr;
};
#else
class Coroutine {
 public:
  void start(char* stack, size_t bytes, void (*body)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    makecontext(&context_, body, 0);
  }
  static void leave(Coroutine& from, Coroutine& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};
#endif

constexpr size_t kStack = 64 * 1024;
constexpr int kMostThreads = 1024;

struct Meeting {
  unsigned round = 0;
  int here = 0;
};

struct Warp {
  Meeting meeting;
  uint64_t values[2][32];
};

struct Block {
  Coroutine scheduler;
  std::vector<Coroutine> threads;
  std::vector<char> ended;
  std::vector<Warp> warps;
  Meeting meeting;
  int alive = 0, current = 0;
  bool progress = false;
  const std::function<void()>* kernel = nullptr;
};

Block block;
Order order = Order::ascending;
int launched = 0;
std::mt19937 random_order(0);

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "emulated kernel: %s (block %u, thread %u)\n", why, blockIdx.x, threadIdx.x);
  std::abort();
}

char* stack_of(int thread) {
  static const std::unique_ptr<char[]> stacks(new char[kStack * kMostThreads]);
  return stacks.get() + kStack * static_cast<size_t>(thread);
}

void next_round(Meeting& meeting) {
  meeting.here = 0;
  ++meeting.round;
  block.progress = true;
}

void meet(Meeting& meeting, int expected) {
  const unsigned round = meeting.round;
  if (++meeting.here == expected) {
    next_round(meeting);
    return;
  }
  const int self = block.current;
  while (meeting.round == round) Coroutine::leave(block.threads[self], block.scheduler);
}

void run_thread() {
  (*block.kernel)();
  block.ended[block.current] = 1;
  block.progress = true;
  if (--block.alive > 0 && block.meeting.here == block.alive) next_round(block.meeting);
  Coroutine::leave(block.threads[block.current], block.scheduler);  // for good
}

std::vector<int> in_order(int count) {
  std::vector<int> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  if (order == Order::descending) std::reverse(indices.begin(), indices.end());
  if (order == Order::shuffled) std::shuffle(indices.begin(), indices.end(), random_order);
  return indices;
}

void run_block() {
  const int count = static_cast<int>(blockDim.x);
  block.threads.resize(count);
  block.ended.assign(count, 0);
  block.warps.assign(count / 32, Warp{});
  block.meeting = Meeting{};
  block.alive = count;
  for (int i = 0; i < count; ++i) block.threads[i].start(stack_of(i), kStack, run_thread);
  while (block.alive > 0) {
    block.progress = false;
    for (int i : in_order(count)) {
      if (block.ended[i]) continue;
      block.current = i;
      threadIdx = dim3(static_cast<unsigned>(i), 0, 0);
      Coroutine::leave(block.scheduler, block.threads[i]);
    }
    if (!block.progress) fail("threads wait for each other in different places");
  }
}

}  // namespace

void set_order(Order order_) {
  order = order_;
}
int launches() {
  return launched;
}

void barrier() {
  meet(block.meeting, block.alive);
}

// Values are kept for a round more, as a lane may not leave before all have come to the next.
const uint64_t* exchange(uint64_t value) {
  Warp& warp = block.warps[block.current / 32];
  uint64_t* values = warp.values[warp.meeting.round % 2];
  values[block.current % 32] = value;
  meet(warp.meeting, 32);
  return values;
}

void expect_all_lanes(unsigned mask) {
  if (mask != 0xffffffffu) fail("only exchanges among all lanes of a warp are known");
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  using dyncore::cuda::dynamic_memory;
  using dyncore::cuda::kSharedMemory;
  const unsigned threads = config.blockDim.x;
  const bool possible = threads > 0 && threads <= kMostThreads && threads % 32 == 0 && config.gridDim.x > 0 &&
                        config.gridDim.x <= 0x7fffffffu && config.dynamicSmemBytes <= kSharedMemory;
  if (!possible) return cudaErrorInvalidConfiguration;
  ++launched;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  block.kernel = &kernel;
  for (int b : in_order(static_cast<int>(gridDim.x))) {
    blockIdx = dim3(static_cast<unsigned>(b), 0, 0);
    std::memset(dynamic_memory, 0xcc, config.dynamicSmemBytes);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(dynamic_memory + config.dynamicSmemBytes, kSharedMemory - config.dynamicSmemBytes);
#endif
    run_block();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(dynamic_memory, kSharedMemory);
#endif
  }
  return cudaSuccess;
}

}  // namespace emulation

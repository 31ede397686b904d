#include "common/scratch.h"

#include <cassert>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>

#include <cstring>
#endif

namespace dyncore {

namespace {

constexpr size_t kKeptLimit = size_t{64} << 20;  // a larger block is given back after the call
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLine = 64;

char* allocate(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : kLine;
  void* block = nullptr;
  if (posix_memalign(&block, alignment, (bytes + alignment - 1) / alignment * alignment) != 0) throw std::bad_alloc();
  prefer_huge_pages(block, bytes);
  return static_cast<char*>(block);
}

struct Kept {
  char* block = nullptr;
  size_t bytes = 0;
  bool in_use = false;
  ~Kept() { std::free(block); }
};

thread_local Kept kept;

// Under AddressSanitizer a block holds NaN, and only what was taken of it may be touched.
void close([[maybe_unused]] char* block, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(block, bytes);
  std::memset(block, 0xff, bytes);
  __asan_poison_memory_region(block, bytes);
#endif
}

void open([[maybe_unused]] char* block, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(block, bytes);
#endif
}

}  // namespace

void fence_end([[maybe_unused]] void* end_of_part) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(static_cast<char*>(end_of_part) - kLine, kLine);
#endif
}

void prefer_huge_pages(void* buffer, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t first = (reinterpret_cast<uintptr_t>(buffer) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(buffer) + bytes) / kHugePage * kHugePage;
  if (buffer != nullptr && first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  static_cast<void>(buffer);
  static_cast<void>(bytes);
#endif
}

size_t rounded_bytes(size_t bytes) {
  // One odd cache line more, so that buffers of 4096-byte multiples do not fall into the same cache sets.
  return (bytes + kLine - 1) / kLine * kLine + kLine;
}

Scratch::Scratch(size_t bytes) : block_(nullptr), next_(nullptr), end_(nullptr), kept_(false) {
  if (bytes == 0) return;
  if (bytes <= kKeptLimit && !kept.in_use) {
    if (kept.bytes < bytes) {
      std::free(kept.block);
      kept.block = nullptr;
      kept.bytes = 0;
      kept.block = allocate(bytes);
      kept.bytes = bytes;
    }
    kept.in_use = kept_ = true;
    block_ = kept.block;
  } else {
    block_ = allocate(bytes);
  }
  next_ = block_;
  end_ = block_ + bytes;
  close(block_, kept_ ? kept.bytes : bytes);
}

Scratch::~Scratch() {
  if (block_) open(block_, end_ - block_);
  if (kept_) {
    kept.in_use = false;
  } else {
    std::free(block_);
  }
}

void* Scratch::take(size_t bytes) {
  char* taken = next_;
  next_ += rounded_bytes(bytes);
  assert(next_ <= end_);
  open(taken, bytes);
  return taken;
}

}  // namespace dyncore

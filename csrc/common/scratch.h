// Scratch memory of one op call. Each calling thread keeps one block between calls, because fresh large blocks
// page-fault on every use.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dyncore {

class Scratch {
 public:
  explicit Scratch(size_t bytes);  // throws std::bad_alloc
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next `bytes` of the block, aligned to 64 bytes. The constructor's size must cover the rounded_bytes of all.
  void* take(size_t bytes);

 private:
  char* block_;
  char* next_;
  char* end_;
  bool kept_;
};

// What `bytes` take up of a block.
size_t rounded_bytes(size_t bytes);

// Where several parts of rounded_bytes were taken as one: AddressSanitizer's builds may not touch what one has to
// spare.
void fence_end(void* end_of_part);

// Asks for huge pages where a large buffer that has just been allocated is about to be written for the first time: a
// fresh 64 MB costs 16384 page faults otherwise. Advice: it changes no content, and the system may decline.
void prefer_huge_pages(void* buffer, size_t bytes);

}  // namespace dyncore

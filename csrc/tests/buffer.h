// Memory that ends where its contents end: the next byte belongs to a page that may not be touched, so that even a
// vector instruction, which sanitizers do not see into, faults there. What lies before is poisoned for
// AddressSanitizer.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dyncore::tests {

template <class T>
class Buffer {
 public:
  // Every bit is set: NaN in a float of any width, an index far outside in an integer. An empty buffer is null, as an
  // empty tensor's data are.
  explicit Buffer(int64_t size = 0) : size_(size) {
    if (size == 0) return;
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t used = (bytes() + page - 1) / page * page;
    mapped_ = used + page;
    void* map = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || mprotect(static_cast<char*>(map) + used, page, PROT_NONE) != 0) throw std::bad_alloc();
    base_ = static_cast<char*>(map);
    data_ = reinterpret_cast<T*>(base_ + used - bytes());
    std::memset(base_, 0xff, used);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(base_, used - bytes());
#endif
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(mapped_, other.mapped_);
    return *this;
  }
  ~Buffer() {
    if (!base_) return;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(base_, mapped_);
#endif
    munmap(base_, mapped_);
  }

  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }
  size_t bytes() const { return static_cast<size_t>(size_) * sizeof(T); }

 private:
  char* base_ = nullptr;
  T* data_ = nullptr;
  int64_t size_ = 0;
  size_t mapped_ = 0;
};

}  // namespace dyncore::tests

// Scratch memory of a grouped op: the matrices its stages hand on, and what each thread needs for its products (a
// packed panel, widened rows, and `results` rows of 32 floats for panels before their epilogue).
#pragma once
#include "cpu/common/group.h"

namespace dyncore::DYNCORE_ISA {

class TeamScratch {
 public:
  // `depth` and `results` are the largest that any product of the op has.
  template <class T>
  static TeamScratch plan(int threads, int64_t depth, int64_t results) {
    TeamScratch s;
    s.panel_size_ = rounded_bytes(panel_bytes<T>(depth));
    s.rows_size_ = rounded_bytes(rows_bytes<T>(depth));
    s.thread_size_ = s.panel_size_ + s.rows_size_ + panel_buffer_bytes(results);
    s.bytes_ = threads * s.thread_size_;
    return s;
  }

  size_t bytes() const { return bytes_; }
  void place(void* at) {
    at_ = static_cast<char*>(at);
    for (char* thread = at_; thread < at_ + bytes_; thread += thread_size_) {
      fence_end(thread + panel_size_);
      fence_end(thread + panel_size_ + rows_size_);
      fence_end(thread + thread_size_);
    }
  }

  PanelBuffers buffers(int thread) const {
    char* at = at_ + thread * thread_size_;
    return {reinterpret_cast<float*>(at), reinterpret_cast<float*>(at + panel_size_)};
  }
  float* results(int thread) const {
    return reinterpret_cast<float*>(at_ + thread * thread_size_ + panel_size_ + rows_size_);
  }

 private:
  char* at_ = nullptr;
  size_t panel_size_ = 0, rows_size_ = 0, thread_size_ = 0, bytes_ = 0;
};

// A matrix in scratch memory; its data are null until it is placed, and where it has no elements.
template <class T>
struct Workspace {
  int64_t rows = 0, stride = 0;
  T* data = nullptr;

  size_t bytes() const { return rows * stride * sizeof(T); }
  void place(void* at) { data = bytes() ? static_cast<T*>(at) : nullptr; }
  T* row(int64_t r) const { return data + r * stride; }
  explicit operator bool() const { return data != nullptr; }
};

// One block for all parts, workspaces and TeamScratch alike.
template <class... Part>
inline size_t block_bytes(const Part&... parts) {
  return (rounded_bytes(parts.bytes()) + ...);
}
template <class... Part>
inline void place_in(Scratch& block, Part&... parts) {
  (parts.place(block.take(parts.bytes())), ...);
}

}  // namespace dyncore::DYNCORE_ISA

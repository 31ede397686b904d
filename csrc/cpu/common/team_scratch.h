// Scratch memory of a grouped op, split into what each thread needs for its products: a packed panel, widened rows, and
// `results` rows of 32 floats for panels before their epilogue.
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
  void place(void* at) { at_ = static_cast<char*>(at); }

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

}  // namespace dyncore::DYNCORE_ISA

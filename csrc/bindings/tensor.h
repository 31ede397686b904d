// PyTorch's tensors as the bindings read them: through the DLPack exchange API, a C interface that does not change with
// the version of PyTorch, so that nothing links it. Reading a tensor so takes 30 ns; handing over its address, sizes
// and strides as Python integers took 300.
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>

#include "cpu/kernels.h"

namespace dyncore::bindings {

namespace py = pybind11;

// The part of DLPack's ABI (major version 1) that is used here.
struct ElementType {
  uint8_t code, bits;
  uint16_t lanes;

  bool operator==(const ElementType& t) const { return code == t.code && bits == t.bits && lanes == t.lanes; }
  bool operator!=(const ElementType& t) const { return !(*this == t); }
};

struct View {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  ElementType type;
  int64_t* sizes;
  int64_t* strides;
  uint64_t byte_offset;
};

constexpr ElementType kInt32{0, 32, 1}, kInt64{0, 64, 1}, kBool{6, 8, 1};
constexpr ElementType kFloat16{2, 16, 1}, kFloat{2, 32, 1}, kDouble{2, 64, 1}, kBfloat16{4, 16, 1};

// Finds PyTorch's exchange API; ImportError where it has none. To be called before any tensor is read.
void find_tensor_api();

enum class Absence { refused, allowed };
enum class Device : int32_t { cpu = 1, cuda = 2 };  // DLPack's numbers

// A tensor on such a device, or nothing where None came and is allowed. A layout that the kernels cannot follow is read
// from a copy, which lives as long as this object. Errors are ValueError and TypeError and name the argument.
class Tensor {
 public:
  Tensor(const char* name, py::handle source, Absence absence = Absence::refused, Device device = Device::cpu);

  explicit operator bool() const { return static_cast<bool>(source_); }
  template <class T = void>
  T* data() const {
    return static_cast<T*>(view_.data);
  }
  const ElementType& type() const { return view_.type; }
  int dims() const { return view_.dims; }
  int64_t size(int dim) const { return view_.sizes[dim]; }
  // 1 where the dimension has one element at most: there it is never followed.
  int64_t stride(int dim) const { return view_.sizes[dim] > 1 ? view_.strides[dim] : 1; }
  int64_t elements() const;
  int device_id() const { return view_.device_id; }

  // Each raises unless it holds, and lets an absent tensor pass.
  void expect_dims(int dims) const;
  void expect_type(const ElementType& type) const;
  void expect_type_of(const Tensor& x) const;
  void expect_length(int64_t length, const char* what) const;
  void expect_shape(std::initializer_list<int64_t> shape) const;

 protected:
  bool contiguous() const;
  // Reads `source.method()` instead.
  void convert(const char* method);
  // Reads an int64 tensor as int32, each value as the nearest that int32 holds.
  void saturate();

 private:
  void look(py::handle source);

  const char* name_;
  Device device_;
  py::object source_;
  View view_{};
};

// Any shape, elements side by side.
struct Contiguous : Tensor {
  Contiguous(const char* name, py::handle source, Absence absence = Absence::refused, Device device = Device::cpu);
};

// [rows, columns], neighbouring columns side by side.
struct Rows : Tensor {
  Rows(const char* name, py::handle source, Absence absence = Absence::refused, Device device = Device::cpu);
  Matrix matrix() const { return {data(), *this ? stride(0) : 0}; }
};

// [G, N, K], N or K side by side.
struct Weights : Tensor {
  Weights(const char* name, py::handle source);
  Weight weight() const { return {data(), stride(0), stride(1), stride(2)}; }
};

// [N, K], N or K side by side: a weight of one group.
struct WeightMatrix : Tensor {
  WeightMatrix(const char* name, py::handle source, Absence absence = Absence::refused);
  Weight weight() const { return {data(), 0, stride(0), stride(1)}; }
};

// What a kernel writes: elements side by side, never in a copy.
struct Output : Tensor {
  Output(const char* name, py::handle source, Absence absence = Absence::refused, Device device = Device::cpu);
  void expect(const ElementType& type, std::initializer_list<int64_t> shape) const;
};

// The gradient of a weight [N, K], N or K side by side, without gaps.
struct WeightOutput : Tensor {
  WeightOutput(const char* name, py::handle source);
  void expect(const ElementType& type, std::initializer_list<int64_t> shape) const;
  WeightGradient gradient() const {
    return *this ? WeightGradient{data(), stride(0), stride(1)} : WeightGradient{nullptr, 1, 1};
  }
};

// int32, one dimension, side by side. An int64 that int32 cannot hold stays outside of every range that is checked.
struct Indices : Tensor {
  Indices(const char* name, py::handle source, Absence absence = Absence::refused, Device device = Device::cpu);
  int32_t* list() const { return data<int32_t>(); }
};

// float, one dimension, side by side.
struct Scales : Tensor {
  Scales(const char* name, py::handle source, Absence absence = Absence::refused, Device device = Device::cpu);
  float* list() const { return data<float>(); }
};

// PyTorch's current stream on a CUDA device.
void* current_stream(int device_id);

// Reads a tensor on such a device without a word: false where `source` is anything else.
bool glance(py::handle source, View& view, Device device = Device::cpu);
// The same of a CPU tensor, and false for subclasses other than Parameter: what they do when an op meets them is theirs
// to say.
bool glance_plain(py::handle source, View& view);
// Whether `source` is a CPU tensor of this type and shape.
bool fits(py::handle source, const ElementType& type, std::initializer_list<int64_t> shape);

// Whether the kernels take elements of this type.
bool has_kernels(const ElementType& type);
// What the kernels call it; TypeError on one that they do not take.
Dtype kernel_dtype(const Tensor& tensor);

}  // namespace dyncore::bindings

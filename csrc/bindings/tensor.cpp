// Reading PyTorch's tensors through the DLPack exchange API.
#include "bindings/tensor.h"

#include <algorithm>
#include <limits>
#include <string>

namespace dyncore::bindings {

namespace {

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* older;
  void *allocate, *export_managed, *import_managed;
  int (*look)(void* source, View* view);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

const ExchangeApi* api = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;

// The API takes whatever it is given for a tensor, so that is asked first.
bool is_tensor(py::handle source) {
  return PyObject_TypeCheck(source.ptr(), tensor_type);
}

std::string text(const int64_t* sizes, int64_t count) {
  std::string all;
  for (int64_t i = 0; i < count; ++i) all += (i ? ", " : "") + std::to_string(sizes[i]);
  return "[" + all + "]";
}

std::string text(const ElementType& type) {
  if (type == kBool) return "bool";
  const char* const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex"};
  return (type.code < 6 ? kinds[type.code] : "other") + std::to_string(type.bits);
}

}  // namespace

void find_tensor_api() {
  const char* const attribute = "__dlpack_c_exchange_api__";
  const py::object type = py::module_::import("torch").attr("Tensor");
  tensor_type = reinterpret_cast<PyTypeObject*>(type.ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(py::module_::import("torch.nn").attr("Parameter").ptr());
  if (py::hasattr(type, attribute)) {
    const py::object capsule = type.attr(attribute);
    api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
  }
  while (api && api->major > 1) api = api->older;
  if (!api || api->major != 1 || !api->look) throw py::import_error("this PyTorch has no DLPack exchange API 1.x");
}

Tensor::Tensor(const char* name, py::handle source, Absence absence, Device device) : name_(name), device_(device) {
  if (!source.is_none() || absence == Absence::refused) look(source);
}

void Tensor::look(py::handle source) {
  if (!is_tensor(source))
    throw py::type_error(std::string(name_) + ": expected a Tensor, got " + Py_TYPE(source.ptr())->tp_name);
  if (!glance(source, view_, device_))
    throw py::value_error(std::string(name_) + ": expected a tensor with data on " +
                          (device_ == Device::cpu ? "cpu" : "cuda") + ", side by side or in strides");
  if (view_.data) view_.data = static_cast<char*>(view_.data) + view_.byte_offset;
  source_ = py::reinterpret_borrow<py::object>(source);
}

void Tensor::convert(const char* method) {
  const py::object converted = source_.attr(method)();
  look(converted);
}

void Tensor::saturate() {
  constexpr auto kLeast = std::numeric_limits<int32_t>::min(), kGreatest = std::numeric_limits<int32_t>::max();
  const py::object narrow = source_.attr("clamp")(kLeast, kGreatest).attr("int")();
  look(narrow);
}

int64_t Tensor::elements() const {
  int64_t count = 1;
  for (int d = 0; d < view_.dims; ++d) count *= view_.sizes[d];
  return count;
}

bool Tensor::contiguous() const {
  int64_t wanted = 1;
  for (int d = view_.dims - 1; d >= 0; --d) {
    if (view_.sizes[d] != 1 && view_.strides[d] != wanted) return elements() == 0;
    wanted *= view_.sizes[d];
  }
  return true;
}

void Tensor::expect_dims(int dims) const {
  if (!*this || view_.dims == dims) return;
  throw py::value_error(std::string(name_) + ": expected " + std::to_string(dims) + " dimensions, got shape " +
                        text(view_.sizes, view_.dims));
}

void Tensor::expect_type_of(const Tensor& x) const {
  if (*this && view_.type != x.view_.type)
    throw py::type_error(std::string(name_) + ": expected the dtype of " + x.name_ + ", " + text(x.view_.type) +
                         ", got " + text(view_.type));
}

void Tensor::expect_type(const ElementType& type) const {
  if (*this && view_.type != type)
    throw py::type_error(std::string(name_) + ": expected " + text(type) + ", got " + text(view_.type));
}

void Tensor::expect_length(int64_t length, const char* what) const {
  if (!*this || (view_.dims > 0 && view_.sizes[0] == length)) return;
  throw py::value_error(std::string(name_) + ": expected " + std::to_string(length) + " " + what + ", got " +
                        (view_.dims ? std::to_string(view_.sizes[0]) : "no dimension"));
}

void Tensor::expect_shape(std::initializer_list<int64_t> shape) const {
  if (!*this) return;
  bool equal = view_.dims == static_cast<int32_t>(shape.size());
  for (int d = 0; equal && d < view_.dims; ++d) equal = view_.sizes[d] == shape.begin()[d];
  if (equal) return;
  throw py::value_error(std::string(name_) + ": expected shape " + text(shape.begin(), shape.size()) + ", got " +
                        text(view_.sizes, view_.dims));
}

Contiguous::Contiguous(const char* name, py::handle source, Absence absence, Device device)
    : Tensor(name, source, absence, device) {
  if (*this && !contiguous()) convert("contiguous");
}

Rows::Rows(const char* name, py::handle source, Absence absence, Device device)
    : Tensor(name, source, absence, device) {
  expect_dims(2);
  if (*this && stride(1) != 1) convert("contiguous");
}

Weights::Weights(const char* name, py::handle source) : Tensor(name, source) {
  expect_dims(3);
  if (*this && stride(1) != 1 && stride(2) != 1) convert("contiguous");
}

WeightMatrix::WeightMatrix(const char* name, py::handle source, Absence absence) : Tensor(name, source, absence) {
  expect_dims(2);
  if (*this && stride(0) != 1 && stride(1) != 1) convert("contiguous");
}

Output::Output(const char* name, py::handle source, Absence absence, Device device)
    : Tensor(name, source, absence, device) {
  if (*this && !contiguous())
    throw py::value_error(std::string(name) + ": expected an output whose elements lie side by side, got strides");
}

void Output::expect(const ElementType& type, std::initializer_list<int64_t> shape) const {
  expect_type(type);
  expect_shape(shape);
}

WeightOutput::WeightOutput(const char* name, py::handle source) : Tensor(name, source, Absence::allowed) {
  expect_dims(2);
  if (!*this || contiguous()) return;
  if (stride(0) != 1 || (size(1) > 1 && stride(1) != size(0)))
    throw py::value_error(std::string(name) + ": expected rows or columns side by side, without gaps");
}

void WeightOutput::expect(const ElementType& type, std::initializer_list<int64_t> shape) const {
  expect_type(type);
  expect_shape(shape);
}

Indices::Indices(const char* name, py::handle source, Absence absence, Device device)
    : Tensor(name, source, absence, device) {
  expect_dims(1);
  if (*this && type() == kInt64) saturate();
  expect_type(kInt32);
  if (*this && !contiguous()) convert("contiguous");
}

Scales::Scales(const char* name, py::handle source, Absence absence, Device device)
    : Tensor(name, source, absence, device) {
  expect_dims(1);
  if (*this && type() != kFloat) convert("float");
  if (*this && !contiguous()) convert("contiguous");
}

void* current_stream(int device_id) {
  void* stream = nullptr;
  if (api->current_stream(static_cast<int32_t>(Device::cuda), device_id, &stream) != 0) throw py::error_already_set();
  return stream;
}

bool glance(py::handle source, View& view, Device device) {
  if (!is_tensor(source)) return false;
  if (api->look(source.ptr(), &view) != 0) {
    PyErr_Clear();
    return false;
  }
  // A tensor subclass may have a shape and no data of its own.
  const bool empty = std::find(view.sizes, view.sizes + view.dims, 0) != view.sizes + view.dims;
  return view.device_type == static_cast<int32_t>(device) && (view.data || empty);
}

bool glance_plain(py::handle source, View& view) {
  const PyTypeObject* const type = Py_TYPE(source.ptr());
  return (type == tensor_type || type == parameter_type) && glance(source, view);
}

bool fits(py::handle source, const ElementType& type, std::initializer_list<int64_t> shape) {
  View view;
  if (!glance(source, view) || view.type != type || view.dims != static_cast<int32_t>(shape.size())) return false;
  return std::equal(shape.begin(), shape.end(), view.sizes);
}

bool has_kernels(const ElementType& type) {
  return type == kFloat || type == kBfloat16 || type == kFloat16;
}

Dtype kernel_dtype(const Tensor& tensor) {
  if (tensor.type() == kFloat) return Dtype::float32;
  if (tensor.type() == kBfloat16) return Dtype::bfloat16;
  if (tensor.type() == kFloat16) return Dtype::float16;
  throw py::type_error("expected float32, bfloat16 or float16");
}

}  // namespace dyncore::bindings

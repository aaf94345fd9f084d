#include "common/python_lists.h"

#include <string>

namespace py = pybind11;

namespace fastnn {
namespace {

// DLPack's own declarations, version 1 (github.com/dmlc/dlpack); torch's copy of them is not for stable-ABI builds.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  uint32_t version_major, version_minor;
  void* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*dltensor_from_object)(void* object, DLTensor* out);  // borrows; on failure sets a Python error
  void* current_stream;
};
constexpr uint8_t kDLFloat = 2, kDLBfloat = 4;

// What is looked up in torch, once.
struct Torch {
  PyTypeObject *tensor, *parameter;
  py::object increment_version;
  const DLPackExchangeAPI* dlpack = nullptr;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const py::object tensor_type = torch.attr("Tensor");
    tensor = reinterpret_cast<PyTypeObject*>(tensor_type.ptr());
    parameter = reinterpret_cast<PyTypeObject*>(torch.attr("nn").attr("Parameter").ptr());
    increment_version = torch.attr("_C").attr("_increment_version");
    const auto capsule = py::getattr(tensor_type, "__dlpack_c_exchange_api__", py::none());
    auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) PyErr_Clear();
    if (api && api->version_major == 1) dlpack = api;
  }
};

const Torch& torch_objects() {
  static const Torch* objects = new Torch;  // never freed: the interpreter may be gone by then
  return *objects;
}

std::optional<DType> dtype_of(const DLTensor& tensor) {
  if (tensor.type_code == kDLFloat && tensor.type_bits == 64) return kFloat64;
  if (tensor.type_code == kDLFloat && tensor.type_bits == 32) return kFloat32;
  if (tensor.type_code == kDLFloat && tensor.type_bits == 16) return kFloat16;
  if (tensor.type_code == kDLBfloat && tensor.type_bits == 16) return kBFloat16;
  return std::nullopt;
}

// A real tensor with torch's lazy negation is the imaginary part of a conjugate one: it skips every other element, or
// is one element at an odd place. Asking every tensor would cost more than its view.
bool may_be_negated(const View& view) {
  return !view.contiguous || (view.count == 1 && reinterpret_cast<uintptr_t>(view.data) / kElementSize[view.dtype] % 2);
}

}  // namespace

Views views_of(const py::list& tensors, const char* op, const char* name) {
  const Torch& torch = torch_objects();
  const auto refuse = [&](const std::string& what) {
    throw NotCovered(std::string(op) + ": " + name + " has " + what);
  };
  if (!torch.dlpack) throw NotCovered("this torch has no DLPack exchange table");
  Views views;
  views.reserve(tensors.size());
  for (const py::handle object : tensors) {
    const PyTypeObject* type = Py_TYPE(object.ptr());
    if (type != torch.tensor && type != torch.parameter) refuse(std::string("a ") + type->tp_name);
    DLTensor tensor;
    if (torch.dlpack->dltensor_from_object(object.ptr(), &tensor) != 0) {
      PyErr_Clear();
      refuse("a tensor that is not strided memory");
    }
    const std::optional<DType> dtype = dtype_of(tensor);
    if (!dtype) refuse("a dtype other than float64, float32, bfloat16 and float16");
    char* data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    const View& view = views.emplace_back(data, tensor.shape, tensor.strides, tensor.ndim, *dtype, tensor.device_type,
                                          tensor.device_id);
    if (may_be_negated(view) && object.attr("is_neg")().cast<bool>()) refuse("a lazily negated tensor");
  }
  return views;
}

Writing<py::list>::Writing(std::initializer_list<const py::list*> lists) {
  for (const py::list* list : lists) torch_objects().increment_version(*list);
  released.emplace();
}

}  // namespace fastnn

#include "common/python_lists.h"

#include <string>

#include "common/torch_objects.h"

namespace py = pybind11;

namespace fastnn {
namespace {

std::optional<DType> dtype_of(const DLTensor& tensor) {
  if (tensor.type_code == kDLFloat && tensor.type_bits == 64) return kFloat64;
  if (tensor.type_code == kDLFloat && tensor.type_bits == 32) return kFloat32;
  if (tensor.type_code == kDLFloat && tensor.type_bits == 16) return kFloat16;
  if (tensor.type_code == kDLBfloat && tensor.type_bits == 16) return kBFloat16;
  return std::nullopt;
}

}  // namespace

Views views_of(const py::list& tensors, const char* op, const char* name) {
  const TorchObjects& torch = torch_objects();
  const auto refuse = [&](const std::string& what) {
    throw NotCovered(std::string(op) + ": " + name + " has " + what);
  };
  if (!torch.dlpack) throw NotCovered("this torch has no DLPack exchange table");
  Views views;
  views.reserve(tensors.size());
  for (const py::handle object : tensors) {
    DLTensor tensor;
    if (!torch.view(object, &tensor)) {
      const PyTypeObject* type = Py_TYPE(object.ptr());
      const bool plain = type == torch.tensor || type == torch.parameter;
      refuse(plain ? "a tensor that is not strided memory" : std::string("a ") + type->tp_name);
    }
    const std::optional<DType> dtype = dtype_of(tensor);
    if (!dtype) refuse("a dtype other than float64, float32, bfloat16 and float16");
    char* data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    views.emplace_back(data, tensor.shape, tensor.strides, tensor.ndim, *dtype, tensor.device_type, tensor.device_id);
    if (torch.negated(object)) refuse("a lazily negated tensor");
  }
  return views;
}

Writing<py::list>::Writing(std::initializer_list<const py::list*> lists) {
  for (const py::list* list : lists) torch_objects().increment_version(*list);
  released.emplace();
}

}  // namespace fastnn

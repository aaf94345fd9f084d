#include "common/python_lists.h"

#include <cstring>
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

// A list of tensors, and the bytes of their addresses.
class Known {
 public:
  explicit Known(const py::object& known) {
    if (known.is_none()) return;
    tensors_ = py::reinterpret_borrow<py::tuple>(known)[0];
    addresses_ = py::reinterpret_borrow<py::tuple>(known)[1];
  }
  static py::tuple of(const py::list& tensors, const Views& views) {
    std::string addresses;
    for (const View& view : views) addresses.append(reinterpret_cast<const char*>(&view.data), sizeof view.data);
    return py::make_tuple(tensors, py::bytes(addresses));
  }
  bool has(size_t i, py::handle tensor, const char* address) const {
    return i < tensors_.size() && PyList_GET_ITEM(tensors_.ptr(), i) == tensor.ptr() &&
           std::memcmp(PyBytes_AS_STRING(addresses_.ptr()) + i * sizeof address, &address, sizeof address) == 0;
  }

 private:
  py::list tensors_;
  py::bytes addresses_;
};

}  // namespace

Views views_of(const py::list& tensors, const char* op, const char* name, py::dict known) {
  const TorchObjects& torch = torch_objects();
  const auto refuse = [&](const std::string& what) {
    throw NotCovered(std::string(op) + ": " + name + " has " + what);
  };
  if (!torch.dlpack) throw NotCovered("this torch has no DLPack exchange table");
  const py::object before = known.contains(name) ? py::object(known[name]) : py::none();
  const Known seen(before);
  bool all_seen = true;
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
    if (!seen.has(views.size(), object, data)) {
      if (torch.negated(object)) refuse("a lazily negated tensor");
      all_seen = false;
    }
    views.emplace_back(data, tensor.shape, tensor.strides, tensor.ndim, *dtype, tensor.device_type, tensor.device_id);
  }
  if (!all_seen) known[name] = Known::of(tensors, views);
  return views;
}

Views views_of(const py::list& tensors, const char* op, const char* name) {
  return views_of(tensors, op, name, py::dict());
}

Writing<py::list>::Writing(std::initializer_list<const py::list*> lists) {
  for (const py::list* list : lists) torch_objects().increment_version(*list);
  released.emplace();
}

}  // namespace fastnn

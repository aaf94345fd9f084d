#include "common/torch_objects.h"

namespace py = pybind11;

namespace fastnn {

TorchObjects::TorchObjects() {
  const py::module_ torch = py::module_::import("torch");
  const py::object tensor_type = torch.attr("Tensor"), library = torch.attr("_C");
  tensor = reinterpret_cast<PyTypeObject*>(tensor_type.ptr());
  parameter = reinterpret_cast<PyTypeObject*>(torch.attr("nn").attr("Parameter").ptr());
  increment_version = library.attr("_increment_version");
  const py::object handles = py::getattr(library, "_aoti", py::none());
  handle_of_tensor = py::getattr(handles, "unsafe_alloc_void_ptr_from_tensor", py::object());
  tensors_of_handles = py::getattr(handles, "alloc_tensors_by_stealing_from_void_ptrs", py::object());
  const auto capsule = py::getattr(tensor_type, "__dlpack_c_exchange_api__", py::none());
  auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) PyErr_Clear();
  if (api && api->version_major == 1) dlpack = api;
}

bool TorchObjects::view(py::handle object, DLTensor* out) const {
  if (Py_TYPE(object.ptr()) != tensor && Py_TYPE(object.ptr()) != parameter) return false;
  if (dlpack->dltensor_from_object(object.ptr(), out) == 0) return true;
  PyErr_Clear();
  return false;
}

const TorchObjects& torch_objects() {
  static const TorchObjects* objects = new TorchObjects;  // never freed: the interpreter may be gone by then
  return *objects;
}

}  // namespace fastnn

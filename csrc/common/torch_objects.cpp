#include "common/torch_objects.h"

#include "common/tensor_lists.h"

namespace py = pybind11;

namespace fastnn {
namespace {

bool has_kernel_dtype(const DLTensor& tensor) {
  const int bits = tensor.type_bits;
  return tensor.type_code == kDLFloat ? bits == 64 || bits == 32 || bits == 16 : tensor.type_code == kDLBfloat;
}

PyObject* are_plain(PyObject*, PyObject* objects) {
  const TorchObjects& torch = torch_objects();
  DLTensor first, tensor;
  bool any = false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(objects); ++i) {
    PyObject* object = PyTuple_GET_ITEM(objects, i);
    if (object == Py_None && i > 0) continue;
    if (!torch.dlpack || !torch.view(object, &tensor) || tensor.device_type != kCpuDevice) Py_RETURN_FALSE;
    if (!any) first = tensor;
    any = true;
    if (tensor.type_code != first.type_code || tensor.type_bits != first.type_bits) Py_RETURN_FALSE;
  }
  return PyBool_FromLong(!any || has_kernel_dtype(first));
}

bool all_ints(PyObject* objects) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(objects); ++i) {
    PyObject* object = PyTuple_GET_ITEM(objects, i);
    if (PyTuple_CheckExact(object) ? !all_ints(object) : !PyLong_CheckExact(object) && !PyUnicode_CheckExact(object))
      return false;
  }
  return true;
}

PyObject* are_ints(PyObject*, PyObject* objects) { return PyBool_FromLong(all_ints(objects)); }

PyMethodDef questions[] = {
    {"are_plain", are_plain, METH_VARARGS,
     "Whether all, but for those None behind the first, are plain CPU tensors in strided memory, of one dtype that the "
     "kernels have."},
    {"are_ints", are_ints, METH_VARARGS,
     "Whether all are ints, strings, or tuples of these: no float or bool, which are equal to ints."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

TorchObjects::TorchObjects() {
  const py::module_ torch = py::module_::import("torch");
  const py::object tensor_type = torch.attr("Tensor"), library = torch.attr("_C");
  tensor = reinterpret_cast<PyTypeObject*>(tensor_type.ptr());
  parameter = reinterpret_cast<PyTypeObject*>(torch.attr("nn").attr("Parameter").ptr());
  increment_version = library.attr("_increment_version");
  is_neg = tensor_type.attr("is_neg");
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

bool TorchObjects::negated(py::handle tensor) const {
  PyObject* const answer = PyObject_CallOneArg(is_neg.ptr(), tensor.ptr());
  if (!answer) throw py::error_already_set();
  Py_DECREF(answer);
  return answer == Py_True;
}

const TorchObjects& torch_objects() {
  static const TorchObjects* objects = new TorchObjects;  // never freed: the interpreter may be gone by then
  return *objects;
}

void bind_questions(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), questions) != 0) throw py::error_already_set();
}

}  // namespace fastnn

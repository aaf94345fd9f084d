#include "common/python_tensors.h"

#include <torch/csrc/stable/ops.h>

#include "common/tensor_lists.h"
#include "common/torch_objects.h"

namespace py = pybind11;

namespace fastnn {

torch::stable::Tensor tensor_of(py::handle object) {
  const TorchObjects& torch = torch_objects();
  DLTensor view;
  if (!torch.dlpack || !torch.handle_of_tensor || !torch.tensors_of_handles || !torch.view(object, &view) ||
      view.device_type != kCpuDevice)
    throw NotCovered("not a plain CPU tensor");
  if (torch.negated(object)) throw NotCovered("a lazily negated tensor");
  const py::object capsule = torch.handle_of_tensor(object);
  return torch::stable::Tensor(static_cast<AtenTensorHandle>(PyCapsule_GetPointer(capsule.ptr(), nullptr)));
}

py::handle object_of(const torch::stable::Tensor& tensor) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), &handle));
  py::list capsules(1);
  capsules[0] = py::capsule(handle);
  const py::list tensors = torch_objects().tensors_of_handles(std::move(capsules));
  return tensors[0].cast<py::object>().release();
}

}  // namespace fastnn

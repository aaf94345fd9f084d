// What the entry points take from torch's Python side, looked up once.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fastnn {

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

struct TorchObjects {
  PyTypeObject *tensor, *parameter;
  pybind11::object increment_version, is_neg;
  // Null where this torch has none. What makes one tensor of a handle leaks it in 2.13; what makes several does not.
  pybind11::object handle_of_tensor, tensors_of_handles;
  const DLPackExchangeAPI* dlpack = nullptr;

  TorchObjects();
  // Whether it is a plain torch tensor in strided memory, and if so which.
  bool view(pybind11::handle object, DLTensor* out) const;
  // Whether the tensor stands for the negative of its memory (an imaginary part of a lazily conjugate one), which no
  // view of it shows.
  bool negated(pybind11::handle tensor) const;
};

const TorchObjects& torch_objects();

// are_plain and are_ints: what the Python layer asks in every call, where pybind11 or Python would take longer.
void bind_questions(pybind11::module_& m);

}  // namespace fastnn

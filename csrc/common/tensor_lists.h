// What the optimizers' glue shares, CPU and CUDA alike: lists of tensors, one elementwise update of which is made.
#pragma once

#include <stdexcept>
#include <vector>

#include "common/check.h"

namespace fastnn {

constexpr size_t kMaxOperands = 5;
// DLPack's codes.
enum DeviceCode : int32_t { kCpuDevice = 1, kCudaDevice = 2 };
constexpr int64_t kElementSize[kNumDTypes] = {8, 4, 2, 2};

// A tensor as an update sees it; sizes and strides are the tensor's own arrays. Lives no longer than one step.
struct View {
  char* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dims;
  int64_t count;
  DType dtype;
  int32_t device, device_index;  // a DeviceCode, if it is one
  bool contiguous;

  View(void* data, const int64_t* sizes, const int64_t* strides, int64_t dims, DType dtype, int32_t device,
       int32_t device_index);
};

using Views = std::vector<View>;

Views views_of(const std::vector<Tensor>& tensors, const char* op, const char* name);

// What lists from the dispatcher need not be told: see python_lists.h.
struct NothingKnown {};
inline Views views_of(const std::vector<Tensor>& tensors, const char* op, const char* name, NothingKnown) {
  return views_of(tensors, op, name);
}

// One argument of a fused update: a list with a tensor for every parameter.
struct Operand {
  const char* name;
  Views views;
  bool updated;
};

// The first one is the parameters, which the others must match in length, shapes and dtypes; the second the gradients.
using Operands = std::vector<Operand>;

// What an update does not take; thrown before anything is changed.
struct NotCovered : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws NotCovered for what in_batches cannot do, and for tensors that are not all on one device of this kind.
void check_operands(const char* op, DeviceCode device, const Operands& operands);

// Lives while the lists it is given are written to: see python_lists.h, where that takes some doing. The dispatcher's
// callers have done it before.
template <class List>
struct Writing {
  explicit Writing(std::initializer_list<const List*> lists) {}
};

// Scratch memory on the device of a tensor.
Tensor empty_bytes(const View& beside, int64_t bytes);

// Whether two of the tensors share memory (a parameter listed twice, views of one storage).
bool share_memory(const Views& views);

// The memory of tensors [first, last) of every operand, the operands of one parameter all in the same storage order:
// their own where their strides agree, else a copy.
class Gathered {
 public:
  Gathered(const Operands& operands, size_t first, size_t last);

  // Writes the copies of updated operands back; nothing that is updated is left in a copy.
  void scatter() const;

  size_t first() const { return first_; }
  size_t size() const { return counts_.size(); }
  DType dtype(size_t i) const { return operands_[0].views[first_ + i].dtype; }
  int64_t count(size_t i) const { return counts_[i]; }
  // Of the i-th parameter, as many addresses as there are operands.
  char* const* data(size_t i) const { return &data_[i * operands_.size()]; }

 private:
  struct Copy {
    Tensor original, copy;
    bool updated;
  };

  const Operands& operands_;
  size_t first_;
  std::vector<char*> data_;  // operands of the first parameter, then of the second, ...
  std::vector<int64_t> counts_;
  std::vector<Copy> copies_;
};

// Calls update(gathered) on all the parameters at once, or, where some share memory, on one after the other in list
// order. The operands are checked ones.
template <class Update>
void in_batches(const Operands& operands, const Update& update) {
  const Views& params = operands[0].views;
  const size_t batch = share_memory(params) ? 1 : params.size();
  for (size_t first = 0; first < params.size(); first += batch) {
    const Gathered gathered(operands, first, first + batch);
    update(gathered);
    gathered.scatter();
  }
}

}  // namespace fastnn

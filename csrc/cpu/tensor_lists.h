// What the optimizers' glue shares: one elementwise update over many tensors as one parallel region.
//
// The elements of all tensors form one range, in list order, that parallel_for cuts into equal parts: threads are
// balanced whatever the sizes, and a tensor may be shared by several. Elementwise updates give the same bits however
// the range is cut.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "common/check.h"

namespace fastnn::cpu {

constexpr size_t kMaxOperands = 5;
constexpr int64_t kElementSize[kNumDTypes] = {8, 4, 2, 2};

// A tensor as an update sees it; sizes and strides are the tensor's own arrays. Lives no longer than one step.
struct View {
  char* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dims;
  int64_t count;
  DType dtype;
  bool contiguous;

  View(void* data, const int64_t* sizes, const int64_t* strides, int64_t dims, DType dtype);
};

using Views = std::vector<View>;

Views views_of(const std::vector<Tensor>& tensors, const char* op, const char* name);

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

// Throws NotCovered for what fused_update cannot do.
void check_operands(const char* op, const Operands& operands);

// Lives while the lists it is given are written to: see python_lists.h, where that takes some doing. The dispatcher's
// callers have done it before.
template <class List>
struct Writing {
  explicit Writing(std::initializer_list<const List*> lists) {}
};

// Whether two of the tensors share memory (a parameter listed twice, views of one storage).
bool share_memory(const Views& views);

// The memory of tensors [first, last) of every operand, the operands of one parameter all in the same storage order:
// their own where their strides agree, else a copy.
class Gathered {
 public:
  Gathered(const Operands& operands, size_t first, size_t last);

  // Writes the copies of updated operands back; nothing that is updated is left in a copy.
  void scatter() const;

  // calls update(index, dtype, data, count) in parallel, data[k] pointing to `count` elements of operand k.
  template <class F>
  void for_each_slice(const F& update) const {
    constexpr int64_t kGrain = 16 * 1024;  // elements a thread takes at the least: about 10 µs of arithmetic
    torch::stable::parallel_for(0, ends_.empty() ? 0 : ends_.back(), kGrain, [&](int64_t begin, int64_t end) {
      size_t i = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin();
      for (; begin < end; ++i) {
        const int64_t stop = std::min(end, ends_[i]);
        const DType dtype = operands_[0].views[first_ + i].dtype;
        const int64_t offset = (begin - (i ? ends_[i - 1] : 0)) * kElementSize[dtype];
        void* data[kMaxOperands];
        for (size_t k = 0; k < operands_.size(); ++k) data[k] = data_[i * operands_.size() + k] + offset;
        update(first_ + i, dtype, data, stop - begin);
        begin = stop;
      }
    });
  }

 private:
  struct Copy {
    Tensor original, copy;
    bool updated;
  };

  const Operands& operands_;
  size_t first_;
  std::vector<char*> data_;    // operands of the first parameter, then of the second, ...
  std::vector<int64_t> ends_;  // running totals of the parameters' element counts
  std::vector<Copy> copies_;
};

// Calls prepare(index) for every parameter, then update(index, dtype, data, count) on slices of all of them, in
// parallel. Parameters that share memory are updated one after the other, in list order. The operands are checked ones.
template <class Prepare, class Update>
void fused_update(const Operands& operands, const Prepare& prepare, const Update& update) {
  const Views& params = operands[0].views;
  const size_t batch = share_memory(params) ? 1 : params.size();
  for (size_t first = 0; first < params.size(); first += batch) {
    for (size_t i = first; i < first + batch; ++i) prepare(i);
    const Gathered gathered(operands, first, first + batch);
    gathered.for_each_slice(update);
    gathered.scatter();
  }
}

}  // namespace fastnn::cpu

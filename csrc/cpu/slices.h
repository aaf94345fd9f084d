// One elementwise update over many tensors as one parallel region.
#pragma once

#include <algorithm>
#include <vector>

#include "common/tensor_lists.h"

namespace fastnn::cpu {

// Calls update(index, dtype, data, count) in parallel, data[k] pointing to `count` elements of operand k.
//
// The elements of all tensors form one range, in list order, that parallel_for cuts into equal parts: threads are
// balanced whatever the sizes, and a tensor may be shared by several. Elementwise updates give the same bits however
// the range is cut.
template <class Update>
void for_each_slice(const Gathered& tensors, size_t operands, const Update& update) {
  constexpr int64_t kGrain = 16 * 1024;  // elements a thread takes at the least: about 10 µs of arithmetic
  std::vector<int64_t> ends(tensors.size());
  int64_t total = 0;
  for (size_t i = 0; i < ends.size(); ++i) ends[i] = total += tensors.count(i);
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, ends[i]);
      const int64_t offset = (begin - (i ? ends[i - 1] : 0)) * kElementSize[tensors.dtype(i)];
      void* data[kMaxOperands];
      for (size_t k = 0; k < operands; ++k) data[k] = tensors.data(i)[k] + offset;
      update(tensors.first() + i, tensors.dtype(i), data, stop - begin);
      begin = stop;
    }
  });
}

}  // namespace fastnn::cpu

// Interface of the CPU max-pooling kernels, on dense tensors of either memory format, a table entry per dtype.
#pragma once

#include <cstdint>

#include "common/conv_shape.h"
#include "common/dtype.h"

namespace fastnn::cpu {

struct MaxPool2dShape {
  int64_t channels;  // of channels_last tensors
  int64_t in_h, in_w, out_h, out_w;
  int64_t kernel_h, kernel_w;  // at most 255 elements: a byte has room for kPoolNone beside their numbers
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// Along one side, the windows that an input element is in: `count` of them, the first at `output`, where it is number
// `element`; the next ones lie `output_step` outputs before and have it `element_step` elements later.
struct MaxPool2dWindows {
  int count, output, element;
};
struct MaxPool2dSide {
  const MaxPool2dWindows* windows;  // of every input element
  int output_step, element_step;
};

// A code says which element of its window an output is, row by row; kPoolNone where the window has none, as it lies in
// the padding altogether.
struct MaxPool2dKernels {
  // Of NCHW tensors, "planes": output rows [begin, end) of all planes, and input planes [begin, end).
  void (*planes[kNumDTypes])(const MaxPool2dShape& shape, const void* x, void* y, uint8_t* code, int64_t begin,
                             int64_t end);
  // scratch: in_h * in_w floats.
  void (*planes_backward[kNumDTypes])(const MaxPool2dShape& shape, const void* grad_y, const uint8_t* code,
                                      void* grad_x, float* scratch, int64_t begin, int64_t end);
  // Of channels_last tensors, "pixels": output rows [begin, end), and input rows [begin, end) of all images.
  void (*pixels[kNumDTypes])(const MaxPool2dShape& shape, const void* x, void* y, uint8_t* code, int64_t begin,
                             int64_t end);
  void (*pixels_backward[kNumDTypes])(const MaxPool2dShape& shape, const MaxPool2dSide& rows, const MaxPool2dSide& cols,
                                      const void* grad_y, const uint8_t* code, void* grad_x, int64_t begin,
                                      int64_t end);
};

const MaxPool2dKernels& max_pool2d_kernels();

}  // namespace fastnn::cpu

// Glue of fastnn::max_pool2d and max_pool2d_backward on the CPU.
#include "cpu/kernels/max_pool2d.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/python_tensors.h"
#include "common/strides.h"
#include "cpu/bindings.h"
#include "cpu/memory.h"

namespace fastnn::cpu {
namespace {

using Ints = std::vector<int64_t>;

constexpr int64_t kGrain = 32 * 1024;  // input elements a thread takes at the least: some 10 µs of memory traffic

// Torch's pooling_output_shape: a window may hang over the end in ceil_mode, but must begin before it.
int64_t out_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, bool ceil_mode) {
  const int64_t room = in + 2 * pad - dilation * (kernel - 1) - 1;
  if (room < 0 && !(ceil_mode && room + stride > 0)) return 0;
  const int64_t out = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  return ceil_mode && (out - 1) * stride >= in + pad ? out - 1 : out;
}

MaxPool2dShape pool_shape(const char* op, int64_t channels, int64_t in_h, int64_t in_w, const Ints& kernel,
                          const Ints& stride, const Ints& padding, const Ints& dilation) {
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                  ": expected 2 values each of kernel_size, stride, padding and dilation");
  for (int d = 0; d < 2; ++d) {
    STD_TORCH_CHECK(kernel[d] > 0 && stride[d] > 0 && dilation[d] > 0, op,
                    ": kernel_size, stride and dilation must be positive, got ", kernel[d], ", ", stride[d], " and ",
                    dilation[d]);
    STD_TORCH_CHECK(padding[d] >= 0 && padding[d] <= kernel[d] / 2, op, ": padding is ", padding[d],
                    ", expected at most half a window");
  }
  STD_TORCH_CHECK(kernel[0] <= kPoolNone && kernel[1] <= kPoolNone && kernel[0] * kernel[1] <= kPoolNone, op,
                  ": kernel_size is ", kernel[0], " x ", kernel[1], ", expected at most ", int(kPoolNone), " elements");
  MaxPool2dShape s{};
  s.channels = channels, s.in_h = in_h, s.in_w = in_w;
  s.kernel_h = kernel[0], s.kernel_w = kernel[1], s.stride_h = stride[0], s.stride_w = stride[1];
  s.pad_h = padding[0], s.pad_w = padding[1], s.dilation_h = dilation[0], s.dilation_w = dilation[1];
  return s;
}

// Along one side, which windows every input element is in.
class Side {
 public:
  Side(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) : windows_(in) {
    const int64_t common = std::gcd(stride, dilation);
    side_.output_step = int(dilation / common), side_.element_step = int(stride / common);
    for (int64_t i = 0; i < in; ++i)
      for (int64_t element = 0; element < kernel; ++element) {
        const int64_t start = i + pad - element * dilation;
        if (start < 0 || start % stride || start / stride >= out) continue;
        MaxPool2dWindows& w = windows_[i];
        if (w.count++ == 0) w.output = int(start / stride), w.element = int(element);
      }
    side_.windows = windows_.data();
  }
  const MaxPool2dSide& get() const { return side_; }

 private:
  std::vector<MaxPool2dWindows> windows_;
  MaxPool2dSide side_;
};

Tensor in_format(const Tensor& tensor, bool channels_last) {
  return torch::stable::contiguous(tensor, channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                         : torch::headeronly::MemoryFormat::Contiguous);
}

std::tuple<Tensor, Tensor> max_pool2d(Tensor self, Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                                      bool ceil_mode) {
  const DType dtype = dtype_of(self, "max_pool2d", "self");
  check_dim(self, 4, "max_pool2d", "self");
  MaxPool2dShape s =
      pool_shape("max_pool2d", self.size(1), self.size(2), self.size(3), kernel_size, stride, padding, dilation);
  s.out_h = out_size(s.in_h, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h, ceil_mode);
  s.out_w = out_size(s.in_w, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w, ceil_mode);
  STD_TORCH_CHECK(s.out_h > 0 && s.out_w > 0, "max_pool2d: self of shape ", shape_string(self),
                  " is smaller than a window");
  const bool pixels = is_channels_last(self);
  const Tensor x = in_format(self, pixels);
  const std::array<int64_t, 4> sizes{self.size(0), s.channels, s.out_h, s.out_w};
  const Tensor y = empty_4d(self, sizes, pixels), code = empty_4d(self, sizes, pixels, ScalarType::Byte);
  const auto kernel = (pixels ? max_pool2d_kernels().pixels : max_pool2d_kernels().planes)[dtype];
  const int64_t rows = self.size(0) * s.out_h * (pixels ? 1 : s.channels);
  const int64_t row_work = s.kernel_h * s.in_w * (pixels ? s.channels : 1);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / row_work), [&](int64_t begin, int64_t end) {
    kernel(s, x.data_ptr(), y.data_ptr(), static_cast<uint8_t*>(code.data_ptr()), begin, end);
  });
  return {y, code};
}

Tensor max_pool2d_backward(Tensor grad_output, Tensor code, Ints input_size, Ints kernel_size, Ints stride,
                           Ints padding, Ints dilation) {
  const DType dtype = dtype_of(grad_output, "max_pool2d_backward", "grad_output");
  check_dim(grad_output, 4, "max_pool2d_backward", "grad_output");
  check_same_shape(code, grad_output, "max_pool2d_backward", "code");
  check_same_device(code, grad_output, "max_pool2d_backward", "code");
  STD_TORCH_CHECK(code.scalar_type() == ScalarType::Byte, "max_pool2d_backward: code has dtype ",
                  torch::headeronly::toString(code.scalar_type()), ", expected uint8");
  STD_TORCH_CHECK(input_size.size() == 2, "max_pool2d_backward: expected 2 values of input_size");
  MaxPool2dShape s = pool_shape("max_pool2d_backward", code.size(1), input_size[0], input_size[1], kernel_size, stride,
                                padding, dilation);
  s.out_h = code.size(2), s.out_w = code.size(3);
  const auto begins_inside = [](int64_t out, int64_t stride, int64_t pad, int64_t in) {
    return (out - 1) * stride - pad < in;
  };
  STD_TORCH_CHECK(
      begins_inside(s.out_h, s.stride_h, s.pad_h, s.in_h) && begins_inside(s.out_w, s.stride_w, s.pad_w, s.in_w),
      "max_pool2d_backward: code has shape ", shape_string(code), ", too large for an input of ", s.in_h, " x ",
      s.in_w);
  const bool pixels = is_channels_last(code);
  const Tensor g = in_format(grad_output, pixels), codes = in_format(code, pixels);
  const Tensor grad_input = empty_4d(grad_output, {code.size(0), s.channels, s.in_h, s.in_w}, pixels);
  const auto* code_data = static_cast<const uint8_t*>(codes.data_ptr());
  const int64_t planes = code.size(0) * s.channels, plane = std::max<int64_t>(1, s.in_h * s.in_w);
  if (pixels) {
    const auto kernel = max_pool2d_kernels().pixels_backward[dtype];
    const Side side_h(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h);
    const Side side_w(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w);
    const int64_t rows = code.size(0) * s.in_h, row_work = std::max<int64_t>(1, s.in_w * s.channels);
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / row_work), [&](int64_t begin, int64_t end) {
      kernel(s, side_h.get(), side_w.get(), g.data_ptr(), code_data, grad_input.data_ptr(), begin, end);
    });
  } else {
    const auto kernel = max_pool2d_kernels().planes_backward[dtype];
    torch::stable::parallel_for(0, planes, std::max<int64_t>(1, kGrain / plane), [&](int64_t begin, int64_t end) {
      const Scratch<float> scratch(plane);
      kernel(s, g.data_ptr(), code_data, grad_input.data_ptr(), scratch.get(), begin, end);
    });
  }
  return grad_input;
}

}  // namespace

void bind_max_pool2d(pybind11::module_& m) {
  define_entry(m, "max_pool2d", &max_pool2d);
  define_entry(m, "max_pool2d_backward", &max_pool2d_backward);
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward));
}

}  // namespace fastnn::cpu

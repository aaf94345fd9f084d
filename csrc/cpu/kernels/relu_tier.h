// ReLU and its gradient, elementwise.
//
// Blocking: one vector at a time, a masked tail; the glue splits the elements among threads.
// Bytes: forward reads and writes each element once (2 * count * sizeof(T)), backward reads two and writes one; one
// compare and one select an element, so memory-bound everywhere outside the caches.
// Torch's conventions: NaN passes through both ways (the gradient's mask is !(y <= 0)), and -0 stays -0.

template <class T>
void relu_forward(const void* x_, void* y_, int64_t count) {
  using A = Accumulator<T>;
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  const Vec<A> zero{};
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    const Vec<A> v = load(x + i);
    store(y + i, v < zero ? zero : v);
  }
  if (i < count) {
    const Vec<A> v = load_n(x + i, int(count - i));
    store_n(y + i, v < zero ? zero : v, int(count - i));
  }
}

template <class T>
void relu_backward(const void* grad_y_, const void* y_, void* grad_x_, int64_t count) {
  using A = Accumulator<T>;
  const T* grad_y = static_cast<const T*>(grad_y_);
  const T* y = static_cast<const T*>(y_);
  T* grad_x = static_cast<T*>(grad_x_);
  const Vec<A> zero{};
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(grad_x + i, load(y + i) <= zero ? zero : load(grad_y + i));
  if (i < count) {
    const int n = int(count - i);
    store_n(grad_x + i, load_n(y + i, n) <= zero ? zero : load_n(grad_y + i, n), n);
  }
}

const ReluKernels kReluKernels = {
    {relu_forward<double>, relu_forward<float>, relu_forward<bf16>, relu_forward<f16>},
    {relu_backward<double>, relu_backward<float>, relu_backward<bf16>, relu_backward<f16>},
};

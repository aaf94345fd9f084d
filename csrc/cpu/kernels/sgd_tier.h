// One SGD step of `count` elements, in torch's order of operations:
//   g = -g if maximize;  g = grad_factor (g + wd p)
//   b = g on the first step, else momentum b + (1 - dampening) g
//   p = p + step_factor (b, or g + momentum b if nesterov, or g without momentum)
//
// Blocking: one vector at a time, a masked tail; the glue cuts the parameters into slices.
// Bytes: with momentum p, g, b are read and p, b written once, 5 * count * sizeof(T); without, 3. Memory-bound.

template <class A>
struct SgdVectors {
  Vec<A> grad_scale, weight_decay, grad_factor, momentum, undamped, step_factor;
};

template <class A, Momentum mode>
FASTNN_INLINE void sgd_vector(const SgdOptions& o, const SgdVectors<A>& s, Vec<A>& p, Vec<A>& g, Vec<A>& b) {
  if (o.scaled) g = g / s.grad_scale;
  Vec<A> grad = o.maximize ? -g : g;
  if (o.weight_decay != 0) grad = grad + s.weight_decay * p;
  grad = grad * s.grad_factor;
  Vec<A> direction = grad;
  if (mode != Momentum::kNone) {
    b = mode == Momentum::kFirstStep ? grad : b * s.momentum + s.undamped * grad;
    direction = o.nesterov ? grad + s.momentum * b : b;
  }
  p = p + s.step_factor * direction;
}

template <class T, Momentum mode>
void sgd_update_mode(const SgdOptions& options, void* const* data, int64_t count) {
  using A = Accumulator<T>;
  const SgdOptions o = options;  // a copy that no store through T* can change stays in registers
  const SgdVectors<A> s = {splat(A(o.grad_scale)), splat(A(o.weight_decay)),  splat(A(o.grad_factor)),
                           splat(A(o.momentum)),   splat(A(1 - o.dampening)), splat(A(o.step_factor))};
  const bool has_buffer = mode != Momentum::kNone;
  const bool reads_buffer = mode == Momentum::kOn;
  T* param = static_cast<T*>(data[0]);
  T* grad = static_cast<T*>(data[1]);
  T* buffer = has_buffer ? static_cast<T*>(data[2]) : nullptr;
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    Vec<A> p = load(param + i), g = load(grad + i), b = {};
    if (reads_buffer) b = load(buffer + i);
    sgd_vector<A, mode>(o, s, p, g, b);
    store(param + i, p);
    if (has_buffer) store(buffer + i, b);
    if (o.scaled) store(grad + i, g);
  }
  if (i < count) {
    const int n = int(count - i);
    Vec<A> p = load_n(param + i, n), g = load_n(grad + i, n), b = {};
    if (reads_buffer) b = load_n(buffer + i, n);
    sgd_vector<A, mode>(o, s, p, g, b);
    store_n(param + i, p, n);
    if (has_buffer) store_n(buffer + i, b, n);
    if (o.scaled) store_n(grad + i, g, n);
  }
}

template <class T>
void sgd_update(const SgdOptions& options, Momentum mode, void* const* data, int64_t count) {
  if (mode == Momentum::kNone)
    sgd_update_mode<T, Momentum::kNone>(options, data, count);
  else if (mode == Momentum::kFirstStep)
    sgd_update_mode<T, Momentum::kFirstStep>(options, data, count);
  else
    sgd_update_mode<T, Momentum::kOn>(options, data, count);
}

const SgdKernels kSgdKernels = {{sgd_update<double>, sgd_update<float>, sgd_update<bf16>, sgd_update<f16>}};

// One Adam step of `count` elements, in torch's order of operations:
//   g = -g if maximize;  p = p (1 - lr wd) if decoupled, else g = g + wd p
//   m = lerp(m, g, 1 - beta1);  v = beta2 v + (1 - beta2) g g;  vmax = max(vmax, v)
//   p = p - step_size m / (sqrt(v or vmax) / bias_correction2_sqrt + eps)
//
// Blocking: one vector at a time, a masked tail; the glue cuts the parameters into slices.
// Bytes: p, g, m, v are read and p, m, v written once, 7 * count * sizeof(T) (amsgrad: 9): memory-bound from the
// second-level cache on, in spite of two divisions and a square root an element.

template <class A>
struct AdamVectors {
  Vec<A> lr_weight_decay, weight_decay, lerp_weight, beta2, one_minus_beta2, eps, step, bias_correction2_sqrt;
  Vec<A> grad_scale;
  bool lerp_from_start;
};

template <class A>
FASTNN_INLINE AdamVectors<A> adam_vectors(const AdamOptions& o, const AdamBias& bias) {
  AdamVectors<A> s;
  s.lr_weight_decay = splat(A(1 - o.lr * o.weight_decay));
  s.weight_decay = splat(A(o.weight_decay));
  // torch's lerp starts from the nearer end.
  const A weight = A(1 - o.beta1);
  s.lerp_from_start = weight < A(0.5);
  s.lerp_weight = splat(s.lerp_from_start ? weight : weight - 1);
  s.beta2 = splat(A(o.beta2));
  s.one_minus_beta2 = splat(A(1 - o.beta2));
  s.eps = splat(A(o.eps));
  s.step = splat(A(-bias.step_size));
  s.bias_correction2_sqrt = splat(A(bias.bias_correction2_sqrt));
  s.grad_scale = splat(A(o.grad_scale));
  return s;
}

template <class A, bool kAmsgrad>
FASTNN_INLINE void adam_vector(const AdamOptions& o, const AdamVectors<A>& s, Vec<A>& p, Vec<A>& g, Vec<A>& m,
                               Vec<A>& v, Vec<A>& v_max) {
  if (o.scaled) g = g / s.grad_scale;
  Vec<A> grad = o.maximize ? -g : g;
  if (o.weight_decay != 0) {
    if (o.decoupled_weight_decay)
      p = p * s.lr_weight_decay;
    else
      grad = grad + s.weight_decay * p;
  }
  m = (s.lerp_from_start ? m : grad) + s.lerp_weight * (grad - m);
  v = v * s.beta2 + (s.one_minus_beta2 * grad) * grad;
  Vec<A> denominator = v;
  if (kAmsgrad) {
    v_max = (v_max > v || v_max != v_max) ? v_max : v;  // NaN on either side stays
    denominator = v_max;
  }
  denominator = sqrt(denominator) / s.bias_correction2_sqrt + s.eps;
  p = p + (s.step * m) / denominator;
}

template <class T, bool kAmsgrad>
void adam_update(const AdamOptions& options, const AdamBias& bias, void* const* data, int64_t count) {
  using A = Accumulator<T>;
  const AdamOptions o = options;  // a copy that no store through T* can change stays in registers
  const AdamVectors<A> s = adam_vectors<A>(o, bias);
  T* param = static_cast<T*>(data[0]);
  T* grad = static_cast<T*>(data[1]);
  T* exp_avg = static_cast<T*>(data[2]);
  T* exp_avg_sq = static_cast<T*>(data[3]);
  T* max_exp_avg_sq = kAmsgrad ? static_cast<T*>(data[4]) : nullptr;
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    Vec<A> p = load(param + i), g = load(grad + i), m = load(exp_avg + i), v = load(exp_avg_sq + i);
    Vec<A> v_max = kAmsgrad ? load(max_exp_avg_sq + i) : v;
    adam_vector<A, kAmsgrad>(o, s, p, g, m, v, v_max);
    store(param + i, p);
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
    if (kAmsgrad) store(max_exp_avg_sq + i, v_max);
    if (o.scaled) store(grad + i, g);
  }
  if (i < count) {
    const int n = int(count - i);
    Vec<A> p = load_n(param + i, n), g = load_n(grad + i, n), m = load_n(exp_avg + i, n);
    Vec<A> v = load_n(exp_avg_sq + i, n), v_max = kAmsgrad ? load_n(max_exp_avg_sq + i, n) : v;
    adam_vector<A, kAmsgrad>(o, s, p, g, m, v, v_max);
    store_n(param + i, p, n);
    store_n(exp_avg + i, m, n);
    store_n(exp_avg_sq + i, v, n);
    if (kAmsgrad) store_n(max_exp_avg_sq + i, v_max, n);
    if (o.scaled) store_n(grad + i, g, n);
  }
}

const AdamKernels kAdamKernels = {
    {adam_update<double, false>, adam_update<float, false>, adam_update<bf16, false>, adam_update<f16, false>},
    {adam_update<double, true>, adam_update<float, true>, adam_update<bf16, true>, adam_update<f16, true>},
};

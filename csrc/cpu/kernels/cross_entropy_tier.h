// Cross-entropy of logits x against a target, and its gradient.
//
// With a_c the weight the target gives to class c, A = sum a_c, m = max x_c and S = sum e^(x_c - m), a row's
//   loss      = sum a_c (m + log S - x_c)         = A log S - sum a_c (x_c - m)
//   gradient  = g (A e^(x_c - m) / S - a_c)         of x_c, g being the gradient of the row's loss.
// A class index t gives a_t = (1 - label_smoothing) w_t and, smoothed, label_smoothing / C * w_c more to every class;
// probabilities q_c give ((1 - label_smoothing) q_c + label_smoothing / C) w_c.
//
// Blocking: forward takes a block of classes at a time, finds its maximum (this reads the block from memory), then
// adds up its exponentials (from L1 or L2, while the next block is prefetched), and merges it with the blocks before.
// In the columns layout a tile of neighbouring positions goes through the same steps side by side, a lane a position.
// Bytes: forward reads the logits once and keeps three values a row; backward reads them once and writes as much. Per
// logit one e^x, about 14 vector operations: at the limit of memory from two or so AVX2 cores up.
// Only e^(x - m) <= 1 is ever formed, and in A, as is A e^(x - m) / S - a_c: that, not the softmax, is rounded to T.

constexpr int kUnroll = 4;           // vectors in flight: e^x is one long dependency chain
constexpr int64_t kClassBlock = 64;  // classes of a tile worked on at a time

template <class A>
constexpr A kInfinity = A(__builtin_inf());

FASTNN_INLINE float scalar_exp(float x) { return __builtin_expf(x); }
FASTNN_INLINE double scalar_exp(double x) { return __builtin_exp(x); }
FASTNN_INLINE float log(float x) { return __builtin_logf(x); }
FASTNN_INLINE double log(double x) { return __builtin_log(x); }

// Sums over some of a row's classes; weight and dot stay 0 for a target that is only an index.
template <class A>
struct RowSums {
  A max;     // of x_c
  A sum;     // of e^(x_c - reference(max))
  A weight;  // of a_c
  A dot;     // of a_c (x_c - reference(max))
};

// What is subtracted from the logits. Not a maximum of -inf, which would make -inf - -inf = NaN of a block that
// merely has nothing in it yet.
template <class A>
FASTNN_INLINE A reference(A max) {
  return max == -kInfinity<A> ? A(0) : max;
}
template <class A>
FASTNN_INLINE Vec<A> reference(Vec<A> max) {
  return max == splat(-kInfinity<A>) ? Vec<A>{} : max;
}

template <class A>
FASTNN_INLINE RowSums<A> merge(const RowSums<A>& a, const RowSums<A>& b) {
  const A max = a.max > b.max ? a.max : b.max;
  const A from_a = reference(a.max) - reference(max), from_b = reference(b.max) - reference(max);
  return {max,
          a.sum * (a.max == -kInfinity<A> ? A(0) : scalar_exp(from_a)) +
              b.sum * (b.max == -kInfinity<A> ? A(0) : scalar_exp(from_b)),
          a.weight + b.weight, (a.dot + a.weight * from_a) + (b.dot + b.weight * from_b)};
}

// At most a vector's worth of the n elements at p, the other lanes 0; n may be negative.
template <class T>
FASTNN_INLINE Vec<Accumulator<T>> load_up_to(const T* p, int64_t n) {
  return n >= kLanes<Accumulator<T>> ? load(p) : load_n(p, n > 0 ? int(n) : 0);
}
template <class T>
FASTNN_INLINE void store_up_to(T* p, Vec<Accumulator<T>> v, int64_t n) {
  if (n >= kLanes<Accumulator<T>>)
    store(p, v);
  else
    store_n(p, v, n > 0 ? int(n) : 0);
}

template <class T>
FASTNN_INLINE T* row_of(const CrossEntropyArgs& args, const ClassArray& array, int64_t row) {
  return static_cast<T*>(array.data) + row / args.inner * array.outer_stride + row % args.inner;
}

FASTNN_INLINE bool is_ignored(const CrossEntropyArgs& args, int64_t row) {
  return args.index && args.index[row] == args.ignore_index;
}

template <class A>
FASTNN_INLINE A weight_of(const CrossEntropyArgs& args, int64_t c) {
  return args.weight ? static_cast<const A*>(args.weight)[c] : A(1);
}

// A row's results, from its sums and the logit and weight of its true class: V is A or a vector of them, of as many
// rows. An ignored row comes with sums {0, 1, 0, 0} and a true weight of 0.
template <class V>
struct RowResults {
  V sum;
  V weight;
  V loss;
};

template <CrossEntropyTarget kTarget, class A, class V>
FASTNN_INLINE RowResults<V> finish_rows(V max, V sum, V weight, V dot, V true_logit, V true_weight) {
  // Nothing but -inf has no softmax.
  const V valid_sum = max == V{} - kInfinity<A> ? V{} + A(__builtin_nan("")) : sum;
  const V log_sum = log(valid_sum);
  V loss = kTarget == kIndex ? V{} : weight * log_sum - dot;
  if (kTarget != kProbabilities) loss += true_weight * ((max - true_logit) + log_sum);
  return {valid_sum, weight + true_weight, loss};
}

// a_c of one row, without the true class's own share.
template <class T, CrossEntropyTarget kTarget, class A = Accumulator<T>>
struct ClassWeights {
  A keep;
  A uniform;
  const T* p;  // null unless kProbabilities
  const A* w;  // null where kIndex

  FASTNN_INLINE ClassWeights(const CrossEntropyArgs& args, int64_t row, int64_t first_class)
      : keep(A(args.keep)), uniform(A(args.uniform)), p(nullptr), w(nullptr) {
    if constexpr (kTarget == kProbabilities) p = row_of<T>(args, args.probabilities, row) + first_class;
    if constexpr (kTarget != kIndex) w = static_cast<const A*>(args.weight) + first_class;
  }
  // Of `count` classes from c on; the other lanes are 0.
  FASTNN_INLINE Vec<A> classes(int64_t c, int64_t count) const {
    if constexpr (kTarget == kProbabilities)
      return (load_up_to(p + c, count) * keep + uniform) * load_up_to(w + c, count);
    else
      return load_up_to(w + c, count) * uniform;
  }
};

// ---- rows layout ----

FASTNN_INLINE int64_t blocks_of(const CrossEntropyArgs& args) {
  return (args.classes + kCrossEntropyBlock - 1) / kCrossEntropyBlock;
}

// Of the block's classes.
FASTNN_INLINE int64_t block_size(const CrossEntropyArgs& args, int64_t first_class) {
  const int64_t left = args.classes - first_class;
  return left < kCrossEntropyBlock ? left : kCrossEntropyBlock;
}

template <class T, CrossEntropyTarget kTarget, class A = Accumulator<T>>
RowSums<A> sum_block(const CrossEntropyArgs& args, int64_t row, int64_t first_class) {
  using V = Vec<A>;
  constexpr int kVector = kLanes<A>, kStep = kUnroll * kVector;
  constexpr bool kWeighted = kTarget != kIndex;
  const int64_t n = block_size(args, first_class);
  const T* x = row_of<T>(args, args.logits, row) + first_class;
  const ClassWeights<T, kTarget> class_weights(args, row, first_class);

  V top[kUnroll];
  for (int u = 0; u < kUnroll; ++u) top[u] = splat(-kInfinity<A>);
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep)
    for (int u = 0; u < kUnroll; ++u) top[u] = max(top[u], load(x + c + u * kVector));
  for (; c + kVector <= n; c += kVector) top[0] = max(top[0], load(x + c));
  if (c < n) top[0] = max(top[0], first_lanes<A>(int(n - c)) ? load_n(x + c, int(n - c)) : splat(-kInfinity<A>));
  const A block_max = max_lanes(max(max(top[0], top[1]), max(top[2], top[3])));

  const V ref = splat(reference(block_max));
  V sum[kUnroll] = {}, weight[kUnroll] = {}, dot[kUnroll] = {};
  for (c = 0; c + kStep <= n; c += kStep) {
    for (int byte = 0; byte < kStep * int(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(x + c + kCrossEntropyBlock) + byte);
    for (int u = 0; u < kUnroll; ++u) {
      const V below = load(x + c + u * kVector) - ref;
      sum[u] += exp_nonpositive(below);
      if constexpr (kWeighted) {
        const V a = class_weights.classes(c + u * kVector, kVector);
        weight[u] += a;
        dot[u] += a * below;
      }
    }
  }
  for (; c < n; c += kVector) {
    const int64_t count = n - c;
    const Mask<A> valid = first_lanes<A>(count < kVector ? int(count) : kVector);
    const V below = valid ? load_up_to(x + c, count) - ref : V{};
    sum[0] += valid ? exp_nonpositive(below) : V{};
    if constexpr (kWeighted) {
      const V a = class_weights.classes(c, count);
      weight[0] += a;
      dot[0] += a * below;
    }
  }
  RowSums<A> sums = {block_max, sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])), 0, 0};
  if constexpr (kWeighted) {
    sums.weight = sum_lanes((weight[0] + weight[1]) + (weight[2] + weight[3]));
    sums.dot = sum_lanes((dot[0] + dot[1]) + (dot[2] + dot[3]));
  }
  return sums;
}

template <class T, CrossEntropyTarget kTarget, class A = Accumulator<T>>
FASTNN_INLINE void finish_row(const CrossEntropyArgs& args, int64_t row, const RowSums<A>& sums) {
  A true_logit = 0, true_weight = 0;
  if (kTarget != kProbabilities && !is_ignored(args, row)) {
    const int64_t t = args.index[row];
    true_logit = to_accumulator(row_of<T>(args, args.logits, row)[t]);
    true_weight = A(args.keep) * weight_of<A>(args, t);
  }
  const RowResults<A> results =
      finish_rows<kTarget, A>(sums.max, sums.sum, sums.weight, sums.dot, true_logit, true_weight);
  A* stats = static_cast<A*>(args.row_stats);
  stats[row] = sums.max;
  stats[row + args.rows] = results.sum;
  stats[row + 2 * args.rows] = results.weight;
  static_cast<A*>(args.loss)[row] = results.loss;
}

template <class T, CrossEntropyTarget kTarget>
void forward_rows(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    RowSums<Accumulator<T>> sums = {0, 1, 0, 0};
    if (!is_ignored(args, row)) {
      sums = sum_block<T, kTarget>(args, row, 0);
      for (int64_t c = kCrossEntropyBlock; c < args.classes; c += kCrossEntropyBlock)
        sums = merge(sums, sum_block<T, kTarget>(args, row, c));
    }
    finish_row<T, kTarget>(args, row, sums);
  }
}

template <class T, CrossEntropyTarget kTarget>
void forward_blocks(const CrossEntropyArgs& args, void* partials, int64_t begin, int64_t end) {
  const int64_t blocks = blocks_of(args);
  for (int64_t unit = begin; unit < end; ++unit)
    if (!is_ignored(args, unit / blocks))
      static_cast<RowSums<Accumulator<T>>*>(partials)[unit] =
          sum_block<T, kTarget>(args, unit / blocks, unit % blocks * kCrossEntropyBlock);
}

template <class T, CrossEntropyTarget kTarget>
void forward_merge(const CrossEntropyArgs& args, const void* partials_, int64_t begin, int64_t end) {
  const int64_t blocks = blocks_of(args);
  for (int64_t row = begin; row < end; ++row) {
    RowSums<Accumulator<T>> sums = {0, 1, 0, 0};
    if (!is_ignored(args, row)) {
      const auto* partials = static_cast<const RowSums<Accumulator<T>>*>(partials_) + row * blocks;
      sums = partials[0];
      for (int64_t block = 1; block < blocks; ++block) sums = merge(sums, partials[block]);
    }
    finish_row<T, kTarget>(args, row, sums);
  }
}

// What the gradient of a row's logits is made of: scale e^(x_c - max) - grad a_c, and - true_grad more at the index.
template <class A>
struct RowGradient {
  A max;
  A scale;
  A grad;
  A true_grad;
};

template <class A>
FASTNN_INLINE RowGradient<A> row_gradient(const CrossEntropyArgs& args, int64_t row) {
  const A* stats = static_cast<const A*>(args.row_stats);
  const A grad = static_cast<const A*>(args.grad_rows)[args.grad_per_row ? row : 0];
  return {stats[row], grad * (stats[row + 2 * args.rows] / stats[row + args.rows]), grad,
          args.index ? grad * (A(args.keep) * weight_of<A>(args, args.index[row])) : A(0)};
}

// Of the logits x of `count` classes from c on, but for true_grad.
template <class T, CrossEntropyTarget kTarget, class A = Accumulator<T>>
FASTNN_INLINE Vec<A> classes_gradient(const T* x, const ClassWeights<T, kTarget>& class_weights,
                                      const RowGradient<A>& row, int64_t c, int64_t count) {
  const Vec<A> value = exp_nonpositive(load_up_to(x + c, count) - row.max) * row.scale;
  if constexpr (kTarget == kIndex)
    return value;
  else
    return value - row.grad * class_weights.classes(c, count);
}

template <class T, CrossEntropyTarget kTarget, class A = Accumulator<T>>
void backward_rows(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  constexpr int kVector = kLanes<A>, kStep = kUnroll * kVector;
  const int64_t blocks = blocks_of(args);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / blocks, first_class = unit % blocks * kCrossEntropyBlock;
    const int64_t n = block_size(args, first_class);
    T* grad_x = row_of<T>(args, args.grad_input, row) + first_class;
    if (is_ignored(args, row)) {
      __builtin_memset(grad_x, 0, size_t(n) * sizeof(T));
      continue;
    }
    const T* x = row_of<T>(args, args.logits, row) + first_class;
    const ClassWeights<T, kTarget> class_weights(args, row, first_class);
    const RowGradient<A> gradient = row_gradient<A>(args, row);
    int64_t c = 0;
    for (; c + kStep <= n; c += kStep)
      for (int u = 0; u < kUnroll; ++u)
        store(grad_x + c + u * kVector,
              classes_gradient<T, kTarget>(x, class_weights, gradient, c + u * kVector, kVector));
    for (; c < n; c += kVector)
      store_up_to(grad_x + c, classes_gradient<T, kTarget>(x, class_weights, gradient, c, n - c), n - c);
    if constexpr (kTarget != kProbabilities) {
      // Again, from the logit: what is already stored is rounded to T.
      const int64_t t = args.index[row] - first_class;
      if (t >= 0 && t < n)
        store_n(grad_x + t, classes_gradient<T, kTarget>(x, class_weights, gradient, t, 1) - gradient.true_grad, 1);
    }
  }
}

// ---- columns layout, and rows of few classes ----

// A tile: neighbouring rows side by side, a lane a row, class c of the first at c * class_stride.
template <class T>
struct Tile {
  int64_t row;    // the first
  int64_t count;  // of rows, at most kCrossEntropyTile
  const T* x;
  int64_t x_stride;
  const T* p;  // null unless kProbabilities
  int64_t p_stride;
  T* grad_x;  // backward only
  int64_t grad_stride;
};

// a_c of the rows from i on, without the true class's own share.
template <class T, CrossEntropyTarget kTarget, class A = Accumulator<T>>
FASTNN_INLINE Vec<A> tile_weight(const CrossEntropyArgs& args, const Tile<T>& tile, int64_t c, int64_t i) {
  const A w = static_cast<const A*>(args.weight)[c];
  if constexpr (kTarget == kProbabilities)
    return (load_up_to(tile.p + c * tile.p_stride + i, tile.count - i) * A(args.keep) + A(args.uniform)) * w;
  else
    return splat(w * A(args.uniform));
}

template <class A>
struct TileSums {
  A max[kCrossEntropyTile];
  A sum[kCrossEntropyTile];
  A weight[kCrossEntropyTile];
  A dot[kCrossEntropyTile];
};

// Adds the classes [c, end), whose maximum is in already, to kVectors vectors of rows from i on.
template <int kVectors, class T, CrossEntropyTarget kTarget, class A = Accumulator<T>>
FASTNN_INLINE void sum_tile_rows(const CrossEntropyArgs& args, const Tile<T>& tile, TileSums<A>& sums, int64_t c,
                                 int64_t end, int64_t i) {
  using V = Vec<A>;
  // From 0, not from the sums so far: blocks of blocks lose less to rounding than one long chain.
  V ref[kVectors], sum[kVectors] = {}, weight[kVectors] = {}, dot[kVectors] = {};
  for (int u = 0; u < kVectors; ++u) ref[u] = reference<A>(load(sums.max + i + u * kLanes<A>));
  for (; c < end; ++c)
    for (int u = 0; u < kVectors; ++u) {
      const int64_t lane = i + u * kLanes<A>;
      const V below = load_up_to(tile.x + c * tile.x_stride + lane, tile.count - lane) - ref[u];
      sum[u] += exp_nonpositive(below);
      if constexpr (kTarget != kIndex) {
        const V a = tile_weight<T, kTarget>(args, tile, c, lane);
        weight[u] += a;
        dot[u] += a * below;
      }
    }
  for (int u = 0; u < kVectors; ++u) {
    const int64_t lane = i + u * kLanes<A>;
    store(sums.sum + lane, load(sums.sum + lane) + sum[u]);
    store(sums.weight + lane, load(sums.weight + lane) + weight[u]);
    store(sums.dot + lane, load(sums.dot + lane) + dot[u]);
  }
}

template <class T, CrossEntropyTarget kTarget, class A = Accumulator<T>>
void forward_tile(const CrossEntropyArgs& args, const Tile<T>& tile) {
  using V = Vec<A>;
  constexpr int kVector = kLanes<A>;
  TileSums<A> sums;
  A max_before[kCrossEntropyTile];
  for (int64_t i = 0; i < kCrossEntropyTile; ++i) {
    sums.max[i] = -kInfinity<A>;
    sums.sum[i] = sums.weight[i] = sums.dot[i] = 0;
  }
  for (int64_t c = 0; c < args.classes; c += kClassBlock) {
    const int64_t end = c + kClassBlock < args.classes ? c + kClassBlock : args.classes;
    __builtin_memcpy(max_before, sums.max, sizeof max_before);
    for (int64_t k = c; k < end; ++k)
      for (int64_t i = 0; i < tile.count; i += kVector)
        store(sums.max + i, max(load(sums.max + i), load_up_to(tile.x + k * tile.x_stride + i, tile.count - i)));
    for (int64_t i = 0; c > 0 && i < tile.count; i += kVector) {
      const V before = load(max_before + i), sum = load(sums.sum + i);
      const V shift = reference<A>(before) - reference<A>(load(sums.max + i));
      store(sums.sum + i, before == splat(-kInfinity<A>) ? sum : sum * exp_nonpositive(shift));
      store(sums.dot + i, load(sums.dot + i) + load(sums.weight + i) * shift);
    }
    int64_t i = 0;
    for (; i + kUnroll * kVector <= tile.count; i += kUnroll * kVector)
      sum_tile_rows<kUnroll, T, kTarget>(args, tile, sums, c, end, i);
    for (; i < tile.count; i += kVector) sum_tile_rows<1, T, kTarget>(args, tile, sums, c, end, i);
  }
  A true_logit[kCrossEntropyTile], true_weight[kCrossEntropyTile];
  for (int64_t i = 0; i < kCrossEntropyTile; ++i) true_logit[i] = true_weight[i] = 0;
  for (int64_t i = 0; kTarget != kProbabilities && i < tile.count; ++i) {
    if (is_ignored(args, tile.row + i)) {
      sums.sum[i] = 1;
      sums.max[i] = sums.weight[i] = sums.dot[i] = 0;
    } else {
      const int64_t t = args.index[tile.row + i];
      true_logit[i] = to_accumulator(tile.x[t * tile.x_stride + i]);
      true_weight[i] = A(args.keep) * weight_of<A>(args, t);
    }
  }
  A* stats = static_cast<A*>(args.row_stats) + tile.row;
  A* loss = static_cast<A*>(args.loss) + tile.row;
  for (int64_t i = 0; i < tile.count; i += kVector) {
    const int64_t count = tile.count - i;
    const V max = load(sums.max + i);
    const RowResults<V> results =
        finish_rows<kTarget, A>(max, load(sums.sum + i), load(sums.weight + i), load(sums.dot + i),
                                load(true_logit + i), load(true_weight + i));
    store_up_to(stats + i, max, count);
    store_up_to(stats + args.rows + i, results.sum, count);
    store_up_to(stats + 2 * args.rows + i, results.weight, count);
    store_up_to(loss + i, results.loss, count);
  }
}

template <class T, CrossEntropyTarget kTarget, class A = Accumulator<T>>
void backward_tile(const CrossEntropyArgs& args, const Tile<T>& tile) {
  using V = Vec<A>;
  constexpr int kVector = kLanes<A>;
  const A* stats = static_cast<const A*>(args.row_stats) + tile.row;
  const A* grad_rows = static_cast<const A*>(args.grad_rows);
  A true_grad[kCrossEntropyTile] = {};
  Mask<A> index[kCrossEntropyTile / kVector] = {};  // -1 where ignored
  if constexpr (kTarget != kProbabilities)
    for (int64_t i = 0; i < tile.count; ++i) {
      const bool ignored = is_ignored(args, tile.row + i);
      const int64_t t = ignored ? -1 : args.index[tile.row + i];
      reinterpret_cast<MaskLane<A>*>(index)[i] = MaskLane<A>(t);
      true_grad[i] = ignored ? A(0) : A(args.keep) * weight_of<A>(args, t);
    }
  A scale[kCrossEntropyTile], max[kCrossEntropyTile], grad[kCrossEntropyTile];
  for (int64_t i = 0; i < tile.count; i += kVector) {
    const int64_t count = tile.count - i;
    const V g = args.grad_per_row ? load_up_to(grad_rows + tile.row + i, count) : splat(grad_rows[0]);
    store(grad + i, g);
    store(true_grad + i, g * load(true_grad + i));
    store(max + i, load_up_to(stats + i, count));
    store(scale + i, g * (load_up_to(stats + 2 * args.rows + i, count) / load_up_to(stats + args.rows + i, count)));
  }
  for (int64_t c = 0; c < args.classes; ++c)
    for (int64_t i = 0; i < tile.count; i += kVector) {
      const int64_t count = tile.count - i;
      const V below = load_up_to(tile.x + c * tile.x_stride + i, count) - load(max + i);
      V value = exp_nonpositive(below) * load(scale + i);
      if constexpr (kTarget != kIndex) value -= load(grad + i) * tile_weight<T, kTarget>(args, tile, c, i);
      if constexpr (kTarget != kProbabilities) {
        const Mask<A> at = index[i / kVector];
        value = at == Mask<A>{} + int(c) ? value - load(true_grad + i) : value;
        value = at < Mask<A>{} ? V{} : value;
      }
      store_up_to(tile.grad_x + c * tile.grad_stride + i, value, count);
    }
}

template <class T, bool kBackward>
FASTNN_INLINE Tile<T> columns_tile(const CrossEntropyArgs& args, int64_t unit) {
  const int64_t tiles = (args.inner + kCrossEntropyTile - 1) / kCrossEntropyTile;
  const int64_t first = unit % tiles * kCrossEntropyTile, left = args.inner - first;
  const int64_t row = unit / tiles * args.inner + first;
  return {row,
          left < kCrossEntropyTile ? left : kCrossEntropyTile,
          row_of<T>(args, args.logits, row),
          args.logits.class_stride,
          args.target == kProbabilities ? row_of<T>(args, args.probabilities, row) : nullptr,
          args.probabilities.class_stride,
          kBackward ? row_of<T>(args, args.grad_input, row) : nullptr,
          args.grad_input.class_stride};
}

template <class T, CrossEntropyTarget kTarget>
void forward_columns(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) forward_tile<T, kTarget>(args, columns_tile<T, false>(args, unit));
}

template <class T, CrossEntropyTarget kTarget>
void backward_columns(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) backward_tile<T, kTarget>(args, columns_tile<T, true>(args, unit));
}

// Rows of few classes are transposed to columns, in A, and back: a vector spent on one short row would be mostly empty.
template <class A>
using NarrowTile = A[kCrossEntropyNarrow][kCrossEntropyTile];

template <class T, class A = Accumulator<T>>
FASTNN_INLINE void transpose_in(const CrossEntropyArgs& args, const ClassArray& array, int64_t row, int64_t count,
                                NarrowTile<A>& columns) {
  constexpr int L = kLanes<A>;
  // Up to here a whole vector may be read: of the next rows' elements, which end up in columns of no class.
  const T* end = row_of<T>(args, array, row + count - 1) + args.classes;
  for (int64_t i = 0; i < count; i += L)
    for (int64_t c = 0; c < args.classes; c += L) {
      Vec<A> block[L];
      for (int j = 0; j < L; ++j) {
        const T* x = row_of<T>(args, array, row + (i + j < count ? i + j : count - 1)) + c;
        block[j] = x + L <= end ? load(x) : load_up_to(x, args.classes - c);
      }
      transpose<A>(block);
      for (int j = 0; j < L; ++j) store(columns[c + j] + i, block[j]);
    }
}

template <class T, class A = Accumulator<T>>
FASTNN_INLINE void transpose_out(const CrossEntropyArgs& args, const ClassArray& array, int64_t row, int64_t count,
                                 const NarrowTile<A>& columns) {
  constexpr int L = kLanes<A>;
  const T* end = row_of<T>(args, array, row + count - 1) + args.classes;
  const bool packed = array.outer_stride == args.classes;  // what a whole vector overruns is a row still to be written
  for (int64_t i = 0; i < count; i += L) {
    Vec<A> blocks[kCrossEntropyNarrow / L][L];
    for (int64_t c = 0; c < args.classes; c += L) {
      for (int j = 0; j < L; ++j) blocks[c / L][j] = load(columns[c + j] + i);
      transpose<A>(blocks[c / L]);
    }
    for (int64_t j = 0; j < L && i + j < count; ++j) {
      T* x = row_of<T>(args, array, row + i + j);
      for (int64_t c = 0; c < args.classes; c += L)
        store_up_to(x + c, blocks[c / L][j], packed && x + c + L <= end ? L : args.classes - c);
    }
  }
}

template <class T, CrossEntropyTarget kTarget, bool kBackward, class A = Accumulator<T>>
FASTNN_INLINE void narrow_rows(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  NarrowTile<A> x, p, grad_x;
  for (int64_t row = begin; row < end; row += kCrossEntropyTile) {
    const int64_t count = end - row < kCrossEntropyTile ? end - row : kCrossEntropyTile;
    transpose_in<T>(args, args.logits, row, count, x);
    if (kTarget == kProbabilities) transpose_in<T>(args, args.probabilities, row, count, p);
    const Tile<A> tile = {row, count, x[0], kCrossEntropyTile, p[0], kCrossEntropyTile, grad_x[0], kCrossEntropyTile};
    if constexpr (kBackward) {
      backward_tile<A, kTarget>(args, tile);
      transpose_out<T>(args, args.grad_input, row, count, grad_x);
    } else {
      forward_tile<A, kTarget>(args, tile);
    }
  }
}

template <class T, CrossEntropyTarget kTarget>
void forward_narrow_rows(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  narrow_rows<T, kTarget, false>(args, begin, end);
}

template <class T, CrossEntropyTarget kTarget>
void backward_narrow_rows(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  narrow_rows<T, kTarget, true>(args, begin, end);
}

#define FASTNN_TARGETS(kernel, T) {kernel<T, kIndex>, kernel<T, kSmoothedIndex>, kernel<T, kProbabilities>}
#define FASTNN_DTYPES(kernel)                                                                   \
  {FASTNN_TARGETS(kernel, double), FASTNN_TARGETS(kernel, float), FASTNN_TARGETS(kernel, bf16), \
   FASTNN_TARGETS(kernel, f16)}

const CrossEntropyKernels kCrossEntropyKernels = {
    FASTNN_DTYPES(forward_rows),     FASTNN_DTYPES(forward_blocks),       FASTNN_DTYPES(forward_merge),
    FASTNN_DTYPES(forward_columns),  FASTNN_DTYPES(forward_narrow_rows),  FASTNN_DTYPES(backward_rows),
    FASTNN_DTYPES(backward_columns), FASTNN_DTYPES(backward_narrow_rows),
};

#undef FASTNN_TARGETS
#undef FASTNN_DTYPES

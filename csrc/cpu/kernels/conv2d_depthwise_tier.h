// Depthwise convolution on channels_last memory: one channel in, one out, so there is no reduction to block for and the
// work is bound by loads. A vector holds neighbouring channels of one pixel; nothing is packed or transposed.
//
// Blocking: kPixels results of a row x a cache line of channels stay in registers over the taps, so each weight vector
// is loaded once per kPixels FMAs and each input vector is an FMA's memory operand. Taps that fall on the padding are
// left out: by row for the whole row, by column for the few border pixels.
// Weight gradient: the taps stay in registers, nine at a time, over kColumns pixels of a row.
// Operations: 2 * kernel_h * kernel_w a result and pass; bytes: each tensor once.
//
// The problem is described by TapConv and TapGrad (conv2d.h); planes are not packed, only their geometry is used.

constexpr int kLine = 64 / FASTNN_VECTOR_BYTES;  // vectors in a cache line
constexpr int kPixels = 8 / kLine;
constexpr int kMostTaps = 9;
constexpr int64_t kColumns = 8;

// A tap's place in the source of one result row: elements from the row's first pixel (in the source, and in the ReLU
// output that masks it), and the column it starts from.
struct RowTap {
  int64_t offset, relu_offset, column, index;
};

// The taps of result row `y` that lie inside the source; returns how many.
FASTNN_INLINE int64_t row_taps(const ConvSource& s, const Planes& p, const Tap* taps, int64_t count, int64_t y,
                               RowTap* out) {
  int64_t n = 0;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t row = (y + taps[t].row) * p.step_h + p.phase_h[taps[t].phase] - p.origin_h;
    const int64_t column = taps[t].col * p.step_w + p.phase_w[taps[t].phase] - p.origin_w;
    if (row >= 0 && row < s.height)
      out[n++] = {row * s.stride.h + column * s.stride.w, row * s.relu_stride.h + column * s.relu_stride.w, column, t};
  }
  return n;
}

// Result columns [first, last) whose taps all lie inside the source.
struct Interior {
  int64_t first, last;
};
FASTNN_INLINE Interior interior(const ConvSource& s, const Planes& p, const RowTap* taps, int64_t count, int64_t cols) {
  Interior range{0, cols};
  for (int64_t t = 0; t < count; ++t) {
    const int64_t column = taps[t].column;
    const int64_t first = column < 0 ? (-column + p.step_w - 1) / p.step_w : 0;
    const int64_t last = column < s.width ? (s.width - column + p.step_w - 1) / p.step_w : 0;
    if (first > range.first) range.first = first;
    if (last < range.last) range.last = last;
  }
  if (range.first > cols) range.first = cols;
  if (range.last < range.first) range.last = range.first;
  return range;
}

template <class T, bool full>
FASTNN_INLINE Vec<Accumulator<T>> load_lanes(const T* p, int lanes) {
  if constexpr (full) return load(p);
  return load_n(p, lanes);
}

// A source vector; masked: where the ReLU output at `relu` lets it through.
template <class T, bool full, bool masked>
FASTNN_INLINE Vec<Accumulator<T>> load_source(const T* data, const T* relu, int lanes) {
  const Vec<Accumulator<T>> value = load_lanes<T, full>(data, lanes);
  if constexpr (!masked) return value;
  const Vec<Accumulator<T>> zero{};
  return load_lanes<T, full>(relu, lanes) <= zero ? zero : value;
}

// NP results of a row from column x on, NV vectors of channels (not full: one vector of `lanes` channels).
template <class T, int NP, int NV, bool full, bool masked>
FASTNN_INLINE void pixels(const TapConv& p, const T* source, const T* relu, const RowTap* taps, int64_t count,
                          int64_t channels, int64_t c, int64_t x, int lanes, T* result) {
  using A = Accumulator<T>;
  const A* weight = static_cast<const A*>(p.weight) + c;
  const int64_t step = p.planes.step_w * p.source.stride.w, relu_step = p.planes.step_w * p.source.relu_stride.w;
  Vec<A> sum[NP][NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    Vec<A> start{};
    if (p.bias) start = load_lanes<A, full>(static_cast<const A*>(p.bias) + c + v * kLanes<A>, lanes);
#pragma GCC unroll 8
    for (int i = 0; i < NP; ++i) sum[i][v] = start;
  }
  source += x * step + c;
  if (masked) relu += x * relu_step + c;
  for (int64_t t = 0; t < count; ++t) {
    const T* from = source + taps[t].offset;
    const T* mask = masked ? relu + taps[t].relu_offset : nullptr;
    const A* w = weight + taps[t].index * channels;
#pragma GCC unroll 8
    for (int i = 0; i < NP; ++i, from += step, mask += masked ? relu_step : 0)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int at = v * kLanes<A>;
        const T* mask_at = masked ? mask + at : nullptr;
        sum[i][v] += load(w + at) * load_source<T, full, masked>(from + at, mask_at, lanes);
      }
  }
#pragma GCC unroll 8
  for (int i = 0; i < NP; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec<A> value = p.relu ? (sum[i][v] < Vec<A>{} ? Vec<A>{} : sum[i][v]) : sum[i][v];
      T* to = result + (x + i) * p.result.stride.w + c + v * kLanes<A>;
      if constexpr (full)
        store(to, value);
      else
        store_n(to, value, lanes);
    }
}

// The taps of result column x that lie inside the source.
FASTNN_INLINE int64_t column_taps(const ConvSource& s, const Planes& p, const RowTap* taps, int64_t count, int64_t x,
                                  RowTap* out) {
  int64_t n = 0;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t column = x * p.step_w + taps[t].column;
    if (column >= 0 && column < s.width) out[n++] = taps[t];
  }
  return n;
}

// NP results of a row from column x on, every channel: channels innermost, as they lie in memory. (Along the row first,
// a power-of-two number of channels would put all its pixels into a few cache sets.)
template <class T, int NP, bool masked>
void all_channels(const TapConv& p, const T* source, const T* relu, const RowTap* taps, int64_t count, int64_t x,
                  T* result) {
  constexpr int L = kLanes<Accumulator<T>>;
  const int64_t padded = (p.groups + L - 1) / L * L;
  int64_t c = 0;
  for (; c + kLine * L <= p.groups; c += kLine * L)
    pixels<T, NP, kLine, true, masked>(p, source, relu, taps, count, padded, c, x, L, result);
  for (; c + L <= p.groups; c += L)
    pixels<T, NP, 1, true, masked>(p, source, relu, taps, count, padded, c, x, L, result);
  if (c < p.groups)
    pixels<T, NP, 1, false, masked>(p, source, relu, taps, count, padded, c, x, int(p.groups - c), result);
}

// Result rows [begin, end) of all images.
template <class T, bool masked>
void run_rows(const TapConv& p, int64_t begin, int64_t end) {
  RowTap taps[kMostTaps * kMostTaps], some[kMostTaps * kMostTaps];
  for (int64_t index = begin; index < end; ++index) {
    const int64_t n = index / p.rows, y = index % p.rows;
    const T* source = static_cast<const T*>(p.source.data) + n * p.source.stride.n;
    const T* relu = static_cast<const T*>(p.source.relu_output) + (masked ? n * p.source.relu_stride.n : 0);
    T* result = static_cast<T*>(p.result.data) + n * p.result.stride.n + y * p.result.stride.h;
    const int64_t count = row_taps(p.source, p.planes, p.taps, p.num_taps, y, taps);
    const Interior range = interior(p.source, p.planes, taps, count, p.cols);
    for (int64_t x = 0; x < p.cols;) {
      if (x >= range.first && x + kPixels <= range.last) {
        all_channels<T, kPixels, masked>(p, source, relu, taps, count, x, result);
        x += kPixels;
      } else {
        const int64_t inside = column_taps(p.source, p.planes, taps, count, x, some);
        all_channels<T, 1, masked>(p, source, relu, some, inside, x, result);
        ++x;
      }
    }
  }
}

template <class T>
void run_depthwise(const TapConv& p, int64_t begin, int64_t end) {
  if (p.source.relu_output)
    run_rows<T, true>(p, begin, end);
  else
    run_rows<T, false>(p, begin, end);
}

// packed[tap][channel], channels padded to whole vectors. strides[0]: of the channel.
template <class T>
void pack_depthwise(const TapConv& p, const void* weight_, const int64_t* strides, void* packed_) {
  using A = Accumulator<T>;
  const T* weight = static_cast<const T*>(weight_);
  A* packed = static_cast<A*>(packed_);
  const int64_t padded = (p.groups + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  for (int64_t t = 0; t < p.num_taps; ++t)
    for (int64_t c = 0; c < padded; ++c)
      packed[t * padded + c] = c < p.groups ? to_accumulator(weight[c * strides[0] + p.taps[t].weight]) : A(0);
}

// One result row's operands at one vector of channels.
template <class T>
struct RowGradient {
  const T *source, *grad, *relu;
  int64_t step, grad_step, relu_step;
  int lanes;
};

// sums[tap] += over result columns [first, last) of grad * source, for NT taps.
template <class T, int NT, bool full, bool masked>
FASTNN_INLINE void add_taps(const RowGradient<T>& r, const RowTap* taps, int64_t first, int64_t last,
                            Vec<Accumulator<T>>* sums) {
  Vec<Accumulator<T>> sum[NT];
#pragma GCC unroll 9
  for (int t = 0; t < NT; ++t) sum[t] = sums[taps[t].index];
  for (int64_t x = first; x < last; ++x) {
    const auto g =
        load_source<T, full, masked>(r.grad + x * r.grad_step, masked ? r.relu + x * r.relu_step : nullptr, r.lanes);
#pragma GCC unroll 9
    for (int t = 0; t < NT; ++t) sum[t] += g * load_lanes<T, full>(r.source + taps[t].offset + x * r.step, r.lanes);
  }
#pragma GCC unroll 9
  for (int t = 0; t < NT; ++t) sums[taps[t].index] = sum[t];
}

template <class T, bool full, bool masked>
void add_all_taps(const RowGradient<T>& r, const RowTap* taps, int64_t count, int64_t first, int64_t last,
                  Vec<Accumulator<T>>* sums, Vec<Accumulator<T>>* bias) {
  int64_t t = 0;
  for (; t + kMostTaps <= count; t += kMostTaps) add_taps<T, kMostTaps, full, masked>(r, taps + t, first, last, sums);
  for (; t + 3 <= count; t += 3) add_taps<T, 3, full, masked>(r, taps + t, first, last, sums);
  for (; t < count; ++t) add_taps<T, 1, full, masked>(r, taps + t, first, last, sums);
  if (bias)
    for (int64_t x = first; x < last; ++x)
      *bias +=
          load_source<T, full, masked>(r.grad + x * r.grad_step, masked ? r.relu + x * r.relu_step : nullptr, r.lanes);
}

// Slices [begin, end) of the rows of all images, every channel. scratch: a vector a tap and channel vector, and one
// more a channel vector for the bias.
template <class T, bool masked>
void run_slices(const TapGrad& p, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const int64_t rows = p.batch * p.rows, vectors = (p.groups + L - 1) / L, each = p.num_taps + 1;
  Vec<A>* sums = static_cast<Vec<A>*>(scratch);
  RowTap taps[kMostTaps * kMostTaps], some[kMostTaps * kMostTaps];
  for (int64_t slice = begin; slice < end; ++slice) {
    for (int64_t i = 0; i < vectors * each; ++i) sums[i] = Vec<A>{};
    for (int64_t index = rows * slice / p.slices; index < rows * (slice + 1) / p.slices; ++index) {
      const int64_t n = index / p.rows, y = index % p.rows;
      RowGradient<T> r{};
      r.source = static_cast<const T*>(p.source.data) + n * p.source.stride.n;
      r.grad = static_cast<const T*>(p.grad.data) + n * p.grad.stride.n + y * p.grad.stride.h;
      if (p.grad.relu_output)
        r.relu = static_cast<const T*>(p.grad.relu_output) + n * p.grad.relu_stride.n + y * p.grad.relu_stride.h;
      r.step = p.planes.step_w * p.source.stride.w, r.grad_step = p.grad.stride.w, r.relu_step = p.grad.relu_stride.w;
      const int64_t count = row_taps(p.source, p.planes, p.taps, p.num_taps, y, taps);
      const Interior range = interior(p.source, p.planes, taps, count, p.cols);
      for (int64_t x = 0, next; x < p.cols; x = next) {
        // A few columns at a time, then the next channels: see all_channels.
        const bool inside = x >= range.first && x < range.last;
        next = !inside ? x + 1 : x + kColumns < range.last ? x + kColumns : range.last;
        const int64_t n_some = column_taps(p.source, p.planes, taps, count, x, some);
        for (int64_t v = 0; v < vectors; ++v) {
          RowGradient<T> at = r;
          at.source += v * L, at.grad += v * L;
          if (at.relu) at.relu += v * L;
          at.lanes = int(p.groups - v * L < L ? p.groups - v * L : L);
          Vec<A>*sum = sums + v * each, *bias = p.bias_sums ? sum + p.num_taps : nullptr;
          if (at.lanes == L)
            add_all_taps<T, true, masked>(at, some, n_some, x, next, sum, bias);
          else
            add_all_taps<T, false, masked>(at, some, n_some, x, next, sum, bias);
        }
      }
    }
    A* weight_sums = static_cast<A*>(p.weight_sums) + slice * p.groups * p.num_taps;
    A* bias_sums = p.bias_sums ? static_cast<A*>(p.bias_sums) + slice * p.groups : nullptr;
    for (int64_t c = 0; c < p.groups; ++c) {
      for (int64_t t = 0; t < p.num_taps; ++t) weight_sums[c * p.num_taps + t] = sums[c / L * each + t][c % L];
      if (bias_sums) bias_sums[c] = sums[c / L * each + p.num_taps][c % L];
    }
  }
}

template <class T>
void run_depthwise_grad(const TapGrad& p, void* scratch, int64_t begin, int64_t end) {
  if (p.grad.relu_output)
    run_slices<T, true>(p, scratch, begin, end);
  else
    run_slices<T, false>(p, scratch, begin, end);
}

#define FASTNN_ALL_DTYPES(function) {function<double>, function<float>, function<bf16>, function<f16>}
const DepthwiseKernels kDepthwiseKernels = {
    FASTNN_ALL_DTYPES(pack_depthwise),
    FASTNN_ALL_DTYPES(run_depthwise),
    FASTNN_ALL_DTYPES(run_depthwise_grad),
};
#undef FASTNN_ALL_DTYPES

// Depthwise convolution: one channel in, one out, so there is no depth to reduce over and the work is bound by memory and
// loads. The same kernels serve NCHW, with neighbouring columns in a vector's lanes, and channels_last, with neighbouring
// channels; they differ in how a line is packed, a weight is loaded and a result is stored.
//
// Lines: every source row is read once, in memory's own order, into a ring of lines of the accumulator type, with zeros
// for the padding and columns split by the stride's phase. What a result row needs is then a few lines that stay in the
// L1 cache (NCHW: of one channel) or the L2 cache (channels_last: of all channels, or as many as fit).
// Tiles: kDepthwiseRows result rows x kSpan vectors stay in registers over the taps. Taps of one column are taken up to
// three at a time, so that one loaded vector serves three result rows: for 3 x 3, 15 loads every 24 FMAs.
// Gradient of the input with a stride: the result's phases are all computed from the same lines, and phases of columns
// are interleaved before they are stored, so each result line is written once, whole.
// Gradient of the weight: a block of up to 3 x 3 taps stays in registers along a row (NCHW) or kColumns pixels.
//
// Operations: 2 * kernel_h * kernel_w a result and pass. Bytes: each tensor once; the lines add a load and a store for
// each element of the source.
//
// Padding is multiplied as zeros, which must not make a NaN of an infinite weight or gradient: channels with such are
// computed again, element by element (`run_carefully`, `sum_carefully`).

constexpr int kRows = kDepthwiseRows, kGradRows = kDepthwiseGradRows;
constexpr int kSpan = 2;
constexpr int kColumn = 3;        // taps of a column taken together
constexpr int64_t kColumns = 16;  // pixels whose products are summed before the next channels' are

FASTNN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTNN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTNN_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- reading a source ----

template <class T>
FASTNN_INLINE Vec<Accumulator<T>> load_lanes(const T* p, int lanes) {
  return lanes == kLanes<Accumulator<T>> ? load(p) : load_n(p, lanes);
}

// A source vector; masked: where the ReLU output at `relu` lets it through.
template <class T, bool masked>
FASTNN_INLINE Vec<Accumulator<T>> load_source(const T* data, const T* relu, int lanes = kLanes<Accumulator<T>>) {
  const Vec<Accumulator<T>> value = load_lanes(data, lanes), zero{};
  if constexpr (!masked) return value;
  return load_lanes(relu, lanes) <= zero ? zero : value;
}

template <class T>
Accumulator<T> read_element(const ConvSource& s, int64_t n, int64_t c, int64_t y, int64_t x) {
  const T* relu = static_cast<const T*>(s.relu_output);
  const Strides4 &d = s.stride, &r = s.relu_stride;
  if (relu && to_accumulator(relu[n * r.n + c * r.c + y * r.h + x * r.w]) <= 0) return 0;
  return to_accumulator(static_cast<const T*>(s.data)[n * d.n + c * d.c + y * d.h + x * d.w]);
}

// Every step-th of a row's elements, `count` of them. May write a vector past `count`, of zeros.
template <class T, bool masked>
FASTNN_INLINE void pack_columns(const T* src, const T* relu, int64_t step, int64_t count, Accumulator<T>* dst) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  if (step <= 2 && count >= L) {
    // Of two vectors; the second starts one early, so as not to reach past the last element wanted.
    Mask<A> every_other;
    for (int k = 0; k < L; ++k) every_other[k] = 2 * k + (k < L / 2 ? 0 : 1);
    for (int64_t i = 0; i < count; i += L) {
      if (i > count - L) i = count - L;
      const T *from = src + i * step, *mask = masked ? relu + i * step : nullptr;
      const Vec<A> low = load_source<T, masked>(from, mask);
      if (step == 1) {
        store(dst + i, low);
      } else {
        const Vec<A> high = load_source<T, masked>(from + L - 1, masked ? mask + L - 1 : nullptr);
        store(dst + i, __builtin_shuffle(low, high, every_other));
      }
    }
  } else if (step == 1) {
    store(dst, load_source<T, masked>(src, relu, int(count)));
  } else {
    for (int64_t i = 0; i < count; ++i)
      dst[i] = masked && to_accumulator(relu[i * step]) <= 0 ? A(0) : to_accumulator(src[i * step]);
  }
}

// The channels of one pixel.
template <class T, bool masked>
FASTNN_INLINE void pack_pixel(const T* src, const T* relu, int64_t channels, Accumulator<T>* dst) {
  constexpr int L = kLanes<Accumulator<T>>;
  int64_t c = 0;
  for (; c + L <= channels; c += L) store(dst + c, load_source<T, masked>(src + c, masked ? relu + c : nullptr));
  if (c < channels) store(dst + c, load_source<T, masked>(src + c, masked ? relu + c : nullptr, int(channels - c)));
}

// Row y of `channels` channels from c on; what is padding in `line` stays as it is.
template <class T, bool by_channel, bool masked>
void pack_line_as(const ConvSource& s, int64_t step, const DepthwiseLines& l, int64_t n, int64_t c, int64_t channels,
               int64_t y, Accumulator<T>* line) {
  const T* src = static_cast<const T*>(s.data) + n * s.stride.n + c * s.stride.c + y * s.stride.h;
  const T* relu = static_cast<const T*>(s.relu_output);
  if (masked) relu += n * s.relu_stride.n + c * s.relu_stride.c + y * s.relu_stride.h;
  if constexpr (by_channel) {
    // In the order of memory: pixel after pixel.
    const int64_t first = most(0, -l.origin_w), last = least(s.width, l.pitch * step - l.origin_w);
    int64_t phase = (first + l.origin_w) % step, column = (first + l.origin_w) / step;
    for (int64_t x = first; x < last; ++x) {
      pack_pixel<T, masked>(src + x * s.stride.w, masked ? relu + x * s.relu_stride.w : nullptr, channels,
                            line + (phase * l.pitch + column) * l.pixel);
      if (++phase == step) phase = 0, ++column;
    }
  } else {
    for (int64_t phase = 0; phase < step; ++phase) {
      const int64_t shift = phase - l.origin_w, first = shift < 0 ? ceil_div(-shift, step) : 0;
      const int64_t last = least(l.pitch - kDepthwiseSlack, shift < s.width ? ceil_div(s.width - shift, step) : 0);
      const int64_t x = first * step + shift;
      if (first < last)
        pack_columns<T, masked>(src + x, masked ? relu + x : nullptr, step, last - first,
                                line + phase * l.pitch + first);
    }
  }
}

template <class T, bool by_channel>
void pack_line(const ConvSource& s, int64_t step, const DepthwiseLines& l, int64_t n, int64_t c, int64_t channels,
               int64_t y, Accumulator<T>* line) {
  if (s.relu_output)
    pack_line_as<T, by_channel, true>(s, step, l, n, c, channels, y, line);
  else
    pack_line_as<T, by_channel, false>(s, step, l, n, c, channels, y, line);
}

// The source rows that some result rows read, as lines[0..lines.count).
template <class A>
struct Window {
  const DepthwiseLines& l;
  const A** lines;
  A *zeros, *ring;
  int64_t next;  // rows before it are packed

  Window(const DepthwiseLines& layout, void* scratch) : l(layout), next(0) {
    lines = static_cast<const A**>(scratch);
    zeros = reinterpret_cast<A*>(static_cast<char*>(scratch) + layout.pointer_bytes());
    ring = zeros + layout.size;
    for (int64_t i = 0; i < layout.size * (layout.count + 1); ++i) zeros[i] = 0;
  }
};

template <class T, bool by_channel>
void pack_rows(Window<Accumulator<T>>& w, const ConvSource& s, int64_t step, int64_t n, int64_t c, int64_t channels,
               int64_t first) {
  for (int64_t i = 0; i < w.l.count; ++i) {
    const int64_t y = first + i;
    const bool inside = y >= 0 && y < s.height;
    Accumulator<T>* line = inside ? w.ring + y % w.l.count * w.l.size : w.zeros;
    w.lines[i] = line;
    if (!inside || y < w.next) continue;
    pack_line<T, by_channel>(s, step, w.l, n, c, channels, y, line);
    w.next = y + 1;
  }
}

// ---- taps ----

// Taps of one column whose rows are a result row's step apart: they read lines `row`, `row` + step, ... at `offset`.
struct TapColumn {
  int64_t row, offset;
  int rows;
  int64_t taps[kColumn];
};

// The taps as columns, in the order of their first row and then of their offset; returns how many.
int64_t tap_columns(const DepthwiseLines& l, const Planes& p, const Tap* taps, int64_t count, TapColumn* columns) {
  int64_t rows[kDepthwiseMaxTaps], offsets[kDepthwiseMaxTaps], n = 0;
  bool taken[kDepthwiseMaxTaps] = {};
  for (int64_t t = 0; t < count; ++t) {
    rows[t] = taps[t].row * p.step_h + p.phase_h[taps[t].phase] + l.origin_h - p.origin_h;
    offsets[t] = (p.phase_w[taps[t].phase] * l.pitch + taps[t].col + l.origin_w - p.origin_w) * l.pixel;
  }
  for (;; ++n) {
    int64_t first = -1;
    for (int64_t t = 0; t < count; ++t)
      if (!taken[t] &&
          (first < 0 || rows[t] < rows[first] || (rows[t] == rows[first] && offsets[t] < offsets[first])))
        first = t;
    if (first < 0) return n;
    TapColumn& column = columns[n];
    column = {rows[first], offsets[first], 1, {first}};
    taken[first] = true;
    for (int64_t t = 0; t < count; ++t)
      if (!taken[t] && column.rows < kColumn && offsets[t] == column.offset &&
          rows[t] == column.row + column.rows * p.step_h) {
        column.taps[column.rows++] = t, taken[t] = true;
        t = -1;  // taps may come in any order
      }
  }
}

FASTNN_INLINE int64_t padded_channels(int64_t channels) { return ceil_div(channels, 16) * 16; }

// packed[tap][channel], and then, [channel], 0 where all of a channel's weights are finite and NaN where not.
template <class T>
void pack_weight(const TapConv& p, const void* weight_, int64_t stride, void* packed_) {
  using A = Accumulator<T>;
  const T* weight = static_cast<const T*>(weight_);
  A* packed = static_cast<A*>(packed_);
  const int64_t padded = padded_channels(p.groups);
  A* finite = packed + p.num_taps * padded;
  for (int64_t c = 0; c < padded; ++c) finite[c] = 0;
  for (int64_t t = 0; t < p.num_taps; ++t)
    for (int64_t c = 0; c < padded; ++c) {
      const A value = c < p.groups ? to_accumulator(weight[c * stride + p.taps[t].weight]) : A(0);
      packed[t * padded + c] = value, finite[c] += value * A(0);
    }
}

// ---- forward and gradient of the input ----

// sum[r][i] += the products of one column's taps, for result row r and vector i.
template <class A, bool by_channel, int rows, int NX>
FASTNN_INLINE void add_column(const TapColumn& column, const A* const* lines, int64_t step_h, int64_t at,
                              int64_t step, const A* weight, int64_t padded, Vec<A> (&sum)[kRows][NX]) {
  Vec<A> w[rows];
#pragma GCC unroll 3
  for (int k = 0; k < rows; ++k) {
    const A* tap = weight + column.taps[k] * padded;
    w[k] = by_channel ? load(tap) : splat(*tap);
  }
#pragma GCC unroll 8
  for (int line = 0; line < kRows + rows - 1; ++line) {
    const A* from = lines[column.row + line * step_h] + column.offset + at;
#pragma GCC unroll 2
    for (int i = 0; i < NX; ++i) {
      const Vec<A> value = load(from + i * step);
#pragma GCC unroll 3
      for (int k = 0; k < rows; ++k)
        if (line - k >= 0 && line - k < kRows) sum[line - k][i] += w[k] * value;
    }
  }
}

template <class T>
FASTNN_INLINE void store_lanes(T* p, Vec<Accumulator<T>> value, int64_t lanes) {
  if (lanes >= kLanes<Accumulator<T>>)
    store(p, value);
  else if (lanes > 0)
    store_n(p, value, int(lanes));
}

// What is the same for all tiles of some result rows (of one row phase).
template <class T>
struct ResultRows {
  const TapConv* phases;  // of columns
  int64_t up_w, cols, width;
  const TapColumn* columns;
  const int64_t* ends;  // phase b has columns [ends[b], ends[b + 1])
  const Accumulator<T>* const* lines;
  Accumulator<T>* block;  // results of one tile, all phases
  int64_t pixel, n, y, rows;
};

// `count` results of a row, from the tile's results of each column phase, `pitch` apart.
template <class T>
FASTNN_INLINE void interleave(const Accumulator<T>* from, int64_t pitch, int64_t phases, int64_t count, T* to) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  if (phases == 2) {
    Mask<A> low, high;
    for (int k = 0; k < L; ++k) low[k] = k / 2 + k % 2 * L, high[k] = low[k] + L / 2;
    for (int64_t i = 0; i < count; i += 2 * L) {
      const Vec<A> even = load(from + i / 2), odd = load(from + pitch + i / 2);
      store_lanes(to + i, __builtin_shuffle(even, odd, low), count - i);
      store_lanes(to + i + L, __builtin_shuffle(even, odd, high), count - i - L);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) to[i] = from_accumulator<T>(from[i % phases * pitch + i / phases]);
}

// kRows rows x NX vectors from column x on, of all column phases and `channels` channels from c0 on.
template <class T, bool by_channel, int NX>
FASTNN_INLINE void tile(const ResultRows<T>& r, int64_t c0, int64_t channels, int64_t x) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const int64_t padded = padded_channels(r.phases->groups), step_h = r.phases->planes.step_h;
  const int64_t step = by_channel ? r.pixel : L;
  for (int64_t b = 0; b < r.up_w; ++b) {
    const TapConv& p = r.phases[b];
    const Strides4& stride = p.result.stride;
    T* result = static_cast<T*>(p.result.data) + r.n * stride.n + c0 * stride.c + r.y * stride.h + x * stride.w;
    for (int64_t c = 0; c < channels; c += by_channel ? L : 1) {
      const A* weight = static_cast<const A*>(p.weight) + c0 + c;
      const int lanes = by_channel ? int(least(L, channels - c)) : L;
      Vec<A> start{};
      if (p.bias) {
        const A* bias = static_cast<const A*>(p.bias) + c0 + c;
        start = by_channel ? load_lanes(bias, lanes) : splat(*bias);
      }
      Vec<A> sum[kRows][NX];
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
        for (int i = 0; i < NX; ++i) sum[row][i] = start;
      const int64_t at = by_channel ? x * r.pixel + c : x;
      for (const TapColumn* column = r.columns + r.ends[b]; column < r.columns + r.ends[b + 1]; ++column) {
        if (column->rows == 3)
          add_column<A, by_channel, 3>(*column, r.lines, step_h, at, step, weight, padded, sum);
        else if (column->rows == 2)
          add_column<A, by_channel, 2>(*column, r.lines, step_h, at, step, weight, padded, sum);
        else
          add_column<A, by_channel, 1>(*column, r.lines, step_h, at, step, weight, padded, sum);
      }
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
        for (int i = 0; i < NX; ++i) {
          const Vec<A> value = p.relu ? (sum[row][i] < Vec<A>{} ? Vec<A>{} : sum[row][i]) : sum[row][i];
          if (by_channel) {
            if (row < r.rows && x + i < p.cols) store_lanes(result + row * stride.h + i * stride.w + c, value, lanes);
          } else if (r.up_w == 1) {
            if (row < r.rows) store_lanes(result + row * stride.h + i * L, value, p.cols - x - i * L);
          } else {
            store(r.block + ((b * kRows + row) * NX + i) * L, value);
          }
        }
    }
  }
  if (by_channel || r.up_w == 1) return;
  const Strides4& stride = r.phases->result.stride;
  T* result = static_cast<T*>(r.phases->result.data) + r.n * stride.n + c0 * stride.c + r.y * stride.h;
  for (int64_t row = 0; row < r.rows; ++row)
    interleave(r.block + row * NX * L, kRows * NX * L, r.up_w, least(NX * L * r.up_w, r.width - x * r.up_w),
               result + row * stride.h + x * r.up_w);
}

// Result rows [begin, end) of each row phase, channel c: padding is left out of the sums.
template <class T>
void run_carefully(const DepthwiseConv& d, int64_t n, int64_t c, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  for (int64_t phase = 0; phase < d.up_h * d.up_w; ++phase) {
    const TapConv& p = d.phases[phase];
    const Planes& planes = p.planes;
    const A* weight = static_cast<const A*>(p.weight) + c;
    T* result = static_cast<T*>(p.result.data) + n * p.result.stride.n + c * p.result.stride.c;
    for (int64_t y = begin; y < least(end, p.rows); ++y)
      for (int64_t x = 0; x < p.cols; ++x) {
        A sum = p.bias ? static_cast<const A*>(p.bias)[c] : A(0);
        for (int64_t t = 0; t < p.num_taps; ++t) {
          const Tap& tap = p.taps[t];
          const int64_t row = (y + tap.row) * planes.step_h + planes.phase_h[tap.phase] - planes.origin_h;
          const int64_t column = (x + tap.col) * planes.step_w + planes.phase_w[tap.phase] - planes.origin_w;
          if (row >= 0 && row < p.source.height && column >= 0 && column < p.source.width)
            sum += weight[t * padded_channels(p.groups)] * read_element<T>(p.source, n, c, row, column);
        }
        result[y * p.result.stride.h + x * p.result.stride.w] = from_accumulator<T>(p.relu && sum < 0 ? A(0) : sum);
      }
  }
}

template <class T>
bool finite_weights(const DepthwiseConv& d, int64_t c) {
  bool finite = true;
  for (int64_t i = 0; i < d.up_h * d.up_w; ++i) {
    const TapConv& p = d.phases[i];
    finite &= static_cast<const Accumulator<T>*>(p.weight)[p.num_taps * padded_channels(p.groups) + c] == 0;
  }
  return finite;
}

template <class T, bool by_channel>
void run_layout(const DepthwiseConv& d, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int64_t kTile = by_channel ? 1 : kLanes<A>;  // result columns of a vector
  const TapConv& first = *d.phases;
  Window<A> window(d.lines, scratch);
  A* block = window.ring + d.lines.count * d.lines.size;
  TapColumn columns[kDepthwiseMaxTaps];
  int64_t ends[kMaxPhases + 1] = {};
  for (int64_t i = 0; i < d.up_h * d.up_w; ++i)
    ends[i + 1] = ends[i] + tap_columns(d.lines, d.phases[i].planes, d.phases[i].taps, d.phases[i].num_taps,
                                        columns + ends[i]);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t channel_block = task % d.channel_blocks, rest = task / d.channel_blocks;
    const int64_t n = rest / d.row_blocks, y_begin = rest % d.row_blocks * d.block_rows;
    const int64_t y_end = least(d.rows, y_begin + d.block_rows);
    const int64_t c_begin = channel_block * d.block_channels, c_end = least(first.groups, c_begin + d.block_channels);
    const int64_t together = by_channel ? c_end - c_begin : 1;
    for (int64_t c = c_begin; c < c_end; c += together) {
      window.next = 0;
      for (int64_t y = y_begin; y < y_end; y += kRows) {
        pack_rows<T, by_channel>(window, first.source, first.planes.step_w, n, c, together,
                                 y * first.planes.step_h - d.lines.origin_h);
        for (int64_t a = 0; a < d.up_h; ++a) {
          const TapConv* phases = d.phases + a * d.up_w;
          ResultRows<T> r{phases, d.up_w, d.cols, 0, columns, ends + a * d.up_w, window.lines,
                          block,  d.lines.pixel, n, y, least(kRows, phases->rows - y)};
          for (int64_t b = 0; b < d.up_w; ++b) r.width += phases[b].cols;
          for (int64_t x = 0; x < d.cols;) {
            // The last tile may overlap the one before it: no partial vectors, unless the whole row is one.
            const int span = d.cols - x >= kSpan * kTile ? kSpan : 1;
            if (x + span * kTile > d.cols) x = most(0, d.cols - span * kTile);
            if (span == kSpan)
              tile<T, by_channel, kSpan>(r, c, together, x);
            else
              tile<T, by_channel, 1>(r, c, together, x);
            x += span * kTile;
          }
        }
      }
      for (int64_t k = c; k < c + together; ++k)
        if (!finite_weights<T>(d, k)) run_carefully<T>(d, n, k, y_begin, y_end);
    }
  }
}

template <class T>
void run_depthwise(const DepthwiseConv& d, void* scratch, int64_t begin, int64_t end) {
  if (d.lines.by_channel)
    run_layout<T, true>(d, scratch, begin, end);
  else
    run_layout<T, false>(d, scratch, begin, end);
}

// ---- gradient of the weight ----

// sums[tap] += over `count` vectors, `step` apart from `at` on, and kGradRows rows: gradient * source, for a block of
// rows x cols taps.
template <class A, int rows, int cols>
FASTNN_INLINE void add_products(const TapColumn* columns, const A* const* lines, int64_t step_h,
                                const A* const* grads, int64_t at, int64_t step, int64_t count, Vec<A>* sums) {
  Vec<A> sum[rows][cols];
  const A* from[kGradRows + rows - 1];
#pragma GCC unroll 3
  for (int k = 0; k < rows; ++k)
#pragma GCC unroll 3
    for (int q = 0; q < cols; ++q) sum[k][q] = sums[columns[q].taps[k]];
#pragma GCC unroll 4
  for (int line = 0; line < kGradRows + rows - 1; ++line) from[line] = lines[columns->row + line * step_h];
  for (int64_t i = 0; i < count; ++i, at += step) {
    Vec<A> g[kGradRows];
#pragma GCC unroll 2
    for (int row = 0; row < kGradRows; ++row) g[row] = load(grads[row] + at);
#pragma GCC unroll 3
    for (int q = 0; q < cols; ++q) {
      const int64_t offset = at + columns[q].offset;
#pragma GCC unroll 4
      for (int line = 0; line < kGradRows + rows - 1; ++line) {
        const Vec<A> value = load(from[line] + offset);
#pragma GCC unroll 3
        for (int k = 0; k < rows; ++k)
          if (line - k >= 0 && line - k < kGradRows) sum[k][q] += g[line - k] * value;
      }
    }
  }
#pragma GCC unroll 3
  for (int k = 0; k < rows; ++k)
#pragma GCC unroll 3
    for (int q = 0; q < cols; ++q) sums[columns[q].taps[k]] = sum[k][q];
}

template <class A>
void add_all_products(const TapColumn* columns, int64_t num_columns, const A* const* lines, int64_t step_h,
                      const A* const* grads, int64_t at, int64_t step, int64_t count, Vec<A>* sums) {
  for (const TapColumn *column = columns, *end = columns + num_columns; column < end;) {
    const bool three = end - column >= 3 && column[1].row == column->row && column[2].row == column->row &&
                       column[1].rows == column->rows && column[2].rows == column->rows;
    if (column->rows == 3 && three)
      add_products<A, 3, 3>(column, lines, step_h, grads, at, step, count, sums);
    else if (column->rows == 3)
      add_products<A, 3, 1>(column, lines, step_h, grads, at, step, count, sums);
    else if (column->rows == 2 && three)
      add_products<A, 2, 3>(column, lines, step_h, grads, at, step, count, sums);
    else if (column->rows == 2)
      add_products<A, 2, 1>(column, lines, step_h, grads, at, step, count, sums);
    else if (three)
      add_products<A, 1, 3>(column, lines, step_h, grads, at, step, count, sums);
    else
      add_products<A, 1, 1>(column, lines, step_h, grads, at, step, count, sums);
    column += three ? 3 : 1;
  }
}

// sums[tap] of channel c over rows [begin, end) of all images: padding is left out.
template <class T>
void sum_carefully(const TapGrad& p, int64_t c, int64_t begin, int64_t end, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  const Planes& planes = p.planes;
  for (int64_t t = 0; t < p.num_taps; ++t) {
    const Tap& tap = p.taps[t];
    A sum = 0;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t n = index / p.rows, y = index % p.rows;
      const int64_t row = (y + tap.row) * planes.step_h + planes.phase_h[tap.phase] - planes.origin_h;
      if (row < 0 || row >= p.source.height) continue;
      for (int64_t x = 0; x < p.cols; ++x) {
        const int64_t column = (x + tap.col) * planes.step_w + planes.phase_w[tap.phase] - planes.origin_w;
        if (column >= 0 && column < p.source.width)
          sum += read_element<T>(p.grad, n, c, y, x) * read_element<T>(p.source, n, c, row, column);
      }
    }
    sums[t] = sum;
  }
}

// sums[vector][tap] += over rows [index, stop) of all images' rows, which belong to one image; after the taps, the bias.
template <class T, bool by_channel>
void sum_rows(const DepthwiseGrad& d, Window<Accumulator<T>>& window, Accumulator<T>* grads, const TapColumn* columns,
              int64_t num_columns, int64_t index, int64_t stop, int64_t c, int64_t channels,
              Vec<Accumulator<T>>* sums) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const TapGrad& p = *d.problem;
  const int64_t n = index / p.rows, vectors = by_channel ? ceil_div(channels, L) : 1;
  // A pass of vectors: kColumns pixels of one vector of channels, or a whole row.
  const int64_t step = by_channel ? d.lines.pixel : L, passed = by_channel ? kColumns : ceil_div(p.cols, L) * L;
  window.next = 0;
  for (; index < stop; index += kGradRows) {
    const int64_t y = index % p.rows;
    pack_rows<T, by_channel>(window, p.source, p.planes.step_w, n, c, channels,
                             y * p.planes.step_h - d.lines.origin_h);
    const A* rows[kGradRows];
    for (int i = 0; i < kGradRows; ++i) {
      A* line = grads + i * d.grad_lines.size;
      rows[i] = index + i < stop ? line : window.zeros;
      if (index + i < stop) pack_line<T, by_channel>(p.grad, 1, d.grad_lines, n, c, channels, y + i, line);
    }
    for (int64_t x = 0; x < p.cols; x += passed)
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = x * step + v * L;
        const int64_t count = by_channel ? least(passed, p.cols - x) : passed / L;
        Vec<A>* sum = sums + v * (p.num_taps + 1);
        add_all_products(columns, num_columns, window.lines, p.planes.step_h, rows, at, step, count, sum);
        if (!p.bias_sums) continue;
        Vec<A> total[kGradRows] = {};
        for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 2
          for (int row = 0; row < kGradRows; ++row) total[row] += load(rows[row] + at + i * step);
#pragma GCC unroll 2
        for (int row = 0; row < kGradRows; ++row) sum[p.num_taps] += total[row];
      }
  }
}

template <class T, bool by_channel>
void run_grad_layout(const DepthwiseGrad& d, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const TapGrad& p = *d.problem;
  Window<A> window(d.lines, scratch);
  A* grads = window.ring + d.lines.count * d.lines.size;
  for (int64_t i = 0; i < kGradRows * d.grad_lines.size; ++i) grads[i] = 0;
  Vec<A>* sums = reinterpret_cast<Vec<A>*>(grads + kGradRows * d.grad_lines.size);
  const int64_t each = p.num_taps + 1;  // the last: of the bias
  TapColumn columns[kDepthwiseMaxTaps];
  const int64_t num_columns = tap_columns(d.lines, p.planes, p.taps, p.num_taps, columns);
  const int64_t all_rows = p.batch * p.rows;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task / d.channel_blocks, c_begin = task % d.channel_blocks * d.block_channels;
    const int64_t c_end = least(p.groups, c_begin + d.block_channels);
    const int64_t first_row = all_rows * slice / p.slices, end_row = all_rows * (slice + 1) / p.slices;
    A* weight_sums = static_cast<A*>(p.weight_sums) + slice * p.groups * p.num_taps;
    A* bias_sums = p.bias_sums ? static_cast<A*>(p.bias_sums) + slice * p.groups : nullptr;
    const int64_t together = by_channel ? c_end - c_begin : 1;
    const int64_t vectors = by_channel ? ceil_div(together, L) : c_end - c_begin;
    for (int64_t i = 0; i < vectors * each; ++i) sums[i] = Vec<A>{};
    for (int64_t index = first_row, stop; index < end_row; index = stop) {
      stop = least(end_row, (index / p.rows + 1) * p.rows);
      for (int64_t c = c_begin; c < c_end; c += together)
        sum_rows<T, by_channel>(d, window, grads, columns, num_columns, index, stop, c, together,
                                sums + (by_channel ? 0 : c - c_begin) * each);
    }
    for (int64_t c = c_begin; c < c_end; ++c) {
      const int64_t lane = (c - c_begin) % L;
      const Vec<A>* sum = sums + (by_channel ? (c - c_begin) / L : c - c_begin) * each;
      A *out = weight_sums + c * p.num_taps, finite = 0;
      for (int64_t t = 0; t < p.num_taps; ++t) {
        out[t] = by_channel ? sum[t][lane] : sum_lanes(sum[t]);
        finite += out[t] * A(0);
      }
      if (finite != 0) sum_carefully<T>(p, c, first_row, end_row, out);
      if (bias_sums) bias_sums[c] = by_channel ? sum[p.num_taps][lane] : sum_lanes(sum[p.num_taps]);
    }
  }
}

template <class T>
void run_depthwise_grad(const DepthwiseGrad& d, void* scratch, int64_t begin, int64_t end) {
  if (d.lines.by_channel)
    run_grad_layout<T, true>(d, scratch, begin, end);
  else
    run_grad_layout<T, false>(d, scratch, begin, end);
}

#define FASTNN_ALL_DTYPES(function) {function<double>, function<float>, function<bf16>, function<f16>}
const DepthwiseKernels kDepthwiseKernels = {
    FASTNN_ALL_DTYPES(pack_weight),
    FASTNN_ALL_DTYPES(run_depthwise),
    FASTNN_ALL_DTYPES(run_depthwise_grad),
};
#undef FASTNN_ALL_DTYPES

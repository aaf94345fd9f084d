// Depthwise convolution: one channel in, one out, so there is no depth to reduce over and the work is bound by memory
// and loads. (In channels_last, small groups too: a vector has whole groups, and of each channel of theirs the lanes of
// its group take a copy, by one permutation.) The same kernels serve NCHW, with neighbouring columns in a vector's
// lanes, and channels_last, with neighbouring channels; they differ in how a line is packed, a weight is loaded and a
// result is stored.
//
// Lines: every source row is read once, in memory's own order, into a ring of lines of the accumulator type, with zeros
// for the padding and columns split by the stride's phase. What a result row needs is then a few lines that stay in the
// L1 cache (NCHW: of one channel) or the L2 cache (channels_last: of all channels, or as many as fit). A channels_last
// source that needs neither converting nor masking is read in place where no tap meets padding: only the columns at its
// edges become lines.
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

constexpr int kRows = kDepthwiseRows;
constexpr int kSpan = kDepthwiseSpan;
constexpr int kColumn = 3;        // taps of a column taken together
constexpr int64_t kColumns = 16;  // pixels whose products are summed before the next channels' are

// ---- reading a source ----

// A source vector; masked: where the ReLU output at `relu` lets it through.
template <class T, bool masked>
FASTNN_INLINE Vec<Accumulator<T>> load_source(const T* data, const T* relu, int lanes = kLanes<Accumulator<T>>) {
  return load_masked(data, masked ? relu : nullptr, lanes);
}

template <class T>
Accumulator<T> read_element(const ConvSource& s, int64_t n, int64_t c, int64_t y, int64_t x) {
  const T* relu = static_cast<const T*>(s.relu_output);
  const Strides4 &d = s.stride, &r = s.relu_stride;
  if (relu && to_accumulator(relu[n * r.n + c * r.c + y * r.h + x * r.w]) <= 0) return 0;
  return to_accumulator(static_cast<const T*>(s.data)[n * d.n + c * d.c + y * d.h + x * d.w]);
}

// Rows of a source: their elements are neighbours in memory, or their pixels' channels are.
template <class T>
struct Rows {
  const T *data, *relu;
  int64_t stride, relu_stride, rows;
};

// Of each row, every step-th element, `count` of them, to lines `size` apart. May write a vector past `count`, of
// zeros.
template <class T, bool masked>
void pack_columns(Rows<T> r, int64_t step, int64_t count, Accumulator<T>* dst, int64_t size) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  for (; r.rows > 0; --r.rows, r.data += r.stride, r.relu += masked ? r.relu_stride : 0, dst += size) {
    int64_t i = 0;
    if (step == 1 && count < L) {
      store(dst, load_source<T, masked>(r.data, r.relu, int(count)));
    } else if (step == 1) {
      for (; i + L <= count; i += L) store(dst + i, load_source<T, masked>(r.data + i, r.relu + (masked ? i : 0)));
      i = count - L;
      store(dst + i, load_source<T, masked>(r.data + i, r.relu + (masked ? i : 0)));
    } else {
      for (; i < count; ++i)
        dst[i] = masked && to_accumulator(r.relu[i * step]) <= 0 ? A(0) : to_accumulator(r.data[i * step]);
    }
  }
}

// Of each row, the even elements to `even` and the odd ones to `odd`, `count` of either.
template <class T, bool masked>
void pack_column_pairs(Rows<T> r, int64_t count, Accumulator<T>* even, Accumulator<T>* odd, int64_t size) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  Mask<A> evens, odds;
  for (int k = 0; k < L; ++k) evens[k] = 2 * k, odds[k] = 2 * k + 1;
  for (; r.rows > 0; --r.rows, r.data += r.stride, r.relu += masked ? r.relu_stride : 0, even += size, odd += size)
    for (int64_t i = 0; i < count; i += L) {
      if (i > count - L) i = count - L;
      const T *from = r.data + 2 * i, *mask = r.relu + (masked ? 2 * i : 0);
      const Vec<A> low = load_source<T, masked>(from, mask);
      const Vec<A> high = load_source<T, masked>(from + L, mask + (masked ? L : 0));
      store(even + i, __builtin_shuffle(low, high, evens));
      store(odd + i, __builtin_shuffle(low, high, odds));
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

// Memory to fetch into the cache while something else is computed, a piece at a time: NCHW packs a whole plane, then
// computes it, and would wait for memory meanwhile. An address past its tensor does no harm.
struct Ahead {
  const char* at = nullptr;
  int64_t lines = 0;  // a piece

  template <class T>
  void set(const T* begin, int64_t count, int64_t pieces) {
    at = reinterpret_cast<const char*>(begin), lines = ceil_div(count * int64_t(sizeof(T)), 64 * pieces);
  }
  template <class T>
  Ahead& set_rows(const ConvSource& s, int64_t n, int64_t c, int64_t y, int64_t rows, int64_t pieces) {
    set(static_cast<const T*>(s.data) + n * s.stride.n + c * s.stride.c + y * s.stride.h, rows * s.width * s.stride.w,
        pieces);
    return *this;
  }
  FASTNN_INLINE void fetch() {
    for (int64_t i = 0; i < lines; ++i, at += 64) __builtin_prefetch(at);
  }
};

// What of a source row lies on a line, by phase of columns.
struct Columns {
  int64_t x, count, at;  // the first source column, how many, and where the first goes
};

struct Lines {
  const DepthwiseLines& layout;
  Columns phases[kMaxPhases];

  Lines(const DepthwiseLines& l, int64_t width) : layout(l) {
    for (int64_t phase = 0; phase < l.step_w; ++phase) {
      const int64_t first = l.first(phase), x = first * l.step_w + phase - l.origin_w;
      phases[phase] = {x, most(0, least(l.columns - first, ceil_div(width - x, l.step_w))), l.at(phase, first)};
    }
  }
};

// Rows from y on of `channels` channels from c on, to lines one after the other, whose padding stays as it is.
template <class T, bool by_channel, bool masked>
void pack_lines_as(const ConvSource& s, const Lines& lines, int64_t n, int64_t c, int64_t channels, int64_t y,
                   int64_t rows, Accumulator<T>* to) {
  const DepthwiseLines& l = lines.layout;
  Rows<T> r{static_cast<const T*>(s.data) + n * s.stride.n + c * s.stride.c + y * s.stride.h, nullptr, s.stride.h,
            s.relu_stride.h, rows};
  if (masked)
    r.relu = static_cast<const T*>(s.relu_output) + n * s.relu_stride.n + c * s.relu_stride.c + y * s.relu_stride.h;
  if constexpr (by_channel) {
    // In the order of memory: pixel after pixel.
    const int64_t begin = most(0, -l.origin_w), end = least(s.width, l.columns * l.step_w - l.origin_w);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t x = begin;; ++x) {
        if (x == l.skip_begin) x = l.skip_end;
        if (x >= end) break;
        const int64_t phase = (x + l.origin_w) % l.step_w, column = (x + l.origin_w) / l.step_w;
        pack_pixel<T, masked>(r.data + i * r.stride + x * s.stride.w,
                              masked ? r.relu + i * r.relu_stride + x * s.relu_stride.w : nullptr, channels,
                              to + i * l.size + (phase * l.pitch + column) * l.pixel);
      }
  } else {
    int64_t pairs = 0;
    if (l.step_w == 2) {
      // As far as both phases reach they are taken together, from the source's first two columns on.
      const Columns& even = lines.phases[l.origin_w & 1];
      const Columns& odd = lines.phases[~l.origin_w & 1];
      pairs = least(even.count, odd.count);
      if (pairs < kLanes<Accumulator<T>>) pairs = 0;
      pack_column_pairs<T, masked>(r, pairs, to + even.at, to + odd.at, l.size);
    }
    for (int64_t phase = 0; phase < l.step_w; ++phase) {
      const Columns& run = lines.phases[phase];
      Rows<T> from = r;
      from.data += run.x + pairs * l.step_w, from.relu += masked ? run.x + pairs * l.step_w : 0;
      if (run.count > pairs) pack_columns<T, masked>(from, l.step_w, run.count - pairs, to + run.at + pairs, l.size);
    }
  }
}

template <class T, bool by_channel>
void pack_lines(const ConvSource& s, const Lines& lines, int64_t n, int64_t c, int64_t channels, int64_t y,
                int64_t rows, Accumulator<T>* to) {
  if (s.relu_output)
    pack_lines_as<T, by_channel, true>(s, lines, n, c, channels, y, rows, to);
  else
    pack_lines_as<T, by_channel, false>(s, lines, n, c, channels, y, rows, to);
}

// A ring of lines, and the table of those that some result rows read: table[phase * table_rows + i] is source row
// i * step_h + phase, counted from the first that the topmost result reads. Result row r reads from table + r on.
// in_place: the same of the rows in the source itself.
template <class A>
struct Window {
  Lines lines;
  int64_t next = 0;  // rows before it are packed
  const A **table, **in_place;
  A *zeros, *ring;

  Window(const DepthwiseLines& l, const ConvSource& s, void* scratch) : lines(l, s.width) {
    table = static_cast<const A**>(scratch);
    in_place = table + l.step_h * l.table_rows;
    zeros = reinterpret_cast<A*>(static_cast<char*>(scratch) + l.table_bytes());
    ring = zeros + l.size;
    for (int64_t i = 0; i < l.size * (l.ring + 1); ++i) zeros[i] = 0;
  }
};

// Turns the window to the result rows from y on.
template <class T, bool by_channel>
void turn_to(Window<Accumulator<T>>& w, const ConvSource& s, int64_t n, int64_t c, int64_t channels, int64_t y) {
  const DepthwiseLines& l = w.lines.layout;
  const int64_t first = y * l.step_h - l.origin_h, end = least(s.height, first + l.ring);
  // A row's place in the ring is its number modulo the ring's length.
  for (int64_t row = most(w.next, most(first, 0)), rows; row < end; row += rows) {
    rows = least(end - row, l.ring - row % l.ring);
    pack_lines<T, by_channel>(s, w.lines, n, c, channels, row, rows, w.ring + row % l.ring * l.size);
  }
  w.next = end;
  int64_t slot = first - first / l.ring * l.ring, row = first;
  if (slot < 0) slot += l.ring;
  const auto* source = static_cast<const Accumulator<T>*>(s.data) + n * s.stride.n + c * s.stride.c;
  for (int64_t i = 0; i < l.table_rows; ++i)
    for (int64_t phase = 0; phase < l.step_h; ++phase, ++row) {
      const bool inside = row >= 0 && row < s.height;
      w.table[phase * l.table_rows + i] = inside ? w.ring + slot * l.size : w.zeros;
      if (l.reads_in_place()) w.in_place[phase * l.table_rows + i] = inside ? source + row * s.stride.h : w.zeros;
      if (++slot == l.ring) slot = 0;
    }
}

// ---- taps ----

// Taps of one column whose rows are the stride apart: they read lines table[row], table[row + 1], ... at `offset`.
struct TapColumn {
  int64_t row, offset;
  int rows;
  int64_t taps[kColumn];
};

// The taps as columns, in the order of their first row and then of their offset; returns how many. The kernels take
// taps in this order.
int64_t tap_columns(const DepthwiseLines& l, const Planes& p, const Tap* taps, int64_t count, TapColumn* columns) {
  int64_t rows[kDepthwiseMaxTaps], offsets[kDepthwiseMaxTaps], n = 0;
  bool taken[kDepthwiseMaxTaps] = {};
  for (int64_t t = 0; t < count; ++t) {
    const int64_t row = taps[t].row * p.step_h + p.phase_h[taps[t].phase] + l.origin_h - p.origin_h;
    rows[t] = row % p.step_h * l.table_rows + row / p.step_h;
    offsets[t] = l.at(p.phase_w[taps[t].phase], taps[t].col + l.origin_w - p.origin_w);
  }
  for (;; ++n) {
    int64_t first = -1;
    for (int64_t t = 0; t < count; ++t)
      if (!taken[t] && (first < 0 || rows[t] < rows[first] || (rows[t] == rows[first] && offsets[t] < offsets[first])))
        first = t;
    if (first < 0) return n;
    TapColumn& column = columns[n];
    column = {rows[first], offsets[first], 0, {}};
    for (int64_t t = first; t >= 0 && column.rows < kColumn;) {
      column.taps[column.rows++] = t, taken[t] = true;
      for (t = count - 1; t >= 0; --t)
        if (!taken[t] && offsets[t] == column.offset && rows[t] == column.row + column.rows) break;
    }
  }
}

// The same columns of a source that is read in place, with pixels `pixel` elements apart.
void columns_in_place(const Planes& p, const Tap* taps, const TapColumn* columns, int64_t count, int64_t pixel,
                      TapColumn* in_place) {
  for (int64_t i = 0; i < count; ++i) {
    const Tap& tap = taps[columns[i].taps[0]];
    in_place[i] = columns[i];
    in_place[i].offset = (tap.col * p.step_w + p.phase_w[tap.phase] - p.origin_w) * pixel;
  }
}

FASTNN_INLINE int64_t padded_channels(int64_t channels) {
  return ceil_div(channels, kDepthwiseVector) * kDepthwiseVector;
}

// packed[tap][channel of the group][result channel], and then, [result channel], 0 where all of its weights are finite
// and NaN where not.
template <class T>
void pack_weight(const DepthwiseLines& l, const TapConv& p, const void* weight_, const int64_t* strides,
                 void* packed_) {
  using A = Accumulator<T>;
  TapColumn columns[kDepthwiseMaxTaps];
  const int64_t num_columns = tap_columns(l, p.planes, p.taps, p.num_taps, columns);
  const int64_t padded = padded_channels(p.results()), group = p.group_results;
  A *packed = static_cast<A*>(packed_), *finite = packed + p.num_taps * p.group_channels * padded;
  for (int64_t m = 0; m < padded; ++m) finite[m] = 0;
  for (const TapColumn* column = columns; column < columns + num_columns; ++column)
    for (int k = 0; k < column->rows; ++k)
      for (int64_t c = 0; c < p.group_channels; ++c, packed += padded) {
        const T* weight = static_cast<const T*>(weight_) + p.taps[column->taps[k]].weight + c * strides[2];
        for (int64_t m = 0; m < padded; ++m) {
          packed[m] = m < p.results() ? to_accumulator(weight[m / group * strides[0] + m % group * strides[1]]) : A(0);
          finite[m] += packed[m] * A(0);
        }
      }
}

// ---- forward and gradient of the input ----

// The lanes of channel 0 of each lane's group of `group` channels: channel c's are c further on.
template <class A>
FASTNN_INLINE Mask<A> first_of_group(int64_t group) {
  Mask<A> first{};
  for (int i = 0; i < kLanes<A>; ++i) first[i] = MaskLane<A>(i & -group);
  return first;
}

// sum[r][i] += the products of one column's taps, for result row r and vector i; grouped: of all channels of a group.
template <class A, int rows, int NX, bool grouped>
FASTNN_INLINE void add_column(const A* const* lines, int64_t at, int64_t step, const A* weight, int64_t weight_step,
                              int64_t group, Vec<A> (&sum)[kRows][NX]) {
  Mask<A> lanes{};
  if (grouped) lanes = first_of_group<A>(group);
  for (int64_t c = 0; c < group; ++c, weight += weight_step, lanes += 1) {
    Vec<A> w[rows];
#pragma GCC unroll 3
    for (int k = 0; k < rows; ++k) w[k] = load(weight + k * group * weight_step);
#pragma GCC unroll 8
    for (int line = 0; line < kRows + rows - 1; ++line)
#pragma GCC unroll 2
      for (int i = 0; i < NX; ++i) {
        Vec<A> value = load(lines[line] + at + i * step);
        if (grouped) value = __builtin_shuffle(value, lanes);
#pragma GCC unroll 3
        for (int k = 0; k < rows; ++k)
          if (line - k >= 0 && line - k < kRows) sum[line - k][i] += w[k] * value;
      }
  }
}

// Where a result's taps are read: `pixel` elements further on for each of its columns.
template <class A>
struct Reads {
  const A* const* lines;
  const TapColumn *columns, *columns_end;
  int64_t pixel;
};

// Results of up to kRows rows, and all that does not change along them: one of the result's column phases.
template <class T>
struct ResultRows {
  using A = Accumulator<T>;
  T* result;
  int64_t row_stride, column_stride, rows, cols;
  Reads<A> packed, in_place;
  const A *weight, *bias;  // a vector each: of channels, or one value in all lanes
  int64_t weight_step, group;
  bool relu;
};

// kRows rows x NX vectors from column x on; by_channel: of `lanes` channels from c on, in groups or not. Into the
// result, or where it is not null, into `block`, a vector after the other.
template <class T, bool by_channel, int NX, bool grouped>
FASTNN_INLINE void tile(const ResultRows<T>& r, const Reads<Accumulator<T>>& from, int64_t x, int64_t c, int64_t lanes,
                        Accumulator<T>* block) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const int64_t step = by_channel ? from.pixel : L, at = by_channel ? x * from.pixel + c : x;
  Vec<A> sum[kRows][NX];
  const Vec<A> start = r.bias ? load(r.bias + c) : Vec<A>{};
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int i = 0; i < NX; ++i) sum[row][i] = start;
  const A* weight = r.weight + c;
  const int64_t group = grouped ? r.group : 1;
  for (const TapColumn* column = from.columns; column < from.columns_end; ++column) {
    const A* const* lines = from.lines + column->row;
    const int64_t first = at + column->offset;
    if (column->rows == 3)
      add_column<A, 3, NX, grouped>(lines, first, step, weight, r.weight_step, group, sum);
    else if (column->rows == 2)
      add_column<A, 2, NX, grouped>(lines, first, step, weight, r.weight_step, group, sum);
    else
      add_column<A, 1, NX, grouped>(lines, first, step, weight, r.weight_step, group, sum);
    weight += column->rows * group * r.weight_step;
  }
  if (r.relu)
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
      for (int i = 0; i < NX; ++i) sum[row][i] = sum[row][i] < Vec<A>{} ? Vec<A>{} : sum[row][i];
  // Vector i of a row is a pixel, or L columns.
  constexpr int kWide = by_channel ? 1 : L;
  T* to = r.result + (by_channel ? x * r.column_stride + c : x);
  const int64_t vector_stride = by_channel ? r.column_stride : L;
  if (!by_channel && block) {
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
      for (int i = 0; i < NX; ++i) store(block + (row * NX + i) * L, sum[row][i]);
  } else if (r.rows >= kRows && x + NX * kWide <= r.cols && lanes >= L) {
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
      for (int i = 0; i < NX; ++i) store(to + row * r.row_stride + i * vector_stride, sum[row][i]);
  } else {
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
      for (int i = 0; i < NX; ++i)
        if (row < r.rows)
          store_lanes(to + row * r.row_stride + i * vector_stride, sum[row][i],
                      by_channel ? (x + i < r.cols ? lanes : 0) : r.cols - x - i * L);
  }
}

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

// A tile's columns of all column phases; by_channel: of `channels` channels. `width`: of the phases together.
template <class T, bool by_channel, int NX, bool grouped>
FASTNN_INLINE void tiles(const ResultRows<T>* phases, int64_t up_w, int64_t width, int64_t x, int64_t channels,
                         bool in_place, Accumulator<T>* block, Ahead* ahead) {
  constexpr int L = kLanes<Accumulator<T>>;
  ahead[0].fetch(), ahead[1].fetch();
  if (by_channel) {
    for (int64_t b = 0; b < up_w; ++b)
      for (int64_t c = 0; c < channels; c += L)
        tile<T, true, NX, grouped>(phases[b], in_place ? phases[b].in_place : phases[b].packed, x, c, channels - c,
                                   nullptr);
    return;
  }
  if (up_w == 1) {
    tile<T, false, NX, false>(*phases, phases->packed, x, 0, L, nullptr);
  } else {
    constexpr int64_t kPhase = kRows * NX * L;
    for (int64_t b = 0; b < up_w; ++b)
      tile<T, false, NX, false>(phases[b], phases[b].packed, x, 0, L, block + b * kPhase);
    for (int64_t row = 0; row < phases->rows; ++row)
      interleave(block + row * NX * L, kPhase, up_w, least(NX * L * up_w, width - x * up_w),
                 phases->result + row * phases->row_stride + x * up_w);
  }
}

// Result rows [begin, end) of each row phase, result channel m: padding is left out of the sums.
template <class T>
void run_carefully(const DepthwiseConv& d, int64_t n, int64_t m, int64_t begin, int64_t end, const TapColumn* columns,
                   const int64_t* ends) {
  using A = Accumulator<T>;
  for (int64_t phase = 0; phase < d.up_h * d.up_w; ++phase) {
    const TapConv& p = d.phases[phase];
    const Planes& planes = p.planes;
    T* result = static_cast<T*>(p.result.data) + n * p.result.stride.n + m * p.result.stride.c;
    for (int64_t y = begin; y < least(end, p.rows); ++y)
      for (int64_t x = 0; x < p.cols; ++x) {
        A sum = p.bias ? static_cast<const A*>(p.bias)[m] : A(0);
        const A* weight = static_cast<const A*>(p.weight) + m;
        for (const TapColumn* column = columns + ends[phase]; column < columns + ends[phase + 1]; ++column)
          for (int k = 0; k < column->rows; ++k) {
            const Tap& tap = p.taps[column->taps[k]];
            const int64_t row = (y + tap.row) * planes.step_h + planes.phase_h[tap.phase] - planes.origin_h;
            const int64_t col = (x + tap.col) * planes.step_w + planes.phase_w[tap.phase] - planes.origin_w;
            const bool inside = row >= 0 && row < p.source.height && col >= 0 && col < p.source.width;
            const int64_t first = m / p.group_results * p.group_channels;
            for (int64_t c = first; c < first + p.group_channels; ++c, weight += padded_channels(p.results()))
              if (inside) sum += *weight * read_element<T>(p.source, n, c, row, col);
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
    const int64_t weights = p.num_taps * p.group_channels * padded_channels(p.results());
    finite &= static_cast<const Accumulator<T>*>(p.weight)[weights + c] == 0;
  }
  return finite;
}

template <class T, bool by_channel, bool grouped>
void run_layout(const DepthwiseConv& d, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int64_t kWide = by_channel ? 1 : kLanes<A>;  // result columns of a vector
  const TapConv& first = *d.phases;
  const int64_t num_phases = d.up_h * d.up_w;
  Window<A> window(d.lines, first.source, scratch);
  A* block = window.ring + d.lines.ring * d.lines.size;
  A* splats = block + d.up_w * kRows * kSpan * kLanes<A>;  // [phase][tap, bias]
  TapColumn columns[kDepthwiseMaxTaps], in_place[kDepthwiseMaxTaps];
  int64_t ends[kMaxPhases + 1] = {};
  ResultRows<T> rows[kMaxPhases];
  for (int64_t i = 0; i < num_phases; ++i) {
    const TapConv& p = d.phases[i];
    const int64_t count = tap_columns(d.lines, p.planes, p.taps, p.num_taps, columns + ends[i]);
    columns_in_place(p.planes, p.taps, columns + ends[i], count, p.source.stride.w, in_place + ends[i]);
    ends[i + 1] = ends[i] + count;
    ResultRows<T>& r = rows[i];
    r.row_stride = p.result.stride.h, r.column_stride = p.result.stride.w, r.cols = p.cols, r.relu = p.relu;
    r.group = p.group_channels;
    r.packed = {nullptr, columns + ends[i], columns + ends[i + 1], d.lines.pixel};
    r.in_place = {nullptr, in_place + ends[i], in_place + ends[i + 1], p.planes.step_w * p.source.stride.w};
  }
  for (int64_t task = begin; task < end; ++task) {
    const int64_t channel_block = task % d.channel_blocks, rest = task / d.channel_blocks;
    const int64_t n = rest / d.row_blocks, y_begin = rest % d.row_blocks * d.block_rows;
    const int64_t y_end = least(d.rows, y_begin + d.block_rows);
    const int64_t c = channel_block * d.block_channels, channels = least(d.block_channels, first.results() - c);
    A* splat_to = splats;
    for (int64_t i = 0; i < num_phases; ++i) {
      const TapConv& p = d.phases[i];
      const int64_t padded = padded_channels(p.results());
      const A *weight = static_cast<const A*>(p.weight) + c,
              *bias = p.bias ? static_cast<const A*>(p.bias) + c : nullptr;
      rows[i].weight = weight, rows[i].weight_step = padded, rows[i].bias = bias;
      if (by_channel) continue;
      rows[i].weight = splat_to, rows[i].weight_step = kLanes<A>;
      for (int64_t t = 0; t < p.num_taps; ++t, splat_to += kLanes<A>) store(splat_to, splat(weight[t * padded]));
      if (!bias) continue;
      rows[i].bias = splat_to;
      store(splat_to, splat(*bias));
      splat_to += kLanes<A>;
    }
    window.next = 0;
    for (int64_t y = y_begin; y < y_end; y += kRows) {
      const int64_t inside = (y - y_begin) % d.lines.rows;
      if (inside == 0) turn_to<T, by_channel>(window, first.source, n, c, channels, y);
      for (int64_t a = 0; a < d.up_h; ++a) {
        ResultRows<T>* phases = rows + a * d.up_w;
        int64_t width = 0;
        for (int64_t b = 0; b < d.up_w; ++b) {
          const TapConv& p = d.phases[a * d.up_w + b];
          const Strides4& stride = p.result.stride;
          phases[b].result = static_cast<T*>(p.result.data) + n * stride.n + c * stride.c + y * stride.h;
          phases[b].packed.lines = window.table + inside, phases[b].in_place.lines = window.in_place + inside;
          phases[b].rows = least(kRows, p.rows - y), width += p.cols;
        }
        // NCHW fetches the same rows of the next plane, and the result rows that come next; channels_last, which writes
        // in memory's order, the source's next rows.
        const int64_t step = first.planes.step_h, pieces = ceil_div(d.cols, kSpan * kWide);
        Ahead ahead[2];
        if (by_channel && d.channel_blocks == 1 && a == 0)
          ahead[0].set_rows<T>(first.source, n, c, y * step - d.lines.origin_h + d.lines.ring, kRows * step, pieces);
        if (!by_channel && a == 0) ahead[0].set_rows<T>(first.source, n, c + 1, y * step, kRows * step, pieces);
        if (!by_channel) ahead[1].set(phases->result + kRows * phases->row_stride, kRows * width, pieces);
        const int64_t parts[] = {d.lines.in_place_begin, d.lines.in_place_end, d.cols};
        for (int64_t x = 0, part = 0; part < 3; ++part)
          for (const int64_t begin = x, end = parts[part]; x < end;) {
            // The last tile may overlap the one before it: no partial vectors, unless the whole row is one.
            const int span = end - x >= kSpan * kWide ? kSpan : 1;
            if (x + span * kWide > end) x = most(begin, end - span * kWide);
            if (span == kSpan)
              tiles<T, by_channel, kSpan, grouped>(phases, d.up_w, width, x, channels, part == 1, block, ahead);
            else
              tiles<T, by_channel, 1, grouped>(phases, d.up_w, width, x, channels, part == 1, block, ahead);
            x += span * kWide;
          }
      }
    }
    for (int64_t k = c; k < c + channels; ++k)
      if (!finite_weights<T>(d, k)) run_carefully<T>(d, n, k, y_begin, y_end, columns, ends);
  }
}

template <class T>
void run_depthwise(const DepthwiseConv& d, void* scratch, int64_t begin, int64_t end) {
  if (d.phases->group_channels > 1)
    run_layout<T, true, true>(d, scratch, begin, end);
  else if (d.lines.by_channel)
    run_layout<T, true, false>(d, scratch, begin, end);
  else
    run_layout<T, false, false>(d, scratch, begin, end);
}

// ---- gradient of the weight ----

// Vectors of kRows lines, `step` apart from `at` on.
template <class A>
struct Vectors {
  const A* const* lines;
  int64_t at, step;
};

// sums[tap] += over `count` vectors and kRows rows: gradient * source, for a block of rows x cols taps.
template <class A, int rows, int cols>
FASTNN_INLINE void add_products(const TapColumn* columns, Vectors<A> source, Vectors<A> grad, int64_t count,
                                Vec<A>* sums) {
  Vec<A> sum[rows][cols];
#pragma GCC unroll 3
  for (int k = 0; k < rows; ++k)
#pragma GCC unroll 3
    for (int q = 0; q < cols; ++q) sum[k][q] = sums[columns[q].taps[k]];
  const A* const* lines = source.lines + columns->row;
  for (int64_t i = 0; i < count; ++i, source.at += source.step, grad.at += grad.step) {
    Vec<A> g[kRows];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) g[row] = load(grad.lines[row] + grad.at);
#pragma GCC unroll 3
    for (int q = 0; q < cols; ++q) {
      const int64_t from = source.at + columns[q].offset;
#pragma GCC unroll 8
      for (int line = 0; line < kRows + rows - 1; ++line) {
        const Vec<A> value = load(lines[line] + from);
#pragma GCC unroll 3
        for (int k = 0; k < rows; ++k)
          if (line - k >= 0 && line - k < kRows) sum[k][q] += g[line - k] * value;
      }
    }
  }
#pragma GCC unroll 3
  for (int k = 0; k < rows; ++k)
#pragma GCC unroll 3
    for (int q = 0; q < cols; ++q) sums[columns[q].taps[k]] = sum[k][q];
}

template <class A>
void add_all_products(const TapColumn* columns, int64_t num_columns, const Vectors<A>& source, const Vectors<A>& grad,
                      int64_t count, Vec<A>* sums) {
  for (const TapColumn *column = columns, *end = columns + num_columns; column < end;) {
    const bool three = end - column >= 3 && column[1].row == column->row && column[2].row == column->row &&
                       column[1].rows == column->rows && column[2].rows == column->rows;
    if (column->rows == 3 && three)
      add_products<A, 3, 3>(column, source, grad, count, sums);
    else if (column->rows == 3)
      add_products<A, 3, 1>(column, source, grad, count, sums);
    else if (column->rows == 2 && three)
      add_products<A, 2, 3>(column, source, grad, count, sums);
    else if (column->rows == 2)
      add_products<A, 2, 1>(column, source, grad, count, sums);
    else if (three)
      add_products<A, 1, 3>(column, source, grad, count, sums);
    else
      add_products<A, 1, 1>(column, source, grad, count, sums);
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

// sums[vector][tap] += over rows [index, stop) of all images' rows, which belong to one image; after the taps, the
// bias.
template <class T, bool by_channel>
void sum_rows(const DepthwiseGrad& d, Window<Accumulator<T>>& window, const Lines& grad_lines, Accumulator<T>* grads,
              const TapColumn* columns, const TapColumn* columns_in_place, int64_t num_columns, int64_t index,
              int64_t stop, int64_t c, int64_t channels, Vec<Accumulator<T>>* sums) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const TapGrad& p = *d.problem;
  const int64_t n = index / p.rows, vectors = by_channel ? ceil_div(channels, L) : 1;
  // A pass of vectors: kColumns pixels of one vector of channels, or a whole row.
  const int64_t passed = by_channel ? kColumns : ceil_div(p.cols, L) * L;
  const int64_t parts[] = {d.lines.in_place_begin, d.lines.in_place_end, p.cols};
  const int64_t grad_step = !by_channel ? L : d.grad_in_place ? p.grad.stride.w : d.lines.pixel;
  window.next = 0;
  for (const int64_t begin = index; index < stop; index += kRows) {
    const int64_t y = index % p.rows;
    const int64_t inside = (index - begin) % d.lines.rows;
    if (!by_channel) {
      Ahead().set_rows<T>(p.source, n, c + 1, y * p.planes.step_h, kRows * p.planes.step_h, 1).fetch();
      Ahead().set_rows<T>(p.grad, n, c + 1, y, kRows, 1).fetch();
    }
    if (inside == 0) turn_to<T, by_channel>(window, p.source, n, c, channels, y);
    const A* rows[kRows];
    for (int i = 0; i < kRows; ++i) {
      const A* line = grads + i * d.grad_lines.size;
      if (d.grad_in_place)
        line = static_cast<const A*>(p.grad.data) + n * p.grad.stride.n + c + (y + i) * p.grad.stride.h;
      rows[i] = index + i < stop ? line : window.zeros;
    }
    if (!d.grad_in_place)
      pack_lines<T, by_channel>(p.grad, grad_lines, n, c, channels, y, least(kRows, stop - index), grads);
    // The source's next rows come soon enough by themselves; a second stream beside them does not.
    Ahead ahead;
    if (by_channel && d.channel_blocks == 1)
      ahead.set_rows<T>(p.grad, n, c, y + kRows, kRows, ceil_div(p.cols, passed) * vectors);
    for (int64_t x = 0, part = 0; part < 3; ++part)
      for (int64_t width; x < parts[part]; x += width) {
        width = least(passed, parts[part] - x);
        const bool in_place = part == 1;
        const A* const* lines = (in_place ? window.in_place : window.table) + inside;
        const int64_t step = !by_channel ? L : in_place ? p.planes.step_w * p.source.stride.w : d.lines.pixel;
        const int64_t count = by_channel ? width : passed / L;
        for (int64_t v = 0; v < vectors; ++v) {
          ahead.fetch();
          const Vectors<A> source{lines, x * step + v * L, step}, grad{rows, x * grad_step + v * L, grad_step};
          Vec<A>* sum = sums + v * (p.num_taps + 1);
          add_all_products(in_place ? columns_in_place : columns, num_columns, source, grad, count, sum);
          if (!p.bias_sums) continue;
          Vec<A> total[kRows] = {};
          for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) total[row] += load(rows[row] + grad.at + i * grad_step);
#pragma GCC unroll 4
          for (int row = 0; row < kRows; ++row) sum[p.num_taps] += total[row];
        }
      }
  }
}

template <class T, bool by_channel>
void run_grad_layout(const DepthwiseGrad& d, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const TapGrad& p = *d.problem;
  Window<A> window(d.lines, p.source, scratch);
  const Lines grad_lines(d.grad_lines, p.cols);
  A* grads = window.ring + d.lines.ring * d.lines.size;
  for (int64_t i = 0; i < kRows * d.grad_lines.size; ++i) grads[i] = 0;
  Vec<A>* sums = reinterpret_cast<Vec<A>*>(grads + kRows * d.grad_lines.size);
  const int64_t each = p.num_taps + 1;  // the last: of the bias
  TapColumn columns[kDepthwiseMaxTaps], in_place[kDepthwiseMaxTaps];
  const int64_t num_columns = tap_columns(d.lines, p.planes, p.taps, p.num_taps, columns);
  columns_in_place(p.planes, p.taps, columns, num_columns, p.source.stride.w, in_place);
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
        sum_rows<T, by_channel>(d, window, grad_lines, grads, columns, in_place, num_columns, index, stop, c, together,
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

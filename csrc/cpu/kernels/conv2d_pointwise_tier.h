// Convolution as a product of a matrix of pixels and the weight's, one group: windows of neighbouring pixels, forward
// and (with the weight's two dimensions swapped) for the gradient of the input.
//
// Tiles: kRows rows x 2 vectors stay in registers over a whole window. A step broadcasts an operand of each row, one
// term of the sum or a pair, and loads two vectors of a panel, packed [operand][two vectors]: (kRows + 2) loads every
// 2 * kRows FMAs.
// By channel: rows are pixels, of which a window reads a run of neighbouring elements for each of its rows; vectors are
// results, and panels the weight's, packed once a call. A block of pixels stays in the L2 cache over the panels. In
// channels_last they are read where they lie, or, with the padding around them, from a copy of the block, as pixels of
// NCHW are; results of NCHW, or that are max-pooled, stay in scratch until a panel is done, and leave pooled and
// transposed.
// By column (1 x 1 of NCHW, without padding): rows are results, of a weight packed once a call in the order they are
// read; vectors are pixels, of all rows and images in a row. The first tile reads them from their channels and leaves
// them as a panel, in the L1 or L2 cache, for the others, of all results; where an image ends, the panel is packed
// before.
// Spread (the gradient of an input much larger than the output): rows are output pixels, panels the whole weight, a row
// of the window after the other; an image's products are added, vector by vector, to what they reach of its sums in the
// L2 cache, which leave when all are in. Memory: what comes next is fetched while this is computed: no order is one
// that the hardware foresees.
//
// Operations: 2 * pixels * window * channels * results; bytes: each tensor once, the weight once a block of pixels.

#if FASTNN_VECTOR_BYTES == 64
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int64_t kRunAhead = 1024;  // bytes from what is copied to what is fetched: of a run, longer than a prefetcher
constexpr int64_t kRowAhead = 128;   // sees, and of a channel's row, of which each is on pages of its own
constexpr int kL2 = 2;               // what is fetched goes there, not to the L1 cache

// What operands are read from: a type of which kTermsOf<P> neighbours are one.
template <class P>
struct ElementOf {
  using type = P;
};
template <>
struct ElementOf<Bf16Pair> {
  using type = bf16;
};
template <class P>
using Element = typename ElementOf<P>::type;

template <class T>
struct RowTile {
  using A = Accumulator<T>;
  using P = Operand<T>;
  const Element<P>* rows;  // by_channel: row_pitch apart; otherwise [operand][kRows]
  int64_t row_pitch;
  int64_t runs, run_pitch;  // of a row; by column there is one
  int64_t terms;            // of a run
  const P* panel;
  // By column: the panel, where the first tile of its columns packs it, else null; from columns of the source and of
  // ReLU's mask, if there is one, and how far the next panel's are.
  P* packs;
  const T *columns, *relu_columns;
  int64_t stride_c, relu_stride_c, next_columns;
  const A* bias;  // or null; by_channel: of the vectors' results, otherwise of the rows
  T* result;
  int64_t result_pitch;
  int lanes;  // of the two vectors
  bool relu;
  A* sums;             // where there is no `result`
  const char* ahead;   // what is fetched ...
  int64_t ahead_step;  // ... and how many bytes of it each step
};

// One operand of each row; partial: what follows its first term is none of the sum's.
template <class P, int NR, int NV, bool partial>
FASTNN_INLINE void multiply_step(const Element<P>* row, int64_t pitch, const Vec<P>* w,
                                 Vec<Accumulator<P>> (*sum)[NV]) {
#pragma GCC unroll 12
  for (int n = 0; n < NR; ++n) {
    Vec<P> x = splat(*reinterpret_cast<const P*>(row + n * pitch));
    if constexpr (partial) x = first_term(x);
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sum[n][v] = multiply_add(x, w[v], sum[n][v]);
  }
}

// A vector of a panel of columns, kept there; the next panel's is fetched.
template <class T>
FASTNN_INLINE Vec<Operand<T>> pack_columns(const RowTile<T>& b, int64_t d, int v) {
  using P = Operand<T>;
  constexpr int L = kLanes<P>;
  const int64_t c = d * kTermsOf<P>;
  const T* const from = b.columns + c * b.stride_c + v * L;
  const T* const relu = b.relu_columns ? b.relu_columns + c * b.relu_stride_c + v * L : nullptr;
  for (int term = 0; term < kTermsOf<P>; ++term) {
    __builtin_prefetch(from + term * b.stride_c + b.next_columns, 0, kL2);
    if (relu) __builtin_prefetch(relu + term * b.relu_stride_c + b.next_columns, 0, kL2);
  }
  const Vec<P> value =
      load_operands<T, P>(from, b.stride_c, relu, b.relu_stride_c, b.terms - c, int(least(L, b.lanes - v * L)));
  store(b.packs + (d * 2 + v) * L, value);
  return value;
}

template <class T, bool by_channel, int NR, int NV>
void multiply_rows(const RowTile<T>& b) {
  using A = Accumulator<T>;
  using P = Operand<T>;
  constexpr int L = kLanes<A>, kTerms = kTermsOf<P>, kWidth = 2;  // vectors of a panel
  Vec<A> sum[NR][NV];
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    const int lanes = int(least(L, b.lanes - v * L));
    const Vec<A> start = by_channel && b.bias ? load_n(b.bias + v * L, lanes) : Vec<A>{};
#pragma GCC unroll 12
    for (int n = 0; n < NR; ++n) sum[n][v] = !by_channel && b.bias ? splat(b.bias[n]) : start;
  }
  const P* panel = b.panel;
  const int64_t pitch = by_channel ? b.row_pitch : kTerms;
  const char* ahead = b.ahead;
  for (int64_t run = 0; run < b.runs; ++run) {
    const Element<P>* row = b.rows + run * b.run_pitch;
    const int64_t whole = by_channel ? b.terms / kTerms : operands<P>(b.terms);
    for (int64_t d = 0; d < whole; ++d, row += (by_channel ? 1 : kRows) * kTerms, panel += 2 * L) {
      if (by_channel) {
        __builtin_prefetch(ahead);
        ahead += b.ahead_step;
      }
      Vec<P> w[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) w[v] = !by_channel && b.packs ? pack_columns(b, d, v) : load(panel + v * L);
      multiply_step<P, NR, NV, false>(row, pitch, w, sum);
    }
    if constexpr (by_channel && kTerms > 1)
      if (b.terms % kTerms) {
        Vec<P> w[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) w[v] = load(panel + v * L);
        multiply_step<P, NR, NV, true>(row, pitch, w, sum);
        panel += 2 * L;
      }
  }
#pragma GCC unroll 12
  for (int n = 0; n < NR; ++n)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      const Vec<A> value = b.relu ? (sum[n][v] < Vec<A>{} ? Vec<A>{} : sum[n][v]) : sum[n][v];
      if (!b.result)
        store(b.sums + (n * kWidth + v) * L, value);
      else
        store_lanes(b.result + n * b.result_pitch + v * L, value, b.lanes - v * L);
    }
}

template <class T, bool by_channel, int NR>
FASTNN_INLINE void multiply_rows_of(int64_t rows, const RowTile<T>& b) {
  if constexpr (NR > 1)
    if (rows < NR) return multiply_rows_of<T, by_channel, NR - 1>(rows, b);
  if (b.lanes > kLanes<Accumulator<T>>)
    multiply_rows<T, by_channel, NR, 2>(b);
  else
    multiply_rows<T, by_channel, NR, 1>(b);
}

template <class T>
FASTNN_INLINE Element<Operand<T>> element_of(T value) {
  if constexpr (kTermsOf<Operand<T>> == 2)
    return value;
  else
    return to_accumulator(value);
}

// The operand of kTermsOf neighbouring terms.
template <class P>
FASTNN_INLINE Vec<P> operand_of(const Vec<Accumulator<P>>* terms) {
  if constexpr (kTermsOf<P> == 2)
    return pairs(terms[0], terms[1]);
  else
    return terms[0];
}

// Vectors of operands packed as [run][operand][width], of results whose weights begin at `weight`; those past `lanes`
// are zero. The channels are whole operands.
template <class T>
void pack_results(const PointConv& w, const T* weight, const int64_t* strides, int lanes, int64_t width, int64_t stored,
                  Operand<T>* packed) {
  using A = Accumulator<T>;
  using P = Operand<T>;
  constexpr int L = kLanes<A>, kTerms = kTermsOf<P>, kNeighbours = 4 * L;
  const TapConv& p = w.conv;
  const int64_t channels = p.group_channels / kTerms;
  int64_t first = p.taps[0].weight, last = first;
  for (const Tap* tap = p.taps; tap < p.taps + p.num_taps; ++tap)
    first = least(first, tap->weight), last = most(last, tap->weight);
  const int64_t span = last - first + 1;
  if (strides[1] != 1 && strides[2] != 1 && span <= kNeighbours) {  // a channel pair's taps are neighbours
    for (int64_t c = 0; c < channels; ++c) {
      Vec<A> terms[kTerms][kNeighbours];
      for (int term = 0; term < kTerms; ++term, weight += strides[2])
        for (int64_t i = 0; i < span; i += L)
          read_vectors(weight + first + i, strides[1], 1, lanes, int(least(L, span - i)), 4 * strides[2],
                       terms[term] + i);
      for (int64_t tap = 0; tap < p.num_taps; ++tap) {
        Vec<A> of_tap[kTerms];
        for (int term = 0; term < kTerms; ++term) of_tap[term] = terms[term][p.taps[tap].weight - first];
        store_lanes(packed + (tap * channels + c) * width, operand_of<P>(of_tap), stored);
      }
    }
  } else {
    for (int64_t tap = 0; tap < p.num_taps; ++tap)
      for (int64_t c = 0; c < p.group_channels; c += L) {
        const int64_t count = least(L, p.group_channels - c);
        Vec<A> terms[L];
        read_vectors(weight + p.taps[tap].weight + c * strides[2], strides[1], strides[2], lanes, int(count), 0, terms);
        for (int64_t i = 0; i < count; i += kTerms, packed += width)
          store_lanes(packed, operand_of<P>(terms + i), stored);
      }
  }
}

// Blocks [begin, end) of `width` results: packed[block][run][operand][width]. strides: of group (there is one), result
// and channel.
template <class T>
void pack_points_weight(const PointConv& w, int64_t width, const void* weight_, const int64_t* strides, void* packed_,
                        int64_t begin, int64_t end) {
  using P = Operand<T>;
  using E = Element<P>;
  constexpr int L = kLanes<P>, kTerms = kTermsOf<P>;
  const TapConv& p = w.conv;
  const T* weight = static_cast<const T*>(weight_);
  const int64_t channels = p.group_channels, depth = operands<P>(w.window_w * channels);
  for (int64_t block = begin; block < end; ++block) {
    E* packed = static_cast<E*>(packed_) + block * w.window_h * depth * width * kTerms;
    if (channels % kTerms == 0) {
      for (int64_t k = 0; k < width; k += L)
        pack_results(w, weight + (block * width + k) * strides[1], strides,
                     int(most(0, least(L, p.group_results - block * width - k))), width, least(L, width - k),
                     reinterpret_cast<P*>(packed) + k);
      continue;
    }
    for (int64_t i = 0; i < w.window_h * depth * width * kTerms; ++i) packed[i] = {};
    for (int64_t k = 0; k < least(width, p.group_results - block * width); ++k)
      for (int64_t tap = 0; tap < p.num_taps; ++tap) {
        const T* from = weight + (block * width + k) * strides[1] + p.taps[tap].weight;
        E* to = packed + (tap / w.window_w * depth * width + k) * kTerms;
        int64_t term = tap % w.window_w * channels;
        for (int64_t c = 0; c < channels; ++c, ++term)
          to[term / kTerms * width * kTerms + term % kTerms] = element_of(from[c * strides[2]]);
      }
  }
}

// A task's rows [first_row, last_row) of an image's results, and its blocks of result channels.
struct PointTask {
  int64_t n, first_row, last_row, first, last;

  PointTask(const PointConv& w, int64_t blocks, int64_t task) {
    const int64_t rows = task / w.conv.channel_blocks, share = task % w.conv.channel_blocks;
    n = rows / w.conv.row_blocks;
    const PoolShape& pool = w.conv.result.pool;  // whose windows may overlap, and so do tasks then
    const int64_t step = w.block_rows - most(0, pool.kernel_h - pool.stride_h);
    first_row = rows % w.conv.row_blocks * step, last_row = least(w.conv.rows, first_row + w.block_rows);
    first = blocks * share / w.conv.channel_blocks, last = blocks * (share + 1) / w.conv.channel_blocks;
  }
};

// Neighbours as elements that operands are read from, zero where ReLU's mask stops them. May write an operand past
// `count`.
template <class T>
FASTNN_INLINE void copy_run(const T* from, const T* relu, int64_t count, Element<Operand<T>>* to) {
  using P = Operand<T>;
  constexpr int64_t kElements = kLanes<P> * kTermsOf<P>;
  for (int64_t i = 0; i < count; i += kElements) {
    const int64_t elements = least(kElements, count - i);
    __builtin_prefetch(from + i + kRunAhead / int64_t(sizeof(T)));
    const Vec<P> value = load_neighbours<T, P>(from + i, relu ? relu + i : nullptr, int(elements));
    store_lanes(reinterpret_cast<P*>(to + i), value, operands<P>(elements));
  }
}

// `count` neighbouring columns of C channels stride_c apart, as [column][channel], zero where ReLU's mask stops them.
template <class T, int C>
void join_few(const T* from, int64_t stride_c, const T* relu, int64_t relu_c, int64_t count, Accumulator<T>* to) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  for (int64_t x = 0; x < count; x += L, to += L * C) {
    const int64_t lanes = least(L, count - x);
    Vec<A> rows[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      rows[c] = load_masked(from + c * stride_c + x, relu ? relu + c * relu_c + x : nullptr, int(lanes));
    regroup_channels<A, C, true>(rows);
#pragma GCC unroll 4
    for (int k = 0; k < C; ++k) store_lanes(to + k * L, rows[k], lanes * C - k * L);
  }
}

// The same of any number of channels. May write three operands past the last.
template <class T>
void transpose_run(const T* from, int64_t stride_c, const T* relu, int64_t relu_c, int64_t channels, int64_t count,
                   Element<Operand<T>>* to) {
  using P = Operand<T>;
  constexpr int64_t L = kLanes<P>, kTerms = kTermsOf<P>, kFew = 4;
  const int64_t depth = operands<P>(channels);
  if constexpr (kTerms == 1) {
    if (channels == 1) return join_few<T, 1>(from, stride_c, relu, relu_c, count, to);
    if (channels == 2) return join_few<T, 2>(from, stride_c, relu, relu_c, count, to);
    if (channels == 3) return join_few<T, 3>(from, stride_c, relu, relu_c, count, to);
    if (channels == 4) return join_few<T, 4>(from, stride_c, relu, relu_c, count, to);
  }
  for (int64_t x = 0; x < count; x += L, to += L * channels) {
    const int lanes = int(least(L, count - x));
    // From the last one down: what is written past a column is overwritten by the next one's first channels.
    for (int64_t d = (depth - 1) / L * L; d >= 0; d -= L) {
      Vec<P> square[L] = {};
      for (int64_t i = 0; i < least(L, depth - d); ++i) {
        const int64_t c = (d + i) * kTerms;
        for (int64_t term = 0; term < kTerms; ++term)
          __builtin_prefetch(from + (c + term) * stride_c + x + kRowAhead / int64_t(sizeof(T)));
        square[i] = load_operands<T, P>(from + c * stride_c + x, stride_c, relu ? relu + c * relu_c + x : nullptr,
                                        relu_c, channels - c, lanes);
      }
      if constexpr (kTerms > 1)
        if (depth <= kFew) {
          P quads[kFew * L];  // of columns j % 4, as far as j / 4
          swap_blocks<P, 2, kFew>(square);
          swap_blocks<P, 1, kFew>(square);
          for (int i = 0; i < kFew; ++i) store(quads + i * L, square[i]);
          for (int j = 0; j < lanes; ++j)
            __builtin_memcpy(to + j * channels, quads + j % kFew * L + j / kFew * kFew, kFew * sizeof(P));
          continue;
        }
      transpose<P>(square);
      for (int j = 0; j < lanes; ++j)
        store_lanes(reinterpret_cast<P*>(to + j * channels + d * kTerms), square[j], depth - d);
    }
  }
}

// Source rows [y, y + rows) and columns [x, x + cols), zero outside the source, as [row][column][channel].
template <class T>
void copy_pixels(const TapConv& p, int64_t n, int64_t y, int64_t rows, int64_t x, int64_t cols,
                 Element<Operand<T>>* to) {
  const ConvSource& s = p.source;
  const int64_t channels = p.group_channels;
  const int64_t left = least(cols, most(0, -x)), right = most(left, least(cols, s.width - x));
  const bool by_channel = s.stride.c == 1 && (!s.relu_output || s.relu_stride.c == 1);
  const bool dense = s.stride.w == channels && (!s.relu_output || s.relu_stride.w == channels);
  const int64_t run = dense ? (right - left) * channels : channels;
  for (int64_t row = y; row < y + rows; ++row, to += cols * channels) {
    const bool inside = row >= 0 && row < s.height;
    const int64_t begin = inside ? left : cols, end = inside ? right : cols;
    for (int64_t i = 0; i < begin * channels; ++i) to[i] = {};
    const int64_t at = s.stride.n * n + s.stride.h * row + s.stride.w * (x + left);
    const int64_t relu_at = s.relu_stride.n * n + s.relu_stride.h * row + s.relu_stride.w * (x + left);
    const T* from = static_cast<const T*>(s.data) + at;
    const T* relu = s.relu_output ? static_cast<const T*>(s.relu_output) + relu_at : nullptr;
    if (!by_channel && begin < end)
      transpose_run(from, s.stride.c, relu, s.relu_stride.c, channels, end - begin, to + begin * channels);
    for (int64_t i = begin; by_channel && i < end;
         i += run / channels, from += s.stride.w, relu += relu ? s.relu_stride.w : 0)
      copy_run(from, relu, run, to + i * channels);
    for (int64_t i = end * channels; i < cols * channels; ++i) to[i] = {};
  }
}

// Max-pools rows of pixels, vectors of `lanes` channels that are `width` apart, into one row, in place at the first (a
// window is read before anything at or right of it is written), and its codes. Torch's order: the first of equal
// maxima, the last NaN.
template <class A>
void pool_pixels(A* pixels, int64_t width, int64_t row_pitch, int lanes, const PoolShape& pool, uint8_t* code,
                 int64_t code_c, int64_t code_w) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t x = 0; x < pool.out_w; x += L) {
    const int64_t count = least(L, pool.out_w - x);
    Vec<A> elements[L] = {};
    for (int64_t k = 0; k < count; ++k) {
      const A* const window = pixels + (x + k) * pool.stride_w * width;
      Vec<A> best = load(window);
      Mask<A> element{};
      for (int64_t i = 0; i < pool.kernel_h; ++i)
        for (int64_t j = 0; j < pool.kernel_w; ++j) {
          const Vec<A> value = load(window + i * row_pitch + j * width);
          const Mask<A> better = (value > best) | (value != value);
          best = better ? value : best;
          element = better ? Mask<A>{} + MaskLane<A>(i * pool.kernel_w + j) : element;
        }
      element = best <= Vec<A>{} ? Mask<A>{} + kPoolNone : element;
      store(pixels + (x + k) * width, best);
      if (code_c == 1)
        store_bytes_n(code + (x + k) * code_w, element, lanes);
      else
        elements[k] = (Vec<A>)element;
    }
    if (code_c == 1) continue;
    transpose<A>(elements);
    for (int c = 0; c < lanes; ++c) store_bytes_n(code + c * code_c + x, (Mask<A>)elements[c], int(count));
  }
}

template <class T>
void run_points_by_channel(const PointConv& w, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  using P = Operand<T>;
  using E = Element<P>;
  constexpr int64_t kWidth = 2 * kLanes<A>;
  const TapConv& p = w.conv;
  const int64_t channels = p.group_channels, depth = w.window_h * operands<P>(w.window_w * channels);
  const Planes& s = p.planes;
  const PoolShape& pool = p.result.pool;
  const bool pooled = p.result.pool_code != nullptr;
  const bool direct = p.result.stride.c == 1 && !pooled;  // or through `sums`, to be transposed or pooled
  const int64_t result_step = pooled ? pool.stride_h : 1;
  const bool in_place = !w.padded && p.source.stride.c == 1 && sizeof(E) == sizeof(T) && !p.source.relu_output &&
                        w.window_w * channels % kTermsOf<P> == 0 && (w.window_w == 1 || p.source.stride.w == channels);
  A* const sums = static_cast<A*>(scratch);
  E* const copied = reinterpret_cast<E*>(sums + w.block_rows * ceil_div(w.block_cols, kRows) * kRows * kWidth);
  RowTile<T> b;
  b.result_pitch = p.result.stride.w, b.relu = p.relu, b.terms = w.window_w * channels;
  b.row_pitch = s.step_w * (in_place ? p.source.stride.w : channels);
  for (int64_t index = begin; index < end; ++index) {
    const PointTask task(w, ceil_div(p.group_results, kWidth), index);
    const int64_t rows = task.last_row - task.first_row, y = task.first_row * s.step_h - s.origin_h;
    for (int64_t x = 0; x < p.cols; x += w.block_cols) {
      const int64_t count = least(w.block_cols, p.cols - x), cols = (count - 1) * s.step_w + w.window_w;
      const int64_t source_x = x * s.step_w - s.origin_w;
      // Cut evenly: a tile of few rows has too few sums to hide an FMA's latency.
      const int64_t tiles = ceil_div(count, kRows), tile = ceil_div(count, tiles);
      const int64_t sums_pitch = tiles * tile * kWidth, result_y = task.first_row / result_step;
      const Strides4 &to = p.result.stride, &code_to = p.result.code_stride;
      T* const result = static_cast<T*>(p.result.data) + task.n * to.n + result_y * to.h + x * to.w;
      uint8_t* const code = pooled ? p.result.pool_code + task.n * code_to.n + result_y * code_to.h : nullptr;
      b.run_pitch = in_place ? p.source.stride.h : cols * channels;
      const E* pixels = copied;
      if (in_place)
        pixels = static_cast<const E*>(p.source.data) + task.n * p.source.stride.n + y * p.source.stride.h +
                 source_x * p.source.stride.w;
      else
        copy_pixels<T>(p, task.n, y, (rows - 1) * s.step_h + w.window_h, source_x, cols, copied);
      for (int64_t panel = task.first; panel < task.last; ++panel) {
        const int64_t m = panel * kWidth;
        const P* const weight = static_cast<const P*>(p.weight) + m * depth;
        b.bias = p.bias ? static_cast<const A*>(p.bias) + m : nullptr;
        b.lanes = int(least(kWidth, p.group_results - m));
        // In as many steps as there are, the next panel is fetched; while pixels are read where they lie for the first
        // time, the next tile's.
        const bool fetch_pixels = in_place && panel == task.first;
        const char* next = reinterpret_cast<const char*>(weight + depth * kWidth);
        b.ahead_step = fetch_pixels ? kRows * int64_t(sizeof(P)) : ceil_div(kWidth * sizeof(P), rows * tiles);
        b.sums = sums;
        for (int64_t row = 0; row < rows; ++row) {
          // Runs in the padding above and below add nothing.
          const int64_t source_y = y + row * s.step_h, top = least(w.window_h, most(0, -source_y));
          b.runs = most(0, least(w.window_h, p.source.height - source_y) - top);
          b.panel = weight + top * operands<P>(b.terms) * kWidth;
          for (int64_t i = 0; i < count; i += tile, b.sums += tile * kWidth, next += depth * b.ahead_step) {
            b.rows = pixels + (row * s.step_h + top) * b.run_pitch + i * b.row_pitch;
            b.result = direct ? result + row * to.h + i * b.result_pitch + m : nullptr;
            b.ahead = fetch_pixels ? reinterpret_cast<const char*>(b.rows + tile * b.row_pitch) : next;
            multiply_rows_of<T, true, kRows>(least(tile, count - i), b);
          }
        }
        const int64_t result_rows = pooled ? (rows - pool.kernel_h) / pool.stride_h + 1 : direct ? 0 : rows;
        for (int64_t row = 0; row < result_rows; ++row)
          for (int64_t v = 0; v < b.lanes; v += kLanes<A>) {
            const int lanes = int(least(kLanes<A>, b.lanes - v));
            A* const from = sums + row * result_step * sums_pitch + v;
            if (pooled)
              pool_pixels(from, kWidth, sums_pitch, lanes, pool, code + (m + v) * code_to.c + row * code_to.h,
                          code_to.c, code_to.w);
            write_vectors<T>(from, kWidth, pooled ? pool.out_w : count, lanes, result + (m + v) * to.c + row * to.h,
                             to.c, to.w);
          }
      }
    }
  }
}

// Of the columns of a panel some that are neighbours: the first's lane, how many, and where the first one's elements
// are.
struct ColumnRun {
  int64_t lane, count, source, relu, result;
};

// The runs of `count` columns, of rows and images one after the other, from `position` on; returns how many.
FASTNN_INLINE int64_t column_runs(const PointConv& w, int64_t position, int64_t count, ColumnRun* runs) {
  const TapConv& p = w.conv;
  int64_t num_runs = 0;
  for (int64_t lane = 0; lane < count; ++num_runs) {
    const int64_t row = (position + lane) / p.cols, x = (position + lane) % p.cols, n = row / p.rows, y = row % p.rows;
    const int64_t source_y = y * p.planes.step_h;
    ColumnRun& run = runs[num_runs];
    run = {lane, least(p.cols - x, count - lane), n * p.source.stride.n + source_y * p.source.stride.h + x,
           n * p.source.relu_stride.n + source_y * p.source.relu_stride.h + x,
           n * p.result.stride.n + y * p.result.stride.h + x};
    lane += run.count;
  }
  return num_runs;
}

// Packs a panel of several runs, which no tile can read as whole vectors.
template <class T>
void pack_runs(const ConvSource& s, const ColumnRun* runs, int64_t num_runs, int64_t channels, Operand<T>* panel) {
  using P = Operand<T>;
  constexpr int64_t L = kLanes<P>, kWidth = 2 * L;
  for (int64_t c = 0; c < channels; c += kTermsOf<P>, panel += kWidth)
    for (const ColumnRun* run = runs; run < runs + num_runs; ++run) {
      const T* const from = static_cast<const T*>(s.data) + run->source + c * s.stride.c;
      const T* relu = static_cast<const T*>(s.relu_output);
      if (relu) relu += run->relu + c * s.relu_stride.c;
      for (int64_t i = 0; i < run->count; i += L)
        store_lanes(panel + run->lane + i,
                    load_operands<T, P>(from + i, s.stride.c, relu ? relu + i : nullptr, s.relu_stride.c, channels - c,
                                        int(least(L, run->count - i))),
                    run->count - i);
    }
}

// `rows` rows of a tile's sums, to their runs in results `pitch` apart.
template <class T>
void write_runs(const Accumulator<T>* sums, int64_t rows, const ColumnRun* runs, int64_t num_runs, int64_t pitch,
                T* result) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>, kWidth = 2 * L;
  for (int64_t n = 0; n < rows; ++n, sums += kWidth, result += pitch)
    for (const ColumnRun* run = runs; run < runs + num_runs; ++run)
      for (int64_t i = 0; i < run->count; i += L) {
        const int64_t count = least(L, run->count - i);
        store_lanes(result + run->result + i, load_n(sums + run->lane + i, int(count)), count);
      }
}

template <class T>
void run_points_by_column(const PointConv& w, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  using P = Operand<T>;
  constexpr int64_t kWidth = 2 * kLanes<A>;
  const TapConv& p = w.conv;
  const int64_t channels = p.group_channels, depth = operands<P>(channels), blocks = ceil_div(p.group_results, kRows);
  const int64_t positions = p.batch * p.rows * p.cols;
  A* const sums = static_cast<A*>(scratch);
  P* const panel = reinterpret_cast<P*>(sums + kRows * kWidth);
  T* const results = static_cast<T*>(p.result.data);
  ColumnRun runs[kWidth], next;
  RowTile<T> b;
  b.runs = 1, b.terms = channels, b.panel = panel, b.result_pitch = p.result.stride.c, b.relu = p.relu, b.sums = sums;
  b.stride_c = p.source.stride.c, b.relu_stride_c = p.source.relu_stride.c;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t position = index / p.channel_blocks * kWidth, share = index % p.channel_blocks;
    const int64_t first = blocks * share / p.channel_blocks, last = blocks * (share + 1) / p.channel_blocks;
    b.lanes = int(least(kWidth, positions - position));
    const int64_t num_runs = column_runs(w, position, b.lanes, runs);
    const bool packed = num_runs > 1;
    if (packed) pack_runs<T>(p.source, runs, num_runs, channels, panel);
    b.columns = static_cast<const T*>(p.source.data) + runs[0].source;
    b.relu_columns = p.source.relu_output ? static_cast<const T*>(p.source.relu_output) + runs[0].relu : nullptr;
    // To the last element of a vector: its first ones may be on a line that this panel reads.
    column_runs(w, position + kWidth, 1, &next);
    b.next_columns = next.source - runs[0].source + kLanes<P> - 1;
    for (int64_t block = first; block < last; ++block) {
      const int64_t m = block * kRows, rows = least(kRows, p.group_results - m);
      b.rows = static_cast<const Element<P>*>(p.weight) + m * depth * kTermsOf<P>;
      b.bias = p.bias ? static_cast<const A*>(p.bias) + m : nullptr;
      b.packs = block == first && !packed ? panel : nullptr;
      b.result = packed ? nullptr : results + m * b.result_pitch + runs[0].result;
      multiply_rows_of<T, false, kRows>(rows, b);
      if (packed) write_runs<T>(sums, rows, runs, num_runs, b.result_pitch, results + m * b.result_pitch);
    }
  }
}

// Tasks [begin, end): a block of result rows of one image, or a panel of columns, and a share of the blocks of results.
template <class T>
void run_points(const PointConv& w, void* scratch, int64_t begin, int64_t end) {
  if (!w.by_column)
    run_points_by_channel<T>(w, scratch, begin, end);
  else
    run_points_by_column<T>(w, scratch, begin, end);
}

// ---- products spread over a window ----

// packed[panel][operand][two vectors]: a vector is a run of (column, result) of one row of the window; lanes past the
// row's last are zero.
template <class T>
void pack_spread_weight(const PointSpread& w, const void* weight_, const int64_t* strides, void* packed_, int64_t begin,
                        int64_t end) {
  using P = Operand<T>;
  constexpr int64_t L = kLanes<P>;
  const T* weight = static_cast<const T*>(weight_);
  const int64_t channels = w.conv.group_channels, results = w.conv.group_results, vectors = w.row_vectors(L);
  const int64_t depth = operands<P>(channels);
  for (int64_t vector = 2 * begin; vector < 2 * end; ++vector) {
    P* const packed = static_cast<P*>(packed_) + (vector / 2 * depth * 2 + vector % 2) * L;
    for (int64_t lane = 0; lane < L; ++lane) {
      const int64_t row = vector / vectors, at = vector % vectors * L + lane;
      const T* from = weight + row * strides[2] + at / results * strides[3] + at % results * strides[0];
      const bool inside = row < w.kernel_h && at < w.kernel_w * results;
      for (int64_t d = 0; d < depth; ++d) {
        const int64_t c = d * kTermsOf<P>;
        packed[d * 2 * L + lane] =
            inside ? operand<T, P>(from + c * strides[1], strides[1], nullptr, 0, channels - c) : P{};
      }
    }
  }
}

// Images [begin, end).
template <class T>
void run_spread(const PointSpread& w, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  using P = Operand<T>;
  constexpr int64_t L = kLanes<A>, kWidth = 2 * L;
  const TapConv& p = w.conv;
  const int64_t channels = p.group_channels, results = p.group_results, positions = p.rows * p.cols;
  const int64_t depth = operands<P>(channels), vectors = w.row_vectors(L), panels = w.panels(L);
  const int64_t tiles = ceil_div(positions, kRows), tile = ceil_div(positions, tiles);
  const int64_t row_pitch = w.sums_width() * results, size = (p.rows + w.kernel_h - 1) * row_pitch;
  A* const products = static_cast<A*>(scratch);
  A* const sums = products + tiles * tile * kWidth;
  Element<P>* const pixels = reinterpret_cast<Element<P>*>(sums + size + (results + 1) * L);
  const Strides4& to = p.result.stride;
  RowTile<T> b;
  b.rows = pixels, b.row_pitch = channels, b.runs = 1, b.run_pitch = 0, b.terms = channels;
  b.bias = nullptr, b.result = nullptr, b.lanes = int(kWidth), b.relu = false;
  b.ahead_step = ceil_div(kWidth * sizeof(P), tiles);
  for (int64_t n = begin; n < end; ++n) {
    copy_pixels<T>(p, n, 0, p.rows, 0, p.cols, pixels);
    for (int64_t i = 0; i < size; ++i) sums[i] = 0;
    for (int64_t panel = 0; panel < panels; ++panel) {
      b.panel = static_cast<const P*>(p.weight) + panel * depth * kWidth;
      const char* next = reinterpret_cast<const char*>(b.panel + depth * kWidth);
      for (int64_t i = 0; i < positions; i += tile, next += depth * b.ahead_step) {
        b.rows = pixels + i * channels, b.sums = products + i * kWidth, b.ahead = next;
        multiply_rows_of<T, true, kRows>(least(tile, positions - i), b);
      }
      for (int64_t vector = 2 * panel; vector < least(2 * panel + 2, w.kernel_h * vectors); ++vector) {
        const int64_t at = vector % vectors * L;
        const int lanes = int(least(L, w.kernel_w * results - at));
        const A* from = products + vector % 2 * L;
        for (int64_t y = 0; y < p.rows; ++y) {
          A* sum = sums + (y + vector / vectors) * row_pitch + at;
          for (int64_t x = 0; x < p.cols; ++x, from += kWidth, sum += results)
            store_lanes(sum, load_lanes(sum, lanes) + load(from), lanes);
        }
      }
    }
    T* const result = static_cast<T*>(p.result.data) + n * to.n;
    for (int64_t y = 0; y < w.height; ++y)
      for (int64_t c = 0; c < results; c += L)
        write_vectors<T>(sums + (y + w.pad_top) * row_pitch + w.pad_left * results + c, results, w.width,
                         int(least(L, results - c)), result + c * to.c + y * to.h, to.c, to.w);
  }
}

#define FASTNN_ALL_DTYPES(function) {function<double>, function<float>, function<bf16>, function<f16>}
const PointwiseKernels kPointwiseKernels = {
    {2 * kLanes<double>, 2 * kLanes<float>}, kRows,
    FASTNN_ALL_DTYPES(pack_points_weight),   FASTNN_ALL_DTYPES(run_points),
    FASTNN_ALL_DTYPES(pack_spread_weight),   FASTNN_ALL_DTYPES(run_spread),
};
#undef FASTNN_ALL_DTYPES

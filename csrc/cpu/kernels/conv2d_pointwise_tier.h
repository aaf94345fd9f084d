// 1 x 1 convolution without padding: a matrix product over the channels, forward and (with the weight's two dimensions
// swapped) for the gradient of the input.
//
// Tiles: kRows rows x 2 vectors stay in registers over all channels. A step broadcasts an operand of each row, a channel
// or a pair of them, and loads two vectors of a panel, packed [operand][two vectors]: (kRows + 2) loads every 2 * kRows
// FMAs.
// channels_last: rows are pixels, read where they lie; vectors are results, and panels the weight's, packed once a
// call. A block of pixels stays in the L2 cache over the panels. Sources that are not operands as they lie, and
// gradients under ReLU's mask, are first copied, a block at a time. NCHW: rows are results, of a weight packed once a
// call in the order they are read; vectors are pixels, and panels a block of pixels', packed by each task into the L2
// cache.
// Memory: what comes next is fetched while this is computed, as neither order is one the hardware foresees.
//
// Operations: 2 * pixels * channels * results; bytes: each tensor once, the weight once a block of pixels.

#if FASTNN_VECTOR_BYTES == 64
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int64_t kPointBytes = 256 << 10;  // a block of pixels in the L2 cache

template <class T>
struct RowTile {
  using A = Accumulator<T>;
  using P = Operand<T>;
  const P* rows;  // by_channel: row_pitch apart, operands neighbours; otherwise [operand][kRows]
  int64_t row_pitch, depth;
  const P* panel;
  const A* bias;  // or null; by_channel: of the vectors' results, otherwise of the rows
  T* result;
  int64_t result_pitch;
  int lanes;  // of the two vectors
  bool relu;
  int64_t ahead;  // bytes to fetch each step, behind the rows
};

template <class T, bool by_channel, int NR, int NV>
void multiply_rows(const RowTile<T>& b) {
  using A = Accumulator<T>;
  using P = Operand<T>;
  constexpr int L = kLanes<A>;
  Vec<A> sum[NR][NV];
  for (int v = 0; v < NV; ++v) {
    const int lanes = int(least(L, b.lanes - v * L));
    const Vec<A> start = by_channel && b.bias ? load_n(b.bias + v * L, lanes) : Vec<A>{};
#pragma GCC unroll 12
    for (int n = 0; n < NR; ++n) sum[n][v] = !by_channel && b.bias ? splat(b.bias[n]) : start;
  }
  const P *row = b.rows, *panel = b.panel;
  const int64_t pitch = by_channel ? b.row_pitch : 1;
  const char* ahead = reinterpret_cast<const char*>(row + NR * pitch);
  for (int64_t d = 0; d < b.depth; ++d, row += by_channel ? 1 : kRows, panel += 2 * L) {
    if (by_channel) {
      __builtin_prefetch(ahead);
      ahead += b.ahead;
    }
    Vec<P> w[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) w[v] = load(panel + v * L);
#pragma GCC unroll 12
    for (int n = 0; n < NR; ++n) {
      const Vec<P> x = splat(row[n * pitch]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[n][v] = multiply_add(x, w[v], sum[n][v]);
    }
  }
#pragma GCC unroll 12
  for (int n = 0; n < NR; ++n)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      const Vec<A> value = b.relu ? (sum[n][v] < Vec<A>{} ? Vec<A>{} : sum[n][v]) : sum[n][v];
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

// Blocks [begin, end) of `width` results: packed[block][operand][width]. strides: of group (there is one), result and
// channel.
template <class T>
void pack_points_weight(const TapConv& p, int64_t width, const void* weight_, const int64_t* strides, void* packed_,
                        int64_t begin, int64_t end) {
  using P = Operand<T>;
  const T* weight = static_cast<const T*>(weight_) + p.taps[0].weight;
  const int64_t depth = operands<P>(p.group_channels);
  for (int64_t block = begin; block < end; ++block) {
    P* packed = static_cast<P*>(packed_) + block * width * depth;
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t k = 0; k < width; ++k, ++packed) {
        const int64_t m = block * width + k, c = d * kTermsOf<P>;
        const int64_t count = m < p.group_results ? p.group_channels - c : 0;
        *packed = operand<T, P>(weight + m * strides[1] + c * strides[2], strides[2], nullptr, 0, count);
      }
  }
}

// A pixel's channels as operands, zero where ReLU's mask stops them.
template <class T>
FASTNN_INLINE void copy_pixel(const T* from, const T* relu, int64_t channels, Operand<T>* to) {
  using P = Operand<T>;
  constexpr int L = kLanes<P>;
  for (int64_t d = 0; d < operands<P>(channels); d += L) {
    const int64_t c = d * kTermsOf<P>, count = least(L * kTermsOf<P>, channels - c);
    const Vec<P> value = load_neighbours<T, P>(from + c, relu ? relu + c : nullptr, int(count));
    store_lanes(to + d, value, operands<P>(count));
  }
}

// A task's rows, and what of the problem does not change with them.
template <class T>
struct PointRow {
  const T *source, *relu;
  T* result;
  int64_t first, last;  // of the blocks of results

  PointRow(const TapConv& p, int64_t blocks, int64_t task) {
    const int64_t row = task / p.channel_blocks, share = task % p.channel_blocks, n = row / p.rows, y = row % p.rows;
    const int64_t source_y = y * p.planes.step_h;
    source = static_cast<const T*>(p.source.data) + n * p.source.stride.n + source_y * p.source.stride.h;
    relu = static_cast<const T*>(p.source.relu_output);
    if (relu) relu += n * p.source.relu_stride.n + source_y * p.source.relu_stride.h;
    result = static_cast<T*>(p.result.data) + n * p.result.stride.n + y * p.result.stride.h;
    first = blocks * share / p.channel_blocks, last = blocks * (share + 1) / p.channel_blocks;
  }
};

template <class T>
void run_points_by_channel(const TapConv& p, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  using P = Operand<T>;
  constexpr int64_t kWidth = 2 * kLanes<A>;
  const int64_t channels = p.group_channels, depth = operands<P>(channels);
  const int64_t step = p.planes.step_w * p.source.stride.w, relu_step = p.planes.step_w * p.source.relu_stride.w;
  const int64_t most_points = most(kRows, kPointBytes / (depth * int64_t(sizeof(P))) / kRows * kRows);
  const bool in_place = sizeof(P) == kTermsOf<P> * sizeof(T) && !p.source.relu_output &&
                        channels % kTermsOf<P> == 0 && step % kTermsOf<P> == 0;
  P* const copied = static_cast<P*>(scratch);
  RowTile<T> b;
  b.depth = depth, b.result_pitch = p.result.stride.w, b.relu = p.relu;
  b.row_pitch = in_place ? step / kTermsOf<P> : depth;
  for (int64_t task = begin; task < end; ++task) {
    const PointRow<T> row(p, ceil_div(p.group_results, kWidth), task);
    for (int64_t x = 0; x < p.cols; x += most_points) {
      const int64_t count = least(most_points, p.cols - x);
      const P* pixels = in_place ? reinterpret_cast<const P*>(row.source + x * step) : copied;
      for (int64_t i = 0; !in_place && i < count; ++i)
        copy_pixel(row.source + (x + i) * step, row.relu ? row.relu + (x + i) * relu_step : nullptr, channels,
                   copied + i * depth);
      for (int64_t panel = row.first; panel < row.last; ++panel) {
        const int64_t m = panel * kWidth;
        b.panel = static_cast<const P*>(p.weight) + m * depth;
        b.bias = p.bias ? static_cast<const A*>(p.bias) + m : nullptr;
        b.lanes = int(least(kWidth, p.group_results - m));
        b.ahead = panel == row.first ? kRows * int64_t(sizeof(P)) : 0;
        for (int64_t i = 0; i < count; i += kRows) {
          b.rows = pixels + i * b.row_pitch;
          b.result = row.result + (x + i) * b.result_pitch + m;
          multiply_rows_of<T, true, kRows>(least(kRows, count - i), b);
        }
      }
    }
  }
}

template <class T>
void run_points_by_column(const TapConv& p, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  using P = Operand<T>;
  constexpr int64_t L = kLanes<A>, kWidth = 2 * L;
  const int64_t channels = p.group_channels, depth = operands<P>(channels);
  const int64_t most_points = most(kWidth, kPointBytes / (depth * int64_t(sizeof(P))) / kWidth * kWidth);
  P* const panels = static_cast<P*>(scratch);
  RowTile<T> b;
  b.depth = depth, b.result_pitch = p.result.stride.c, b.relu = p.relu;
  for (int64_t task = begin; task < end; ++task) {
    const PointRow<T> row(p, ceil_div(p.group_results, kRows), task);
    for (int64_t x = 0; x < p.cols; x += most_points) {
      const int64_t count = least(most_points, p.cols - x);
      for (int64_t d = 0; d < depth; ++d) {
        const int64_t c = d * kTermsOf<P>;
        const T* source = row.source + c * p.source.stride.c + x;
        const T* relu = row.relu ? row.relu + c * p.source.relu_stride.c + x : nullptr;
        for (int64_t i = 0; i < count; i += L)
          store(panels + i / kWidth * kWidth * depth + d * kWidth + i % kWidth,
                load_operands<T, P>(source + i, p.source.stride.c, relu ? relu + i : nullptr, p.source.relu_stride.c,
                                    channels - c, int(least(L, count - i))));
      }
      const int64_t tiles = (row.last - row.first) * ceil_div(count, kWidth);
      int64_t fetched = 0, done = 0;
      for (int64_t block = row.first; block < row.last; ++block) {
        const int64_t m = block * kRows;
        b.rows = static_cast<const P*>(p.weight) + m * depth;
        b.bias = p.bias ? static_cast<const A*>(p.bias) + m : nullptr;
        for (int64_t i = 0; i < count; i += kWidth) {
          b.panel = panels + i * depth;
          b.result = row.result + m * b.result_pitch + x + i;
          b.lanes = int(least(kWidth, count - i));
          for (const int64_t stop = channels * ++done / tiles; fetched < stop; ++fetched) {
            const char* at = reinterpret_cast<const char*>(row.source + fetched * p.source.stride.c + x + count);
            for (int64_t k = 0; k < count * int64_t(sizeof(T)); k += 64) __builtin_prefetch(at + k);
          }
          multiply_rows_of<T, false, kRows>(least(kRows, p.group_results - m), b);
        }
      }
    }
  }
}

// Tasks [begin, end): a result row of one image, and a share of the blocks of results.
template <class T>
void run_points(const TapConv& p, void* scratch, int64_t begin, int64_t end) {
  if (p.result.stride.c == 1)
    run_points_by_channel<T>(p, scratch, begin, end);
  else
    run_points_by_column<T>(p, scratch, begin, end);
}

#define FASTNN_ALL_DTYPES(function) {function<double>, function<float>, function<bf16>, function<f16>}
const PointwiseKernels kPointwiseKernels = {
    {2 * kLanes<double>, 2 * kLanes<float>},
    kRows,
    FASTNN_ALL_DTYPES(pack_points_weight),
    FASTNN_ALL_DTYPES(run_points),
};
#undef FASTNN_ALL_DTYPES

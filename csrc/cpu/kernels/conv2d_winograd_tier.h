// Winograd's F(R x R, 3x3): out = A^T [(G g G^T) * (B^T d B)] A, summed over the source channels between the brackets.
// A tile of 2 x 2 results takes 16 multiplications a channel pair instead of 36, one of 4 x 4 takes 36 instead of 144.
//
// Per task = (block of tiles, group of channels, some of its result channels):
//   1. input   the source rows of a row of tiles are packed as vectors of channels (here end the source's layout, its
//              padding and its ReLU mask), and every tile's B^T d B is written to products[product][tile][channel].
//   2. GEMMs   one for each product, tiles x source channels x result channels: kGemmTiles tiles x kGemmVectors vectors
//              of result channels stay in registers over all source channels. Each step loads kGemmVectors vectors of
//              weights and broadcasts kGemmTiles elements for their product in FMAs: 8/12 on AVX2, 10/16 on AVX-512.
//   3. output  A^T m A, the bias, ReLU and the max-pool of the tile, in registers; rows of results leave through a
//              line that stays in the L1 cache, which is transposed where the result is not channels_last.
// A tile's sums are the same wherever blocks are cut.
//
// Blocking: the transformed tiles of a block (64 or 144 bytes a tile and channel in float32) stay in the L2 cache while
// every result channel's weights pass by, as many bytes a pair of channels: weights are read from the outer caches once
// a block. Where there are few blocks, each packs a run's weights as it comes to it, and they never leave the cache.
//
// The gradient of the weight is G^T [sum over tiles of (A dy A^T) * (B^T d B)] G: GEMMs that reduce over tiles. A task
// takes a block of result and source channels, whose sums stay in the L2 cache while blocks of transformed tiles pass
// by, and turns them into 9 at its end: the transforms are linear, so slices of tiles add up.
//
// Operations a tile of 2 x 2 results: 2 * 16 * C * M in the GEMMs, against 2 * 36 * C * M of the direct sum; 24 * C
// additions for the input (neighbours share columns), 24 * M for the output. Of 4 x 4: 2 * 36 * C * M, against 2 * 144;
// 180 * C and 170 * M. The transforms write and read a tile's products in the cache on either side.

#if FASTNN_VECTOR_BYTES == 64
constexpr int kGemmTiles = 8, kGradResults = 8;
#else
constexpr int kGemmTiles = 6, kGradResults = 4;
#endif
constexpr int kGemmVectors = 2;
constexpr int kLineVectors = 64 / FASTNN_VECTOR_BYTES;  // vectors in a cache line: source channels packed together

// Of a tile of R x R results: the source rows it reads, and its products.
template <int R>
constexpr int kSide = R + 2;
template <int R>
constexpr int kProducts = kSide<R> * kSide<R>;

// A count of elements rounded up to an odd number of 64-byte lines (of float32): arrays that lie a power of two apart
// would share cache sets.
FASTNN_INLINE int64_t odd_lines(int64_t elements) { return ((elements + 15) / 16 | 1) * 16; }

// Where a thread's scratch memory lies, in elements.
template <class A, int R>
struct WinogradScratch {
  int64_t channel_pitch;  // between tiles of one product
  int64_t product;        // between products of the source
  int64_t sum;            // between products of the result
  int64_t line_pitch;     // between lines of results
  int64_t products, sums, weight, rows, lines, codes, end;

  explicit WinogradScratch(const WinogradConv& w) {
    constexpr int64_t L = kLanes<A>, kWidth = kGemmVectors * L;
    channel_pitch = (w.conv.group_channels + L - 1) / L * L;
    product = odd_lines((w.block_tiles + kGemmTiles - 1) / kGemmTiles * kGemmTiles * channel_pitch);
    sum = odd_lines(w.block_tiles * kWidth);
    line_pitch = (R * w.block_tiles + L) * L;
    products = 0;
    sums = products + kProducts<R> * product;
    weight = sums + kProducts<R> * sum;
    rows = weight + (w.packed ? 0 : kProducts<R> * w.run_product);
    lines = rows + kSide<R> * (R * w.block_tiles + 2) * kLineVectors * L;
    codes = lines + R * line_pitch;
    end = codes + w.block_tiles * L;  // a byte for each of at most four windows
  }
};

// Neighbouring tiles of one row of tiles.
struct TileRun {
  int64_t n, row, col, count;
};
FASTNN_INLINE TileRun tile_run(const WinogradConv& w, int64_t tile, int64_t end) {
  const int64_t row = tile / w.tile_cols, col = tile % w.tile_cols, left = w.tile_cols - col;
  return {row / w.tile_rows, row % w.tile_rows, col, end - tile < left ? end - tile : left};
}

// ---- the transforms of a row or a column ----

// F(4, 3)'s finite points but 0: exact in binary, and about as far from 1 on either side, see docs/kernels.md.
template <class A>
struct Points {
  static constexpr A a = A(0.625), b = A(1.5), a2 = a * a, b2 = b * b;
  static constexpr A scale_a = 1 / (2 * a2 * (a2 - b2)), scale_b = 1 / (2 * b2 * (b2 - a2));
};

// B^T of R + 2 values.
template <int R, class A>
FASTNN_INLINE void input_transform(const Vec<A>* d, Vec<A>* out) {
  if constexpr (R == 2) {
    out[0] = d[0] - d[2], out[1] = d[1] + d[2], out[2] = d[2] - d[1], out[3] = d[1] - d[3];
  } else {
    using P = Points<A>;
    const Vec<A> even_a = d[4] - P::b2 * d[2], odd_a = d[3] - P::b2 * d[1];
    const Vec<A> even_b = d[4] - P::a2 * d[2], odd_b = d[3] - P::a2 * d[1];
    out[0] = P::a2 * P::b2 * d[0] + (d[4] - (P::a2 + P::b2) * d[2]);
    out[1] = even_a + P::a * odd_a, out[2] = even_a - P::a * odd_a;
    out[3] = even_b + P::b * odd_b, out[4] = even_b - P::b * odd_b;
    out[5] = P::a2 * P::b2 * d[1] + (d[5] - (P::a2 + P::b2) * d[3]);
  }
}

// G of three values.
template <int R, class A>
FASTNN_INLINE void weight_transform(Vec<A> g0, Vec<A> g1, Vec<A> g2, Vec<A>* out) {
  if constexpr (R == 2) {
    const Vec<A> half = (g0 + g2) / 2, middle = g1 / 2;
    out[0] = g0, out[1] = half + middle, out[2] = half - middle, out[3] = g2;
  } else {
    using P = Points<A>;
    const Vec<A> even_a = (g0 + P::a2 * g2) * P::scale_a, odd_a = g1 * (P::a * P::scale_a);
    const Vec<A> even_b = (g0 + P::b2 * g2) * P::scale_b, odd_b = g1 * (P::b * P::scale_b);
    out[0] = g0 * (1 / (P::a2 * P::b2));
    out[1] = even_a + odd_a, out[2] = even_a - odd_a;
    out[3] = even_b + odd_b, out[4] = even_b - odd_b;
    out[5] = g2;
  }
}

// A^T of R + 2 values.
template <int R, class A>
FASTNN_INLINE void output_transform(const Vec<A>* m, Vec<A>* out) {
  if constexpr (R == 2) {
    out[0] = m[0] + (m[1] + m[2]), out[1] = (m[1] - m[2]) - m[3];
  } else {
    using P = Points<A>;
    const Vec<A> even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    out[0] = m[0] + (even_a + even_b);
    out[1] = P::a * odd_a + P::b * odd_b;
    out[2] = P::a2 * even_a + P::b2 * even_b;
    out[3] = (P::a2 * P::a * odd_a + P::b2 * P::b * odd_b) + m[5];
  }
}

// A of R values of a result's gradient.
template <int R, class A>
FASTNN_INLINE void grad_transform(const Vec<A>* y, Vec<A>* out) {
  if constexpr (R == 2) {
    out[0] = y[0], out[1] = y[0] + y[1], out[2] = y[0] - y[1], out[3] = -y[1];
  } else {
    using P = Points<A>;
    const Vec<A> even_a = y[0] + P::a2 * y[2], odd_a = P::a * (y[1] + P::a2 * y[3]);
    const Vec<A> even_b = y[0] + P::b2 * y[2], odd_b = P::b * (y[1] + P::b2 * y[3]);
    out[0] = y[0];
    out[1] = even_a + odd_a, out[2] = even_a - odd_a;
    out[3] = even_b + odd_b, out[4] = even_b - odd_b;
    out[5] = y[3];
  }
}

// G^T of R + 2 sums.
template <int R, class A>
FASTNN_INLINE void tap_transform(const Vec<A>* s, Vec<A>* out) {
  if constexpr (R == 2) {
    const Vec<A> half = (s[1] + s[2]) / 2;
    out[0] = s[0] + half, out[1] = (s[1] - s[2]) / 2, out[2] = half + s[3];
  } else {
    using P = Points<A>;
    const Vec<A> even_a = (s[1] + s[2]) * P::scale_a, odd_a = (s[1] - s[2]) * P::scale_a;
    const Vec<A> even_b = (s[3] + s[4]) * P::scale_b, odd_b = (s[3] - s[4]) * P::scale_b;
    out[0] = s[0] * (1 / (P::a2 * P::b2)) + (even_a + even_b);
    out[1] = P::a * odd_a + P::b * odd_b;
    out[2] = (P::a2 * even_a + P::b2 * even_b) + s[5];
  }
}

// ---- input ----

// Row y of the padded source from column x on, `lanes` channels: a vector every kLineVectors at `to`. The next row of
// tiles is `ahead` rows on.
template <class T>
void pack_vectors(const ConvSource& s, int64_t n, int64_t c, int lanes, int64_t y, int64_t x, int64_t cols, int ahead,
                  Accumulator<T>* to) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>, kStep = kLineVectors * L;
  int64_t first = x < 0 ? -x : 0, last = s.width - x < cols ? s.width - x : cols;
  if (first > cols) first = cols;
  if (y < 0 || y >= s.height || last < first) last = first;
  for (int64_t j = 0; j < first; ++j) store(to + j * kStep, Vec<A>{});
  const T* from = static_cast<const T*>(s.data) + n * s.stride.n + c * s.stride.c + y * s.stride.h + x * s.stride.w;
  const T* relu = static_cast<const T*>(s.relu_output);
  if (relu) relu += n * s.relu_stride.n + c * s.relu_stride.c + y * s.relu_stride.h + x * s.relu_stride.w;
  for (int64_t j = first; j < last; j += L) {
    const int count = int(last - j < L ? last - j : L);
    Vec<A> pixels[L];
    read_masked_vectors(from + j * s.stride.w, s.stride.c, s.stride.w, relu ? relu + j * s.relu_stride.w : nullptr,
                        s.relu_stride.c, s.relu_stride.w, lanes, count, ahead * s.stride.h, ahead * s.relu_stride.h,
                        pixels);
    for (int i = 0; i < count; ++i) store(to + (j + i) * kStep, pixels[i]);
  }
  for (int64_t j = last; j < cols; ++j) store(to + j * kStep, Vec<A>{});
}

// B^T of one column of the packed source.
template <int R, class A>
FASTNN_INLINE void column_products(const A* const* rows, int64_t at, Vec<A>* out) {
  Vec<A> d[kSide<R>];
#pragma GCC unroll 6
  for (int i = 0; i < kSide<R>; ++i) d[i] = load(rows[i] + at);
  input_transform<R, A>(d, out);
}

// One vector of channels of `count` neighbouring tiles, which share two columns.
template <int R, class A>
void input_products(const A* const* rows, int64_t count, A* out, int64_t pitch, int64_t product) {
  constexpr int64_t kStep = kLineVectors * kLanes<A>;
  constexpr int S = kSide<R>;
  Vec<A> columns[S][S];
  column_products<R>(rows, 0, columns[0]);
  column_products<R>(rows, kStep, columns[1]);
  for (int64_t tile = 0; tile < count; ++tile, out += pitch) {
#pragma GCC unroll 4
    for (int j = 2; j < S; ++j) column_products<R>(rows, (R * tile + j) * kStep, columns[j]);
#pragma GCC unroll 6
    for (int i = 0; i < S; ++i) {
      Vec<A> row[S], products[S];
#pragma GCC unroll 6
      for (int j = 0; j < S; ++j) row[j] = columns[j][i];
      input_transform<R, A>(row, products);
#pragma GCC unroll 6
      for (int j = 0; j < S; ++j) store(out + (S * i + j) * product, products[j]);
      columns[0][i] = row[R], columns[1][i] = row[R + 1];
    }
  }
}

// products[product][tile][channel] of tiles [begin, end); further tiles are zero, up to whole register tiles.
template <class T, int R>
void transform_input(const WinogradConv& w, int64_t c0, int64_t begin, int64_t end,
                     const WinogradScratch<Accumulator<T>, R>& s, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>, kStep = kLineVectors * L;
  constexpr int S = kSide<R>;
  const ConvSource& source = w.conv.source;
  const int64_t channels = w.conv.group_channels, row_size = (R * w.block_tiles + 2) * kStep;
  A* products = scratch + s.products;
  for (int64_t c = 0; c < channels; c += kStep) {
    TileRun before{0, -2, 0, 0};
    for (int64_t tile = begin; tile < end; tile += before.count) {
      const TileRun run = tile_run(w, tile, end);
      // The run above, if it is of a whole row, has left two of the source rows.
      const int64_t left = run.row == before.row + 1 && before.col == 0 ? 2 : 0;
      A* rows[S];
      for (int64_t i = 0; i < S; ++i) rows[i] = scratch + s.rows + (R * run.row + i) % S * row_size;
      for (int64_t v = 0; v < kLineVectors && c + v * L < channels; ++v) {
        const int lanes = int(channels - c - v * L < L ? channels - c - v * L : L);
        for (int64_t i = left; i < S; ++i)
          pack_vectors<T>(source, run.n, c0 + c + v * L, lanes, R * run.row + i - w.conv.planes.origin_h,
                          R * run.col - w.conv.planes.origin_w, R * run.count + 2, R, rows[i] + v * L);
        const A* at[S];
        for (int i = 0; i < S; ++i) at[i] = rows[i] + v * L;
        input_products<R>(at, run.count, products + (tile - begin) * s.channel_pitch + c + v * L, s.channel_pitch,
                          s.product);
      }
      before = run;
    }
  }
  for (int64_t tile = end - begin; tile % kGemmTiles; ++tile)
    for (int64_t k = 0; k < kProducts<R>; ++k)
      for (int64_t c = 0; c < s.channel_pitch; c += L)
        store(products + k * s.product + tile * s.channel_pitch + c, Vec<A>{});
}

// ---- weight ----

// Of `lanes` result channels at `weight`, the taps of `channels` source channels, no more than a vector has lanes, as
// taps[window position][source channel].
template <class T>
void read_taps(const TapConv& p, const T* weight, const int64_t* strides, int lanes, int channels,
               Vec<Accumulator<T>>* taps) {
  constexpr int L = kLanes<Accumulator<T>>, kPadded = (9 + L - 1) / L * L;
  int64_t first = p.taps[0].weight, last = first;
  for (int64_t t = 1; t < 9; ++t) {
    first = least(first, p.taps[t].weight);
    last = p.taps[t].weight > last ? p.taps[t].weight : last;
  }
  if (strides[1] != 1 && strides[2] != 1 && last - first < 9) {  // a channel pair's taps are neighbours
    for (int c = 0; c < channels; ++c, weight += strides[2]) {
      Vec<Accumulator<T>> pair[kPadded];
      for (int i = 0; i <= last - first; i += L)
        read_vectors(weight + first + i, strides[1], 1, lanes, int(least(L, last - first + 1 - i)), 4 * strides[2],
                     pair + i);
      for (int64_t t = 0; t < 9; ++t)
        taps[(p.taps[t].row * 3 + p.taps[t].col) * L + c] = pair[p.taps[t].weight - first];
    }
  } else {
    for (int64_t t = 0; t < 9; ++t)
      read_vectors(weight + p.taps[t].weight, strides[1], strides[2], lanes, channels, 0,
                   taps + (p.taps[t].row * 3 + p.taps[t].col) * L);
  }
}

// packed[product][source channel][result channel] of run `index` of kWidth result channels: G g G^T. Of a run that one
// vector holds, only that vector is stored.
template <class T, int R>
void pack_run(const WinogradConv& w, int64_t index, Accumulator<T>* packed) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>, kWidth = kGemmVectors * L;
  constexpr int S = kSide<R>;
  const TapConv& p = w.conv;
  const int64_t* strides = w.weight_strides;
  const int64_t group = index / w.group_runs, m = index % w.group_runs * kWidth;
  const int64_t count = least(kWidth, p.group_results - m), width = count > L ? kWidth : L;
  const T* weight = static_cast<const T*>(p.weight) + group * strides[0] + m * strides[1];
  for (int64_t c = 0; c < p.group_channels; c += L)
    for (int64_t v = 0; v < width; v += L) {
      Vec<A> taps[9 * L];
      const int64_t channels = least(L, p.group_channels - c);
      read_taps(p, weight + v * strides[1] + c * strides[2], strides, int(least(L, count - v)), int(channels), taps);
      for (int64_t k = 0; k < channels; ++k) {
        A* const to = packed + (c + k) * width + v;
        Vec<A> left[S][3], out[S];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          weight_transform<R, A>(taps[j * L + k], taps[(3 + j) * L + k], taps[(6 + j) * L + k], out);
#pragma GCC unroll 6
          for (int i = 0; i < S; ++i) left[i][j] = out[i];
        }
#pragma GCC unroll 6
        for (int i = 0; i < S; ++i) {
          weight_transform<R, A>(left[i][0], left[i][1], left[i][2], out);
#pragma GCC unroll 6
          for (int j = 0; j < S; ++j) store(to + (S * i + j) * w.run_product, out[j]);
        }
      }
    }
}

template <class T, int R>
void pack_runs(const WinogradConv& w, void* packed, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index)
    pack_run<T, R>(w, index, static_cast<Accumulator<T>*>(packed) + index * kProducts<R> * w.run_product);
}

// ---- GEMMs ----

// sums[tile][result channel] of kGemmTiles tiles and NV vectors of result channels.
template <class A, int NV>
FASTNN_INLINE void gemm_tile(const A* products, int64_t pitch, const A* weight, int64_t channels, A* sums) {
  Vec<A> sum[kGemmTiles][NV] = {};
  for (int64_t c = 0; c < channels; ++c, weight += NV * kLanes<A>) {
    Vec<A> b[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) b[v] = load(weight + v * kLanes<A>);
#pragma GCC unroll 8
    for (int i = 0; i < kGemmTiles; ++i) {
      const Vec<A> a = splat(products[i * pitch + c]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[i][v] += a * b[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kGemmTiles; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(sums + (i * NV + v) * kLanes<A>, sum[i][v]);
}

template <class A, int NV>
void gemm(const A* products, int64_t pitch, const A* weight, int64_t channels, int64_t tiles, A* sums) {
  for (int64_t tile = 0; tile < tiles; tile += kGemmTiles)
    gemm_tile<A, NV>(products + tile * pitch, pitch, weight, channels, sums + tile * NV * kLanes<A>);
}

// ---- output ----

// The R x R results of a tile, row by row, from products `sum` apart.
template <int R, class A>
FASTNN_INLINE void results_of_tile(const A* sums, int64_t sum, Vec<A> bias, Vec<A>* out) {
  constexpr int S = kSide<R>;
  Vec<A> columns[S][R];
#pragma GCC unroll 6
  for (int j = 0; j < S; ++j) {
    Vec<A> m[S];
#pragma GCC unroll 6
    for (int i = 0; i < S; ++i) m[i] = load(sums + (S * i + j) * sum);
    output_transform<R, A>(m, columns[j]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    Vec<A> m[S];
#pragma GCC unroll 6
    for (int j = 0; j < S; ++j) m[j] = columns[j][i];
    output_transform<R, A>(m, out + R * i);
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) out[R * i + j] += bias;
  }
}

// Max-pools the results of `count` tiles 2 x 2 by 2 x 2, as torch: the first of equal maxima. Lines of pixels, and as
// many of `codes`: a byte a lane.
template <int R, class A>
Vec<A> pool_tiles(const A* sums, int64_t width, int64_t sum, Vec<A> bias, int64_t count, A* lines, uint8_t* codes,
                  int64_t line_pitch, int64_t code_pitch) {
  constexpr int64_t L = kLanes<A>;
  Vec<A> check{}, out[R * R];
  for (int64_t i = 0; i < count; ++i) {
    results_of_tile<R>(sums + i * width, sum, bias, out);
#pragma GCC unroll 4
    for (int window = 0; window < R * R / 4; ++window) {
      const int row = window / (R / 2), col = window % (R / 2);
      const Vec<A>* first = out + 2 * row * R + 2 * col;
      Vec<A> best = *first;
      Mask<A> element{};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec<A> value = first[j / 2 * R + j % 2];
        check += value * A(0);
        element = value > best ? Mask<A>{} + j : element;
        best = max(best, value);
      }
      const int64_t at = (R / 2 * i + col) * L;
      store(lines + row * line_pitch + at, max(Vec<A>{}, best));
      store_bytes(codes + row * code_pitch + at, best <= Vec<A>{} ? Mask<A>{} + kPoolNone : element);
    }
  }
  return check;
}

// The results of `count` tiles as lines of pixels, ReLU applied.
template <int R, class A, bool relu>
Vec<A> result_tiles(const A* sums, int64_t width, int64_t sum, Vec<A> bias, int64_t count, A* lines,
                    int64_t line_pitch) {
  constexpr int64_t L = kLanes<A>;
  Vec<A> check{}, out[R * R];
  for (int64_t i = 0; i < count; ++i) {
    results_of_tile<R>(sums + i * width, sum, bias, out);
#pragma GCC unroll 16
    for (int j = 0; j < R * R; ++j) {
      check += out[j] * A(0);
      store(lines + j / R * line_pitch + (R * i + j % R) * L, relu ? max(Vec<A>{}, out[j]) : out[j]);
    }
  }
  return check;
}

// Result channels [m, m + lanes) of tiles [begin, end): a vector of every product in `sums`, whose tiles are `width`
// apart. Returns zeros, but NaN where a result is not finite.
template <class T, int R>
Vec<Accumulator<T>> transform_output(const WinogradConv& w, int64_t m, int lanes, int64_t begin, int64_t end,
                                     const Accumulator<T>* sums, int64_t width,
                                     const WinogradScratch<Accumulator<T>, R>& s, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>;
  const ConvResult& result = w.conv.result;
  A* const lines = scratch + s.lines;
  uint8_t* const codes = reinterpret_cast<uint8_t*>(scratch + s.codes);
  // Pixels along a side of a tile, and of an image.
  const int64_t side = result.pool_code ? R / 2 : R;
  const int64_t height = result.pool_code ? result.pool.out_h : w.conv.rows;
  const int64_t all_cols = result.pool_code ? result.pool.out_w : w.conv.cols;
  const int64_t code_pitch = side * w.block_tiles * L;
  const Vec<A> bias = w.conv.bias ? load_n(static_cast<const A*>(w.conv.bias) + m, lanes) : Vec<A>{};
  Vec<A> check{};
  for (int64_t tile = begin, count; tile < end; tile += count, sums += count * width) {
    const TileRun run = tile_run(w, tile, end);
    count = run.count;
    if (result.pool_code)
      check += pool_tiles<R>(sums, width, s.sum, bias, count, lines, codes, s.line_pitch, code_pitch);
    else
      check += w.conv.relu ? result_tiles<R, A, true>(sums, width, s.sum, bias, count, lines, s.line_pitch)
                           : result_tiles<R, A, false>(sums, width, s.sum, bias, count, lines, s.line_pitch);
    const int64_t x = side * run.col, cols = least(side * count, all_cols - x);
    for (int64_t i = 0, y = side * run.row; i < side && y < height; ++i, ++y) {
      const Strides4 &to = result.stride, &code_to = result.code_stride;
      write_vectors<T>(lines + i * s.line_pitch, L, cols, lanes,
                       static_cast<T*>(result.data) + run.n * to.n + m * to.c + y * to.h + x * to.w, to.c, to.w);
      if (!result.pool_code) continue;
      uint8_t* code = result.pool_code + run.n * code_to.n + m * code_to.c + y * code_to.h + x * code_to.w;
      for (int64_t k = 0; k < cols; ++k)
        for (int64_t j = 0; j < lanes; ++j) code[k * code_to.w + j * code_to.c] = codes[i * code_pitch + k * L + j];
    }
  }
  return check;
}

template <class T, int R>
bool run_winograd(const WinogradConv& w, void* scratch_, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>, kWidth = kGemmVectors * L;
  const TapConv& p = w.conv;
  const WinogradScratch<A, R> s(w);
  A *scratch = static_cast<A*>(scratch_), *products = scratch + s.products, *sums = scratch + s.sums;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t split = task % w.splits(), group = task / w.splits() % p.groups;
    const int64_t first = task / (w.splits() * p.groups) * w.block_tiles;
    const int64_t last = least(first + w.block_tiles, w.tiles());
    int64_t run = split * w.block_runs;
    const int64_t end_run = least(run + w.block_runs, w.group_runs);
    transform_input<T, R>(w, group * p.group_channels, first, last, s, scratch);
    Vec<A> check{};
    for (; run < end_run; ++run) {
      const int64_t m = run * kWidth, count = least(kWidth, p.group_results - m), index = group * w.group_runs + run;
      const A* weight = scratch + s.weight;
      if (w.packed)
        weight = static_cast<const A*>(w.packed) + index * kProducts<R> * w.run_product;
      else
        pack_run<T, R>(w, index, scratch + s.weight);
      for (int64_t k = 0; k < kProducts<R>; ++k, weight += w.run_product)
        if (count > L)
          gemm<A, 2>(products + k * s.product, s.channel_pitch, weight, p.group_channels, last - first,
                     sums + k * s.sum);
        else
          gemm<A, 1>(products + k * s.product, s.channel_pitch, weight, p.group_channels, last - first,
                     sums + k * s.sum);
      for (int64_t i = 0; i < count; i += L)
        check += transform_output<T, R>(w, group * p.group_results + m + i, int(least(L, count - i)), first, last,
                                        sums + i, count > L ? kWidth : L, s, scratch);
    }
    if (sum_lanes(check) != 0) return false;
  }
  return true;
}

// ---- gradient of the weight ----

// A dy A^T of `count` neighbouring tiles, one vector of channels: their R rows of the result's gradient, whose sum this
// returns.
template <int R, class A>
Vec<A> grad_products(const A* const* rows, int64_t count, A* out, int64_t pitch, int64_t product) {
  constexpr int64_t kStep = kLineVectors * kLanes<A>;
  constexpr int S = kSide<R>;
  Vec<A> total{};
  for (int64_t tile = 0; tile < count; ++tile, out += pitch) {
    Vec<A> columns[R][S];
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) {
      Vec<A> y[R];
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        y[i] = load(rows[i] + (R * tile + j) * kStep);
        total += y[i];
      }
      grad_transform<R, A>(y, columns[j]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < S; ++i) {
      Vec<A> row[R], products[S];
#pragma GCC unroll 4
      for (int j = 0; j < R; ++j) row[j] = columns[j][i];
      grad_transform<R, A>(row, products);
#pragma GCC unroll 6
      for (int j = 0; j < S; ++j) store(out + (S * i + j) * product, products[j]);
    }
  }
  return total;
}

// grads[product][tile][result channel] of tiles [begin, end), and their sums, added to `bias`. `rows` holds R rows of
// the block.
template <class T, int R>
void transform_grad(const WinogradGrad& g, int64_t m0, int64_t results, int64_t begin, int64_t end,
                    Accumulator<T>* rows, Accumulator<T>* grads, int64_t pitch, int64_t product,
                    Vec<Accumulator<T>>* bias) {
  constexpr int64_t L = kLanes<Accumulator<T>>, kStep = kLineVectors * L;
  for (int64_t m = 0; m < results; m += kStep)
    for (int64_t tile = begin, count; tile < end; tile += count) {
      const TileRun run = tile_run(g.source, tile, end);
      count = run.count;
      for (int64_t v = m; v < m + kStep && v < results; v += L) {
        Accumulator<T>* at[R];
        for (int64_t i = 0; i < R; ++i) {
          at[i] = rows + v - m + i * R * g.source.block_tiles * kStep;
          pack_vectors<T>(g.grad.grad, run.n, m0 + v, int(results - v < L ? results - v : L), R * run.row + i,
                          R * run.col, R * count, R, at[i]);
        }
        bias[v / L] += grad_products<R, Accumulator<T>>(at, count, grads + (tile - begin) * pitch + v, pitch, product);
      }
    }
}

// sums[m][channel] += sum over tiles of grads[tile][m] * products[tile][channel], NM result channels and NV vectors.
template <class A, int NM, int NV>
FASTNN_INLINE void grad_gemm_tile(const A* grads, int64_t grad_pitch, const A* products, int64_t pitch, int64_t tiles,
                                  A* sums) {
  Vec<A> sum[NM][NV];
#pragma GCC unroll 8
  for (int i = 0; i < NM; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) sum[i][v] = load(sums + i * pitch + v * kLanes<A>);
  for (int64_t tile = 0; tile < tiles; ++tile, grads += grad_pitch, products += pitch) {
    Vec<A> b[NV];
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) b[v] = load(products + v * kLanes<A>);
#pragma GCC unroll 8
    for (int i = 0; i < NM; ++i) {
      const Vec<A> a = splat(grads[i]);
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) sum[i][v] += a * b[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < NM; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) store(sums + i * pitch + v * kLanes<A>, sum[i][v]);
}

// Of all result channels, padded to whole register tiles (the rest is not used), and all channels, padded to whole
// vectors (`pitch`).
template <class A>
void grad_gemm(const A* grads, int64_t grad_pitch, const A* products, int64_t pitch, int64_t tiles, A* sums) {
  for (int64_t c = 0, vectors; c < pitch; c += vectors * kLanes<A>) {
    const int64_t left = (pitch - c) / kLanes<A>;
    vectors = left == 4 ? 2 : left < 3 ? left : 3;  // four: see tile_vectors
    for (int64_t m = 0; m < grad_pitch; m += kGradResults) {
      A* to = sums + m * pitch + c;
      if (vectors == 3)
        grad_gemm_tile<A, kGradResults, 3>(grads + m, grad_pitch, products + c, pitch, tiles, to);
      else if (vectors == 2)
        grad_gemm_tile<A, kGradResults, 2>(grads + m, grad_pitch, products + c, pitch, tiles, to);
      else
        grad_gemm_tile<A, kGradResults, 1>(grads + m, grad_pitch, products + c, pitch, tiles, to);
    }
  }
}

// The nine taps of one vector of channels from sums `product` apart, window row by window row.
template <int R, class A>
FASTNN_INLINE void taps_of_sums(const A* sums, int64_t product, Vec<A>* taps) {
  constexpr int S = kSide<R>;
  Vec<A> columns[S][3];
#pragma GCC unroll 6
  for (int j = 0; j < S; ++j) {
    Vec<A> s[S];
#pragma GCC unroll 6
    for (int i = 0; i < S; ++i) s[i] = load(sums + (S * i + j) * product);
    tap_transform<R, A>(s, columns[j]);
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    Vec<A> s[S];
#pragma GCC unroll 6
    for (int j = 0; j < S; ++j) s[j] = columns[j][i];
    tap_transform<R, A>(s, taps + 3 * i);
  }
}

// Where a thread's scratch memory lies, in elements, behind that of the source's transform.
template <class A, int R>
struct WinogradGradScratch {
  int64_t grad_pitch, grad_product, sum, grads, sums, end;

  WinogradGradScratch(const WinogradGrad& g, const WinogradScratch<A, R>& s) {
    constexpr int64_t kPad = kGradResults < kLanes<A> ? kLanes<A> : kGradResults;
    grad_pitch = (g.grad.block_results + kPad - 1) / kPad * kPad;
    grad_product = odd_lines(g.source.block_tiles * grad_pitch);
    sum = odd_lines(grad_pitch * s.channel_pitch);
    grads = s.end;
    sums = grads + kProducts<R> * grad_product;
    end = sums + kProducts<R> * sum;
  }
};

template <class T, int R>
bool run_winograd_grad(const WinogradGrad& g, void* scratch_, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int64_t L = kLanes<A>;
  const TapGrad& p = g.grad;
  const WinogradScratch<A, R> s(g.source);
  const WinogradGradScratch<A, R> at(g, s);
  A *scratch = static_cast<A*>(scratch_), *products = scratch + s.products, *grads = scratch + at.grads;
  A* const sums = scratch + at.sums;
  for (int64_t task = begin; task < end; ++task) {
    const auto [slice, group, groups, m0, results, c0, channels] = p.task(task);
    const int64_t first_result = group * p.group_results + m0, all_results = p.groups * p.group_results;
    WinogradConv source = g.source;
    source.conv.group_channels = channels;
    for (int64_t i = 0; i < at.sum * kProducts<R>; ++i) sums[i] = 0;
    A* bias_sums = p.bias_sums && c0 == 0 ? static_cast<A*>(p.bias_sums) + slice * all_results + first_result : nullptr;
    Vec<A> bias[kWinogradGradResults / L + 1] = {};
    for (int64_t b = g.blocks() * slice / p.slices; b < g.blocks() * (slice + 1) / p.slices; ++b) {
      const int64_t first = b * source.block_tiles;
      const int64_t last = first + source.block_tiles < source.tiles() ? first + source.block_tiles : source.tiles();
      transform_input<T, R>(source, group * p.group_channels + c0, first, last, s, scratch);
      transform_grad<T, R>(g, first_result, results, first, last, scratch + s.rows, grads, at.grad_pitch,
                           at.grad_product, bias);
      for (int64_t k = 0; k < kProducts<R>; ++k)
        grad_gemm(grads + k * at.grad_product, at.grad_pitch, products + k * s.product, s.channel_pitch, last - first,
                  sums + k * at.sum);
    }
    Vec<A> check{};
    for (int64_t m = 0; m < results; ++m) {
      A* to = static_cast<A*>(p.weight_sums) + slice * all_results * p.group_channels * p.num_taps;
      for (int64_t c = 0; c < channels; c += L) {
        Vec<A> taps[9];
        taps_of_sums<R>(sums + m * s.channel_pitch + c, at.sum, taps);
        for (int64_t t = 0; t < 9; ++t) {
          const Vec<A> value = taps[p.taps[t].row * 3 + p.taps[t].col];
          check += value * A(0);
          for (int64_t i = 0; i < L && c + i < channels; ++i)
            to[p.sum_index(first_result + m, c0 + c + i, t)] = value[i];
        }
      }
    }
    if (sum_lanes(check) != 0) return false;
    if (bias_sums)
      for (int64_t m = 0; m < results; m += L)
        store_n(bias_sums + m, bias[m / L], int(results - m < L ? results - m : L));
  }
  return true;
}

template <class T, int R>
int64_t winograd_scratch(const WinogradConv& w) {
  return WinogradScratch<Accumulator<T>, R>(w).end * int64_t(sizeof(Accumulator<T>));
}

template <class T, int R>
int64_t winograd_grad_scratch(const WinogradGrad& g) {
  using A = Accumulator<T>;
  return WinogradGradScratch<A, R>(g, WinogradScratch<A, R>(g.source)).end * int64_t(sizeof(A));
}

#define FASTNN_ALL_DTYPES(function, R) {function<double, R>, function<float, R>, function<bf16, R>, function<f16, R>}
#define FASTNN_TILE_KERNELS(R)                                                                                  \
  {FASTNN_ALL_DTYPES(pack_runs, R), FASTNN_ALL_DTYPES(winograd_scratch, R), FASTNN_ALL_DTYPES(run_winograd, R), \
   FASTNN_ALL_DTYPES(winograd_grad_scratch, R), FASTNN_ALL_DTYPES(run_winograd_grad, R)}
const WinogradKernels kWinogradKernels = {
    kGemmTiles,
    {kGemmVectors * kLanes<double>, kGemmVectors * kLanes<float>},
    {FASTNN_TILE_KERNELS(2), FASTNN_TILE_KERNELS(4)},
};
#undef FASTNN_TILE_KERNELS
#undef FASTNN_ALL_DTYPES

// 2-D convolution: the kernels behind the forward pass, the gradient of the input and the gradient of the weight.
//
// Forward and input gradient (TapConv), per task = (images, rows, result channels):
//   1. pack   the source's planes, padded and converted, into thread-private memory that fits the L2 cache. The layout
//             of the source (NCHW, channels_last, any strides) and fused gradients' masks end here.
//   2. tile   result tiles of MR channels x NV vectors of flat positions stay in registers over the whole reduction:
//             each step loads NV vectors of one plane, broadcasts MR weights and does MR * NV FMAs, so loads are
//             (MR + NV) / (MR * NV) of the FMAs: 7/12 for AVX2's 4 x 3, 11/24 for AVX-512's 8 x 3. Where bfloat16 is
//             multiplied in pairs (Operand in vec.h), a plane is one of two channels. One or two result channels would
//             wait for AVX-512's loads: there a tile is four rows by two vectors, and they share what they read.
//   3. write  the tiles pass through a scratch panel that stays in the cache, where max-pooling is taken, and leave in
//             the result's layout.
// Positions are flat: p = row * pitch + column, across the padding between rows, so a tile is full even where rows are
// short; what falls on the padding is computed and dropped, (pitch - cols) / pitch of the work.
//
// Weight gradient (TapGrad), of many channels: both operands are packed position by position, and a tile of MR result
// channels x NV vectors of source channels accumulates one tap's outer products over all positions of a block. Of few
// channels, which would not fill the vectors: MR (channel, tap) pairs x NV vectors of result channels, if the
// gradient's channels are contiguous; else MR result channels x NJ pairs accumulate vectors along the positions, and
// are summed across lanes once a block. In both, the planes are packed as in the forward pass; pixels of channels_last
// are rows as they lie. Where bfloat16 is multiplied in pairs, outer products take two positions at a time.
//
// Operations: 2 * batch * out_channels * out_h * out_w * (in_channels / groups) * kernel_h * kernel_w a pass. Bytes:
// each tensor once, plus a packed copy that stays in the cache; rows on a block's border are packed twice.

#if FASTNN_VECTOR_BYTES == 64
constexpr int kLaneVectors = 4, kTileSums = 24;  // of outer products
constexpr int kTileResults = 8, kTilePairs = 6, kWideResults = 3, kSharedRows = 4, kSharedResults = 2;
#else
constexpr int kLaneVectors = 3, kTileSums = 12;
constexpr int kTileResults = 4, kTilePairs = 3, kWideResults = 1, kSharedRows = 4, kSharedResults = 0;
#endif
constexpr int kTileVectors = 3, kWideVectors = 6;  // the latter of up to kWideResults result channels
constexpr int64_t kReadOperands = 64;

// ---- reading a source ----

template <class P>
FASTNN_INLINE void zero(P* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = P{};
}

FASTNN_INLINE const char* at(const void* data, int64_t index, int64_t size) {
  return static_cast<const char*>(data) + index * size;
}

FASTNN_INLINE int64_t offset4(const Strides4& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * s.n + c * s.c + h * s.h + w * s.w;
}

// `rows` rows of operands of channel c on, of which `channels` are left, y_step apart from row y on, into plane rows
// `pitch` apart: from column x on, every x_step-th element into dst[0, count). May write a vector past `count`. The
// next channels' rows are prefetched: a run reads less of a plane than a hardware prefetcher needs to see.
template <class T, class P>
void read_plane(const ConvSource& s, int64_t n, int64_t c, int64_t channels, int64_t y, int64_t y_step, int64_t rows,
                int64_t x, int64_t x_step, int64_t count, P* dst, int64_t pitch) {
  constexpr int L = kLanes<P>;
  const T* src = static_cast<const T*>(s.data) + offset4(s.stride, n, c, y, x);
  const int64_t step = s.stride.w * x_step, row_step = s.stride.h * y_step;
  const T* relu = static_cast<const T*>(s.relu_output);
  const int64_t relu_step = s.relu_stride.w * x_step, relu_row_step = relu ? s.relu_stride.h * y_step : 0;
  if (relu) relu += offset4(s.relu_stride, n, c, y, x);
  for (int64_t row = 0; row < rows; ++row, src += row_step, dst += pitch, relu += relu_row_step) {
    int64_t i = 0;
    if (step == 1 && (!relu || relu_step == 1)) {
      for (; i < count; i += L) {
        for (int k = kTermsOf<P>; k < 2 * kTermsOf<P>; ++k) {
          __builtin_prefetch(src + i + k * s.stride.c);
          if (relu) __builtin_prefetch(relu + i + k * s.relu_stride.c);
        }
        store(dst + i, load_operands<T, P>(src + i, s.stride.c, relu ? relu + i : nullptr, s.relu_stride.c, channels,
                                           int(least(L, count - i))));
      }
    } else {
      if (step == 2 && !relu)
        for (; i + L <= count; i += L) {
          const Vec<Accumulator<T>> even = load_even(src + 2 * i, L);
          if constexpr (kTermsOf<P> == 2)
            store(dst + i, pairs(even, channels > 1 ? load_even(src + 2 * i + s.stride.c, L) : FloatVec{}));
          else
            store(dst + i, even);
        }
      for (; i < count; ++i)
        dst[i] =
            operand<T, P>(src + i * step, s.stride.c, relu ? relu + i * relu_step : nullptr, s.relu_stride.c, channels);
    }
  }
}

// `count` pixels of C channels each that follow on one another, channel c to dst + c * plane (same overrun).
template <class T, int C>
void read_few(const T* src, const T* relu, int64_t count, Accumulator<T>* dst, int64_t plane) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < count; i += L) {
    Vec<A> rows[C];
#pragma GCC unroll 4
    for (int k = 0; k < C; ++k) {
      const int64_t at = i * C + k * L;
      rows[k] = load_masked(src + at, relu ? relu + at : nullptr, int(most(0, least(L, count * C - at))));
    }
    regroup_channels<A, C, false>(rows);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(dst + c * plane + i, rows[c]);
  }
}

// A row of `channels` channels at once (same overrun), operand d at dst + d * plane: a source whose channels are
// contiguous. Runs of channels that are few enough for their lines at dst to stay in the L1 cache until they are full.
template <class T, class P>
void read_rows(const ConvSource& s, int64_t n, int64_t c0, int64_t channels, int64_t y, int64_t x, int64_t step,
               int64_t count, P* dst, int64_t plane) {
  constexpr int L = kLanes<P>;
  const T* src = static_cast<const T*>(s.data) + offset4(s.stride, n, c0, y, x);
  const T* relu = static_cast<const T*>(s.relu_output);
  if (relu) relu += offset4(s.relu_stride, n, c0, y, x);
  const int64_t src_step = step * s.stride.w, relu_step = step * s.relu_stride.w, depth = operands<P>(channels);
  if constexpr (kTermsOf<P> == 1) {
    const bool adjacent = src_step == channels && (!relu || relu_step == channels);
    if (adjacent && channels == 2) return read_few<T, 2>(src, relu, count, dst, plane);
    if (adjacent && channels == 3) return read_few<T, 3>(src, relu, count, dst, plane);
    if (adjacent && channels == 4) return read_few<T, 4>(src, relu, count, dst, plane);
  }
  for (int64_t run = 0; run < depth; run += kReadOperands)
    for (int64_t i = 0; i < count; i += L) {
      const int length = int(least(L, count - i));
      for (int64_t d = run; d < least(depth, run + kReadOperands); d += L) {
        const int64_t c = d * kTermsOf<P>;
        const int width = int(least(L * kTermsOf<P>, channels - c));
        Vec<P> rows[L];
        for (int j = 0; j < L; ++j)
          rows[j] = j < length ? load_neighbours<T, P>(src + (i + j) * src_step + c,
                                                       relu ? relu + (i + j) * relu_step + c : nullptr, width)
                               : Vec<P>{};
        transpose<P>(rows);
        for (int j = 0; j < operands<P>(width); ++j) store(dst + (d + j) * plane + i, rows[j]);
      }
    }
}

// `count` pixels of a row, step apart from column x on, of a source whose channels are contiguous: a pixel's channels
// go to runs of `width`, padded to a vector that what follows overwrites, `run_pitch` apart.
template <class T>
void read_pixels(const ConvSource& s, int64_t n, int64_t c0, int64_t channels, int64_t y, int64_t x, int64_t step,
                 int64_t count, Accumulator<T>* dst, int64_t width, int64_t run_pitch) {
  constexpr int L = kLanes<Accumulator<T>>;
  const T* src = static_cast<const T*>(s.data) + offset4(s.stride, n, c0, y, x);
  const T* relu = static_cast<const T*>(s.relu_output);
  if (relu) relu += offset4(s.relu_stride, n, c0, y, x);
  const int64_t src_step = step * s.stride.w, relu_step = relu ? step * s.relu_stride.w : 0;
  // Pixels that follow on one another are like one of all their channels.
  if (width == channels && src_step == channels && (!relu || relu_step == channels))
    width = channels *= count, count = count > 0;
  for (int64_t i = 0; i < count; ++i, src += src_step, relu += relu_step, dst += width) {
    Accumulator<T>* to = dst;
    for (int64_t run = 0; run < channels; run += width, to += run_pitch)
      for (int64_t c = run; c < least(channels, run + width); c += L)
        store(to + c - run, load_masked(src + c, relu ? relu + c : nullptr, int(least(L, channels - c))));
  }
}

// ---- packing planes ----

struct Block {
  int64_t n, images, row, rows, pitch_image;
};

// Plane columns [first, last) of a phase hold source columns x, x + step_w, ...; the others are padding.
struct Columns {
  int64_t first, last, x;
};
FASTNN_INLINE Columns columns_of(const ConvSource& s, const Planes& p, int64_t phase) {
  const int64_t shift = p.phase_w[phase] - p.origin_w;
  const int64_t first = least(p.pitch, shift < 0 ? ceil_div(-shift, p.step_w) : 0);
  const int64_t last = most(first, least(p.pitch, s.width > shift ? ceil_div(s.width - shift, p.step_w) : 0));
  return {first, last, first * p.step_w + shift};
}

// Plane rows [first, last) of a phase lie inside the source, from its row y on, if it has rows up to `end_row`.
struct Rows {
  int64_t first, last, y;
};
FASTNN_INLINE Rows rows_of(const Planes& p, const Block& block, int64_t end_row, int64_t phase) {
  const int64_t rows = block.rows + p.halo_h, y = block.row * p.step_h + p.phase_h[phase] - p.origin_h;
  const int64_t first = least(rows, y < 0 ? ceil_div(-y, p.step_h) : 0);
  const int64_t last = most(first, least(rows, y < end_row ? ceil_div(end_row - y, p.step_h) : 0));
  return {first, last, y + first * p.step_h};
}

FASTNN_INLINE bool channels_contiguous(const ConvSource& s) {
  return s.stride.c == 1 && s.stride.w != 1 && (!s.relu_output || s.relu_stride.c == 1);
}

// Packs the planes of operands of `channels` channels of `block`. Source rows from `end_row` on count as outside.
template <class T, class P>
void pack_planes(const ConvSource& s, const Planes& p, const Block& block, int64_t end_row, int64_t c0,
                 int64_t channels, P* planes) {
  const int64_t depth = operands<P>(channels);
  const int64_t phase_size = p.plane / p.phases, plane_rows = block.rows + p.halo_h;
  const bool by_channel = channels > 1 && channels_contiguous(s);
  for (int64_t phase = 0; phase < p.phases; ++phase) {
    const auto [first, last, x] = columns_of(s, p, phase);
    const auto [above, below, y] = rows_of(p, block, end_row, phase);
    const int64_t inside = last == first ? 0 : below - above;
    // In the source's own order: plane after plane, or row after row where a pixel's channels are neighbours.
    const int64_t together = by_channel ? depth : 1;
    for (int64_t d = 0; d < depth; d += together)
      for (int64_t image = 0; image < block.images; ++image) {
        P* plane = planes + d * p.plane + phase * phase_size + image * block.pitch_image;
        P* rows = plane + above * p.pitch;
        if (by_channel)
          for (int64_t i = 0; i < inside; ++i)
            read_rows<T, P>(s, block.n + image, c0, channels, y + i * p.step_h, x, p.step_w, last - first,
                            rows + i * p.pitch + first, p.plane);
        else
          read_plane<T, P>(s, block.n + image, c0 + d * kTermsOf<P>, channels - d * kTermsOf<P>, y, p.step_h, inside, x,
                           p.step_w, last - first, rows + first, p.pitch);
        for (int64_t k = 0; k < together; ++k) {
          P* padded = plane + k * p.plane;
          zero(padded, above * p.pitch);
          for (int64_t i = above; i < below; ++i) {
            zero(padded + i * p.pitch, first);
            zero(padded + i * p.pitch + last, p.pitch - last);
          }
          zero(padded + below * p.pitch, (plane_rows - below) * p.pitch);
        }
      }
    const int64_t used = (block.images - 1) * block.pitch_image + plane_rows * p.pitch;
    for (int64_t d = 0; d < depth; ++d) zero(planes + d * p.plane + phase * phase_size + used, phase_size - used);
  }
}

FASTNN_INLINE int64_t tap_offset(const Planes& p, const Tap& tap) {
  return tap.phase * (p.plane / p.phases) + tap.row * p.pitch + tap.col;
}

// ---- forward and input gradient ----

// Where a tap's operands are, and the rows of results [first, last) for which they are not all padding.
struct TapRows {
  int64_t offset, first, last;
};

// What all tiles of a task share.
struct TileSetting {
  int64_t plane, pitch, pitch_image, taps, out_pitch;
  const TapRows* rows;     // of each tap
  bool padded;             // a tap is padding in some row
  bool first, last, relu;  // first: start from the bias, else from `out`; last: apply ReLU
};

// Taps [first, last): the others read nothing but padding for `count` positions of an image, from `position` on.
struct TapRange {
  int64_t first, last;
};
FASTNN_INLINE TapRange taps_of(const TileSetting& s, int64_t position, int64_t count) {
  TapRange taps{0, s.taps};
  if (!s.padded) return taps;
  // 32 bits: the faster division. A block fits the L2 cache.
  const uint32_t in_image = uint32_t(position) % uint32_t(s.pitch_image), end = in_image + uint32_t(count) - 1;
  if (end >= s.pitch_image) return taps;
  const int64_t first_row = in_image / uint32_t(s.pitch), last_row = end / uint32_t(s.pitch);
  while (taps.first < taps.last && s.rows[taps.first].first > last_row) ++taps.first;
  while (taps.first < taps.last && s.rows[taps.last - 1].last <= first_row) --taps.last;
  return taps;
}

template <class P, int MR, int NV>
FASTNN_INLINE void tile(const TileSetting& s, int64_t position, const P* planes, int64_t depth, const P* weight,
                        const Accumulator<P>* bias, Accumulator<P>* out) {
  using A = Accumulator<P>;
  Vec<A> sum[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 6
    for (int v = 0; v < NV; ++v)
      sum[m][v] = s.first ? splat(bias ? bias[m] : A(0)) : load(out + m * s.out_pitch + v * kLanes<A>);
  const TapRange taps = taps_of(s, position, NV * kLanes<P>);
  for (int64_t d = 0; d < depth; ++d, planes += s.plane) {
    const P* tap_weight = weight + (d * s.taps + taps.first) * MR;
    for (int64_t t = taps.first; t < taps.last; ++t, tap_weight += MR) {
      const P* operand = planes + s.rows[t].offset;
      Vec<P> b[NV];
#pragma GCC unroll 6
      for (int v = 0; v < NV; ++v) b[v] = load(operand + v * kLanes<P>);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Vec<P> a = splat(tap_weight[m]);
#pragma GCC unroll 6
        for (int v = 0; v < NV; ++v) sum[m][v] = multiply_add(a, b[v], sum[m][v]);
      }
    }
  }
  if (s.last && s.relu) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 6
      for (int v = 0; v < NV; ++v) sum[m][v] = sum[m][v] < Vec<A>{} ? Vec<A>{} : sum[m][v];
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 6
    for (int v = 0; v < NV; ++v) store(out + m * s.out_pitch + v * kLanes<A>, sum[m][v]);
}

// Vectors the next tile takes of `left`. Four go as two and two: one vector has too few sums to hide an FMA's latency.
FASTNN_INLINE int64_t tile_vectors(int64_t left) { return left == 4 ? 2 : least(kTileVectors, left); }

// `count` positions of MR result channels, from `position` on, where `planes` and `out` are.
template <class P, int MR>
void tiles(const TileSetting& s, int64_t position, const P* planes, int64_t depth, const P* weight,
           const Accumulator<P>* bias, Accumulator<P>* out, int64_t count) {
  for (int64_t left = ceil_div(count, kLanes<P>); left > 0;) {
    // Few result channels: more vectors instead, to have enough sums to hide an FMA's latency.
    constexpr bool wide = MR <= kWideResults;
    const int64_t vectors = wide && left >= kWideVectors ? kWideVectors : tile_vectors(left);
    if (vectors == kWideVectors)
      tile<P, wide ? MR : 1, kWideVectors>(s, position, planes, depth, weight, bias, out);
    else if (vectors == 3)
      tile<P, MR, 3>(s, position, planes, depth, weight, bias, out);
    else if (vectors == 2)
      tile<P, MR, 2>(s, position, planes, depth, weight, bias, out);
    else
      tile<P, MR, 1>(s, position, planes, depth, weight, bias, out);
    left -= vectors;
    position += vectors * kLanes<P>, planes += vectors * kLanes<P>, out += vectors * kLanes<P>;
  }
}

// The widest tile of result channels that still fits `rest`: 8 (AVX-512), 4, 3, 2 or 1.
FASTNN_INLINE int tile_results(int64_t rest) { return rest >= kTileResults ? kTileResults : int(least(rest, 4)); }

template <class P>
FASTNN_INLINE void tiles_of(int results, const TileSetting& s, int64_t position, const P* planes, int64_t depth,
                            const P* weight, const Accumulator<P>* bias, Accumulator<P>* out, int64_t count) {
#if FASTNN_VECTOR_BYTES == 64
  if (results == 8) return tiles<P, 8>(s, position, planes, depth, weight, bias, out, count);
#endif
  if (results == 4) return tiles<P, 4>(s, position, planes, depth, weight, bias, out, count);
  if (results == 3) return tiles<P, 3>(s, position, planes, depth, weight, bias, out, count);
  if (results == 2) return tiles<P, 2>(s, position, planes, depth, weight, bias, out, count);
  return tiles<P, 1>(s, position, planes, depth, weight, bias, out, count);
}

// Few results for what is loaded: kSharedRows rows of them, 2 vectors of each, share what neighbouring rows read. The
// taps are rows of `width`; stores `lanes` results of a row.
template <class P, int MR>
void row_tile(const TileSetting& s, int64_t width, int64_t position, int64_t lanes, const P* planes, int64_t depth,
              const P* weight, const Accumulator<P>* bias, Accumulator<P>* out) {
  using A = Accumulator<P>;
  constexpr int R = kSharedRows, L = kLanes<P>;
  Vec<A> sum[MR][R][2];
#pragma GCC unroll 2
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int k = 0; k < R; ++k) sum[m][k][0] = sum[m][k][1] = splat(bias ? bias[m] : A(0));
  const TapRange taps = taps_of(s, position, (R - 1) * s.pitch + 1);
  for (int64_t d = 0; d < depth; ++d, planes += s.plane)
    for (int64_t t = taps.first; t < least(taps.last, taps.first + width); ++t) {
      const P *operand = planes + s.rows[t].offset, *tap_weight = weight + (d * s.taps + t) * MR;
      Vec<P> b[R][2];
#pragma GCC unroll 4
      for (int k = 0; k < R - 1; ++k, operand += s.pitch) b[k][0] = load(operand), b[k][1] = load(operand + L);
      for (int64_t i = t; i < taps.last; i += width, operand += s.pitch, tap_weight += width * MR) {
        b[R - 1][0] = load(operand), b[R - 1][1] = load(operand + L);
#pragma GCC unroll 2
        for (int m = 0; m < MR; ++m) {
          const Vec<P> a = splat(tap_weight[m]);
#pragma GCC unroll 4
          for (int k = 0; k < R; ++k)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) sum[m][k][v] = multiply_add(a, b[k][v], sum[m][k][v]);
        }
#pragma GCC unroll 4
        for (int k = 0; k < R - 1; ++k) b[k][0] = b[k + 1][0], b[k][1] = b[k + 1][1];
      }
    }
#pragma GCC unroll 2
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int k = 0; k < R; ++k)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        if (s.relu) sum[m][k][v] = sum[m][k][v] < Vec<A>{} ? Vec<A>{} : sum[m][k][v];
        if (lanes > v * L) store_lanes(out + m * s.out_pitch + k * s.pitch + v * L, sum[m][k][v], lanes - v * L);
      }
}

// How many taps a row of the window has, or 0 where rows don't share what they read or don't fill their tiles.
FASTNN_INLINE int64_t shared_width(const TapConv& p, int64_t rows, int64_t lanes) {
  if (p.group_results > kSharedResults || p.planes.phases > 1 || rows < kSharedRows) return 0;
  if (4 * p.cols < 3 * ceil_div(p.cols, 2 * lanes) * 2 * lanes) return 0;
  int64_t width = 0;
  while (width < p.num_taps && p.taps[width].row == p.taps[0].row) ++width;
  for (int64_t t = width; t < p.num_taps; ++t) {
    const Tap &tap = p.taps[t], &above = p.taps[t - width];
    if (tap.row != above.row + 1 || tap.col != above.col) return 0;
  }
  return width < p.num_taps ? width : 0;
}

template <class T>
void pack_weight(const TapConv& p, const void* weight_, const int64_t* strides, void* packed_, int64_t begin,
                 int64_t end) {
  using P = Operand<T>;
  const T* weight = static_cast<const T*>(weight_);
  const int64_t depth = operands<P>(p.group_channels) * p.num_taps, blocks = ceil_div(p.group_results, kTileResults);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t group = index / blocks, first = index % blocks * kTileResults;
    const int64_t last = least(first + kTileResults, p.group_results);
    for (int64_t m = first; m < last;) {
      const int width = tile_results(last - m);
      P* packed = static_cast<P*>(packed_) + (group * p.group_results + m) * depth;
      for (int64_t c = 0; c < p.group_channels; c += kTermsOf<P>)
        for (int64_t t = 0; t < p.num_taps; ++t) {
          const T* from = weight + group * strides[0] + c * strides[2] + p.taps[t].weight;
          for (int i = 0; i < width; ++i)
            *packed++ = operand<T, P>(from + (m + i) * strides[1], strides[2], nullptr, 0, p.group_channels - c);
        }
      m += width;
    }
  }
}

// `rows` rows from y on of results of channels [m, m + channels): row i of channel c is at src + c * pitch + i * step.
template <class T>
FASTNN_INLINE void write_rows(void* data, const Strides4& stride, int64_t n, int64_t m, int64_t channels, int64_t y,
                              int64_t rows, const Accumulator<T>* src, int64_t pitch, int64_t step, int64_t count) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  T* dst = static_cast<T*>(data) + offset4(stride, n, m, y, 0);
  if (stride.w == 1) {
    const int64_t whole = count / L * L;
    const int rest = int(count - whole);
    for (int64_t c = 0; c < channels; ++c) {
      const A* from = src + c * pitch;
      T* to = dst + c * stride.c;
      for (int64_t row = 0; row < rows; ++row, from += step, to += stride.h) {
        // The same row of the next channel is a plane away, where no hardware looks ahead.
        for (int64_t i = 0; i < whole; i += L) __builtin_prefetch(to + stride.c + i, 1), store(to + i, load(from + i));
        if (rest > 0) store_n(to + whole, load_n(from + whole, rest), rest);
      }
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row, src += step, dst += stride.h) {
    if (stride.c == 1) {
      for (int64_t i = 0; i < count; i += L) {
        const int length = int(least(L, count - i));
        for (int64_t c = 0; c < channels; c += L) {
          const int width = int(least(L, channels - c));
          Vec<A> square[L];
          // The panel is padded to whole vectors along a row, so reading past `count` is safe.
          for (int j = 0; j < L; ++j) square[j] = j < width ? load(src + (c + j) * pitch + i) : Vec<A>{};
          transpose<A>(square);
          for (int j = 0; j < length; ++j) {
            if (width == L)
              store(dst + (i + j) * stride.w + c, square[j]);
            else
              store_n(dst + (i + j) * stride.w + c, square[j], width);
          }
        }
      }
    } else {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = 0; i < count; ++i) dst[c * stride.c + i * stride.w] = from_accumulator<T>(src[c * pitch + i]);
    }
  }
}

// Max-pools convolution rows (`row`, pitch apart) into one pooled row, in place at `row` (a window is read before
// anything at or right of it is written), and its codes. Torch's order: the first of equal maxima, the last NaN.
template <class A>
void pool_row(A* row, int64_t pitch, const PoolShape& pool, uint8_t* code, int64_t code_step) {
  if (pool.kernel_h == 2 && pool.kernel_w == 2 && pool.stride_w == 2) {
    constexpr int L = kLanes<A>;
    Mask<A> even, odd;
    for (int i = 0; i < L; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    for (int64_t px = 0; px < pool.out_w; px += L) {
      const int lanes = int(least(L, pool.out_w - px));
      Vec<A> best;
      Mask<A> element{};
      for (int i = 0; i < 2; ++i) {
        // Past the row's end, where there are fewer lanes, lies what is not yet pooled: read, but not stored.
        const Vec<A> left = load(row + i * pitch + 2 * px), right = load(row + i * pitch + 2 * px + L);
        const Vec<A> pair[2] = {__builtin_shuffle(left, right, even), __builtin_shuffle(left, right, odd)};
        if (i == 0) best = pair[0];
        for (int j = 0; j < 2; ++j) {
          const Mask<A> better = (pair[j] > best) | (pair[j] != pair[j]);
          best = better ? pair[j] : best;
          element = better ? Mask<A>{} + (2 * i + j) : element;
        }
      }
      element = best <= Vec<A>{} ? Mask<A>{} + kPoolNone : element;
      if (lanes == L)
        store(row + px, best);
      else
        store_n(row + px, best, lanes);
      if (code_step == 1)
        store_bytes_n(code + px, element, lanes);
      else
        for (int i = 0; i < lanes; ++i) code[(px + i) * code_step] = uint8_t(element[i]);
    }
    return;
  }
  for (int64_t px = 0; px < pool.out_w; ++px) {
    const A* window = row + px * pool.stride_w;
    A best = window[0];
    uint8_t element = 0;
    for (int64_t i = 0; i < pool.kernel_h; ++i)
      for (int64_t j = 0; j < pool.kernel_w; ++j) {
        const A value = window[i * pitch + j];
        if (value > best || value != value) {
          best = value;
          element = uint8_t(i * pool.kernel_w + j);
        }
      }
    code[px * code_step] = best <= 0 ? kPoolNone : element;
    row[px] = best;
  }
}

// Writes result channels [m, m + channels) of a block from the panel, pooled first where that is asked for: a pooled
// row overwrites the first row of its windows, which no later window reads.
template <class T>
void write_panel(const TapConv& p, const Block& block, int64_t m, int64_t channels, Accumulator<T>* panel,
                 int64_t pitch) {
  using A = Accumulator<T>;
  const PoolShape& pool = p.result.pool;
  const bool pooled = p.result.pool_code != nullptr;
  const int64_t step = pooled ? pool.stride_h : 1, window = pooled ? pool.kernel_h : 1;
  const int64_t y = block.row / step, rows = (block.rows - window) / step + 1, row_pitch = step * p.planes.pitch;
  // In the result's own order: plane after plane, or row after row where a pixel's channels are neighbours.
  const bool by_channel = p.result.stride.c == 1;
  const int64_t together = by_channel ? channels : 1, run = by_channel ? 1 : rows;
  for (int64_t c = 0; c < channels; c += together)
    for (int64_t image = 0; image < block.images; ++image)
      for (int64_t i = 0; i < rows; i += run) {
        A* const first = panel + c * pitch + image * block.pitch_image + i * row_pitch;
        for (int64_t j = 0; pooled && j < run; ++j)
          for (int64_t k = 0; k < together; ++k)
            pool_row(first + k * pitch + j * row_pitch, p.planes.pitch, pool,
                     p.result.pool_code + offset4(p.result.code_stride, block.n + image, m + c + k, y + i + j, 0),
                     p.result.code_stride.w);
        write_rows<T>(p.result.data, p.result.stride, block.n + image, m + c, together, y + i, run, first, pitch,
                      row_pitch, pooled ? pool.out_w : p.cols);
      }
}

// The block of a task: images, and rows such that pooling windows are whole.
FASTNN_INLINE Block block_of(const Planes& planes, const PoolShape& pool, bool pooled, int64_t batch, int64_t rows,
                             int64_t image_block, int64_t row_block) {
  Block block;
  block.n = image_block * planes.block_images;
  block.images = least(planes.block_images, batch - block.n);
  // Neighbouring blocks of overlapping windows share kernel_h - stride_h rows.
  const int64_t step = pooled ? planes.block_rows - most(0, pool.kernel_h - pool.stride_h) : planes.block_rows;
  block.row = row_block * step;
  block.rows = least(planes.block_rows, rows - block.row);
  block.pitch_image = (block.rows + planes.halo_h) * planes.pitch;
  return block;
}

// Result channels [m_begin, m_end) of all groups together, of a block, into the panel: from the planes `packed`, the
// first of them of group `group`.
template <class T>
void multiply_runs(const TapConv& p, const Block& block, TileSetting setting, int64_t group, int64_t m_begin,
                   int64_t m_end, const Operand<T>* packed, Accumulator<T>* panel) {
  using A = Accumulator<T>;
  using P = Operand<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t depth = operands<P>(p.group_channels);
  // One run of positions, or one an image where that takes fewer vectors.
  const int64_t image_run = (block.rows - 1) * setting.pitch + p.cols;
  const int64_t whole_run = (block.images - 1) * block.pitch_image + image_run;
  const bool by_image = block.images * ceil_div(image_run, L) < ceil_div(whole_run, L);
  const int64_t runs = by_image ? block.images : 1, run_length = by_image ? image_run : whole_run;
  for (int64_t d0 = 0; d0 < depth; d0 += p.block_depth) {
    const int64_t d1 = least(depth, d0 + p.block_depth);
    setting.first = d0 == 0, setting.last = d1 == depth;
    for (int64_t r = 0; r < runs; ++r) {
      const int64_t start = r * block.pitch_image, stop = start + run_length;
      for (int64_t at = start, count; at < stop; at += count) {
        // A tile's operands stay in the L1 cache while all of the panel's weights pass by. A short reduction, or one
        // tile of results, is not worth the way around: it takes all positions at once.
        const int64_t left = ceil_div(stop - at, L);
        const bool at_once = depth * p.num_taps < kShortDepth || m_end - m_begin <= kWideResults;
        count = (at_once ? left : tile_vectors(left)) * L;
        for (int64_t m = m_begin; m < m_end;) {
          const int64_t g = m / p.group_results;
          const int width = tile_results(least(m_end, (g + 1) * p.group_results) - m);
          const P* weight = static_cast<const P*>(p.weight) + (m * depth + d0 * width) * p.num_taps;
          const A* bias = p.bias ? static_cast<const A*>(p.bias) + m : nullptr;
          const P* source = packed + ((g - group) * depth + d0) * setting.plane + at;
          tiles_of(width, setting, at, source, d1 - d0, weight, bias, panel + (m - m_begin) * setting.out_pitch + at,
                   count);
          m += width;
        }
      }
    }
  }
}

// The same in tiles of rows, of whole groups of kSharedResults at the most. width: of the window, taps.
template <class T>
void multiply_rows_shared(const TapConv& p, const Block& block, const TileSetting& setting, int64_t width,
                          int64_t group, int64_t m_begin, int64_t m_end, const Operand<T>* packed,
                          Accumulator<T>* panel) {
  using A = Accumulator<T>;
  using P = Operand<T>;
  const int64_t depth = operands<P>(p.group_channels);
  for (int64_t m = m_begin; m < m_end; m += p.group_results) {
    const P* weight = static_cast<const P*>(p.weight) + m * depth * p.num_taps;
    const A* bias = p.bias ? static_cast<const A*>(p.bias) + m : nullptr;
    const P* planes = packed + (m / p.group_results - group) * depth * setting.plane;
    for (int64_t image = 0; image < block.images; ++image)
      for (int64_t y = 0; y < block.rows; y += kSharedRows)
        for (int64_t x = 0; x < p.cols; x += 2 * kLanes<A>) {
          const int64_t row = least(y, block.rows - kSharedRows);
          const int64_t at = image * block.pitch_image + row * setting.pitch + x;
          A* out = panel + (m - m_begin) * setting.out_pitch + at;
          if (p.group_results == 1)
            row_tile<P, 1>(setting, width, at, p.cols - x, planes + at, depth, weight, bias, out);
          else
            row_tile<P, kSharedResults>(setting, width, at, p.cols - x, planes + at, depth, weight, bias, out);
        }
  }
}

// One phase's results of a block: channels [m_begin, m_end) of all groups together.
template <class T>
void run_phase(const TapConv& p, const Block& block, int64_t group, int64_t m_begin, int64_t m_end, TapRows* tap_rows,
               const Operand<T>* packed, Accumulator<T>* panel) {
  constexpr int64_t L = kLanes<Accumulator<T>>;
  const Planes& planes = p.planes;
  const int64_t run = (block.images - 1) * block.pitch_image + (block.rows - 1) * planes.pitch + p.cols;
  TileSetting setting{
      planes.plane, planes.pitch, block.pitch_image, p.num_taps, ceil_div(run, L) * L + L, tap_rows, false, true,
      true,         p.relu};
  for (int64_t t = 0; t < p.num_taps; ++t) {
    const Tap& tap = p.taps[t];
    const Rows rows = rows_of(planes, block, p.source.height, tap.phase);
    tap_rows[t] = {tap_offset(planes, tap), rows.first - tap.row, rows.last - tap.row};
    setting.padded |= tap_rows[t].first > 0 || tap_rows[t].last < block.rows;
  }
  const int64_t width = shared_width(p, block.rows, L);
  for (int64_t m0 = m_begin, m1; m0 < m_end; m0 = m1) {
    // A panel is some whole groups, or part of one: weights are packed group by group.
    const int64_t limit = p.panel < p.group_results ? (m0 / p.group_results + 1) * p.group_results : m_end;
    m1 = least(m0 + p.panel, least(limit, m_end));
    if constexpr (kSharedResults > 0)
      if (width) multiply_rows_shared<T>(p, block, setting, width, group, m0, m1, packed, panel);
    if (width == 0) multiply_runs<T>(p, block, setting, group, m0, m1, packed, panel);
    write_panel<T>(p, block, m0, m1 - m0, panel, setting.out_pitch);
  }
}

template <class T>
void run(const TapConv& p, void* scratch_, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  using P = Operand<T>;
  const Planes& planes = p.planes;
  TapRows* tap_rows = static_cast<TapRows*>(scratch_);
  P* packed = reinterpret_cast<P*>(tap_rows + ceil_div(p.most_taps(), 8) * 8);
  const int64_t depth = operands<P>(p.group_channels);
  A* panel = reinterpret_cast<A*>(packed + p.block_groups * depth * planes.plane);
  // Groups whose channels do not fill their operands are packed one by one.
  const int64_t groups_together = p.group_channels % kTermsOf<P> ? 1 : p.block_groups;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t channel_block = task % p.channel_blocks, rest = task / p.channel_blocks;
    const Block block = block_of(planes, p.result.pool, p.result.pool_code != nullptr, p.batch, p.rows,
                                 rest / p.row_blocks, rest % p.row_blocks);
    // Result channels [m_begin, m_end) of all groups together; their groups' planes are packed.
    const int64_t splits = ceil_div(p.group_results, p.block_results);
    const int64_t group = channel_block / splits * p.block_groups;
    const int64_t groups = least(p.block_groups, p.groups - group);
    const int64_t m_begin = group * p.group_results + channel_block % splits * p.block_results;
    const int64_t m_end = least(m_begin + p.block_groups * p.block_results, (group + groups) * p.group_results);
    for (int64_t g = 0; g < groups; g += groups_together)
      pack_planes<T, P>(p.source, planes, block, p.source.height, (group + g) * p.group_channels,
                        least(groups_together, groups - g) * p.group_channels, packed + g * depth * planes.plane);
    for (const TapConv* phase = &p; phase; phase = phase->next) {
      Block own = block;
      own.rows = least(block.rows, phase->rows - block.row);
      if (own.rows > 0) run_phase<T>(*phase, own, group, m_begin, m_end, tap_rows, packed, panel);
    }
  }
}

// ---- weight gradient: sums of outer products ----

// As pack_planes, but position by position: channels [0, channels) in groups of `width`, a group's channels contiguous
// at every position and padded with zeros: packed[(c / width * positions + position) * width + c % width]. `row` holds
// kLanes<A> plane rows.
template <class T>
void pack_positions(const ConvSource& s, const Planes& p, const Block& block, int64_t c0, int64_t channels,
                    int64_t width, Accumulator<T>* packed, Accumulator<T>* row) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const int64_t phase_size = p.plane / p.phases, plane_rows = block.rows + p.halo_h, positions = p.plane;
  const bool by_channel = channels_contiguous(s);
  for (int64_t phase = 0; phase < p.phases; ++phase) {
    const Columns columns = columns_of(s, p, phase);
    for (int64_t image = 0; image < block.images; ++image)
      for (int64_t i = 0; i < plane_rows; ++i) {
        const int64_t y = (block.row + i) * p.step_h + p.phase_h[phase] - p.origin_h;
        const bool inside = y >= 0 && y < s.height && columns.last > columns.first;
        const int64_t at = phase * phase_size + image * block.pitch_image + i * p.pitch;
        if (!inside || by_channel) {
          const int64_t first = inside ? columns.first : p.pitch, last = inside ? columns.last : p.pitch;
          for (int64_t c = 0; c < channels; c += width) {
            A* to = packed + c * positions + at * width;
            zero(to, first * width);
            zero(to + last * width, (p.pitch - last) * width);
          }
          if (inside)
            read_pixels<T>(s, block.n + image, c0, channels, y, columns.x, p.step_w, last - first,
                           packed + (at + first) * width, width, positions * width);
          continue;
        }
        for (int64_t c = 0; c < channels; c += L) {
          const int lanes = int(least(L, channels - c));
          A* to = packed + (c / width * positions + at) * width + c % width;
          if (p.step_w == 1) {
            const T* from = static_cast<const T*>(s.data) + offset4(s.stride, block.n + image, c0 + c, y, columns.x);
            const T* relu = static_cast<const T*>(s.relu_output);
            if (relu) relu += offset4(s.relu_stride, block.n + image, c0 + c, y, columns.x);
            for (int64_t j = 0; j < columns.first; ++j) store(to + j * width, Vec<A>{});
            for (int64_t j = columns.first; j < columns.last; j += L) {
              Vec<A> square[L];
              const int64_t count = least(L, columns.last - j), i = j - columns.first;
              read_masked_vectors(from + i * s.stride.w, s.stride.c, s.stride.w,
                                  relu ? relu + i * s.relu_stride.w : nullptr, s.relu_stride.c, s.relu_stride.w, lanes,
                                  int(count), L * s.stride.c, L * s.relu_stride.c, square);
              for (int64_t k = 0; k < count; ++k) store(to + (j + k) * width, square[k]);
            }
            for (int64_t j = columns.last; j < p.pitch; ++j) store(to + j * width, Vec<A>{});
            continue;
          }
          const int64_t pitch = ceil_div(p.pitch, L) * L;
          for (int k = 0; k < L; ++k) {
            A* dst = row + k * pitch;
            if (k >= lanes) {
              zero(dst, pitch);
              continue;
            }
            zero(dst, columns.first);
            read_plane<T, A>(s, block.n + image, c0 + c + k, 1, y, 1, 1, columns.x, p.step_w,
                             columns.last - columns.first, dst + columns.first, pitch);
            zero(dst + columns.last, pitch - columns.last);
          }
          for (int64_t j = 0; j < p.pitch; j += L) {
            Vec<A> square[L];
            for (int k = 0; k < L; ++k) square[k] = load(row + k * pitch + j);
            transpose<A>(square);
            const int64_t end = least(L, p.pitch - j);
            for (int64_t k = 0; k < end; ++k) store(to + (j + k) * width, square[k]);
          }
        }
      }
    const int64_t used = block.images * block.pitch_image;
    for (int64_t c = 0; c < channels; c += width)
      zero(packed + (c / width * positions + phase * phase_size + used) * width, (phase_size - used) * width);
  }
}

// Sums of products are taken over positions, the terms of an operand: every element becomes the operand that begins
// with it, in place, the next term being `step` elements further on.
template <class A, class P>
void join_positions(A* p, int64_t count, int64_t step) {
  if constexpr (kTermsOf<P> == 2)
    for (int64_t i = 0; i < count; i += kLanes<A>)
      store(reinterpret_cast<P*>(p + i), pairs(load(p + i), load(p + i + step)));
}

// Both of these for a single tap that meets no padding, whose operands begin at every second position alone; the others
// stay as they are. False where it is not that, or operands are not pairs.
template <class T, class P>
bool pack_position_pairs(const ConvSource& s, const Planes& p, const Block& block, int64_t taps, int64_t cols,
                         int64_t c0, int64_t channels, int64_t width, P* packed) {
  if constexpr (kTermsOf<P> == 2) {
    constexpr int L = kLanes<P>;
    const bool by_channel = channels_contiguous(s);
    if (taps > 1 || p.step_h * p.step_w > 1 || p.origin_h || p.origin_w || s.width < cols ||
        s.height < block.row + block.rows ||
        !(by_channel || (s.stride.w == 1 && (!s.relu_output || s.relu_stride.w == 1))))
      return false;
    for (int64_t image = 0; image < block.images; ++image)
      for (int64_t i = 0; i < block.rows; ++i) {
        const T* from = static_cast<const T*>(s.data) + offset4(s.stride, block.n + image, c0, block.row + i, 0);
        const T* relu = static_cast<const T*>(s.relu_output);
        if (relu) relu += offset4(s.relu_stride, block.n + image, c0, block.row + i, 0);
        P* const to = packed + (image * block.pitch_image + i * p.pitch) * width;
        for (int64_t j = 0; by_channel && j < cols; j += 2)
          for (int64_t c = 0; c < channels; c += L)
            store(to + (c / width * p.plane + j) * width + c % width,
                  load_operands<T, P>(from + j * s.stride.w + c, s.stride.w,
                                      relu ? relu + j * s.relu_stride.w + c : nullptr, s.relu_stride.w, cols - j,
                                      int(least(L, channels - c))));
        for (int64_t c = 0; !by_channel && c < channels; c += L)
          for (int64_t j = 0; j < cols; j += 2 * L) {
            const int64_t count = least(2 * L, cols - j);
            const T* const next = from + (c + L) * s.stride.c + j;
            Vec<P> square[L] = {};
            for (int k = 0; k < L; ++k) __builtin_prefetch(next + k * s.stride.c);
            for (int k = 0; k < least(L, channels - c); ++k)
              square[k] = load_neighbours<T, P>(from + (c + k) * s.stride.c + j,
                                                relu ? relu + (c + k) * s.relu_stride.c + j : nullptr, int(count));
            transpose<P>(square);
            for (int64_t k = 0; k < operands<P>(count); ++k)
              store(to + (c / width * p.plane + j + 2 * k) * width + c % width, square[k]);
          }
      }
    return true;
  }
  return false;
}

// Memory of the next block, fetched a little at every step while this one's tiles are computed: packing it is otherwise
// waiting for it.
struct Ahead {
  const char* region[2];
  int64_t bytes[2], step, done;

  FASTNN_INLINE const char* at() const { return done < bytes[0] ? region[0] + done : region[1] + (done - bytes[0]); }
};

// Sets a region: what the next block takes of a source, if that is one piece of memory, of pixels or of whole planes.
template <class T>
void fetch(const ConvSource& s, const Planes& p, const Block& next, int64_t c0, int64_t channels, int which,
           Ahead& to) {
  const int64_t y = most(0, next.row * p.step_h - p.origin_h), rows = least(s.height - y, next.rows * p.step_h);
  const bool pixels = channels_contiguous(s) && s.stride.w < 2 * channels && s.stride.h >= s.width * s.stride.w;
  const bool planes = s.stride.w == 1 && rows == s.height && s.stride.c < 2 * s.height * s.width;
  const int64_t of_image = pixels ? rows * s.stride.h : planes ? channels * s.stride.c : 0;
  to.region[which] = reinterpret_cast<const char*>(static_cast<const T*>(s.data) + offset4(s.stride, next.n, c0, y, 0));
  to.bytes[which] = of_image == 0 ? 0 : ((next.images - 1) * s.stride.n + of_image) * int64_t(sizeof(T));
}

// sums[m][l] += sum over the block's output positions of rows[offsets[m] + position * step] * lanes[position][l].
template <class P>
struct OuterProduct {
  const P* rows;
  const int64_t* offsets;
  int64_t num_rows, step;
  const P* lanes;
  int64_t width, num_lanes;  // of a position, and of those the ones that are summed
  const Block& block;
  int64_t cols, pitch;
  Accumulator<P>* sums;
  int64_t sums_pitch;
  Ahead& ahead;
};

// Of MR rows from `first` on and all lanes, which are NV vectors.
template <class P, int MR, int NV>
void outer_tile(const OuterProduct<P>& o, int64_t first) {
  using A = Accumulator<P>;
  constexpr int kTerms = kTermsOf<P>;
  const int64_t operands_a_row = o.cols / kTerms, step = o.step * kTerms, ahead_step = o.ahead.step;
  const char* ahead = o.ahead.at();
  o.ahead.done += o.block.images * o.block.rows * operands_a_row * ahead_step;
  Vec<A> sum[MR][NV] = {};
  const P* from[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) from[m] = o.rows + o.offsets[first + m];
  for (int64_t image = 0; image < o.block.images; ++image)
    for (int64_t row = 0; row < o.block.rows; ++row) {
      const int64_t at = image * o.block.pitch_image + row * o.pitch;
      const P* x = o.lanes + at * o.width;
      int64_t i = at * o.step;
      for (const int64_t end = i + operands_a_row * step; i < end; i += step, x += kTerms * o.width) {
        __builtin_prefetch(ahead);
        ahead += ahead_step;
        Vec<P> b[NV];
#pragma GCC unroll 6
        for (int v = 0; v < NV; ++v) b[v] = load(x + v * kLanes<P>);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          const Vec<P> a = splat(from[m][i]);
#pragma GCC unroll 6
          for (int v = 0; v < NV; ++v) sum[m][v] = multiply_add(a, b[v], sum[m][v]);
        }
      }
      if constexpr (kTerms == 2)
        if (o.cols % 2)
#pragma GCC unroll 8
          for (int m = 0; m < MR; ++m) {
            const Vec<P> a = first_term(splat(from[m][i]));
#pragma GCC unroll 6
            for (int v = 0; v < NV; ++v) sum[m][v] = multiply_add(a, first_term(load(x + v * kLanes<P>)), sum[m][v]);
          }
    }
  A* out = o.sums + first * o.sums_pitch;
  const int rest = int(o.num_lanes - (NV - 1) * kLanes<A>);  // of the last vector
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m, out += o.sums_pitch) {
#pragma GCC unroll 6
    for (int v = 0; v < NV - 1; ++v) store(out + v * kLanes<A>, load(out + v * kLanes<A>) + sum[m][v]);
    A* const last = out + (NV - 1) * kLanes<A>;
    store_lanes(last, load_lanes(last, rest) + sum[m][NV - 1], rest);
  }
}

// Tiles of NV vectors and as many rows as leave registers for what they load.
template <class P, int NV>
void outer_tiles(const OuterProduct<P>& o) {
  constexpr int kRows = least(kTileResults, kTileSums / NV);
  for (int64_t m = 0; m < o.num_rows;) {
    const int64_t left = o.num_rows - m, rows = left >= kRows ? kRows : least(left, 4);
    if (rows == kRows)
      outer_tile<P, kRows, NV>(o, m);
    else if (rows == 4)
      outer_tile<P, 4, NV>(o, m);
    else if (rows == 3)
      outer_tile<P, 3, NV>(o, m);
    else if (rows == 2)
      outer_tile<P, 2, NV>(o, m);
    else
      outer_tile<P, 1, NV>(o, m);
    m += rows;
  }
}

// num_lanes <= kLaneVectors vectors.
template <class P>
void outer_rows(const OuterProduct<P>& o) {
  const int64_t vectors = ceil_div(o.num_lanes, kLanes<P>);
#if FASTNN_VECTOR_BYTES == 64
  if (vectors == 4)
    outer_tiles<P, 4>(o);
  else
#endif
      if (vectors == 3)
    outer_tiles<P, 3>(o);
  else if (vectors == 2)
    outer_tiles<P, 2>(o);
  else
    outer_tiles<P, 1>(o);
}

// Lanes a tile takes of `count`, evenly cut: a tile of one vector has too few sums to hide an FMA's latency.
template <class A>
FASTNN_INLINE int64_t lanes_together(int64_t count) {
  const int64_t vectors = ceil_div(count, kLanes<A>);
  return ceil_div(vectors, ceil_div(vectors, kLaneVectors)) * kLanes<A>;
}

// ---- weight gradient: dot products along the positions ----

// sums[m * sums_pitch + j] += sum over rows x cols of grads[m] * planes[offsets[j]].
template <class A, int MR, int NJ>
void grad_tile(const A* grads, int64_t grad_plane, const A* planes, const int64_t* offsets, int64_t rows, int64_t cols,
               int64_t pitch, A* sums, int64_t sums_pitch) {
  Vec<A> sum[MR][NJ] = {};
  const A* operand[NJ];
#pragma GCC unroll 9
  for (int j = 0; j < NJ; ++j) operand[j] = planes + offsets[j];
  for (int64_t row = 0; row < rows; ++row) {
    int64_t i = row * pitch;
    const int64_t end = i + cols;
    for (; i + kLanes<A> <= end; i += kLanes<A>) {
      Vec<A> g[MR];
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) g[m] = load(grads + m * grad_plane + i);
#pragma GCC unroll 9
      for (int j = 0; j < NJ; ++j) {
        const Vec<A> x = load(operand[j] + i);
#pragma GCC unroll 4
        for (int m = 0; m < MR; ++m) sum[m][j] += g[m] * x;
      }
    }
    if (i < end) {
      for (int j = 0; j < NJ; ++j) {
        const Vec<A> x = load_n(operand[j] + i, int(end - i));
        for (int m = 0; m < MR; ++m) sum[m][j] += load_n(grads + m * grad_plane + i, int(end - i)) * x;
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 9
    for (int j = 0; j < NJ; ++j) sums[m * sums_pitch + j] += sum_lanes(sum[m][j]);
}

template <class A, int MR>
void grad_tiles(const A* grads, int64_t grad_plane, const A* planes, const int64_t* offsets, int64_t pairs,
                int64_t rows, int64_t cols, int64_t pitch, A* sums, int64_t sums_pitch) {
  constexpr int kWide = MR == 1 ? 9 : kTilePairs;
  int64_t j = 0;
  for (; j + kWide <= pairs; j += kWide)
    grad_tile<A, MR, kWide>(grads, grad_plane, planes, offsets + j, rows, cols, pitch, sums + j, sums_pitch);
  for (; j + 3 <= pairs; j += 3)
    grad_tile<A, MR, 3>(grads, grad_plane, planes, offsets + j, rows, cols, pitch, sums + j, sums_pitch);
  for (; j < pairs; ++j)
    grad_tile<A, MR, 1>(grads, grad_plane, planes, offsets + j, rows, cols, pitch, sums + j, sums_pitch);
}

template <class A>
A sum_run(const A* p, int64_t count) {
  Vec<A> sum{};
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) sum += load(p + i);
  if (i < count) sum += load_n(p + i, int(count - i));
  return sum_lanes(sum);
}

// All result channels [m, m + results) of one group against the packed channels of one block.
template <class A>
void grad_block(const A* grads, int64_t grad_plane, int64_t results, const A* planes, const int64_t* offsets,
                int64_t pairs, int64_t rows, int64_t cols, int64_t pitch, A* sums, int64_t sums_pitch) {
  for (int64_t m = 0; m < results;) {
    const A* grad = grads + m * grad_plane;
    A* out = sums + m * sums_pitch;
    const int width = results - m >= 4 ? 4 : results - m >= 2 ? 2 : 1;
    if (width == 4)
      grad_tiles<A, 4>(grad, grad_plane, planes, offsets, pairs, rows, cols, pitch, out, sums_pitch);
    else if (width == 2)
      grad_tiles<A, 2>(grad, grad_plane, planes, offsets, pairs, rows, cols, pitch, out, sums_pitch);
    else
      grad_tiles<A, 1>(grad, grad_plane, planes, offsets, pairs, rows, cols, pitch, out, sums_pitch);
    m += width;
  }
}

// sums[m] += the terms of grads[position][m] over a row of positions.
template <class P>
void add_positions(const P* grads, int64_t width, int64_t cols, Accumulator<P>* sums, int64_t results) {
  using A = Accumulator<P>;
  constexpr int kTerms = kTermsOf<P>;
  const Vec<P> ones = ones_of<P>();
  for (int64_t m = 0; m < results; m += kLanes<A>) {
    Vec<A> sum{};
    for (int64_t i = 0; i + kTerms <= cols; i += kTerms) sum = multiply_add(load(grads + i * width + m), ones, sum);
    if (cols % kTerms) sum = multiply_add(first_term(load(grads + (cols - 1) * width + m)), ones, sum);
    const int lanes = int(least(kLanes<A>, results - m));
    store_n(sums + m, load_n(sums + m, lanes) + sum, lanes);
  }
}

FASTNN_INLINE Block block_at(const TapGrad& p, int64_t index) {
  return block_of(p.planes, PoolShape{}, false, p.batch, p.rows, index / p.row_blocks, index % p.row_blocks);
}

template <class T>
void run_grad(const TapGrad& p, void* scratch_, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  using P = Operand<T>;
  constexpr int64_t kWidth = kLaneVectors * kLanes<A>;
  const Planes& planes = p.planes;
  const bool channel_lanes = p.form == GradForm::channel_lanes, result_lanes = p.form == GradForm::result_lanes;
  const int64_t channel_places = channel_lanes ? ceil_div(p.block_channels, kWidth) * kWidth : p.block_channels;
  // Of every (channel, tap) in the packed planes, or pixels where those are read as such; where channels are lanes, of
  // every tap, and of every result channel in the packed gradient.
  int64_t* offsets = static_cast<int64_t*>(scratch_);
  const int64_t offset_channels = channel_lanes ? 1 : p.block_channels;
  const bool pixels = result_lanes && channels_contiguous(p.source);
  const int64_t source_step = pixels ? p.block_channels : 1;
  for (int64_t c = 0; c < offset_channels; ++c)
    for (int64_t t = 0; t < p.num_taps; ++t)
      offsets[c * p.num_taps + t] = c * (pixels ? 1 : planes.plane) + tap_offset(planes, p.taps[t]) * source_step;
  int64_t* result_offsets = offsets + offset_channels * p.num_taps;
  for (int64_t m = 0; m < p.block_results; ++m) result_offsets[m] = m;
  A* packed = static_cast<A*>(scratch_) + p.offset_bytes() / int64_t(sizeof(A));
  A* grads = packed + p.block_groups * channel_places * planes.plane;
  const int64_t results = p.groups * p.group_results, sums_pitch = p.group_channels * p.num_taps;
  const int64_t blocks = p.image_blocks * p.row_blocks;
  // The gradient's planes: the source's layout, without halo or phases.
  Planes grad_planes = planes;
  grad_planes.step_h = grad_planes.step_w = grad_planes.phases = 1;
  grad_planes.origin_h = grad_planes.origin_w = grad_planes.phase_h[0] = grad_planes.phase_w[0] = 0;
  grad_planes.plane = planes.plane / planes.phases;
  if (channel_lanes || result_lanes) grad_planes.halo_h = 0;  // else the rows below are zeros that positions run over

  for (int64_t task = begin; task < end; ++task) {
    const auto [slice, group, groups, m0, count, c0, channels] = p.task(task);
    const int64_t first = group * p.group_results + m0;  // of groups * count result channels in a row
    const int64_t source_channel = group * p.group_channels + c0;
    A* sums = static_cast<A*>(p.weight_sums) + (slice * results + group * p.group_results) * sums_pitch;
    A* bias_sums = p.bias_sums && c0 == 0 ? static_cast<A*>(p.bias_sums) + slice * results + first : nullptr;
    if (result_lanes) {
      for (int64_t j = c0 * p.num_taps; j < (c0 + channels) * p.num_taps; ++j)
        zero(sums + j * p.group_results + m0, count);
    } else {
      for (int64_t m = m0; m < m0 + groups * count; ++m)
        if (channel_lanes)
          for (int64_t t = 0; t < p.num_taps; ++t) zero(sums + m * sums_pitch + t * p.group_channels + c0, channels);
        else
          zero(sums + m * sums_pitch + c0 * p.num_taps, channels * p.num_taps);
    }
    if (bias_sums) zero(bias_sums, groups * count);

    const int64_t end_block = blocks * (slice + 1) / p.slices;
    for (int64_t b = blocks * slice / p.slices; b < end_block; ++b) {
      const Block block = block_at(p, b);
      if (channel_lanes || result_lanes) {
        // The gradient's channels lie together where they are rows; where they are lanes, in a tile's share of them.
        const int64_t grad_width = result_lanes ? lanes_together<A>(count) : ceil_div(count, kLanes<A>) * kLanes<A>;
        const int64_t grad_runs = ceil_div(count, grad_width);
        A* row = grads + grad_runs * grad_width * grad_planes.plane;
        const P *grad = reinterpret_cast<const P*>(grads), *source = reinterpret_cast<const P*>(packed);
        if (!pack_position_pairs<T>(p.grad, grad_planes, block, p.num_taps, p.cols, first, count, grad_width,
                                    reinterpret_cast<P*>(grads))) {
          pack_positions<T>(p.grad, grad_planes, block, first, count, grad_width, grads, row);
          join_positions<A, P>(grads, grad_runs * grad_width * grad_planes.plane, grad_width);
        }
        if (bias_sums)
          for (int64_t m = 0; m < count; m += grad_width)
            for (int64_t image = 0; image < block.images; ++image)
              for (int64_t i = 0; i < block.rows; ++i)
                add_positions(
                    grad + m * grad_planes.plane + (image * block.pitch_image + i * planes.pitch) * grad_width,
                    grad_width, p.cols, bias_sums + m, least(grad_width, count - m));
        const int64_t width = result_lanes ? source_step : lanes_together<A>(channels);
        const bool planes_only = result_lanes && !pixels;
        if (planes_only || !pack_position_pairs<T>(p.source, planes, block, p.num_taps, p.cols, source_channel,
                                                   channels, width, reinterpret_cast<P*>(packed))) {
          if (planes_only)
            pack_planes<T, A>(p.source, planes, block, p.source.height, source_channel, channels, packed);
          else
            pack_positions<T>(p.source, planes, block, source_channel, channels, width, packed, row);
          join_positions<A, P>(packed, ceil_div(channels, width) * width * planes.plane, width);
        }

        Ahead ahead{};
        const int64_t passes = result_lanes ? grad_runs * ceil_div(channels * p.num_taps, kTileResults)
                                            : ceil_div(channels, width) * p.num_taps * ceil_div(count, kTileResults);
        const int64_t steps = passes * block.images * block.rows * operands<P>(p.cols);
        if (b + 1 < end_block) {
          const Block next = block_at(p, b + 1);
          fetch<T>(p.grad, grad_planes, next, first, count, 0, ahead);
          fetch<T>(p.source, planes, next, source_channel, channels, 1, ahead);
          ahead.step = ceil_div(ahead.bytes[0] + ahead.bytes[1], steps);
        }
        if (result_lanes) {
          for (int64_t m = 0; m < count; m += grad_width)
            outer_rows(OuterProduct<P>{source, offsets, channels * p.num_taps, width, grad + m * grad_planes.plane,
                                       grad_width, least(grad_width, count - m), block, p.cols, planes.pitch,
                                       sums + c0 * p.num_taps * p.group_results + m0 + m, p.group_results, ahead});
        } else {
          for (int64_t c = 0; c < channels; c += width)
            for (int64_t t = 0; t < p.num_taps; ++t)
              outer_rows(OuterProduct<P>{grad, result_offsets, count, grad_width,
                                         source + c * planes.plane + offsets[t] * width, width,
                                         least(width, channels - c), block, p.cols, planes.pitch,
                                         sums + m0 * sums_pitch + t * p.group_channels + c0 + c, sums_pitch, ahead});
        }
        continue;
      }
      pack_planes<T, A>(p.source, planes, block, p.source.height, source_channel, groups * channels, packed);
      pack_planes<T, A>(p.grad, grad_planes, block, block.row + block.rows, first, groups * count, grads);
      const int64_t whole = (block.images - 1) * block.pitch_image + (block.rows - 1) * planes.pitch + p.cols;
      // Between the rows the gradient's planes are zero, so the block is one long row, unless the source has an inf or
      // NaN there to multiply.
      const bool finite = all_finite(packed, groups * channels * planes.plane);
      for (int64_t g = 0; g < groups; ++g) {
        const A* grad = grads + g * count * grad_planes.plane;
        const A* source = packed + g * channels * planes.plane;
        A* out = sums + (g * p.group_results + m0) * sums_pitch + c0 * p.num_taps;
        if (finite) {
          grad_block(grad, grad_planes.plane, count, source, offsets, channels * p.num_taps, 1, whole, planes.pitch,
                     out, sums_pitch);
        } else {
          for (int64_t image = 0; image < block.images; ++image)
            grad_block(grad + image * block.pitch_image, grad_planes.plane, count, source + image * block.pitch_image,
                       offsets, channels * p.num_taps, block.rows, p.cols, planes.pitch, out, sums_pitch);
        }
        if (bias_sums)
          for (int64_t i = 0; i < count; ++i) bias_sums[g * count + i] += sum_run(grad + i * grad_planes.plane, whole);
      }
    }
  }
}

// Adds the slices of `size` sums up, in order, in place of the first one: elements [begin, end).
template <class T>
void add_slices(void* sums_, int64_t slices, int64_t size, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>, kVectors = 4;
  A* sums = static_cast<A*>(sums_);
  for (int64_t i = begin; i < end; i += kVectors * L) {
    Vec<A> total[kVectors] = {};
    for (int64_t slice = 0; slice < slices; ++slice)
      for (int64_t v = 0; v < kVectors && i + v * L < end; ++v)
        total[v] += load_lanes(sums + slice * size + i + v * L, int(least(L, end - i - v * L)));
    for (int64_t v = 0; v < kVectors; ++v) store_lanes(sums + i + v * L, total[v], end - i - v * L);
  }
}

// out[m][c][tap] and, if it is given, bias_out[m] from the first slice's sums, for m in [begin, end).
template <class T>
void write_sums(const TapGrad& p, void* out_, void* bias_out, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const int64_t channels = p.group_channels, taps = p.num_taps;
  const A* sums = static_cast<const A*>(p.weight_sums);
  T* out = static_cast<T*>(out_) + begin * channels * taps;
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < taps; ++t) *out++ = from_accumulator<T>(sums[p.sum_index(m, c, t)]);
    if (bias_out) static_cast<T*>(bias_out)[m] = from_accumulator<T>(static_cast<const A*>(p.bias_sums)[m]);
  }
}

template <class T>
void widen(const void* in, int64_t stride, void* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    static_cast<Accumulator<T>*>(out)[i] = to_accumulator(static_cast<const T*>(in)[i * stride]);
}

#define FASTNN_ALL_DTYPES(function) {function<double>, function<float>, function<bf16>, function<f16>}
const ConvKernels kConvKernels = {
    {kLanes<double>, kLanes<float>},
    {1, 1, kTermsOf<Operand<bf16>>, 1},
    kTileResults,
    kLaneVectors,
    FASTNN_ALL_DTYPES(pack_weight),
    FASTNN_ALL_DTYPES(run),
    FASTNN_ALL_DTYPES(run_grad),
    FASTNN_ALL_DTYPES(add_slices),
    FASTNN_ALL_DTYPES(write_sums),
    FASTNN_ALL_DTYPES(widen),
};
#undef FASTNN_ALL_DTYPES

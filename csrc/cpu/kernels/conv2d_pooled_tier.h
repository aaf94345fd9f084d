// Gradients of conv -> ReLU -> max-pool, straight from the pooled gradient and its codes. At most one position in a
// window has a gradient, for each channel another one, so the convolution's gradients are sums over these alone: with a
// 2 x 2 pool a quarter of the operations of the dense ones, less what ReLU zeroed.
//
// Pixels are packed with their channels innermost, `width` of them together, padding included. A filter row's taps at
// one position are then one run of memory (a dilated row: a run a tap), and both passes are sums over entries
// (gradient, place) of scaled runs:
//   weight  sum[run] += gradient * pixels[place + run]. The entries of one result channel and a few windows are listed,
//           then each run is summed in registers, up to 12 vectors at a time; the pixels they reach stay in the L1
//           cache.
//   input   pixels[place + run] += gradient * weight[m][run]. The result channels with one code in a window share one
//           place: their runs are summed in registers, up to 12 vectors at a time, and added to the pixels once. The
//           packed rows roll through a buffer and leave it when no window reaches them any more.
// Each step loads one vector an FMA, so both can come near the peak.
//
// Operations: 2 * (windows that ReLU let pass) * (in_channels / groups) * kernel_h * kernel_w a pass. Bytes: the pooled
// gradient, its codes, and the input (or its gradient) once; the packed rows stay in the L2 cache.

constexpr int kMostVectors = 12;  // of a run, in registers
constexpr int kMostTerms = 12;

template <class A>
struct Entry {
  A grad;
  int32_t index;
};

// Pixels from a window's first position to the one its code names.
FASTNN_INLINE void element_places(const PooledGrad& p, int32_t* places) {
  for (int64_t e = 0; e < 256; ++e)
    places[e] = e < p.codes()
                    ? int32_t(e / p.pool.kernel_w * p.conv.stride_h * p.pitch() + e % p.pool.kernel_w * p.conv.stride_w)
                    : 0;
}

// Elements from a position to a run of its taps, channels in chunks of `width`.
FASTNN_INLINE int64_t run_offset(const PooledGrad& p, int64_t run, int64_t width) {
  const int64_t tap = run * p.run_taps();
  return (tap / p.conv.kernel_w * p.conv.dilation_h * p.pitch() + tap % p.conv.kernel_w * p.conv.dilation_w) * width;
}

// ---- pixels: channels innermost, and back ----

// to[c * to_c + x * to_x] = from[c * from_c + x * from_x] for `channels` c and `count` x.
template <class From, class To>
void copy_pixels(const From* from, int64_t from_c, int64_t from_x, To* to, int64_t to_c, int64_t to_x, int64_t channels,
                 int64_t count) {
  using A = Accumulator<From>;
  constexpr int L = kLanes<A>;
  if (channels == 1) from_c = to_c = 1;
  const bool dense = from_x == channels && to_x == channels;
  if (from_c == 1 && to_c == 1 && (dense || channels >= L)) {
    const int64_t run = dense ? count * channels : channels, runs = dense ? 1 : count;
    for (int64_t i = 0; i < runs; ++i, from += from_x, to += to_x) {
      int64_t k = 0;
      for (; k + L <= run; k += L) store(to + k, load(from + k));
      if (k < run && run >= L)  // the last vector once more, up to the run's end
        store(to + run - L, load(from + run - L));
      else if (k < run)
        store_n(to, load_n(from, int(run)), int(run));
    }
    return;
  }
  if (from_c == 1 && to_x == 1 && from_x != 1)  // the same transposition, the axes' names exchanged
    return copy_pixels(from, from_x, from_c, to, to_x, to_c, count, channels);
  int64_t c = 0;
  for (; from_x == 1 && to_c == 1 && c + L <= channels; c += L) {
    int64_t x = 0;
    for (; x + L <= count; x += L) {
      Vec<A> square[L];
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) square[j] = load(from + (c + j) * from_c + x);
      transpose<A>(square);
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) store(to + (x + j) * to_x + c, square[j]);
    }
    for (; x < count; ++x)
      for (int j = 0; j < L; ++j)
        to[x * to_x + c + j] = from_accumulator<To>(to_accumulator(from[(c + j) * from_c + x]));
  }
  for (; c < channels; ++c)
    for (int64_t x = 0; x < count; ++x)
      to[c * to_c + x * to_x] = from_accumulator<To>(to_accumulator(from[c * from_c + x * from_x]));
}

// ---- the pooled gradient and its codes ----

// One row of them, from window x on.
template <class T>
struct PooledRow {
  const T* grad;
  const uint8_t* code;
};
template <class T>
FASTNN_INLINE PooledRow<T> pooled_row(const PooledGrad& p, int64_t n, int64_t m, int64_t y, int64_t x) {
  return {static_cast<const T*>(p.grad) + n * p.grad_stride.n + m * p.grad_stride.c + y * p.grad_stride.h +
              x * p.grad_stride.w,
          p.code + n * p.code_stride.n + m * p.code_stride.c + y * p.code_stride.h + x * p.code_stride.w};
}

// The row below, for the next sweep over the channels: in NCHW they are planes apart, more streams than the hardware
// keeps track of.
template <class T>
FASTNN_INLINE void prefetch_below(const PooledGrad& p, PooledRow<T> row, int64_t cols) {
  if (p.grad_stride.w != 1 || p.code_stride.w != 1) return;
  for (int64_t i = 0; i < cols; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row.grad + p.grad_stride.h + i);
  for (int64_t i = 0; i < cols; i += 64) __builtin_prefetch(row.code + p.code_stride.h + i);
}

// ---- weight gradient ----

// sums[run][vector] += over the entries of gradient * pixels, NR runs of NV vectors.
template <class A, int NR, int NV>
void sum_entries(const Entry<A>* entries, int64_t count, const A* pixels, int64_t width, const int64_t* offsets,
                 A* sums, int64_t run_pitch) {
  Vec<A> sum[NR][NV] = {};
  const A* from[NR];
#pragma GCC unroll 5
  for (int r = 0; r < NR; ++r) from[r] = pixels + offsets[r];
  for (int64_t i = 0; i < count; ++i) {
    const Vec<A> grad = splat(entries[i].grad);
    const int64_t place = entries[i].index * width;
#pragma GCC unroll 5
    for (int r = 0; r < NR; ++r)
#pragma GCC unroll 12
      for (int v = 0; v < NV; ++v) sum[r][v] += grad * load(from[r] + place + v * kLanes<A>);
  }
#pragma GCC unroll 5
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 12
    for (int v = 0; v < NV; ++v) {
      A* to = sums + r * run_pitch + v * kLanes<A>;
      store(to, load(to) + sum[r][v]);
    }
}

template <class A, int NR, int NV>
FASTNN_INLINE void sum_entries_of(int64_t vectors, const Entry<A>* entries, int64_t count, const A* pixels,
                                  int64_t width, const int64_t* offsets, A* sums, int64_t run_pitch) {
  if constexpr (NV > 1)
    if (vectors < NV)
      return sum_entries_of<A, NR, NV - 1>(vectors, entries, count, pixels, width, offsets, sums, run_pitch);
  sum_entries<A, NR, NV>(entries, count, pixels, width, offsets, sums, run_pitch);
}

// Lists one row of windows, `step` apart, from `place` on, and returns the list's new end. Kept out of line so that its
// few variables stay in registers.
template <class T>
__attribute__((noinline)) Entry<Accumulator<T>>* list_row(PooledRow<T> row, int64_t grad_step, int64_t code_step,
                                                          int64_t cols, int32_t place, int32_t step,
                                                          const int32_t* places, int64_t codes,
                                                          Entry<Accumulator<T>>* list) {
  for (int64_t j = 0; j < cols; ++j, row.grad += grad_step, row.code += code_step, place += step) {
    const int64_t code = *row.code;
    *list = {to_accumulator(*row.grad), place + places[code]};
    list += code < codes;  // no branch: whether there is a gradient is anyone's guess
  }
  return list;
}

template <class A>
FASTNN_INLINE A sum_list(const Entry<A>* list, int64_t count) {
  A sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int j = 0; j < 4; ++j) sum[j] += list[i + j].grad;
  for (; i < count; ++i) sum[0] += list[i].grad;
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The entries of result channels [m, m + results) of one image in windows [y, y + rows) x [x, x + cols), places counted
// from pooled row `first` and column `x`; listed[m]: how many. Each channel's gradients are added to bias_sums.
template <class T>
void list_by_channel(const PooledGrad& p, const int32_t* places, int64_t n, int64_t m, int64_t results, int64_t first,
                     int64_t y, int64_t rows, int64_t x, int64_t cols, Entry<Accumulator<T>>* entries, int64_t* listed,
                     Accumulator<T>* bias_sums) {
  for (int64_t k = 0; k < results; ++k) {
    Entry<Accumulator<T>>* const list = entries + k * p.list_capacity;
    Entry<Accumulator<T>>* end = list;
    for (int64_t i = y; i < y + rows; ++i) {
      const PooledRow<T> row = pooled_row<T>(p, n, m + k, i, x);
      prefetch_below(p, row, cols);
      end = list_row<T>(row, p.grad_stride.w, p.code_stride.w, cols, int32_t((i - first) * p.row_step() * p.pitch()),
                        int32_t(p.col_step()), places, p.codes(), end);
    }
    listed[k] = end - list;
    bias_sums[k] += sum_list(list, listed[k]);
  }
}

template <class A>
void sum_runs(const PooledGrad& p, int64_t results, const Entry<A>* entries, const int64_t* listed, const A* pixels,
              int64_t width, A* sums, int64_t sums_pitch) {
  constexpr int L = kLanes<A>;
  const int64_t vectors = ceil_div(p.run_taps() * width, L), runs = p.runs();
  const int64_t pieces = ceil_div(vectors, kMostVectors);
  int64_t offsets[5];
  for (int64_t run = 0; run < runs;) {
    const int64_t left = runs - run;
    const int64_t together = vectors <= 2 && left >= 5 ? 5 : vectors <= 4 && left >= 3 ? 3 : 1;
    for (int64_t r = 0; r < together; ++r) offsets[r] = run_offset(p, run + r, width);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t v = vectors * piece / pieces, nv = vectors * (piece + 1) / pieces - v;
      for (int64_t m = 0; m < results; ++m) {
        const Entry<A>* list = entries + m * p.list_capacity;
        A* to = sums + m * sums_pitch + (run * vectors + v) * L;
        if (together == 5)
          sum_entries_of<A, 5, 2>(nv, list, listed[m], pixels + v * L, width, offsets, to, vectors * L);
        else if (together == 3)
          sum_entries_of<A, 3, 4>(nv, list, listed[m], pixels + v * L, width, offsets, to, vectors * L);
        else
          sum_entries_of<A, 1, kMostVectors>(nv, list, listed[m], pixels + v * L, width, offsets, to, vectors * L);
      }
    }
    run += together;
  }
}

// Tasks [begin, end) of slices * groups * result blocks.
template <class T>
void run_pooled_weight(const PooledGrad& p, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const ConvShape& s = p.conv;
  const int64_t results = s.group_out(), channels = s.group_in(), pitch = p.pitch();
  const int64_t sums_pitch = p.result_sums(kLanes<A>), blocks = ceil_div(results, p.block_results);
  A* pixels = static_cast<A*>(scratch);
  Entry<A>* entries = reinterpret_cast<Entry<A>*>(pixels + p.pixel_elements);
  int64_t* listed = reinterpret_cast<int64_t*>(entries + p.block_results * p.list_capacity);
  int32_t places[256];
  element_places(p, places);
  const int64_t all_rows = s.batch * p.pool.out_h;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task / (s.groups * blocks), group = task / blocks % s.groups, block = task % blocks;
    const int64_t some = least(p.block_results, results - block * p.block_results);
    const int64_t m = group * results + block * p.block_results;
    A* const sums = static_cast<A*>(p.weight_sums) + (slice * s.out_channels + m) * sums_pitch;
    A* const bias_sums = static_cast<A*>(p.bias_sums) + slice * s.out_channels + m;
    for (int64_t i = 0; i < some * sums_pitch; ++i) sums[i] = 0;
    for (int64_t i = 0; i < some; ++i) bias_sums[i] = 0;
    p.finite[task] = true;
    const int64_t last = all_rows * (slice + 1) / p.slices;
    for (int64_t index = all_rows * slice / p.slices, rows; index < last; index += rows) {
      const int64_t n = index / p.pool.out_h, y = index % p.pool.out_h;
      rows = least(p.pack_rows, least(p.pool.out_h - y, last - index));
      const int64_t packed_rows = (rows - 1) * p.row_step() + p.span_h();
      for (int64_t c = 0; c < channels; c += p.width) {
        const int64_t width = least(p.width, channels - c);
        A* row = pixels + packed_rows * pitch * c;
        for (int64_t i = 0; i < packed_rows; ++i, row += pitch * width) {
          const int64_t source = y * p.row_step() + i - s.pad_top;
          const bool inside = source >= 0 && source < s.in_h;
          const int64_t left = s.pad_left * width, right = left + s.in_w * width;
          for (int64_t k = 0; k < (inside ? left : right); ++k) row[k] = 0;
          for (int64_t k = right; k < pitch * width; ++k) row[k] = 0;
          if (inside)
            copy_pixels(static_cast<const T*>(p.pixels) + n * p.pixel_stride.n +
                            (group * channels + c) * p.pixel_stride.c + source * p.pixel_stride.h,
                        p.pixel_stride.c, p.pixel_stride.w, row + left, 1, width, width, s.in_w);
        }
      }
      if (!all_finite(pixels, packed_rows * pitch * channels)) p.finite[task] = false;
      for (int64_t i = 0; i < rows; i += p.block_rows)
        for (int64_t x = 0; x < p.pool.out_w; x += p.block_cols) {
          list_by_channel<T>(p, places, n, m, some, y, y + i, least(p.block_rows, rows - i), x,
                             least(p.block_cols, p.pool.out_w - x), entries, listed, bias_sums);
          A* to = sums;
          for (int64_t c = 0; c < channels; c += p.width) {
            const int64_t width = least(p.width, channels - c);
            sum_runs(p, some, entries, listed, pixels + packed_rows * pitch * c + x * p.col_step() * width, width, to,
                     sums_pitch);
            to += p.runs() * ceil_div(p.run_taps() * width, kLanes<A>) * kLanes<A>;
          }
        }
    }
  }
}

// Weight and, where it is wanted, bias gradients of result channels [begin, end), from the first slice's sums.
template <class T>
void write_pooled_sums(const PooledGrad& p, void* out_, void* bias_out, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const ConvShape& s = p.conv;
  const int64_t channels = s.group_in(), taps = s.kernel_h * s.kernel_w, sums_pitch = p.result_sums(L);
  for (int64_t m = begin; m < end; ++m) {
    T* out = static_cast<T*>(out_) + m * channels * taps;
    const A* sums = static_cast<const A*>(p.weight_sums) + m * sums_pitch;
    for (int64_t c = 0; c < channels; c += p.width) {
      const int64_t width = least(p.width, channels - c), run_pitch = ceil_div(p.run_taps() * width, L) * L;
      for (int64_t k = 0; k < width; ++k)
        for (int64_t t = 0; t < taps; ++t)
          out[(c + k) * taps + t] =
              from_accumulator<T>(sums[t / p.run_taps() * run_pitch + t % p.run_taps() * width + k]);
      sums += p.runs() * run_pitch;
    }
    if (bias_out) static_cast<T*>(bias_out)[m] = from_accumulator<T>(static_cast<const A*>(p.bias_sums)[m]);
  }
}

// ---- input gradient ----

// A filter as `terms` vectors a result channel and chunk of channels, in pieces of at most kMostTerms that lie
// [result channel of a block][term].
struct Pieces {
  int64_t terms, pieces;
  FASTNN_INLINE int64_t first(int64_t piece) const { return terms * piece / pieces; }
};
template <class A>
FASTNN_INLINE Pieces pieces_of(const PooledGrad& p, int64_t width) {
  const int64_t terms = p.runs() * ceil_div(p.run_taps() * width, kLanes<A>);
  return {terms, ceil_div(terms, kMostTerms)};
}

// Result channel blocks [begin, end) of all groups' blocks. strides: of result channel, channel, row and column.
// Returns whether all is finite.
template <class T>
bool pack_pooled_weight(const PooledGrad& p, const void* weight_, const int64_t* strides, void* packed_, int64_t begin,
                        int64_t end) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const ConvShape& s = p.conv;
  const int64_t results = s.group_out(), channels = s.group_in(), size = p.result_sums(L);
  const int64_t blocks = ceil_div(results, p.block_results);
  bool finite = true;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t m0 = block / blocks * results + block % blocks * p.block_results;
    const int64_t some = least(p.block_results, results - block % blocks * p.block_results);
    A* packed = static_cast<A*>(packed_) + m0 * size;
    for (int64_t c = 0; c < channels; c += p.width) {
      const int64_t width = least(p.width, channels - c), run = p.run_taps() * width, vectors = ceil_div(run, L);
      const Pieces pieces = pieces_of<A>(p, width);
      for (int64_t piece = 0; piece < pieces.pieces; ++piece)
        for (int64_t m = m0; m < m0 + some; ++m)
          for (int64_t t = pieces.first(piece); t < pieces.first(piece + 1); ++t)
            for (int64_t f = t % vectors * L; f < (t % vectors + 1) * L; ++f, ++packed) {
              const int64_t tap = t / vectors * p.run_taps() + f / width;
              *packed = f < run ? to_accumulator(static_cast<const T*>(
                                      weight_)[m * strides[0] + (c + f % width) * strides[1] +
                                               tap / s.kernel_w * strides[2] + tap % s.kernel_w * strides[3]])
                                : A(0);
              finite &= *packed * A(0) == 0;
            }
    }
  }
  return finite;
}

// pixels[offsets[t]] += the sum over the result channels in `mask` of gradient * weight[channel][t]: NT vectors,
// lanes[t] of each.
template <class A, int NT>
void add_channels(uint64_t mask, const A* grads, const A* weight, const int64_t* offsets, const int* lanes, A* pixels) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[NT] = {};
  for (; mask; mask &= mask - 1) {
    const int64_t m = __builtin_ctzll(mask);
    const Vec<A> grad = splat(grads[m]);
    const A* w = weight + m * (NT * L);
#pragma GCC unroll 12
    for (int t = 0; t < NT; ++t) sum[t] += grad * load(w + t * L);
  }
#pragma GCC unroll 12
  for (int t = 0; t < NT; ++t) {
    A* to = pixels + offsets[t];
    // The lanes past a run's end are its neighbours': nothing is added there, not even infinity times zero.
    const Vec<A> part = lanes[t] == L ? sum[t] : first_lanes<A>(lanes[t]) ? sum[t] : Vec<A>{};
    store(to, load(to) + part);
  }
}

template <class A, int NT>
FASTNN_INLINE void add_channels_of(int64_t terms, uint64_t mask, const A* grads, const A* weight,
                                   const int64_t* offsets, const int* lanes, A* pixels) {
  if constexpr (NT > 1)
    if (terms < NT) return add_channels_of<A, NT - 1>(terms, mask, grads, weight, offsets, lanes, pixels);
  add_channels<A, NT>(mask, grads, weight, offsets, lanes, pixels);
}

// Which of 64 bytes equal `value`.
FASTNN_INLINE uint64_t equal_bytes(const uint8_t* p, uint8_t value) {
#if FASTNN_VECTOR_BYTES >= 32
  const __m256i wanted = _mm256_set1_epi8(char(value));
  const __m256i low = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i*)p), wanted);
  const __m256i high = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i*)(p + 32)), wanted);
  return uint32_t(_mm256_movemask_epi8(low)) | uint64_t(uint32_t(_mm256_movemask_epi8(high))) << 32;
#else
  uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= uint64_t(p[i] == value) << i;
  return mask;
#endif
}

// What one sweep over a few windows and up to 64 result channels needs of them, channels innermost.
template <class A>
struct Windows {
  A* grads;         // [window][block_results]
  uint8_t* codes;   // [window][64]
  uint64_t* masks;  // [window][code]: the channels whose gradient goes there
};

template <class T>
void read_windows(const PooledGrad& p, int64_t n, int64_t m, int64_t results, int64_t y, int64_t x, int64_t cols,
                  const Windows<Accumulator<T>>& w) {
  const int64_t codes = p.codes();
  for (int64_t k = 0; k < results; ++k) {
    const PooledRow<T> row = pooled_row<T>(p, n, m + k, y, x);
    prefetch_below(p, row, cols);
    for (int64_t j = 0; j < cols; ++j) w.codes[j * 64 + k] = row.code[j * p.code_stride.w];
  }
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t code = 0; code < codes; ++code) {
      const uint64_t channels = results == 64 ? ~uint64_t(0) : (uint64_t(1) << results) - 1;
      w.masks[j * codes + code] = equal_bytes(w.codes + j * 64, uint8_t(code)) & channels;
    }
  copy_pixels(pooled_row<T>(p, n, m, y, x).grad, p.grad_stride.c, p.grad_stride.w, w.grads, 1, results, results, cols);
}

// Adds pooled row y of one image and group to `pixels`, whose first row is the window's first.
template <class T>
void add_pooled_row(const PooledGrad& p, const int32_t* places, int64_t n, int64_t group, int64_t y,
                    const Windows<Accumulator<T>>& windows, Accumulator<T>* pixels, int64_t buffer_rows) {
  using A = Accumulator<T>;
  constexpr int L = kLanes<A>;
  const ConvShape& s = p.conv;
  const int64_t results = s.group_out(), channels = s.group_in(), codes = p.codes(), size = p.result_sums(L);
  int64_t offsets[kMostTerms];
  int lanes[kMostTerms];
  for (int64_t x = 0; x < p.pool.out_w; x += p.block_cols)
    for (int64_t m = 0; m < results; m += p.block_results) {
      const int64_t some = least(p.block_results, results - m), cols = least(p.block_cols, p.pool.out_w - x);
      const int64_t first = group * results + m;
      read_windows<T>(p, n, first, some, y, x, cols, windows);
      const A* weight = static_cast<const A*>(p.weight) + first * size;
      for (int64_t c = 0; c < channels; c += p.width) {
        const int64_t width = least(p.width, channels - c), run = p.run_taps() * width, vectors = ceil_div(run, L);
        A* chunk = pixels + buffer_rows * p.pitch() * c + x * p.col_step() * width;
        const Pieces pieces = pieces_of<A>(p, width);
        for (int64_t piece = 0; piece < pieces.pieces; ++piece) {
          const int64_t t0 = pieces.first(piece), terms = pieces.first(piece + 1) - t0;
          for (int64_t t = 0; t < terms; ++t) {
            const int64_t v = (t0 + t) % vectors;
            offsets[t] = run_offset(p, (t0 + t) / vectors, width) + v * L;
            lanes[t] = int(least(L, run - v * L));
          }
          for (int64_t j = 0; j < cols; ++j)
            for (int64_t code = 0; code < codes; ++code)
              if (const uint64_t mask = windows.masks[j * codes + code])
                add_channels_of<A, kMostTerms>(terms, mask, windows.grads + j * some, weight, offsets, lanes,
                                               chunk + (j * p.col_step() + places[code]) * width);
          weight += some * terms * L;
        }
      }
    }
}

// Tasks [begin, end) of batch * row_blocks.
template <class T>
void run_pooled_input(const PooledGrad& p, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const ConvShape& s = p.conv;
  const int64_t channels = s.group_in(), pitch = p.pitch(), step = p.row_step();
  const int64_t buffer_rows = most(p.span_h(), step);
  A* pixels = static_cast<A*>(scratch);
  const int64_t windows = p.block_cols;
  Windows<A> w;
  w.grads = pixels + p.pixel_elements;
  w.masks = reinterpret_cast<uint64_t*>(w.grads + ceil_div(windows * p.block_results + 16, 16) * 16);
  w.codes = reinterpret_cast<uint8_t*>(w.masks + windows * p.codes());
  int32_t places[256];
  element_places(p, places);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / p.row_blocks, block = task % p.row_blocks;
    // Of the input, in rows of the padded one.
    const int64_t first = s.in_h * block / p.row_blocks + s.pad_top;
    const int64_t last = s.in_h * (block + 1) / p.row_blocks + s.pad_top;
    for (int64_t g = 0; g < s.groups; ++g) {
      for (int64_t i = 0; i < p.pixel_elements; ++i) pixels[i] = 0;
      int64_t y = first < buffer_rows ? 0 : (first - buffer_rows) / step + 1;  // the first window that reaches `first`
      for (; y * step < last; ++y) {
        if (y < p.pool.out_h) add_pooled_row<T>(p, places, n, g, y, w, pixels, buffer_rows);
        // No window further down reaches the buffer's first `step` rows.
        for (int64_t c = 0; c < channels; c += p.width) {
          const int64_t width = least(p.width, channels - c), row = pitch * width;
          A* chunk = pixels + buffer_rows * pitch * c;
          for (int64_t i = most(first - y * step, 0); i < least(step, last - y * step); ++i)
            copy_pixels(chunk + i * row + s.pad_left * width, 1, width,
                        static_cast<T*>(p.pixels) + n * p.pixel_stride.n + (g * channels + c) * p.pixel_stride.c +
                            (y * step + i - s.pad_top) * p.pixel_stride.h,
                        p.pixel_stride.c, p.pixel_stride.w, width, s.in_w);
          for (int64_t k = 0; k < (buffer_rows - step) * row; ++k) chunk[k] = chunk[k + step * row];
          for (int64_t k = (buffer_rows - step) * row; k < buffer_rows * row; ++k) chunk[k] = 0;
        }
      }
    }
  }
}

// ---- the plain gradient, for what the passes above must not skip: zeros that meet an infinity or a NaN ----

// Planes [begin, end) of batch * out_channels, contiguous: the gradient of the convolution's result.
template <class T>
void scatter_pooled(const PooledGrad& p, void* plain, int64_t begin, int64_t end) {
  const ConvShape& s = p.conv;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t n = index / s.out_channels, m = index % s.out_channels;
    T* plane = static_cast<T*>(plain) + index * s.out_h * s.out_w;
    for (int64_t i = 0; i < s.out_h * s.out_w; ++i) plane[i] = T{};
    for (int64_t y = 0; y < p.pool.out_h; ++y)
      for (int64_t x = 0; x < p.pool.out_w; ++x) {
        const int64_t code =
            p.code[n * p.code_stride.n + m * p.code_stride.c + y * p.code_stride.h + x * p.code_stride.w];
        if (code >= p.codes()) continue;
        T& to = plane[(y * p.pool.stride_h + code / p.pool.kernel_w) * s.out_w + x * p.pool.stride_w +
                      code % p.pool.kernel_w];
        to = from_accumulator<T>(
            to_accumulator(to) +
            to_accumulator(static_cast<const T*>(
                p.grad)[n * p.grad_stride.n + m * p.grad_stride.c + y * p.grad_stride.h + x * p.grad_stride.w]));
      }
  }
}

#define FASTNN_ALL_DTYPES(function) {function<double>, function<float>, function<bf16>, function<f16>}
const PooledKernels kPooledKernels = {
    FASTNN_ALL_DTYPES(run_pooled_weight), FASTNN_ALL_DTYPES(write_pooled_sums), FASTNN_ALL_DTYPES(pack_pooled_weight),
    FASTNN_ALL_DTYPES(run_pooled_input),  FASTNN_ALL_DTYPES(scatter_pooled),
};
#undef FASTNN_ALL_DTYPES

// How the convolution kernels find and read the elements of a ConvSource.
#pragma once

#include <cstdlib>

#include "cuda/kernels/conv2d.h"
#include "cuda/kernels/launch.h"

namespace fastnn::cuda {

// Division by a number that the host knows, as a multiplication where the dividend has 31 bits.
struct Divisor {
  uint32_t divisor = 1, magic = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(uint32_t(d)) {
    while (int64_t(1) << shift < d) ++shift;
    magic = uint32_t(((int64_t(1) << 32) * ((int64_t(1) << shift) - d)) / d + 1);
  }
  __device__ int divide(int n) const {
    return int((uint32_t(uint64_t(uint32_t(n)) * magic >> 32) + uint32_t(n)) >> shift);
  }
  __device__ int64_t divide(int64_t n) const { return n >> 31 ? n / divisor : divide(int(n)); }
};

// n / d, leaving the remainder in n.
template <class Number>
__device__ inline Number divide_off(Number& n, const Divisor& d) {
  const Number whole = d.divide(n), rest = n - whole * Number(d.divisor);
  n = rest;
  return whole;
}

struct Position {
  int64_t n;  // -1: none
  int row, col;
};
// A row from which no tap leads into a plane, nor past an int: planes have fewer rows.
constexpr int kNowhere = INT_MIN / 2;

// The positions of `batch` planes, row by row.
struct Positions {
  int64_t count = 0;
  Divisor cols, plane;

  Positions() = default;
  Positions(int64_t batch, int64_t rows, int64_t columns)
      : count(batch * rows * columns), cols(columns), plane(rows * columns) {}
};

// Those from `first` on, which are numbered in 31 bits.
class PositionsFrom {
 public:
  __device__ PositionsFrom(const Positions& positions, int64_t first) : positions_(positions) {
    const int64_t left = positions.count - first;
    left_ = left < INT_MAX ? int(left) : INT_MAX;
    n_ = divide_off(first, positions.plane);
    rest_ = int(first);
  }
  __device__ Position operator[](int index) const {
    if (index >= left_) return {-1, 0, 0};
    int col = rest_ + index;
    const int n = divide_off(col, positions_.plane), row = divide_off(col, positions_.cols);
    return {n_ + n, row, col};
  }

 private:
  const Positions& positions_;
  int64_t n_;  // the plane of the first, and where in it
  int rest_, left_;
};

// What is summed over: the taps, row by row, and of each the channels.
struct Taps {
  Reach rows, cols;
  int channels, depth;
  Divisor by_channels, by_cols;

  explicit Taps(const ConvGeometry& g)
      : rows(g.rows),
        cols(g.cols),
        channels(g.group_channels),
        depth(g.rows.taps * g.cols.taps * g.group_channels),
        by_channels(channels),
        by_cols(g.cols.taps > 0 ? g.cols.taps : 1) {}
};

struct Entry {
  int channel, i, j;  // of taps (i, j)
};
__device__ inline Entry entry_of(const Taps& taps, int index) {
  int tap = divide_off(index, taps.by_channels);
  const int i = divide_off(tap, taps.by_cols);
  return {index, i, tap};
}

// Where the entries are, from (tap (0, 0), channel 0) of the same position on: an entry's two divisions and the rest of
// its address, worked out once on the host. Behind the last entry are some that lie outside of every source.
struct TapTable {
  static constexpr int kMost = 1024, kMore = 128;
  struct Entry {
    int offset;  // elements
    int16_t row, col;
  };
  Entry entries[kMost + kMore];

  // Whether they fit.
  bool fill(const ConvGeometry& g) {
    const Taps taps(g);
    const Strides4& s = g.source.stride;
    const int64_t last_row = int64_t(taps.rows.taps - 1) * taps.rows.tap,
                  last_col = int64_t(taps.cols.taps - 1) * taps.cols.tap;
    const int64_t furthest = std::abs(last_row * s.h) + std::abs(last_col * s.w) + (taps.channels - 1) * s.c;
    const int64_t lowest = taps.rows.first + int64_t(g.result_rows - 1) * taps.rows.step;
    if (taps.depth > kMost || std::abs(last_row) > SHRT_MAX || std::abs(last_col) > SHRT_MAX || furthest > INT_MAX ||
        lowest > SHRT_MAX)
      return false;
    for (int index = 0; index < taps.depth; ++index) {
      const int tap = index / taps.channels, row = tap / taps.cols.taps * taps.rows.tap,
                col = tap % taps.cols.taps * taps.cols.tap;
      entries[index] = {int(index % taps.channels * s.c + row * s.h + col * s.w), int16_t(row), int16_t(col)};
    }
    for (int index = taps.depth; index < taps.depth + kMore; ++index) entries[index] = {0, SHRT_MIN, 0};
    return true;
  }
};

struct Source : ConvSource {
  Divisor pool_rows, pool_cols;
  bool windows_apart;  // an element is in one of them at the most

  explicit Source(const ConvSource& s)
      : ConvSource(s),
        pool_rows(s.pool.stride_h),
        pool_cols(s.pool.stride_w),
        windows_apart(s.pool.stride_h >= s.pool.kernel_h && s.pool.stride_w >= s.pool.kernel_w) {}
  __device__ bool has(int row, int col) const {
    return (unsigned(row) < unsigned(height)) & (unsigned(col) < unsigned(width));
  }
};

__device__ inline int64_t offset(const Strides4& s, int64_t n, int channel, int row, int col) {
  return n * s.n + channel * s.c + row * s.h + col * s.w;
}

// N channels: neighbours in memory, or single elements.
template <int N, bool kNeighbours, class T>
__device__ Pack<T, N> load_channels(const T* first, int64_t stride) {
  Pack<T, N> pack;
  if constexpr (kNeighbours) {
    pack = load_pack<N>(first);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) pack.values[e] = first[e * stride];
  }
  return pack;
}

// The first `count` of N channels, which may be an aligned pack of neighbours.
template <class T, int N>
__device__ void store_channels(T* first, int64_t stride, bool in_pack, int count, const Pack<T, N>& pack) {
  if (in_pack) return store_pack(first, pack);
#pragma unroll
  for (int e = 0; e < N; ++e, first += stride)
    if (e < count) *first = pack.values[e];
}

// 0 wherever y is <= 0.
template <class T, int N>
__device__ void mask_by_relu(Pack<T, N>& pack, const Pack<T, N>& y) {
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    unsigned pairs[N / 2], of_y[N / 2];
    memcpy(pairs, &pack, sizeof pairs);
    memcpy(of_y, &y, sizeof of_y);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] &= relu_mask<T>(of_y[i]);
    memcpy(&pack, pairs, sizeof pairs);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (widen(y.values[e]) <= 0) pack.values[e] = T{};
  }
}

// 0 wherever the code of a channel, from `first` on, is not this one.
template <bool kNeighbours, class T, int N>
__device__ void mask_by_code(Pack<T, N>& pack, const uint8_t* first, int64_t stride, int code) {
  if constexpr (kNeighbours && sizeof(T) == 2 && N % 4 == 0) {
    const auto codes = load_pack<N / 4>(reinterpret_cast<const unsigned*>(first));
    unsigned pairs[N / 2];
    memcpy(pairs, &pack, sizeof pairs);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] &= equal_mask(codes.values[i / 2], i % 2 * 2, code);
    memcpy(&pack, pairs, sizeof pairs);
  } else {
    const Pack<uint8_t, N> codes = load_channels<N, kNeighbours>(first, stride);
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (codes.values[e] != code) pack.values[e] = T{};
  }
}

// How far apart two channels are in memory: in elements of a source's data, and of what masks it. Of a max-pool's
// windows these are the same for all elements of a plane.
struct Step {
  int64_t data, mask;
};
template <bool kMasked>
__device__ inline Step step_of(const Source& s, int64_t n, int channel, int row, int col) {
  if (!kMasked) return {offset(s.stride, n, channel, row, col), 0};
  if (s.pool_code) return {offset(s.stride, n, channel, 0, 0), offset(s.code_stride, n, channel, 0, 0)};
  return {offset(s.stride, n, channel, row, col), offset(s.relu_stride, n, channel, row, col)};
}

// Where one is.
template <class T>
struct Place {
  const T* data;
  int64_t mask;  // from the first element of what masks the source
  __device__ Place operator+(const Step& step) const { return {data + step.data, mask + step.mask}; }
};
template <class T>
__device__ Place<T> first_place(const Source& s) {
  return {static_cast<const T*>(s.data), 0};
}

// N channels of a source that a max-pool masks, and what the windows gave them that chose them.
template <class T, int N, bool kNeighbours>
__device__ Pack<T, N> load_pooled(const Source& s, const Place<T>& at, int row, int col) {
  const int kernel_h = int(s.pool.kernel_h), kernel_w = int(s.pool.kernel_w);
  const auto load_window = [&](int y, int x, int element) {
    Pack<T, N> pack = {};
    if (y >= int(s.pool.out_h) || x >= int(s.pool.out_w)) return pack;
    pack = load_channels<N, kNeighbours>(at.data + offset(s.stride, 0, 0, y, x), s.stride.c);
    const uint8_t* const first_code = s.pool_code + at.mask + offset(s.code_stride, 0, 0, y, x);
    mask_by_code<kNeighbours>(pack, first_code, s.code_stride.c, element);
    return pack;
  };
  int i = row, j = col;
  const int last_row = divide_off(i, s.pool_rows), last_col = divide_off(j, s.pool_cols);
  if (s.windows_apart) {
    if (i >= kernel_h || j >= kernel_w) return {};
    return load_window(last_row, last_col, i * kernel_w + j);
  }
  Accumulator<T> sums[N] = {};
#pragma unroll 1
  for (int y = last_row, at_row = i; y >= 0 && at_row < kernel_h; --y, at_row += int(s.pool.stride_h))
#pragma unroll 1
    for (int x = last_col, at_col = j; x >= 0 && at_col < kernel_w; --x, at_col += int(s.pool.stride_w)) {
      const Pack<T, N> pack = load_window(y, x, at_row * kernel_w + at_col);
#pragma unroll
      for (int e = 0; e < N; ++e) sums[e] += widen(pack.values[e]);
    }
  Pack<T, N> pack;
#pragma unroll
  for (int e = 0; e < N; ++e) pack.values[e] = narrow<T>(sums[e]);
  return pack;
}

// N channels of a source at a place that it has, which is in this row and column. kMasked: it may have been masked by a
// ReLU or a max-pool.
template <class T, int N, bool kNeighbours, bool kMasked>
__device__ Pack<T, N> load_place(const Source& s, const Place<T>& at, int row, int col) {
  if (kMasked && s.pool_code) return load_pooled<T, N, kNeighbours>(s, at, row, col);
  auto pack = load_channels<N, kNeighbours>(at.data, s.stride.c);
  if (kMasked && s.relu_output) {
    const T* const relu_output = static_cast<const T*>(s.relu_output) + at.mask;
    mask_by_relu(pack, load_channels<N, kNeighbours>(relu_output, s.relu_stride.c));
  }
  return pack;
}
template <class T, int N, bool kNeighbours, bool kMasked>
__device__ Pack<T, N> load_pixel(const Source& s, int64_t n, int channel, int row, int col) {
  const Place<T> at = first_place<T>(s) + step_of<kMasked>(s, n, channel, row, col);
  return load_place<T, N, kNeighbours, kMasked>(s, at, row, col);
}

// Which of a window's `elements` values is its maximum, for each of N channels: NaN wins, then the first; kPoolNone
// where ReLU left no more than 0.
template <class T, int N>
struct Maxima {
  Pack<T, N> values;
  Pack<uint8_t, N> codes;
};
template <class T, int N, class Values>
__device__ Maxima<T, N> maxima_of(int elements, const Values& values) {
  Accumulator<T> tops[N];
  int codes[N];
#pragma unroll
  for (int n = 0; n < N; ++n) tops[n] = -Accumulator<T>(INFINITY), codes[n] = 0;
  for (int e = 0; e < elements; ++e) {
    const Pack<T, N> of_channels = values(e);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Accumulator<T> value = widen(of_channels.values[n]);
      if (value > tops[n] || value != value) tops[n] = value, codes[n] = e;
    }
  }
  Maxima<T, N> maxima;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    maxima.values.values[n] = narrow<T>(tops[n]);
    maxima.codes.values[n] = tops[n] <= 0 ? kPoolNone : uint8_t(codes[n]);
  }
  return maxima;
}

}  // namespace fastnn::cuda

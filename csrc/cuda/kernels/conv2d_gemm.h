// The convolution and its gradient with respect to the weight as matrix products of tiles in shared memory.
//
//   conv_kernel         results[position, result] = sum over (tap, channel) of source[position, tap, channel] *
//                       weight[result, tap, channel]
//   grad_weight_kernel  grad_weight[tap, channel, result] = sum over positions of source[position, tap, channel] *
//                       grad[position, result]
// The source is never unfolded in memory: a loader finds the elements of a tile of it, of which a row is a position and
// a column a tap and channel. The same loader serves both products, and the second operand of grad_weight_kernel, which
// is a source with one tap; the weight has been packed to rows over (tap, channel).
//
// Blocking: a block has kM x kN sums, in registers, and walks along what is summed over in steps of 64 bytes a row
// (grad_weight_kernel: as many positions), through a ring of kStages pairs of tiles. While one is multiplied, kStages -
// 1 are on their way, by asynchronous 16-byte copies where the source is plain and its channels are neighbours in
// memory (channels_last). Where a gradient is masked by a ReLU or a max-pool, or channels are no neighbours (NCHW:
// positions are), one step is on its way in registers, which turns 16 bytes of channels at a time: memory is read along
// whichever runs through it. Chunks of 16 bytes are swizzled, so that eight rows' chunks, and a row's eight, lie in all
// banks. 16-bit types multiply on the matrix units, m16n8k16 with float sums, a warp 64 x 32 (of 32 columns 32 x 32,
// of conv_kernel's 128 64 x 64: fewer reads of shared memory), and so does float, m16n8k8, where it may be rounded to
// TF32, which the operands are on their way from shared memory, and the weight when it is packed; else float and double
// multiply in registers, a thread 8 x 8 and 4 x 4. Operations: 2 * positions * results * taps * channels, rounded up to
// tiles. Bytes: a tile of the source is read once for every kN results, taps and neighbouring blocks from the caches;
// the results are written once, through shared memory so that they are written along memory, too.
#pragma once

#include <type_traits>

#include "cuda/kernels/conv2d_pixels.h"

namespace fastnn::cuda {

constexpr int kStages = 3;

// How a tile of a source is read.
enum class Access {
  kCopies,          // asynchronous copies of 16 bytes: channels are neighbours, and no mask
  kPacks,           // 16 bytes of channels through registers, which may be masked
  kElements,        // element by element, neighbouring positions by neighbouring threads, and no mask
  kMaskedElements,  // the same, with or without
};

// What kElements reads, unless channels come in whole chunks, and the others do not take.
struct NoTable {};
template <Access kAccess>
using TableOf = std::conditional_t<kAccess == Access::kElements, TapTable, NoTable>;

// ---- tiles ----

template <class T, int kRows, int kColumns>
struct SharedTile {
  static constexpr int kElements = kPackElements<T>, kChunks = kColumns / kElements;
  static_assert(kChunks == 4 || kChunks % 8 == 0);
  Pack<T, kElements> chunks[kRows * kChunks];

  __device__ Pack<T, kElements>& chunk(int row, int index) {
    return chunks[row * kChunks + (kChunks == 4 ? index ^ (row >> 1 & 3) : index ^ (row & 7))];
  }
  __device__ T& at(int row, int column) { return chunk(row, column / kElements).values[column % kElements]; }
};

// What a block computes at once, and with how many threads.
template <class T, int kM_, int kN_, bool kMatrixUnits_, int kWarpN_ = 32>
struct Shape {
  using Element = T;
  static constexpr int kM = kM_, kN = kN_, kDepth = 64 / sizeof(T);
  static constexpr bool kMatrixUnits = kMatrixUnits_;
  static constexpr int kWarpM = kN == 32 ? 32 : 64, kWarpN = kWarpN_;  // a warp's part, on the matrix units
  static constexpr int kThreads = kMatrixUnits ? kM / kWarpM * (kN / kWarpN) * 32 : 128;
};

// ---- loaders ----

// A tile of a source, kRows positions x kColumns entries (taps and channels).
template <class T, int kRows, int kColumns, int kThreads, Access kAccess>
class PixelLoader {
 public:
  using Tile = SharedTile<T, kRows, kColumns>;

  // first_channel: of the group.
  __device__ PixelLoader(const Source& source, const Taps& taps, const TableOf<kAccess>& table, int first_channel)
      : source_(source), taps_(taps), table_(table), first_channel_(first_channel) {}

  template <class PositionOf>
  __device__ void set_positions(const PositionOf& position_of) {
#pragma unroll
    for (int u = 0; u < kOwnRows; ++u) {
      Position& p = positions_[u];
      p = position_of(row_of(u));
      p.row = taps_.rows.first + p.row * taps_.rows.step;
      p.col = taps_.cols.first + p.col * taps_.cols.step;
      places_[u] = first_place<T>(source_) + step_of<kMasked>(source_, p.n, first_channel_, p.row, p.col);
      if (p.n < 0) p.row = kNowhere;
    }
  }
  __device__ void set_entries(int first) {
#pragma unroll
    for (int u = 0; u < kOwnChunks; ++u) {
      indices_[u] = first + chunk_of(u) * N;
      entries_[u] = entry_of(taps_, indices_[u]);
      steps_[u] = step_to(entries_[u]);
    }
  }
  // Starts to load; the tile is complete once `finish` has been called and its copies have been waited for.
  __device__ void start(Tile& tile) {
#pragma unroll
    for (int u = 0; u < kOwn; ++u) {
      if constexpr (kAccess == Access::kCopies) {
        start_copy(&tile.chunk(row_of(u), chunk_of(u)), (place_of(u) + steps_[u % kOwnChunks]).data,
                   has(u, index_of(u), entries_[u % kOwnChunks]));
      } else {
        packs_[u] = load(u);
      }
    }
  }
  __device__ void finish(Tile& tile) const {
    if constexpr (kAccess != Access::kCopies) {
#pragma unroll
      for (int u = 0; u < kOwn; ++u) tile.chunk(row_of(u), chunk_of(u)) = packs_[u];
    }
  }

 private:
  static constexpr int N = Tile::kElements, kOwn = kRows * Tile::kChunks / kThreads;
  // Threads that are neighbours take chunks that are neighbours in memory: of a row, or of a column. A thread's own are
  // one of each of its rows, or all of one.
  static constexpr bool kAlongRows = kAccess == Access::kCopies || kAccess == Access::kPacks;
  static constexpr int kOwnRows = kAlongRows ? kOwn : 1, kOwnChunks = kAlongRows ? 1 : kOwn;
  static constexpr bool kMasked = kAccess == Access::kPacks || kAccess == Access::kMaskedElements;
  static_assert(kAlongRows ? kThreads % Tile::kChunks == 0 : kThreads % kRows == 0);

  __device__ static int row_of(int u) {
    return kAlongRows ? int(threadIdx.x) / Tile::kChunks + u * (kThreads / Tile::kChunks) : int(threadIdx.x) % kRows;
  }
  __device__ static int chunk_of(int u) {
    return kAlongRows ? int(threadIdx.x) % Tile::kChunks : int(threadIdx.x) / kRows + u * (kThreads / kRows);
  }
  __device__ const Position& position_of(int u) const { return positions_[u % kOwnRows]; }
  __device__ const Place<T>& place_of(int u) const { return places_[u % kOwnRows]; }
  __device__ int index_of(int u) const { return indices_[u % kOwnChunks]; }

  __device__ int row_at(int u, const Entry& entry) const { return position_of(u).row + entry.i * taps_.rows.tap; }
  __device__ int col_at(int u, const Entry& entry) const { return position_of(u).col + entry.j * taps_.cols.tap; }
  __device__ Step step_to(const Entry& entry) const {
    return step_of<kMasked>(source_, 0, entry.channel, entry.i * taps_.rows.tap, entry.j * taps_.cols.tap);
  }
  __device__ bool has(int u, int index, const Entry& entry) const {
    return (index < taps_.depth) & source_.has(row_at(u, entry), col_at(u, entry));
  }

  __device__ Pack<T, N> load(int u) const {
    if (kAlongRows || taps_.channels % N == 0)
      return load_tap<N, kAlongRows>(u, index_of(u), entries_[u % kOwnChunks], steps_[u % kOwnChunks]);
    Pack<T, N> pack = {};
    if constexpr (kAccess == Access::kElements) {
      const Position& p = position_of(u);
      const T* const first = place_of(u).data;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const TapTable::Entry entry = table_.entries[index_of(u) + e];
        if (source_.has(p.row + entry.row, p.col + entry.col)) pack.values[e] = first[entry.offset];
      }
    } else if constexpr (!kAlongRows) {
#pragma unroll 1
      for (int e = 0; e < N; ++e) {
        // `e` must not index registers.
#pragma unroll
        for (int i = 1; i < N; ++i) pack.values[i - 1] = pack.values[i];
        const int index = index_of(u) + e;
        const Entry entry = entry_of(taps_, index);
        pack.values[N - 1] = load_tap<1, false>(u, index, entry, step_to(entry)).values[0];
      }
    }
    return pack;
  }
  // Channels of one tap.
  template <int kCount, bool kNeighbours>
  __device__ Pack<T, kCount> load_tap(int u, int index, const Entry& entry, const Step& step) const {
    if (!has(u, index, entry)) return {};
    return load_place<T, kCount, kNeighbours, kMasked>(source_, place_of(u) + step, row_at(u, entry), col_at(u, entry));
  }

  const Source& source_;
  const Taps& taps_;
  const TableOf<kAccess>& table_;
  int first_channel_;
  Position positions_[kOwnRows];  // where tap (0, 0) is
  Place<T> places_[kOwnRows];     // of its channel 0
  int indices_[kOwnChunks];
  Entry entries_[kOwnChunks];
  Step steps_[kOwnChunks];  // to the entries from there
  Pack<T, N> packs_[kOwn];
};

// A tile of the packed weight, kRows results x kColumns entries: rows of `depth` entries, a multiple of kColumns.
template <class T, int kRows, int kColumns, int kThreads>
class WeightLoader {
 public:
  using Tile = SharedTile<T, kRows, kColumns>;

  // first: the first result's row, of `rows` that there are.
  __device__ WeightLoader(const T* first, int rows, int depth)
      : first_(first + int64_t(row_of(0)) * depth + chunk() * Tile::kElements), rows_(rows), depth_(depth) {}
  __device__ void start(Tile& tile, int first_entry) const {
#pragma unroll
    for (int u = 0; u < kRows / kStep; ++u)
      start_copy(&tile.chunk(row_of(u), chunk()), first_ + int64_t(u * kStep) * depth_ + first_entry,
                 row_of(u) < rows_);
  }

 private:
  static constexpr int kStep = kThreads / Tile::kChunks;
  __device__ static int row_of(int u) { return int(threadIdx.x) / Tile::kChunks + u * kStep; }
  __device__ static int chunk() { return int(threadIdx.x) % Tile::kChunks; }

  const T* first_;  // that the thread copies
  int rows_, depth_;
};

// ---- products ----

// A block's kM x kN sums of products. Thread t has kI x kJ of them, at rows m_of(i) and columns n_of(j).
// kAcross: the tiles have what is summed over as their rows, not as their columns.
template <class Shape, bool kAcross>
class PlainSums {
  using T = typename Shape::Element;
  static constexpr int N = kPackElements<T>, kThreadsM = 16, kThreadsN = 8;

 public:
  static constexpr int kI = Shape::kM / kThreadsM, kJ = Shape::kN / kThreadsN;
  static constexpr int kPair = 1;  // columns that are neighbours

  __device__ static int m_of(int i) { return spread<kThreadsM>(int(threadIdx.x) / kThreadsN, i); }
  __device__ static int n_of(int j) { return spread<kThreadsN>(int(threadIdx.x) % kThreadsN, j); }
  __device__ Accumulator<T>& at(int i, int j) { return sums_[i][j]; }

  template <class TileA, class TileB>
  __device__ void add(TileA& a, TileB& b) {
    const int tm = int(threadIdx.x) / kThreadsN, tn = int(threadIdx.x) % kThreadsN;
    if constexpr (kAcross) {
#pragma unroll 4
      for (int k = 0; k < Shape::kDepth; ++k) {
        Pack<T, N> pa[kI / N], pb[kJ / N];
#pragma unroll
        for (int i = 0; i < kI / N; ++i) pa[i] = a.chunk(k, tm + i * kThreadsM);
#pragma unroll
        for (int j = 0; j < kJ / N; ++j) pb[j] = b.chunk(k, tn + j * kThreadsN);
#pragma unroll
        for (int i = 0; i < kI; ++i)
#pragma unroll
          for (int j = 0; j < kJ; ++j) sums_[i][j] += pa[i / N].values[i % N] * pb[j / N].values[j % N];
      }
    } else {
#pragma unroll 1
      for (int c = 0; c < Shape::kDepth / N; ++c) {
        Pack<T, N> pa[kI];
#pragma unroll
        for (int i = 0; i < kI; ++i) pa[i] = a.chunk(tm + i * kThreadsM, c);
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
          const Pack<T, N> pb = b.chunk(tn + j * kThreadsN, c);
#pragma unroll
          for (int i = 0; i < kI; ++i)
#pragma unroll
            for (int e = 0; e < N; ++e) sums_[i][j] += pa[i].values[e] * pb.values[e];
        }
      }
    }
  }

 private:
  template <int kOf>
  __device__ static int spread(int thread, int i) {
    return kAcross ? (thread + i / N * kOf) * N + i % N : thread + i * kOf;
  }

  Accumulator<T> sums_[kI][kJ] = {};
};

// The same on the matrix units: a warp's part is products of 16 x 8.
template <class Shape, bool kAcross>
class MatrixSums {
  using T = typename Shape::Element;
  static constexpr int N = kPackElements<T>, kWarpsM = Shape::kM / Shape::kWarpM;
  static constexpr int kProductsM = Shape::kWarpM / 16, kProductsN = Shape::kWarpN / 8;

 public:
  static constexpr int kI = 2 * kProductsM, kJ = 2 * kProductsN, kPair = 2;

  __device__ static int m_of(int i) { return first_m() + i / 2 * 16 + i % 2 * 8 + int(threadIdx.x) % 32 / 4; }
  __device__ static int n_of(int j) { return first_n() + j / 2 * 8 + int(threadIdx.x) % 4 * 2 + j % 2; }
  __device__ float& at(int i, int j) { return sums_[i / 2][j / 2][i % 2 * 2 + j % 2]; }

  template <class TileA, class TileB>
  __device__ void add(TileA& a, TileB& b) {
    // Of a, a product needs all four matrices; of b, two.
#pragma unroll
    for (int k = 0; k < Shape::kDepth; k += 2 * N) {
      unsigned of_a[kProductsM][4], of_b[kProductsN / 2][4];
#pragma unroll
      for (int i = 0; i < kProductsM; ++i) load<true>(of_a[i], a, first_m(), i * 16, k);
#pragma unroll
      for (int j = 0; j < kProductsN / 2; ++j) load<false>(of_b[j], b, first_n(), j * 16, k);
#pragma unroll
      for (int i = 0; i < kProductsM; ++i)
#pragma unroll
        for (int j = 0; j < kProductsN; ++j) multiply_add_matrices<T>(sums_[i][j], of_a[i], of_b[j / 2] + j % 2 * 2);
    }
  }

 private:
  __device__ static int first_m() { return int(threadIdx.x) / 32 % kWarpsM * Shape::kWarpM; }
  __device__ static int first_n() { return int(threadIdx.x) / 32 / kWarpsM * Shape::kWarpN; }

  // Four matrices, 8 of the product's rows or columns from first + outer on by N of what is summed over from `k` on.
  // The second one is further along the former (kOuterFirst) or along the latter.
  template <bool kOuterFirst, class Tile>
  __device__ static void load(unsigned (&matrices)[4], Tile& tile, int first, int outer, int k) {
    const int lane = int(threadIdx.x) % 32;
    const auto outer_of = [&](int matrix) { return first + (kOuterFirst ? matrix % 2 : matrix / 2) * 8; };
    const auto k_of = [&](int matrix) { return kOuterFirst ? matrix / 2 : matrix % 2; };
    if constexpr (kAcross && sizeof(T) == 4) {
      // Only 16-bit elements come transposed. Which of the 8 rows a lane takes for which is free, if a's and b's are
      // the same: every other row lies in banks of its own.
#pragma unroll
      for (int m = 0; m < 4; ++m)
        matrices[m] = to_tf32(tile.at(k + lane % 4 * 2 + k_of(m), outer_of(m) + outer + lane / 4));
    } else {
      const int row = outer_of(lane / 8), at = k + k_of(lane / 8) * N, within = lane % 8;
      // Eight rows on chunks are swizzled alike: `outer` adds a constant to the address.
      load_matrices<kAcross>(matrices, kAcross ? &tile.chunk(at + within, (row + outer) / 8)
                                               : &tile.chunk(row + within, at / N) + outer * Tile::kChunks);
      if constexpr (sizeof(T) == 4 && kOuterFirst)  // b is the weight, which has been packed as TF32 numbers
#pragma unroll
        for (unsigned& word : matrices) word = to_tf32(word);
    }
  }

  float sums_[kProductsM][kProductsN][4] = {};
};

template <class Shape, bool kAcross>
using Sums = std::conditional_t<Shape::kMatrixUnits, MatrixSums<Shape, kAcross>, PlainSums<Shape, kAcross>>;

template <class TileA, class TileB>
struct Stage {
  TileA a;
  TileB b;
};

// The main loop. start(step, stage) starts to load a step's tiles, and finish(stage) stores what went to registers.
template <class Stage, class Sums, class Start, class Finish>
__device__ void multiply(Stage (&stages)[kStages], Sums& sums, int steps, const Start& start, const Finish& finish) {
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) {
      start(step, stages[step]);
      finish(stages[step]);
    }
    commit_copies();
  }
  int now = 0, next = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // all threads' copies of this step are there, and stage `next` has been multiplied
    const bool more = step + kStages - 1 < steps;
    if (more) start(step + kStages - 1, stages[next]);
    commit_copies();
    sums.add(stages[now].a, stages[now].b);
    if (more) finish(stages[next]);
    now = now + 1 < kStages ? now + 1 : 0;
    next = next + 1 < kStages ? next + 1 : 0;
  }
}

// ---- the convolution ----

struct ConvArgs {
  ConvProblem problem;
  Source source;
  Taps taps;
  Positions positions;  // of results, or of windows where they are pooled
  const void* weight;   // packed
  int packed_depth;
  Divisor window = {}, window_cols = {};  // elements, and columns, of a max-pool's window
  Divisor tile_rows = {};                 // positions of a tile
  bool in_packs = false;                  // results, and codes, can be written in packs
};

// The position whose result is row `m` of a tile: with a max-pool, an element of a window.
__device__ inline Position position_of(const ConvArgs& args, const PositionsFrom& positions, int m) {
  if (!args.problem.pool_code) return positions[m];
  const int window = divide_off(m, args.window);
  if (window >= int(args.tile_rows.divisor)) return {-1, 0, 0};
  Position p = positions[window];
  p.row = p.row * int(args.problem.pool.stride_h) + divide_off(m, args.window_cols);
  p.col = p.col * int(args.problem.pool.stride_w) + m;
  return p;
}

// A tile of results, on their way to memory.
template <class Shape>
struct Results {
  SharedTile<typename Shape::Element, Shape::kM, Shape::kN> tile;
  int64_t places[Shape::kM];  // of the rows, or of windows of them, in memory; -1: of none
};

// Writes a tile of results, a thread 16 bytes of channels at a time. Neighbouring threads take what neighbours in
// memory: channels, where these can be written in packs, or else positions.
template <class Shape>
__device__ void write_results(const ConvArgs& args, Results<Shape>& results, int channels) {
  using T = typename Shape::Element;
  constexpr int N = kPackElements<T>, kChunks = Shape::kN / N;
  const ConvProblem& problem = args.problem;
  const int64_t stride = problem.result_stride.c;
  const int rows = int(args.tile_rows.divisor), elements = int(args.window.divisor);
  for (unsigned index = threadIdx.x; index < unsigned(rows * kChunks); index += Shape::kThreads) {
    int row = int(index / kChunks), chunk = int(index % kChunks);
    if (!args.in_packs) row = int(index), chunk = divide_off(row, args.tile_rows);
    const int n = chunk * N;
    const int64_t place = results.places[row];
    if (place < 0 || n >= channels) continue;
    const int64_t at = place + n * stride;
    T* const result = static_cast<T*>(problem.result) + at;
    if (problem.pool_code) {
      const auto top = maxima_of<T, N>(elements, [&](int e) { return results.tile.chunk(row * elements + e, chunk); });
      store_channels(result, stride, args.in_packs, channels - n, top.values);
      store_channels(problem.pool_code + at, stride, args.in_packs, channels - n, top.codes);
    } else {
      store_channels(result, stride, args.in_packs, channels - n, results.tile.chunk(row, chunk));
    }
  }
}

template <class Shape, Access kAccess>
__global__ void __launch_bounds__(Shape::kThreads, kAccess == Access::kCopies ? 2 : 1)
    conv_kernel(const __grid_constant__ ConvArgs args, const __grid_constant__ TableOf<kAccess> table) {
  using T = typename Shape::Element;
  using Pixels = PixelLoader<T, Shape::kM, Shape::kDepth, Shape::kThreads, kAccess>;
  using Weights = WeightLoader<T, Shape::kN, Shape::kDepth, Shape::kThreads>;
  __shared__ union {
    Stage<typename Pixels::Tile, typename Weights::Tile> stages[kStages];
    Results<Shape> results;
  } shared;

  // Neighbouring blocks read the same positions.
  const ConvProblem& problem = args.problem;
  const unsigned column_tiles = unsigned(problem.group_results + Shape::kN - 1) / Shape::kN;
  const unsigned rest = blockIdx.x / column_tiles;
  const int first_n = int(blockIdx.x % column_tiles) * Shape::kN, group = int(rest % unsigned(problem.groups));
  const int64_t tile = rest / unsigned(problem.groups);
  const int first_result = group * problem.group_results + first_n, results = problem.group_results - first_n;

  const PositionsFrom positions(args.positions, tile * args.tile_rows.divisor);
  Pixels pixels(args.source, args.taps, table, group * problem.group_channels);
  pixels.set_positions([&](int m) { return position_of(args, positions, m); });
  const Weights weights(static_cast<const T*>(args.weight) + int64_t(first_result) * args.packed_depth, results,
                        args.packed_depth);
  Sums<Shape, false> sums;
  multiply(
      shared.stages, sums, args.packed_depth / Shape::kDepth,
      [&](int step, auto& stage) {
        pixels.set_entries(step * Shape::kDepth);
        pixels.start(stage.a);
        weights.start(stage.b, step * Shape::kDepth);
      },
      [&](auto& stage) { pixels.finish(stage.a); });
  __syncthreads();  // the results take the tiles' memory

  for (int row = int(threadIdx.x); row < int(args.tile_rows.divisor); row += Shape::kThreads) {
    const Position p = positions[row];
    shared.results.places[row] = p.n < 0 ? -1 : offset(problem.result_stride, p.n, first_result, p.row, p.col);
  }
  constexpr int kPair = sums.kPair;
#pragma unroll
  for (int j = 0; j < sums.kJ; j += kPair) {
    Accumulator<T> bias[kPair] = {};
#pragma unroll
    for (int q = 0; q < kPair; ++q)
      if (problem.bias && sums.n_of(j + q) < results)
        bias[q] = widen(static_cast<const T*>(problem.bias)[(first_result + sums.n_of(j + q)) * problem.bias_stride]);
#pragma unroll
    for (int i = 0; i < sums.kI; ++i) {
      Pack<T, kPair> pair;
#pragma unroll
      for (int q = 0; q < kPair; ++q) {
        Accumulator<T> value = sums.at(i, j + q) + bias[q];
        if (problem.relu && value < 0) value = 0;
        pair.values[q] = narrow<T>(value);
      }
      store_pack(&shared.results.tile.at(sums.m_of(i), sums.n_of(j)), pair);
    }
  }
  __syncthreads();
  write_results(args, shared.results, results);
}

// ---- the gradient of the weight ----

struct GradWeightArgs {
  GradWeightProblem problem;
  Source source, grad;
  Taps taps, grad_taps;
  Positions positions;
  int slice_steps;  // of a slice of the positions, which a block sums over
  void* partials;   // slices x groups x depth x group_results
};

template <class Shape, Access kAccess, Access kGradAccess>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    grad_weight_kernel(const __grid_constant__ GradWeightArgs args, const __grid_constant__ TableOf<kAccess> table) {
  using T = typename Shape::Element;
  using Pixels = PixelLoader<T, Shape::kDepth, Shape::kM, Shape::kThreads, kAccess>;
  using Grads = PixelLoader<T, Shape::kDepth, Shape::kN, Shape::kThreads, kGradAccess>;
  __shared__ Stage<typename Pixels::Tile, typename Grads::Tile> stages[kStages];

  const int depth = args.taps.depth, group_results = args.problem.group_results;
  const unsigned column_tiles = unsigned(group_results + Shape::kN - 1) / Shape::kN;
  const unsigned row_tiles = unsigned(depth + Shape::kM - 1) / Shape::kM, groups = unsigned(args.problem.groups);
  unsigned rest = blockIdx.x / column_tiles;
  const int first_n = int(blockIdx.x % column_tiles) * Shape::kN, first_m = int(rest % row_tiles) * Shape::kM;
  rest /= row_tiles;
  const int group = int(rest % groups);
  const int64_t slice = rest / groups, slice_positions = int64_t(args.slice_steps) * Shape::kDepth;

  Pixels pixels(args.source, args.taps, table, group * args.problem.group_channels);
  const NoTable none;
  Grads grads(args.grad, args.grad_taps, none, group * group_results);
  pixels.set_entries(first_m);
  grads.set_entries(first_n);
  const PositionsFrom positions(args.positions, slice * slice_positions);
  const int64_t left = args.positions.count - slice * slice_positions, most = args.slice_steps;
  const int64_t left_steps = (left + Shape::kDepth - 1) / Shape::kDepth;
  Sums<Shape, true> sums;
  multiply(
      stages, sums, int(left_steps < most ? left_steps : most),
      [&](int step, auto& stage) {
        const auto position = [&](int row) { return positions[step * Shape::kDepth + row]; };
        pixels.set_positions(position);
        pixels.start(stage.a);
        grads.set_positions(position);
        grads.start(stage.b);
      },
      [&](auto& stage) {
        pixels.finish(stage.a);
        grads.finish(stage.b);
      });

  auto* partials = static_cast<Accumulator<T>*>(args.partials) + (slice * groups + group) * depth * group_results;
#pragma unroll
  for (int i = 0; i < sums.kI; ++i)
#pragma unroll
    for (int j = 0; j < sums.kJ; ++j) {
      const int m = first_m + sums.m_of(i), n = first_n + sums.n_of(j);
      if (m < depth && n < group_results) partials[int64_t(m) * group_results + n] = sums.at(i, j);
    }
}

// ---- launches ----

// The sums of a block, by the size of an element.
constexpr int tile_rows(size_t element) { return element == 8 ? 64 : 128; }
constexpr int tile_columns(size_t element, int results) {
  return element == 8 || (element == 2 && results <= 32) ? 32 : element == 4 || results <= 64 ? 64 : 128;
}
constexpr int64_t kStepBytes = 64;

// Calls f(Shape of T for the problem). kWarpN: of 128 columns.
template <class T, int kWarpN, class F>
cudaError_t with_shape(const ConvGeometry& g, const F& f) {
  constexpr int kM = tile_rows(sizeof(T)), kN = tile_columns(sizeof(T), 1);
  if constexpr (sizeof(T) == 2) {
    const int columns = tile_columns(sizeof(T), g.group_results);
    if (columns == 128) return f(Shape<T, kM, 128, true, kWarpN>{});
    if (columns == 64) return f(Shape<T, kM, 64, true>{});
    return f(Shape<T, kM, 32, true>{});
  } else {
    if constexpr (sizeof(T) == 4)
      if (g.tf32) return f(Shape<T, kM, kN, true>{});
    return f(Shape<T, kM, kN, false>{});
  }
}

// Whether kElements reads this source.
template <class T, class Args>
bool in_chunks_or_table(const Args& args, TapTable& table) {
  return args.taps.channels % kPackElements<T> == 0 || table.fill(args.problem);
}

template <class T>
cudaError_t launch_conv_tiles(const ConvArgs& args, Access access, cudaStream_t stream) {
  return with_shape<T, 64>(args.problem, [&](auto shape) {
    using S = decltype(shape);
    const int64_t blocks = ceil_div(args.positions.count, args.tile_rows.divisor) * args.problem.groups *
                           ceil_div(args.problem.group_results, S::kN);
    const auto run = [&](auto kernel, const auto& table) {
      return launch(kernel, blocks, S::kThreads, stream, args, table);
    };
    if constexpr (sizeof(T) < 8) {
      if (access == Access::kCopies) return run(conv_kernel<S, Access::kCopies>, NoTable{});
      if (access == Access::kPacks) return run(conv_kernel<S, Access::kPacks>, NoTable{});
    }
    TapTable table;
    if (access == Access::kElements && in_chunks_or_table<T>(args, table))
      return run(conv_kernel<S, Access::kElements>, table);
    return run(conv_kernel<S, Access::kMaskedElements>, NoTable{});
  });
}

template <class T>
cudaError_t launch_grad_weight_tiles(const GradWeightArgs& args, int64_t slices, Access access, bool grad_packs,
                                     cudaStream_t stream) {
  // Its loaders leave no registers for a warp's 64 x 64.
  return with_shape<T, 32>(args.problem, [&](auto shape) {
    using S = decltype(shape);
    const int64_t blocks =
        slices * args.problem.groups * ceil_div(args.taps.depth, S::kM) * ceil_div(args.problem.group_results, S::kN);
    const auto run = [&](auto kernel, const auto& table) {
      return launch(kernel, blocks, S::kThreads, stream, args, table);
    };
    if constexpr (sizeof(T) < 8)
      if (access == Access::kCopies && grad_packs)
        return run(grad_weight_kernel<S, Access::kCopies, Access::kPacks>, NoTable{});
    TapTable table;
    if (!in_chunks_or_table<T>(args, table))
      return run(grad_weight_kernel<S, Access::kMaskedElements, Access::kMaskedElements>, NoTable{});
    if constexpr (sizeof(T) < 8)
      if (grad_packs) return run(grad_weight_kernel<S, Access::kElements, Access::kPacks>, table);
    return run(grad_weight_kernel<S, Access::kElements, Access::kMaskedElements>, table);
  });
}

// In a file for each type, so that they compile side by side.
#define FASTNN_CONV_TILES(prefix, T)                                                       \
  prefix template cudaError_t launch_conv_tiles<T>(const ConvArgs&, Access, cudaStream_t); \
  prefix template cudaError_t launch_grad_weight_tiles<T>(const GradWeightArgs&, int64_t, Access, bool, cudaStream_t);

}  // namespace fastnn::cuda

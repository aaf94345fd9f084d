// The convolutions' launchers: which kernels a problem takes; and the kernels beside the matrix products of
// conv2d_gemm.h.
//
// pack_weight_kernel: the weight as rows over (tap, channel), so that its tiles come by 16-byte copies whatever its
//   strides, and rounded to TF32 where that is what is multiplied. 2 * weight bytes.
// direct_conv_kernel: groups of few results, which would leave most of a tile idle. A thread has four neighbouring
//   results of a row, and of a depthwise convolution in channels_last 16 bytes of channels of each: 32 sums in bf16,
//   for which a tap is one load of the weight and four of the source, 6 instructions a product; of one channel, 7.
//   Bytes: the source comes from memory once, from the caches once a tap; the results are written once. Memory-bound
//   where taps are few. What lies in the padding is left out, not multiplied.
// direct_grad_weight_kernel: the same of the weight's gradient. A thread sums three products, of 16 bytes of channels
//   where it may, over its share of a slice of the positions, and the block its threads', by halves. Bytes: both
//   operands once for every three products. Without a source, the bias's gradient.
// sum_slices_kernel: adds what blocks summed over slices of the positions. Neighbouring threads take neighbouring sums,
//   and the block's others other slices of the same, which are then added by halves: where there are few sums, slices
//   are many. Shape alone decides how many, so the bits are the same every time.
// pool_kernel: max-pools results that lie in memory, where windows overlap or are larger than a tile.
#include "cuda/kernels/conv2d.h"

#include <algorithm>

#include "cuda/kernels/conv2d_gemm.h"

namespace fastnn::cuda {

FASTNN_CONV_TILES(extern, double)
FASTNN_CONV_TILES(extern, float)
FASTNN_CONV_TILES(extern, bf16)
FASTNN_CONV_TILES(extern, f16)

namespace {

constexpr int kThreads = 256;
constexpr int kSmallGroup = 16;  // results of a group that a tile is too wide for
constexpr int kStrip = 4;        // neighbouring results of a row that a thread takes
constexpr int kEntries = 3;      // of the weight's gradient that a thread takes: a row of the commonest kernel
// The weight's gradient is cut into slices of so many steps (a small group's: positions) at the least, with memory for
// all of them, and no more blocks than fill the largest GPUs evenly. Each of their 132 multiprocessors takes one block
// of 128 x 128 sums at a time and more of narrower ones: two blocks for each, or as many sums.
constexpr int64_t kGradBlocks = 512, kSliceSteps = 8, kSlicePositions = 256, kSliceBytes = int64_t(64) << 20;
constexpr int64_t kGradTileColumns = 2 * 132 * 128;
constexpr int64_t kSliceUnits = 1 << 24;  // of a slice at the most, so that its positions are counted in 31 bits

__device__ inline int64_t thread_index() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

// ---- kernels ----

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    pack_weight_kernel(const __grid_constant__ ConvProblem problem, const __grid_constant__ Taps taps, Divisor depth,
                       Divisor results, int64_t count, T* packed) {
  const int64_t index = thread_index();
  if (index >= count) return;
  int64_t entry = index, result;
  result = divide_off(entry, depth);
  T value{};
  if (entry < taps.depth) {
    const int64_t group = divide_off(result, results);
    const Entry e = entry_of(taps, int(entry));
    value = static_cast<const T*>(
        problem.weight)[group * problem.weight_group + result * problem.weight_result +
                        e.channel * problem.weight_channel + e.i * problem.weight_row + e.j * problem.weight_col];
  }
  if constexpr (std::is_same_v<T, float>) {
    const unsigned rounded = to_tf32(value);
    if (problem.tf32) memcpy(&value, &rounded, sizeof value);
  }
  packed[index] = value;
}

struct DirectConvArgs {
  ConvProblem problem;
  Source source;
  Positions strips;                 // of kStrip results of a row
  Divisor channels, group_results;  // channels: counted as a thread takes them
  bool by_channel;                  // the order of threads: as results lie in memory
};

// N > 1: depthwise, and the weight is packed.
template <class T, int N, bool kMasked>
__global__ void __launch_bounds__(kThreads, 1) direct_conv_kernel(const __grid_constant__ DirectConvArgs args) {
  using A = Accumulator<T>;
  const ConvProblem& problem = args.problem;
  int64_t index = thread_index(), channel;
  if (args.by_channel) {
    const int64_t strip = divide_off(index, args.channels);
    channel = index, index = strip;
  } else {
    channel = divide_off(index, args.strips.plane);
    index += divide_off(channel, args.channels) * args.strips.plane.divisor;
  }
  channel *= N;
  const Position strip = PositionsFrom(args.strips, index)[0];
  if (strip.n < 0) return;
  int64_t result = channel;
  const int64_t group = divide_off(result, args.group_results);
  const T* weight = static_cast<const T*>(problem.weight);
  if constexpr (N == 1) weight += group * problem.weight_group + result * problem.weight_result;
  const int first_row = problem.rows.first + strip.row * problem.rows.step;
  const int first_col = problem.cols.first + strip.col * kStrip * problem.cols.step;
  const int first_channel = int(group) * problem.group_channels;
  const int64_t column_step = problem.cols.step * args.source.stride.w;
  A sums[kStrip][N] = {};
  for (int i = 0; i < problem.rows.taps; ++i) {
    const int row = first_row + i * problem.rows.tap;
    if (unsigned(row) >= unsigned(args.source.height)) continue;
    const T* const first =
        static_cast<const T*>(args.source.data) + offset(args.source.stride, strip.n, first_channel, row, first_col);
    for (int j = 0; j < problem.cols.taps; ++j)
      for (int c = 0; c < (N > 1 ? 1 : problem.group_channels); ++c) {
        const Pack<T, N> tap = load_pack<N>(
            weight + (N > 1 ? (i * problem.cols.taps + j) * int64_t(problem.groups) + channel
                            : c * problem.weight_channel + i * problem.weight_row + j * problem.weight_col));
        const T* at = first + c * args.source.stride.c + j * (problem.cols.tap * args.source.stride.w);
        int col = first_col + j * problem.cols.tap;
#pragma unroll
        for (int q = 0; q < kStrip; ++q, at += column_step, col += problem.cols.step) {
          if (unsigned(col) >= unsigned(args.source.width)) continue;
          const auto x = kMasked ? load_pixel<T, N, (N > 1), true>(args.source, strip.n, first_channel + c, row, col)
                                 : load_pack<N>(at);
#pragma unroll
          for (int e = 0; e < N; ++e) sums[q][e] += widen(x.values[e]) * widen(tap.values[e]);
        }
      }
  }
#pragma unroll
  for (int q = 0; q < kStrip; ++q) {
    const int col = strip.col * kStrip + q;
    if (col >= problem.result_cols) return;
    Pack<T, N> results;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      A value = sums[q][e];
      if (problem.bias) value += widen(static_cast<const T*>(problem.bias)[(channel + e) * problem.bias_stride]);
      if (problem.relu && value < 0) value = 0;
      results.values[e] = narrow<T>(value);
    }
    store_pack(static_cast<T*>(problem.result) + offset(problem.result_stride, strip.n, int(channel), strip.row, col),
               results);
  }
}

// Adds up rows of what each thread of a block has, which are `lanes` apart: the first `lanes` threads have the sums.
template <class A, int kRows>
__device__ void add_by_halves(A (&of_thread)[kRows][kThreads], int lanes) {
  const int thread = int(threadIdx.x);
  for (int half = kThreads / 2; half >= lanes; half /= 2) {
    __syncthreads();
    if (thread < half)
#pragma unroll
      for (int row = 0; row < kRows; ++row) of_thread[row][thread] += of_thread[row][thread + half];
  }
}

// N > 1: depthwise. Without data the source is 1 wherever the gradient is. lanes: neighbouring threads that take
// neighbouring channels, a power of two.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 1)
    direct_grad_weight_kernel(const __grid_constant__ GradWeightArgs args, int64_t slice_positions, int lanes) {
  using A = Accumulator<T>;
  const GradWeightProblem& problem = args.problem;
  const int channels = problem.groups * problem.group_results, thread = int(threadIdx.x);
  const unsigned channel_blocks = unsigned((channels + lanes * N - 1) / (lanes * N));
  const int channel = (int(blockIdx.x % channel_blocks) * lanes + thread % lanes) * N;
  const unsigned rest = blockIdx.x / channel_blocks, entry_blocks = unsigned(args.taps.depth + kEntries - 1) / kEntries;
  const int first_entry = int(rest % entry_blocks) * kEntries;
  const int64_t slice = rest / entry_blocks;
  const int group = channel / problem.group_results;
  const int first_channel = group * problem.group_channels;
  int rows[kEntries], cols[kEntries];
  int64_t places[kEntries];
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    const Entry e = entry_of(args.taps, first_entry + k);
    rows[k] = e.i * args.taps.rows.tap, cols[k] = e.j * args.taps.cols.tap;
    places[k] = offset(args.source.stride, 0, e.channel, rows[k], cols[k]);
  }

  const int64_t first = slice * slice_positions, last = first + slice_positions;
  const int64_t end = last < args.positions.count ? last : args.positions.count;
  const PositionsFrom positions(args.positions, first);
  const int count = int(end - first);
  A sums[kEntries][N] = {};
  for (int i = thread / lanes; channel < channels && i < count; i += kThreads / lanes) {
    const Position p = positions[i];
    const auto grad = load_pixel<T, N, (N > 1), true>(args.grad, p.n, channel, p.row, p.col);
    const int row = args.taps.rows.first + p.row * args.taps.rows.step;
    const int col = args.taps.cols.first + p.col * args.taps.cols.step;
    const T* const at =
        static_cast<const T*>(args.source.data) + offset(args.source.stride, p.n, first_channel, row, col);
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      if (!args.source.data) {
#pragma unroll
        for (int e = 0; e < N; ++e) sums[k][e] += widen(grad.values[e]);
      } else if (first_entry + k < args.taps.depth && args.source.has(row + rows[k], col + cols[k])) {
        const auto x = load_pack<N>(at + places[k]);
#pragma unroll
        for (int e = 0; e < N; ++e) sums[k][e] += widen(grad.values[e]) * widen(x.values[e]);
      }
    }
  }

  __shared__ A of_thread[kEntries * N][kThreads];
#pragma unroll
  for (int k = 0; k < kEntries; ++k)
#pragma unroll
    for (int e = 0; e < N; ++e) of_thread[k * N + e][thread] = sums[k][e];
  add_by_halves(of_thread, lanes);
  if (thread >= lanes || channel >= channels) return;
#pragma unroll
  for (int k = 0; k < kEntries; ++k)
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (first_entry + k >= args.taps.depth) return;
      const int of_group = (channel + e) / problem.group_results, result = (channel + e) % problem.group_results;
      const int64_t row = (slice * problem.groups + of_group) * args.taps.depth + first_entry + k;
      static_cast<A*>(args.partials)[row * problem.group_results + result] = of_thread[k * N + e][thread];
    }
}

struct SumArgs {
  const void* partials;
  int64_t count;  // elements of a slice
  int slices;
  int lanes;  // neighbouring threads that take neighbouring elements, a power of two
  Divisor results, depth, channels;
  int taps;
  void* result;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) sum_slices_kernel(const SumArgs args) {
  using A = Accumulator<T>;
  const int thread = int(threadIdx.x);
  const int64_t index = int64_t(blockIdx.x) * args.lanes + thread % args.lanes;
  __shared__ A of_thread[1][kThreads];
  const int step = kThreads / args.lanes, first = thread / args.lanes;
  const A* partial = static_cast<const A*>(args.partials) + first * args.count + index;
  A sum = 0;
  if (index < args.count)
#pragma unroll 4
    for (int slice = first; slice < args.slices; slice += step, partial += step * args.count) sum += *partial;
  of_thread[0][thread] = sum;
  add_by_halves(of_thread, args.lanes);
  if (thread >= args.lanes || index >= args.count) return;
  int64_t n = index, entry = divide_off(n, args.results);
  const int64_t group = divide_off(entry, args.depth), tap = divide_off(entry, args.channels);
  const int64_t row = (group * args.results.divisor + n) * args.channels.divisor + entry;
  static_cast<T*>(args.result)[row * args.taps + tap] = narrow<T>(of_thread[0][thread]);
}

struct PoolArgs {
  PoolProblem problem;
  Positions positions;
  Divisor channels;
  int64_t count;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) pool_kernel(const __grid_constant__ PoolArgs args) {
  int64_t channel = thread_index();
  if (channel >= args.count) return;
  const Position p = PositionsFrom(args.positions, divide_off(channel, args.channels))[0];
  const PoolShape& pool = args.problem.pool;
  const Strides4& stride = args.problem.source_stride;
  const T* const corner = static_cast<const T*>(args.problem.source) +
                          offset(stride, p.n, int(channel), p.row * int(pool.stride_h), p.col * int(pool.stride_w));
  const int width = int(pool.kernel_w);
  const auto top = maxima_of<T, 1>(int(pool.kernel_h) * width, [&](int e) {
    return load_pack<1>(corner + e / width * stride.h + e % width * stride.w);
  });
  const int64_t at = offset(args.problem.stride, p.n, int(channel), p.row, p.col);
  store_pack(static_cast<T*>(args.problem.result) + at, top.values);
  store_pack(args.problem.code + at, top.codes);
}

// ---- choices ----

int64_t size_of(DType dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

bool is_small_group(const ConvGeometry& g) { return g.groups > 1 && g.group_results < kSmallGroup; }

// Whether `count` channels, and any multiple of them, are one aligned pack.
bool in_packs(const void* data, int64_t pack_bytes, const Strides4& s, int64_t batch, int64_t rows, int64_t cols,
              int64_t channels, int64_t count) {
  return reinterpret_cast<uintptr_t>(data) % uintptr_t(pack_bytes) == 0 && s.c == 1 && channels % count == 0 &&
         (batch == 1 || s.n % count == 0) && (rows == 1 || s.h % count == 0) && (cols == 1 || s.w % count == 0);
}

Access access_to(const ConvSource& s, DType dtype, int64_t batch, int64_t channels) {
  const int64_t count = 16 / size_of(dtype), rows = s.pool_code ? s.pool.out_h : s.height,
                cols = s.pool_code ? s.pool.out_w : s.width;
  const bool masked = s.relu_output || s.pool_code;
  const auto fits = [&](const void* data, int64_t bytes, const Strides4& stride) {
    return !data || in_packs(data, bytes, stride, batch, rows, cols, channels, count);
  };
  if (!fits(s.data, 16, s.stride) || !fits(s.relu_output, 16, s.relu_stride) ||
      !fits(s.pool_code, count, s.code_stride))
    return masked ? Access::kMaskedElements : Access::kElements;
  return masked ? Access::kPacks : Access::kCopies;
}

int packed_depth(DType dtype, const ConvProblem& p) {
  const int64_t step = kStepBytes / size_of(dtype);
  return int(ceil_div(Taps(p).depth, step) * step);
}

bool is_depthwise(const ConvGeometry& g) { return g.groups > 1 && g.group_channels == 1 && g.group_results == 1; }

// The taps of a depthwise convolution, a row over all channels for each: the weight of one result of as many channels.
ConvProblem tap_rows(ConvProblem p) {
  p.weight_channel = p.weight_group;
  p.group_channels = p.groups, p.groups = 1;
  p.tf32 = false;
  return p;
}

bool takes_packs(Access access) { return access == Access::kCopies || access == Access::kPacks; }

template <class T>
cudaError_t launch_pack_weight(const ConvProblem& p, int depth, T* packed, cudaStream_t stream) {
  const int64_t count = int64_t(p.groups) * p.group_results * depth;
  return launch(pack_weight_kernel<T>, ceil_div(count, kThreads), kThreads, stream, p, Taps(p),
                Divisor(std::max(depth, 1)), Divisor(p.group_results), count, packed);
}

template <class T>
cudaError_t launch_direct_conv(DType dtype, ConvProblem p, T* packed, cudaStream_t stream) {
  const Access access = access_to(p.source, dtype, p.batch, p.groups * p.group_channels);
  const bool packs =
      is_depthwise(p) && takes_packs(access) &&
      in_packs(p.result, 16, p.result_stride, p.batch, p.result_rows, p.result_cols, p.groups, kPackElements<T>);
  if (packs) {
    const ConvProblem rows = tap_rows(p);
    const cudaError_t error = launch_pack_weight(rows, Taps(rows).depth, packed, stream);
    if (error != cudaSuccess) return error;
    p.weight = packed;
  }
  const auto run = [&](auto pack, auto masked) {
    constexpr int N = decltype(pack)::value;
    const int64_t channels = int64_t(p.groups) * p.group_results / N;
    const DirectConvArgs args{p,
                              Source(p.source),
                              Positions(p.batch, p.result_rows, ceil_div(p.result_cols, kStrip)),
                              Divisor(channels),
                              Divisor(p.group_results),
                              p.result_stride.c == 1};
    return launch(direct_conv_kernel<T, N, decltype(masked)::value>, ceil_div(args.strips.count * channels, kThreads),
                  kThreads, stream, args);
  };
  const auto with_mask = [&](auto pack) {
    return p.source.relu_output || p.source.pool_code ? run(pack, std::true_type{}) : run(pack, std::false_type{});
  };
  return packs ? with_mask(std::integral_constant<int, kPackElements<T>>{})
               : with_mask(std::integral_constant<int, 1>{});
}

// How the positions are cut, in units: positions for small groups, else steps of a tile.
struct Slices {
  int64_t count, units;
};

// most: blocks of all slices together, of which each has `blocks`.
Slices cut(int64_t units, int64_t least, int64_t most, int64_t blocks, int64_t slice_bytes) {
  int64_t slices = std::min({most / blocks, units / least, kSliceBytes / slice_bytes});
  slices = std::max({slices, ceil_div(units, kSliceUnits), int64_t(1)});
  const int64_t each = ceil_div(units, slices);
  return {ceil_div(units, each), each};
}

struct GradWeightPlan {
  GradWeightArgs args, bias_args;
  bool small_group = false, packs = false, bias_packs = false;  // packs: of channels, where a thread takes them
  Slices slices = {}, bias_slices = {};
  int64_t partial_bytes = 0, bias_bytes = 0;
};

// How many of the `threads` that all channels take lie side by side in a block.
int lanes_of(const GradWeightProblem& p, int64_t threads) {
  int lanes = 1;
  while (p.grad.stride.c == 1 && lanes < 32 && lanes < threads) lanes *= 2;
  return lanes;
}

GradWeightPlan plan(DType dtype, const GradWeightProblem& p) {
  ConvGeometry of_grad = p;
  of_grad.rows = of_grad.cols = {0, 1, 0, 1};
  of_grad.group_channels = p.group_results;
  const Positions positions(p.batch, p.result_rows, p.result_cols);
  GradWeightPlan plan{{p, Source(p.source), Source(p.grad), Taps(p), Taps(of_grad), positions, 0, nullptr},
                      {p, Source(p.source), Source(p.grad), Taps(p), Taps(of_grad), positions, 0, nullptr}};
  // The bias's gradient: one entry for each result, and no source.
  of_grad.group_channels = 1;
  plan.bias_args.taps = Taps(of_grad);
  plan.bias_args.source.data = nullptr;

  const int64_t element = size_of(dtype), accumulator = element == 8 ? 8 : 4, results = p.groups * p.group_results;
  const int64_t depth = plan.args.taps.depth;
  plan.small_group = is_small_group(p);
  plan.bias_packs = takes_packs(access_to(p.grad, dtype, p.batch, results));
  plan.packs = plan.bias_packs && is_depthwise(p) && takes_packs(access_to(p.source, dtype, p.batch, results));
  const auto direct_blocks = [&](bool packs, int64_t entries) {
    const int64_t threads = packs ? results * element / 16 : results;
    return ceil_div(threads, lanes_of(p, threads)) * ceil_div(entries, kEntries);
  };
  const int64_t columns = tile_columns(element, p.group_results);
  const int64_t tiles = p.groups * ceil_div(depth, tile_rows(element)) * ceil_div(p.group_results, columns);
  plan.slices = plan.small_group ? cut(positions.count, kSlicePositions, kGradBlocks, direct_blocks(plan.packs, depth),
                                       depth * results * accumulator)
                                 : cut(ceil_div(positions.count, kStepBytes / element), kSliceSteps,
                                       kGradTileColumns / columns, tiles, depth * results * accumulator);
  plan.args.slice_steps = int(plan.slices.units);
  plan.bias_slices =
      cut(positions.count, kSlicePositions, kGradBlocks, direct_blocks(plan.bias_packs, 1), results * accumulator);
  plan.partial_bytes = p.weight_result ? plan.slices.count * depth * results * accumulator : 0;
  plan.bias_bytes = p.bias_result ? plan.bias_slices.count * results * accumulator : 0;
  return plan;
}

template <class T>
cudaError_t launch_direct_grad_weight(const GradWeightArgs& args, const Slices& slices, bool packs,
                                      cudaStream_t stream) {
  const auto run = [&](auto kernel, int64_t threads) {
    const int lanes = lanes_of(args.problem, threads);
    return launch(kernel, slices.count * ceil_div(args.taps.depth, kEntries) * ceil_div(threads, lanes), kThreads,
                  stream, args, slices.units, lanes);
  };
  const int64_t channels = int64_t(args.problem.groups) * args.problem.group_results;
  return packs ? run(direct_grad_weight_kernel<T, kPackElements<T>>, channels / kPackElements<T>)
               : run(direct_grad_weight_kernel<T, 1>, channels);
}

template <class T>
cudaError_t launch_sum(const GradWeightArgs& args, int64_t slices, void* result, cudaStream_t stream) {
  const int64_t count = int64_t(args.problem.groups) * args.problem.group_results * args.taps.depth;
  // A thread sums four slices or more; a row of lanes reads whole sectors of 32 bytes.
  int lanes = kThreads;
  while (lanes > 8 && slices * lanes >= 8 * kThreads) lanes /= 2;
  const SumArgs sum{args.partials,
                    count,
                    int(slices),
                    lanes,
                    Divisor(args.problem.group_results),
                    Divisor(args.taps.depth),
                    Divisor(args.taps.channels),
                    args.taps.depth / args.taps.channels,
                    result};
  return launch(sum_slices_kernel<T>, ceil_div(count, lanes), kThreads, stream, sum);
}

}  // namespace

bool pools_results(DType dtype, const ConvProblem& p) {
  return !is_small_group(p) && p.pool.stride_h >= p.pool.kernel_h && p.pool.stride_w >= p.pool.kernel_w &&
         p.pool.kernel_h * p.pool.kernel_w <= tile_rows(size_of(dtype));
}

int64_t conv_scratch_bytes(DType dtype, const ConvProblem& p) {
  if (is_small_group(p) && !is_depthwise(p)) return 0;
  const int64_t depth = is_depthwise(p) ? Taps(p).depth : packed_depth(dtype, p);
  return int64_t(p.groups) * p.group_results * depth * size_of(dtype);
}

cudaError_t launch_conv(DType dtype, const ConvProblem& p, void* scratch, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    if (is_small_group(p)) return launch_direct_conv(dtype, p, static_cast<T*>(scratch), stream);
    const int64_t rows = p.pool_code ? p.pool.out_h : p.result_rows, cols = p.pool_code ? p.pool.out_w : p.result_cols;
    ConvArgs args{p, Source(p.source), Taps(p), Positions(p.batch, rows, cols), scratch, packed_depth(dtype, p)};
    if (p.pool_code) {
      args.window = Divisor(p.pool.kernel_h * p.pool.kernel_w);
      args.window_cols = Divisor(p.pool.kernel_w);
    }
    args.tile_rows = Divisor(tile_rows(sizeof(T)) / args.window.divisor);
    constexpr int N = kPackElements<T>;
    args.in_packs = in_packs(p.result, 16, p.result_stride, p.batch, rows, cols, p.group_results, N) &&
                    in_packs(p.pool_code, N, p.result_stride, p.batch, rows, cols, p.group_results, N);
    const cudaError_t error = launch_pack_weight(p, args.packed_depth, static_cast<T*>(scratch), stream);
    if (error != cudaSuccess) return error;
    return launch_conv_tiles<T>(args, access_to(p.source, dtype, p.batch, p.group_channels), stream);
  });
}

cudaError_t launch_pool(DType dtype, const PoolProblem& p, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    const Positions positions(p.batch, p.pool.out_h, p.pool.out_w);
    const PoolArgs args{p, positions, Divisor(p.channels), positions.count * p.channels};
    return launch(pool_kernel<decltype(element)>, ceil_div(args.count, kThreads), kThreads, stream, args);
  });
}

int64_t grad_weight_scratch_bytes(DType dtype, const GradWeightProblem& p) {
  const GradWeightPlan of = plan(dtype, p);
  return of.partial_bytes + of.bias_bytes;
}

cudaError_t launch_grad_weight(DType dtype, const GradWeightProblem& p, void* scratch, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    GradWeightPlan of = plan(dtype, p);
    of.args.partials = scratch;
    of.bias_args.partials = static_cast<char*>(scratch) + of.partial_bytes;
    cudaError_t error = cudaSuccess;
    if (p.weight_result) {
      const Access access = access_to(p.source, dtype, p.batch, p.group_channels);
      const bool grad_packs = takes_packs(access_to(p.grad, dtype, p.batch, p.group_results));
      error = of.small_group ? launch_direct_grad_weight<T>(of.args, of.slices, of.packs, stream)
                             : launch_grad_weight_tiles<T>(of.args, of.slices.count, access, grad_packs, stream);
      if (error == cudaSuccess) error = launch_sum<T>(of.args, of.slices.count, p.weight_result, stream);
    }
    if (p.bias_result && error == cudaSuccess) {
      error = launch_direct_grad_weight<T>(of.bias_args, of.bias_slices, of.bias_packs, stream);
      if (error == cudaSuccess) error = launch_sum<T>(of.bias_args, of.bias_slices.count, p.bias_result, stream);
    }
    return error;
  });
}

}  // namespace fastnn::cuda

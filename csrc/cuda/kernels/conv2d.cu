// The convolutions' launchers: which kernels a problem takes; and the kernels beside the matrix products of
// conv2d_gemm.h.
//
// pack_weight_kernel             the weight as rows over (tap, channel), so that its tiles come by 16-byte copies
// whatever
//                                its strides: 2 * weight bytes.
// direct_conv_kernel             groups of few results, which would leave most of a tile idle: a thread a result, every
//                                operand from the caches. 2 operations and two loads a product; memory-bound where taps
//                                are few. What lies in the padding is left out, not multiplied.
// direct_grad_weight_kernel      the same of the weight's gradient: a block sums one product over a slice of positions,
//                                or, of 32 neighbouring channels, 32 of them. Without a source, the bias's gradient.
// sum_slices_kernel              adds what blocks summed over slices of the positions, in order: shape alone decides
// how
//                                many, so the bits are the same every time.
// pool_kernel                    max-pools results that lie in memory, where windows overlap or are larger than a tile.
#include "cuda/kernels/conv2d.h"

#include <algorithm>

#include "cuda/kernels/conv2d_gemm.h"

namespace fastnn::cuda {

FASTNN_CONV_TILES(extern, double)
FASTNN_CONV_TILES(extern, float)
FASTNN_CONV_TILES(extern, bf16)
FASTNN_CONV_TILES(extern, f16)

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSmallGroup = 16;  // results of a group that a tile is too wide for
// The weight's gradient: blocks enough for the largest GPUs, of so many steps (a small group's: positions) at the
// least, and memory for all the slices.
constexpr int64_t kGradBlocks = 512, kSliceSteps = 8, kSlicePositions = 256, kSliceBytes = int64_t(64) << 20;
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
  packed[index] = value;
}

struct DirectConvArgs {
  ConvProblem problem;
  Source source;
  Positions positions;
  Divisor channels, group_results;
  bool by_channel;  // the order of threads: as results lie in memory
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) direct_conv_kernel(const __grid_constant__ DirectConvArgs args) {
  const ConvProblem& problem = args.problem;
  int64_t index = thread_index(), channel;
  if (args.by_channel) {
    const int64_t position = divide_off(index, args.channels);
    channel = index, index = position;
  } else {
    channel = divide_off(index, args.positions.plane);
    index += divide_off(channel, args.channels) * args.positions.plane.divisor;
  }
  const Position p = PositionsFrom(args.positions, index)[0];
  if (p.n < 0) return;
  int64_t result = channel;
  const int64_t group = divide_off(result, args.group_results);
  const T* const weight =
      static_cast<const T*>(problem.weight) + group * problem.weight_group + result * problem.weight_result;
  Accumulator<T> sum = 0;
  for (int i = 0; i < problem.rows.taps; ++i)
    for (int j = 0; j < problem.cols.taps; ++j) {
      const int row = problem.rows.first + p.row * problem.rows.step + i * problem.rows.tap;
      const int col = problem.cols.first + p.col * problem.cols.step + j * problem.cols.tap;
      if (!args.source.has(row, col)) continue;
      for (int c = 0; c < problem.group_channels; ++c) {
        const int source_channel = int(group) * problem.group_channels + c;
        const T x = load_pixel<T, 1, false, true>(args.source, p.n, source_channel, row, col).values[0];
        sum += widen(x) * widen(weight[c * problem.weight_channel + i * problem.weight_row + j * problem.weight_col]);
      }
    }
  if (problem.bias) sum += widen(static_cast<const T*>(problem.bias)[channel * problem.bias_stride]);
  if (problem.relu && sum < 0) sum = 0;
  static_cast<T*>(problem.result)[offset(problem.result_stride, p.n, int(channel), p.row, p.col)] = narrow<T>(sum);
}

// Without data the source is 1 wherever the gradient is.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    direct_grad_weight_kernel(const __grid_constant__ GradWeightArgs args, int64_t slice_positions, bool by_channel) {
  using A = Accumulator<T>;
  const GradWeightProblem& problem = args.problem;
  const int channels = problem.groups * problem.group_results, lane = int(threadIdx.x) % 32;
  const unsigned channel_blocks = unsigned(by_channel ? (channels + 31) / 32 : channels);
  const int channel = int(blockIdx.x % channel_blocks) * (by_channel ? 32 : 1) + (by_channel ? lane : 0);
  const unsigned rest = blockIdx.x / channel_blocks;
  const int entry = int(rest % unsigned(args.taps.depth));
  const int64_t slice = rest / unsigned(args.taps.depth);
  const int group = channel / problem.group_results;
  const Entry e = entry_of(args.taps, entry);

  const int64_t first = slice * slice_positions, last = first + slice_positions;
  const int64_t end = last < args.positions.count ? last : args.positions.count;
  const PositionsFrom positions(args.positions, first);
  const int count = int(end - first), step = by_channel ? kWarps : kThreads;
  A sum = 0;
  for (int i = int(threadIdx.x) / (by_channel ? 32 : 1); channel < channels && i < count; i += step) {
    const Position p = positions[i];
    const A grad = widen(load_pixel<T, 1, false, true>(args.grad, p.n, channel, p.row, p.col).values[0]);
    if (!args.source.data) {
      sum += grad;
      continue;
    }
    const int row = args.taps.rows.first + p.row * args.taps.rows.step + e.i * args.taps.rows.tap;
    const int col = args.taps.cols.first + p.col * args.taps.cols.step + e.j * args.taps.cols.tap;
    if (!args.source.has(row, col)) continue;
    const int source_channel = group * problem.group_channels + e.channel;
    sum += grad * widen(load_pixel<T, 1, false, false>(args.source, p.n, source_channel, row, col).values[0]);
  }

  __shared__ A of_warp[kWarps][32];
  if (!by_channel)
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  of_warp[threadIdx.x / 32][lane] = sum;
  __syncthreads();
  if (int(threadIdx.x) >= (by_channel ? 32 : 1) || channel >= channels) return;
  for (int w = 1; w < kWarps; ++w) sum += of_warp[w][lane];
  const int64_t row = (slice * problem.groups + group) * args.taps.depth + entry;
  static_cast<A*>(args.partials)[row * problem.group_results + channel % problem.group_results] = sum;
}

struct SumArgs {
  const void* partials;
  int64_t slices, count;  // elements of one
  Divisor results, depth, channels;
  int taps;
  void* result;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) sum_slices_kernel(const SumArgs args) {
  const int64_t index = thread_index();
  if (index >= args.count) return;
  const auto* partial = static_cast<const Accumulator<T>*>(args.partials) + index;
  Accumulator<T> sum = *partial;
  for (int64_t slice = 1; slice < args.slices; ++slice) sum += partial[slice * args.count];
  int64_t n = index, entry = divide_off(n, args.results);
  const int64_t group = divide_off(entry, args.depth), tap = divide_off(entry, args.channels);
  const int64_t row = (group * args.results.divisor + n) * args.channels.divisor + entry;
  static_cast<T*>(args.result)[row * args.taps + tap] = narrow<T>(sum);
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
  const auto top = maximum_of<Accumulator<T>>(
      int(pool.kernel_h) * width, [&](int e) { return widen(corner[e / width * stride.h + e % width * stride.w]); });
  const int64_t at = offset(args.problem.stride, p.n, int(channel), p.row, p.col);
  static_cast<T*>(args.problem.result)[at] = narrow<T>(top.value);
  args.problem.code[at] = top.code;
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

template <class T>
cudaError_t launch_direct_conv(const ConvProblem& p, cudaStream_t stream) {
  const DirectConvArgs args{p,
                            Source(p.source),
                            Positions(p.batch, p.result_rows, p.result_cols),
                            Divisor(p.groups * p.group_results),
                            Divisor(p.group_results),
                            p.result_stride.c == 1};
  return launch(direct_conv_kernel<T>, ceil_div(args.positions.count * p.groups * p.group_results, kThreads), kThreads,
                stream, args);
}

// How the positions are cut, in units: positions for small groups, else steps of a tile.
struct Slices {
  int64_t count, units;
};

Slices cut(int64_t units, int64_t least, int64_t blocks, int64_t slice_bytes) {
  int64_t slices = std::min({ceil_div(kGradBlocks, blocks), units / least, kSliceBytes / slice_bytes});
  slices = std::max(slices, ceil_div(units, kSliceUnits));
  const int64_t each = ceil_div(units, slices);
  return {ceil_div(units, each), each};
}

struct GradWeightPlan {
  GradWeightArgs args, bias_args;
  bool small_group = false, by_channel = false;
  Slices slices = {}, bias_slices = {};
  int64_t partial_bytes = 0, bias_bytes = 0;
};

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
  plan.by_channel = p.grad.stride.c == 1;
  const int64_t channel_blocks = plan.by_channel ? ceil_div(results, 32) : results;
  const int64_t tiles = p.groups * ceil_div(depth, tile_rows(element)) *
                        ceil_div(p.group_results, tile_columns(element, p.group_results));
  plan.slices =
      plan.small_group
          ? cut(positions.count, kSlicePositions, channel_blocks * depth, depth * results * accumulator)
          : cut(ceil_div(positions.count, kStepBytes / element), kSliceSteps, tiles, depth * results * accumulator);
  plan.args.slice_steps = int(plan.slices.units);
  plan.bias_slices = cut(positions.count, kSlicePositions, channel_blocks, results * accumulator);
  plan.partial_bytes = p.weight_result ? plan.slices.count * depth * results * accumulator : 0;
  plan.bias_bytes = p.bias_result ? plan.bias_slices.count * results * accumulator : 0;
  return plan;
}

template <class T>
cudaError_t launch_direct_grad_weight(const GradWeightArgs& args, const Slices& slices, bool by_channel,
                                      cudaStream_t stream) {
  const int64_t channels = args.problem.groups * args.problem.group_results;
  return launch(direct_grad_weight_kernel<T>,
                slices.count * args.taps.depth * (by_channel ? ceil_div(channels, 32) : channels), kThreads, stream,
                args, slices.units, by_channel);
}

template <class T>
cudaError_t launch_sum(const GradWeightArgs& args, int64_t slices, void* result, cudaStream_t stream) {
  const int64_t count = int64_t(args.problem.groups) * args.problem.group_results * args.taps.depth;
  const SumArgs sum{args.partials,
                    slices,
                    count,
                    Divisor(args.problem.group_results),
                    Divisor(args.taps.depth),
                    Divisor(args.taps.channels),
                    args.taps.depth / args.taps.channels,
                    result};
  return launch(sum_slices_kernel<T>, ceil_div(count, kThreads), kThreads, stream, sum);
}

}  // namespace

bool pools_results(DType dtype, const ConvProblem& p) {
  return !is_small_group(p) && p.pool.stride_h >= p.pool.kernel_h && p.pool.stride_w >= p.pool.kernel_w &&
         p.pool.kernel_h * p.pool.kernel_w <= tile_rows(size_of(dtype));
}

int64_t conv_scratch_bytes(DType dtype, const ConvProblem& p) {
  return is_small_group(p) ? 0 : int64_t(p.groups) * p.group_results * packed_depth(dtype, p) * size_of(dtype);
}

cudaError_t launch_conv(DType dtype, const ConvProblem& p, void* scratch, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    if (is_small_group(p)) return launch_direct_conv<T>(p, stream);
    const int64_t rows = p.pool_code ? p.pool.out_h : p.result_rows, cols = p.pool_code ? p.pool.out_w : p.result_cols;
    ConvArgs args{p, Source(p.source), Taps(p), Positions(p.batch, rows, cols), scratch, packed_depth(dtype, p)};
    if (p.pool_code) {
      args.window = Divisor(p.pool.kernel_h * p.pool.kernel_w);
      args.window_cols = Divisor(p.pool.kernel_w);
      args.tile_windows = tile_rows(sizeof(T)) / int(args.window.divisor);
    }
    args.channels_adjacent =
        in_packs(p.result, 16, p.result_stride, p.batch, rows, cols, p.group_results, kPackElements<T>);
    const int64_t count = int64_t(p.groups) * p.group_results * args.packed_depth;
    const cudaError_t error =
        launch(pack_weight_kernel<T>, ceil_div(count, kThreads), kThreads, stream, p, args.taps,
               Divisor(std::max(args.packed_depth, 1)), Divisor(p.group_results), count, static_cast<T*>(scratch));
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
      const Access to_grad = access_to(p.grad, dtype, p.batch, p.group_results);
      const bool packs = access_to(p.source, dtype, p.batch, p.group_channels) == Access::kCopies &&
                         (to_grad == Access::kCopies || to_grad == Access::kPacks);
      error = of.small_group ? launch_direct_grad_weight<T>(of.args, of.slices, of.by_channel, stream)
                             : launch_grad_weight_tiles<T>(of.args, of.slices.count, packs, stream);
      if (error == cudaSuccess) error = launch_sum<T>(of.args, of.slices.count, p.weight_result, stream);
    }
    if (p.bias_result && error == cudaSuccess) {
      error = launch_direct_grad_weight<T>(of.bias_args, of.bias_slices, of.by_channel, stream);
      if (error == cudaSuccess) error = launch_sum<T>(of.bias_args, of.bias_slices.count, p.bias_result, stream);
    }
    return error;
  });
}

}  // namespace fastnn::cuda

// Cross-entropy of logits x against a target, and its gradient.
//
// With a_c the weight the target gives to class c, A = sum a_c, m = max x_c and S = sum e^(x_c - m), a row's
//   loss      = sum a_c (m + log S - x_c)         = A log S - sum a_c (x_c - m)
//   gradient  = g (A e^(x_c - m) / S - a_c)         of x_c, g being the gradient of the row's loss.
// A class index t gives a_t = (1 - label_smoothing) w_t and, smoothed, label_smoothing / C * w_c more to every class;
// probabilities q_c give ((1 - label_smoothing) q_c + label_smoothing / C) w_c.
//
// Blocking, rows layout: a group of 8, 32 or 256 threads takes one segment, all of a row of up to kSegment classes or
// that many of a longer one, in packs of 16 bytes of which kUnroll are in flight; the few elements before the row's
// first 16-byte boundary and behind its last go one by one. Each thread keeps a running maximum and sum (raised at most
// once in kUnroll packs), the group merges them, and a second kernel merges the segments of long rows in order. So a
// row's result depends on nothing but the row.
// Columns layout: a warp's lanes take neighbouring rows, a pack of them each where they are aligned, of kUnroll classes
// at a time, and eight warps share the classes where there are many.
// Bytes: forward reads the logits once and keeps three values a row; backward reads them once and writes as much. Per
// logit one e^x (a subtraction, a multiplication, a special-function operation) and an addition: memory-bound.
// Only e^(x - m) <= 1 is ever formed, and in A, as is A e^(x - m) / S - a_c: that, not the softmax, is rounded to T.
#include "cuda/kernels/cross_entropy.h"

#include <type_traits>

#include "cuda/kernels/launch.h"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr int kSegment = 16 * 1024;  // classes; 32 KiB of bf16
constexpr int kNarrow = 64;          // classes of a row at most, for a group of 8 threads
constexpr int kMiddle = 1024;        // for a warp
constexpr int kManyClasses = 64;     // columns layout: from here on eight warps share them
constexpr int kColumnWarps = 8;
constexpr int kColumnClasses = 128;  // that a block writes the gradient of
constexpr int kRowChunk = 8 * 1024;  // rows that a block adds up

constexpr unsigned kAllLanes = ~0u;

// ---- running sums ----

template <class A>
__device__ A minus_infinity() {
  return -A(INFINITY);
}

// What is subtracted from the logits. Not a maximum of -inf, which would make -inf - -inf = NaN of a part of the row
// that merely has nothing in it.
template <class A>
__device__ A reference(A max) {
  return max == minus_infinity<A>() ? A(0) : max;
}

// Sums over some of a row's classes; weight and dot stay 0 for a target that is only an index.
template <class A>
struct RowSums {
  A max;     // of x_c
  A sum;     // of e^(x_c - reference(max))
  A weight;  // of a_c
  A dot;     // of a_c (x_c - reference(max))
};

template <class A>
__device__ RowSums<A> nothing() {
  return {minus_infinity<A>(), 0, 0, 0};
}

template <class A>
__device__ void raise(RowSums<A>& sums, A max) {
  if (!(max > sums.max)) return;
  const A shift = reference(sums.max) - max;
  if (sums.max != minus_infinity<A>()) sums.sum *= exp_nonpositive(shift);
  sums.dot += sums.weight * shift;
  sums.max = max;
}

template <bool kWeighted, class A>
__device__ void add(RowSums<A>& sums, A x, A a) {
  const A below = x - reference(sums.max);
  sums.sum += exp_nonpositive(below);
  if (kWeighted) {
    sums.weight += a;
    sums.dot += a * below;
  }
}

template <class A>
__device__ RowSums<A> merge(RowSums<A> a, RowSums<A> b) {
  raise(a, b.max);
  raise(b, a.max);
  return {a.max, a.sum + b.sum, a.weight + b.weight, a.dot + b.dot};
}

// Of groups of `kLanes` neighbouring lanes, in each of their lanes.
template <int kLanes, bool kWeighted, class A>
__device__ RowSums<A> merge_lanes(RowSums<A> sums) {
  A max = sums.max;
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, max, distance);
    max = other > max ? other : max;
  }
  raise(sums, max);
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    sums.sum += __shfl_xor_sync(kAllLanes, sums.sum, distance);
    if (kWeighted) {
      sums.weight += __shfl_xor_sync(kAllLanes, sums.weight, distance);
      sums.dot += __shfl_xor_sync(kAllLanes, sums.dot, distance);
    }
  }
  return sums;
}

// ---- what a target gives to a class ----

template <class T, class A = Accumulator<T>>
__device__ A weight_of(const CrossEntropyArgs& args, int64_t c) {
  return args.weight ? static_cast<const A*>(args.weight)[c] : A(1);
}

// a_c without the true class's own share; q is the probability, 0 if the target is an index.
template <class T, class A = Accumulator<T>>
__device__ A class_weight(const CrossEntropyArgs& args, int64_t c, A q) {
  return (q * A(args.keep) + A(args.uniform)) * weight_of<T>(args, c);
}

__device__ inline bool is_ignored(const CrossEntropyArgs& args, int64_t row) {
  return args.index && args.index[row] == args.ignore_index;
}

// The kernels check their rows' indices before anything else, while there is nothing in registers to be kept.
__device__ inline void check_index(const CrossEntropyArgs& args, int64_t row) {
  if (!args.index || row < 0 || row >= args.rows) return;
  const int64_t target = args.index[row];
  FASTNN_DEVICE_ASSERT(target == args.ignore_index || (target >= 0 && target < args.classes));
}

// Writes what forward keeps of a row; logits: of its class 0.
template <bool kWeighted, class T, class A = Accumulator<T>>
__device__ void finish_row(const CrossEntropyArgs& args, int64_t row, RowSums<A> sums, const T* logits,
                           int64_t class_stride) {
  const bool ignored = is_ignored(args, row);
  if (ignored) sums = {0, 1, 0, 0};
  // Nothing but -inf has no softmax.
  const A sum = sums.max == minus_infinity<A>() ? A(NAN) : sums.sum, log_sum = log(sum);
  A loss = kWeighted ? sums.weight * log_sum - sums.dot : A(0), true_weight = 0;
  if (args.index && !ignored) {
    const int64_t target = args.index[row];
    true_weight = A(args.keep) * weight_of<T>(args, target);
    loss += true_weight * ((sums.max - widen(logits[target * class_stride])) + log_sum);
  }
  A* stats = static_cast<A*>(args.row_stats);
  stats[row] = sums.max;
  stats[row + args.rows] = sum;
  stats[row + 2 * args.rows] = sums.weight + true_weight;
  static_cast<A*>(args.loss)[row] = loss;
}

// What the gradient of a row's logits is made of: scale e^(x_c - max) - grad a_c, and - true_grad more at the index.
template <class A>
struct RowGradient {
  bool ignored;
  int64_t target;  // -1 for probabilities
  A max, scale, grad, true_grad;

  template <class T>
  __device__ static RowGradient of(const CrossEntropyArgs& args, const A* total_weight, int64_t row) {
    if (is_ignored(args, row)) return {true, -1, 0, 0, 0, 0};
    const A* stats = static_cast<const A*>(args.row_stats);
    A grad = static_cast<const A*>(args.grad_rows)[args.grad_per_row ? row : 0];
    if (total_weight) grad /= *total_weight;
    const int64_t target = args.index ? args.index[row] : -1;
    return {false,      target,
            stats[row], grad * (stats[row + 2 * args.rows] / stats[row + args.rows]),
            grad,       target < 0 ? A(0) : grad * (A(args.keep) * weight_of<T>(args, target))};
  }

  template <bool kWeighted, class T>
  __device__ T operator()(const CrossEntropyArgs& args, int64_t c, T x, A q) const {
    A value = exp_nonpositive(widen(x) - max) * scale;
    if (kWeighted) value -= grad * class_weight<T>(args, c, q);
    if (c == target) value -= true_grad;
    return narrow<T>(ignored ? A(0) : value);
  }
};

// ---- rows layout ----

// One group's share of the classes: `classes` of row `row` from `first` on.
struct Segment {
  int64_t row, first;
  int classes;
};

// No row where there is none left for the group.
template <int kGroup>
__device__ Segment segment_of_group(const CrossEntropyArgs& args, int64_t segments) {
  const int64_t unit = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kGroup;
  const int64_t row = segments == 1 ? unit : unit / segments, first = (unit - row * segments) * kSegment;
  if (row >= args.rows) return {-1, 0, 0};
  const int64_t left = args.classes - first;
  return {row, first, int(left < kSegment ? left : kSegment)};
}

template <class T>
__device__ T* segment_start(const ClassArray& array, const Segment& segment) {
  return static_cast<T*>(array.data) + segment.row * array.outer_stride + segment.first;
}

__device__ inline int misalignment(const void* p) { return int(reinterpret_cast<uintptr_t>(p) % 16); }

// Calls packs(c, std::integral_constant<int, n>) for classes c, c + kGroup * N, .. of n packs, and single(c) for those
// that are in none. `together`: whether a pack of every operand begins where one of x does.
template <int kGroup, class T, class Packs, class Single>
__device__ void for_each_class(const T* x, int classes, bool together, const Packs& packs, const Single& single) {
  constexpr int N = kPackElements<T>, kStep = kGroup * N;
  const int lane = int(threadIdx.x) % kGroup;
  int begin = (16 - misalignment(x)) % 16 / int(sizeof(T));
  if (!together || begin > classes) begin = classes;
  const int end = begin + (classes - begin) / N * N;
  for (int c = lane; c < begin; c += kGroup) single(c);
  int c = begin + lane * N;
  for (; c + (kUnroll - 1) * kStep < end; c += kUnroll * kStep) packs(c, std::integral_constant<int, kUnroll>{});
  for (; c < end; c += kStep) packs(c, std::integral_constant<int, 1>{});
  for (c = end + lane; c < classes; c += kGroup) single(c);
}

template <class T, bool kWeighted, int kGroup>
__global__ void __launch_bounds__(kThreads)
    forward_rows_kernel(const CrossEntropyArgs args, int64_t segments, RowSums<Accumulator<T>>* partials) {
  using A = Accumulator<T>;
  constexpr int N = kPackElements<T>, kStep = kGroup * N;
  const Segment segment = segment_of_group<kGroup>(args, segments);
  check_index(args, segment.row);
  RowSums<A> sums = nothing<A>();
  if (segment.row >= 0 && !is_ignored(args, segment.row)) {
    const T* x = segment_start<T>(args.logits, segment);
    const T* q = args.index ? nullptr : segment_start<T>(args.probabilities, segment);
    const auto add_packs = [&](int c, auto count) {
      Pack<T, N> v[count], p[count];
#pragma unroll
      for (int u = 0; u < count; ++u) {
        v[u] = load_pack<N>(x + c + u * kStep);
        if (kWeighted && q) p[u] = load_pack<N>(q + c + u * kStep);
      }
      A max = sums.max;
#pragma unroll
      for (int u = 0; u < count; ++u)
#pragma unroll
        for (int i = 0; i < N; ++i) max = widen(v[u].values[i]) > max ? widen(v[u].values[i]) : max;
      raise(sums, max);
#pragma unroll
      for (int u = 0; u < count; ++u)
#pragma unroll
        for (int i = 0; i < N; ++i) {
          A a = 0;
          if (kWeighted) a = class_weight<T>(args, segment.first + c + u * kStep + i, q ? widen(p[u].values[i]) : A(0));
          add<kWeighted>(sums, widen(v[u].values[i]), a);
        }
    };
    const auto add_single = [&](int c) {
      A a = 0;
      if (kWeighted) a = class_weight<T>(args, segment.first + c, q ? widen(q[c]) : A(0));
      raise(sums, widen(x[c]));
      add<kWeighted>(sums, widen(x[c]), a);
    };
    for_each_class<kGroup>(x, segment.classes, !q || misalignment(q) == misalignment(x), add_packs, add_single);
  }
  sums = merge_lanes < kGroup<32 ? kGroup : 32, kWeighted>(sums);
  if constexpr (kGroup > 32) {
    constexpr int kWarps = kGroup / 32;
    __shared__ RowSums<A> of_warp[kWarps];
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sums;
    __syncthreads();
    sums = merge_lanes<kWarps, kWeighted>(of_warp[threadIdx.x % kWarps]);
  }
  if (segment.row < 0 || threadIdx.x % kGroup != 0) return;
  if (segments == 1)
    finish_row<kWeighted>(args, segment.row, sums, segment_start<T>(args.logits, segment), 1);
  else
    partials[segment.row * segments + segment.first / kSegment] = sums;
}

template <class T, bool kWeighted>
__global__ void __launch_bounds__(kThreads)
    merge_segments_kernel(const CrossEntropyArgs args, int64_t segments, const RowSums<Accumulator<T>>* partials) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= args.rows) return;
  auto sums = partials[row * segments];
  for (int64_t s = 1; s < segments; ++s) sums = merge(sums, partials[row * segments + s]);
  finish_row<kWeighted>(args, row, sums, segment_start<T>(args.logits, {row, 0, 0}), 1);
}

template <class T, bool kWeighted, int kGroup>
__global__ void __launch_bounds__(kThreads)
    backward_rows_kernel(const CrossEntropyArgs args, int64_t segments, const Accumulator<T>* total_weight) {
  using A = Accumulator<T>;
  constexpr int N = kPackElements<T>, kStep = kGroup * N;
  const Segment segment = segment_of_group<kGroup>(args, segments);
  check_index(args, segment.row);
  if (segment.row < 0) return;
  const T* x = segment_start<T>(args.logits, segment);
  const T* q = args.index ? nullptr : segment_start<T>(args.probabilities, segment);
  T* grad_x = segment_start<T>(args.grad_input, segment);
  const auto gradient = RowGradient<A>::template of<T>(args, total_weight, segment.row);
  const auto write_packs = [&](int c, auto count) {
    Pack<T, N> v[count], p[count];
#pragma unroll
    for (int u = 0; u < count; ++u) {
      v[u] = load_pack<N>(x + c + u * kStep);
      if (kWeighted && q) p[u] = load_pack<N>(q + c + u * kStep);
    }
#pragma unroll
    for (int u = 0; u < count; ++u) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        v[u].values[i] = gradient.template operator()<kWeighted>(
            args, segment.first + c + u * kStep + i, v[u].values[i], kWeighted && q ? widen(p[u].values[i]) : A(0));
      store_pack(grad_x + c + u * kStep, v[u]);
    }
  };
  const auto write_single = [&](int c) {
    grad_x[c] =
        gradient.template operator()<kWeighted>(args, segment.first + c, x[c], kWeighted && q ? widen(q[c]) : A(0));
  };
  const bool together = misalignment(grad_x) == misalignment(x) && (!q || misalignment(q) == misalignment(x));
  for_each_class<kGroup>(x, segment.classes, together, write_packs, write_single);
}

// ---- columns layout ----

// The first of the N neighbouring rows of this thread.
template <int N>
__device__ int64_t column_row(int64_t tile) {
  return (tile * blockDim.x + threadIdx.x) * N;
}

template <class T>
__device__ T* column_start(const CrossEntropyArgs& args, const ClassArray& array, int64_t row) {
  return static_cast<T*>(array.data) + row / args.inner * array.outer_stride + row % args.inner;
}

template <class T, bool kWeighted, int N>
__global__ void __launch_bounds__(kThreads) forward_columns_kernel(const CrossEntropyArgs args) {
  using A = Accumulator<T>;
  constexpr int kSharedLanes = 32;  // of a block with more than one warp for its classes
  const int64_t row = column_row<N>(blockIdx.x), stride = args.logits.class_stride;
  const bool exists = row < args.rows;
#pragma unroll
  for (int i = 0; i < N; ++i) check_index(args, row + i);
  const T* x = exists ? column_start<T>(args, args.logits, row) : nullptr;
  const T* q = exists && !args.index ? column_start<T>(args, args.probabilities, row) : nullptr;
  RowSums<A> sums[N];
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i] = nothing<A>();
  const auto add_classes = [&](int64_t c, auto count) {
    Pack<T, N> v[count], p[count];
#pragma unroll
    for (int u = 0; u < count; ++u) {
      v[u] = load_pack<N>(x + (c + u * blockDim.y) * stride);
      if (kWeighted && q) p[u] = load_pack<N>(q + (c + u * blockDim.y) * args.probabilities.class_stride);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      A max = sums[i].max;
#pragma unroll
      for (int u = 0; u < count; ++u) max = widen(v[u].values[i]) > max ? widen(v[u].values[i]) : max;
      raise(sums[i], max);
#pragma unroll
      for (int u = 0; u < count; ++u) {
        A a = 0;
        if (kWeighted) a = class_weight<T>(args, c + u * blockDim.y, q ? widen(p[u].values[i]) : A(0));
        add<kWeighted>(sums[i], widen(v[u].values[i]), a);
      }
    }
  };
  if (exists) {
    int64_t c = threadIdx.y;
    for (; c + (kUnroll - 1) * blockDim.y < args.classes; c += kUnroll * blockDim.y)
      add_classes(c, std::integral_constant<int, kUnroll>{});
    for (; c < args.classes; c += blockDim.y) add_classes(c, std::integral_constant<int, 1>{});
  }
  if (blockDim.y > 1) {
    __shared__ RowSums<A> of_warp[kColumnWarps][N][kSharedLanes];
#pragma unroll
    for (int i = 0; i < N; ++i) of_warp[threadIdx.y][i][threadIdx.x] = sums[i];
    __syncthreads();
    if (threadIdx.y > 0) return;
    for (int w = 1; w < kColumnWarps; ++w)
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] = merge(sums[i], of_warp[w][i][threadIdx.x]);
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (exists) finish_row<kWeighted>(args, row + i, sums[i], x + i, stride);
}

template <class T, bool kWeighted, int N>
__global__ void __launch_bounds__(kThreads)
    backward_columns_kernel(const CrossEntropyArgs args, int64_t class_chunks, const Accumulator<T>* total_weight) {
  using A = Accumulator<T>;
  const int64_t tile = blockIdx.x / class_chunks, chunk = blockIdx.x % class_chunks, row = column_row<N>(tile);
  if (row >= args.rows) return;
#pragma unroll
  for (int i = 0; i < N; ++i) check_index(args, row + i);
  const T* x = column_start<T>(args, args.logits, row);
  const T* q = args.index ? nullptr : column_start<T>(args, args.probabilities, row);
  T* grad_x = column_start<T>(args, args.grad_input, row);
  RowGradient<A> gradients[N];
#pragma unroll
  for (int i = 0; i < N; ++i) gradients[i] = RowGradient<A>::template of<T>(args, total_weight, row + i);
  const int64_t first = chunk * kColumnClasses, last = first + kColumnClasses;
  const int64_t end = last < args.classes ? last : args.classes;
  const auto write_classes = [&](int64_t c, auto count) {
    Pack<T, N> v[count], p[count];
#pragma unroll
    for (int u = 0; u < count; ++u) {
      v[u] = load_pack<N>(x + (c + u * blockDim.y) * args.logits.class_stride);
      if (kWeighted && q) p[u] = load_pack<N>(q + (c + u * blockDim.y) * args.probabilities.class_stride);
    }
#pragma unroll
    for (int u = 0; u < count; ++u) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        v[u].values[i] = gradients[i].template operator()<kWeighted>(args, c + u * blockDim.y, v[u].values[i],
                                                                     kWeighted && q ? widen(p[u].values[i]) : A(0));
      store_pack(grad_x + (c + u * blockDim.y) * args.grad_input.class_stride, v[u]);
    }
  };
  int64_t c = first + threadIdx.y;
  for (; c + (kUnroll - 1) * blockDim.y < end; c += kUnroll * blockDim.y)
    write_classes(c, std::integral_constant<int, kUnroll>{});
  for (; c < end; c += blockDim.y) write_classes(c, std::integral_constant<int, 1>{});
}

// ---- totals over the rows ----

struct Totals {
  double loss, weight;
};

__device__ Totals add_lanes(Totals totals) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    totals.loss += __shfl_xor_sync(kAllLanes, totals.loss, distance);
    totals.weight += __shfl_xor_sync(kAllLanes, totals.weight, distance);
  }
  return totals;
}

// Of a block, in thread 0; both threads and blocks add in an order that only the number of rows decides.
__device__ Totals add_threads(Totals totals) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Totals of_warp[kWarps];
  totals = add_lanes(totals);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = totals;
  __syncthreads();
  return add_lanes(threadIdx.x < kWarps ? of_warp[threadIdx.x] : Totals{0, 0});
}

template <class T>
__device__ void write_totals(const Totals& totals, Reduction reduction, Accumulator<T>* total_weight, T* output) {
  *total_weight = Accumulator<T>(totals.weight);
  if (output) *output = narrow<T>(Accumulator<T>(reduction == kMean ? totals.loss / totals.weight : totals.loss));
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_rows_kernel(const CrossEntropyArgs args, Reduction reduction,
                                                            Totals* partials, Accumulator<T>* total_weight, T* output) {
  const int64_t first = int64_t(blockIdx.x) * kRowChunk, last = first + kRowChunk;
  const int64_t end = last < args.rows ? last : args.rows;
  Totals totals = {0, 0};
  for (int64_t row = first + threadIdx.x; row < end; row += kThreads) {
    totals.loss += static_cast<const Accumulator<T>*>(args.loss)[row];
    if (!is_ignored(args, row)) totals.weight += args.index ? weight_of<T>(args, args.index[row]) : 1;
  }
  totals = add_threads(totals);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1)
    write_totals(totals, reduction, total_weight, output);
  else
    partials[blockIdx.x] = totals;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_chunks_kernel(const Totals* partials, int64_t count, Reduction reduction, Accumulator<T>* total_weight,
                      T* output) {
  Totals totals = {0, 0};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    totals.loss += partials[i].loss;
    totals.weight += partials[i].weight;
  }
  totals = add_threads(totals);
  if (threadIdx.x == 0) write_totals(totals, reduction, total_weight, output);
}

// ---- choice of kernel ----

int64_t segments_of(const CrossEntropyArgs& args) { return ceil_div(args.classes, kSegment); }

template <bool kWeighted, class F>
cudaError_t with_group(const CrossEntropyArgs& args, const F& f) {
  const std::bool_constant<kWeighted> weighted;
  if (args.classes <= kNarrow) return f(weighted, std::integral_constant<int, 8>{});
  if (args.classes <= kMiddle) return f(weighted, std::integral_constant<int, 32>{});
  return f(weighted, std::integral_constant<int, kThreads>{});
}

// Calls f(std::bool_constant: whether every class has a weight, std::integral_constant: threads a row).
template <class F>
cudaError_t with_rows_variant(const CrossEntropyArgs& args, const F& f) {
  return args.target == kIndex ? with_group<false>(args, f) : with_group<true>(args, f);
}

// Whether rows can be taken in packs of N.
template <int N>
bool in_packs(const CrossEntropyArgs& args) {
  const auto fits = [](const ClassArray& array) {
    return all_aligned(array.data) && array.outer_stride % N == 0 && array.class_stride % N == 0;
  };
  return args.inner % N == 0 && fits(args.logits) && fits(args.probabilities) && fits(args.grad_input);
}

// Calls f(std::bool_constant: whether every class has a weight, std::integral_constant: rows a thread).
template <class T, class F>
cudaError_t with_columns_variant(const CrossEntropyArgs& args, const F& f) {
  const std::integral_constant<int, kPackElements<T>> pack;
  const std::integral_constant<int, 1> single;
  if (args.target == kIndex) return in_packs<pack>(args) ? f(std::false_type{}, pack) : f(std::false_type{}, single);
  return in_packs<pack>(args) ? f(std::true_type{}, pack) : f(std::true_type{}, single);
}

dim3 column_threads(const CrossEntropyArgs& args) {
  return args.classes < kManyClasses ? dim3(kThreads) : dim3(kThreads / kColumnWarps, kColumnWarps);
}

}  // namespace

int64_t cross_entropy_scratch_bytes(DType dtype, const CrossEntropyArgs& args) {
  const int64_t sums = dtype == kFloat64 ? sizeof(RowSums<double>) : sizeof(RowSums<float>);
  const int64_t segments = segments_of(args), chunks = ceil_div(args.rows, kRowChunk);
  const int64_t partials = segments > 1 ? args.rows * segments * sums : 0, totals = chunks * int64_t(sizeof(Totals));
  return partials > totals ? partials : totals;
}

cudaError_t launch_cross_entropy(DType dtype, const CrossEntropyArgs& args, Layout layout, void* scratch,
                                 cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    if (layout == Layout::kColumns)
      return with_columns_variant<T>(args, [&](auto weighted, auto rows) {
        const dim3 threads = column_threads(args);
        return launch(forward_columns_kernel<T, weighted, rows>, ceil_div(args.rows, int64_t(threads.x) * rows),
                      threads, stream, args);
      });
    return with_rows_variant(args, [&](auto weighted, auto group) {
      auto* partials = static_cast<RowSums<Accumulator<T>>*>(scratch);
      const int64_t segments = segments_of(args);
      const cudaError_t error =
          launch(forward_rows_kernel<T, weighted, group>, ceil_div(args.rows * segments * group, kThreads), kThreads,
                 stream, args, segments, partials);
      if (error != cudaSuccess || segments == 1) return error;
      return launch(merge_segments_kernel<T, weighted>, ceil_div(args.rows, kThreads), kThreads, stream, args, segments,
                    static_cast<const RowSums<Accumulator<T>>*>(partials));
    });
  });
}

cudaError_t launch_cross_entropy_total(DType dtype, const CrossEntropyArgs& args, Reduction reduction, void* scratch,
                                       void* total_weight, void* output, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t chunks = args.rows > 0 ? ceil_div(args.rows, kRowChunk) : 1;
    auto* partials = static_cast<Totals*>(scratch);
    auto* weight = static_cast<Accumulator<T>*>(total_weight);
    auto* out = static_cast<T*>(output);
    const cudaError_t error =
        launch(add_rows_kernel<T>, chunks, kThreads, stream, args, reduction, partials, weight, out);
    if (error != cudaSuccess || chunks == 1) return error;
    return launch(add_chunks_kernel<T>, 1, kThreads, stream, static_cast<const Totals*>(partials), chunks, reduction,
                  weight, out);
  });
}

cudaError_t launch_cross_entropy_backward(DType dtype, const CrossEntropyArgs& args, Layout layout,
                                          const void* total_weight, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto* divisor = static_cast<const Accumulator<T>*>(total_weight);
    if (layout == Layout::kColumns)
      return with_columns_variant<T>(args, [&](auto weighted, auto rows) {
        const dim3 threads = column_threads(args);
        const int64_t chunks = ceil_div(args.classes, kColumnClasses);
        return launch(backward_columns_kernel<T, weighted, rows>,
                      ceil_div(args.rows, int64_t(threads.x) * rows) * chunks, threads, stream, args, chunks, divisor);
      });
    return with_rows_variant(args, [&](auto weighted, auto group) {
      const int64_t segments = segments_of(args);
      return launch(backward_rows_kernel<T, weighted, group>, ceil_div(args.rows * segments * group, kThreads),
                    kThreads, stream, args, segments, divisor);
    });
  });
}

}  // namespace fastnn::cuda

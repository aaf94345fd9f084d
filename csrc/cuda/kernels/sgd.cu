// One SGD step of many tensors, in torch's order of operations:
//   g = -g if maximize;  g = g + wd p, times -lr where the learning rate is in the velocity
//   b = g on the first step, else momentum b + (1 - dampening) g; with dampening also where b is -0, which no step
//   leaves there: found_inf may have skipped the first one, of which the host need not know
//   p = p - lr (b, or g + momentum b if nesterov, or g without momentum), without lr where the velocity has it
//
// Blocking: a thread takes two packs of 16 bytes of every operand (tensor_batch.h), and reads all before it writes.
// Bytes: with momentum p, g, b are read and p, b written once, 5 * count * sizeof(T); without, 3. Memory-bound.
#include "cuda/kernels/sgd.h"

#include "cuda/kernels/tensor_batch.h"

namespace fastnn::cuda {
namespace {

template <class T, Momentum kMode>
__global__ void __launch_bounds__(kBatchThreads)
    sgd_kernel(const __grid_constant__ TensorBatch<kMode == Momentum::kNone ? 2 : 3> batch, const SgdOptions options) {
  using A = Accumulator<T>;
  constexpr int kOperands = kMode == Momentum::kNone ? 2 : 3;
  if (read(options.found_inf) != 0) return;
  const A minus_lr = A(-read(options.lr)), grad_scale = A(read(options.grad_scale));
  const A grad_factor = options.lr_in_velocity ? minus_lr : A(1),
          step_factor = options.lr_in_velocity ? A(1) : minus_lr;
  const A weight_decay = A(options.weight_decay), momentum = A(options.momentum), undamped = A(1 - options.dampening);
  const auto update = [&](A(&values)[kOperands]) {
    A& p = values[0];
    if (options.scaled) values[1] /= grad_scale;
    A grad = options.maximize ? -values[1] : values[1];
    if (options.weight_decay != 0) grad += weight_decay * p;
    grad *= grad_factor;
    A direction = grad;
    if constexpr (kMode != Momentum::kNone) {
      A& b = values[2];
      const bool damped = options.dampening != 0, first = damped && b == 0 && signbit(b);
      const A sum = kMode == Momentum::kFirstStep || first ? grad : b * momentum + undamped * grad;
      direction = options.nesterov ? grad + momentum * sum : sum;
      b = damped ? widen(narrow<T>(sum)) + 0 : sum;  // + 0: never -0
    }
    p += step_factor * direction;
  };
  const unsigned reads = kMode == Momentum::kOn ? 7 : 3, writes = kMode == Momentum::kNone ? 1 : 5;
  update_block<T>(tensor_of_block(batch), reads, options.scaled ? writes | 2 : writes, update);
}

template <Momentum kMode>
cudaError_t launch_mode(const SgdOptions& options, const TensorList& list, cudaStream_t stream) {
  return with_dtype(list.dtype, [&](auto element) {
    using T = decltype(element);
    return for_each_batch<T, kMode == Momentum::kNone ? 2 : 3>(list, [&](const auto& batch, int64_t blocks) {
      return launch(sgd_kernel<T, kMode>, blocks, kBatchThreads, stream, batch, options);
    });
  });
}

}  // namespace

cudaError_t launch_sgd(const SgdOptions& options, Momentum mode, const TensorList& list, cudaStream_t stream) {
  if (mode == Momentum::kNone) return launch_mode<Momentum::kNone>(options, list, stream);
  if (mode == Momentum::kFirstStep) return launch_mode<Momentum::kFirstStep>(options, list, stream);
  return launch_mode<Momentum::kOn>(options, list, stream);
}

}  // namespace fastnn::cuda

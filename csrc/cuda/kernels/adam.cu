// One Adam step of many tensors, in torch's order of operations:
//   g = -g if maximize;  p = p (1 - lr wd) if decoupled, else g = g + wd p
//   m = lerp(m, g, 1 - beta1);  v = beta2 v + (1 - beta2) g g;  vmax = max(vmax, v)
//   p = p - step_size m / (sqrt(v or vmax) / bias_correction2_sqrt + eps)
//
// Blocking: a small kernel works out what depends on the step counts, a thread a tensor; then a thread takes two packs
// of 16 bytes of every operand (tensor_batch.h), and reads all of them before it writes. Bytes: p, g, m, v are read and
// p, m, v written once, 7 * count * sizeof(T) (amsgrad: 9): memory-bound, in spite of two divisions and a square root
// an element.
#include "cuda/kernels/adam.h"

#include <algorithm>

#include "cuda/kernels/tensor_batch.h"

namespace fastnn::cuda {
namespace {

constexpr int kStepCapacity = 1024;

struct StepBatch {
  int size;
  Scalar steps[kStepCapacity];
};

__global__ void __launch_bounds__(kBatchThreads)
    adam_steps_kernel(const __grid_constant__ StepBatch batch, const AdamOptions options, AdamBias* biases) {
  const int i = int(blockIdx.x * kBatchThreads + threadIdx.x);
  if (i >= batch.size || read(options.found_inf) != 0) return;
  const Scalar& step = batch.steps[i];
  const double t = read(step) + (step.data ? 1 : 0), lr = read(options.lr);
  if (step.data && step.dtype == kFloat64) *static_cast<double*>(step.data) = t;
  if (step.data && step.dtype == kFloat32) *static_cast<float*>(step.data) = float(t);
  biases[i] = {lr / (1 - pow(options.beta1, t)), sqrt(1 - pow(options.beta2, t)), 1 - lr * options.weight_decay};
}

template <class T, bool kAmsgrad>
__global__ void __launch_bounds__(kBatchThreads)
    adam_kernel(const __grid_constant__ TensorBatch<kAmsgrad ? 5 : 4> batch, const AdamOptions options,
                const AdamBias* biases) {
  using A = Accumulator<T>;
  constexpr int kOperands = kAmsgrad ? 5 : 4;
  if (read(options.found_inf) != 0) return;
  const BatchedTensor<kOperands>& tensor = tensor_of_block(batch);
  const AdamBias bias = biases[tensor.number];
  const A grad_scale = A(read(options.grad_scale)), decay = A(bias.decay), weight_decay = A(options.weight_decay);
  // torch's lerp starts from the nearer end.
  const A lerp = A(1 - options.beta1), beta2 = A(options.beta2), one_minus_beta2 = A(1 - options.beta2);
  const A eps = A(options.eps), step = A(-bias.step_size), correction = A(bias.bias_correction2_sqrt);
  const auto update = [&](A(&values)[kOperands]) {
    A &p = values[0], &m = values[2], &v = values[3];
    if (options.scaled) values[1] /= grad_scale;
    A grad = options.maximize ? -values[1] : values[1];
    if (options.weight_decay != 0) {
      if (options.decoupled_weight_decay)
        p *= decay;
      else
        grad += weight_decay * p;
    }
    m = lerp < A(0.5) ? m + lerp * (grad - m) : grad + (lerp - 1) * (grad - m);
    v = v * beta2 + one_minus_beta2 * grad * grad;
    A denominator = v;
    if constexpr (kAmsgrad) {
      A& v_max = values[4];
      v_max = v_max > v || v_max != v_max ? v_max : v;  // NaN on either side stays
      denominator = v_max;
    }
    p += step * m / (sqrt(denominator) / correction + eps);
  };
  const unsigned all = (1u << kOperands) - 1;
  update_block<T>(tensor, all, options.scaled ? all : all & ~2u, update);
}

}  // namespace

cudaError_t launch_adam_steps(const AdamOptions& options, const std::vector<AdamStep>& steps, AdamBias* biases,
                              cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (size_t first = 0; first < steps.size() && error == cudaSuccess; first += kStepCapacity) {
    StepBatch batch;
    batch.size = int(std::min<size_t>(kStepCapacity, steps.size() - first));
    std::copy_n(&steps[first], batch.size, batch.steps);
    error = launch(adam_steps_kernel, ceil_div(batch.size, kBatchThreads), kBatchThreads, stream, batch, options,
                   biases + first);
  }
  return error;
}

cudaError_t launch_adam(const AdamOptions& options, const TensorList& list, const AdamBias* biases,
                        cudaStream_t stream) {
  return with_dtype(list.dtype, [&](auto element) {
    using T = decltype(element);
    if (options.amsgrad)
      return for_each_batch<T, 5>(list, [&](const auto& batch, int64_t blocks) {
        return launch(adam_kernel<T, true>, blocks, kBatchThreads, stream, batch, options, biases);
      });
    return for_each_batch<T, 4>(list, [&](const auto& batch, int64_t blocks) {
      return launch(adam_kernel<T, false>, blocks, kBatchThreads, stream, batch, options, biases);
    });
  });
}

}  // namespace fastnn::cuda

// Glue of fastnn::adam_ on CUDA devices.
#include "cuda/kernels/adam.h"

#include "cuda/optimizers.h"

namespace fastnn::cuda {
namespace {

// A counter on the host, advanced here, or one in device memory, which its kernel advances.
AdamStep advance(const View& step) {
  if (step.device != kCpuDevice || kOnHost) return {0, step.data, step.dtype};
  if (step.dtype == kFloat64) return {*reinterpret_cast<double*>(step.data) += 1, nullptr, kFloat64};
  return {*reinterpret_cast<float*>(step.data) += 1, nullptr, kFloat32};
}

void check_steps(const Views& steps, const Views& params, bool found_inf) {
  if (steps.size() != params.size())
    throw NotCovered("adam_: state_steps has " + std::to_string(steps.size()) + " tensors, expected " +
                     std::to_string(params.size()));
  for (size_t i = 0; i < steps.size(); ++i) {
    const View& step = steps[i];
    if (step.count != 1 || kElementSize[step.dtype] < 4)
      throw NotCovered("adam_: state_steps has a tensor that is no float32 or float64 scalar");
    const bool on_host = step.device == kCpuDevice && !found_inf;
    if (!on_host && (step.device != params[i].device || step.device_index != params[i].device_index))
      throw NotCovered("adam_: state_steps has a tensor on another device");
  }
}

// List and OptionalTensor: of Tensor for the operator, of Python objects for fastnn.optim. Known: see views_of.
template <class List, class OptionalTensor, class Known>
void adam_(List params, List grads, List exp_avgs, List exp_avg_sqs, List max_exp_avg_sqs, List state_steps, double lr,
           double beta1, double beta2, double weight_decay, double eps, bool amsgrad, bool maximize,
           bool decoupled_weight_decay, std::optional<double> grad_scale, OptionalTensor lr_tensor,
           OptionalTensor grad_scale_tensor, OptionalTensor found_inf, Known known) {
  const bool scaled = grad_scale.has_value() || grad_scale_tensor.has_value();
  Operands operands;
  const auto add = [&](const char* name, const List& list, bool updated) {
    operands.push_back({name, views_of(list, "adam_", name, known), updated});
  };
  add("params", params, true);
  operands.push_back({"grads", views_of(grads, "adam_", "grads"), scaled});  // new ones, mostly
  add("exp_avgs", exp_avgs, true);
  add("exp_avg_sqs", exp_avg_sqs, true);
  if (amsgrad) add("max_exp_avg_sqs", max_exp_avg_sqs, true);
  const Views steps = views_of(state_steps, "adam_", "state_steps", known);
  check_operands("adam_", kDevice, operands);
  check_steps(steps, operands[0].views, found_inf.has_value());
  if (steps.empty()) return;
  const View& param = operands[0].views[0];
  AdamOptions options{};
  options.lr = scalar_of(lr_tensor, lr, param, "adam_", "lr_tensor");
  options.grad_scale = scalar_of(grad_scale_tensor, grad_scale.value_or(1), param, "adam_", "grad_scale_tensor");
  options.found_inf = scalar_of(found_inf, 0, param, "adam_", "found_inf");
  options.beta1 = beta1;
  options.beta2 = beta2;
  options.weight_decay = weight_decay;
  options.eps = eps;
  options.amsgrad = amsgrad;
  options.maximize = maximize;
  options.decoupled_weight_decay = decoupled_weight_decay;
  options.scaled = scaled;

  const List no_grads;
  const Writing<List> writing(
      {&params, scaled ? &grads : &no_grads, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs, &state_steps});
  const DeviceOf device(param);
  const Tensor bias_memory = empty_bytes(param, int64_t(steps.size() * sizeof(AdamBias)));
  auto* biases = static_cast<AdamBias*>(bias_memory.data_ptr());
  in_batches(operands, [&](const Gathered& tensors) {
    std::vector<AdamStep> own;
    for (size_t i = tensors.first(); i < tensors.first() + tensors.size(); ++i) own.push_back(advance(steps[i]));
    check_launch("adam_", launch_adam_steps(options, own, biases + tensors.first(), device.stream()));
    for (const auto& [key, list] : grouped(tensors, operands.size(), [](size_t) { return 0; }))
      check_launch("adam_", launch_adam(options, list, biases, device.stream()));
  });
}

}  // namespace

void bind_adam(pybind11::module_& m) {
  m.def("adam_", &adam_<pybind11::list, std::optional<pybind11::object>, pybind11::dict>);
}

void adam_operator(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                   std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs,
                   std::vector<Tensor> state_steps, double lr, double beta1, double beta2, double weight_decay,
                   double eps, bool amsgrad, bool maximize, bool decoupled_weight_decay,
                   std::optional<double> grad_scale, std::optional<Tensor> lr_tensor,
                   std::optional<Tensor> grad_scale_tensor, std::optional<Tensor> found_inf) {
  adam_(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, lr, beta1, beta2, weight_decay, eps,
        amsgrad, maximize, decoupled_weight_decay, grad_scale, lr_tensor, grad_scale_tensor, found_inf, NothingKnown{});
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, FASTNN_CUDA_KEY, m) { m.impl("adam_", TORCH_BOX(&adam_operator)); }

}  // namespace fastnn::cuda

// Glue of fastnn::cross_entropy and cross_entropy_backward on the CPU.
#include "cpu/kernels/cross_entropy.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <tuple>

#include "common/cross_entropy_call.h"
#include "common/python_tensors.h"
#include "cpu/bindings.h"
#include "cpu/memory.h"

namespace fastnn::cpu {
namespace {

constexpr int64_t kGrain = 16 * 1024;    // logits a thread takes at the least: some 10 µs of work
constexpr int64_t kRowChunk = 8 * 1024;  // rows that are added up in one go

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One element, without the cost of calling an operator.
void write_scalar(void* data, ScalarType dtype, double value) {
  switch (dtype) {
    case ScalarType::Double:
      *static_cast<double*>(data) = value;
      break;
    case ScalarType::Float:
      *static_cast<float*>(data) = float(value);
      break;
    case ScalarType::BFloat16:
      *static_cast<bf16*>(data) = from_accumulator<bf16>(float(value));
      break;
    default:
      *static_cast<f16*>(data) = from_accumulator<f16>(float(value));
  }
}

double read_scalar(const void* data, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return *static_cast<const double*>(data);
    case ScalarType::Float:
      return *static_cast<const float*>(data);
    case ScalarType::BFloat16:
      return to_accumulator(*static_cast<const bf16*>(data));
    default:
      return to_accumulator(*static_cast<const f16*>(data));
  }
}

// With a weight for every class where the kernels read one.
CrossEntropyCall weighted_call(const char* op, const Tensor& input, const Tensor& target,
                               const std::optional<Tensor>& weight, int64_t reduction, int64_t ignore_index,
                               double label_smoothing) {
  CrossEntropyCall call = cross_entropy_call(op, input, target, weight, reduction, ignore_index, label_smoothing);
  if (!weight && call.args.target != kIndex) {
    call.weight = empty({call.args.classes}, accumulator_dtype(input));
    torch::stable::fill_(*call.weight, 1);
    call.args.weight = call.weight->data_ptr();
  }
  return call;
}

// sum(begin, end) over all rows, in chunks that do not depend on the number of threads.
template <class F>
double sum_chunks(int64_t rows, const F& sum) {
  std::vector<double> sums(ceil_div(rows, kRowChunk));
  torch::stable::parallel_for(0, int64_t(sums.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      sums[chunk] = sum(chunk * kRowChunk, std::min(rows, (chunk + 1) * kRowChunk));
  });
  double total = 0;
  for (double value : sums) total += value;
  return total;
}

template <class A>
double sum_losses(const CrossEntropyArgs& args) {
  const A* loss = static_cast<const A*>(args.loss);
  return sum_chunks(args.rows, [=](int64_t begin, int64_t end) {
    double sums[4] = {};
    for (int64_t row = begin; row < end; ++row) sums[row % 4] += double(loss[row]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  });
}

// The weights of all targets that are not ignored. Checks every index on the way, so that the kernels can trust them.
template <class A>
double sum_weights(const CrossEntropyArgs& args) {
  if (!args.index) return double(args.rows);
  const A* weight = static_cast<const A*>(args.weight);
  const int64_t* index = args.index;
  const int64_t ignore_index = args.ignore_index, classes = args.classes;
  std::atomic<int64_t> first_bad{args.rows};
  const double total = sum_chunks(args.rows, [&](int64_t begin, int64_t end) {
    int64_t counted = 0, bad = 0;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t counts = index[row] != ignore_index;
      counted += counts;
      bad += counts & (uint64_t(index[row]) >= uint64_t(classes));
    }
    double sum = double(counted);
    if (weight && bad == 0) {
      sum = 0;
      for (int64_t row = begin; row < end; ++row)
        if (index[row] != ignore_index) sum += double(weight[index[row]]);
    }
    for (int64_t row = begin; bad > 0 && row < end; ++row) {
      if (index[row] == ignore_index || (index[row] >= 0 && index[row] < classes)) continue;
      int64_t seen = first_bad.load();
      while (row < seen && !first_bad.compare_exchange_weak(seen, row)) {
      }
      break;
    }
    return sum;
  });
  if (first_bad < args.rows)
    throw std::out_of_range("Target " + std::to_string(args.index[first_bad]) + " is out of bounds.");
  return total;
}

double checked_total_weight(const CrossEntropyCall& call, ScalarType accumulator) {
  return accumulator == ScalarType::Double ? sum_weights<double>(call.args) : sum_weights<float>(call.args);
}

int64_t tiles_of(const CrossEntropyArgs& args) {
  return args.rows / args.inner * ceil_div(args.inner, kCrossEntropyTile);
}

// Units of `logits` logits each a thread takes at the least.
int64_t grain(int64_t logits) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, logits)); }

void run_forward(const CrossEntropyCall& call, DType dtype) {
  const auto& args = call.args;
  const auto& kernels = cross_entropy_kernels();
  const int64_t blocks = ceil_div(args.classes, kCrossEntropyBlock);
  if (call.layout == Layout::kColumns) {
    const auto kernel = kernels.forward_columns[dtype][args.target];
    const int64_t tile = std::min(args.inner, kCrossEntropyTile);
    torch::stable::parallel_for(0, tiles_of(args), grain(tile * args.classes),
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  } else if (args.classes <= kCrossEntropyNarrow) {
    const auto kernel = kernels.forward_narrow_rows[dtype][args.target];
    torch::stable::parallel_for(0, args.rows, grain(args.classes),
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  } else if (blocks > 1 && args.rows < 8 * int64_t(torch::stable::get_num_threads())) {
    const Tensor partials = empty({args.rows * blocks * 4}, accumulator_dtype(call.logits));
    const auto kernel = kernels.forward_blocks[dtype][args.target];
    torch::stable::parallel_for(0, args.rows * blocks, grain(kCrossEntropyBlock),
                                [&](int64_t begin, int64_t end) { kernel(args, partials.data_ptr(), begin, end); });
    kernels.forward_merge[dtype][args.target](args, partials.data_ptr(), 0, args.rows);
  } else {
    const auto kernel = kernels.forward_rows[dtype][args.target];
    torch::stable::parallel_for(0, args.rows, grain(args.classes),
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
}

// Behind the rows' own.
void* total_weight_of(const Tensor& stats) {
  return static_cast<char*>(stats.data_ptr()) + (stats.numel() - 1) * stats.element_size();
}

std::tuple<Tensor, Tensor> cross_entropy(Tensor input, Tensor target, std::optional<Tensor> weight, int64_t reduction,
                                         int64_t ignore_index, double label_smoothing) {
  CrossEntropyCall call =
      weighted_call("cross_entropy", input, target, weight, reduction, ignore_index, label_smoothing);
  auto& args = call.args;
  const ScalarType accumulator = accumulator_dtype(input);
  const double total = checked_total_weight(call, accumulator);
  const Tensor stats = empty({3 * args.rows + 1}, accumulator);
  write_scalar(total_weight_of(stats), accumulator, total);
  std::optional<Tensor> losses;
  if (reduction == kNone) losses = empty(loss_shape(input), accumulator);
  const Scratch<char> summed(losses ? 0 : args.rows * stats.element_size());
  args.row_stats = stats.data_ptr();
  args.loss = losses ? losses->data_ptr() : summed.get();
  if (args.rows > 0) {
    choose_layout(call);
    run_forward(call, dtype_of(input, "cross_entropy", "input"));
  }

  if (reduction == kNone) return {contiguous_as(*losses, input.scalar_type()), stats};
  const double sum = accumulator == ScalarType::Double ? sum_losses<double>(args) : sum_losses<float>(args);
  const Tensor output = empty({}, input.scalar_type());
  write_scalar(output.data_ptr(), input.scalar_type(), reduction == kMean ? sum / total : sum);
  return {output, stats};
}

Tensor cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, std::optional<Tensor> weight,
                              Tensor stats, int64_t reduction, int64_t ignore_index, double label_smoothing) {
  const char* op = "cross_entropy_backward";
  CrossEntropyCall call = weighted_call(op, input, target, weight, reduction, ignore_index, label_smoothing);
  auto& args = call.args;
  const ScalarType accumulator = accumulator_dtype(input);
  checked_total_weight(call, accumulator);
  check_cross_entropy_gradient(op, grad_output, input, stats, args.rows, reduction);
  args.row_stats = stats.data_ptr();
  args.grad_per_row = reduction == kNone;
  std::optional<Tensor> grad_rows;
  double shared_grad = 0;  // its first bytes, where the accumulator is a float
  if (args.grad_per_row) {
    grad_rows = contiguous_as(grad_output, accumulator);
    args.grad_rows = grad_rows->data_ptr();
  } else {
    const double grad = read_scalar(grad_output.data_ptr(), grad_output.scalar_type());
    const double divisor = reduction == kMean ? read_scalar(total_weight_of(stats), accumulator) : 1;
    write_scalar(&shared_grad, accumulator, grad / divisor);
    args.grad_rows = &shared_grad;
  }

  Tensor grad_input = with_huge_pages(fresh_like(input));
  if (input.numel() == 0) return grad_input;
  call.grad_input = grad_input;
  choose_layout(call);
  const DType dtype = dtype_of(input, op, "input");
  const auto& kernels = cross_entropy_kernels();
  if (call.layout == Layout::kColumns) {
    const auto kernel = kernels.backward_columns[dtype][args.target];
    const int64_t tile = std::min(args.inner, kCrossEntropyTile);
    torch::stable::parallel_for(0, tiles_of(args), grain(tile * args.classes),
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  } else if (args.classes <= kCrossEntropyNarrow) {
    const auto kernel = kernels.backward_narrow_rows[dtype][args.target];
    torch::stable::parallel_for(0, args.rows, grain(args.classes),
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  } else {
    const auto kernel = kernels.backward_rows[dtype][args.target];
    const int64_t blocks = ceil_div(args.classes, kCrossEntropyBlock);
    torch::stable::parallel_for(0, args.rows * blocks, grain(std::min(args.classes, kCrossEntropyBlock)),
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  if (call.grad_input->data_ptr() != grad_input.data_ptr()) torch::stable::copy_(grad_input, *call.grad_input);
  return grad_input;
}

}  // namespace

void bind_cross_entropy(pybind11::module_& m) {
  define_entry(m, "cross_entropy", &cross_entropy);
  define_entry(m, "cross_entropy_backward", &cross_entropy_backward);
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace fastnn::cpu

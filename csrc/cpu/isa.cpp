#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels/platform.h"

namespace fastnn::cpu {
namespace {

bool machine_has(Isa isa) {
#if FASTNN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::kAvx512Bf16) return avx2 && avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::kAvx512) return avx2 && avx512;
  if (isa == Isa::kAvx2) return avx2;
#endif
  return isa == Isa::kGeneric;
}

std::string names(const std::vector<Isa>& isas) {
  std::string joined;
  for (Isa isa : isas) joined += (joined.empty() ? "" : ", ") + std::string(isa_name(isa));
  return joined;
}

Isa parse(const std::string& name, const char* source) {
  const std::vector<Isa> available = available_isas();
  for (Isa isa : available)
    if (name == isa_name(isa)) return isa;
  throw std::invalid_argument(std::string(source) + " is '" + name +
                              "', expected one this machine runs: " + names(available));
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa = [] {
    const char* forced = std::getenv("FASTNN_CPU_ISA");
    return forced && *forced ? parse(forced, "FASTNN_CPU_ISA") : available_isas().front();
  }();
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "generic";
  }
}

std::vector<Isa> built_isas() {
#if FASTNN_X86
  return {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kGeneric};
#else
  return {Isa::kGeneric};
#endif
}

std::vector<Isa> available_isas() {
  std::vector<Isa> available;
  for (Isa isa : built_isas())
    if (machine_has(isa)) available.push_back(isa);
  return available;
}

Isa current_isa() { return current().load(std::memory_order_relaxed); }

void set_current_isa(const std::string& name) { current().store(parse(name, "isa"), std::memory_order_relaxed); }

}  // namespace fastnn::cpu

// Which CPU instruction set ("tier") the kernels run on: picked once from cpuid, or by FASTNN_CPU_ISA.
#pragma once

#include <string>
#include <vector>

namespace fastnn::cpu {

// kAvx512Bf16 is kAvx512 with products of bfloat16: kernels that have no use for those are kAvx512's.
enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

const char* isa_name(Isa isa);
// Every tier that is compiled in, and of those the ones this machine can run; fastest first.
std::vector<Isa> built_isas();
std::vector<Isa> available_isas();
Isa current_isa();
// Throws std::invalid_argument (ValueError in Python) for a tier this machine cannot run.
void set_current_isa(const std::string& name);

}  // namespace fastnn::cpu

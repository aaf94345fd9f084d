// The four element types every kernel takes, and their scalar conversions. Torch-free: 16-bit types are their bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastnn {

enum DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3, kNumDTypes = 4 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type a kernel computes and accumulates in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double to_accumulator(double value) { return value; }
inline float to_accumulator(float value) { return value; }
inline float to_accumulator(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

inline float to_accumulator(f16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Exact: 2^112 moves the exponent bias from 15 to 127, subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

// Round to nearest, ties to even; NaN stays NaN (quiet).
template <class T>
inline T from_accumulator(Accumulator<T> value) {
  return value;
}
template <>
inline bf16 from_accumulator<bf16>(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_accumulator<f16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x38800000) {
    // Subnormal result: adding 0.5 aligns its last bit with float's, so the addition does the rounding.
    const float aligned = bits_to_float(magnitude) + 0.5f;
    return {uint16_t(sign | (float_to_bits(aligned) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return {uint16_t(sign | (rounded - 0x38000000) >> 13)};
}

}  // namespace fastnn

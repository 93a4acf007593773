// Stands in for CUDA's header (emulation.h). Rounds to nearest even, as the device does.
#pragma once

#include "cuda_runtime.h"

struct __half {
  std::uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31;
  const int mantissa = value.bits & 1023;
  float size =
      std::ldexp(static_cast<float>(exponent == 0 ? mantissa : mantissa + 1024), (exponent == 0 ? 1 : exponent) - 25);
  if (exponent == 31) size = mantissa == 0 ? INFINITY : NAN;
  return (value.bits & 0x8000) != 0 ? -size : size;
}

inline __half __float2half_rn(float value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return {0x7fff};
  const float size = std::fabs(value);
  // 65504 is the largest number; from halfway to the next power of two on it is infinity.
  if (size >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(size, &exponent);
  if (size == 0.0f || exponent < -13) exponent = -13;  // below 2^-14 the steps get no finer
  // nearbyint rounds half to even. A mantissa that rounds up to 2048 carries into the exponent, as it should.
  const auto mantissa = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return {static_cast<std::uint16_t>(sign | (((exponent + 13) << 10) + mantissa))};
}

inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }

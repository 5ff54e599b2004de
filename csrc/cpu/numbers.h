// float16 and bfloat16 to float32 and back, one number at a time, and rows of them; to nearest, ties to even.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "mergekit_plus_kernels.h"

namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline float from_bfloat16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // NaN stays NaN
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);   // infinity, NaN
  const float magnitude = rest >= 0x400 ? float_of((rest << 13) + (112u << 23))    // normal: another bias
                                        : float(rest) * 5.9604644775390625e-8f;    // subnormal: multiples of 2^-24
  return float_of(sign | bits_of(magnitude));
}

inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more round to infinity
  if (rest < 0x38800000)                                   // subnormal: the sum with 0.5 leaves multiples of 2^-24 in the low bits, rounded
    return uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
  return uint16_t(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

inline int64_t size_of(int32_t dtype) { return dtype == MKP_FLOAT32 ? 4 : 2; }

inline void *row_of(const mkp_rows &rows, int64_t row) { return (char *)rows.data + row * rows.stride * size_of(rows.dtype); }

inline float load(const void *numbers, int32_t dtype, int64_t place) {
  if (dtype == MKP_FLOAT32) return ((const float *)numbers)[place];
  const uint16_t half = ((const uint16_t *)numbers)[place];
  return dtype == MKP_FLOAT16 ? from_float16(half) : from_bfloat16(half);
}

inline void store(void *numbers, int32_t dtype, int64_t place, float value) {
  if (dtype == MKP_FLOAT32)
    ((float *)numbers)[place] = value;
  else
    ((uint16_t *)numbers)[place] = dtype == MKP_FLOAT16 ? to_float16(value) : to_bfloat16(value);
}

void load_row(const void *numbers, int32_t dtype, int64_t count, float *out) {
  if (dtype == MKP_FLOAT32) {
    memcpy(out, numbers, size_t(count) * 4);
    return;
  }
  const uint16_t *halves = (const uint16_t *)numbers;
  int64_t i = 0;
  if (dtype == MKP_BFLOAT16) {
    for (; i < count; i++) out[i] = from_bfloat16(halves[i]);
    return;
  }
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
#endif
  for (; i < count; i++) out[i] = from_float16(halves[i]);
}

void store_row(const float *values, int64_t count, int32_t dtype, void *out) {
  if (dtype == MKP_FLOAT32) {
    memcpy(out, values, size_t(count) * 4);
    return;
  }
  uint16_t *halves = (uint16_t *)out;
  int64_t i = 0;
  if (dtype == MKP_BFLOAT16) {
    for (; i < count; i++) halves[i] = to_bfloat16(values[i]);
    return;
  }
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) _mm_storeu_si128((__m128i *)(halves + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; i++) halves[i] = to_float16(values[i]);
}

}  // namespace

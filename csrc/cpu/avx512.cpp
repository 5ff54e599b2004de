// AVX-512 with VBMI (Ice Lake, Zen 4 and newer): float32 products for every width and type of activation.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define MKP_UNPACK
namespace {
void unpack(const uint32_t *words, int bits, int64_t count, float *out);
}
#include "avx512.h"

namespace {

template <int BITS> void unpack_spread(const uint32_t *words, int64_t count, float *out) {
  const Spread<BITS> spread;
  const int64_t bytes = divided_up(count * BITS, 32) * 4;
  const __m512i mask = _mm512_set1_epi8(char((1 << BITS) - 1));
  for (int64_t i = 0; i < count; i += 64) {
    alignas(64) uint8_t codes[64];
    _mm512_store_si512(codes, _mm512_and_si512(spread.load((const uint8_t *)words, i / 64, bytes), mask));
    for (int j = 0; j < 64 && i + j < count; j += 16) {
      const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *)(codes + j))));
      const int64_t left = count - i - j;
      _mm512_mask_storeu_ps(out + i + j, left >= 16 ? 0xffff : __mmask16((1 << left) - 1), values);
    }
  }
}

void unpack(const uint32_t *words, int bits, int64_t count, float *out) {
  switch (bits) {
    case 1: return unpack_spread<1>(words, count, out);
    case 2: return unpack_spread<2>(words, count, out);
    case 3: return unpack_spread<3>(words, count, out);
    case 4: return unpack_spread<4>(words, count, out);
    case 5: return unpack_spread<5>(words, count, out);
    case 6: return unpack_spread<6>(words, count, out);
    case 7: return unpack_spread<7>(words, count, out);
    default: return unpack_spread<8>(words, count, out);
  }
}

inline void store_vector(void *out, int32_t dtype, __m512 value) {
  if (dtype == MKP_FLOAT32) return _mm512_storeu_ps(out, value);
  if (dtype == MKP_FLOAT16) return _mm256_storeu_si256((__m256i *)out, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  const __m512i bits = _mm512_castps_si512(value), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}

// A row in one pass, where a group is so many times the 64 codes of a load.
template <int BITS> void dequantize_row(const mkp_weight &w, int64_t n, const mkp_rows &out) {
  const Spread<BITS> spread;
  const uint8_t *row = (const uint8_t *)row_words(w, n);
  const int64_t groups = groups_of(w), bytes = divided_up(w.k * BITS, 32) * 4, size = size_of(out.dtype);
  const __m512i mask = _mm512_set1_epi8(char((1 << BITS) - 1));
  char *to = (char *)row_of(out, n);
  for (int64_t group = 0; group < groups; group++) {
    const __m512 scale = _mm512_set1_ps(::load(row_scale(w, n), w.scale_dtype, group)), zero = _mm512_set1_ps(zero_of(w, n, group, groups));
    for (int64_t i = group * w.group_size; i < (group + 1) * w.group_size; i += 64) {
      const __m512i codes = _mm512_and_si512(spread.load(row, i / 64, bytes), mask);
      const __m128i quarter[4] = {_mm512_castsi512_si128(codes), _mm512_extracti32x4_epi32(codes, 1), _mm512_extracti32x4_epi32(codes, 2),
                                  _mm512_extracti32x4_epi32(codes, 3)};
      for (int j = 0; j < 4; j++) {
        const __m512 value = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(quarter[j])), zero);
        store_vector(to + (i + 16 * j) * size, out.dtype, _mm512_mul_ps(value, scale));
      }
    }
  }
}

int32_t dequantize(const mkp_weight &w, const mkp_rows &out, int threads) {
  if (w.k % 64 || w.k % w.group_size || w.group_size % 64) return rows_dequantize(w, out, threads);
  static constexpr void (*const ROW[])(const mkp_weight &, int64_t, const mkp_rows &) = {
      dequantize_row<1>, dequantize_row<2>, dequantize_row<3>, dequantize_row<4>, dequantize_row<5>, dequantize_row<6>, dequantize_row<7>, dequantize_row<8>};
#pragma omp parallel for schedule(static) num_threads(team(w.n *w.k, threads))
  for (int64_t n = 0; n < w.n; n++) ROW[w.bits - 1](w, n, out);
  return MKP_OK;
}

int32_t linear(const mkp_weight &w, const mkp_rows &x, const mkp_rows &y, int threads) {
  int32_t status = MKP_UNSUPPORTED;
  switch (w.bits) {
    case 1: status = vector_linear<Floats<Spread<1>, 1>>(w, x, y, threads); break;
    case 2: status = vector_linear<Floats<Plain<256>, 2>>(w, x, y, threads); break;
    case 3: status = vector_linear<Floats<Spread<3>, 3>>(w, x, y, threads); break;
    case 4: status = vector_linear<Floats<Plain<128>, 4>>(w, x, y, threads); break;
    case 5: status = vector_linear<Floats<Spread<5>, 5>>(w, x, y, threads); break;
    case 6: status = vector_linear<Floats<Spread<6>, 6>>(w, x, y, threads); break;
    case 7: status = vector_linear<Floats<Spread<7>, 7>>(w, x, y, threads); break;
    case 8: status = vector_linear<Floats<Spread<8>, 8>>(w, x, y, threads); break;
  }
  return status == MKP_UNSUPPORTED ? rows_linear(w, x, y, threads) : status;
}

// The sum of signed numbers is twice the sum of those whose bit is set less the sum of all: one masked addition for 16 of them.
int32_t signs(const mkp_signs &s, const mkp_rows &x, const mkp_rows &y, int threads) {
  const int64_t padded = divided_up(s.width, 16) * 16, bytes = divided_up(s.width, 8);
  const int parts = team(s.rows * s.width, threads);
  Scratch staged(x.m * padded), sums(x.m * 16);
  if (!staged.data || !sums.data) return MKP_FAILED;
  for (int64_t i = 0; i < x.m; i++) {
    float *numbers = staged.data + i * padded;
    load_row(row_of(x, i), x.dtype, s.width, numbers);
    for (int64_t k = s.width; k < padded; k++) numbers[k] = 0;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < padded; k += 16) sum = _mm512_add_ps(sum, _mm512_load_ps(numbers + k));
    _mm512_store_ps(sums.data + i * 16, sum);
  }
#pragma omp parallel for schedule(static) num_threads(parts)
  for (int64_t n = 0; n < s.rows; n++) {
    const uint8_t *bits = s.bits + n * s.stride;
    for (int64_t i = 0; i < x.m; i++) {
      const float *numbers = staged.data + i * padded;
      __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
      int64_t k = 0;
      for (; k + 64 <= s.width; k += 64) {
        uint64_t mask;
        memcpy(&mask, bits + k / 8, 8);
        for (int j = 0; j < 4; j++) sum[j] = _mm512_mask_add_ps(sum[j], __mmask16(mask >> (16 * j)), sum[j], _mm512_load_ps(numbers + k + 16 * j));
      }
      for (; k < s.width; k += 16) {
        const uint32_t high = k / 8 + 1 < bytes ? bits[k / 8 + 1] : 0;
        sum[0] = _mm512_mask_add_ps(sum[0], __mmask16(bits[k / 8] | high << 8), sum[0], _mm512_load_ps(numbers + k));
      }
      const __m512 set = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
      const __m512 both = _mm512_fmsub_ps(_mm512_set1_ps(2), set, _mm512_load_ps(sums.data + i * 16));
      ((float *)row_of(y, i))[n] = _mm512_reduce_add_ps(both);
    }
  }
  return MKP_OK;
}

int32_t signs_transposed(const mkp_signs &s, const mkp_rows &x, const mkp_rows &y, int threads) {
  const int64_t strips = divided_up(s.width, 64), bytes = divided_up(s.width, 8);
  const int parts = team(s.rows * s.width, threads);
  Scratch staged(x.m * s.rows);
  if (!staged.data) return MKP_FAILED;
  for (int64_t i = 0; i < x.m; i++) load_row(row_of(x, i), x.dtype, s.rows, staged.data + i * s.rows);
#pragma omp parallel for schedule(static) num_threads(parts)
  for (int64_t strip = 0; strip < strips; strip++) {
    const int64_t left = least(64, s.width - strip * 64), size = least(8, bytes - strip * 8);
    for (int64_t i = 0; i < x.m; i++) {
      const float *numbers = staged.data + i * s.rows;
      __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()}, all = sum[0];
      for (int64_t row = 0; row < s.rows; row++) {
        const __m512 value = _mm512_set1_ps(numbers[row]);
        uint64_t mask = 0;
        memcpy(&mask, s.bits + row * s.stride + strip * 8, size_t(size));
        for (int j = 0; j < 4; j++) sum[j] = _mm512_mask_add_ps(sum[j], __mmask16(mask >> (16 * j)), sum[j], value);
        all = _mm512_add_ps(all, value);
      }
      float *out = (float *)row_of(y, i) + strip * 64;
      for (int j = 0; j < 4 && 16 * j < left; j++) {
        const int64_t count = left - 16 * j;
        _mm512_mask_storeu_ps(out + 16 * j, count >= 16 ? 0xffff : __mmask16((1 << count) - 1), _mm512_fmsub_ps(_mm512_set1_ps(2), sum[j], all));
      }
    }
  }
  return MKP_OK;
}

}  // namespace

const Isa mkp_isa_avx512 = {linear, dequantize, signs, signs_transposed};

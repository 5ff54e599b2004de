// AVX2 with FMA and F16C: rows.h, with codes unpacked eight at a time.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define MKP_UNPACK
namespace {

// Eight codes are `bits` bytes. Four of them never span more than 32 bits from the byte that the first begins in, so two words, each spread over four
// lanes and shifted by lane, hold them all.
void unpack(const uint32_t *words, int bits, int64_t count, float *out) {
  const uint8_t *stream = (const uint8_t *)words;
  const int64_t size = (count * bits + 31) / 32 * 4;
  const int second = 4 * bits / 8, lead = 4 * bits % 8;
  const __m256i shift = _mm256_setr_epi32(0, bits, 2 * bits, 3 * bits, lead, lead + bits, lead + 2 * bits, lead + 3 * bits);
  const __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
  for (int64_t i = 0; i < count; i += 8) {
    const int64_t at = i / 8 * bits, left = size - at;
    uint8_t end[8] = {};
    const uint8_t *from = stream + at;
    if (left < 8) {  // nothing beyond the row is read
      memcpy(end, from, size_t(left));
      from = end;
    }
    int32_t low, high;
    memcpy(&low, from, 4);
    memcpy(&high, from + second, 4);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi32(low)), _mm_set1_epi32(high), 1);
    const __m256 codes = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(both, shift), mask));
    if (i + 8 <= count) {
      _mm256_storeu_ps(out + i, codes);
    } else {
      float last[8];
      _mm256_storeu_ps(last, codes);
      memcpy(out + i, last, size_t(count - i) * 4);
    }
  }
}

}  // namespace

#include "rows.h"

const Isa mkp_isa_avx2 = {rows_linear, rows_dequantize, rows_signs, rows_signs_transposed};

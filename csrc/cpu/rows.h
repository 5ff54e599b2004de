// Everything, a row at a time, on any processor: a row's codes become float32 differences `code - zero point`, which are exact, and what is asked for is
// done with those. Takes every width, group size and type; the fast paths of avx512.h fall back to it.
//
// The file that includes this has the flags of its instruction set, and may define MKP_UNPACK, a faster `unpack`.
#pragma once

#include <stdlib.h>

#include "isa.h"
#include "numbers.h"

namespace {

constexpr int64_t SERIAL = 1 << 18;  // weights below which threads cost more than they bring

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t groups_of(const mkp_weight &w) { return divided_up(w.k, w.group_size); }

inline const uint32_t *row_words(const mkp_weight &w, int64_t row) { return (const uint32_t *)w.packed + row * w.packed_stride; }

inline const void *row_scale(const mkp_weight &w, int64_t row) { return (const char *)w.scale + row * w.scale_stride * size_of(w.scale_dtype); }

// The code at a bit of a stream of words, `pitch` words from one to the next.
inline uint32_t code_at(const uint32_t *words, int64_t pitch, int64_t bit, int bits) {
  const int shift = int(bit & 31);
  uint32_t code = words[(bit >> 5) * pitch] >> shift;
  if (shift + bits > 32) code |= words[((bit >> 5) + 1) * pitch] << (32 - shift);
  return code & ((1u << bits) - 1);
}

inline float zero_of(const mkp_weight &w, int64_t row, int64_t group, int64_t groups) {
  if (!w.zero_point) return float(1 << (w.bits - 1));
  return float(code_at((const uint32_t *)w.zero_point + group, groups, row * w.bits, w.bits));
}

#ifndef MKP_UNPACK
template <int BITS> void unpack_whole(const uint32_t *words, int64_t count, float *out) {
  constexpr int EACH = 32 / BITS;
  constexpr uint32_t MASK = (1u << BITS) - 1;
  int64_t i = 0;
  for (; i + EACH <= count; i += EACH)
    for (int j = 0; j < EACH; j++) out[i + j] = float(int32_t(words[i / EACH] >> (j * BITS) & MASK));
  for (; i < count; i++) out[i] = float(code_at(words, 1, i * BITS, BITS));
}

// The codes of a row, unsigned, as float32.
void unpack(const uint32_t *words, int bits, int64_t count, float *out) {
  if (bits == 4) return unpack_whole<4>(words, count, out);
  if (bits == 8) return unpack_whole<8>(words, count, out);
  if (bits == 2) return unpack_whole<2>(words, count, out);
  for (int64_t i = 0; i < count; i++) out[i] = float(code_at(words, 1, i * bits, bits));
}
#endif

void differences(const mkp_weight &w, int64_t row, float *out) {
  unpack(row_words(w, row), w.bits, w.k, out);
  const int64_t groups = groups_of(w);
  for (int64_t group = 0; group < groups; group++) {
    const float zero = zero_of(w, row, group, groups);
    const int64_t end = least(w.k, (group + 1) * w.group_size);
    for (int64_t i = group * w.group_size; i < end; i++) out[i] -= zero;
  }
}

float dot(const float *a, const float *b, int64_t count) {
  float sums[32] = {};  // chains that do not wait for one another
  int64_t i = 0;
  for (; i + 32 <= count; i += 32)
    for (int j = 0; j < 32; j++) sums[j] += a[i + j] * b[i + j];
  for (int width = 16; width; width /= 2)
    for (int j = 0; j < width; j++) sums[j] += sums[j + width];
  float total = sums[0];
  for (; i < count; i++) total += a[i] * b[i];
  return total;
}

struct Scratch {  // freed with its scope; null where memory is out
  float *data;
  explicit Scratch(int64_t floats) : data(nullptr) {
    if (posix_memalign((void **)&data, 64, size_t(floats ? floats : 1) * 4)) data = nullptr;
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
};

inline int team(int64_t work, int threads) { return work < SERIAL || threads < 1 ? 1 : threads; }

int32_t rows_linear(const mkp_weight &w, const mkp_rows &x, const mkp_rows &y, int threads) {
  const int64_t groups = groups_of(w);
  const int parts = team(w.n * w.k, threads);
  const bool given = x.dtype == MKP_FLOAT32;
  Scratch staged(given ? 0 : x.m * w.k), rows(parts * w.k);
  if (!staged.data || !rows.data) return MKP_FAILED;
#pragma omp parallel num_threads(parts)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < x.m; i++)
      if (!given) load_row(row_of(x, i), x.dtype, w.k, staged.data + i * w.k);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; part++) {
      float *row = rows.data + part * w.k;
      for (int64_t n = w.n * part / parts; n < w.n * (part + 1) / parts; n++) {
        differences(w, n, row);
        for (int64_t i = 0; i < x.m; i++) {
          const float *numbers = given ? (const float *)row_of(x, i) : staged.data + i * w.k;
          float total = 0;
          for (int64_t group = 0; group < groups; group++) {
            const int64_t from = group * w.group_size;
            total += load(row_scale(w, n), w.scale_dtype, group) * dot(row + from, numbers + from, least(w.group_size, w.k - from));
          }
          store(row_of(y, i), y.dtype, n, total);
        }
      }
    }
  }
  return MKP_OK;
}

int32_t rows_dequantize(const mkp_weight &w, const mkp_rows &out, int threads) {
  const int64_t groups = groups_of(w);
  const int parts = team(w.n * w.k, threads);
  Scratch rows(parts * w.k);
  if (!rows.data) return MKP_FAILED;
#pragma omp parallel for schedule(static) num_threads(parts)
  for (int64_t part = 0; part < parts; part++) {
    float *row = rows.data + part * w.k;
    for (int64_t n = w.n * part / parts; n < w.n * (part + 1) / parts; n++) {
      differences(w, n, row);
      for (int64_t group = 0; group < groups; group++) {
        const float scale = load(row_scale(w, n), w.scale_dtype, group);
        const int64_t end = least(w.k, (group + 1) * w.group_size);
        for (int64_t i = group * w.group_size; i < end; i++) row[i] *= scale;
      }
      store_row(row, w.k, out.dtype, row_of(out, n));
    }
  }
  return MKP_OK;
}

inline float sign_at(const uint8_t *bits, int64_t place) { return bits[place >> 3] >> (place & 7) & 1 ? 1.0f : -1.0f; }

int32_t rows_signs(const mkp_signs &s, const mkp_rows &x, const mkp_rows &y, int threads) {
  const int parts = team(s.rows * s.width, threads);
  Scratch staged(x.m * s.width), rows(parts * s.width);
  if (!staged.data || !rows.data) return MKP_FAILED;
  for (int64_t i = 0; i < x.m; i++) load_row(row_of(x, i), x.dtype, s.width, staged.data + i * s.width);
#pragma omp parallel for schedule(static) num_threads(parts)
  for (int64_t part = 0; part < parts; part++) {
    float *row = rows.data + part * s.width;
    for (int64_t n = s.rows * part / parts; n < s.rows * (part + 1) / parts; n++) {
      for (int64_t k = 0; k < s.width; k++) row[k] = sign_at(s.bits + n * s.stride, k);
      for (int64_t i = 0; i < x.m; i++) ((float *)row_of(y, i))[n] = dot(row, staged.data + i * s.width, s.width);
    }
  }
  return MKP_OK;
}

constexpr int64_t STRIP = 512;  // outputs of S^T that are summed at once, in cache

int32_t rows_signs_transposed(const mkp_signs &s, const mkp_rows &x, const mkp_rows &y, int threads) {
  const int parts = team(s.rows * s.width, threads);
  const int64_t strips = divided_up(s.width, STRIP);
#pragma omp parallel for schedule(static) num_threads(parts)
  for (int64_t strip = 0; strip < strips; strip++) {
    const int64_t from = strip * STRIP, count = least(STRIP, s.width - from);
    for (int64_t i = 0; i < x.m; i++) {
      float *out = (float *)row_of(y, i) + from;
      for (int64_t k = 0; k < count; k++) out[k] = 0;
      for (int64_t row = 0; row < s.rows; row++) {
        const float value = load(row_of(x, i), x.dtype, row);
        const uint8_t *bits = s.bits + row * s.stride;
        for (int64_t k = 0; k < count; k++) out[k] += value * sign_at(bits, from + k);
      }
    }
  }
  return MKP_OK;
}

}  // namespace

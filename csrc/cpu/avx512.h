// x W^T with 512-bit vectors, straight from the stored codes.
//
// A dot product does not care about the order of its terms. So the codes are taken in the order in which they fall out of a register, and the activations
// are brought into that order once a call. A `Layout` says which: a chunk is what one load of a row brings, its codes become VECTORS registers of exact
// integers `code - 2^(bits-1)` by table lookup, and 32-bit lane l of the sums always covers codes l*LANE .. l*LANE + LANE-1 of the chunk. Scales multiply
// the float32 sums of a lane, never a weight; a zero point z takes (z - 2^(bits-1)) times the sum of the lane's activations away. Both need a lane to lie
// in one group: LANE divides the group size, or rows.h does it.
//
// Sums are kept apart by row and token and flushed at the same places whatever is tiled with what, so the number of threads and of tokens changes no bit.
#pragma once

#include <immintrin.h>

#include "rows.h"

namespace {

constexpr int BLOCK = 16;      // rows of W between two visits of the same activations
constexpr int SEGMENT = 1024;  // codes after which sums are flushed and, with many tokens, other activations are taken: they must stay in the first cache

inline __m512i bytes_of(const uint8_t *from, int64_t count) { return _mm512_maskz_loadu_epi8(count >= 64 ? ~0ull : (1ull << count) - 1, from); }

// Codes of any width as bytes, 64 a chunk: the bytes of eight codes are brought into a 64-bit lane, then one instruction takes eight fields out of it.
// What lies above a code in its byte is not cleared; the tables repeat.
template <int BITS> struct Spread {
  static constexpr int CHUNK = 64, BYTES = 8 * BITS, LANE = 4;
  __m512i gather, fields;
  Spread() {
    alignas(64) uint8_t from[64], shift[64];
    for (int i = 0; i < 64; i++) {
      from[i] = uint8_t(i % 8 < BITS ? i / 8 * BITS + i % 8 : 0);
      shift[i] = uint8_t(i % 8 * BITS);
    }
    gather = _mm512_load_si512(from);
    fields = _mm512_load_si512(shift);
  }
  __m512i load(const uint8_t *row, int64_t chunk, int64_t bytes) const {
    const int64_t at = chunk * BYTES, left = bytes - at;
    const __m512i raw = bytes_of(row + at, left < BYTES ? left : BYTES);
    return BITS == 8 ? raw : _mm512_multishift_epi64_epi8(fields, _mm512_permutexvar_epi8(gather, raw));
  }
};

template <int CODES> struct Plain {  // the words as they lie
  static constexpr int CHUNK = CODES, BYTES = 64, LANE = CODES / 16;
  __m512i load(const uint8_t *row, int64_t chunk, int64_t bytes) const {
    const int64_t at = chunk * BYTES, left = bytes - at;
    return left >= 64 ? _mm512_loadu_si512(row + at) : bytes_of(row + at, left);
  }
};

// ---- float32 activations: a register holds 16 weights ----

template <class From, int BITS> struct Floats : From {
  using Number = float;
  static constexpr int VECTORS = From::CHUNK / 16, STEP = BITS == 2 || BITS == 4 ? BITS : 8;
  __m512 table;
  Floats() {
    alignas(64) float values[16];
    for (int i = 0; i < 16; i++) values[i] = float((i & ((1 << BITS) - 1)) - (1 << (BITS - 1)));
    table = _mm512_load_ps(values);
  }
  // The code that element e of vector v is multiplied by.
  static constexpr int code(int v, int e) { return From::LANE * e + v; }
  template <int V> __m512 weights(__m512i raw) const {
    if constexpr (BITS <= 4) {
      return _mm512_permutexvar_ps(_mm512_srli_epi32(raw, STEP * V), table);
    } else {  // the table is too short: the code's first bit is turned over, which makes it signed, and it is brought to the top of its lane and back
      const __m512i top = _mm512_slli_epi32(_mm512_xor_si512(raw, _mm512_set1_epi8(char(1 << (BITS - 1)))), 32 - 8 * V - BITS);
      return _mm512_cvtepi32_ps(_mm512_srai_epi32(top, 32 - BITS));
    }
  }
  static __m512 add(__m512 sums, __m512 weights, const void *x) { return _mm512_fmadd_ps(weights, _mm512_load_ps(x), sums); }
  static Number number(float value) { return value; }
  static float value(Number number) { return number; }
};

// ---- bfloat16 activations: a register holds 32 weights, a lane sums two products ----
#ifdef __AVX512BF16__
struct Bfloats {
  using Number = uint16_t;
  static __m512 add(__m512 sums, __m512i weights, const void *x) { return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)_mm512_load_si512(x)); }
  static Number number(float value) { return to_bfloat16(value); }
  static float value(Number number) { return from_bfloat16(number); }
};

template <int BITS> __m512i bfloat_table() {
  alignas(64) uint16_t values[32];
  for (int i = 0; i < 32; i++) values[i] = to_bfloat16(float((i & ((1 << BITS) - 1)) - (1 << (BITS - 1))));
  return _mm512_load_si512(values);
}

struct Bfloats4 : Plain<128>, Bfloats {
  static constexpr int VECTORS = 4;
  __m512i table = bfloat_table<4>();
  static constexpr int code(int v, int e) { return 4 * e + v; }
  template <int V> __m512i weights(__m512i raw) const { return _mm512_permutexvar_epi16(_mm512_srli_epi16(raw, 4 * V), table); }
};

struct Bfloats2 : Plain<256>, Bfloats {  // four bits at a time are two codes
  static constexpr int VECTORS = 8;
  __m512i table;
  Bfloats2() {
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 16; i++) {
      values[2 * i] = to_bfloat16(float(i % 4 - 2));
      values[2 * i + 1] = to_bfloat16(float(i / 4 - 2));
    }
    table = _mm512_load_si512(values);
  }
  static constexpr int code(int v, int e) { return 16 * (e / 2) + 2 * v + e % 2; }
  template <int V> __m512i weights(__m512i raw) const { return _mm512_permutexvar_epi32(_mm512_srli_epi32(raw, 4 * V), table); }
};

template <int BITS> struct BfloatsOf : Spread<BITS>, Bfloats {
  static constexpr int VECTORS = 2;
  __m512i table = bfloat_table<BITS>();
  static constexpr int code(int v, int e) { return 2 * e + v; }
  template <int V> __m512i weights(__m512i raw) const { return _mm512_permutexvar_epi16(_mm512_srli_epi16(raw, 8 * V), table); }
};
#endif

// ---- the product ----

struct Segment {  // chunks between two flushes, and where the scales of their lanes are
  int32_t from, to, group;
  int32_t place[16];  // of each lane's group, from `group` on
};

struct Product {  // of one call
  const mkp_weight &w;
  int64_t groups, chunks, segments, bytes;  // bytes of a row
  bool whole;                               // a segment lies in one group
  const Segment *segment;
  const char *x;       // [m][chunks][VECTORS] registers
  const float *x_sum;  // [m][segments][16], of each lane's activations; null where there are no zero points
  int64_t x_pitch;     // bytes from one token to the next
};

template <class Layout> int64_t segments_of(const mkp_weight &w, int64_t chunks, Segment *out) {
  const int64_t groups = groups_of(w);
  const bool whole = groups == 1 || w.group_size % Layout::CHUNK == 0;
  int64_t count = 0;
  for (int64_t chunk = 0; chunk < chunks; count++) {
    const int64_t code = chunk * Layout::CHUNK, group = least(code / w.group_size, groups - 1);
    int64_t end = chunk + 1;
    if (whole) {
      const int64_t group_end = groups == 1 ? chunks : (group + 1) * w.group_size / Layout::CHUNK;
      end = least(least(chunks, group_end), (code / SEGMENT + 1) * SEGMENT / Layout::CHUNK);
    }
    if (out) {
      out[count] = {int32_t(chunk), int32_t(end), int32_t(group), {}};
      for (int lane = 0; lane < 16; lane++)
        out[count].place[lane] = int32_t(whole ? 0 : least((code + lane * Layout::LANE) / w.group_size, groups - 1) - group);
    }
    chunk = end;
  }
  return count;
}

template <class Layout> void stage(const mkp_weight &w, const mkp_rows &x, int64_t row, int64_t chunks, float *numbers, void *out) {
  load_row(row_of(x, row), x.dtype, w.k, numbers);
  for (int64_t i = w.k; i < chunks * Layout::CHUNK; i++) numbers[i] = 0;
  constexpr int EACH = Layout::CHUNK / Layout::VECTORS;
  typename Layout::Number *to = (typename Layout::Number *)out;
  for (int64_t chunk = 0; chunk < chunks; chunk++, numbers += Layout::CHUNK, to += Layout::CHUNK)
    for (int v = 0; v < Layout::VECTORS; v++)
      for (int e = 0; e < EACH; e++) to[v * EACH + e] = Layout::number(numbers[Layout::code(v, e)]);
}

template <class Layout> void lane_sums(const Segment *segment, int64_t segments, const float *numbers, float *out) {
  for (int64_t s = 0; s < segments; s++)
    for (int lane = 0; lane < 16; lane++) {
      float sum = 0;
      for (int64_t chunk = segment[s].from; chunk < segment[s].to; chunk++)
        for (int i = 0; i < Layout::LANE; i++) sum += numbers[chunk * Layout::CHUNK + lane * Layout::LANE + i];
      out[s * 16 + lane] = sum;
    }
}

template <class Layout, int V, int R, int T>
inline __attribute__((always_inline)) void multiply(const Layout &layout, const __m512i (&raw)[R], const char *x, int64_t pitch, __m512 (&sums)[R][T]) {
  if constexpr (V < Layout::VECTORS) {
    for (int r = 0; r < R; r++) {
      const auto weights = layout.template weights<V>(raw[r]);
      for (int t = 0; t < T; t++) sums[r][t] = Layout::add(sums[r][t], weights, x + t * pitch + V * 64);
    }
    multiply<Layout, V + 1, R, T>(layout, raw, x, pitch, sums);
  }
}

// R rows with T tokens over some segments. scales, zeros: [row][pitch]; totals: [row][m][16].
template <class Layout, int R, int T>
void tile(const Layout &layout, const Product &p, int64_t row, int64_t token, int64_t from, int64_t to, const float *scales, const float *zeros,
          int64_t pitch, float *totals, int64_t m) {
  const uint8_t *rows[R];
  for (int r = 0; r < R; r++) rows[r] = (const uint8_t *)row_words(p.w, row + r);
  const char *x = p.x + token * p.x_pitch;
  const int64_t ahead = R * p.w.packed_stride * 4;  // the next rows: a row is too short for the processor to see a stream in it
  for (int64_t s = from; s < to; s++) {
    const Segment &segment = p.segment[s];
    __m512 sums[R][T];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) sums[r][t] = _mm512_setzero_ps();
    for (int64_t chunk = segment.from; chunk < segment.to; chunk++) {
      __m512i raw[R];
      for (int r = 0; r < R; r++) {
        raw[r] = layout.load(rows[r], chunk, p.bytes);
        if (!token) _mm_prefetch((const char *)rows[r] + chunk * Layout::BYTES + ahead, _MM_HINT_T0);
      }
      multiply<Layout, 0, R, T>(layout, raw, x + chunk * (Layout::VECTORS * 64), p.x_pitch, sums);
    }
    const __m512i place = _mm512_loadu_si512(segment.place);
    for (int r = 0; r < R; r++) {
      const float *at = scales + r * pitch + segment.group;
      const __m512 scale = p.whole ? _mm512_set1_ps(*at) : _mm512_permutexvar_ps(place, _mm512_loadu_ps(at));
      if (zeros) {
        const __m512 zero = _mm512_permutexvar_ps(place, _mm512_loadu_ps(zeros + r * pitch + segment.group));
        for (int t = 0; t < T; t++) sums[r][t] = _mm512_fnmadd_ps(zero, _mm512_load_ps(p.x_sum + ((token + t) * p.segments + s) * 16), sums[r][t]);
      }
      for (int t = 0; t < T; t++) {
        float *total = totals + (r * m + token + t) * 16;
        _mm512_store_ps(total, _mm512_fmadd_ps(scale, sums[r][t], _mm512_load_ps(total)));
      }
    }
  }
}

template <class Layout>
void block(const Layout &layout, const Product &p, int64_t row, int64_t count, const mkp_rows &y, float *scratch, int64_t pitch) {
  float *scales = scratch, *zeros = p.w.zero_point ? scales + BLOCK * pitch : nullptr, *totals = scales + 2 * BLOCK * pitch;
  const float middle = float(1 << (p.w.bits - 1));
  const int64_t m = y.m;
  for (int64_t r = 0; r < count; r++) {
    load_row(row_scale(p.w, row + r), p.w.scale_dtype, p.groups, scales + r * pitch);
    for (int64_t g = p.groups; g < pitch; g++) scales[r * pitch + g] = 0;
    if (zeros)
      for (int64_t g = 0; g < pitch; g++) zeros[r * pitch + g] = g < p.groups ? zero_of(p.w, row + r, g, p.groups) - middle : 0;
  }
  memset(totals, 0, size_t(count * m) * 64);
  for (int64_t from = 0, to; from < p.segments; from = to) {
    const int64_t limit = m <= 4 ? p.chunks : p.segment[from].from + SEGMENT / Layout::CHUNK;
    for (to = from + 1; to < p.segments && p.segment[to].to <= limit;) to++;
    const auto run = [&](auto tile, int64_t r, int64_t t) {
      tile(layout, p, row + r, t, from, to, scales + r * pitch, zeros ? zeros + r * pitch : nullptr, pitch, totals + r * m * 16, m);
    };
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
      int64_t t = 0;
      for (; t + 8 <= m; t += 8) {
        run(tile<Layout, 2, 8>, r, t);
        run(tile<Layout, 2, 8>, r + 2, t);
      }
      for (; t + 4 <= m; t += 4) run(tile<Layout, 4, 4>, r, t);
      for (; t + 2 <= m; t += 2) run(tile<Layout, 4, 2>, r, t);
      for (; t < m; t++) run(tile<Layout, 4, 1>, r, t);
    }
    for (; r < count; r++)
      for (int64_t t = 0; t < m; t++) run(tile<Layout, 1, 1>, r, t);
  }
  for (int64_t r = 0; r < count; r++)
    for (int64_t t = 0; t < m; t++) store(row_of(y, t), y.dtype, row + r, _mm512_reduce_add_ps(_mm512_load_ps(totals + (r * m + t) * 16)));
}

template <class Layout> int32_t vector_linear(const mkp_weight &w, const mkp_rows &x, const mkp_rows &y, int threads) {
  const int64_t groups = groups_of(w), chunks = divided_up(w.k, Layout::CHUNK), pitch = divided_up(groups, 16) * 16 + 16;
  if (groups > 1 && w.group_size % Layout::LANE) return MKP_UNSUPPORTED;
  const int64_t segments = segments_of<Layout>(w, chunks, nullptr), padded = chunks * Layout::CHUNK;
  const int64_t blocks = divided_up(w.n, BLOCK), own = 2 * BLOCK * pitch + BLOCK * x.m * 16 + padded;
  const int parts = team(w.n * w.k, threads);
  const int64_t x_floats = divided_up(padded * int64_t(sizeof(typename Layout::Number)), 64) * 16;
  Scratch list(segments * int64_t(sizeof(Segment)) / 4), staged(x.m * x_floats), sums(w.zero_point ? x.m * segments * 16 : 0);
  Scratch scratch(parts * own);
  if (!list.data || !staged.data || !sums.data || !scratch.data) return MKP_FAILED;
  Segment *segment = (Segment *)list.data;
  segments_of<Layout>(w, chunks, segment);
  const bool whole = groups == 1 || w.group_size % Layout::CHUNK == 0;
  const int64_t bytes = divided_up(w.k * w.bits, 32) * 4;
  const Product p = {w, groups, chunks, segments, bytes, whole, segment, (const char *)staged.data, w.zero_point ? sums.data : nullptr, x_floats * 4};
#pragma omp parallel num_threads(parts)
  {
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; part++) {
      float *numbers = scratch.data + part * own + own - padded;
      for (int64_t i = x.m * part / parts; i < x.m * (part + 1) / parts; i++) {
        stage<Layout>(w, x, i, chunks, numbers, staged.data + i * x_floats);
        if (w.zero_point) lane_sums<Layout>(segment, segments, numbers, sums.data + i * segments * 16);
      }
    }
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; part++) {
      const Layout layout;
      for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; b++)
        block(layout, p, b * BLOCK, least(BLOCK, w.n - b * BLOCK), y, scratch.data + part * own, pitch);
    }
  }
  return MKP_OK;
}

}  // namespace

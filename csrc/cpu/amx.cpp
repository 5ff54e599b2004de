// AMX (Sapphire Rapids and newer): x W^T for 4 bits on matrix units, straight from the stored codes.
//
// A step takes 32 rows by CODES inputs. The codes become exact bfloat16 integers `code - 8` in the first cache, by shifts and a table lookup, which is the
// A operand: two tiles of 16 rows for every 32 inputs. Activations are B, in the order in which codes fall out of a register, 16 columns a tile. So up to
// 16 columns cost what one does, and even one is worth it: to decode is all the work the cores' other units are left with. A float16 number is two
// columns and a float32 number three, bfloat16 numbers whose sum it is.
//
// Sums are float32 and leave the matrix unit after CODES inputs, which lie in one group; there a scale multiplies them. Each step decodes for the next one
// and scales the sums of the one before, so that no unit waits for another. A sum depends on its row and column alone, for any number of either.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "rows.h"

namespace {

constexpr int ROWS = 32, LANES = 16;

struct alignas(64) Shapes {  // of the eight tiles: 0 and 1 sums, 4 and 5 weights, 6 and 7 activations
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  explicit Shapes(int columns) {
    for (int tile = 0; tile < 8; tile++) {
      bytes[tile] = uint16_t(tile / 2 == 2 ? 64 : 4 * columns);
      rows[tile] = 16;
    }
  }
};

// CODES inputs of a row: 32, 64 or 128. A load repeats their bytes up to 64, shifts tell the copies apart.
template <int CODES> struct Codes {
  static constexpr int TILES = CODES / 32, BYTES = CODES / 2, COPIES = 128 / CODES;
  __m512i table, shift[TILES];
  Codes() {
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; i++) values[i] = to_bfloat16(float(i % 16 - 8));
    table = _mm512_load_si512(values);
    for (int tile = 0; tile < TILES; tile++) {
      for (int e = 0; e < 32; e++) values[e] = uint16_t(4 * (tile * COPIES + e / (32 / COPIES)));
      shift[tile] = _mm512_load_si512(values);
    }
  }
  // The input that element e of a tile's row is multiplied by.
  static constexpr int code(int tile, int e) { return 4 * (e % (32 / COPIES)) + tile * COPIES + e / (32 / COPIES); }
  static __m512i load(const uint8_t *from) {
    if constexpr (CODES == 128) return _mm512_loadu_si512(from);
    if constexpr (CODES == 64) return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)from));
  }
};

struct Job {  // one call
  const mkp_weight &w;
  int64_t groups, chunks, each;            // chunks of CODES inputs; of one group
  int columns, tiles;                      // of one tile of columns; tiles
  const uint16_t *x;                       // [tiles][chunks][CODES/2 pairs][columns][2]
  const float *sums;                       // [tiles][chunks][16], of each column's activations; null where there are no zero points
  alignas(64) int32_t row[256], column[256];  // of the elements of a tile of sums
};

struct Room {  // of one thread
  uint16_t *weights;          // [2][2][TILES][16][32], of this step's chunk and the next one's
  float *products;            // [2][2][16][columns], of this step and the last one
  float *scales, *zeros;      // [groups][ROWS]
  float *totals;              // [tiles][2][16][columns]
  float *line;                // [groups], a row's scales
};

template <int CODES> inline __attribute__((always_inline))
void decode(const Codes<CODES> &codes, const uint8_t *from, int64_t stride, const char *ahead, uint16_t *out) {
  for (int block = 0; block < 2; block++, out += CODES * 16)
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++, from += stride) {
      const __m512i raw = codes.load(from);
      if (r % codes.COPIES == 0) _mm_prefetch(ahead + (block * 16 + r) * codes.BYTES, _MM_HINT_T1);
#pragma GCC unroll 4
      for (int tile = 0; tile < codes.TILES; tile++) {
        const __m512i shifted = CODES == 128 ? _mm512_srli_epi16(raw, 4 * tile) : _mm512_srlv_epi16(raw, codes.shift[tile]);
        _mm512_store_si512(out + tile * 512 + r * 32, _mm512_permutexvar_epi16(shifted, codes.table));
      }
    }
}

template <int CODES> inline __attribute__((always_inline)) void multiply(const uint16_t *weights, const uint16_t *x, int columns) {
  const int64_t pitch = 4 * columns;
  asm volatile("" ::: "memory");  // compilers do not know that tiles are loaded from memory
  _tile_zero(0);
  _tile_zero(1);
#pragma GCC unroll 4
  for (int tile = 0; tile < CODES / 32; tile++) {
    _tile_loadd(6, x + tile * 32 * columns, pitch);
    _tile_loadd(4, weights + tile * 512, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, weights + CODES * 16 + tile * 512, 64);
    _tile_dpbf16ps(1, 5, 6);
  }
}

inline void finish(int columns, float *out) {
  _tile_stored(0, out, 4 * columns);
  _tile_stored(1, out + 16 * columns, 4 * columns);
}

// totals += scale * (products - zero * sum)
inline void collect(const Job &job, const Room &room, const float *products, int64_t chunk, int64_t group, int tile) {
  for (int block = 0; block < 2; block++) {
    const __m512 scale = _mm512_load_ps(room.scales + group * ROWS + block * 16);
    for (int i = 0; i < job.columns; i++) {
      __m512 product = _mm512_load_ps(products + (block * job.columns + i) * 16);
      const __m512i row = _mm512_load_si512(job.row + i * 16);
      if (job.sums) {
        const __m512 sum = _mm512_load_ps(job.sums + (tile * job.chunks + chunk) * 16), zero = _mm512_load_ps(room.zeros + group * ROWS + block * 16);
        product = _mm512_fnmadd_ps(_mm512_permutexvar_ps(row, zero), _mm512_permutexvar_ps(_mm512_load_si512(job.column + i * 16), sum), product);
      }
      float *total = room.totals + ((tile * 2 + block) * job.columns + i) * 16;
      _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_permutexvar_ps(row, scale), product, _mm512_load_ps(total)));
    }
  }
}

void scales_of(const Job &job, int64_t row, const Room &room) {
  for (int r = 0; r < ROWS; r++) {
    load_row(row_scale(job.w, row + r), job.w.scale_dtype, job.groups, room.line);
    for (int64_t g = 0; g < job.groups; g++) room.scales[g * ROWS + r] = room.line[g];
    if (!job.w.zero_point) continue;
    const uint32_t *words = (const uint32_t *)job.w.zero_point + (row + r) / 8 * job.groups;
    for (int64_t g = 0; g < job.groups; g++) room.zeros[g * ROWS + r] = float(int32_t(words[g] >> (row + r) % 8 * 4 & 15) - 8);
  }
}

template <int CODES> void rows(const Codes<CODES> &codes, const Job &job, int64_t row, const Room &room) {
  const int64_t stride = job.w.packed_stride * 4, bytes = divided_up(job.w.k, 8) * 4, whole = bytes / codes.BYTES;
  const uint8_t *words = (const uint8_t *)row_words(job.w, row);
  const char *ahead = (const char *)words + ROWS * stride;  // the next rows, in the order of memory: these are too many streams, each too short
  const int weights = ROWS * CODES, products = ROWS * job.columns;
  const auto fetch = [&](int64_t chunk) {
    uint16_t *out = room.weights + chunk % 2 * weights;
    if (chunk < whole) return decode(codes, words + chunk * codes.BYTES, stride, ahead + chunk * ROWS * codes.BYTES, out);
    alignas(64) uint8_t end[ROWS * codes.BYTES] = {};
    for (int r = 0; r < ROWS; r++) memcpy(end + r * codes.BYTES, words + r * stride + whole * codes.BYTES, size_t(bytes - whole * codes.BYTES));
    decode(codes, end, codes.BYTES, ahead, out);
  };
  scales_of(job, row, room);
  memset(room.totals, 0, size_t(job.tiles * products) * 4);
  fetch(0);
  int64_t step = 0, last_chunk = 0, last_group = 0, left = job.each;
  int last_tile = 0;
  for (int64_t chunk = 0, group = 0; chunk < job.chunks; chunk++) {
    for (int tile = 0; tile < job.tiles; tile++, step++) {
      const uint16_t *x = job.x + (tile * job.chunks + chunk) * CODES * job.columns;
      multiply<CODES>(room.weights + chunk % 2 * weights, x, job.columns);
      if (!tile && chunk + 1 < job.chunks) fetch(chunk + 1);
      finish(job.columns, room.products + step % 2 * products);
      if (step) collect(job, room, room.products + (step + 1) % 2 * products, last_chunk, last_group, last_tile);
      last_chunk = chunk, last_group = group, last_tile = tile;
    }
    if (!--left) left = job.each, group++;
  }
  collect(job, room, room.products + (step + 1) % 2 * products, last_chunk, last_group, last_tile);
}

// The bfloat16 number next to each on the side of zero, where none overflows, and what is left of it. Three of them hold a float32 number.
void split(float *numbers, int64_t count, uint16_t *out) {
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = bits_of(numbers[i]), size = bits & 0x7fffffff;
    out[i] = uint16_t(bits >> 16 | (size > 0x7f800000 ? 0x40 : 0));  // NaN stays NaN
    numbers[i] = size < 0x7f800000 ? numbers[i] - float_of(bits & 0xffff0000) : 0;
  }
}

// A column of activations.
template <int CODES> void stage(const Job &job, const uint16_t *numbers, int64_t column, uint16_t *x, float *sums) {
  const int64_t tile = column / job.columns, place = column % job.columns;
  uint32_t *to = (uint32_t *)x + tile * job.chunks * (CODES / 2 * job.columns) + place;
  for (int64_t chunk = 0; chunk < job.chunks; chunk++, numbers += CODES) {
#pragma GCC unroll 16
    for (int e = 0; e < CODES; e += 2, to += job.columns)
      *to = numbers[Codes<CODES>::code(e / 32, e % 32)] | uint32_t(numbers[Codes<CODES>::code(e / 32, e % 32 + 1)]) << 16;
    if (!job.sums) continue;
    float sum = 0;
    for (int i = 0; i < CODES; i++) sum += from_bfloat16(numbers[i]);
    sums[(tile * job.chunks + chunk) * 16 + place] = sum;
  }
}

template <int CODES> int32_t tiled(const mkp_weight &w, const mkp_rows &x, const mkp_rows &y, int threads) {
  const int parts = x.dtype == MKP_BFLOAT16 ? 1 : x.dtype == MKP_FLOAT16 ? 2 : 3;
  const int64_t groups = groups_of(w), chunks = divided_up(w.k, CODES);
  const int64_t count = x.m * parts, tiles = divided_up(count, 16), columns = divided_up(count, tiles);
  const int64_t blocks = divided_up(w.n, ROWS), padded = chunks * CODES;
  const int64_t own[] = {ROWS * CODES, 2 * ROWS * columns, groups * ROWS, groups * ROWS, tiles * ROWS * columns,
                         divided_up(groups, 16) * 16, padded + padded / 2};
  int64_t all = 0;
  for (const int64_t floats : own) all += floats;
  const int team_size = team(w.n * w.k, threads);
  Scratch staged(tiles * columns * padded / 2), sums(w.zero_point ? tiles * chunks * 16 : 0), scratch(team_size * all);
  if (!staged.data || !sums.data || !scratch.data) return MKP_FAILED;
  Job job = {w, groups, chunks, groups == 1 ? chunks : w.group_size / CODES, int(columns), int(tiles), (const uint16_t *)staged.data,
             w.zero_point ? sums.data : nullptr, {}, {}};
  for (int i = 0; i < 256; i++) job.row[i] = i / int(columns) % 16, job.column[i] = i % int(columns);
  if (count < tiles * columns) memset(staged.data, 0, size_t(tiles * columns * padded) * 2);
  if (w.zero_point) memset(sums.data, 0, size_t(tiles * chunks) * 64);
#pragma omp parallel num_threads(team_size)
  {
#pragma omp for schedule(static)
    for (int64_t part = 0; part < team_size; part++) {
      float *numbers = scratch.data + part * all + all - own[6];
      for (int64_t i = x.m * part / team_size; i < x.m * (part + 1) / team_size; i++) {
        load_row(row_of(x, i), x.dtype, w.k, numbers);
        for (int64_t k = w.k; k < padded; k++) numbers[k] = 0;
        for (int64_t column = i * parts; column < (i + 1) * parts; column++) {
          split(numbers, padded, (uint16_t *)(numbers + padded));
          stage<CODES>(job, (const uint16_t *)(numbers + padded), column, (uint16_t *)staged.data, sums.data);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t part = 0; part < team_size; part++) {
      float *at[6], *next = scratch.data + part * all;
      for (int i = 0; i < 6; i++) at[i] = next, next += own[i];
      const Room room = {(uint16_t *)at[0], at[1], at[2], at[3], at[4], at[5]};
      const Codes<CODES> codes;
      const Shapes shapes{job.columns};
      asm volatile("" ::"r"(&shapes) : "memory");  // nor that all of these are read
      _tile_loadconfig(&shapes);
      for (int64_t b = blocks * part / team_size; b < blocks * (part + 1) / team_size; b++) {
        const int64_t from = least(b * ROWS, w.n - ROWS);  // the last rows are done with some before them, which are not written again
        rows(codes, job, from, room);
        const int64_t first = b * ROWS - from;
        for (int64_t token = 0; token < x.m; token++) {
          float sums[ROWS] = {};
          for (int64_t column = (token + 1) * parts - 1; column >= token * parts; column--) {  // the smallest part first
            const float *totals = room.totals + column / columns * ROWS * columns + column % columns;
            for (int r = 0; r < ROWS; r++) sums[r] += totals[r * columns];
          }
          store_row(sums + first, ROWS - first, y.dtype, (char *)row_of(y, token) + (from + first) * size_of(y.dtype));
        }
      }
      _tile_release();
    }
  }
  return MKP_OK;
}

int32_t linear(const mkp_weight &w, const mkp_rows &x, const mkp_rows &y, int threads) {
  if (w.bits != 4 || w.n < ROWS) return MKP_UNSUPPORTED;
  if (groups_of(w) == 1 || w.group_size % 128 == 0) return tiled<128>(w, x, y, threads);
  if (w.group_size % 64 == 0) return tiled<64>(w, x, y, threads);
  if (w.group_size % 32 == 0) return tiled<32>(w, x, y, threads);
  return MKP_UNSUPPORTED;
}

}  // namespace

const Isa mkp_isa_amx = {linear, nullptr, nullptr, nullptr};

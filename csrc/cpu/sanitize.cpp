// Every function on every instruction set and odd shapes, under ASan and UBSan: each buffer is of the exact size and on the heap, so that a read or a
// write beyond it ends the run; results are compared with products in double. `make sanitize` builds and runs it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "mergekit_plus_kernels.h"

namespace {

std::mt19937 generator(0);

uint32_t random_bits() { return uint32_t(generator()); }
int between(int low, int high) { return low + int(random_bits() % uint32_t(high - low + 1)); }
float random_float() { return float(int(random_bits() % 2001) - 1000) / 512; }

std::vector<int32_t> random_words(int64_t count) {
  std::vector<int32_t> words;
  words.reserve(size_t(count));  // no more than that
  for (int64_t i = 0; i < count; i++) words.push_back(int32_t(random_bits()));
  return words;
}

int code(const std::vector<int32_t> &words, int64_t from, int64_t pitch, int64_t bit, int bits) {
  int value = 0;
  for (int i = 0; i < bits; i++) value |= int(uint32_t(words[size_t(from + (bit + i) / 32 * pitch)]) >> ((bit + i) % 32) & 1) << i;
  return value;
}

void require(bool right, const char *what, int isa, int64_t n, int64_t k, int bits) {
  if (right) return;
  std::fprintf(stderr, "%s is wrong: instruction set %d, [%lld, %lld], %d bits\n", what, isa, (long long)n, (long long)k, bits);
  std::exit(1);
}

void one_weight(int isa) {
  const int bits = between(1, 8);
  const int64_t n = between(1, 80), k = between(1, 600), m = between(1, 12), group = between(0, 2) ? 8 * between(1, 40) : between(1, 200);
  const int64_t groups = (k + group - 1) / group, words = (k * bits + 31) / 32;
  const bool symmetric = random_bits() & 1;
  std::vector<int32_t> packed = random_words(n * words), zeros = random_words(symmetric ? 0 : (n * bits + 31) / 32 * groups);
  std::vector<float> scale(size_t(n * groups)), x(size_t(m * k)), y(size_t(m * n), NAN), w(size_t(n * k), NAN);
  for (float &each : scale) each = random_float();
  for (float &each : x) each = random_float();
  const mkp_weight weight = {packed.data(), scale.data(), symmetric ? nullptr : zeros.data(), n, k, group, words, groups, bits, MKP_FLOAT32};
  const mkp_rows in = {x.data(), m, k, MKP_FLOAT32}, out = {y.data(), m, n, MKP_FLOAT32}, whole = {w.data(), n, k, MKP_FLOAT32};
  require(mkp_cpu_linear(&weight, &in, &out, 2, isa) == MKP_OK, "status", isa, n, k, bits);
  require(mkp_cpu_dequantize(&weight, &whole, 2, isa) == MKP_OK, "status", isa, n, k, bits);
  for (int64_t row = 0; row < n; row++)
    for (int64_t token = 0; token < m; token++) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < k; i++) {
        const int zero = symmetric ? 1 << (bits - 1) : code(zeros, i / group, groups, row * bits, bits);
        const double value = (code(packed, row * words, 1, i * bits, bits) - zero) * double(scale[size_t(row * groups + i / group)]);
        require(std::abs(w[size_t(row * k + i)] - value) <= 1e-6 * std::abs(value), "a dequantized weight", isa, n, k, bits);
        sum += value * double(x[size_t(token * k + i)]);
        size += double(1 << bits) * std::abs(double(scale[size_t(row * groups + i / group)]) * double(x[size_t(token * k + i)]));
      }
      require(std::abs(y[size_t(token * n + row)] - sum) <= 2e-6 * size, "a product", isa, n, k, bits);
    }
  // 16-bit types: only what they read and write is watched here
  for (const int32_t type : {MKP_FLOAT16, MKP_BFLOAT16}) {
    std::vector<uint16_t> half_scale(size_t(n * groups), 0x3c00), half_x(size_t(m * k), 0x3c00), half_y(size_t(m * n)), half_w(size_t(n * k));
    mkp_weight half = weight;
    half.scale = half_scale.data();
    half.scale_dtype = type;
    const mkp_rows half_in = {half_x.data(), m, k, type}, half_out = {half_y.data(), m, n, type}, half_whole = {half_w.data(), n, k, type};
    require(mkp_cpu_linear(&half, &half_in, &half_out, 2, isa) == MKP_OK, "status", isa, n, k, bits);
    require(mkp_cpu_dequantize(&half, &half_whole, 2, isa) == MKP_OK, "status", isa, n, k, bits);
  }
}

void one_set_of_signs(int isa) {
  const int64_t rows = between(1, 40), width = between(1, 700), m = between(1, 4), bytes = (width + 7) / 8;
  std::vector<uint8_t> bits(size_t(rows * bytes));
  for (uint8_t &each : bits) each = uint8_t(random_bits());
  const mkp_signs signs = {bits.data(), rows, width, bytes};
  for (const bool transposed : {false, true}) {
    const int64_t from = transposed ? rows : width, to = transposed ? width : rows;
    std::vector<float> x(size_t(m * from)), y(size_t(m * to), NAN);
    for (float &each : x) each = random_float();
    const mkp_rows in = {x.data(), m, from, MKP_FLOAT32}, out = {y.data(), m, to, MKP_FLOAT32};
    require((transposed ? mkp_cpu_signs_transposed : mkp_cpu_signs)(&signs, &in, &out, 2, isa) == MKP_OK, "status", isa, rows, width, 1);
    for (int64_t token = 0; token < m; token++)
      for (int64_t o = 0; o < to; o++) {
        double sum = 0;
        for (int64_t i = 0; i < from; i++) {
          const int64_t row = transposed ? i : o, place = transposed ? o : i;
          sum += (bits[size_t(row * bytes + place / 8)] >> (place % 8) & 1 ? 1 : -1) * double(x[size_t(token * from + i)]);
        }
        require(std::abs(y[size_t(token * to + o)] - sum) <= 1e-5 * double(from), "a product of signs", isa, rows, width, 1);
      }
  }
}

}  // namespace

int main() {
  for (int isa = 0; isa <= mkp_cpu_isa(); isa++) {
    for (int i = 0; i < 300; i++) one_weight(isa);
    for (int i = 0; i < 100; i++) one_set_of_signs(isa);
    std::printf("instruction set %d: clean\n", isa);
  }
  return 0;
}

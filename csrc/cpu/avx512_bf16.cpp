// AVX-512 with VBMI and BF16: products of bfloat16 activations with codes of up to 5 bits, which bfloat16 and a table of 32 hold. The rest is avx512.cpp's.
#include "avx512.h"

namespace {

int32_t linear(const mkp_weight &w, const mkp_rows &x, const mkp_rows &y, int threads) {
  if (x.dtype != MKP_BFLOAT16) return MKP_UNSUPPORTED;
  switch (w.bits) {
    case 1: return vector_linear<BfloatsOf<1>>(w, x, y, threads);
    case 2: return vector_linear<Bfloats2>(w, x, y, threads);
    case 3: return vector_linear<BfloatsOf<3>>(w, x, y, threads);
    case 4: return vector_linear<Bfloats4>(w, x, y, threads);
    case 5: return vector_linear<BfloatsOf<5>>(w, x, y, threads);
    default: return MKP_UNSUPPORTED;
  }
}

}  // namespace

const Isa mkp_isa_avx512_bf16 = {linear, nullptr, nullptr, nullptr};

// The CPU half of mergekit_plus_kernels.h: what is asked is checked, then the best instruction set that has a kernel for it runs.
#include "isa.h"

namespace {

const Isa *const TABLES[] = {
    &mkp_isa_scalar,
#ifdef MKP_X86
    &mkp_isa_avx2, &mkp_isa_avx512, &mkp_isa_avx512_bf16,
#endif
};

int32_t best() {
#ifdef MKP_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return MKP_SCALAR;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi");
  if (!wide) return MKP_AVX2;
  return __builtin_cpu_supports("avx512bf16") ? MKP_AVX512_BF16 : MKP_AVX512;
#else
  return MKP_SCALAR;
#endif
}

bool known(int32_t dtype) { return dtype == MKP_FLOAT32 || dtype == MKP_FLOAT16 || dtype == MKP_BFLOAT16; }

bool known(const mkp_weight *w) { return w->bits >= 1 && w->bits <= 8 && w->group_size > 0 && w->n >= 0 && w->k >= 0 && known(w->scale_dtype); }

// Which of the sets that are there is the fastest. vdpbf16ps has half the rate of float32 products on Intel's processors, and waits longer for its sums.
int32_t usual() {
#ifdef MKP_X86
  if (mkp_cpu_isa() == MKP_AVX512_BF16 && __builtin_cpu_is("intel")) return MKP_AVX512;
#endif
  return mkp_cpu_isa();
}

// The highest set up to `isa` whose entry does the work.
template <class Entry, class... Arguments> int32_t run(Entry Isa::*entry, int32_t isa, const Arguments &...arguments) {
  const int32_t top = isa == MKP_BEST ? usual() : mkp_cpu_isa();
  for (int32_t at = isa < top ? isa : top; at >= 0; at--) {
    if (!(TABLES[at]->*entry)) continue;
    const int32_t status = (TABLES[at]->*entry)(arguments...);
    if (status != MKP_UNSUPPORTED) return status;
  }
  return MKP_UNSUPPORTED;
}

}  // namespace

int32_t mkp_cpu_abi(void) { return MKP_ABI; }

int32_t mkp_cpu_isa(void) {
  static const int32_t found = best();
  return found;
}

int32_t mkp_cpu_linear(const mkp_weight *weight, const mkp_rows *x, const mkp_rows *y, int32_t threads, int32_t isa) {
  if (!known(weight) || !known(x->dtype) || !known(y->dtype) || x->m != y->m) return MKP_UNSUPPORTED;
  if (!x->m || !weight->n) return MKP_OK;
  return run(&Isa::linear, isa, *weight, *x, *y, int(threads));
}

int32_t mkp_cpu_dequantize(const mkp_weight *weight, const mkp_rows *out, int32_t threads, int32_t isa) {
  if (!known(weight) || !known(out->dtype) || out->m != weight->n) return MKP_UNSUPPORTED;
  return run(&Isa::dequantize, isa, *weight, *out, int(threads));
}

int32_t mkp_cpu_signs(const mkp_signs *signs, const mkp_rows *x, const mkp_rows *y, int32_t threads, int32_t isa) {
  if (!known(x->dtype) || y->dtype != MKP_FLOAT32 || x->m != y->m) return MKP_UNSUPPORTED;
  return run(&Isa::signs, isa, *signs, *x, *y, int(threads));
}

int32_t mkp_cpu_signs_transposed(const mkp_signs *signs, const mkp_rows *x, const mkp_rows *y, int32_t threads, int32_t isa) {
  if (!known(x->dtype) || y->dtype != MKP_FLOAT32 || x->m != y->m) return MKP_UNSUPPORTED;
  return run(&Isa::signs_transposed, isa, *signs, *x, *y, int(threads));
}

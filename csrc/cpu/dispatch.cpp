// The CPU half of mergekit_plus_kernels.h: what is asked is checked, then the best instruction set that has a kernel for it runs.
#include "isa.h"

#ifdef MKP_X86_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

const Isa *const TABLES[] = {
    &mkp_isa_scalar,
#ifdef MKP_X86
    &mkp_isa_avx2, &mkp_isa_avx512, &mkp_isa_avx512_bf16,
#endif
#ifdef MKP_X86_AMX
    &mkp_isa_amx,
#endif
};

#ifdef MKP_X86_AMX
// Linux gives the state of tiles to a process that asks for it.
bool has_tiles() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18, BF16 = 1 << 22, TILE = 1 << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16) || !(d & TILE)) return false;
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#endif

int32_t best() {
#ifdef MKP_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return MKP_SCALAR;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi");
  if (!wide) return MKP_AVX2;
  if (!__builtin_cpu_supports("avx512bf16")) return MKP_AVX512;
#ifdef MKP_X86_AMX
  if (has_tiles()) return MKP_AMX;
#endif
  return MKP_AVX512_BF16;
#else
  return MKP_SCALAR;
#endif
}

bool known(int32_t dtype) { return dtype == MKP_FLOAT32 || dtype == MKP_FLOAT16 || dtype == MKP_BFLOAT16; }

bool known(const mkp_weight *w) { return w->bits >= 1 && w->bits <= 8 && w->group_size > 0 && w->n >= 0 && w->k >= 0 && known(w->scale_dtype); }

// vdpbf16ps has half the rate of float32 products on Intel's processors, and waits longer for its sums: there it runs where it is asked for alone.
bool slow(int32_t isa) {
#ifdef MKP_X86
  return isa == MKP_AVX512_BF16 && __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// The highest set up to `isa` whose entry does the work.
template <class Entry, class... Arguments> int32_t run(Entry Isa::*entry, int32_t isa, const Arguments &...arguments) {
  const int32_t top = mkp_cpu_isa();
  for (int32_t at = isa < top ? isa : top; at >= 0; at--) {
    if (!(TABLES[at]->*entry) || (slow(at) && at != isa)) continue;
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

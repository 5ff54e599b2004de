// What one instruction set offers; dispatch.cpp picks among these tables at run time.
//
// Each is compiled in a file of its own with that set's flags. Whatever those files include must have internal linkage: an inline function with external
// linkage that two of them share would be merged by the linker, and an old processor would run the new one's instructions. Hence the anonymous
// namespaces, and no C++ standard library in them.
#pragma once

#include "mergekit_plus_kernels.h"

struct Isa {
  int32_t (*linear)(const mkp_weight &, const mkp_rows &x, const mkp_rows &y, int threads);  // null, or MKP_UNSUPPORTED: the next lower set is asked
  int32_t (*dequantize)(const mkp_weight &, const mkp_rows &out, int threads);
  int32_t (*signs)(const mkp_signs &, const mkp_rows &x, const mkp_rows &y, int threads);
  int32_t (*signs_transposed)(const mkp_signs &, const mkp_rows &x, const mkp_rows &y, int threads);
};

extern const Isa mkp_isa_scalar;
#ifdef MKP_X86
extern const Isa mkp_isa_avx2, mkp_isa_avx512, mkp_isa_avx512_bf16;
#endif
#ifdef MKP_X86_AMX
extern const Isa mkp_isa_amx;
#endif

/* The kernels behind quant/kernels: y = x W^T with W as a checkpoint stores it. One plain C header for both libraries.
 *
 *   libmergekit_plus_cpu.so     mkp_cpu_*     any processor; the instruction set is chosen at run time
 *   libmergekit_plus_cuda.so    mkp_cuda_*    sm_80 and newer; static cudart, loads without a driver
 *
 * Nothing here knows torch or Python: pointers, sizes, an error code. quant/kernels/library.py mirrors every struct and prototype with ctypes; a
 * change of either raises MKP_ABI, and a library of another number is not used. Strides are in elements. No function keeps a pointer, allocates what
 * outlives the call, or throws. What a function cannot do it says with MKP_UNSUPPORTED before it writes a byte: callers then take the reference path.
 */
#ifndef MERGEKIT_PLUS_KERNELS_H
#define MERGEKIT_PLUS_KERNELS_H

#include <stdint.h>

#define MKP_ABI 1

#if defined(__GNUC__)
#define MKP_API __attribute__((visibility("default")))
#else
#define MKP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum mkp_status {
  MKP_OK = 0,
  MKP_UNSUPPORTED = 1, /* a width, type, shape or alignment without a kernel here */
  MKP_FAILED = 2,      /* out of memory, or an error of the device: mkp_*_error says which */
};

enum mkp_dtype { MKP_FLOAT32 = 0, MKP_FLOAT16 = 1, MKP_BFLOAT16 = 2 };

/* A weight [n, k] as compressed-tensors' pack-quantized stores it: value = (code - zero point) * scale, code and zero point unsigned.
 *
 * Code j of row i takes bits j*bits .. j*bits + bits-1 of the row, LSB first; a code may straddle two words. Where zero_point is null it is 2^(bits-1).
 * Zero points are packed the same way down the rows: that of row i and group g lies at bit i*bits of column g of [ceil(n*bits/32), groups].
 * Group g holds inputs g*group_size .. ; the last may be short. groups = ceil(k / group_size).
 */
typedef struct mkp_weight {
  const int32_t *packed;     /* [n, ceil(k*bits/32)] */
  const void *scale;         /* [n, groups] of scale_dtype */
  const int32_t *zero_point; /* [ceil(n*bits/32), groups], contiguous, or null */
  int64_t n, k, group_size;
  int64_t packed_stride; /* words from one row to the next */
  int64_t scale_stride;  /* scales from one row to the next */
  int32_t bits;          /* 1 to 8 */
  int32_t scale_dtype;
} mkp_weight;

/* Rows of numbers: [m, columns] of dtype; the elements of a row are neighbours. */
typedef struct mkp_rows {
  void *data;
  int64_t m;
  int64_t stride; /* from one row to the next */
  int32_t dtype;
} mkp_rows;

/* Signs [rows, width], one bit each, LSB first, every row from a byte of its own, as packed adapters store them: 1 is +1, 0 is -1. */
typedef struct mkp_signs {
  const uint8_t *bits; /* [rows, ceil(width/8)] */
  int64_t rows, width;
  int64_t stride; /* bytes from one row to the next */
} mkp_signs;

/* ---- CPU ----
 * threads: how many of OpenMP's to use, at most. isa: MKP_BEST, the fastest; another, for tests, is not gone beyond. */

enum mkp_isa { MKP_SCALAR = 0, MKP_AVX2 = 1, MKP_AVX512 = 2, MKP_AVX512_BF16 = 3, MKP_AMX = 4, MKP_BEST = 99 };

MKP_API int32_t mkp_cpu_abi(void);
/* The highest mkp_isa that this machine can run. */
MKP_API int32_t mkp_cpu_isa(void);
/* y = x W^T. x [m, k], y [m, n], both float32, float16 or bfloat16; every product and sum in float32, rounded once. */
MKP_API int32_t mkp_cpu_linear(const mkp_weight *weight, const mkp_rows *x, const mkp_rows *y, int32_t threads, int32_t isa);
/* out = W, [n, k], rounded once to out's dtype. */
MKP_API int32_t mkp_cpu_dequantize(const mkp_weight *weight, const mkp_rows *out, int32_t threads, int32_t isa);
/* y = x S^T: x [m, width], y [m, rows] float32. */
MKP_API int32_t mkp_cpu_signs(const mkp_signs *signs, const mkp_rows *x, const mkp_rows *y, int32_t threads, int32_t isa);
/* y = x S: x [m, rows], y [m, width] float32. */
MKP_API int32_t mkp_cpu_signs_transposed(const mkp_signs *signs, const mkp_rows *x, const mkp_rows *y, int32_t threads, int32_t isa);

/* ---- CUDA ----
 * Pointers are of the device, which the caller has made current; stream is a cudaStream_t. Launches only: nothing is waited for. */

MKP_API int32_t mkp_cuda_abi(void);
/* What the last MKP_FAILED of this thread was. */
MKP_API const char *mkp_cuda_error(void);
/* Which capture into a graph a stream is in: a number of its own for each, -1 for none. */
MKP_API int64_t mkp_cuda_capture(void *stream);
/* Bytes of workspace that mkp_cuda_linear needs for m rows of x, -1 where it has no kernel. A workspace begins zeroed and is left so that any other call may
 * follow with it on the same stream; calls that may run at once need one each. */
MKP_API int64_t mkp_cuda_workspace(const mkp_weight *weight, int64_t m);
/* y = x W^T for 1 to 64 rows of float16 or bfloat16, bits 2, 3, 4 or 8, groups of a multiple of 8 or one a row. x begins at a multiple of 16 bytes, its stride
 * is a multiple of 8, and inputs between k and the next multiple of 8 are zeros. Sums in float32 of exact integers times x; the same bits every time. */
MKP_API int32_t mkp_cuda_linear(const mkp_weight *weight, const mkp_rows *x, const mkp_rows *y, void *workspace, int64_t workspace_bytes, void *stream);
/* out = W, [n, k], rounded once to out's dtype; bits 1 to 8, any group. */
MKP_API int32_t mkp_cuda_dequantize(const mkp_weight *weight, const mkp_rows *out, void *stream);
/* y = x S^T: x [m, width], y [m, rows] float32. Row i uses the signs that begin owner[i] * apart bytes after the first; none, and y is zero, where
 * owner[i] is not one of 0 ... adapters-1. owner null: all use the first. */
MKP_API int32_t mkp_cuda_signs(const mkp_signs *signs, const int32_t *owner, int64_t adapters, int64_t apart, const mkp_rows *x, const mkp_rows *y,
                               void *stream);
/* y = x S: x [m, rows], y [m, width] float32. */
MKP_API int32_t mkp_cuda_signs_transposed(const mkp_signs *signs, const int32_t *owner, int64_t adapters, int64_t apart, const mkp_rows *x,
                                          const mkp_rows *y, void *stream);

#ifdef __cplusplus
}
#endif

#endif

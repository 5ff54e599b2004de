// The instructions that the kernels are made of, one function each; the only file with assembly.
//
// 16-bit floats travel as raw bits, two to a 32-bit register, as the tensor cores take them: no type of cuda_fp16.h, nothing of cccl, and a compile
// of seconds. Where there is no CUDA compiler, tests/quant/kernels/emulation.h stands in for this file: the same functions in plain C++, in which the
// kernels run on a processor, warp by warp, with every access checked.

#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "emulation.h"
#else

#include <cuda_runtime.h>

#define MKP_DEVICE __device__ __forceinline__
#define MKP_BOTH __host__ __device__ __forceinline__

namespace mkp {

enum class Float { half, bfloat };

// ---- bits ----

// (a & b) | c
MKP_DEVICE uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// The bits of a where mask is one, of b where it is zero.
MKP_DEVICE uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
}

// Four of the eight bytes of (b:a): nibble i of the selector names byte i of the result, 0 to 3 in a, 4 to 7 in b.
MKP_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// The low word of (high:low) >> shift, shift below 32.
MKP_DEVICE uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
  uint32_t d;
  asm("shf.r.wrap.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(shift));
  return d;
}

MKP_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
MKP_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// ---- 16-bit floats ----

// a * b + c in both halves, rounded once.
template <Float kFloat>
MKP_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  if constexpr (kFloat == Float::half) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
}

template <Float kFloat>
MKP_DEVICE float widen(uint16_t bits) {
  if constexpr (kFloat == Float::half) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(bits));
    return d;
  } else {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
}

// The nearest, ties to even.
template <Float kFloat>
MKP_DEVICE uint16_t narrow(float value) {
  uint16_t d;
  if constexpr (kFloat == Float::half) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(value));
  } else {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(value));
  }
  return d;
}

// d += A B: A 16 x 16 and B 16 x 8 of 16-bit floats, d 16 x 8 of float32, spread over the lanes of a warp as layout.cuh says.
template <Float kFloat>
MKP_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kFloat == Float::half) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// ---- memory ----

// Copies of kBytes to shared memory that go on while the thread does; of these `valid` are read and the rest are written as zeros.
// 16 bytes pass by L1 (.cg), for weights are read once, and ask L2 for the whole 128 bytes of the row that the next stages need.
template <int kBytes>
MKP_DEVICE void copy_async(void* shared, const void* global, uint32_t valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(valid) : "memory");
  }
}

// What was begun since the last commit is a group.
MKP_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the newest kPending groups of this thread have landed.
template <int kPending>
MKP_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// What no thread writes while the kernel runs.
template <typename T>
MKP_DEVICE T load_global(const T* pointer) {
  return __ldg(pointer);
}

// What another block has written: from L2, since L1 may be stale.
MKP_DEVICE float load_written(const float* pointer) { return __ldcg(pointer); }

template <typename T>
MKP_DEVICE void store_global(T* pointer, T value) {
  *pointer = value;
}

// The shared memory that the launch asked for.
MKP_DEVICE uint32_t* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<uint32_t*>(memory);
}

template <typename T>
MKP_DEVICE T load_shared(const void* pointer) {
  return *static_cast<const T*>(pointer);
}

// ---- launches ----

template <typename Call>
cudaError_t launch(void (*kernel)(Call), dim3 grid, int threads, int shared_bytes, void* stream, const Call& call) {
  if (shared_bytes > 48 << 10) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  void* arguments[] = {const_cast<Call*>(&call)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), arguments, shared_bytes, static_cast<cudaStream_t>(stream));
}

}  // namespace mkp

#endif

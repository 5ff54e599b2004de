// What each kernel is called with, and how scales and zero points are read. api.cu fills these from the C header's structs, which are checked there.

#pragma once

#include "../include/mergekit_plus_kernels.h"
#include "layout.cuh"

namespace mkp {

// mkp_weight, as kernels want it: [rows, width].
struct Stored {
  const uint32_t* packed;
  const void* scale;
  const uint32_t* zero_point;
  int64_t packed_pitch, scale_pitch;
  int rows, width, words;  // words of a row that hold codes
  int group_size, groups, bits, scale_dtype;
};

// y = x W^T. base and pitch of x: multiples of 16 bytes; width: a multiple of 8, or inputs up to the next one are zeros in x.
struct Linear {
  Stored weight;
  const uint16_t* x;
  uint16_t* y;
  int64_t x_pitch, y_pitch;
  int tokens;
  bool wide;           // rows of codes can be copied 16 bytes at a time
  Split split;
  uint32_t* counters;  // [blocks of rows], zeros
  float* partial;      // [splits, tokens, rows]
};

// For bits 2, 3, 4 and 8; each is compiled for itself.
template <int kBits>
cudaError_t linear_small_m(const Linear& call, Float kind, void* stream);

struct Dequantize {
  Stored weight;
  void* out;
  int64_t out_pitch;
  bool whole;  // all octets are full, and so aligned that they can be stored at once
};

cudaError_t dequantize(const Dequantize& call, int dtype, void* stream);

// y = x S^T, or y = x S; S is that of the row's owner, or the only one.
struct Signs {
  const uint8_t* signs;
  int64_t pitch, apart;  // bytes from one row to the next, and from one adapter to the next
  const int32_t* owner;  // [m], none outside of 0 ... adapters-1, and y is zero; or null
  int adapters;
  const void* x;
  float* y;
  int64_t x_pitch, y_pitch;
  int m, rows, width;
};

cudaError_t signs(const Signs& call, int dtype, bool transposed, void* stream);

// ---- scales and zero points ----

MKP_DEVICE uint32_t raw_scale(const Stored& weight, int row, int group) {
  const int64_t at = row * weight.scale_pitch + group;
  return weight.scale_dtype == MKP_FLOAT32 ? load_global(static_cast<const uint32_t*>(weight.scale) + at)
                                           : load_global(static_cast<const uint16_t*>(weight.scale) + at);
}

MKP_DEVICE float scale_of(uint32_t raw, int dtype) {
  return dtype == MKP_FLOAT32 ? bits_float(raw) : dtype == MKP_FLOAT16 ? widen<Float::half>(raw) : widen<Float::bfloat>(raw);
}

// The words that a zero point lies in; it straddles two of them at some widths only, of which those with a kernel of their own have one: 3 bits.
struct RawZero {
  uint32_t low, high;
};

MKP_DEVICE RawZero raw_zero(const Stored& weight, int row, int group, int bits) {
  const uint32_t* at = weight.zero_point + static_cast<int64_t>(zero_word(row, bits)) * weight.groups + group;
  return {load_global(at), zero_shift(row, bits) + bits > 32 ? load_global(at + weight.groups) : 0};
}

MKP_DEVICE uint32_t zero_of_raw(RawZero raw, int row, int bits) { return funnel_right(raw.low, raw.high, zero_shift(row, bits)) & ((1u << bits) - 1); }

}  // namespace mkp

// One-bit adapters: y = x S^T and y = x S for signs S [rows, width] as packed adapters store them, for a batch whose rows have adapters of their own.
//
// An adapter's factors are small (rows is its rank) and launches, not bytes, are most of the cost: what matters is that one launch serves all adapters of
// a batch, and that many threads share the latency of a row. Both kernels flip the sign bit of x and add in float32, in an order that is always the same.

#include "calls.cuh"

namespace mkp {
namespace {

constexpr int kSignThreads = 256;
constexpr int kSignRows = 4;  // rows of S for which a block reads x once

template <int kDtype>
MKP_DEVICE float input(const Signs& call, int token, int at) {
  const int64_t index = token * call.x_pitch + at;
  if constexpr (kDtype == MKP_FLOAT32) {
    return load_global(static_cast<const float*>(call.x) + index);
  } else {
    return widen<kDtype == MKP_FLOAT16 ? Float::half : Float::bfloat>(load_global(static_cast<const uint16_t*>(call.x) + index));
  }
}

// The signs of a token's adapter; null where it has none.
MKP_DEVICE const uint8_t* signs_of(const Signs& call, int token) {
  const int owner = call.owner ? load_global(call.owner + token) : 0;
  return call.owner && (owner < 0 || owner >= call.adapters) ? nullptr : call.signs + owner * call.apart;
}

// x, or -x where the bit is zero.
MKP_DEVICE float signed_by(float x, uint32_t bit) { return bits_float(float_bits(x) ^ (bit ^ 1) << 31); }

// y = x S^T: a block has a token and kSignRows rows of S; its threads share the width.
template <int kDtype>
__global__ void __launch_bounds__(kSignThreads) signs_kernel(const Signs call) {
  float* sums = reinterpret_cast<float*>(shared_memory());  // [kSignRows][kSignThreads]
  const int token = blockIdx.x, first = blockIdx.y * kSignRows;
  const uint8_t* signs = signs_of(call, token);

  float sum[kSignRows] = {};
  if (signs) {
#pragma unroll 4
    for (int at = threadIdx.x; at < call.width; at += kSignThreads) {
      const float x = input<kDtype>(call, token, at);
#pragma unroll
      for (int row = 0; row < kSignRows; ++row) {
        if (first + row < call.rows) sum[row] += signed_by(x, load_global(signs + (first + row) * call.pitch + at / 8) >> at % 8 & 1u);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kSignRows; ++row) sums[row * kSignThreads + threadIdx.x] = sum[row];
  for (int half = kSignThreads / 2; half; half /= 2) {  // a tree: pairs that are always the same
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) {
#pragma unroll
      for (int row = 0; row < kSignRows; ++row) sums[row * kSignThreads + threadIdx.x] += sums[row * kSignThreads + threadIdx.x + half];
    }
  }
  __syncthreads();
  const int row = threadIdx.x;
  if (row < kSignRows && first + row < call.rows) store_global(call.y + token * call.y_pitch + first + row, sums[row * kSignThreads]);
}

// y = x S: a thread has a token and 8 columns of S, a byte of each row.
template <int kDtype>
__global__ void __launch_bounds__(kSignThreads) signs_transposed_kernel(const Signs call) {
  const int token = blockIdx.x, column = 8 * (blockIdx.y * kSignThreads + threadIdx.x);
  if (column >= call.width) return;
  const uint8_t* signs = signs_of(call, token);

  float sum[8] = {};
  if (signs) {
#pragma unroll 4
    for (int row = 0; row < call.rows; ++row) {
      const float x = input<kDtype>(call, token, row);
      const uint32_t bits = load_global(signs + row * call.pitch + column / 8);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += signed_by(x, bits >> i & 1);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < call.width) store_global(call.y + token * call.y_pitch + column + i, sum[i]);
  }
}

template <int kDtype>
cudaError_t launch_signs(const Signs& call, bool transposed, void* stream) {
  if (transposed) return launch(signs_transposed_kernel<kDtype>, dim3(call.m, ceil_div(ceil_div(call.width, 8), kSignThreads)), kSignThreads, 0, stream, call);
  return launch(signs_kernel<kDtype>, dim3(call.m, ceil_div(call.rows, kSignRows)), kSignThreads, 4 * kSignRows * kSignThreads, stream, call);
}

}  // namespace

cudaError_t signs(const Signs& call, int dtype, bool transposed, void* stream) {
  if (dtype == MKP_FLOAT16) return launch_signs<MKP_FLOAT16>(call, transposed, stream);
  if (dtype == MKP_BFLOAT16) return launch_signs<MKP_BFLOAT16>(call, transposed, stream);
  return launch_signs<MKP_FLOAT32>(call, transposed, stream);
}

}  // namespace mkp

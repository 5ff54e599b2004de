// W from its codes, for more tokens than small_m.cu takes, and for widths that it does not have: `(code - zero point) * scale` in float32, rounded once.
//
// A thread has an octet: 8 codes are `bits` bytes from the start of a byte, 64 bits at most once the stream is shifted, whatever the width. The device's
// bandwidth is the limit (a 16-bit weight is written for every 4 bits read), so nothing here is clever.

#include <type_traits>

#include "calls.cuh"

namespace mkp {
namespace {

constexpr int kOctetThreads = 256;

template <int kDtype>
using Element = std::conditional_t<kDtype == MKP_FLOAT32, float, uint16_t>;

template <int kDtype>
MKP_DEVICE Element<kDtype> rounded(float value) {
  if constexpr (kDtype == MKP_FLOAT32) {
    return value;
  } else {
    return narrow<kDtype == MKP_FLOAT16 ? Float::half : Float::bfloat>(value);
  }
}

// The codes of an octet, the first in the lowest bits.
MKP_DEVICE uint64_t octet_of(const Stored& weight, int row, int octet) {
  const uint32_t* words = weight.packed + row * weight.packed_pitch;
  const int64_t bit = static_cast<int64_t>(octet) * 8 * weight.bits;
  const int word = static_cast<int>(bit / 32), shift = static_cast<int>(bit % 32);
  uint32_t stream[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) stream[i] = word + i < weight.words ? load_global(words + word + i) : 0;
  return static_cast<uint64_t>(funnel_right(stream[1], stream[2], shift)) << 32 | funnel_right(stream[0], stream[1], shift);
}

template <int kDtype>
__global__ void __launch_bounds__(kOctetThreads) dequantize_kernel(const Dequantize call) {
  const Stored& weight = call.weight;
  const int row = blockIdx.x, octet = blockIdx.y * kOctetThreads + threadIdx.x, input = 8 * octet;
  if (input >= weight.width) return;

  const uint64_t codes = octet_of(weight, row, octet);
  const uint32_t mask = (1u << weight.bits) - 1;
  struct alignas(8 * sizeof(Element<kDtype>)) Eight {
    Element<kDtype> values[8];
  } eight = {};
  int group = input / weight.group_size - 1, end = input;  // of the group before: the first is begun at once
  float scale = 0, zero = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (input + i < weight.width) {
      if (input + i == end) {
        ++group;
        end = (group + 1) * weight.group_size;
        scale = scale_of(raw_scale(weight, row, group), weight.scale_dtype);
        zero = static_cast<float>(weight.zero_point ? zero_of_raw(raw_zero(weight, row, group, weight.bits), row, weight.bits) : 1u << (weight.bits - 1));
      }
      eight.values[i] = rounded<kDtype>((static_cast<float>(static_cast<uint32_t>(codes >> i * weight.bits) & mask) - zero) * scale);
    }
  }

  Element<kDtype>* out = static_cast<Element<kDtype>*>(call.out) + row * call.out_pitch + input;
  if (call.whole) {
    store_global(reinterpret_cast<Eight*>(out), eight);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (input + i < weight.width) store_global(out + i, eight.values[i]);
  }
}

template <int kDtype>
cudaError_t launch_dequantize(const Dequantize& call, void* stream) {
  const dim3 grid(call.weight.rows, ceil_div(ceil_div(call.weight.width, 8), kOctetThreads));
  return launch(dequantize_kernel<kDtype>, grid, kOctetThreads, 0, stream, call);
}

}  // namespace

cudaError_t dequantize(const Dequantize& call, int dtype, void* stream) {
  if (dtype == MKP_FLOAT16) return launch_dequantize<MKP_FLOAT16>(call, stream);
  if (dtype == MKP_BFLOAT16) return launch_dequantize<MKP_BFLOAT16>(call, stream);
  return launch_dequantize<MKP_FLOAT32>(call, stream);
}

}  // namespace mkp

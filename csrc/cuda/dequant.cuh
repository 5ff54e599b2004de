// An octet of codes, 8 neighbours of a row, to four registers of two 16-bit floats: pair i holds (code_i - z, code_i+4 - z), exactly.
//
// Integers below 2^10 in fp16 and below 2^7 in bf16 need no conversion. Write m for the mantissa's bits (10, 7). The float with the bits of 2^m has an
// ulp of one, so or-ing a field into its lowest bits adds it:
//
//     magic | q           = 2^m + q                                0x6400 | q in fp16, 0x4300 | q in bf16
//     magic | q << s      = 2^m + q 2^s          where s + bits <= m
//
// and one fused multiply-add, which both halves of a register have in common, takes the magic away, the shift, and the zero point:
//
//     (2^m + q)     * 1     - (2^m + z)       = q - z
//     (2^m + q 2^s) * 2^-s  - (2^(m-s) + z)   = q - z               exact: |q - z| < 2^bits, and each constant is a float
//
// The constants have bits that can be written down: 2^m + z is magic + z, and 2^(m-s) + z is (magic - (s << m)) + (z << s): an exponent lower by s, and
// an ulp of 2^-s.
//
// For both codes of a pair to be reached by one mask they must lie 16 bits apart. With v the octet laid out so that codes 0 to 3 fill the low half from its
// lowest bit and codes 4 to 7 the high half (`spread`), pair i is
//
//     i = 0, 2:   (v >> i*bits) & (field | field << 16)             with the shift only where i = 2
//     i = 1, 3:   the same word, the field one place up (s = bits); where 2 bits > m, that is 4 bits in bf16, shifted down as well
//
// What `spread` costs:
//   4 bits   nothing: 8 codes are a word, and codes i and i+4 lie 16 bits apart as they are
//   3 bits   codes 4 to 7 begin at bit 12: a shift by 4, and a bitwise choice. (No pair of 3-bit codes is 16 bits apart in the stream, hence planes in
//            other libraries. An octet at a time it takes two instructions, and the stored tensor stays what it is.)
//   2 bits   codes 4 to 7 are the second byte of a halfword: one prmt
//   8 bits   two words; see below
//
// 8 bits in fp16: prmt puts a byte of each word into the magic; q <= 255 < 2^10, and the rest is as above. In bf16 q has more bits than the mantissa, though
// q - z, at most 255 in size, does not. So by way of float32, m = 23: prmt makes 0x4b0000qq = 2^23 + q, subtracting 2^23 + z leaves q - z, and since that
// has at most 8 significant bits its upper halfword is the same number in bf16: one more prmt joins two of them.

#pragma once

#include "layout.cuh"

namespace mkp {

template <Float kFloat>
struct Format;
template <>
struct Format<Float::half> {
  static constexpr uint32_t mantissa = 10, magic = 0x6400, one = 0x3c00;
};
template <>
struct Format<Float::bfloat> {
  static constexpr uint32_t mantissa = 7, magic = 0x4300, one = 0x3f80;
};

MKP_BOTH constexpr uint32_t twice(uint32_t half) { return half | half << 16; }

// Whether pairs 1 and 3 can be read one field up.
template <int kBits, Float kFloat>
constexpr bool kInPlace = 2 * kBits <= static_cast<int>(Format<kFloat>::mantissa);

// What is subtracted: -(2^m + z) for fields in the lowest place, -(2^(m-bits) + z) for those one up, in both halves. 8 bits in bf16: the bits of -(2^23 + z).
struct Zero {
  uint32_t low, up;
};

template <int kBits, Float kFloat>
MKP_BOTH constexpr Zero zero_of(uint32_t z) {
  using F = Format<kFloat>;
  if constexpr (kBits == 8 && kFloat == Float::bfloat) {
    return {0xcb000000u + z, 0};
  } else if constexpr (kInPlace<kBits, kFloat>) {
    return {twice(0x8000u + F::magic + z), twice(0x8000u + F::magic - (kBits << F::mantissa) + (z << kBits))};
  } else {
    return {twice(0x8000u + F::magic + z), 0};
  }
}

// The words of an octet: `low`, and where an octet can reach into the next word, `high`.
struct Octet {
  uint32_t low, high;
};

// The octet of a row in shared memory, `octet` counted from the start of the stage.
template <int kBits>
MKP_DEVICE Octet load_octet(const uint32_t* row, int octet) {
  if constexpr (kBits == 8) {
    struct alignas(8) Two {
      uint32_t low, high;
    };
    const Two two = load_shared<Two>(row + octet_word<8>(octet));
    return {two.low, two.high};
  } else if constexpr (kBits == 3) {
    const int word = octet_word<3>(octet), last = octet_word<3>(octet | 3);  // the last word of the four octets
    return {load_shared<uint32_t>(row + word), load_shared<uint32_t>(row + (word < last ? word + 1 : last))};
  } else {
    return {load_shared<uint32_t>(row + octet_word<kBits>(octet)), 0};
  }
}

// Codes 0 to 3 at the bottom of the low half, 4 to 7 at the bottom of the high half; what lies above them is of no matter.
template <int kBits>
MKP_DEVICE uint32_t spread(Octet octet, int index) {
  if constexpr (kBits == 2) {
    return permute_bytes(octet.low, 0, index % 2 ? 0x4342 : 0x4140);
  } else if constexpr (kBits == 3) {
    const uint32_t codes = funnel_right(octet.low, octet.high, octet_shift<3>(index));
    return select_bits(0x0000ffffu, codes, codes << 4);
  } else {
    return octet.low;
  }
}

template <int kBits, Float kFloat>
MKP_DEVICE void dequantize(Octet octet, int index, Zero zero, uint32_t (&pairs)[4]) {
  using F = Format<kFloat>;
  constexpr uint32_t one = twice(F::one), magic = twice(F::magic), field = twice((1u << kBits) - 1);
  if constexpr (kBits == 8 && kFloat == Float::half) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t two = permute_bytes(octet.low, octet.high, half ? 0x7362 : 0x5140);  // codes i, i+4, i+1, i+5
      pairs[2 * half] = fma2<kFloat>(permute_bytes(two, 0x64646464u, 0x4140), one, zero.low);
      pairs[2 * half + 1] = fma2<kFloat>(permute_bytes(two, 0x64646464u, 0x4342), one, zero.low);
    }
  } else if constexpr (kBits == 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t selector = 0x7650 + i;  // byte i, and three of the magic
      const float first = bits_float(permute_bytes(octet.low, 0x4b000000u, selector)) + bits_float(zero.low);
      const float second = bits_float(permute_bytes(octet.high, 0x4b000000u, selector)) + bits_float(zero.low);
      pairs[i] = permute_bytes(float_bits(first), float_bits(second), 0x7632);
    }
  } else {
    const uint32_t codes = spread<kBits>(octet, index);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t v = half ? codes >> 2 * kBits : codes;
      pairs[2 * half] = fma2<kFloat>(and_or(v, field, magic), one, zero.low);
      if constexpr (kInPlace<kBits, kFloat>) {
        constexpr uint32_t inverse = twice(F::one - (kBits << F::mantissa));  // 2^-bits
        pairs[2 * half + 1] = fma2<kFloat>(and_or(v, field << kBits, magic), inverse, zero.up);
      } else {
        pairs[2 * half + 1] = fma2<kFloat>(and_or(v >> kBits, field, magic), one, zero.low);
      }
    }
  }
}

// The 8 inputs of a token that go with an octet, as they lie in memory, to the pairs (i, i+4).
MKP_DEVICE void pair_up(const uint32_t (&x)[4], uint32_t (&pairs)[4]) {
  pairs[0] = permute_bytes(x[0], x[2], 0x5410);
  pairs[1] = permute_bytes(x[0], x[2], 0x7632);
  pairs[2] = permute_bytes(x[1], x[3], 0x5410);
  pairs[3] = permute_bytes(x[1], x[3], 0x7632);
}

}  // namespace mkp

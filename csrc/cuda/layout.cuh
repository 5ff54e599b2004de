// What lies where: the one place that knows how stored words, shared memory and the fragments of mma.sync map onto each other.
//
// The product is Y^T = W X^T: 16 rows of the weight are the A operand of mma.m16n8k16, 8 tokens the B operand, so that a step of 8 tokens costs as
// little as tensor cores allow and a weight is turned into a float once for all tokens.
//
// Octets. A dot product does not care for the order of its terms, so the 32 inputs of two mma may be dealt to lanes as suits the *weights*: lane
// (g, t) = (lane / 4, lane % 4) takes 8 neighbouring codes of row g, inputs 32 u + 8 t ... + 7: an octet. Whatever the width, an octet is `bits` bytes
// of the stream that compressed-tensors stores, beginning at a byte, and dequant.cuh makes four registers of it: pair i holds inputs i and i+4 of the
// octet. The activations are dealt alike, so the tensor of the checkpoint is the tensor of the run: no second copy, nothing to prepare.
//
//                    a0         a1           a2         a3            b0           b1
//   mma s of a unit  row g      row g+8      row g      row g+8       token g      token g
//   (s = 0, 1)       pair 2s    pair 2s      pair 2s+1  pair 2s+1     pair 2s      pair 2s+1
//
// A unit, 32 inputs, is also the least group of scales that the fast path can finish: the four lanes of a quad are summed by the mma itself, so a
// scale that all of them share may wait until the sum is in float32 (small_m.cu).

#pragma once

#include "ptx.cuh"

namespace mkp {

constexpr int kUnit = 32;       // inputs of two mma
constexpr int kStage = 128;     // inputs that are copied at once: 16 * bits bytes of a row of codes, 256 of a token
constexpr int kWarps = 4;       // of a block; each has rows of its own
constexpr int kThreads = 32 * kWarps;
constexpr int kTokens = 8;      // of an mma
constexpr int kMaxTokens = 64;  // of a call

// Tiles of 16 rows of a warp, each of which uses a token's fragment once more; of `tiles` tiles of tokens, whose sums fill the registers at 8.
MKP_BOTH constexpr int row_tiles(int tiles) { return tiles == 8 ? 1 : 2; }
// Rows of a block.
MKP_BOTH constexpr int block_rows(int tiles) { return 16 * row_tiles(tiles) * kWarps; }
// Tiles of tokens of the kernel for a call: 1, 2, 4 or 8; groups that are not whole units (which are rare) have one kernel for all.
MKP_BOTH constexpr int token_tiles(int tokens, int group_size) {
  return group_size % kUnit ? 8 : tokens <= 8 ? 1 : tokens <= 16 ? 2 : tokens <= 32 ? 4 : 8;
}

// ---- fragments ----

// The row of a tile whose octets a lane reads: of half 0 for a0 and a2, of half 1 for a1 and a3; also that of its accumulators 2*half and 2*half+1.
MKP_BOTH constexpr int fragment_row(int lane, int half) { return lane / 4 + 8 * half; }
// The token of a tile whose inputs a lane reads for b0 and b1.
MKP_BOTH constexpr int fragment_token(int lane) { return lane / 4; }
// The octet of a unit that a lane reads, of weights and of tokens.
MKP_BOTH constexpr int fragment_octet(int lane) { return lane % 4; }
// The token of a tile that accumulator c of a lane belongs to.
MKP_BOTH constexpr int accumulator_token(int lane, int c) { return 2 * (lane % 4) + c % 2; }

// ---- the stream of codes ----

// Words of a row in one stage.
template <int kBits>
MKP_BOTH constexpr int stage_words() {
  return kStage * kBits / 32;
}

// The word that octet `octet` of a row begins in, and the bit of it.
template <int kBits>
MKP_BOTH constexpr int octet_word(int octet) {
  return octet * kBits / 4;
}
template <int kBits>
MKP_BOTH constexpr int octet_shift(int octet) {
  return octet * kBits % 4 * 8;
}

// Where the zero point of a row lies in its column: packed down the rows.
MKP_BOTH constexpr int zero_word(int row, int bits) { return static_cast<int>(static_cast<int64_t>(row) * bits / 32); }
MKP_BOTH constexpr int zero_shift(int row, int bits) { return static_cast<int>(static_cast<int64_t>(row) * bits % 32); }

// ---- shared memory ----
//
// A stage holds the block's rows of codes, then the tokens. Pitches are such that no two lanes of one load want the same bank: the 8 rows of a load must
// begin 4 words apart (2 and 3 where a row's share of a unit is so narrow, 8 where it is that wide), modulo the 32 banks; and a multiple of 4 words,
// since 16 bytes are copied at once. The two tokens that a quarter of a warp reads begin 16 words apart.

template <int kBits>
MKP_BOTH constexpr int row_pitch() {  // words
  return kBits == 8 ? 40 : kBits == 4 ? 20 : 12;
}
constexpr int kTokenPitch = kStage / 2 + 16;  // words

template <int kBits, int kTiles>
MKP_BOTH constexpr int stage_pitch() {  // words
  return block_rows(kTiles) * row_pitch<kBits>() + kTokens * kTiles * kTokenPitch;
}

// Stages in flight: four, or as many as 96 KB hold, which every architecture since sm_80 has.
template <int kBits, int kTiles>
MKP_BOTH constexpr int stages() {
  constexpr int most = (96 << 10) / (4 * stage_pitch<kBits, kTiles>());
  static_assert(most >= 2);
  return most < 4 ? most : 4;
}

// ---- the grid ----

MKP_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// How the inputs are split over blocks: `splits` slices of `each` stages, the last may be shorter, none is empty.
struct Split {
  int splits, each;
};

// Enough slices for two blocks on each multiprocessor, but none shorter than two stages, and not so many that adding them up, 8 bytes for a token and a
// row of each, is more than half of the traffic of the weight itself, bits/8 bytes for an input and a row. Estimates; no GPU has timed them.
MKP_BOTH constexpr Split split(int tokens, int rows, int width, int bits, int group_size, int multiprocessors) {
  const int count = ceil_div(width, kStage);
  int splits = ceil_div(2 * multiprocessors, ceil_div(rows, block_rows(token_tiles(tokens, group_size))));
  const int traffic = static_cast<int>(static_cast<int64_t>(width) * bits / 128 / tokens);
  splits = splits < traffic ? splits : traffic;
  splits = splits < count / 2 ? splits : count / 2;
  splits = splits < 1 ? 1 : splits;
  const int each = count ? ceil_div(count, splits) : 1;
  return {count ? ceil_div(count, each) : 1, each};
}

// Blocks of rows, at most. The workspace begins with a counter for each, whatever the weight, so that calls of a stream may share one workspace.
constexpr int kCounters = 1 << 14;

}  // namespace mkp

// y = x W^T for at most 64 tokens, W as it is stored: tensor cores on integer weights.
//
// A block has 128 rows of W, 32 for each of 4 warps (64 and 16 above 32 tokens), and a slice of the inputs, which it goes through in stages of 128: codes
// and tokens are copied to shared memory by cp.async, up to three stages ahead of the one that is computed. Why shared memory, when each code is used once:
// it decouples how DRAM is read, 16 bytes a thread, from which lane needs what, which is what makes groups of 32 as good as any (layout.cuh).
//
// The tensor cores multiply the *integers* q - z, exact in either 16-bit float, and add in float32; a group's sum is multiplied by its scale when the
// group is over. No weight is rounded, so that all error is that of float32 sums and of the one rounding of y.
//
// Slices. Where rows alone make too few blocks to fill the device, the inputs are split. Each block then leaves its sums in the workspace, and the one
// that finishes last adds the slices up in their order, not in the order they came in: equal inputs give equal bits. Its counter it sets to zero
// again, so that the workspace is as it was found.

#include <type_traits>

#include "calls.cuh"
#include "dequant.cuh"

namespace mkp {
namespace {

template <int kTiles>
using Sums = float[row_tiles(kTiles)][kTiles][4];

// ---- global to shared ----

template <int kBits, int kRows, int kBytes>
MKP_DEVICE void copy_codes_by(const Linear& call, int first_row, int stage, uint32_t* shared) {
  constexpr int words = kBytes / 4, pieces = stage_words<kBits>() / words;  // of a row
  const uint32_t* base = call.weight.packed + first_row * call.weight.packed_pitch + stage * stage_words<kBits>();
#pragma unroll(kBytes == 16 ? 8 : 1)
  for (int piece = threadIdx.x; piece < kRows * pieces; piece += kThreads) {
    const int row = piece / pieces, word = piece % pieces * words;
    const int left = call.weight.words - (stage * stage_words<kBits>() + word);  // a row may end in the middle of a piece
    const int valid = first_row + row >= call.weight.rows || left <= 0 ? 0 : left < words ? 4 * left : kBytes;
    const uint32_t* from = valid ? base + (static_cast<uint32_t>(row) * static_cast<uint32_t>(call.weight.packed_pitch) + word) : call.weight.packed;
    copy_async<kBytes>(shared + row * row_pitch<kBits>() + word, from, valid);
  }
}

// What lies beyond the last row, input or token is written as zeros: codes there do not matter, for their x is zero or their sums are not stored.
template <int kBits, int kTiles>
MKP_DEVICE void copy_stage(const Linear& call, int first_row, int stage, uint32_t* shared) {
  if (call.wide) {
    copy_codes_by<kBits, block_rows(kTiles), 16>(call, first_row, stage, shared);
  } else {
    copy_codes_by<kBits, block_rows(kTiles), 4>(call, first_row, stage, shared);
  }
  constexpr int pieces = kStage / 8;  // of a token
#pragma unroll
  for (int piece = threadIdx.x; piece < kTokens * kTiles * pieces; piece += kThreads) {
    const int token = piece / pieces, input = stage * kStage + piece % pieces * 8;
    const bool valid = token < call.tokens && input < call.weight.width;
    const uint16_t* from = valid ? call.x + token * call.x_pitch + input : call.x;
    copy_async<16>(shared + block_rows(kTiles) * row_pitch<kBits>() + token * kTokenPitch + piece % pieces * 4, from, valid ? 16 : 0);
  }
}

// ---- a unit: 32 inputs ----

// The fragments of a warp's rows: a[tile][mma].
template <int kBits, Float kFloat, int kRowTiles>
MKP_DEVICE void load_rows(const uint32_t* rows, int lane, int unit, const Zero (&zero)[kRowTiles][2], uint32_t (&a)[kRowTiles][2][4]) {
  const int octet = 4 * unit + fragment_octet(lane);
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Octet codes = load_octet<kBits>(rows + (16 * tile + fragment_row(lane, half)) * row_pitch<kBits>(), octet);
      uint32_t pairs[4];
      dequantize<kBits, kFloat>(codes, octet, zero[tile][half], pairs);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[tile][i / 2][half + 2 * (i % 2)] = pairs[i];
    }
  }
}

// Adds a unit's products to the sums; tokens count only where this lane's octet is `counted`.
template <Float kFloat, int kTiles>
MKP_DEVICE void multiply(const uint32_t* tokens, int lane, int unit, const uint32_t (&a)[row_tiles(kTiles)][2][4], bool counted, Sums<kTiles>& sums) {
  struct alignas(16) Eight {
    uint32_t words[4];
  };
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int token = kTokens * tile + fragment_token(lane);
    const Eight x = load_shared<Eight>(tokens + token * kTokenPitch + 4 * (4 * unit + fragment_octet(lane)));
    uint32_t pairs[4];
    pair_up(x.words, pairs);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = counted ? pairs[i] : 0;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int row_tile = 0; row_tile < row_tiles(kTiles); ++row_tile) {
        mma<kFloat>(sums[row_tile][tile], a[row_tile][step], pairs[2 * step], pairs[2 * step + 1]);
      }
    }
  }
}

// ---- groups ----

// What is stored for a lane's rows of one group, as it comes; and what that stands for.
template <int kRowTiles>
struct RawGroup {
  uint32_t scale[kRowTiles][2];
  RawZero zero[kRowTiles][2];
};

template <int kRowTiles>
struct Group {
  float scale[kRowTiles][2];
  Zero zero[kRowTiles][2];
};

// The row of W that a lane's rows are, the last one for those beyond it.
MKP_DEVICE int row_of(const Linear& call, int first_row, int lane, int tile, int half) {
  const int row = first_row + 16 * tile + fragment_row(lane, half);
  return row < call.weight.rows ? row : call.weight.rows - 1;
}

template <int kBits, int kRowTiles>
MKP_DEVICE void fetch(const Linear& call, int first_row, int lane, int group, RawGroup<kRowTiles>& raw) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(call, first_row, lane, tile, half);
      raw.scale[tile][half] = raw_scale(call.weight, row, group);
      if (call.weight.zero_point) raw.zero[tile][half] = raw_zero(call.weight, row, group, kBits);
    }
  }
}

template <int kBits, Float kFloat, int kRowTiles>
MKP_DEVICE void decode(const Linear& call, int first_row, int lane, const RawGroup<kRowTiles>& raw, Group<kRowTiles>& group) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(call, first_row, lane, tile, half);
      group.scale[tile][half] = scale_of(raw.scale[tile][half], call.weight.scale_dtype);
      const uint32_t z = call.weight.zero_point ? zero_of_raw(raw.zero[tile][half], row, kBits) : 1u << (kBits - 1);
      group.zero[tile][half] = zero_of<kBits, kFloat>(z);
    }
  }
}

// A group is over: its sums, times its scales, join the total.
template <int kTiles>
MKP_DEVICE void finish(const Group<row_tiles(kTiles)>& group, Sums<kTiles>& sums, Sums<kTiles>& total) {
#pragma unroll
  for (int row_tile = 0; row_tile < row_tiles(kTiles); ++row_tile) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        total[row_tile][tile][c] += group.scale[row_tile][c / 2] * sums[row_tile][tile][c];
        sums[row_tile][tile][c] = 0;
      }
    }
  }
}

// ---- what is done with a stage ----

// Groups of whole units: every lane of a unit is in one group. The next group's scales are on their way while this one is summed.
template <int kBits, Float kFloat, int kTiles>
struct WholeGroups {
  RawGroup<row_tiles(kTiles)> next;
  Group<row_tiles(kTiles)> now;
  int group, left, units;  // units of the present group that are left, and of any

  MKP_DEVICE void begin(const Linear& call, int first_row, int lane, int stage) {
    const int unit = stage * (kStage / kUnit);
    units = call.weight.group_size / kUnit;
    group = unit / units;
    left = units - unit % units;
    fetch<kBits>(call, first_row, lane, group, next);
    step(call, first_row, lane);
  }

  // `next` becomes `now`.
  MKP_DEVICE void step(const Linear& call, int first_row, int lane) {
    decode<kBits, kFloat>(call, first_row, lane, next, now);
    if (group + 1 < call.weight.groups) fetch<kBits>(call, first_row, lane, group + 1, next);
  }

  MKP_DEVICE void unit(const Linear& call, int first_row, const uint32_t* rows, const uint32_t* tokens, int lane, int unit, int, Sums<kTiles>& sums,
                       Sums<kTiles>& total) {
    uint32_t a[row_tiles(kTiles)][2][4];
    load_rows<kBits, kFloat>(rows, lane, unit, now.zero, a);
    multiply<kFloat, kTiles>(tokens, lane, unit, a, true, sums);
    if (--left == 0) {
      if (group < call.weight.groups) finish<kTiles>(now, sums, total);
      ++group;
      left = units;
      step(call, first_row, lane);
    }
  }

  MKP_DEVICE void end(const Linear& call, Sums<kTiles>& sums, Sums<kTiles>& total) {
    if (left != units && group < call.weight.groups) finish<kTiles>(now, sums, total);
  }
};

// Groups of any multiple of 8 inputs: the octets of a unit may be in several groups, and the unit is multiplied once for each, with the tokens of the
// other octets counting as zero. A lane's codes are in one group only, whose zero point they are given.
template <int kBits, Float kFloat, int kTiles>
struct AnyGroups {
  MKP_DEVICE void begin(const Linear&, int, int, int) {}

  MKP_DEVICE void unit(const Linear& call, int first_row, const uint32_t* rows, const uint32_t* tokens, int lane, int unit, int input, Sums<kTiles>& sums,
                       Sums<kTiles>& total) {
    const int own = input + 8 * fragment_octet(lane);
    const int own_group = own < call.weight.width ? own / call.weight.group_size : call.weight.groups - 1;
    RawGroup<row_tiles(kTiles)> raw;
    Group<row_tiles(kTiles)> group;
    fetch<kBits>(call, first_row, lane, own_group, raw);
    decode<kBits, kFloat>(call, first_row, lane, raw, group);
    uint32_t a[row_tiles(kTiles)][2][4];
    load_rows<kBits, kFloat>(rows, lane, unit, group.zero, a);
    const int end = input + kUnit < call.weight.width ? input + kUnit : call.weight.width;
    for (int each = input / call.weight.group_size; each * call.weight.group_size < end; ++each) {
      multiply<kFloat, kTiles>(tokens, lane, unit, a, own_group == each, sums);
      fetch<kBits>(call, first_row, lane, each, raw);
      decode<kBits, kFloat>(call, first_row, lane, raw, group);
      finish<kTiles>(group, sums, total);
    }
  }

  MKP_DEVICE void end(const Linear&, Sums<kTiles>&, Sums<kTiles>&) {}
};

// ---- sums to y ----

// total[row tile][token tile][c] of a lane is of these; of what lies outside of the matrix nothing is called.
template <int kTiles, typename Store>
MKP_DEVICE void for_each(const Linear& call, int first_row, int lane, const Sums<kTiles>& total, Store store) {
#pragma unroll
  for (int row_tile = 0; row_tile < row_tiles(kTiles); ++row_tile) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = first_row + 16 * row_tile + fragment_row(lane, c / 2), token = kTokens * tile + accumulator_token(lane, c);
        if (row < call.weight.rows && token < call.tokens) store(token, row, total[row_tile][tile][c]);
      }
    }
  }
}

// Whether all other slices of these rows have come before; said to every thread, by way of shared memory that nobody reads any more after the barrier.
MKP_DEVICE bool is_last(const Linear& call, uint32_t* shared) {
  __threadfence();  // this thread's sums are seen by whoever sees the counter
  __syncthreads();  // of all threads of the block
  if (threadIdx.x == 0) *shared = atomicAdd(call.counters + blockIdx.x, 1u);
  __syncthreads();
  const bool last = *shared == static_cast<uint32_t>(call.split.splits) - 1;
  if (last) {
    __threadfence();
    if (threadIdx.x == 0) store_global(call.counters + blockIdx.x, 0u);
  }
  return last;
}

template <Float kFloat, int kRows>
MKP_DEVICE void add_slices(const Linear& call) {
  const int64_t slice = static_cast<int64_t>(call.tokens) * call.weight.rows;
  for (int at = threadIdx.x; at < kRows * call.tokens; at += kThreads) {
    const int row = blockIdx.x * kRows + at % kRows, token = at / kRows;
    if (row >= call.weight.rows) continue;
    const float* from = call.partial + static_cast<int64_t>(token) * call.weight.rows + row;
    float sum = 0;
    for (int each = 0; each < call.split.splits; ++each) sum += load_written(from + each * slice);
    store_global(call.y + token * call.y_pitch + row, narrow<kFloat>(sum));
  }
}

// ---- the kernel ----

// Blocks that a multiprocessor of 64 K registers is to hold: as many as registers allow without spills. (8 bits have so much shared memory that it holds two.)
template <int kBits, int kTiles>
constexpr int residents() {
  return kTiles >= 4 ? 2 : kTiles == 2 || kBits == 3 || kBits == 8 ? 3 : 4;
}

template <int kBits, Float kFloat, int kTiles, bool kWhole>
__global__ void __launch_bounds__(kThreads, (residents<kBits, kTiles>())) linear_kernel(const Linear call) {
  constexpr int depth = stages<kBits, kTiles>(), pitch = stage_pitch<kBits, kTiles>();
  uint32_t* shared = shared_memory();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block_row = blockIdx.x * block_rows(kTiles), first_row = block_row + warp * 16 * row_tiles(kTiles);
  const int first = blockIdx.y * call.split.each;
  const int all = ceil_div(call.weight.width, kStage) - first, count = all < call.split.each ? all : call.split.each;

  Sums<kTiles> sums = {}, total = {};
  std::conditional_t<kWhole, WholeGroups<kBits, kFloat, kTiles>, AnyGroups<kBits, kFloat, kTiles>> groups;

#pragma unroll 1
  for (int ahead = 0; ahead < depth - 1; ++ahead) {
    if (ahead < count) copy_stage<kBits, kTiles>(call, block_row, first + ahead, shared + ahead * pitch);
    copies_commit();
  }
  groups.begin(call, first_row, lane, first);

  for (int i = 0; i < count; ++i) {
    copies_wait<depth - 2>();  // this thread's part of stage i is here
    __syncthreads();           // everyone's is, and nobody reads stage i - 1 any more, whose place the next copy takes
    if (i + depth - 1 < count) copy_stage<kBits, kTiles>(call, block_row, first + i + depth - 1, shared + (i + depth - 1) % depth * pitch);
    copies_commit();
    const uint32_t* stage = shared + i % depth * pitch;
    const uint32_t* rows = stage + warp * 16 * row_tiles(kTiles) * row_pitch<kBits>();
    const uint32_t* tokens = stage + block_rows(kTiles) * row_pitch<kBits>();
    const int input = (first + i) * kStage;
#pragma unroll 1
    for (int unit = 0; unit < kStage / kUnit; ++unit) {
      groups.unit(call, first_row, rows, tokens, lane, unit, input + unit * kUnit, sums, total);
    }
  }
  groups.end(call, sums, total);

  if (call.split.splits == 1) {
    for_each<kTiles>(call, first_row, lane, total, [&](int token, int row, float sum) {
      store_global(call.y + token * call.y_pitch + row, narrow<kFloat>(sum));
    });
    return;
  }
  float* partial = call.partial + static_cast<int64_t>(blockIdx.y) * call.tokens * call.weight.rows;
  for_each<kTiles>(call, first_row, lane, total, [&](int token, int row, float sum) {
    store_global(partial + static_cast<int64_t>(token) * call.weight.rows + row, sum);
  });
  if (is_last(call, shared)) add_slices<kFloat, block_rows(kTiles)>(call);
}

// ---- which kernel ----

template <int kBits, Float kFloat, int kTiles, bool kWhole = true>
cudaError_t launch_tiles(const Linear& call, void* stream) {
  const dim3 grid(ceil_div(call.weight.rows, block_rows(kTiles)), call.split.splits);
  return launch(linear_kernel<kBits, kFloat, kTiles, kWhole>, grid, kThreads, 4 * stages<kBits, kTiles>() * stage_pitch<kBits, kTiles>(), stream, call);
}

template <int kBits, Float kFloat>
cudaError_t launch_float(const Linear& call, void* stream) {
  if (call.weight.group_size % kUnit) return launch_tiles<kBits, kFloat, 8, false>(call, stream);
  switch (token_tiles(call.tokens, call.weight.group_size)) {
    case 1: return launch_tiles<kBits, kFloat, 1>(call, stream);
    case 2: return launch_tiles<kBits, kFloat, 2>(call, stream);
    case 4: return launch_tiles<kBits, kFloat, 4>(call, stream);
    default: return launch_tiles<kBits, kFloat, 8>(call, stream);
  }
}

}  // namespace

template <int kBits>
cudaError_t linear_small_m(const Linear& call, Float kind, void* stream) {
  return kind == Float::half ? launch_float<kBits, Float::half>(call, stream) : launch_float<kBits, Float::bfloat>(call, stream);
}

template cudaError_t linear_small_m<MKP_BITS>(const Linear&, Float, void*);  // compiled once for each width

}  // namespace mkp

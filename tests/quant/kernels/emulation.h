// The instructions of csrc/cuda/ptx.cuh in plain C++, so that the kernels run, as they are shipped, where there is no GPU.
//
// A thread is a fiber; it runs until it needs the others (an mma of its warp, a barrier of its block), and then another one does, in an order that is
// chosen to hurt: lowest first, highest first, by ranks that chance gives anew from time to time, or at random, the last two among the threads of 16 blocks
// at once. Copies to shared memory land either at once or as late as the program allows. So a missing barrier or wait, which a processor would forgive, gives
// wrong numbers here under one of the orders. (What processors may reorder between blocks, for which there are fences, is not shown: memory is one.)
//
// Also checked: every access to global memory lies in a buffer that was named, and to shared memory in what was asked for; both are aligned; shared memory
// that was not written is NaN; no two lanes of a load from shared memory want different words of one bank.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#define MKP_DEVICE inline
#define MKP_BOTH inline
#define __global__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;

inline dim3 threadIdx, blockIdx;

namespace emulation {

struct Copy {
  char* to;
  const char* from;
  int bytes, valid;
};

struct Product {  // the operands of an mma
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  bool half;
};

struct Fiber {
  enum State { ready, at_warp, at_block, done } state = ready;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread, block;
  std::vector<uint64_t>* memory;  // shared, of its block
  std::deque<std::vector<Copy>> groups = {{}};  // the last one is open
  Product product;
  std::vector<std::pair<size_t, int>> loads;  // from shared memory: offset and size
};

struct Range {
  const char* start;
  size_t bytes;
  bool writable;
};

inline std::vector<Range> ranges;
inline std::string error;
inline int multiprocessors = 1, order = 0, worst_bank = 1, launches = 0;
inline bool late = false;
inline uint32_t randomness = 1, chosen = 0;

constexpr size_t stack_bytes = 1 << 16;
inline std::vector<Fiber> fibers;
inline size_t current;
inline ucontext_t scheduler;
inline size_t memory_bytes;  // shared, of a block
inline void (*body)(const void*);
inline const void* argument;

inline void fail(const std::string& what) {
  if (error.empty()) error = what + " (thread " + std::to_string(current) + " of block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ")";
}

inline Fiber& self() { return fibers[current]; }

inline void wait_as(Fiber::State state) {
  self().state = state;
  swapcontext(&self().context, &scheduler);
}

inline bool global(const void* pointer, size_t bytes, bool write, size_t alignment) {
  const char* at = static_cast<const char*>(pointer);
  if (reinterpret_cast<uintptr_t>(at) % alignment) return fail("misaligned access to global memory"), false;
  for (const Range& range : ranges) {
    if (at >= range.start && at + bytes <= range.start + range.bytes) return write <= range.writable ? true : (fail("write to an input"), false);
  }
  return fail(write ? "write outside of every buffer" : "read outside of every buffer"), false;
}

inline bool shared(const void* pointer, size_t bytes) {
  const char *at = static_cast<const char*>(pointer), *start = reinterpret_cast<const char*>(self().memory->data());
  if (at < start || at + bytes > start + memory_bytes) return fail("access outside of shared memory"), false;
  if ((at - start) % bytes) return fail("misaligned access to shared memory"), false;
  return true;
}

inline void land(const Copy& copy) {
  memset(copy.to, 0, copy.bytes);
  if (copy.valid && global(copy.from, copy.valid, false, 4)) memcpy(copy.to, copy.from, copy.valid);
}

inline float float_of(uint16_t bits, bool half) {
  if (half) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return static_cast<float>(value);
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t bits_of(float value, bool half) {
  uint16_t bits;
  if (half) {
    const _Float16 rounded = static_cast<_Float16>(value);
    memcpy(&bits, &rounded, 2);
    return bits;
  }
  uint32_t wide;
  memcpy(&wide, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": the layout as the manual gives it, written apart from layout.cuh.
inline void multiply(size_t first) {
  float a[16][16], b[16][8];
  const bool half = fibers[first].product.half;
  for (int lane = 0; lane < 32; ++lane) {
    const Product& product = fibers[first + lane].product;
    const int group = lane >> 2, inside = lane & 3;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8, column = inside * 2 + (i & 1) + (i < 4 ? 0 : 8);
      a[row][column] = float_of(product.a[i / 2] >> 16 * (i & 1), half);
    }
    for (int i = 0; i < 4; ++i) b[inside * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = float_of(product.b[i / 2] >> 16 * (i & 1), half);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = (lane & 3) * 2 + (i & 1);
      double sum = fibers[first + lane].product.d[i];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      fibers[first + lane].product.d[i] = static_cast<float>(sum);
    }
  }
}

// The most words of one bank that a load of a warp wants: 4 bytes of all lanes at once, 8 of half of them, 16 of a quarter.
inline void count_banks(size_t first) {
  const size_t count = fibers[first].loads.size();
  for (int lane = 1; lane < 32; ++lane) {
    if (fibers[first + lane].loads.size() != count) return fail("lanes of a warp load from shared memory unequally often");
  }
  for (size_t load = 0; load < count; ++load) {
    const int size = fibers[first].loads[load].second, together = 128 / size;
    for (int start = 0; start < 32; start += together) {
      std::map<size_t, std::set<size_t>> banks;
      for (int lane = start; lane < start + together && lane < 32; ++lane) {
        const size_t offset = fibers[first + lane].loads[load].first;
        for (size_t word = offset / 4; word < (offset + size) / 4; ++word) banks[word % 32].insert(word);
      }
      for (const auto& bank : banks) worst_bank = std::max(worst_bank, static_cast<int>(bank.second.size()));
    }
  }
}

// Where all of these threads wait for each other, what they wait for is done, and they go on.
inline void meet(size_t first, size_t count, void (*together)(size_t)) {
  const Fiber::State state = self().state;
  for (size_t i = first; i < first + count; ++i) {
    if (fibers[i].state != state) return;
  }
  together(first);
  for (size_t i = first; i < first + count; ++i) fibers[i].state = Fiber::ready;
}

// The rank of a thread among all where each has one by chance, for some time.
inline uint32_t rank(size_t thread) {
  uint32_t mixed = (static_cast<uint32_t>(thread) + 1) * 2654435761u ^ (static_cast<uint32_t>(order) + chosen / 256 * 64) * 2246822519u;
  mixed = (mixed ^ mixed >> 15) * 2246822519u;
  return mixed ^ mixed >> 13;
}

inline size_t choose(const std::vector<size_t>& ready) {
  if (order == 0) return ready.front();
  if (order == 1) return ready.back();
  ++chosen;
  if (order % 2 == 0) return *std::min_element(ready.begin(), ready.end(), [](size_t a, size_t b) { return rank(a) < rank(b); });
  randomness = randomness * 1664525u + 1013904223u;
  return ready[(randomness >> 8) % ready.size()];
}

inline void entry() {
  body(argument);
  wait_as(Fiber::done);
}

// Blocks that are resident at once.
inline void run(const std::vector<dim3>& blocks, int threads, size_t bytes) {
  memory_bytes = bytes;
  std::vector<std::vector<uint64_t>> memories(blocks.size(), std::vector<uint64_t>(bytes / 8 + 1, ~uint64_t{0}));  // NaN
  fibers.resize(blocks.size() * threads);
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    std::unique_ptr<char[]> stack = std::move(fiber.stack);
    fiber = Fiber();
    fiber.stack = stack ? std::move(stack) : std::unique_ptr<char[]>(new char[stack_bytes]);
    fiber.thread = dim3(i % threads, 0, 0);
    fiber.block = blocks[i / threads];
    fiber.memory = &memories[i / threads];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
  std::vector<size_t> ready;
  while (true) {
    ready.clear();
    for (size_t i = 0; i < fibers.size(); ++i) {
      if (fibers[i].state == Fiber::ready) ready.push_back(i);
    }
    if (ready.empty()) break;
    current = choose(ready);
    threadIdx = self().thread;
    blockIdx = self().block;
    swapcontext(&scheduler, &self().context);
    if (self().state == Fiber::at_warp) meet(current / 32 * 32, 32, multiply);
    if (self().state == Fiber::at_block) meet(current / threads * threads, threads, [](size_t) {});
  }
  for (const Fiber& fiber : fibers) {
    if (fiber.state != Fiber::done) return fail("threads wait for each other, or some do not come to a barrier");
  }
  for (size_t first = 0; first < fibers.size(); first += 32) count_banks(first);
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait_as(emulation::Fiber::at_block); }
inline void __threadfence() {}

inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
  if (!emulation::global(at, 4, true, 4)) return 0;
  const uint32_t before = *at;
  *at += value;
  return before;
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = emulation::multiprocessors, cudaSuccess; }
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id) {
  return *status = cudaStreamCaptureStatusNone, *id = 0, cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

namespace mkp {

enum class Float { half, bfloat };

inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) { return (mask & a) | (~mask & b); }

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15;
    if (nibble > 7) emulation::fail("a selector of prmt that copies signs");
    d |= static_cast<uint32_t>(both >> 8 * (nibble & 7) & 255) << 8 * i;
  }
  return d;
}

inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <Float kFloat>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  constexpr bool half = kFloat == Float::half;
  uint32_t d = 0;
  for (int i = 0; i < 32; i += 16) {
    const double exact = static_cast<double>(emulation::float_of(a >> i, half)) * emulation::float_of(b >> i, half) + emulation::float_of(c >> i, half);
    d |= static_cast<uint32_t>(emulation::bits_of(static_cast<float>(exact), half)) << i;
  }
  return d;
}

template <Float kFloat>
float widen(uint16_t bits) {
  return emulation::float_of(bits, kFloat == Float::half);
}

template <Float kFloat>
uint16_t narrow(float value) {
  return emulation::bits_of(value, kFloat == Float::half);
}

template <Float kFloat>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::self().product = {d, a, {b0, b1}, kFloat == Float::half};
  emulation::wait_as(emulation::Fiber::at_warp);
}

template <int kBytes>
void copy_async(void* shared, const void* global, uint32_t valid) {
  if (!emulation::shared(shared, kBytes)) return;
  if (reinterpret_cast<uintptr_t>(global) % kBytes) emulation::fail("misaligned copy");
  const emulation::Copy copy = {static_cast<char*>(shared), static_cast<const char*>(global), kBytes, static_cast<int>(valid)};
  if (emulation::late) {
    emulation::self().groups.back().push_back(copy);
  } else {
    emulation::land(copy);
  }
}

inline void copies_commit() { emulation::self().groups.emplace_back(); }

template <int kPending>
void copies_wait() {
  auto& groups = emulation::self().groups;
  for (; groups.size() > kPending + 1; groups.pop_front()) {
    for (const emulation::Copy& copy : groups.front()) emulation::land(copy);
  }
}

template <typename T>
T load_global(const T* pointer) {
  return emulation::global(pointer, sizeof(T), false, sizeof(T)) ? *pointer : T{};
}

inline float load_written(const float* pointer) { return load_global(pointer); }

template <typename T>
void store_global(T* pointer, T value) {
  if (emulation::global(pointer, sizeof(T), true, sizeof(T))) *pointer = value;
}

inline uint32_t* shared_memory() { return reinterpret_cast<uint32_t*>(emulation::self().memory->data()); }

template <typename T>
T load_shared(const void* pointer) {
  if (!emulation::shared(pointer, sizeof(T))) return T{};
  emulation::self().loads.emplace_back(static_cast<const char*>(pointer) - reinterpret_cast<const char*>(emulation::self().memory->data()), sizeof(T));
  T value;
  memcpy(&value, pointer, sizeof(T));
  return value;
}

template <typename Call>
cudaError_t launch(void (*kernel)(Call), dim3 grid, int threads, int shared_bytes, void*, const Call& call) {
  static void (*running)(Call);
  running = kernel;
  emulation::body = [](const void* argument) { running(*static_cast<const Call*>(argument)); };
  emulation::argument = &call;
  std::vector<dim3> blocks;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) blocks.emplace_back(x, y);
  }
  if (emulation::order) std::reverse(blocks.begin(), blocks.end());
  const size_t together = emulation::order > 1 ? 16 : 1;
  for (size_t first = 0; first < blocks.size(); first += together) {
    emulation::run({blocks.begin() + first, blocks.begin() + std::min(first + together, blocks.size())}, threads, shared_bytes);
  }
  ++emulation::launches;
  return cudaSuccess;
}

}  // namespace mkp

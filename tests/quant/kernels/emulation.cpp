// The emulator's switches, for ctypes.

#include "emulation.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Before a launch: in which order threads run (0 lowest first, 1 highest first, else by this seed: even ones by ranks, odd ones at random) and blocks
// (backwards, unless 0; several at once above 1), whether copies land late, and how many multiprocessors there are.
EXPORT void emulate(int order, int late, int multiprocessors) {
  emulation::order = order;
  emulation::randomness = order;
  emulation::chosen = 0;
  emulation::late = late;
  emulation::multiprocessors = multiprocessors;
  emulation::ranges.clear();
  emulation::error.clear();
  emulation::worst_bank = 1;
  emulation::launches = 0;
}

// A buffer that kernels may read, or write as well.
EXPORT void emulate_buffer(const void* start, size_t bytes, int writable) {
  emulation::ranges.push_back({static_cast<const char*>(start), bytes, writable != 0});
}

// What was wrong first, or "".
EXPORT const char* emulate_error() { return emulation::error.c_str(); }

// The most words of one bank that a load wanted at once: 1 where nothing waited.
EXPORT int emulate_worst_bank() { return emulation::worst_bank; }

EXPORT int emulate_launches() { return emulation::launches; }

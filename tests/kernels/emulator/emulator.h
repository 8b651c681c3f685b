// Runs our CUDA kernels on the CPU, so that their logic is tested where there is no GPU. Every CUDA thread is
// a fiber; a fiber runs until it meets a barrier or a warp-wide operation, then the next one runs. Thread
// blocks run one after another, the blocks of a cluster together. cp.async copies happen when they are waited
// for, so that a missing wait shows. What it cannot show: data races between threads of different warps, and
// speed.
//
// A wrapper .cpp includes this file first and then a .cu file of kernels/; SPOT_EMULATED must be defined.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#undef __syncthreads
#undef __syncwarp
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static  // blocks run one after another; cluster kernels use dynamic shared memory alone

namespace emulator {

struct Index {
  unsigned x, y, z;
};
struct Barrier {
  unsigned expected = 0, arrived = 0;
  uint64_t generation = 0;
  std::vector<struct Fiber*> waiting;
};
struct Slot {
  uint32_t words[8];
};
struct Warp {
  Barrier barrier;
  Slot slots[2][32];
};
struct Block {
  Index index;
  unsigned rank;
  std::vector<uint8_t> shared;
  Barrier barrier, named[16];
  std::vector<Warp> warps;
};
struct Copy {
  uint8_t* to;
  const void* from;
  size_t bytes;
};
struct Fiber;

// The running thread.
Index thread_index();
Index block_index();
Index grid_size();
Index block_size();
unsigned block_rank();
unsigned cluster_size();
// SPOT_EMULATED_ARCHITECTURE in the environment, or 90: below it kernels take the forms of older cards.
int architecture();

void run(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, const std::function<void()>& kernel);

void block_barrier();
void named_barrier(int id, unsigned threads);
void warp_barrier();
uint64_t cluster_arrive_barrier();
void cluster_wait_barrier();
uint8_t* shared_base();
uint8_t* shared_base_of(unsigned rank);

// Deposits 8 words and returns the 32 lanes' deposits, valid until the warp's next but one exchange.
const Slot* exchange(const Slot& mine);
const Slot* exchange(uint32_t word);
unsigned lane();

void copy_async(uint8_t* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(int pending);

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define gridDim (emulator::grid_size())
#define blockDim (emulator::block_size())

// ---- CUDA's own words
// -----------------------------------------------------------------------------------------

#undef max
#undef min
using std::max;
using std::min;

inline void __syncthreads() {
  emulator::block_barrier();
}
inline void __syncwarp() {
  emulator::warp_barrier();
}
inline void __threadfence() {}

template <typename T>
T emulated_from_words(const emulator::Slot& slot) {
  T value;
  std::memcpy(&value, slot.words, sizeof(T));
  return value;
}
template <typename T>
emulator::Slot emulated_to_words(T value) {
  emulator::Slot slot = {};
  std::memcpy(slot.words, &value, sizeof(T));
  return slot;
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulated_from_words<T>(emulator::exchange(emulated_to_words(value))[source & 31]);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned lane = emulator::lane();
  return emulated_from_words<T>(
      emulator::exchange(emulated_to_words(value))[lane ^ static_cast<unsigned>(mask)]);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int offset) {
  const int lane = static_cast<int>(emulator::lane());
  return emulated_from_words<T>(
      emulator::exchange(emulated_to_words(value))[lane >= offset ? lane - offset : lane]);
}
inline uint32_t __ballot_sync(unsigned, bool predicate) {
  const emulator::Slot* slots = emulator::exchange(predicate ? 1u : 0u);
  uint32_t word = 0;
  for (int i = 0; i < 32; ++i) word |= slots[i].words[0] << i;
  return word;
}
inline bool __any_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  const emulator::Slot* slots = emulator::exchange(value);
  for (int i = 0; i < 32; ++i) value = std::max(value, slots[i].words[0]);
  return value;
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t value) {
  const emulator::Slot* slots = emulator::exchange(value);
  for (int i = 0; i < 32; ++i) value = std::min(value, slots[i].words[0]);
  return value;
}
template <typename T>
T __reduce_add_sync(unsigned, T value) {
  const emulator::Slot* slots = emulator::exchange(static_cast<uint32_t>(value));
  T sum = 0;
  for (int i = 0; i < 32; ++i) sum += static_cast<T>(slots[i].words[0]);
  return sum;
}
template <typename T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
inline uint32_t atomicOr(uint32_t* p, uint32_t value) {
  const uint32_t old = *p;
  *p = old | value;
  return old;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
inline int __popc(uint32_t x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline uint32_t __float_as_uint(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
}

// kernels/ptx.cuh on the CPU: the same functions, from their definitions in the PTX manual.
#pragma once

#include "kernels/key_format.h"
#include "tests/kernels/emulator/emulator.h"

#define SPOT_HOPPER_CODE 1

namespace spot::kernels::ptx {

inline uint8_t* dynamic_shared() {
  return emulator::shared_base();
}
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - emulator::shared_base());
}

template <typename T>
float half_bits_to_float(uint32_t bits) {
  using Raw = std::conditional_t<std::is_same_v<T, __half>, __half_raw, __nv_bfloat16_raw>;
  Raw raw;
  raw.x = static_cast<uint16_t>(bits);
  return static_cast<float>(T(raw));
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float c0, float c1,
                  float c2, float c3) {
  const emulator::Slot* slots = emulator::exchange(emulator::Slot{{a[0], a[1], a[2], a[3], b0, b1, 0, 0}});
  const int lane = static_cast<int>(emulator::lane());
  const float c[4] = {c0, c1, c2, c3};
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = slots[row % 8 * 4 + k % 8 / 2].words[row / 8 + k / 8 * 2] >> (k % 2 * 16);
      const uint32_t y = slots[column * 4 + k % 8 / 2].words[4 + k / 8] >> (k % 2 * 16);
      sum += static_cast<double>(half_bits_to_float<T>(x)) * static_cast<double>(half_bits_to_float<T>(y));
    }
    d[i] = static_cast<float>(sum);
  }
}
template <typename T>
void mma_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_m16n8k16<T>(d, a, b0, b1, d[0], d[1], d[2], d[3]);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed) {
  const emulator::Slot* slots = emulator::exchange(address);
  const int lane = static_cast<int>(emulator::lane()), g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int row = transposed ? 2 * t + j : g, column = transposed ? g : 2 * t + j;
      std::memcpy(&pair[j], emulator::shared_base() + slots[8 * i + row].words[0] + column * 2, 2);
    }
    r[i] = static_cast<uint32_t>(pair[0]) | static_cast<uint32_t>(pair[1]) << 16;
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  load_matrices(r, address, false);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  load_matrices(r, address, true);
}
inline uint32_t movmatrix_trans(uint32_t a) {
  const emulator::Slot* slots = emulator::exchange(a);
  const int lane = static_cast<int>(emulator::lane()), g = lane / 4, t = lane % 4;
  const auto element = [&](int row, int column) {
    return slots[row * 4 + column / 2].words[0] >> (column % 2 * 16) & 0xffffu;
  };
  return element(2 * t, g) | element(2 * t + 1, g) << 16;
}

inline void cp_async_16(uint32_t to, const void* from) {
  emulator::copy_async(emulator::shared_base() + to, from, 16);
}
inline void cp_async_4(uint32_t to, const void* from) {
  emulator::copy_async(emulator::shared_base() + to, from, 4);
}
inline void cp_async_commit() {
  emulator::commit_copies();
}
template <int kPending>
void cp_async_wait() {
  emulator::wait_copies(kPending);
}

}  // namespace spot::kernels::ptx
#include "kernels/ptx_portable.cuh"
namespace spot::kernels::ptx {

// Operands as the descriptor says: addresses swizzled by their own bits. Products are done at once.
inline uint64_t wgmma_operand(uint32_t address) {
  return address;
}
inline uint64_t wgmma_advance(uint64_t operand, int steps) {
  return operand + static_cast<uint64_t>(32 * steps);
}
inline void wgmma_arrive() {}
inline void wgmma_commit() {}
inline void wgmma_wait_all() {}
template <int kCount>
void wgmma_hold(float (&)[kCount]) {}
inline void fence_for_wgmma() {}
inline void named_barrier(int id, int threads) {
  emulator::named_barrier(id, static_cast<unsigned>(threads));
}
template <typename T>
void wgmma_row(float (&row)[16], uint64_t operand, int index) {
  const uint32_t begin = static_cast<uint32_t>(operand) + static_cast<uint32_t>(index) * 128;
  for (uint32_t k = 0; k < 16; ++k) {
    const uint32_t address = begin + 2 * k;
    uint16_t bits;
    std::memcpy(&bits, emulator::shared_base() + (address ^ (address >> 3 & 0x70)), 2);
    row[k] = half_bits_to_float<T>(bits);
  }
}
template <typename T, int kCount>
void wgmma_k16(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  if (emulator::architecture() < 90) return warp_products_k16<T>(d, a, b, accumulate);
  const int lane = static_cast<int>(emulator::lane()), warp = static_cast<int>(threadIdx.x / 32 % 4);
  float rows[2][16], column[16];
  for (int half = 0; half < 2; ++half) wgmma_row<T>(rows[half], a, 16 * warp + lane / 4 + 8 * half);
  for (int i = 0; i < kCount; i += i % 4 == 0 ? 1 : 3) {  // elements i and i + 2 share a column
    wgmma_row<T>(column, b, i / 4 * 8 + lane % 4 * 2 + i % 4);
    for (int half = 0; half < 2; ++half) {
      float& element = d[i + 2 * half];
      double sum = accumulate ? element : 0.0;
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(rows[half][k]) * static_cast<double>(column[k]);
      element = static_cast<float>(sum);
    }
  }
}

inline uint32_t add_acquire_release(uint32_t* counter, uint32_t value) {
  return atomicAdd(counter, value);
}
inline void prefetch_l2(const void*, uint32_t) {}
inline void touch(const void*) {}

inline void griddepcontrol_wait() {}
inline void griddepcontrol_launch_dependents() {}

inline void cluster_arrive() {
  emulator::cluster_arrive_barrier();
}
inline void cluster_wait() {
  emulator::cluster_wait_barrier();
}
inline uint32_t cluster_block_rank() {
  return emulator::block_rank();
}
inline uint32_t cluster_num_blocks() {
  return emulator::cluster_size();
}
inline void store_cluster(uint32_t address, uint32_t rank, float value) {
  std::memcpy(emulator::shared_base_of(rank) + address, &value, 4);
}

inline uint4 load_streaming(const void* p) {
  uint4 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline uint32_t reduce_max(uint32_t v) {
  return __reduce_max_sync(0xffffffffu, v);
}
inline uint32_t reduce_min(uint32_t v) {
  return __reduce_min_sync(0xffffffffu, v);
}
inline float exp2_approx(float x) {
  return std::exp2(x);
}
inline float log2_approx(float x) {
  return std::log2(x);
}
inline float2 e4m3x2_to_float2(uint32_t two) {
  if (emulator::architecture() < 89) return e4m3x2_by_bits(two);
  const auto number = [](uint32_t code) {
    const float size = (code & 0x7f) == 0x7f ? NAN : e4m3_to_float(code & 0x7f);
    return code & 0x80 ? -size : size;
  };
  return make_float2(number(two & 0xff), number(two >> 8 & 0xff));
}
inline uint32_t floats_to_e4m3x2(float low, float high) {
  if (emulator::architecture() < 89) return e4m3x2_of_floats(low, high);
  const auto nearest = [](float x) -> uint32_t {
    if (std::isnan(x)) return 0x7f;
    uint32_t best = 0;
    for (uint32_t code = 1; code < 0x7f; ++code) {
      const double to_code = std::fabs(double{std::fabs(x)} - e4m3_to_float(code)),
                   to_best = std::fabs(double{std::fabs(x)} - e4m3_to_float(best));
      if (to_code < to_best || (to_code == to_best && code % 2 == 0)) best = code;
    }
    return best | (std::signbit(x) ? 0x80u : 0u);
  };
  return nearest(low) | nearest(high) << 8;
}

template <typename T>
uint32_t pack2(float low, float high) {
  const T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
  uint32_t word;
  std::memcpy(&word, pair, 4);
  return word;
}
inline void e4m3x4_to_halves(uint32_t four, uint32_t& low, uint32_t& high) {
  if (emulator::architecture() < 89) return e4m3x4_by_bits(four, low, high);
  const float2 a = e4m3x2_to_float2(four & 0xffff), b = e4m3x2_to_float2(four >> 16);
  low = pack2<__half>(a.x, a.y);
  high = pack2<__half>(b.x, b.y);
}
template <typename T>
T from_float(float x) {
  return static_cast<T>(x);
}

}  // namespace spot::kernels::ptx

// Memory that the kernels under test can reach: the GPU's, or with SPOT_EMULATED the CPU's.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/types.h"

namespace spot::kernels::testing {

inline void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA error ") + std::to_string(static_cast<int>(error)));
}

// kEmulated chooses the sizes for slow devices: the emulator, and a GPU under SPOT_SMALL_TESTS
// (compute-sanitizer).
#if defined(SPOT_EMULATED)
inline constexpr bool kEmulated = true;
inline void* device_allocate(size_t bytes) {
  return ::operator new(bytes, std::align_val_t(256));
}
inline void device_free(void* p) {
  ::operator delete(p, std::align_val_t(256));
}
inline void device_copy(void* to, const void* from, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}
inline void device_fill(void* p, int value, size_t bytes) {
  if (bytes > 0) std::memset(p, value, bytes);
}
inline void device_synchronize() {}
#else
inline const bool kEmulated = std::getenv("SPOT_SMALL_TESTS") != nullptr;
inline void* device_allocate(size_t bytes) {
  void* p = nullptr;
  check(cudaMalloc(&p, bytes));
  return p;
}
inline void device_free(void* p) {
  cudaFree(p);
}
inline void device_copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
inline void device_fill(void* p, int value, size_t bytes) {
  check(cudaMemset(p, value, bytes));
  check(cudaDeviceSynchronize());  // streams that do not wait for the default one could overtake it
}
inline void device_synchronize() {
  check(cudaGetLastError());
  check(cudaDeviceSynchronize());
}
#endif

// Filled with 0xff bytes (NaN as floats) unless given contents.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count)
      : count_(count), data_(static_cast<T*>(device_allocate(std::max<size_t>(count, 1) * sizeof(T)))) {
    device_fill(data_, 0xff, count * sizeof(T));
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) { upload(values); }
  ~Buffer() { device_free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }
  size_t size() const { return count_; }
  void upload(const std::vector<T>& values) { device_copy(data_, values.data(), values.size() * sizeof(T)); }
  void fill(int byte) { device_fill(data_, byte, count_ * sizeof(T)); }
  std::vector<T> download() const {
    device_synchronize();
    std::vector<T> values(count_);
    device_copy(values.data(), data_, count_ * sizeof(T));
    return values;
  }

 private:
  size_t count_;
  T* data_;
};

// float32 values rounded to `type`, as raw bytes for the device and as the floats the reference should use.
struct Typed {
  std::vector<uint8_t> bytes;
  std::vector<float> values;
  Typed(DataType type, const std::vector<float>& from) : values(from) {
    if (type == DataType::kF32) {
      bytes.resize(from.size() * 4);
      std::memcpy(bytes.data(), from.data(), bytes.size());
      return;
    }
    bytes.resize(from.size() * 2);
    for (size_t i = 0; i < from.size(); ++i) {
      uint16_t bits;
      if (type == DataType::kBf16) {
        bits = static_cast<uint16_t>(float_to_bf16(from[i]));
        values[i] = bf16_to_float(bits);
      } else {
        const _Float16 half = static_cast<_Float16>(from[i]);
        std::memcpy(&bits, &half, 2);
        values[i] = static_cast<float>(half);
      }
      std::memcpy(bytes.data() + 2 * i, &bits, 2);
    }
  }
};
inline std::vector<double> to_double(DataType type, const std::vector<uint16_t>& bits) {
  std::vector<double> values(bits.size());
  for (size_t i = 0; i < bits.size(); ++i) {
    _Float16 half;
    std::memcpy(&half, &bits[i], 2);
    values[i] =
        type == DataType::kBf16 ? static_cast<double>(bf16_to_float(bits[i])) : static_cast<double>(half);
  }
  return values;
}

inline uint32_t fresh_seed() {
  const uint32_t seed = std::random_device{}();
  ::testing::Test::RecordProperty("seed", std::to_string(seed));
  std::printf("seed %u\n", seed);
  return seed;
}

}  // namespace spot::kernels::testing

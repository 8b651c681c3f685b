// What benchmarks ask of the device they run on.
#pragma once

#include <ATen/ATen.h>

#include <functional>

namespace spot {

// Waits for everything that was asked of the device.
void synchronize(const at::Device& device);

// Most bytes that torch's allocator has held on the device since reset_peak(), in GiB; 0 on the CPU.
double peak_gib(const at::Device& device);
void reset_peak(const at::Device& device);

// The median of `count` runs after one that warms up, in milliseconds.
double median_ms(const at::Device& device, int64_t count, const std::function<void()>& work);

// TFLOP/s of a square matrix product of random numbers, the yardstick for a model's products: 8,192 rows on a GPU, 1,024
// on the CPU.
double matmul_tflops(const at::Device& device, at::ScalarType dtype);

}  // namespace spot

#include "benchmark/device.h"

#include <ATen/DeviceAccelerator.h>

#include <algorithm>
#include <chrono>
#include <vector>

namespace spot {

void synchronize(const at::Device& device) {
  if (device.is_cuda()) at::accelerator::synchronizeDevice(device.index());
}

double peak_gib(const at::Device& device) {
  if (!device.is_cuda()) return 0;
  return static_cast<double>(at::accelerator::getDeviceStats(device.index()).allocated_bytes[0].peak) /
         (1 << 30);
}

void reset_peak(const at::Device& device) {
  if (device.is_cuda()) at::accelerator::resetPeakStats(device.index());
}

double median_ms(const at::Device& device, int64_t count, const std::function<void()>& work) {
  std::vector<double> times;
  for (int64_t i = 0; i <= count; ++i) {
    synchronize(device);
    const auto start = std::chrono::steady_clock::now();
    work();
    synchronize(device);
    if (i > 0)
      times.push_back(1000 * std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

double matmul_tflops(const at::Device& device, at::ScalarType dtype) {
  const int64_t size = device.is_cuda() ? 8192 : 1024, repeats = device.is_cuda() ? 10 : 1;
  const at::Tensor a = at::randn({size, size}, at::TensorOptions(device).dtype(dtype)), b = at::randn_like(a);
  at::Tensor c = at::empty_like(a);
  const double ms = median_ms(device, 3, [&] {
    for (int64_t i = 0; i < repeats; ++i) at::mm_out(c, a, b);
  });
  return 2e-9 * static_cast<double>(repeats * size * size * size) / ms;
}

}  // namespace spot

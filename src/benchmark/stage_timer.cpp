#include "benchmark/stage_timer.h"

#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#ifdef SPOT_TORCH_CUDA
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#endif

namespace spot {

using Clock = std::chrono::steady_clock;

struct StageTimer::Stage {
  std::string name;
  StageWork work;
  std::vector<double> microseconds;
#ifdef SPOT_TORCH_CUDA
  at::cuda::CUDAGraph graph;
  int64_t calls = 0;
#endif
};

StageTimer::StageTimer(at::Device device, int64_t sets, int64_t rounds)
    : device_(device), sets_(sets), rounds_(rounds) {}
StageTimer::~StageTimer() = default;

void StageTimer::add(const std::string& name, const StageWork& work) {
  auto stage = std::make_unique<Stage>();
  stage->name = name;
  stage->work = work;
#ifdef SPOT_TORCH_CUDA
  if (device_.is_cuda()) {
    // Capture must not run on the default stream; kernels' workspaces are made in the warm-up, on the same
    // stream.
    static const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool(false, device_.index());
    const c10::cuda::CUDAGuard device(device_);
    c10::cuda::getCurrentCUDAStream().synchronize();
    const c10::cuda::CUDAStreamGuard guard(stream);
    for (int64_t set = 0; set < sets_; ++set) work(set);
    stream.synchronize();
    stage->calls = std::max<int64_t>(1, (16 + sets_ - 1) / sets_) * sets_;
    stage->graph.capture_begin();
    try {
      for (int64_t call = 0; call < stage->calls; ++call) work(call % sets_);
    } catch (...) {
      try {
        stage->graph.capture_end();  // else the stream goes on capturing
      } catch (const std::exception&) {
      }
      throw;
    }
    stage->graph.capture_end();
    stream.synchronize();
    stages_.push_back(std::move(stage));
    return;
  }
#endif
  for (int64_t set = 0; set < sets_; ++set) work(set);
  stages_.push_back(std::move(stage));
}

std::map<std::string, double> StageTimer::measure() {
#ifdef SPOT_TORCH_CUDA
  if (device_.is_cuda()) {
    const c10::cuda::CUDAGuard device(device_);
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
    const auto begin = Clock::now();
    while (std::chrono::duration<double>(Clock::now() - begin).count() < 1.0) {
      for (auto& stage : stages_) stage->graph.replay();
      stream.synchronize();
    }
    at::cuda::CUDAEvent start(cudaEventDefault), end(cudaEventDefault);
    for (int64_t round = 0; round < rounds_; ++round)
      for (auto& stage : stages_) {
        start.record(stream);
        stage->graph.replay();
        end.record(stream);
        end.synchronize();
        stage->microseconds.push_back(1e3 * static_cast<double>(start.elapsed_time(end)) /
                                      static_cast<double>(stage->calls));
      }
  }
#endif
  std::map<std::string, double> medians;
  if (!device_.is_cuda())
    for (int64_t round = 0; round < rounds_; ++round)
      for (auto& stage : stages_) {
        const auto begin = Clock::now();
        for (int64_t set = 0; set < sets_; ++set) stage->work(set);
        stage->microseconds.push_back(1e6 * std::chrono::duration<double>(Clock::now() - begin).count() /
                                      static_cast<double>(sets_));
      }
  for (auto& stage : stages_) {
    auto& times = stage->microseconds;
    if (times.empty()) continue;
    std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2), times.end());
    medians[stage->name] = times[times.size() / 2];
  }
  return medians;
}

std::string describe_device(at::Device device) {
  std::string name = device.str();
#ifdef SPOT_TORCH_CUDA
  if (device.is_cuda()) {
    cudaDeviceProp properties;
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, device.index()));
    name = properties.name;
  }
#endif
  return name + ", torch " TORCH_VERSION;
}

int64_t free_bytes(at::Device device) {
#ifdef SPOT_TORCH_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    c10::cuda::CUDACachingAllocator::emptyCache();
    size_t free = 0, total = 0;
    C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
    return static_cast<int64_t>(free);
  }
#endif
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 2;
}

Bandwidth measure_bandwidth(at::Device device) {
  const int64_t count = device.is_cuda() ? int64_t{1} << 29 : int64_t{1} << 24;  // float32
  const at::Tensor from = at::ones({count}, at::TensorOptions(device).dtype(at::kFloat)),
                   to = at::empty_like(from);
  StageTimer timer(device, 1, 7);
  timer.add("read", [&](int64_t) { from.sum(); });
  timer.add("copy", [&](int64_t) { to.copy_(from); });
  const auto us = timer.measure();
  const double bytes = 4.0 * static_cast<double>(count);
  return {bytes / us.at("read") * 1e6, 2 * bytes / us.at("copy") * 1e6};
}

}  // namespace spot

#include "benchmark/span_timer.h"

#include <chrono>
#include <vector>

#ifdef SPOT_TORCH_CUDA
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace spot {

struct SpanTimer::Mark {
  std::string name;
  std::chrono::steady_clock::time_point time;
#ifdef SPOT_TORCH_CUDA
  std::unique_ptr<at::cuda::CUDAEvent> event;
#endif
};
struct SpanTimer::Marks {
  at::Device device;
  std::vector<Mark> list;
};

SpanTimer::SpanTimer(at::Device device) : marks_(new Marks{device, {}}) {}
SpanTimer::~SpanTimer() = default;

void SpanTimer::mark(const std::string& name) {
  Mark mark{.name = name, .time = std::chrono::steady_clock::now()};
#ifdef SPOT_TORCH_CUDA
  if (marks_->device.is_cuda()) {
    const c10::cuda::CUDAGuard device(marks_->device);
    mark.event = std::make_unique<at::cuda::CUDAEvent>(cudaEventDefault);
    mark.event->record(c10::cuda::getCurrentCUDAStream());
  }
#endif
  marks_->list.push_back(std::move(mark));
}

std::map<std::string, double> SpanTimer::take() {
  mark("");
  std::map<std::string, double> seconds;
#ifdef SPOT_TORCH_CUDA
  if (marks_->device.is_cuda()) marks_->list.back().event->synchronize();
#endif
  for (size_t i = 0; i + 1 < marks_->list.size(); ++i) {
    const Mark &from = marks_->list[i], &to = marks_->list[i + 1];
    if (from.name.empty()) continue;
    double span = std::chrono::duration<double>(to.time - from.time).count();
#ifdef SPOT_TORCH_CUDA
    if (from.event) span = 1e-3 * static_cast<double>(from.event->elapsed_time(*to.event));
#endif
    seconds[from.name] += span;
  }
  marks_->list.clear();
  return seconds;
}

}  // namespace spot

#include "cli/process_group.h"

#include <ATen/core/grad_mode.h>

#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <thread>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include "core/error.h"
#include "core/notice.h"

namespace spot::cli {
namespace {

// Torch reports a lost or late peer in as many ways as it has transports.
template <typename Start>
void finish(const Start& start) {
  try {
    start()->wait();
  } catch (const std::exception& e) {
    fail(
        "another process of this run has ended or does not answer ({}); continue from the last checkpoint with --resume",
        first_line(e));
  }
}

}  // namespace

ProcessGroup::ProcessGroup(const std::string& name) : group_(c10d::resolve_process_group(name)) {}

void ProcessGroup::sum(std::vector<at::Tensor>& tensors) const {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> flat;
  for (const at::Tensor& tensor : tensors) flat.push_back(tensor.reshape({-1}));
  std::vector<at::Tensor> all = {at::cat(flat)};
  finish([&] { return group_->allreduce(all); });
  int64_t first = 0;
  for (at::Tensor& tensor : tensors) {
    tensor.copy_(all[0].narrow(0, first, tensor.numel()).view(tensor.sizes()));
    first += tensor.numel();
  }
}

void ProcessGroup::gather(at::Tensor& whole, const at::Tensor& part) const {
  at::Tensor own = part;
  finish([&] { return group_->getBackend(whole.device().type())->_allgather_base(whole, own); });
}

void ProcessGroup::report_failure(const std::string& line) const {
  struct State {
    std::atomic<bool> decided = false;
    std::promise<void> done;
  };
  auto state = std::make_shared<State>();
  const auto print = [state, line] {
    if (!state->decided.exchange(true)) notice("{}\n", line);
  };
  // A thread, because the store lives in one of the processes (or in torchrun), which may hang.
  std::thread([store = group_->getStore(), state, print, rank = rank(), count = count()] {
    try {
      int64_t failures = store->add("spot/failures", 1);
      if (failures == 1) print();
      state->decided = true;
      // The store may end with process 0; where all fail alike the others still have to ask.
      while (rank == 0 && failures < count) {
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        failures = store->add("spot/failures", 0);
      }
    } catch (const std::exception&) {
      print();  // better two messages than none
    }
    state->done.set_value();
  }).detach();
  state->done.get_future().wait_for(std::chrono::seconds(5));
  print();
}

}  // namespace spot::cli

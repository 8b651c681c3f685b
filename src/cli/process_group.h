// The processes of one distributed run: a group of torch's c10d, gloo on the CPU and NCCL on CUDA.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

namespace spot::cli {

// Every process of the group calls sum() and gather() equally often and in the same order. Both return when
// the result is there, and throw Error when another process has died or does not answer within the group's
// timeout.
class ProcessGroup {
 public:
  // The group of this name in torch's registry, where torch.distributed.init_process_group puts it.
  explicit ProcessGroup(const std::string& name);

  int64_t rank() const { return group_->getRank(); }
  int64_t count() const { return group_->getSize(); }

  // Adds each tensor over all processes, in place, by one collective; all lie on one device.
  void sum(std::vector<at::Tensor>& tensors) const;
  // whole = the processes' parts in the order of their ranks; both contiguous, whole.numel() == count *
  // part.numel().
  void gather(at::Tensor& whole, const at::Tensor& part) const;

  // Prints the line on standard error unless another process has printed its own: one failure ends them all,
  // and a user needs to read of it once. Takes up to five seconds.
  void report_failure(const std::string& line) const;

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
};

}  // namespace spot::cli

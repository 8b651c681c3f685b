#include "ops/cuda/call.h"

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels/device.h"

namespace spot::ops::cuda {

std::string launch_error(cudaError_t error) {
  int device = 0;
  if (error == cudaErrorNoKernelImageForDevice && cudaGetDevice(&device) == cudaSuccess)
    if (const std::string sentence = kernels::device_refusal(device); !sentence.empty()) return sentence;
  std::string words = cudaGetErrorString(error);
  if (error == cudaErrorInvalidValue)
    words += " (a shape, stride or alignment that the kernel does not take)";
  if (error == cudaErrorLaunchOutOfResources)
    words += " (the kernel for this shape needs more shared memory than this card gives a thread block)";
  return words;
}

// A larger one is added beside a smaller one, which captured graphs may still point to.
void* zeroed_workspace(const at::Tensor& like, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<c10::DeviceIndex, c10::StreamId>, std::vector<at::Tensor>> workspaces;
  const c10::Stream stream = current_stream(like);
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<at::Tensor>& grown = workspaces[{stream.device_index(), stream.id()}];
  if (grown.empty() || grown.back().nbytes() < bytes)
    grown.push_back(at::zeros({static_cast<int64_t>(bytes * 2)}, like.options().dtype(at::kByte)));
  return grown.back().mutable_data_ptr();
}

}  // namespace spot::ops::cuda

// From tensors to kernel launches: the current stream, scratch memory, dtypes, errors. Needs no CUDA build of
// torch to compile.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <cuda_runtime_api.h>

#include <string>

#include "kernels/types.h"

namespace spot::ops::cuda {

inline c10::Stream current_stream(const at::Tensor& tensor) {
  return c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device());
}

inline cudaStream_t native_stream(const at::Tensor& tensor) {
  return static_cast<cudaStream_t>(current_stream(tensor).native_handle());
}

// What a failed launch says.
std::string launch_error(cudaError_t error);

inline void check(cudaError_t error, const char* op) {
  TORCH_CHECK(error == cudaSuccess, op, ": ", launch_error(error));
}

inline kernels::DataType data_type(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return kernels::DataType::kF32;
    case at::kHalf:
      return kernels::DataType::kF16;
    default:
      return kernels::DataType::kBf16;
  }
}

// Scratch on `like`'s device, one a device and current stream, zeroed once. Kernels that use it keep their counters
// in its first kCounterBytes (kernels/types.h) and leave those zeroed; the rest holds anything.
void* zeroed_workspace(const at::Tensor& like, size_t bytes);

inline int32_t narrow(int64_t value) {
  return static_cast<int32_t>(value);
}

}  // namespace spot::ops::cuda

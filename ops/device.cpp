#include "ops/device.h"

#include <torch/library.h>

#if defined(SPOT_CUDA)
#include "kernels/device.h"
#endif

namespace spot::ops {

std::string device_refusal(const c10::Device& device) {
#if defined(SPOT_CUDA)
  if (device.is_cuda()) return kernels::device_refusal(device.has_index() ? device.index() : 0);
#endif
  return "";
}

TORCH_LIBRARY_FRAGMENT(spot, library) {
  library.def("device_refusal(Device device) -> str",
              [](const c10::Device& device) { return device_refusal(device); });
}

}  // namespace spot::ops

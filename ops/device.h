// Whether this build's kernels run on a device.
#pragma once

#include <c10/core/Device.h>

#include <string>

namespace spot::ops {

// One sentence where `device` is a CUDA card that this build's kernels do not run on, else nothing. A build without
// kernels says nothing. As spot::device_refusal also an operator.
std::string device_refusal(const c10::Device& device);

}  // namespace spot::ops

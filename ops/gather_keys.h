// gather_selector_keys made of torch's own operators, for devices without a kernel of ours. Equal bits to the
// CPU's.
#pragma once

#include <ATen/ATen.h>

#include <string>

namespace spot::ops {

at::Tensor gather_selector_keys_by_tensors(const at::Tensor& pool, const at::Tensor& page_table,
                                           int64_t length, const std::string& format, double global_scale);

}  // namespace spot::ops

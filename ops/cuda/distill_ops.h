// The CUDA implementations behind ops/distill_ops.h; same arguments, already checked there. Nothing waits for
// the device.
#pragma once

#include "ops/distill_ops.h"

namespace spot::ops::cuda {

AttentionMass attention_mass(const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp,
                             const QueryStrip& strip, double scale, int64_t groups);
SelectorKl selector_kl(at::Tensor mass, const at::Tensor& total, const at::Tensor& query,
                       const at::Tensor& key, const at::Tensor& weight, const QueryStrip& strip,
                       int64_t k_train, at::Tensor grad_key);

}  // namespace spot::ops::cuda

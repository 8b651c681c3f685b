// The launch of selector_key_append, which attention_prologue makes a part of its own.
#pragma once

#include "kernels/selector_key_append.h"
#include "ops/selector/selector.h"

namespace spot::ops::cuda {

// All tensors are contiguous but for the keys' tokens, and outlive the launch.
kernels::SelectorKeyAppendParams append_params(const SelectorKeyAppend& arguments);

}  // namespace spot::ops::cuda

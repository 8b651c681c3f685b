// A context without the cost of its prefill.
#pragma once

#include "attention/stack.h"

namespace spot {

// Extends an open sequence by `count` tokens whose keys and values are drawn at random (and so are their selector keys,
// from random hidden states), in every full-attention layer and for the stack's first method. What comes after cannot
// tell them from read ones by time.
void fill_with_noise(const Backbone& backbone, AttentionStack& stack, int64_t sequence, int64_t count);

}  // namespace spot

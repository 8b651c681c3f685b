// Where distillation begins: the selector as the best linear estimate of some of the backbone's own queries
// and keys, so that it finds the right tokens before its first step.
//
// Source: ours (the paper names no initialisation). A selector head and a backbone head compute the same kind
// of product, so a head's queries and keys, RoPE undone, are fitted from the hidden states by ridge
// regression on the first training sequences; that needs no knowledge of an architecture's biases, norms or
// gates.
//   - The rotated dims of a selector key take the dims of one KV head whose frequencies are the same, the
//     plain dims those of the next KV head that rotate least. With a key per head, each has two KV heads of
//     its own.
//   - Selector head h takes the queries of the h-th query head of those KV heads.
//   - The mixing weights are the regression of the constant 1, plus a tenth of their random start so that
//     heads can part, times the gain of a small grid with the least KL: the student's sharpness.
#pragma once

#include <vector>

#include "core/progress.h"
#include "distill/data.h"
#include "distill/layer_loss.h"
#include "model/backbone.h"
#include "selector/selector.h"

namespace spot {

// Tokens that initialize_from_backbone should see: enough to determine the regression.
int64_t initialization_tokens(const ModelConfig& backbone);

// What `progress` counts below: layers of each frozen forward pass.
int64_t initialization_steps(const Selector& selector, const std::vector<TokenSequence>& sequences);

// Overwrites query, key and mixing weights of every layer of `selector` (dims without a counterpart keep
// their random start); norms stay. `options` is the loss that the gain is chosen by. Two frozen forward
// passes over the first sequence and one over the others; holds hidden_size^2 float32 numbers a layer
// meanwhile. Deterministic for a given device and thread count. Throws Error when a hidden state, query or
// key is not finite.
void initialize_from_backbone(const Backbone& backbone, Selector& selector,
                              const std::vector<TokenSequence>& sequences, const LayerLossOptions& options,
                              Progress* progress = nullptr);

}  // namespace spot

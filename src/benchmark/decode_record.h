// A scene from a real model: what its layers read in one decode step.
#pragma once

#include <cstdint>
#include <vector>

#include "benchmark/decode_scene.h"
#include "model/backbone.h"
#include "selector/selector.h"

namespace spot {

// Throws Error unless `batch` stretches of `length` tokens can be taken from a text of `text_tokens` and fit
// the model.
void check_recording(const ModelConfig& model, int64_t text_tokens, int64_t length, int64_t batch);

// A set for each of selector.layers(). Sequence i is the text's i-th stretch of `length` tokens, of which all
// but the last are prefilled densely, `chunk` a call; the sets hold what a dense decode step of the last
// token reads. Pages lie as the KV cache hands them out. The selector's keys are INT4 whatever its own cache
// format is; tiers and temperatures are its own; the selector outlives the scene.
DecodeScene record_decode(const Backbone& backbone, const Selector& selector,
                          const std::vector<int32_t>& text, int64_t length, int64_t batch,
                          int64_t chunk = 2048);

}  // namespace spot

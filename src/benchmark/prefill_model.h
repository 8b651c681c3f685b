// The time to a prompt's first token through a whole model, and where it goes.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "attention/methods.h"
#include "benchmark/prefill_layer.h"
#include "model/backbone.h"

namespace spot {

struct PrefillModelRow {
  std::string name;     // "dense", or the method's
  bool sparse = false;  // the prompt is read by the method
  // To the first token, chosen greedily on the host; of it in attention (the selector's projections, the writing of its
  // keys, scores, selection, attention), and in everything else.
  double seconds = 0, attention = 0, rest = 0;
  double peak_gib = 0;  // that the device's allocator held, weights among it
};

// Operations of a token in the products of all layers, 2 a multiplication and addition; the logits' apart.
double products_flop(const ModelConfig& model);
// Seconds of these products alone, over all layers, for `tokens` tokens at once: the median of three runs a matrix.
double measure_products(const ModelConfig& model, int64_t tokens, at::ScalarType dtype, at::Device device);

// One prompt through the stack of one method, `rounds` times (the fastest counts, after a chunk that warms up), or the
// chunks of it that are run, behind random keys and values where chunks are left out. `tick` is called after each chunk
// of each round.
PrefillModelRow measure_prefill_model(const Backbone& backbone, const Selector* selector,
                                      const MethodSpec& method, const PrefillChunks& chunks, int64_t rounds,
                                      const std::function<void()>& tick = {});

}  // namespace spot

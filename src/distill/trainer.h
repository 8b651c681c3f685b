// Distils a selector from a frozen backbone: the training loop, its checkpoints and its metrics.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <vector>

#include "distill/data.h"
#include "distill/train_config.h"
#include "model/backbone.h"
#include "selector/selector.h"
#include "text/tokenizer.h"

namespace spot {

// Data parallelism: every replica runs distill() with the same config and an equal selector, takes the
// sequences i = rank, rank + count, ... of each step (and of the held-out ones), and sums gradients and
// measures with the others. Rank 0 writes all files; all replicas read the output folder and the corpus.
// Nothing in a checkpoint depends on the number of replicas, so that another number may continue it.
struct Replicas {
  int64_t rank = 0, count = 1;
  // Adds each tensor over all replicas, in place; called on all replicas in the same order. Tensors lie on
  // the backbone's device.
  std::function<void(std::vector<at::Tensor>&)> sum;
};

struct TrainHooks {
  // Called after each step with its metrics: the object that metrics.jsonl gets as a line.
  std::function<void(const nlohmann::json&)> on_step;
  // Asked after each step; true stops the run, on all replicas, like SIGINT does.
  std::function<bool()> should_stop;
  // SIGINT, SIGTERM and SIGHUP let the step finish, save, and end distill(); a second signal kills as usual.
  bool handle_signals = true;
  bool show_progress = true;
  Replicas replicas;
};

enum class TrainStatus { finished, interrupted };

struct TrainResult {
  TrainStatus status = TrainStatus::finished;
  int64_t steps = 0;            // taken in all, earlier runs included
  nlohmann::json last_metrics;  // of the last step
};

// Trains `selector` (float32 weights) in place for config.steps steps. One frozen forward pass a sequence
// drives all layers; each layer's gradient is taken while the pass stands there, so memory does not grow with
// layers or with the square of the length.
//
// config.output receives
//   selector.safetensors, selector.json   at the end
//   README.md                             its card, at the end
//   checkpoint-STEP/                      selector, optimizer and place in the data; appears whole or not at
//   all metrics.jsonl                         one object a step, see docs/distillation.md loss.html
//   plots of it
// With `resume` the newest checkpoint there is continued, bit for bit as if never interrupted (same device
// and numbers of threads and replicas). Throws Error when the output already holds a run and `resume` is
// false; when the checkpoint was made with another config, selector, backbone or corpus; and when a loss is
// not finite, naming layer and step. A metrics line or a checkpoint that cannot be written (a full disk) is
// said on standard error and tried again; only the last one must succeed. One process at a time may write
// into the output: the caller locks it (core/folder_lock.h).
TrainResult distill(const Backbone& backbone, Selector& selector, const Encode& encode, int32_t end_of_text,
                    const TrainConfig& config, bool resume = false, const TrainHooks& hooks = {});

// The same with a checkpoint's tokenizer; documents end with document_end().
TrainResult distill(const Backbone& backbone, Selector& selector, const Tokenizer& tokenizer,
                    const TrainConfig& config, bool resume = false, const TrainHooks& hooks = {});

// What distill() refuses, known without the backbone's weights: Error on impossible values, on lengths past its
// positions, and when the output already holds a run and `resume` is false.
void check_distillation(const TrainConfig& config, bool resume, const ModelConfig& backbone,
                        const SelectorConfig& selector, const Replicas& replicas, bool sharded);

// The token between packed documents: <|endoftext|>, <|end_of_text|> or </s> where the vocabulary has it,
// else the first of eos_ids(). Throws Error when there is none.
int32_t document_end(const Tokenizer& tokenizer);

}  // namespace spot

// Everything that determines a distillation run, besides backbone and selector.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "distill/data.h"
#include "distill/layer_loss.h"
#include "selector/config.h"

namespace spot {

// The defaults are the published recipe: 763 steps of 8 sequences of 16384 tokens.
struct TrainConfig {
  std::filesystem::path output;  // folder of the selector, metrics.jsonl, loss.html and checkpoints
  DataConfig data;               // its seed is the run's
  bool document_mask = false;  // true: documents of a sequence do not see each other and start at position 0

  int64_t steps = 763;
  int64_t sequences_per_step = 8;  // over all replicas
  // Queries of each sequence, freshly drawn, on which the loss is taken; 0: all. The gradient stays unbiased
  // and the loss part of a step gets that much cheaper.
  int64_t query_rows = 0;

  // AdamW; weight decay falls on matrices only. The rate rises linearly over warmup_steps (at most a fifth of
  // the steps), stays for constant_share of the steps, and falls as a cosine to final_lr.
  double peak_lr = 1e-3, final_lr = 5e-5;
  int64_t warmup_steps = 100;
  double constant_share = 0.3;
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.1;
  double clip_norm = 1.0;  // of the gradient of all layers together; 0: no clipping

  int64_t held_out_sequences = 4;  // 0: no held-out loss
  int64_t held_out_interval = 50;  // steps; the first and the last step always count
  int64_t checkpoint_interval = 100;
  std::vector<double> budgets = {0.05, 0.1, 0.25};  // captured mass is measured there, see LayerLossOptions
  bool calibrate = true;                            // fit temperatures at the end, see calibrate.h
  // Tokens of the held-out contexts they are fitted on, held_out_sequences of them; 0: sequence_length. A
  // temperature that fits at the training length lets p drift beyond it; fitted over longer contexts it is
  // between.
  int64_t calibration_length = 0;
  // Type of the finished selector's projections on disk, float32, bfloat16, int8 or int4; checkpoints are float32.
  std::string store = "float32";

  // Throws Error naming the first impossible value.
  void validate() const;
  nlohmann::json to_json() const;
  // Absent fields keep their defaults. Throws Error on unknown fields and wrong types; `source` names the
  // file.
  static TrainConfig from_json(const nlohmann::json& json, const std::string& source);
};

// Learning rate of step 0 .. steps - 1.
double learning_rate(const TrainConfig& config, int64_t step);

// The loss as the selector's config states it.
LayerLossOptions loss_options(const SelectorConfig& selector, const TrainConfig& config);

}  // namespace spot

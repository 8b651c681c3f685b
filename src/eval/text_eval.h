// How close sparse attention stays to dense attention on running text, teacher-forced.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "attention/kv_scales.h"
#include "attention/methods.h"
#include "report/page.h"

namespace spot {

struct TextEvalOptions {
  int64_t length = 8192;  // tokens a sequence
  int64_t sequences = 2;
  int64_t chunk = 512;            // tokens a forward call
  int64_t skip = 1024;            // positions below are not scored: contexts near the floor are dense anyway
  int64_t measured_queries = 16;  // queries a chunk on which the true attention is computed
  std::vector<double> calibration_p = {0.5, 0.6, 0.7, 0.8, 0.9, 0.95};
  KvCacheDtype kv_cache = KvCacheDtype::automatic;  // of all methods, the dense reference too
};

// Means over the measured queries of one layer.
struct LayerMeasures {
  int64_t queries = 0;
  double attended_share = 0;     // tokens attended / tokens visible
  double captured_mass = 0;      // true attention mass on the selected blocks
  double captured_residual = 0;  // the same among the blocks that the rule does not reserve
  double oracle_recall = 0;      // share of the selected number of truly heaviest blocks that were selected
  std::map<double, double> calibration;  // nominal p -> captured residual mass under dual top-p at p
};

struct MethodResult {
  std::string name;
  int64_t scored_tokens = 0;
  double nll = 0;               // mean negative log-likelihood, nats a token
  double kl = 0;                // mean KL(dense logits || this method's), nats
  double argmax_agreement = 0;  // share of positions whose likeliest token is dense attention's
  // Means over each tenth of the length; NaN where nothing was scored.
  std::vector<double> nll_by_position, kl_by_position, agreement_by_position;
  double seconds = 0;
  std::map<int64_t, LayerMeasures> layers;  // empty for dense

  double perplexity() const;
  double attended_share() const;  // mean over layers
  double captured_mass() const;   // likewise
};

struct TextEvalResult {
  TextEvalOptions options;
  MethodResult dense;
  std::vector<MethodResult> methods;

  nlohmann::json to_json() const;
  Table summary() const;
  void add_to(Page& page) const;
};

// What evaluate_text refuses, known without the model's weights: Error when a text of so many tokens is too short, when a
// length passes the model's positions, and on impossible options.
void check_text_eval(const TextEvalOptions& options, int64_t tokens, const ModelConfig& model);

// `tokens` is one long text; sequence i is tokens [i * length, (i + 1) * length). Throws Error when it is too
// short.
// `selector` may be null when no method needs it. Every query of the text selects for itself, but for methods that read
// a prompt of this length sparsely: then tiles of them do.
TextEvalResult evaluate_text(const Backbone& backbone, const Selector* selector,
                             const std::vector<int32_t>& tokens, const std::vector<MethodSpec>& methods,
                             const TextEvalOptions& options);

}  // namespace spot

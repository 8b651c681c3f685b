// Retrieval under sparse attention: multi-key needle prompts, answered by several methods after one dense
// prefill.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "attention/methods.h"
#include "eval/needle_task.h"
#include "report/page.h"
#include "text/tokenizer.h"

namespace spot {

struct NeedleMethodResult {
  std::string name;
  std::vector<bool> correct;          // by prompt
  std::vector<std::string> outputs;   // the generated text, by prompt
  double attended_share = 1;          // tokens attended / visible, mean over sparse layers and decode steps
  double attended_tokens = 0;         // by one query, likewise; 0 for dense
  double captured_mass = 1;           // true attention mass on the selected blocks, likewise
  double milliseconds_per_token = 0;  // one decode step, measured without the mass computation

  int64_t num_correct() const;
};

struct NeedleEvalResult {
  NeedleOptions options;
  double prefill_seconds = 0;  // dense, all prompts
  std::vector<double> depths;  // by prompt
  std::vector<NeedleMethodResult> methods;

  nlohmann::json to_json() const;
};

// Throws Error when prompt and answer pass the model's positions.
void check_needle_eval(const NeedleOptions& options, const ModelConfig& model);

// The same methods at several lengths.
struct NeedleSweep {
  std::vector<NeedleEvalResult> lengths;  // at least one

  double captured_mass(size_t method) const;  // mean over lengths
  nlohmann::json to_json() const;
  // Exact match with Wilson's 95% intervals, and what it cost.
  Table summary() const;
  // With heat maps of exact match: depth by length for each method, or depth by method at a single length.
  void add_to(Page& page) const;
};

// Each prompt's context is prefilled densely once. Then every method reads the question, each token selecting for
// itself, and writes the answer greedily, all through its own (sparse) attention, so that finding the needle falls to
// the method. A dense method is the reference.
NeedleEvalResult evaluate_needles(const Backbone& backbone, const Selector* selector,
                                  const Tokenizer& tokenizer, const std::vector<NeedlePrompt>& prompts,
                                  const NeedleOptions& options, const std::vector<MethodSpec>& methods);

}  // namespace spot

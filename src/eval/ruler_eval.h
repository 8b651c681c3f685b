// RULER under sparse attention: every method answers the same prompts, after one dense prefill of each unless
// it has sparse prefill.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "attention/kv_scales.h"
#include "attention/methods.h"
#include "eval/ruler_score.h"
#include "eval/ruler_tasks.h"
#include "report/page.h"
#include "text/tokenizer.h"

namespace spot {

// What an evaluation needs of a tokenizer.
struct TextCodec {
  // Token ids of a text; `first`: it begins the prompt, where a tokenizer may add a token of its own.
  std::function<std::vector<int32_t>(std::string_view text, bool first)> encode;
  std::function<std::string(std::span<const int32_t> ids)> decode;
  std::vector<int32_t> stop_ids;  // end an answer
};
// Special tokens are left out of decoded text; the stop ids are the tokenizer's. `add_special_tokens`: what
// the tokenizer itself adds to the beginning of a prompt (a chat template writes these out instead).
TextCodec codec_of(const Tokenizer& tokenizer, bool add_special_tokens = true);

struct RulerEvalOptions {
  std::vector<RulerTask> tasks = all_ruler_tasks();
  std::vector<int64_t> lengths = {4096};  // tokens, prompt and answer together
  int64_t samples = 20;                   // prompts for each task, length and depth
  int64_t first_sample = 0;               // number of the first of them: runs may share out a longer list
  // When given, a depth sweep: the one needle of every prompt lies at each of these shares of the haystack.
  std::vector<double> depths;
  RulerOptions prompts;
  bool stop_at_newline = false;  // an answer ends with its first line
  // An answer ends as soon as every reference is in it: the score cannot change any more.
  bool stop_when_answered = true;
  int64_t mass_every = 4;     // answer tokens from one measurement of captured mass to the next; 0: none
  int64_t prefill_chunk = 0;  // prompt tokens a step; 0: 32,768 on a GPU, 1,024 on a CPU
  int64_t batch = 4;          // prompts at once
  KvCacheDtype kv_cache = KvCacheDtype::automatic;
  // Every finished prompt is appended to out/ruler.jsonl, and prompts that this file holds already are not
  // run again. Empty: nothing is kept.
  std::filesystem::path out;
};

struct RulerOutcome {
  std::string output;
  double score = 0;           // in [0, 1]
  int64_t answer_tokens = 0;  // generated
  // Summed over sparse layers and the tokens of question and answer; 0 for dense attention.
  double attended = 0, visible = 0;  // tokens
  double captured = 0;               // true attention mass on the selected blocks, of some answer tokens
  int64_t measured = 0;              // terms of that sum
  int64_t rows = 0;                  // sparse layers times tokens
};

// One finished prompt.
struct RulerRecord {
  RulerTask task;
  int64_t length = 0, sample = 0;
  double asked_depth = std::numeric_limits<double>::quiet_NaN();  // of the sweep
  double depth = std::numeric_limits<double>::quiet_NaN();        // where the one needle really lies
  int64_t prompt_tokens = 0;
  std::vector<std::string> references;
  std::vector<RulerOutcome> outcomes;  // by method

  nlohmann::json to_json() const;
  // Throws Error on a missing field or a wrong type.
  static RulerRecord from_json(const nlohmann::json& json);
};

struct RulerResult {
  RulerEvalOptions options;
  nlohmann::json settings;           // everything that the outcomes depend on
  std::vector<std::string> methods;  // the first is what the others are compared with
  std::vector<RulerRecord> records;  // by task, length, depth and sample, as in options
  int64_t reused = 0;                // of them taken from out/ruler.jsonl

  // Mean over measured steps; not a number where none was.
  double captured_mass(size_t method) const;
  // Mean scores in percent with 95% confidence intervals: a row a task and length, and the average over
  // tasks.
  Table scores() const;
  // A row a method and length: average score, difference to the first method on the same prompts, tokens
  // attended, captured mass.
  Table measures() const;
  Table summary() const { return scores(); }
  nlohmann::json to_json() const;
  void add_to(Page& page) const;
};

// What evaluate_ruler refuses, known without the model's weights: Error when a length is too small for a task or passes
// the model's positions, and on impossible options.
void check_ruler(const ModelConfig& model, const TextCodec& codec, const std::string& essay,
                 const std::vector<MethodSpec>& methods, const RulerEvalOptions& options);

// Each prompt's context is prefilled densely once. Then every method reads question and answer prefix (each
// token selects for itself, as in decode) and writes the answer greedily, one token a step. A method whose
// spec has sparse prefill reads the context by itself instead, into a cache of its own. `essay` may be empty
// when no task needs one; `selector` may be null when no method needs it. Throws Error before any work when a
// length is too small for a task or passes the model's positions.
RulerResult evaluate_ruler(const Backbone& backbone, const Selector* selector, const TextCodec& codec,
                           const std::string& essay, const std::vector<MethodSpec>& methods,
                           const RulerEvalOptions& options);

}  // namespace spot

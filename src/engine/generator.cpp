#include "engine/generator.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <numeric>

#include "core/error.h"
#include "core/progress.h"

namespace spot {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Closes what it opened, whatever happens in between.
class OpenSequences {
 public:
  OpenSequences(PagedCache& cache, size_t count) : cache_(cache) {
    for (size_t i = 0; i < count; ++i) ids_.push_back(cache_.open_sequence());
  }
  ~OpenSequences() {
    for (int64_t id : ids_) cache_.close_sequence(id);
  }
  OpenSequences(const OpenSequences&) = delete;
  OpenSequences& operator=(const OpenSequences&) = delete;
  int64_t operator[](size_t i) const { return ids_[i]; }

 private:
  PagedCache& cache_;
  std::vector<int64_t> ids_;
};

}  // namespace

at::Tensor prefill(const Backbone& backbone, AttentionBackend& attention, PagedCache& cache, int64_t sequence,
                   const std::vector<int32_t>& tokens, int64_t chunk, const std::string& progress_label) {
  if (chunk < 1) fail("prefill chunk is {}; give at least 1 token", chunk);
  std::unique_ptr<Progress> progress;
  const auto total = static_cast<int64_t>(tokens.size());
  if (!progress_label.empty()) progress = std::make_unique<Progress>(progress_label, total);
  at::Tensor last;
  for (int64_t start = 0; start < total; start += chunk) {
    const int64_t end = std::min(total, start + chunk);
    const std::vector<int32_t> part(tokens.begin() + start, tokens.begin() + end);
    const at::Tensor hidden =
        backbone.forward(build_batch(cache, {{.sequence = sequence, .tokens = part, .decode = false}}),
                         attention, cache.states());
    last = hidden.slice(0, hidden.size(0) - 1);
    if (progress) progress->update(end);
  }
  return last;
}

GenerateResult generate(const Backbone& backbone, AttentionBackend& attention, PagedCache& cache,
                        const std::vector<std::vector<int32_t>>& prompts, const GenerateOptions& options,
                        const TokenCallback& on_token) {
  const c10::InferenceMode inference;
  const ModelConfig& config = backbone.config();
  for (const auto& prompt : prompts) {
    if (prompt.empty()) fail("a prompt holds no token; give some text");
    const auto needed = static_cast<int64_t>(prompt.size()) + options.max_new_tokens;
    if (needed > config.max_position_embeddings) {
      fail(
          "the prompt's {} tokens plus {} new ones pass the model's limit of {} positions; shorten the prompt or ask for "
          "fewer tokens",
          prompt.size(), options.max_new_tokens, config.max_position_embeddings);
    }
  }
  OpenSequences sequences(cache, prompts.size());
  GenerateResult result;
  result.sequences.resize(prompts.size());
  std::vector<RowSampler> samplers;
  std::vector<size_t> active;
  std::vector<int32_t> next(prompts.size());

  // Accepts a token of sequence i; returns whether the sequence goes on.
  auto accept = [&](size_t i, int32_t token) {
    GeneratedSequence& sequence = result.sequences[i];
    if (std::find(options.stop_ids.begin(), options.stop_ids.end(), token) != options.stop_ids.end()) {
      sequence.finish = FinishReason::stop;
      return false;
    }
    sequence.tokens.push_back(token);
    next[i] = token;
    if (on_token) on_token(static_cast<int64_t>(i), token);
    return static_cast<int64_t>(sequence.tokens.size()) < options.max_new_tokens;
  };

  auto start = std::chrono::steady_clock::now();
  for (size_t i = 0; i < prompts.size(); ++i) {
    SamplingOptions sampling = options.sampling;
    sampling.seed += i;
    samplers.emplace_back(sampling);
    result.prompt_tokens += static_cast<int64_t>(prompts[i].size());
    if (options.max_new_tokens < 1) continue;
    const at::Tensor hidden =
        prefill(backbone, attention, cache, sequences[i], prompts[i], options.prefill_chunk, "prefill");
    if (accept(i, samplers[i].sample(backbone.logits(hidden)[0]))) active.push_back(i);
  }
  result.prefill_seconds = seconds_since(start);

  start = std::chrono::steady_clock::now();
  while (!active.empty()) {
    std::vector<int64_t> ids;
    std::vector<std::vector<int32_t>> tokens;
    for (size_t i : active) ids.push_back(sequences[i]), tokens.push_back({next[i]});
    const at::Tensor logits =
        backbone.logits(backbone.forward(make_batch(cache, ids, tokens), attention, cache.states())).cpu();
    std::vector<size_t> still;
    for (size_t row = 0; row < active.size(); ++row) {
      result.decode_tokens++;
      if (accept(active[row], samplers[active[row]].sample(logits[static_cast<int64_t>(row)])))
        still.push_back(active[row]);
    }
    active = std::move(still);
  }
  result.decode_seconds = seconds_since(start);
  return result;
}

}  // namespace spot

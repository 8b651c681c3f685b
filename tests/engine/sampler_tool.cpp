// What the sampler would draw from, for comparison with another implementation:
//
//   sampler_tool INPUT.json OUTPUT.safetensors
//
// INPUT.json: {"vocab_size", "rows": [{"logits": [...], "prompt": [ids], "output": [ids], "options": {...}}]},
// options by the names of SamplingOptions, logit_bias as [[id, bias]]. OUTPUT: probabilities [rows,
// vocab_size] float32 of all rows in one batch.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "checkpoint/safetensors.h"
#include "core/error.h"
#include "core/files.h"
#include "engine/sampler.h"

namespace spot {
namespace {

SamplingOptions options_from(const nlohmann::json& json) {
  SamplingOptions options;
  options.temperature = json.value("temperature", options.temperature);
  options.top_k = json.value("top_k", options.top_k);
  options.top_p = json.value("top_p", options.top_p);
  options.min_p = json.value("min_p", options.min_p);
  options.repetition_penalty = json.value("repetition_penalty", options.repetition_penalty);
  options.presence_penalty = json.value("presence_penalty", options.presence_penalty);
  options.frequency_penalty = json.value("frequency_penalty", options.frequency_penalty);
  for (const auto& pair : json.value("logit_bias", nlohmann::json::array()))
    options.logit_bias.emplace_back(pair.at(0).get<int32_t>(), pair.at(1).get<double>());
  return options;
}

void run(const std::string& input, const std::string& output) {
  const auto json = nlohmann::json::parse(read_file(input));
  const auto vocab = json.at("vocab_size").get<int64_t>();
  Sampler sampler(vocab, at::kCPU);
  std::vector<int64_t> ids;
  std::vector<at::Tensor> logits;
  for (const auto& row : json.at("rows")) {
    const auto id = static_cast<int64_t>(ids.size());
    sampler.add(id, options_from(row.at("options")), row.at("prompt").get<std::vector<int32_t>>());
    // The output is drawn from logits that leave no choice.
    for (int32_t token : row.at("output").get<std::vector<int32_t>>()) {
      at::Tensor certain = at::zeros({1, vocab});
      certain[0][token] = 1e6;
      if (sampler.sample(certain, {id})[0].token != token) fail("token {} was not drawn", token);
    }
    ids.push_back(id);
    logits.push_back(at::tensor(row.at("logits").get<std::vector<float>>()));
  }
  write_safetensors(output,
                    {{"probabilities", sampler.probabilities(at::stack(logits), ids).to(at::kFloat)}});
}

}  // namespace
}  // namespace spot

int main(int argc, char** argv) {
  try {
    if (argc != 3) spot::fail("usage: sampler_tool INPUT.json OUTPUT.safetensors");
    spot::run(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}

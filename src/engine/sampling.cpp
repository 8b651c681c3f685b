#include "engine/sampling.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>

#include "core/error.h"
#include "core/files.h"

namespace spot {
namespace {

constexpr int64_t kMostLogprobs = 1024;

}  // namespace

void SamplingOptions::check(int64_t vocab_size) const {
  if (!(temperature >= 0) || !std::isfinite(temperature))
    fail("temperature is {}; give 0 (greedy) or more", temperature);
  if (top_k < 0) fail("sampling top-k is {}; give 0 (all tokens) or more", top_k);
  if (!(top_p > 0 && top_p <= 1)) fail("sampling top-p is {}; give a share in (0, 1]", top_p);
  if (!(min_p >= 0 && min_p <= 1)) fail("sampling min-p is {}; give a share in [0, 1]", min_p);
  if (!(repetition_penalty > 0) || !std::isfinite(repetition_penalty))
    fail("repetition penalty is {}; give a number above 0 (1: none)", repetition_penalty);
  if (!std::isfinite(presence_penalty)) fail("presence penalty is {}; give a number", presence_penalty);
  if (!std::isfinite(frequency_penalty)) fail("frequency penalty is {}; give a number", frequency_penalty);
  for (const auto& [token, bias] : logit_bias) {
    if (token < 0 || token >= vocab_size)
      fail("logit bias: token {} lies outside the model's vocabulary of {}", token, vocab_size);
    if (!std::isfinite(bias)) fail("logit bias of token {} is {}; give a number", token, bias);
  }
  if (logprobs < -1 || logprobs > std::min(kMostLogprobs, vocab_size))
    fail("log-probabilities of {} tokens were asked for; 0 to {} are possible", logprobs,
         std::min(kMostLogprobs, vocab_size));
}

SamplingOptions SamplingOptions::from_generation_config(const std::filesystem::path& folder) {
  const std::filesystem::path file = folder / "generation_config.json";
  SamplingOptions options;
  if (!has_file(file)) return options;
  const auto config = nlohmann::json::parse(read_file(file), nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) fail("{}: a JSON object was expected", file.string());
  const auto number = [&](const char* name, double otherwise) {
    const auto found = config.find(name);
    if (found == config.end() || found->is_null()) return otherwise;
    if (!found->is_number()) fail("{}: {} is {}; a number was expected", file.string(), name, found->dump());
    return found->get<double>();
  };
  const auto sample = config.find("do_sample");
  if (sample != config.end() && !sample->is_null() && !sample->is_boolean())
    fail("{}: do_sample is {}; true or false was expected", file.string(), sample->dump());
  options.repetition_penalty = number("repetition_penalty", 1.0);
  if (sample != config.end() && sample->is_boolean() && sample->get<bool>()) {
    options.temperature = number("temperature", 1.0);
    const double top_k = number("top_k", 0);
    if (top_k != std::floor(top_k) || std::abs(top_k) > 1e9)
      fail("{}: top_k is {}; a whole number was expected", file.string(), top_k);
    options.top_k = static_cast<int64_t>(top_k);
    options.top_p = number("top_p", 1.0);
    options.min_p = number("min_p", 0.0);
  }
  try {
    options.check(INT64_MAX);
  } catch (const Error& error) {
    fail("{}: {}", file.string(), error.what());
  }
  return options;
}

}  // namespace spot

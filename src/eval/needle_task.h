// Multi-key needle prompts: facts "The special magic number for KEY is: VALUE." hidden in running text, one
// asked.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attention/kv_scales.h"
#include "text/tokenizer.h"

namespace spot {

struct NeedlePrompt {
  std::vector<int32_t> context;   // text with the needles; ends before the question
  std::vector<int32_t> question;  // asks for one key; the model goes on with the value
  std::string answer;             // the value, digits only
  double depth = 0;               // where the asked needle lies, 0 (start) to 1 (end of the context)
};

struct NeedleOptions {
  int64_t length = 16384;    // tokens of context and question together, met exactly
  int64_t distractors = 64;  // needles with other keys
  int64_t samples = 10;      // their needles' depths are spread evenly
  uint64_t seed = 1;
  KvCacheDtype kv_cache = KvCacheDtype::automatic;
};

// `filler` is running text, drawn from at random offsets; it is repeated if it is shorter than a prompt.
// Throws Error
// when the length has no room for the needles, or when the filler is too short to draw from.
std::vector<NeedlePrompt> make_needle_prompts(const Tokenizer& tokenizer, const std::string& filler,
                                              const NeedleOptions& options);

// Whether a generated continuation states the answer: its first run of digits equals it.
bool answers(const std::string& continuation, const std::string& answer);

}  // namespace spot

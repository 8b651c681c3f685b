#include "eval/needle_task.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <random>
#include <set>

#include "core/error.h"

namespace spot {
namespace {

// Everyday words; a key is two of them, so 64 * 63 keys.
constexpr std::array<const char*, 64> kWords = {
    "amber",   "anchor", "apple",  "arrow",  "autumn", "badger",  "basket", "beacon", "blossom", "bridge",
    "bronze",  "candle", "canyon", "castle", "cedar",  "cherry",  "cloud",  "copper", "coral",   "crystal",
    "desert",  "dragon", "eagle",  "ember",  "falcon", "feather", "forest", "garden", "ginger",  "glacier",
    "hammer",  "harbor", "hazel",  "honey",  "island", "ivory",   "jacket", "jungle", "kettle",  "ladder",
    "lantern", "lemon",  "marble", "meadow", "mirror", "nectar",  "ocean",  "olive",  "orchid",  "pebble",
    "pepper",  "planet", "ribbon", "river",  "saddle", "silver",  "spider", "stone",  "sunset",  "thunder",
    "timber",  "velvet", "walnut", "winter"};

// Uniform below n. The modulo's bias is below 1e-15, and every platform draws the same.
int64_t below(std::mt19937_64& random, int64_t n) {
  return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
}

}  // namespace

std::vector<NeedlePrompt> make_needle_prompts(const Tokenizer& tokenizer, const std::string& filler,
                                              const NeedleOptions& options) {
  const auto text = tokenizer.encode(filler);
  if (text.size() < 64) fail("needle prompts: the filler text has {} tokens; give a longer one", text.size());
  if (options.distractors > 2000)
    fail("needle prompts: {} distractors; give at most 2000", options.distractors);
  std::mt19937_64 random(options.seed);
  std::vector<NeedlePrompt> prompts;
  for (int64_t sample = 0; sample < options.samples; ++sample) {
    std::set<std::string> used;
    auto new_key = [&] {
      for (;;) {
        const int64_t a = below(random, kWords.size()), b = below(random, kWords.size());
        std::string key = fmt::format("{}-{}", kWords[a], kWords[b]);
        if (a != b && used.insert(key).second) return key;
      }
    };
    auto new_value = [&] { return std::to_string(100000 + below(random, 900000)); };

    NeedlePrompt prompt;
    const int64_t levels = std::min<int64_t>(options.samples, 10);
    prompt.depth = (static_cast<double>(sample % levels) + 0.5) / static_cast<double>(levels);
    prompt.answer = new_value();
    const std::string key = new_key();
    prompt.question = tokenizer.encode(fmt::format(
        "\nWhat is the special magic number for {}? The special magic number for {} is:", key, key));

    std::vector<std::pair<double, std::vector<int32_t>>> needles;
    auto needle = [&](const std::string& k, const std::string& v) {
      return tokenizer.encode(fmt::format("\nThe special magic number for {} is: {}.\n", k, v));
    };
    needles.emplace_back(prompt.depth, needle(key, prompt.answer));
    for (int64_t i = 0; i < options.distractors; ++i) {
      const double depth = static_cast<double>(random() >> 11) * 0x1p-53;
      const std::string other = new_key();
      needles.emplace_back(depth, needle(other, new_value()));
    }
    std::stable_sort(needles.begin(), needles.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    auto room = options.length - static_cast<int64_t>(prompt.question.size());
    for (const auto& [depth, ids] : needles) room -= static_cast<int64_t>(ids.size());
    if (room < 0) {
      fail("needle prompts: {} needles do not fit {} tokens; ask for fewer distractors or a greater length",
           needles.size(), options.length);
    }
    const auto begin = below(random, static_cast<int64_t>(text.size()));
    int64_t taken = 0;
    auto take_until = [&](int64_t until) {
      for (; taken < until; ++taken)
        prompt.context.push_back(text[(begin + taken) % static_cast<int64_t>(text.size())]);
    };
    for (const auto& [depth, ids] : needles) {
      take_until(static_cast<int64_t>(depth * static_cast<double>(room)));
      prompt.context.insert(prompt.context.end(), ids.begin(), ids.end());
    }
    take_until(room);
    prompts.push_back(std::move(prompt));
  }
  return prompts;
}

bool answers(const std::string& continuation, const std::string& answer) {
  auto is_digit = [](char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; };
  const auto first = std::find_if(continuation.begin(), continuation.end(), is_digit);
  const auto last = std::find_if_not(first, continuation.end(), is_digit);
  return std::string(first, last) == answer;
}

}  // namespace spot

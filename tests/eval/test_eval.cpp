#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "core/error.h"
#include "core/files.h"
#include "eval/needle_eval.h"
#include "eval/text_eval.h"

namespace spot {
namespace {

const Tokenizer& tokenizer() {
  static const Tokenizer instance = Tokenizer::load("models/tiny-qwen3");
  return instance;
}

std::string filler() {
  return read_file("LICENSE");
}

size_t occurrences(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

// A random model over the tiny model's vocabulary.
Backbone random_backbone(uint64_t seed) {
  ModelConfig config;
  config.architecture = "LlamaForCausalLM", config.model_type = "llama";
  config.hidden_size = 32, config.num_layers = 2, config.num_heads = 4, config.num_kv_heads = 2,
  config.head_dim = 8;
  config.intermediate_size = 48, config.vocab_size = 4096, config.max_position_embeddings = 8192;
  config.rope.rotary_dim = 8;
  config.layer_kinds.assign(2, LayerKind::full_attention);
  return Backbone::random(config, at::kCPU, at::kFloat, seed);
}

MethodSpec method(const std::string& name, const std::string& word, int64_t budget) {
  MethodSpec spec{.name = name, .word = word};
  spec.rule.mode = SelectionMode::top_k;
  spec.rule.budget = budget;
  return spec;
}

TEST(NeedleTask, PromptsHaveTheirLengthAndTheirNeedle) {
  NeedleOptions options{.length = 2048, .distractors = 9, .samples = 12, .seed = std::random_device{}()};
  const auto prompts = make_needle_prompts(tokenizer(), filler(), options);
  ASSERT_EQ(prompts.size(), 12u);
  for (const NeedlePrompt& prompt : prompts) {
    EXPECT_EQ(prompt.context.size() + prompt.question.size(), 2048u);
    const std::string text = tokenizer().decode(prompt.context),
                      question = tokenizer().decode(prompt.question);
    EXPECT_EQ(occurrences(text, "The special magic number for"), 10u);
    const size_t start = question.find("for ") + 4;
    const std::string key = question.substr(start, question.find('?') - start);
    EXPECT_EQ(occurrences(text, "number for " + key + " is: " + prompt.answer + "."), 1u);
    const auto where = static_cast<double>(text.find(prompt.answer)) / static_cast<double>(text.size());
    EXPECT_NEAR(where, prompt.depth, 0.2);
  }
  EXPECT_EQ(make_needle_prompts(tokenizer(), filler(), options)[3].context, prompts[3].context);
}

TEST(NeedleTask, RefusesWhatDoesNotFit) {
  EXPECT_THROW(make_needle_prompts(tokenizer(), filler(), {.length = 200, .distractors = 30}), Error);
  EXPECT_THROW(make_needle_prompts(tokenizer(), "short", {}), Error);
}

TEST(NeedleTask, OnlyTheFirstNumberCounts) {
  EXPECT_TRUE(answers(" 123456.\n", "123456"));
  EXPECT_FALSE(answers(" 1234567", "123456"));
  EXPECT_FALSE(answers(" 99 123456", "123456"));
  EXPECT_FALSE(answers("no number", "123456"));
}

TEST(NeedleEval, AFullBudgetGivesDenseAnswersAndAllTheMass) {
  const Backbone backbone = random_backbone(3);
  const NeedleOptions options{.length = 900, .distractors = 3, .samples = 3};
  const auto prompts = make_needle_prompts(tokenizer(), filler(), options);
  const auto result =
      evaluate_needles(backbone, nullptr, tokenizer(), prompts, options,
                       {MethodSpec{}, method("oracle", "oracle", 4096), method("window", "streaming", 512)});
  EXPECT_EQ(result.methods[0].outputs, result.methods[1].outputs);
  EXPECT_NEAR(result.methods[1].captured_mass, 1.0, 1e-4);
  EXPECT_NEAR(result.methods[1].attended_share, 1.0, 1e-9);
  EXPECT_LT(result.methods[2].attended_share, 0.7);
  EXPECT_LT(result.methods[2].captured_mass, 0.99);
  EXPECT_GT(result.methods[2].captured_mass, 0.0);
  EXPECT_EQ(result.to_json().at("methods").size(), 3u);
  NeedleSweep sweep{{result}};
  EXPECT_NE(sweep.summary().to_text().find("window"), std::string::npos);
  auto maps = [](const NeedleSweep& s) {
    Page page("t");
    s.add_to(page);
    return occurrences(page.html(), "<svg viewBox") -
           2 * s.lengths.size();  // besides two bar charts a length
  };
  EXPECT_EQ(maps(sweep), 1u);
  sweep.lengths.push_back(result);
  sweep.lengths.back().options.length = 1800;
  EXPECT_EQ(maps(sweep), 4u);  // depth by length for each method, and a line chart
  EXPECT_EQ(sweep.summary().rows.size(), 6u);
}

TEST(TextEval, MeasuresAgreeWithWhatIsKnown) {
  const Backbone backbone = random_backbone(4);
  const auto tokens = tokenizer().encode(filler());
  TextEvalOptions options;
  options.length = 1000, options.sequences = 2, options.chunk = 130, options.skip = 600,
  options.measured_queries = 4;
  const SelectorConfig config = SelectorConfig::from_preset("spot");
  const Selector selector(config, backbone.config(), at::kCPU);
  MethodSpec spot = method("spot", "spot", 608);
  const auto result =
      evaluate_text(backbone, &selector, tokens,
                    {method("all", "oracle", 4096), method("oracle", "oracle", 608), spot}, options);
  EXPECT_EQ(result.dense.scored_tokens, 2 * 399);
  EXPECT_NEAR(result.methods[0].nll, result.dense.nll, 1e-4);
  EXPECT_NEAR(result.methods[0].kl, 0, 1e-5);
  EXPECT_EQ(result.methods[0].argmax_agreement, 1.0);
  EXPECT_NEAR(result.methods[0].layers.at(1).captured_mass, 1.0, 1e-4);
  // The oracle's recall of its own blocks is whole up to the reserved ones; no method captures more than it.
  for (int64_t layer : {0, 1}) {
    const LayerMeasures &oracle = result.methods[1].layers.at(layer),
                        &learned = result.methods[2].layers.at(layer);
    EXPECT_GE(oracle.captured_mass, learned.captured_mass - 1e-6);
    EXPECT_GE(oracle.oracle_recall, learned.oracle_recall);
    EXPECT_LT(learned.attended_share, 1.0);
    ASSERT_EQ(learned.calibration.size(), options.calibration_p.size());
    EXPECT_LE(learned.calibration.at(0.5), learned.calibration.at(0.95) + 1e-9);
  }
  EXPECT_TRUE(std::isnan(result.dense.nll_by_position.front()));
  EXPECT_FALSE(std::isnan(result.dense.nll_by_position.back()));
  // Nothing before position 600 is scored; the tenths hold 100 positions each, the last 99.
  const MethodResult& learned = result.methods[2];
  ASSERT_EQ(learned.kl_by_position.size(), 10u);
  double kl = 0, agreement = 0;
  for (int bucket = 6; bucket < 10; ++bucket) {
    const int tokens = bucket == 9 ? 99 : 100;
    kl += tokens * learned.kl_by_position[bucket],
        agreement += tokens * learned.agreement_by_position[bucket];
  }
  EXPECT_NEAR(kl / 399, learned.kl, 1e-9);
  EXPECT_NEAR(agreement / 399, learned.argmax_agreement, 1e-9);
  EXPECT_TRUE(std::isnan(learned.kl_by_position[5]));
  Page page("t");
  result.add_to(page);
  EXPECT_EQ(page.html().find("nan"), std::string::npos);
  EXPECT_EQ(result.to_json().at("methods").size(), 3u);
}

TEST(TextEval, RefusesShortTextsAndImpossibleOptions) {
  const Backbone backbone = random_backbone(5);
  TextEvalOptions options;
  options.length = 500, options.skip = 100;
  EXPECT_THROW(evaluate_text(backbone, nullptr, std::vector<int32_t>(600, 5), {}, options), Error);
  options.sequences = 1, options.skip = 499;
  EXPECT_THROW(evaluate_text(backbone, nullptr, std::vector<int32_t>(600, 5), {}, options), Error);
}

}  // namespace
}  // namespace spot

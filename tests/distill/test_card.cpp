// A selector's card tells what selector.json and the metrics hold, and nothing that they do not.
#include <gtest/gtest.h>

#include "distill/card.h"

namespace spot {
namespace {
using nlohmann::json;

json selector() {
  return json::parse(R"({
    "backbone": {"architecture": "Qwen3ForCausalLM", "fingerprint": "0123456789abcdef", "head_dim": 64, "hidden_size": 256, "num_heads": 8,
                 "num_kv_heads": 2, "num_layers": 5},
    "config": {"cache_format": "int4", "head_dim": 128, "key_heads": 1, "key_norm": "layernorm", "num_heads": 4, "per": "layer", "preset": "spot",
               "rope_dims": 32, "selection": {"dense_layers": [0, 4]},
               "distillation": {"k_train": 2048, "loss": "dense", "rest_bucket": false, "start": "backbone", "teacher": "token",
                                "teacher_scope": "residual"}},
    "layers": [1, 2, 3],
    "notes": {"steps": 1200, "tokens": 19660800,
              "training": {"budgets": [0.05, 0.125], "calibration_length": 0, "clip_norm": 1.0, "data_paths": ["a.txt", "b.jsonl"], "final_lr": 5e-05,
                           "held_out_sequences": 8, "length_mix": [], "peak_lr": 0.003, "seed": 42, "sequence_length": 4096,
                           "sequences_per_step": 4, "warmup_steps": 60, "weight_decay": 0.1}}})");
}

std::vector<json> metrics(int64_t steps, int64_t interval) {
  std::vector<json> entries;
  for (int64_t step = 1; step <= steps; ++step) {
    entries.push_back({{"step", step}, {"loss", 1.0 + 1.0 / static_cast<double>(step)}});
    if (step == 1 || step % interval == 0)
      entries.back().update({{"held_out_loss", 2.0 / static_cast<double>(step)},
                             {"held_out_covered_0.05", 0.25},
                             {"held_out_covered_oracle_0.05", 0.375},
                             {"held_out_covered_0.125", 0.5},
                             {"held_out_covered_oracle_0.125", 0.625}});
  }
  return entries;
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(Card, TellsWhatTheSelectorIsAndHowItWasTrained) {
  const std::string card = selector_card("mine", selector(), {});
  EXPECT_EQ(card.rfind("# Selector `mine`\n", 0), 0u);
  for (
      const char* part :
      {"Qwen3ForCausalLM with 5 layers, hidden size 256 and 8 query heads on 2 KV heads of 64 (fingerprint 0123456789abcdef;",
       "in each of 3 layers 4 heads of 128, one key shared by them, key norm layernorm, 32 dims rotated, key cache in int4; one block set a layer. "
       "Layers 0, 4 stay dense.\n",
       "--selector mine",
       "1,200 steps of 4 sequences of 4,096 tokens (19,660,800 tokens) of `a.txt`, `b.jsonl`; dense KL, token teacher over the residual",
       "rate 0.003 after 60 steps of warm-up, down to 5e-05"})
    EXPECT_TRUE(has(card, part)) << part << "\n" << card;
  EXPECT_FALSE(has(card, "held-out")) << card;
}

TEST(Card, TellsOfOtherChoices) {
  json other = selector();
  other["config"].update({{"key_heads", 4}, {"per", "kv_group"}});
  other["config"]["selection"]["dense_layers"] = json::array();
  other["config"]["distillation"].update(
      {{"loss", "sparse"}, {"rest_bucket", true}, {"teacher_scope", "all"}, {"start", "random"}});
  other["notes"]["training"]["length_mix"] = json::parse("[[1024, 0.5], [2048, 1]]");
  const std::string card = selector_card("mine", other, {});
  for (const char* part : {"4 keys, ", "a block set for each KV head.\n",
                           "sparse KL over the student's own top 2048 tokens with a rest bucket",
                           "over all attention, first weights from chance",
                           ", cut into contexts of 1,024 tokens (33%), 2,048 tokens (67%);"})
    EXPECT_TRUE(has(card, part)) << part << "\n" << card;
}

TEST(Card, ListsHeldOutLossesFromTheFirstToTheLast) {
  const std::string card = selector_card("mine", selector(), metrics(1200, 50));
  EXPECT_TRUE(has(card, "| 1 | 2.000 | 2.000 |\n")) << card;
  EXPECT_TRUE(has(card, "| 1,200 | 1.001 | 0.002 |\n")) << card;
  EXPECT_TRUE(has(card, "| 5% | 0.250 | 0.375 |\n| 12.5% | 0.500 | 0.625 |\n")) << card;
  const size_t begin = card.find("| step |"), end = card.find("Held-out attention");
  EXPECT_EQ(std::count(card.begin() + static_cast<long>(begin), card.begin() + static_cast<long>(end), '\n'),
            2 + 10 + 1)
      << card;
  EXPECT_TRUE(has(selector_card("mine", selector(), metrics(1, 50)), "| 1 | 2.000 | 2.000 |\n"));
}

TEST(Card, TellsWhatPMeans) {
  json fitted = selector();
  fitted["notes"]["calibration"] =
      json::parse(R"({"p": [0.5, 0.9], "captured_before": [[0.25, 0.75], [0.5, 0.875], [0.375, 0.8125]],
                                                   "captured_after": [[0.5, 0.875], [0.53125, 0.9375], [0.515625, 0.90625]]})");
  std::string card = selector_card("mine", fitted, {});
  EXPECT_TRUE(has(card, "on 8 held-out contexts of 4,096 tokens")) << card;
  EXPECT_TRUE(
      has(card, "| 0.5 | 0.375 | 0.516 (0.500 to 0.531) |\n| 0.9 | 0.812 | 0.906 (0.875 to 0.938) |\n"))
      << card;
  fitted["notes"]["training"]["calibration_length"] = 32768;
  card = selector_card("mine", fitted, {});
  EXPECT_TRUE(has(card, "contexts of 32,768 tokens")) << card;
}

TEST(Card, TellsWhatACapturedMassReads) {
  json fitted = selector();
  EXPECT_EQ(with_mass_section("text\n", fitted), "text\n");
  fitted["config"]["selection"]["mass_table"] =
      json::parse("[[0.0156, 0.5, 0.0625], [0.011, 0.6, 0.1], [0.0078, 0.75, 0.25]]");
  fitted["notes"]["mass_calibration"] = {
      {"contexts", 4}, {"length", 16384}, {"queries", 1024}, {"data_paths", {"a.txt"}}};
  const std::string card = selector_card("mine", fitted, {});
  EXPECT_TRUE(has(card, "in the last quarter of 4 held-out contexts of 16,384 tokens")) << card;
  const std::string rows = "| 0.016 | 0.500 | 6.2% |\n| 0.0078 | 0.750 | 25.0% |\n";
  EXPECT_TRUE(has(card, rows)) << card;
  // The section alone is made anew, wherever it stands; the rest of the card is someone's own.
  fitted["config"]["selection"]["mass_table"][2][1] = 0.875;
  const std::string anew = with_mass_section(card + "\n## Mine\n\nKept.\n", fitted);
  EXPECT_TRUE(has(anew, "| 0.0078 | 0.875 | 25.0% |\n\n## Mine\n\nKept.\n")) << anew;
  EXPECT_FALSE(has(anew, "0.750")) << anew;
  EXPECT_EQ(with_mass_section(anew, fitted), anew);
  EXPECT_TRUE(has(with_mass_section("# Old\n", fitted), "# Old\n\n## What a captured mass reads\n"));
}

}  // namespace
}  // namespace spot

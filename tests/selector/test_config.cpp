#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "selector/config.h"
#include "tests/selector/support.h"

using namespace spot;
using nlohmann::json;
using spot::test::error_of;

TEST(SelectorConfig, PresetsSayWhatTheyAre) {
  const SelectorConfig paper = SelectorConfig::from_preset("paper"),
                       ours = SelectorConfig::from_preset("spot");
  EXPECT_EQ(paper.key_heads, 4);
  EXPECT_EQ(paper.cache_format, KeyFormat::bf16);
  EXPECT_EQ(paper.distillation.loss, DistillLoss::sparse);
  EXPECT_EQ(paper.distillation.k_train, 8192);
  EXPECT_EQ(paper.distillation.teacher_scope, TeacherScope::all);
  EXPECT_EQ(ours.key_heads, 1);
  EXPECT_EQ(ours.distillation.teacher_scope, TeacherScope::residual);
  for (const SelectorConfig& config : {paper, ours}) {
    EXPECT_EQ(config.num_heads, 4);
    EXPECT_EQ(config.head_dim, 128);
    EXPECT_EQ(config.rope_dims, 64);
    EXPECT_EQ(config.selection.rule.sinks, 128);
    EXPECT_EQ(config.selection.rule.recency, 256);
    EXPECT_EQ(config.selection.rule.floor, 512);
  }
  EXPECT_NE(error_of([] { SelectorConfig::from_preset("fast"); }).find("\"fast\""), std::string::npos);
}

TEST(SelectorConfig, EveryFieldSurvivesJson) {
  SelectorConfig config = SelectorConfig::from_preset("paper");
  config.preset = "custom";
  config.key_heads = 4;
  config.rope_dims = 32;
  config.key_norm = KeyNorm::rmsnorm;
  config.norm_eps = 3e-5;
  config.scope = SelectorScope::kv_group;
  config.cache_format = KeyFormat::nvfp4;
  config.selection = {{.sinks = 96, .recency = 48, .floor = 352, .cap = 4096, .p = 0.75},
                      {0.5, 1.25, 2.0},
                      {0.25, 0.5, 1.0},
                      {{0.01, 0.5, 0.125}, {0.001, 0.75, 0.25}, {1e-4, 0.75, 0.5}},
                      {0, 7}};
  config.distillation = {Start::backbone,    DistillLoss::dense,     1234,
                         Teacher::block_max, TeacherScope::residual, true};
  const json document = json::parse(config.to_json().dump());
  EXPECT_EQ(SelectorConfig::from_json(document, "here"), config);
  // Not one field may be lost: changing any leaf must change the result or be refused.
  const json leaves = document.flatten();
  for (const auto& [name, value] : leaves.items()) {
    json changed = document;
    json& leaf = changed[json::json_pointer(name)];
    if (leaf.is_boolean())
      leaf = !leaf.get<bool>();
    else if (leaf.is_number_integer())
      leaf = leaf.get<int64_t>() + 16;
    else if (leaf.is_number())
      leaf = leaf.get<double>() * 0.5;
    else
      leaf = leaf.get<std::string>() + "?";
    try {
      EXPECT_NE(SelectorConfig::from_json(changed, "here"), config) << name;
    } catch (const Error& e) {
      EXPECT_EQ(std::string(e.what()).rfind("here", 0) == 0 ||
                    std::string(e.what()).find("preset") != std::string::npos,
                true)
          << e.what();
    }
  }
}

TEST(SelectorConfig, AbsentFieldsTakeThePreset) {
  EXPECT_EQ(SelectorConfig::from_json(json::object(), "x"), SelectorConfig::from_preset("spot"));
  EXPECT_EQ(SelectorConfig::from_json({{"preset", "paper"}}, "x"), SelectorConfig::from_preset("paper"));
}

TEST(SelectorConfig, RefusesTheUnknownAndTheImpossible) {
  auto message = [](json document) {
    return error_of([&] { SelectorConfig::from_json(document, "a/selector.json"); });
  };
  auto expect = [&](json document, const char* part) {
    const std::string text = message(document);
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  expect({{"key_head", 1}}, "unknown field \"key_head\"");
  expect({{"selection", {{"sink", 1}}}}, "selection has the unknown field \"sink\"");
  expect({{"distillation", {{"rest", true}}}}, "unknown field \"rest\"");
  expect({{"key_heads", 2}}, "key_heads is 2");
  expect({{"key_heads", "one"}}, "key_heads must be an integer");
  expect({{"key_heads", 1.5}}, "key_heads must be an integer");
  expect({{"num_heads", 8}}, "num_heads is 8");
  expect({{"head_dim", 64}}, "head_dim is 64");
  expect({{"rope_dims", 63}}, "rope_dims is 63");
  expect({{"rope_dims", 256}}, "rope_dims is 256");
  expect({{"key_norm", "batchnorm"}}, "one of none, layernorm, rmsnorm");
  expect({{"per", "head"}}, "one of layer, kv_group");
  expect({{"cache_format", "int2"}}, "one of f32, bf16, int8, int4, mxfp4, nvfp4");
  expect({{"block_size", 32}}, "block_size is 32");
  expect({{"norm_eps", 0}}, "norm_eps is 0");
  expect({{"selection", {{"p", 0}}}}, "selection.p is 0");
  expect({{"selection", {{"p", 1.01}}}}, "selection.p is 1.01");
  expect({{"selection", {{"floor", -1}}}}, "selection.floor is -1");
  expect({{"selection", {{"cap", 100}}}}, "selection.cap is 100");
  expect({{"selection", {{"temperature", {1, 0}}}}}, "selection.temperature is 0");
  expect({{"selection", {{"temperature", {1, "x"}}}}}, "array of numbers");
  expect({{"selection", {{"residual_mass", {0.5, 0}}}}}, "selection.residual_mass is 0");
  expect({{"selection", {{"residual_mass", {0.5, 1.5}}}}}, "selection.residual_mass is 1.5");
  const auto table = [](json rows) {
    return json{{"selection", {{"residual_mass", {0.5}}, {"mass_table", std::move(rows)}}}};
  };
  // Equal masses are no disorder.
  EXPECT_NO_THROW(SelectorConfig::from_json(table({{0.01, 0.5, 0.1}, {0.001, 0.5, 0.1}}), "here"));
  expect(table(3), "selection.mass_table must be rows of three numbers");
  expect(table({0.01, 0.5, 0.1}), "selection.mass_table must be rows of three numbers");
  expect(table({{0.01, 0.5}}), "selection.mass_table must be rows of three numbers");
  expect(table({{0.01, "x", 0.1}}), "selection.mass_table must be rows of three numbers");
  expect(table({{0.01, 0.5, 0.1}}), "selection.mass_table has one row");
  const char* order = "thresholds must fall from row to row";
  expect(table({{0.01, 0.5, 0.1}, {0.01, 0.6, 0.2}}), order);
  expect(table({{0.01, 0.5, 0.1}, {0.001, 0.4, 0.2}}), order);
  expect(table({{0.01, 0.5, 0.2}, {0.001, 0.6, 0.1}}), order);
  expect(table({{1.5, 0.5, 0.1}, {0.001, 0.6, 0.2}}), "has the row 1.5, 0.5, 0.1;");
  expect(table({{0.01, 0.5, 0.1}, {0.001, 1.25, 0.2}}), order);
  expect(table({{0.01, 0, 0.1}, {0.001, 0.6, 0.2}}), order);
  expect({{"selection", {{"mass_table", {{0.01, 0.5, 0.1}, {0.001, 0.6, 0.2}}}}}},
         "selection.mass_table stands without selection.residual_mass");
  expect({{"selection", {{"dense_layers", {1, 1}}}}}, "selection.dense_layers is 1");
  expect({{"selection", {{"dense_layers", {1.5}}}}}, "array of numbers");
  expect({{"distillation", {{"k_train", 0}}}}, "distillation.k_train is 0");
  expect({{"distillation", {{"rest_bucket", 1}}}}, "rest_bucket must be true or false");
  expect({{"preset", "huge"}}, "preset \"huge\"");
  expect(json::array(), "must be a JSON object");
  expect({{"selection", 3}}, "must be a JSON object");
}

// Against the mass that the table says of a threshold, read off its rows: the inverse, found by bisection.
TEST(SelectorConfig, AMassBecomesTheLargestThresholdThatCapturesIt) {
  spot::test::fresh_seed();
  const auto uniform = [](double low, double high) {
    return low + (high - low) * static_cast<double>(spot::test::random_int(0, 1 << 30)) / (1 << 30);
  };
  for (int round = 0; round < 50; ++round) {
    SelectionDefaults selection;
    MassRow row{uniform(0.01, 0.1), uniform(0.3, 0.6), 0.1};
    const int64_t rows = spot::test::random_int(2, 20);
    for (int64_t i = 0; i < rows; ++i) {
      selection.mass_table.push_back(row);
      row.threshold *= uniform(0.3, 0.9);
      if (spot::test::random_int(0, 2) > 0) row.mass += uniform(0.001, 0.02);  // the inverse has a slope
    }
    const std::vector<MassRow>& table = selection.mass_table;
    const auto captured = [&](double threshold) {
      for (size_t i = 1; i < table.size(); ++i)
        if (threshold >= table[i].threshold) {
          const double share = (std::log2(table[i - 1].threshold) - std::log2(threshold)) /
                               (std::log2(table[i - 1].threshold) - std::log2(table[i].threshold));
          return table[i - 1].mass + share * (table[i].mass - table[i - 1].mass);
        }
      return table.back().mass;
    };
    for (int i = 0; i < 20; ++i) {
      const double mass = i == 0   ? table.front().mass
                          : i == 1 ? table.back().mass
                                   : uniform(table.front().mass, table.back().mass);
      double low = std::log2(table.back().threshold), high = std::log2(table.front().threshold);
      for (int step = 0; step < 100; ++step) {
        const double middle = (low + high) / 2;
        (captured(std::exp2(middle)) >= mass - 1e-12 ? low : high) = middle;
      }
      EXPECT_NEAR(std::log2(selection.threshold_for(mass)), low, 1e-6) << mass;
    }
    for (const double mass : {table.front().mass - 1e-9, table.back().mass + 1e-9, -1.0, 2.0, std::nan("")})
      EXPECT_NE(error_of([&] { selection.threshold_for(mass); })
                    .find(fmt::format("is outside what was fitted for the selector, {:.4f} to {:.4f};",
                                      table.front().mass, table.back().mass)),
                std::string::npos);
  }
  EXPECT_NE(error_of([] { SelectionDefaults{}.threshold_for(0.9); }).find("`spot calibrate`"),
            std::string::npos);
}

#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <map>

#include "checkpoint/safetensors.h"
#include "core/files.h"
#include "selector/selector.h"
#include "tests/selector/support.h"

using namespace spot;
using namespace spot::test;
using nlohmann::json;

namespace {

// One token's projections in double precision, from the formulas.
struct Plain {
  std::vector<std::vector<double>> query, key, weight;  // [4][128], [key_heads][128], [groups][4]
};

std::vector<double> product(const at::Tensor& matrix, const at::Tensor& x) {
  const at::Tensor out = at::mv(matrix.to(at::kDouble), x.to(at::kDouble));
  return {out.const_data_ptr<double>(), out.const_data_ptr<double>() + out.numel()};
}

std::vector<double> numbers(const at::Tensor& x) {
  const at::Tensor wide = x.detach().to(at::kDouble).contiguous();
  return {wide.const_data_ptr<double>(), wide.const_data_ptr<double>() + wide.numel()};
}

void rotate_plain(std::vector<double>& head, int64_t position, double theta, int64_t dims) {
  for (int64_t i = 0; i < dims / 2; ++i) {
    const double angle = static_cast<double>(position) *
                         std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(dims));
    const double a = head[i], b = head[i + dims / 2];
    head[i] = a * std::cos(angle) - b * std::sin(angle);
    head[i + dims / 2] = b * std::cos(angle) + a * std::sin(angle);
  }
}

Plain plain_projection(const Selector& selector, const ModelConfig& model, int64_t layer, const at::Tensor& x,
                       int64_t position) {
  const SelectorConfig& config = selector.config();
  std::map<std::string, at::Tensor> weights;
  for (const auto& [name, tensor] : selector.named_parameters()) weights[name] = tensor.detach();
  const std::string prefix = "layers." + std::to_string(layer) + ".";
  Plain plain;
  const auto q = product(weights.at(prefix + "query.weight"), x),
             k = product(weights.at(prefix + "key.weight"), x);
  const auto w = product(weights.at(prefix + "mix.weight"), x);
  for (int h = 0; h < 4; ++h) {
    plain.query.emplace_back(q.begin() + h * 128, q.begin() + (h + 1) * 128);
    rotate_plain(plain.query.back(), position, model.rope.theta, config.rope_dims);
  }
  for (int64_t h = 0; h < config.key_heads; ++h) {
    std::vector<double> head(k.begin() + h * 128, k.begin() + (h + 1) * 128);
    if (config.key_norm != KeyNorm::none) {
      double mean = 0, square = 0;
      for (double v : head) mean += v / 128;
      if (config.key_norm == KeyNorm::rmsnorm) mean = 0;
      for (double v : head) square += (v - mean) * (v - mean) / 128;
      const auto gain = numbers(weights.at(prefix + "key_norm.weight"));
      for (int i = 0; i < 128; ++i) {
        head[i] = (head[i] - mean) / std::sqrt(square + config.norm_eps) * gain[i];
        if (config.key_norm == KeyNorm::layernorm)
          head[i] += numbers(weights.at(prefix + "key_norm.bias"))[i];
      }
    }
    rotate_plain(head, position, model.rope.theta, config.rope_dims);
    plain.key.push_back(head);
  }
  for (int64_t g = 0; g < selector.groups(); ++g) {
    plain.weight.emplace_back();
    for (int h = 0; h < 4; ++h) plain.weight.back().push_back(w[g * 4 + h] / std::sqrt(512.0));
  }
  return plain;
}

double plain_score(const Plain& query, const Plain& key, int64_t group) {
  double score = 0;
  for (int h = 0; h < 4; ++h) {
    const auto& k = key.key[key.key.size() == 1 ? 0 : h];
    double dot = 0;
    for (int i = 0; i < 128; ++i) dot += query.query[h][i] * k[i];
    score += query.weight[group][h] * std::max(dot, 0.0);
  }
  return score;
}

// Norm weights away from 1 and 0, so that they matter.
void shake(Selector& selector) {
  for (auto& [name, tensor] : selector.named_parameters())
    if (name.find("key_norm") != std::string::npos) at::Tensor(tensor).add_(at::randn_like(tensor), 0.3);
}

}  // namespace

class Projection : public testing::TestWithParam<std::tuple<int, KeyNorm, SelectorScope>> {};

TEST_P(Projection, MatchesTheFormulasInDoublePrecision) {
  const uint64_t seed = fresh_seed();
  const auto [key_heads, norm, scope] = GetParam();
  ModelConfig model = small_model(23, 3, 6, 3, 32);
  SelectorConfig config;
  config.key_heads = key_heads;
  config.key_norm = norm;
  config.scope = scope;
  config.rope_dims = random_int(0, 1) ? 64 : 30;
  Selector selector(config, model, at::kCPU, at::kFloat, seed);
  shake(selector);
  const at::Tensor hidden = at::randn({5, 23});
  const at::Tensor positions = at::randint(0, 4000, {5}, at::kLong);
  const int64_t layer = random_int(0, 2);
  const SelectorProjection got = selector.project(layer, hidden, positions);
  ASSERT_EQ(got.query.sizes(), (std::vector<int64_t>{5, 4, 128}));
  ASSERT_EQ(got.key.sizes(), (std::vector<int64_t>{5, key_heads, 128}));
  ASSERT_EQ(got.weight.sizes(), (std::vector<int64_t>{5, selector.groups(), 4}));
  EXPECT_EQ(selector.groups(), scope == SelectorScope::layer ? 1 : 3);
  const at::Tensor scores = token_scores(got.query, got.weight, got.key);
  ASSERT_EQ(scores.sizes(), (std::vector<int64_t>{selector.groups(), 5, 5}));
  std::vector<Plain> plain;
  for (int t = 0; t < 5; ++t)
    plain.push_back(plain_projection(selector, model, layer, hidden[t], positions[t].item<int64_t>()));
  for (int t = 0; t < 5; ++t) {
    // float32 angles of thousands of radians are good to about 1e-4.
    for (int h = 0; h < 4; ++h) {
      const auto head = numbers(got.query[t][h]);
      for (int i = 0; i < 128; ++i) EXPECT_NEAR(head[i], plain[t].query[h][i], 3e-3);
    }
    for (int h = 0; h < key_heads; ++h) {
      const auto head = numbers(got.key[t][h]);
      for (int i = 0; i < 128; ++i) EXPECT_NEAR(head[i], plain[t].key[h][i], 3e-3);
    }
    for (int g = 0; g < selector.groups(); ++g) {
      for (int h = 0; h < 4; ++h)
        EXPECT_NEAR(got.weight[t][g][h].item<double>(), plain[t].weight[g][h], 1e-5);
      for (int u = 0; u < 5; ++u)
        EXPECT_NEAR(scores[g][t][u].item<double>(), plain_score(plain[t], plain[u], g), 1e-2) << g << t << u;
    }
  }
  EXPECT_LT(largest_difference(selector.project_query(layer, hidden, positions), got.query), 1e-6);
  EXPECT_LT(largest_difference(selector.project_key(layer, hidden, positions), got.key), 1e-6);
  EXPECT_LT(largest_difference(selector.project_weight(layer, hidden), got.weight), 1e-6);
}

INSTANTIATE_TEST_SUITE_P(Shapes, Projection,
                         testing::Combine(testing::Values(1, 4),
                                          testing::Values(KeyNorm::none, KeyNorm::layernorm,
                                                          KeyNorm::rmsnorm),
                                          testing::Values(SelectorScope::layer, SelectorScope::kv_group)));

// The derivative of a random functional of the scores along a random direction, by central differences in
// float64.
TEST(Selector, GradientsMatchFiniteDifferences) {
  const uint64_t seed = fresh_seed();
  for (int64_t key_heads : {1, 4})
    for (KeyNorm norm : {KeyNorm::none, KeyNorm::layernorm, KeyNorm::rmsnorm}) {
      SelectorConfig config;
      config.key_heads = key_heads;
      config.key_norm = norm;
      config.rope_dims = 0;  // rotation runs in float32, too coarse for differences; it is tested below
      config.scope = SelectorScope::kv_group;
      Selector selector(config, small_model(9, 1, 4, 2, 16), at::kCPU, at::kDouble, seed);
      shake(selector);
      at::Tensor hidden = at::randn({7, 9}, at::kDouble);
      const at::Tensor positions = at::arange(7, at::kLong), mixture = at::randn({2, 7, 7}, at::kDouble);
      auto value = [&] {
        const SelectorProjection p = selector.project(0, hidden, positions);
        // A smooth function on top, so that second-order errors of the loss do not hide wrong terms.
        return (at::log_softmax(token_scores(p.query, p.weight, p.key), -1) * mixture).sum();
      };
      std::vector<at::Tensor> leaves = selector.parameters();
      leaves.push_back(hidden);
      for (at::Tensor& leaf : leaves) leaf.requires_grad_(true);
      value().backward();
      for (size_t i = 0; i < leaves.size(); ++i) {
        at::NoGradGuard no_grad;
        at::Tensor& leaf = leaves[i];
        ASSERT_TRUE(leaf.grad().defined()) << i;
        const at::Tensor direction = at::randn_like(leaf);
        const double step = 1e-6, expected = (leaf.grad() * direction).sum().item<double>();
        leaf.add_(direction, step);
        const double up = value().item<double>();
        leaf.add_(direction, -2 * step);
        const double down = value().item<double>();
        leaf.add_(direction, step);
        const double got = (up - down) / (2 * step);
        EXPECT_NEAR(got, expected, 1e-5 * std::max(1.0, std::abs(expected)))
            << "leaf " << i << " of " << key_heads;
      }
    }
}

TEST(Selector, GradientPassesThroughRotation) {
  const uint64_t seed = fresh_seed();
  Selector selector(SelectorConfig{}, small_model(9, 1, 4, 2, 16), at::kCPU, at::kFloat, seed);
  const at::Tensor hidden = at::randn({6, 9}), positions = at::randint(0, 500, {6}, at::kLong);
  const at::Tensor mixture = at::randn({6, 4, 128});
  at::Tensor weight = selector.parameters(0)[0].requires_grad_(true);
  (selector.project_query(0, hidden, positions) * mixture).sum().backward();
  // The query is linear in its weight, so a unit step gives the derivative exactly.
  at::NoGradGuard no_grad;
  const at::Tensor before = selector.project_query(0, hidden, positions).clone(),
                   direction = at::randn_like(weight);
  weight.add_(direction);
  const double got = ((selector.project_query(0, hidden, positions) - before) * mixture).sum().item<double>();
  const double expected = (weight.grad() * direction).sum().item<double>();
  EXPECT_NEAR(got, expected, 1e-3 * std::max(10.0, std::abs(expected)));
}

TEST(Selector, ScoresDependOnRelativePositionOnly) {
  const uint64_t seed = fresh_seed();
  Selector selector(SelectorConfig::from_preset("paper"), small_model(16, 1, 4, 2, 16), at::kCPU, at::kFloat,
                    seed);
  const at::Tensor hidden = at::randn({9, 16});
  const at::Tensor near = at::randint(0, 50, {9}, at::kLong);
  const auto a = selector.project(0, hidden, near), b = selector.project(0, hidden, near + 123);
  EXPECT_GT(largest_difference(a.query, b.query), 0.1);
  EXPECT_LT(
      largest_difference(token_scores(a.query, a.weight, a.key), token_scores(b.query, b.weight, b.key)),
      2e-3);
}

TEST(Selector, YarnReachesPositionsPastTheOriginalLength) {
  const uint64_t seed = fresh_seed();
  ModelConfig model = small_model(16, 1, 4, 2, 16);
  model.set_yarn(4, 512);
  Selector selector(SelectorConfig{}, model, at::kCPU, at::kFloat, seed);
  const at::Tensor hidden = at::randn({1, 16});
  const at::Tensor rotated = selector.project_query(0, hidden, at::full({1}, 2047, at::kLong));
  // cos and sin carry YaRN's attention factor: the rotated part grows by it, the rest does not.
  SelectorConfig still;
  still.rope_dims = 0;
  const at::Tensor plain =
      Selector(still, model, at::kCPU, at::kFloat, seed).project_query(0, hidden, at::zeros({1}, at::kLong));
  const double growth = (rotated.slice(2, 0, 64).norm() / plain.slice(2, 0, 64).norm()).item<double>();
  EXPECT_NEAR(growth, 0.1 * std::log(4.0) + 1, 1e-4);
  EXPECT_LT(largest_difference(rotated.slice(2, 64), plain.slice(2, 64)), 1e-6);
}

TEST(Selector, InitialWeightsArePureFunctionsOfTheSeed) {
  const uint64_t seed = fresh_seed();
  const ModelConfig model = small_model(40, 3, 4, 2, 16);
  const Selector a(SelectorConfig{}, model, at::kCPU, at::kFloat, seed),
      b(SelectorConfig{}, model, at::kCPU, at::kFloat, seed);
  const Selector other(SelectorConfig{}, model, at::kCPU, at::kFloat, seed + 1);
  // Leaving a layer out must not move the others' weights.
  SelectorConfig without;
  without.selection.dense_layers = {1};
  const Selector fewer(without, model, at::kCPU, at::kFloat, seed);
  EXPECT_EQ(fewer.layers(), (std::vector<int64_t>{0, 2}));
  for (int64_t layer : {0, 2}) EXPECT_TRUE(at::equal(a.parameters(layer)[0], fewer.parameters(layer)[0]));
  for (size_t i = 0; i < a.parameters().size(); ++i)
    EXPECT_TRUE(at::equal(a.parameters()[i], b.parameters()[i]));
  EXPECT_FALSE(at::equal(a.parameters(0)[0], other.parameters(0)[0]));
  EXPECT_FALSE(at::equal(a.parameters(0)[0], a.parameters(1)[0]));
  const at::Tensor q = a.parameters(0)[0];
  EXPECT_NEAR(q.var().item<double>(), 1.0 / 40, 0.1 / 40);
  EXPECT_NEAR(q.mean().item<double>(), 0.0, 0.01);
  // Known numbers of seed 42, computed apart: a change of the generator must not go unnoticed.
  const Selector known(SelectorConfig{}, model, at::kCPU);
  EXPECT_EQ(known.parameters(0)[0].flatten()[0].item<float>(), 0.11218191683292389f);
  EXPECT_EQ(known.parameters(0)[0].flatten()[2].item<float>(), 0.13147889077663422f);
  EXPECT_EQ(known.parameters(2)[1].flatten()[5].item<float>(), 0.0956878662109375f);
  EXPECT_EQ(a.num_parameters(), 3 * (40 * (512 + 128 + 4) + 256));
}

TEST(Selector, SaveAndLoad) {
  const uint64_t seed = fresh_seed();
  const TemporaryFolder folder;
  const ModelConfig model = small_model(24, 4, 4, 2, 16);
  SelectorConfig config = SelectorConfig::from_preset("paper");
  config.selection.dense_layers = {0};
  Selector selector(config, model, at::kCPU, at::kFloat, seed);
  shake(selector);
  selector.selection().temperature = {0.5, 1.5, 2.5};
  selector.selection().residual_mass = {0.25, 0.5};  // of three layers
  selector.save(folder.path() / "selectors" / "short", "abc", {});
  EXPECT_NE(error_of([&] {
              Selector::load("short", folder.path(), model, at::kCPU);
            }).find("residual_mass has 2 values, but the selector has 3 layers"),
            std::string::npos);
  selector.selection().residual_mass = {0.25, 0.5, 1.0};
  selector.save(folder.path() / "selectors" / "mine", "abc", {{"steps", 17}});

  const Selector loaded = Selector::load("mine", folder.path(), model, at::kCPU);
  EXPECT_EQ(loaded.config(), selector.config());
  EXPECT_EQ(loaded.layers(), (std::vector<int64_t>{1, 2, 3}));
  EXPECT_EQ(loaded.fitted(2, {}).temperature, 1.5);
  EXPECT_EQ(loaded.notes().at("steps"), 17);
  const auto saved = selector.named_parameters(), read = loaded.named_parameters();
  ASSERT_EQ(saved.size(), read.size());
  for (size_t i = 0; i < saved.size(); ++i) {
    EXPECT_EQ(saved[i].first, read[i].first);
    EXPECT_TRUE(at::equal(saved[i].second, read[i].second));
  }
  // By path, with unknown fingerprints, and in another dtype.
  const std::string path = (folder.path() / "selectors" / "mine").string();
  EXPECT_EQ(Selector::load(path, "elsewhere", model, at::kCPU, at::kBFloat16).parameters()[0].scalar_type(),
            at::kBFloat16);
  // Projections in half the bytes, the rest as it was; what a bfloat16 model reads is the same.
  const std::string half = (folder.path() / "half").string();
  selector.save(half, "abc", {}, WeightFormat::bfloat16);
  EXPECT_LT(std::filesystem::file_size(half + "/selector.safetensors"),
            0.6 * std::filesystem::file_size(path + "/selector.safetensors"));
  const auto rounded = Selector::load(half, "", model, at::kCPU).named_parameters();
  for (size_t i = 0; i < saved.size(); ++i) {
    const bool large = saved[i].first.ends_with("query.weight") || saved[i].first.ends_with("key.weight");
    EXPECT_TRUE(at::equal(rounded[i].second,
                          large ? saved[i].second.to(at::kBFloat16).to(at::kFloat) : saved[i].second))
        << saved[i].first;
  }
  const auto run = Selector::load(path, "", model, at::kCPU, at::kBFloat16).named_parameters();
  const auto run_half = Selector::load(half, "", model, at::kCPU, at::kBFloat16).named_parameters();
  for (size_t i = 0; i < run.size(); ++i)
    EXPECT_TRUE(at::equal(run[i].second, run_half[i].second)) << run[i].first;
  // Saving again over it replaces it whole.
  Selector(config, model, at::kCPU, at::kFloat, seed + 1).save(path, "abc");
  EXPECT_FALSE(at::equal(Selector::load(path, "", model, at::kCPU).parameters()[0], saved[0].second));
}

// What int8 rows hold, by float64 from the weights themselves.
TEST(Selector, Int8RowsAreWithinHalfAStep) {
  const uint64_t seed = fresh_seed();
  const TemporaryFolder folder;
  const ModelConfig model = small_model(8 * random_int(1, 9) + 1, 2, 4, 2, 16);
  SelectorConfig config = SelectorConfig::from_preset(seed % 2 ? "paper" : "spot");
  Selector selector(config, model, at::kCPU, at::kFloat, seed);
  shake(selector);
  const std::string path = (folder.path() / "rows").string();
  selector.parameters(1)[0][5].zero_();
  selector.save(path, "abc", {{"steps", 17}}, WeightFormat::int8);
  const json document = read_json(folder.path() / "rows" / "selector.json");
  EXPECT_EQ(document.at("version"), 2);
  EXPECT_EQ(document.at("weight_format"), "int8");
  const SafetensorsFile file(folder.path() / "rows" / "selector.safetensors");
  const Selector loaded = Selector::load(path, "", model, at::kCPU);
  EXPECT_EQ(loaded.fingerprint(), "abc");
  const auto saved = selector.named_parameters(), read = loaded.named_parameters();
  ASSERT_EQ(saved.size(), read.size());
  for (size_t i = 0; i < saved.size(); ++i) {
    const std::string& name = saved[i].first;
    const bool large = name.ends_with("query.weight") || name.ends_with("key.weight");
    EXPECT_EQ(file.tensor(name).scalar_type(), large ? at::kChar : at::kFloat) << name;
    if (!large) {
      EXPECT_TRUE(at::equal(saved[i].second, read[i].second)) << name;
      continue;
    }
    const at::Tensor before = saved[i].second.to(at::kDouble), after = read[i].second.to(at::kDouble);
    const at::Tensor step = before.abs().amax(1, true) / 127;
    EXPECT_TRUE(((after - before).abs() <= 0.5001 * step).all().item<bool>()) << name;
    EXPECT_EQ(file.tensor(name).abs().max().item<int>(), 127) << name;
  }
  // Stored anew in float32 they are the same, and so are the rows of that.
  const std::string wide = (folder.path() / "wide").string(), again = (folder.path() / "again").string();
  loaded.save(wide, "abc");
  const Selector widened = Selector::load(wide, "", model, at::kCPU);
  widened.save(again, "abc", {}, WeightFormat::int8);
  const SafetensorsFile twice(again + "/selector.safetensors");
  for (size_t i = 0; i < saved.size(); ++i) {
    EXPECT_TRUE(at::equal(widened.parameters()[i], read[i].second)) << saved[i].first;
    EXPECT_TRUE(at::equal(twice.tensor(saved[i].first), file.tensor(saved[i].first))) << saved[i].first;
  }
}

float bfloat16(float x) {
  return static_cast<float>(c10::BFloat16(x));
}

// What int4 rows hold, number by number in float64: of eight scales the best, two codes a byte.
TEST(Selector, Int4RowsHaveTheBestOfEightScales) {
  const uint64_t seed = fresh_seed();
  const TemporaryFolder folder;
  const ModelConfig model = small_model(32 * random_int(1, 5), 2, 4, 2, 16);
  const Selector selector(SelectorConfig::from_preset(seed % 2 ? "paper" : "spot"), model, at::kCPU);
  for (at::Tensor& weight : selector.parameters()) weight.normal_();
  selector.parameters(1)[0][5].zero_();
  const std::string path = (folder.path() / "rows").string(), wide = (folder.path() / "wide").string();
  selector.save(path, "abc", {}, WeightFormat::int4);
  const json document = read_json(folder.path() / "rows" / "selector.json");
  EXPECT_EQ(document.at("version"), 3);
  EXPECT_EQ(document.at("weight_format"), "int4");
  const SafetensorsFile file(folder.path() / "rows" / "selector.safetensors");
  const Selector loaded = Selector::load(path, "", model, at::kCPU);
  loaded.save(wide, "abc");
  const Selector widened = Selector::load(wide, "", model, at::kCPU);
  const auto saved = selector.named_parameters(), read = loaded.named_parameters();
  // Stored again they stay, those with a code of -8 too.
  widened.save(wide, "abc", {}, WeightFormat::int4);
  const Selector again = Selector::load(wide, "", model, at::kCPU);
  int clipped = 0;
  for (size_t i = 0; i < saved.size(); ++i) {
    const auto& [name, before] = saved[i];
    EXPECT_TRUE(at::equal(widened.parameters()[i], read[i].second)) << name;
    EXPECT_TRUE(at::equal(again.parameters()[i], read[i].second)) << name;
    if (!name.ends_with("query.weight") && !name.ends_with("key.weight")) {
      EXPECT_TRUE(at::equal(before, read[i].second)) << name;
      continue;
    }
    const at::Tensor change = (read[i].second - before).norm(2, 1), length = before.norm(2, 1);
    EXPECT_TRUE((change <= 0.2 * length).all().item<bool>()) << name;
    const at::Tensor codes = file.tensor(name),
                     scales = file.tensor(name.substr(0, name.size() - 6) + "scale").to(at::kFloat);
    ASSERT_EQ(codes.sizes(), at::IntArrayRef({before.size(0), before.size(1) / 2})) << name;
    ASSERT_EQ(scales.sizes(), at::IntArrayRef({before.size(0), before.size(1) / 32})) << name;
    const float* x = before.const_data_ptr<float>();
    const float* y = read[i].second.const_data_ptr<float>();
    const uint8_t* bytes = codes.const_data_ptr<uint8_t>();
    for (int64_t group = 0; group < scales.numel(); ++group, x += 32, y += 32, bytes += 16) {
      float largest = 0;
      for (int n = 0; n < 32; ++n) largest = std::max(largest, std::abs(x[n]));
      const auto code = [&](int n, float scale) {
        return scale > 0 ? std::clamp(std::nearbyint(x[n] / scale), -8.0f, 7.0f) : 0.0f;
      };
      double least = std::numeric_limits<double>::infinity();
      float best = 0;
      for (const float share : {1.0f, 0.95f, 0.9f, 0.875f, 0.85f, 0.8f, 0.75f, 0.7f}) {
        const float scale = bfloat16(largest * share / 7);
        double error = 0;
        for (int n = 0; n < 32; ++n) error += std::pow(double{code(n, scale)} * scale - x[n], 2);
        if (error < least) least = error, best = scale;
      }
      ASSERT_EQ(scales.const_data_ptr<float>()[group], best) << name << " group " << group;
      for (int n = 0; n < 32; ++n) {
        const int stored = (n % 2 ? bytes[n / 2] >> 4 : bytes[n / 2] & 15) - 8;
        ASSERT_EQ(stored, code(n, best)) << name << " group " << group << " number " << n;
        ASSERT_EQ(y[n], static_cast<float>(stored) * best);
        if (x[n] >= -8.5f * best && x[n] <= 7.5f * best)
          ASSERT_LE(std::abs(y[n] - x[n]), 0.5001 * best);
        else
          ++clipped;
      }
    }
  }
  EXPECT_GT(clipped, 0);
}

TEST(Selector, Int4RowsThatDoNotFitAreRefused) {
  const uint64_t seed = fresh_seed();
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "s";
  EXPECT_NE(error_of([&] {
              Selector(SelectorConfig{}, small_model(48, 2, 4, 2, 16), at::kCPU)
                  .save(path, "abc", {}, WeightFormat::int4);
            }).find("s: hidden_size is 48; int4 stores a selector's rows in groups of 32 numbers"),
            std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(path));
  const ModelConfig model = small_model(64, 2, 4, 2, 16);
  const auto expect = [&](const char* name, const std::function<at::Tensor(const at::Tensor&)>& change,
                          const char* part) {
    Selector(SelectorConfig{}, model, at::kCPU, at::kFloat, seed).save(path, "abc", {}, WeightFormat::int4);
    json document = read_json(path / "selector.json");
    document.erase("checksum"), document.erase("tensors_checksum");  // which would find every change first
    write_file_atomically(path / "selector.json", document.dump());
    const SafetensorsFile file(path / "selector.safetensors");
    std::vector<std::pair<std::string, at::Tensor>> tensors;
    for (const std::string& each : file.names()) {
      const at::Tensor tensor = file.tensor(each).clone(), other = each == name ? change(tensor) : tensor;
      if (other.defined()) tensors.emplace_back(each, other);
    }
    write_safetensors(path / "selector.safetensors", tensors, file.metadata());
    const std::string text = error_of([&] { Selector::load(path.string(), "", model, at::kCPU); });
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  const char *codes = "layers.1.query.weight", *scales = "layers.1.query.scale";
  expect(
      scales, [](const at::Tensor& x) { return x.slice(1, 0, 1).contiguous(); },
      "layers.1.query.scale is [512, 1]; config and backbone make it [512, 2]");
  expect(
      scales, [](const at::Tensor& x) { return x.to(at::kFloat); },
      "layers.1.query.scale is of float32; selector.json makes it bfloat16");
  expect(scales, [](const at::Tensor& x) { return x / 0; }, "layers.1.query.scale holds values that are not");
  expect(scales, [](const at::Tensor&) { return at::Tensor(); }, "layers.1.query.scale");
  expect(
      codes, [](const at::Tensor& x) { return x.to(at::kChar); },
      "layers.1.query.weight is of int8; selector.json makes it uint8");
  expect(
      codes, [](const at::Tensor& x) { return at::cat({x, x}, 1); },
      "layers.1.query.weight is [512, 64]; config and backbone make it [512, 32]");
  expect(codes, [](const at::Tensor& x) { return x.bitwise_xor(1); }, "are not those that were saved");
}

TEST(Selector, LoadRefusesWhatDoesNotFit) {
  const uint64_t seed = fresh_seed();
  const TemporaryFolder folder;
  const ModelConfig model = small_model(24, 2, 4, 2, 16);
  const std::filesystem::path path = folder.path() / "s";
  // Without checksums, which would find every change first (test_damage.cpp).
  auto save = [&] {
    Selector(SelectorConfig{}, model, at::kCPU, at::kFloat, seed).save(path, "abc");
    json document = read_json(path / "selector.json");
    document.erase("checksum"), document.erase("tensors_checksum");
    write_file_atomically(path / "selector.json", document.dump());
  };
  auto expect = [&](const ModelConfig& backbone, const char* part) {
    const std::string text = error_of([&] { Selector::load(path.string(), "", backbone, at::kCPU); });
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  auto edit = [&](const std::function<void(json&)>& change) {
    save();
    json document = read_json(path / "selector.json");
    change(document);
    write_file_atomically(path / "selector.json", document.dump());
  };
  save();
  // Other weights of the same shape are no error.
  const Selector loaded = Selector::load(path.string(), "", model, at::kCPU);
  EXPECT_TRUE(loaded.made_for("abc") && loaded.made_for(""));
  EXPECT_FALSE(loaded.made_for("abd"));
  ModelConfig wider = model;
  wider.hidden_size = 32;
  expect(wider, "its hidden_size is 24, this model's is 32");
  expect(small_model(24, 3, 4, 2, 16), "num_layers");
  edit([](json& d) { d["format"] = "other"; });
  expect(model, "is not a selector");
  for (const json& version : {json(0), json(4), json("3")}) {
    edit([&](json& d) { d["version"] = version; });
    expect(model, ("has version " + version.dump() + ", this program reads versions 1 to 3").c_str());
  }
  edit([](json& d) { d["weight_format"] = "int4"; });
  expect(model, "selector.json: hidden_size is 24; int4 stores");
  edit([](json& d) { d["weight_format"] = "int8"; });
  expect(model, "query.weight is of float32; selector.json makes it int8");
  edit([](json& d) { d["config"]["key_heads"] = 4; });
  expect(model, "tensor layers.0.key.weight is [128, 24]; config and backbone make it [512, 24]");
  edit([](json& d) { d["layers"] = {0}; });
  expect(model, "\"layers\" is [0]");
  edit([](json& d) { d["weights_id"] = "0"; });
  expect(model, "not written together");
  edit([](json& d) { d["config"]["surprise"] = 1; });
  expect(model, "unknown field \"surprise\"");
  edit([](json& d) { d.erase("backbone"); });
  expect(model, "\"backbone\" is missing");
  edit([](json& d) { d["config"]["selection"]["temperature"] = {1.0}; });
  expect(model, "temperature has 1 values");
  // A weight that is not finite.
  save();
  {
    const SafetensorsFile file(path / "selector.safetensors");
    std::vector<std::pair<std::string, at::Tensor>> tensors;
    for (const std::string& name : file.names()) tensors.emplace_back(name, file.tensor(name).clone());
    tensors[1].second.flatten()[3] = std::nan("");
    write_safetensors(path / "selector.safetensors", tensors, file.metadata());
    expect(model, "not finite");
    tensors.emplace_back("layers.9.query.weight", at::zeros({2}));
    tensors[1].second.zero_();
    write_safetensors(path / "selector.safetensors", tensors, file.metadata());
    expect(model, "the config makes");
    tensors.erase(tensors.begin());
    write_safetensors(path / "selector.safetensors", tensors, file.metadata());
    EXPECT_THROW(Selector::load(path.string(), "", model, at::kCPU), Error);
  }
  std::filesystem::remove(path / "selector.safetensors");
  EXPECT_THROW(Selector::load(path.string(), "", model, at::kCPU), Error);
  EXPECT_NE(error_of([&] { Selector::load("nowhere", folder.path(), model, at::kCPU); }).find("spot distill"),
            std::string::npos);
  EXPECT_THROW(Selector::load((folder.path() / "a" / "b").string(), "", model, at::kCPU), Error);
}

TEST(Selector, RefusesImpossibleShapes) {
  const ModelConfig model = small_model(24, 2, 4, 2, 16);
  SelectorConfig none;
  none.selection.dense_layers = {0, 1};
  EXPECT_NE(error_of([&] { Selector(none, model, at::kCPU); }).find("leaves no full-attention layer"),
            std::string::npos);
  SelectorConfig far;
  far.selection.dense_layers = {2};
  EXPECT_NE(error_of([&] { Selector(far, model, at::kCPU); }).find("layer 2"), std::string::npos);
  const Selector selector(SelectorConfig{}, model, at::kCPU);
  EXPECT_THROW(selector.project(5, at::zeros({1, 24}), at::zeros({1}, at::kLong)), Error);
  EXPECT_THROW(selector.project(0, at::zeros({1, 25}), at::zeros({1}, at::kLong)), Error);
  EXPECT_THROW(token_scores(at::zeros({2, 4, 128}), at::zeros({2, 1, 4}), at::zeros({2, 2, 128})), Error);
}

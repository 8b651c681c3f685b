#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <csignal>
#include <fstream>
#include <numeric>
#include <random>
#include <set>
#include <thread>

#include "checkpoint/safetensors.h"
#include "core/error.h"
#include "core/files.h"
#include "distill/calibrate.h"
#include "distill/distill_attention.h"
#include "distill/trainer.h"

namespace spot {
namespace {
namespace fs = std::filesystem;

const bool kOneThread = (at::set_num_threads(1), true);  // tensors here are too small to share

uint64_t fresh_seed() {
  const uint64_t seed = std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "spot_train_XXXXXX").string();
    path = ::mkdtemp(name.data());
  }
  ~Folder() { remove_folder(path); }
  fs::path path;
};

constexpr int32_t kEos = 256;
std::vector<int32_t> bytes_as_tokens(const std::string& text) {
  std::vector<int32_t> tokens;
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

ModelConfig tiny_model() {
  ModelConfig config;
  config.architecture = "Qwen3ForCausalLM";
  config.model_type = "qwen3";
  config.hidden_size = 48;
  config.num_layers = 3;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 16;
  config.intermediate_size = 64;
  config.vocab_size = 257;
  config.max_position_embeddings = 4096;
  config.tie_word_embeddings = true;
  config.qk_norm = true;
  config.rope.rotary_dim = 16;
  config.layer_kinds.assign(3, LayerKind::full_attention);
  return config;
}

SelectorConfig tiny_selector() {
  SelectorConfig config;
  config.rope_dims = 16;
  config.selection.rule.sinks = 16;
  config.selection.rule.recency = 16;
  config.selection.rule.floor = 48;
  config.distillation.k_train = 48;
  return config;
}

// A random backbone, a selector, a corpus of small documents and a short run.
struct SmallRun {
  explicit SmallRun(uint64_t seed)
      : seed(seed), backbone(Backbone::random(tiny_model(), at::kCPU, at::kFloat, seed)) {
    std::mt19937_64 engine(seed);
    std::ofstream text(folder.path / "text.jsonl");
    for (int d = 0; d < 150; ++d) {
      std::string document;
      while (document.size() < 20 + engine() % 150) document += static_cast<char>('a' + engine() % 26);
      text << nlohmann::json({{"text", document}}).dump() << "\n";
    }
    config.output = folder.path / "run";
    config.data.paths = {folder.path / "text.jsonl"};
    config.data.sequence_length = 101;
    config.data.held_out_every = 5;
    config.data.window_documents = 20;
    config.data.seed = seed;
    config.steps = 6;
    config.sequences_per_step = 2;
    config.held_out_sequences = 2;
    config.held_out_interval = 3;
    config.calibrate = false;
    hooks.show_progress = false;
  }
  Selector selector() const {
    return Selector(tiny_selector(), backbone.config(), at::kCPU, at::kFloat, seed);
  }
  TrainResult run(Selector& selector, bool resume = false) const {
    return distill(backbone, selector, bytes_as_tokens, kEos, config, resume, hooks);
  }

  uint64_t seed;
  Folder folder;
  Backbone backbone;
  TrainConfig config;
  TrainHooks hooks;
};

std::string weights_of(const fs::path& output) {
  return read_file(output / "selector.safetensors");
}

// The lines of metrics.jsonl without times.
std::vector<std::string> metrics_of(const fs::path& output) {
  std::ifstream in(output / "metrics.jsonl");
  std::vector<std::string> lines;
  for (std::string line; std::getline(in, line);) {
    nlohmann::json entry = nlohmann::json::parse(line);
    entry.erase("seconds");
    entry.erase("tokens_per_second");
    lines.push_back(entry.dump());
  }
  return lines;
}

TEST(Trainer, ResumedRunEqualsAStraightOneBitForBit) {
  SmallRun setup(fresh_seed());
  setup.config.query_rows = 37;
  setup.config.data.length_mix = {{101, 0.5}, {40, 0.5}};
  Selector straight = setup.selector();
  EXPECT_EQ(setup.run(straight).status, TrainStatus::finished);

  SmallRun halves(setup.seed);
  halves.config = setup.config;
  halves.config.output = setup.folder.path / "halves";
  halves.hooks.on_step = [](const nlohmann::json&) {};
  int64_t steps = 0;
  halves.hooks.should_stop = [&] { return ++steps == 3; };
  Selector first = setup.selector();
  const TrainResult stopped = halves.run(first);
  EXPECT_EQ(stopped.status, TrainStatus::interrupted);
  EXPECT_EQ(stopped.steps, 3);
  EXPECT_FALSE(fs::exists(halves.config.output / "selector.safetensors"));
  // What a crash may leave behind: a step logged after the checkpoint, half a line, half a checkpoint.
  std::ofstream(halves.config.output / "metrics.jsonl", std::ios::app) << R"({"step": 4, "loss": 9})"
                                                                       << "\n{\"ste";
  fs::create_directories(halves.config.output / "unfinished-checkpoint");

  Selector second(tiny_selector(), setup.backbone.config(), at::kCPU, at::kFloat,
                  setup.seed + 1);  // other weights
  EXPECT_EQ(halves.run(second, /*resume=*/true).status, TrainStatus::finished);
  EXPECT_EQ(weights_of(setup.config.output), weights_of(halves.config.output));
  EXPECT_EQ(metrics_of(setup.config.output), metrics_of(halves.config.output));
  EXPECT_EQ(metrics_of(setup.config.output).size(), 6u);

  const Selector loaded = Selector::load(setup.config.output.string(), "", setup.backbone.config(), at::kCPU);
  for (size_t i = 0; i < loaded.parameters().size(); ++i) {
    EXPECT_TRUE(at::equal(loaded.parameters()[i], straight.parameters()[i]));
    EXPECT_FALSE(straight.parameters()[i].requires_grad());
  }
  EXPECT_EQ(loaded.notes().at("steps"), 6);
  EXPECT_TRUE(fs::exists(setup.config.output / "loss.html"));
  EXPECT_NE(read_file(setup.config.output / "README.md").find("\n6 steps of "), std::string::npos);

  // Another seed gives other weights: the comparison above can fail.
  SmallRun other(setup.seed + 1);
  Selector different = other.selector();
  other.run(different);
  EXPECT_NE(weights_of(setup.config.output), weights_of(other.config.output));
}

TEST(Trainer, RefusesInt4ForAWidthThatItDoesNotFit) {
  SmallRun setup(fresh_seed());
  setup.config.store = "int4";
  Selector selector = setup.selector();
  EXPECT_NE(message_of([&] { setup.run(selector); }).find("distillation: hidden_size is 48; int4 stores"),
            std::string::npos);
  EXPECT_FALSE(fs::exists(setup.config.output / "metrics.jsonl"));
}

TEST(Trainer, FilesOfOthersAreNotReplaced) {
  SmallRun setup(fresh_seed());
  Selector selector = setup.selector();
  make_folder(setup.config.output);
  for (const char* name : {"README.md", "selector.json", "selector.safetensors"}) {
    const fs::path file = setup.config.output / name;
    write_file_atomically(file, std::string("another's"));
    EXPECT_NE(message_of([&] { setup.run(selector); }).find(fmt::format("{} that is of no run", name)),
              std::string::npos);
    EXPECT_EQ(read_file(file), "another's");
    fs::remove(file);
  }
}

TEST(Trainer, InterruptSavesAndResumes) {
  SmallRun setup(fresh_seed());
  setup.hooks.on_step = [](const nlohmann::json& metrics) {
    if (metrics.at("step") == 2) std::raise(SIGINT);
  };
  Selector selector = setup.selector();
  const TrainResult result = setup.run(selector);
  EXPECT_EQ(result.status, TrainStatus::interrupted);
  EXPECT_EQ(result.steps, 2);
  EXPECT_TRUE(fs::exists(setup.config.output / "checkpoint-000002" / "train.json"));
  EXPECT_NE(message_of([&] { setup.run(selector); }).find("already holds a run (checkpoint-000002)"),
            std::string::npos);
  SmallRun changed(setup.seed);
  changed.config = setup.config;
  changed.config.peak_lr = 2e-3;
  EXPECT_NE(
      message_of([&] { changed.run(selector, true); }).find("begun with peak_lr = 0.001, now it is 0.002"),
      std::string::npos);
  EXPECT_EQ(setup.run(selector, true).status, TrainStatus::finished);
  EXPECT_EQ(setup.run(selector, true).steps, 6);  // nothing left to do
}

TEST(Trainer, LossFallsOnARealModel) {
  const fs::path model = "models/tiny-qwen3";
  const Backbone backbone = Backbone::load(model, at::kCPU, at::kFloat);
  const Tokenizer tokenizer = Tokenizer::load(model);
  const Folder folder;
  std::ofstream text(folder.path / "text.jsonl");
  std::mt19937_64 engine(fresh_seed());
  const std::vector<std::string> sentences = {
      "The configuration file is read once at startup. ",
      "Use the --verbose option to print every step. ",
      "Copyright holders may reproduce this text. ",
      "This package provides a library for parsing dates. ",
      "If the value is missing, an error is returned. ",
      "See the manual page for details on each flag. ",
  };
  for (int d = 0; d < 60; ++d) {
    std::string document;
    for (int s = 0; s < 40; ++s) document += sentences[engine() % sentences.size()];
    text << nlohmann::json({{"text", document}}).dump() << "\n";
  }
  text.close();
  TrainConfig config;
  config.output = folder.path / "run";
  config.data.paths = {folder.path / "text.jsonl"};
  config.data.sequence_length = 192;
  config.data.held_out_every = 10;
  config.steps = 25;
  config.sequences_per_step = 1;
  config.held_out_sequences = 2;
  config.calibrate = false;
  config.budgets = {0.1};
  SelectorConfig shape;
  shape.distillation.teacher_scope = TeacherScope::all;
  Selector selector(shape, backbone.config(), at::kCPU);
  std::vector<double> held_out;
  TrainHooks hooks;
  hooks.show_progress = false;
  hooks.on_step = [&](const nlohmann::json& m) {
    if (m.contains("held_out_loss")) held_out.push_back(m.at("held_out_loss"));
  };
  const TrainResult result = distill(backbone, selector, tokenizer, config, false, hooks);
  ASSERT_EQ(held_out.size(), 2u);
  EXPECT_LT(held_out.back(), 0.7 * held_out.front());
  for (const double covered : result.last_metrics.at("covered_0.1_per_layer")) {
    EXPECT_GT(covered, 0.0);
    EXPECT_LT(covered, 1.0);
  }
}

// Keeps what a layer's attention sees.
struct Capture : AttentionBackend {
  explicit Capture(DistillAttention& inner) : inner(inner) {}
  at::Tensor forward(const AttentionInputs& inputs) override {
    hidden[inputs.layer] = inputs.hidden.clone();
    query[inputs.layer] = inputs.query.clone();
    key[inputs.layer] = inputs.key.clone();
    positions = inputs.batch.positions;
    scale = inputs.scale;
    return inner.forward(inputs);
  }
  DistillAttention& inner;
  std::map<int64_t, at::Tensor> hidden, query, key;
  at::Tensor positions;
  double scale = 0.0;
};

TEST(DistillAttention, GradientsAreThoseOfAutograd) {
  const uint64_t seed = fresh_seed();
  const SmallRun setup(seed);
  const Selector selector = setup.selector();
  for (at::Tensor p : selector.parameters()) p.requires_grad_(true);
  LayerLossOptions options;
  options.loss = DistillLoss::dense;
  DistillAttention attention(selector, options);
  Capture capture(attention);
  std::vector<int32_t> tokens;
  std::mt19937_64 engine(seed);
  for (int i = 0; i < 61; ++i) tokens.push_back(static_cast<int32_t>(engine() % 257));
  attention.begin(0.5, {});
  forward_sequence(setup.backbone, capture, tokens, {0});
  const at::Tensor sums = attention.take_sums();

  const at::Tensor future = at::ones({61, 61}, at::kBool).triu(1);
  for (size_t l = 0; l < selector.layers().size(); ++l) {
    const int64_t layer = selector.layers()[l];
    const SelectorProjection p = selector.project(layer, capture.hidden[layer], capture.positions);
    const at::Tensor scores = token_scores(p.query, p.weight, p.key)[0].masked_fill(future, -INFINITY);
    const at::Tensor keys = capture.key[layer].repeat_interleave(2, 1);
    const at::Tensor logits = at::einsum("qhd,khd->hqk", {capture.query[layer], keys}) * capture.scale;
    const at::Tensor teacher = at::softmax(logits.masked_fill(future, -INFINITY), -1).mean(0);
    const at::Tensor loss =
        (at::xlogy(teacher, teacher) - teacher * at::log_softmax(scores, -1).masked_fill(future, 0.0)).sum() /
        61;
    EXPECT_NEAR(sums[static_cast<int64_t>(l)][0].item<double>(), loss.item<double>(), 1e-5);
    std::vector<at::Tensor> ours;
    for (at::Tensor parameter : selector.parameters(layer)) {
      ours.push_back(parameter.grad().clone());
      parameter.mutable_grad().reset();
    }
    loss.backward();
    for (size_t i = 0; i < ours.size(); ++i) {
      const at::Tensor want = selector.parameters(layer)[i].grad() * 0.5;
      EXPECT_LE((ours[i] - want).abs().max().item<double>(), 1e-4 * want.abs().max().item<double>() + 1e-9)
          << "layer " << layer << " parameter " << i;
    }
  }
}

TEST(DistillAttention, PartsDoNotSeeEachOther) {
  const uint64_t seed = fresh_seed();
  const SmallRun setup(seed);
  const Selector selector = setup.selector();
  LayerLossOptions options;
  options.k_train = 16;
  options.budgets = {0.2};
  DistillAttention attention(selector, options);
  std::mt19937_64 engine(seed);
  std::vector<int32_t> tokens;
  for (int i = 0; i < 90; ++i) tokens.push_back(static_cast<int32_t>(engine() % 257));
  attention.begin(0.0, {});
  forward_sequence(setup.backbone, attention, tokens, {0, 35});
  const at::Tensor together = attention.take_sums();
  forward_sequence(setup.backbone, attention, {tokens.begin(), tokens.begin() + 35}, {0});
  const at::Tensor first = attention.take_sums();
  forward_sequence(setup.backbone, attention, {tokens.begin() + 35, tokens.end()}, {0});
  const at::Tensor second = attention.take_sums();
  EXPECT_TRUE(at::allclose(together, (first * 35 + second * 55) / 90, 1e-4, 1e-6))
      << together << first << second;
  forward_sequence(setup.backbone, attention, tokens, {0});
  EXPECT_FALSE(at::allclose(together, attention.take_sums(), 1e-4, 1e-6));
}

TEST(Trainer, ReplicasShareAStep) {
  SmallRun alone(fresh_seed());
  alone.config.steps = 3;
  Selector single = alone.selector();
  alone.run(single);

  SmallRun shared(alone.seed);
  shared.config.steps = 3;
  std::vector<Selector> selectors = {shared.selector(), shared.selector()};
  std::barrier barrier(2);
  std::array<std::vector<at::Tensor>*, 2> lists{};
  const auto worker = [&](int64_t rank) {
    TrainHooks hooks;
    hooks.handle_signals = hooks.show_progress = false;
    hooks.replicas = {rank, 2, [&, rank](std::vector<at::Tensor>& tensors) {
                        const at::NoGradGuard no_grad;
                        lists[static_cast<size_t>(rank)] = &tensors;
                        barrier.arrive_and_wait();
                        if (rank == 0)
                          for (size_t i = 0; i < tensors.size(); ++i) {
                            (*lists[0])[i].add_((*lists[1])[i]);
                            (*lists[1])[i].copy_((*lists[0])[i]);
                          }
                        barrier.arrive_and_wait();
                      }};
    distill(shared.backbone, selectors[static_cast<size_t>(rank)], bytes_as_tokens, kEos, shared.config,
            false, hooks);
  };
  std::thread other([&] { worker(1); });
  worker(0);
  other.join();
  const auto initial = alone.selector().parameters();
  for (size_t i = 0; i < initial.size(); ++i) {
    EXPECT_TRUE(at::equal(selectors[0].parameters()[i], selectors[1].parameters()[i]));
    // Sums in another order differ in the last bits; Adam's first steps magnify them where gradients are
    // tiny.
    const double moved = (single.parameters()[i] - initial[i]).norm().item<double>();
    EXPECT_LT((selectors[0].parameters()[i] - single.parameters()[i]).norm().item<double>(), 0.02 * moved);
  }
}

TEST(Trainer, NanStopsWithLayerAndStep) {
  SmallRun setup(fresh_seed());
  Selector selector = setup.selector();
  setup.hooks.on_step = [&](const nlohmann::json& metrics) {
    if (metrics.at("step") == 3) selector.parameters(1).front().detach().fill_(std::nan(""));
  };
  setup.config.checkpoint_interval = 2;
  const std::string message = message_of([&] { setup.run(selector); });
  EXPECT_NE(message.find("step 4: the loss of layer 1 is nan"), std::string::npos) << message;
  EXPECT_TRUE(fs::exists(setup.config.output / "checkpoint-000002"));
  // The checkpoint before it continues.
  SmallRun again(setup.seed);
  again.config = setup.config;
  EXPECT_EQ(again.run(selector, true).status, TrainStatus::finished);
}

TEST(Trainer, RefusesImpossibleRuns) {
  SmallRun setup(fresh_seed());
  Selector selector = setup.selector();
  setup.config.data.sequence_length = 5000;
  EXPECT_NE(
      message_of([&] { setup.run(selector); }).find("sequence_length is 5000, the backbone reaches 4096"),
      std::string::npos);
  setup.config.data.sequence_length = 63;
  EXPECT_NE(
      message_of([&] { setup.run(selector); }).find("of 63 tokens the first 16 and the last 16 are left out"),
      std::string::npos);
  setup.config.data.sequence_length = 64;
  setup.config.steps = 0;
  EXPECT_NE(message_of([&] { setup.run(selector); }).find("steps is 0"), std::string::npos);
  setup.config.steps = 1;
  Selector half(tiny_selector(), setup.backbone.config(), at::kCPU, at::kBFloat16);
  EXPECT_NE(message_of([&] { setup.run(half); }).find("must be float32"), std::string::npos);
}

TEST(Calibrate, FittedTemperatureMeansCapturedMass) {
  const uint64_t seed = fresh_seed();
  const SmallRun setup(seed);
  SelectorConfig config = tiny_selector();
  config.selection.rule.floor = 0;  // then the whole rule's residual share is the nucleus' share
  const Selector selector(config, setup.backbone.config(), at::kCPU, at::kFloat, seed);
  for (const at::Tensor& p : selector.parameters()) p.mul_(2.0);  // too peaked
  std::mt19937_64 engine(seed);
  std::vector<TokenSequence> sequences(2);
  for (TokenSequence& s : sequences) {
    s.parts = s.documents = {0};
    for (int i = 0; i < 600 + static_cast<int>(engine() % 100); ++i)
      s.tokens.push_back(static_cast<int32_t>(engine() % 257));
  }
  CalibrationOptions options;
  options.threshold = {0.9, 0.03, 0.02, 1e-9};
  const Calibration c = calibrate(setup.backbone, selector, sequences, options, false);
  options.fit_temperature = false;
  ASSERT_EQ(c.temperature.size(), 3u);
  EXPECT_GT(c.queries, 200);
  for (size_t l = 0; l < 3; ++l) {
    EXPECT_LE(c.error_after()[l], c.error_before()[l]);
    EXPECT_LT(c.error_after()[l], 0.05);  // random attention is nearly flat: a high temperature fits it
    for (size_t i = 0; i < c.p.size(); ++i) {
      // The selection quantises masses and counts rows alike: an independent path to the same number.
      EXPECT_NEAR(c.selected_residual[l][i], c.captured_after[l][i], 2e-3);
      EXPECT_GE(c.selected_total[l][i], 0.0);
      EXPECT_LE(c.selected_tokens[l][i], 1.0);
    }
  }
  EXPECT_GT(*std::max_element(c.temperature.begin(), c.temperature.end()), 1.0);
  // Random attention is nearly flat: the residual's share is that of its tokens.
  ASSERT_EQ(c.residual_mass.size(), 3u * static_cast<size_t>(selector.groups()));
  for (const double mass : c.residual_mass) {
    EXPECT_GT(mass, 0.3);
    EXPECT_LT(mass, 0.99);
  }
  // No block holds 0.9 of anything here, so that the reserved ones alone are read: what is not residual mass.
  ASSERT_EQ(c.mass_table.size(), 4u);
  const double residual = std::accumulate(c.residual_mass.begin(), c.residual_mass.end(), 0.0) /
                          static_cast<double>(c.residual_mass.size());
  EXPECT_NEAR(c.mass_table[0].mass, 1 - residual, 1e-5);
  EXPECT_LT(c.mass_table[0].tokens, 0.2);
  EXPECT_LE(c.mass_table[0].mass, c.mass_table[1].mass);
  EXPECT_LE(c.mass_table[1].tokens, c.mass_table[2].tokens);
  EXPECT_NEAR(c.mass_table[3].mass, 1, 1e-5);  // every block
  EXPECT_NEAR(c.mass_table[3].tokens, 1, 1e-9);
  EXPECT_EQ(c.contexts, 2);
  EXPECT_EQ(c.length, static_cast<int64_t>(std::max(sequences[0].tokens.size(), sequences[1].tokens.size())));
  // With the temperatures that the selector has, and those are its.
  Selector tempered = selector;
  tempered.selection().temperature = c.temperature;
  const Calibration again = calibrate(setup.backbone, tempered, sequences, options, false);
  EXPECT_EQ(again.temperature, c.temperature);
  EXPECT_EQ(again.mass_table, c.mass_table);
  tempered.selection().temperature = {0.05, 0.05, 0.05};
  EXPECT_NE(calibrate(setup.backbone, tempered, sequences, options, false).mass_table, c.mass_table);
  // Sequences too short to hold a residual measure nothing and change nothing.
  sequences.resize(1);
  sequences[0].tokens.resize(100);
  const Calibration none = calibrate(setup.backbone, selector, sequences, {}, false);
  EXPECT_EQ(none.queries, 0);
  EXPECT_EQ(none.temperature, (std::vector<double>{1.0, 1.0, 1.0}));
  EXPECT_TRUE(none.residual_mass.empty());
  EXPECT_TRUE(none.mass_table.empty());
  EXPECT_EQ(none.contexts, 0);
}

TEST(Trainer, WritesFittedTemperatures) {
  SmallRun setup(fresh_seed());
  setup.config.calibrate = true;
  setup.config.steps = 2;
  setup.config.data.sequence_length = 400;
  Selector selector = setup.selector();
  setup.run(selector);
  const Selector loaded = Selector::load(setup.config.output.string(), "", setup.backbone.config(), at::kCPU);
  ASSERT_EQ(loaded.config().selection.temperature.size(), 3u);
  EXPECT_EQ(loaded.config().selection.temperature, selector.config().selection.temperature);
  EXPECT_NE(loaded.config().selection.temperature, (std::vector<double>{1.0, 1.0, 1.0}));
  EXPECT_TRUE(loaded.notes().at("calibration").contains("captured_after"));
  EXPECT_EQ(loaded.config().selection.residual_mass, selector.config().selection.residual_mass);
  ASSERT_EQ(loaded.config().selection.residual_mass.size(), 3u * static_cast<size_t>(loaded.groups()));
  EXPECT_EQ(loaded.config().selection.mass_table, selector.config().selection.mass_table);
  const std::vector<MassRow>& table = loaded.config().selection.mass_table;
  ASSERT_EQ(table.size(), 21u);  // 2^-6 to 2^-16 in half octaves
  for (int i = 0; i <= 20; ++i)
    EXPECT_NEAR(std::log2(table[static_cast<size_t>(i)].threshold), -6 - 0.5 * i, 1e-9);
  EXPECT_EQ(loaded.notes().at("mass_calibration").at("length"), 400);
  SelectionRule rule;
  rule.mode = SelectionMode::threshold;
  rule.threshold = 1e-3;
  const SelectionRule fitted = loaded.fitted(loaded.layers()[1], rule);
  ASSERT_EQ(fitted.thresholds.count, loaded.groups());
  EXPECT_EQ(fitted.thresholds.of[0],
            1e-3 / loaded.config().selection.residual_mass[static_cast<size_t>(loaded.groups())]);
  EXPECT_EQ(loaded.fitted(loaded.layers()[1], {}).thresholds.count, 0);
}

TEST(Trainer, CalibratesOnLongerContextsThanItTrainsOn) {
  SmallRun setup(fresh_seed());
  setup.config.calibrate = true;
  setup.config.steps = 1;
  setup.config.data.sequence_length = 400;
  setup.config.calibration_length = 900;
  Selector selector = setup.selector();
  setup.run(selector);
  const Selector loaded = Selector::load(setup.config.output.string(), "", setup.backbone.config(), at::kCPU);
  // As many contexts as held-out sequences, each with more measured queries than 400 tokens have.
  const std::vector<TokenSequence> contexts =
      TrainingData(setup.config.data, bytes_as_tokens, kEos).held_out(setup.config.held_out_sequences, 900);
  const Calibration expected = calibrate(setup.backbone, selector, contexts, {}, false);
  ASSERT_FALSE(contexts.empty());
  EXPECT_EQ(loaded.config().selection.temperature, expected.temperature);
  EXPECT_EQ(loaded.notes().at("calibration").at("queries"), expected.queries);

  setup.config.output += "-more";
  setup.config.calibration_length = 4000;  // the held-out documents have about 2900
  EXPECT_THROW(setup.run(selector), Error);
}

TEST(TrainConfig, RoundTripsAndRefusesMistakes) {
  TrainConfig config;
  config.output = "some/folder";
  config.data.paths = {"a.txt", "b"};
  config.data.length_mix = {{4096, 0.25}, {16384, 0.75}};
  config.data.seed = 0xfedcba9876543210ULL;
  config.peak_lr = 3e-4;
  config.document_mask = true;
  const nlohmann::json json = config.to_json();
  const TrainConfig back = TrainConfig::from_json(nlohmann::json::parse(json.dump()), "x.json");
  EXPECT_EQ(back.to_json(), json);
  EXPECT_EQ(back.data.length_mix.at(1).length, 16384);
  EXPECT_EQ(TrainConfig::from_json(nlohmann::json::object(), "x.json").steps, 763);
  const auto message = [](const char* text) {
    return message_of([&] { TrainConfig::from_json(nlohmann::json::parse(text), "x.json"); });
  };
  EXPECT_NE(message(R"({"step": 3})").find("x.json: \"step\" is not a field"), std::string::npos);
  EXPECT_NE(message(R"({"steps": "3"})").find("steps has the wrong type: \"3\""), std::string::npos);
  EXPECT_NE(message(R"({"steps": 1.5})").find("wrong type"), std::string::npos);
  EXPECT_NE(message("[]").find("must be a JSON object"), std::string::npos);
}

TEST(TrainConfig, LearningRateFollowsTheRecipe) {
  const TrainConfig config;  // 763 steps, 100 of warm-up, 229 constant
  EXPECT_DOUBLE_EQ(learning_rate(config, 0), 1e-5);
  EXPECT_DOUBLE_EQ(learning_rate(config, 99), 1e-3);
  EXPECT_DOUBLE_EQ(learning_rate(config, 328), 1e-3);
  EXPECT_NEAR(learning_rate(config, (329 + 762) / 2), 0.5 * (1e-3 + 5e-5), 2e-6);
  EXPECT_DOUBLE_EQ(learning_rate(config, 762), 5e-5);
  for (int64_t step = 329; step < 762; ++step)
    EXPECT_LT(learning_rate(config, step + 1), learning_rate(config, step));
  TrainConfig brief;
  brief.steps = 10;
  EXPECT_DOUBLE_EQ(learning_rate(brief, 0), 5e-4);  // two steps of warm-up
  EXPECT_DOUBLE_EQ(learning_rate(brief, 1), 1e-3);
  brief.steps = 1;
  EXPECT_GT(learning_rate(brief, 0), 0.0);
}

}  // namespace
}  // namespace spot

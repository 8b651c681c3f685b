#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <numeric>
#include <sstream>

#include "core/files.h"
#include "engine/engine.h"
#include "eval/ruler_eval.h"
#include "eval/ruler_log.h"
#include "eval/ruler_random.h"
#include "tests/checkpoint/support.h"

namespace spot {
namespace {

using testing::expect_error;
using testing::fresh_seed;
using testing::TemporaryFolder;

constexpr int64_t kVocabulary = 1000;

ModelConfig small_config() {
  ModelConfig config;
  config.architecture = "LlamaForCausalLM", config.model_type = "llama";
  config.hidden_size = 32, config.num_layers = 2, config.num_heads = 4, config.num_kv_heads = 2,
  config.head_dim = 16;
  config.intermediate_size = 48, config.vocab_size = kVocabulary, config.max_position_embeddings = 2048;
  config.rope.rotary_dim = 16;
  config.layer_kinds.assign(2, LayerKind::full_attention);
  return config;
}

// A word is a token, by its hash; ids read as words of their own. Some hold a byte that is no UTF-8, which
// must not disturb the log.
TextCodec word_codec() {
  return {[](std::string_view text, bool first) {
            std::vector<int32_t> ids;
            if (first) ids.push_back(0);
            std::istringstream in{std::string(text)};
            for (std::string word; in >> word;)
              ids.push_back(static_cast<int32_t>(stable_hash(word) % kVocabulary));
            return ids;
          },
          [](std::span<const int32_t> ids) {
            std::string text;
            for (int32_t id : ids) text += (id % 5 ? " w" : " \xff") + std::to_string(id);
            return text;
          },
          {}};
}

MethodSpec method(const std::string& name, const std::string& word, int64_t budget, int64_t sinks = 16,
                  int64_t recency = 32) {
  MethodSpec made{.name = name, .word = word};
  made.rule.mode = SelectionMode::top_k;
  made.rule.budget = budget, made.rule.sinks = sinks, made.rule.recency = recency;
  made.rule.floor = std::min<int64_t>(budget, 64);
  return made;
}

// Captured mass is a sum of library products, which round differently in other batches.
nlohmann::json rounded(nlohmann::json record) {
  for (nlohmann::json& outcome : record["outcomes"])
    outcome["captured"] = std::round(1000 * outcome["captured"].get<double>()) / 1000;
  return record;
}

std::string text_of(const std::vector<RulerRecord>& records) {
  nlohmann::json json = nlohmann::json::array();
  for (const RulerRecord& record : records) json.push_back(rounded(record.to_json()));
  return json.dump(1, ' ', false, nlohmann::json::error_handler_t::replace);
}

// The finished prompts of a log, in its order.
std::string text_of_log(const std::filesystem::path& file) {
  std::istringstream in(read_file(file));
  std::string line, text;
  while (std::getline(in, line)) {
    const auto json = nlohmann::json::parse(line);
    text += (json.contains("outcomes") ? rounded(json) : json).dump() + "\n";
  }
  return text;
}

class RulerEval : public ::testing::Test {
 protected:
  RulerEval() : seed(fresh_seed()), backbone(Backbone::random(small_config(), at::kCPU, at::kFloat, seed)) {
    at::set_num_threads(1);  // the tensors are tiny
    options.tasks = {RulerTask::vt, RulerTask::qa_1};
    options.lengths = {701};
    options.samples = 2;
    options.prompts.seed = seed;
    options.prefill_chunk = 200;
    methods = {method("dense", "dense", 64), method("streaming", "streaming", 128)};
  }
  RulerResult run() const { return evaluate_ruler(backbone, nullptr, codec, "", methods, options); }

  uint64_t seed;
  Backbone backbone;
  TextCodec codec = word_codec();
  std::vector<MethodSpec> methods;
  RulerEvalOptions options;
};

TEST_F(RulerEval, FinishedPromptsAreNotRunAgain) {
  const TemporaryFolder folder;
  options.out = folder / "out";
  const RulerResult first = run();
  EXPECT_EQ(first.reused, 0);
  ASSERT_EQ(first.records.size(), 4u);
  const RulerResult second = run();
  EXPECT_EQ(second.reused, 4);
  EXPECT_EQ(text_of(second.records), text_of(first.records));

  // More of everything: only what is new is run.
  options.samples = 3, options.lengths = {701, 1003}, options.tasks.push_back(RulerTask::qa_2);
  const RulerResult more = run();
  EXPECT_EQ(more.reused, 4);
  EXPECT_EQ(more.records.size(), 18u);
  options.out.clear();
  EXPECT_EQ(text_of(run().records), text_of(more.records));
}

TEST_F(RulerEval, AnInterruptedRunGoesOnWithTheSameResult) {
  const TemporaryFolder folder;
  options.out = folder.path();
  const std::string whole = text_of(run().records), bytes = read_file(folder / "ruler.jsonl"),
                    log = text_of_log(folder / "ruler.jsonl");
  // Cut inside the last line, as a killed process or a full disk leaves it.
  const size_t last = bytes.rfind('\n', bytes.size() - 2) + 1;
  const size_t cut = last + 1 + seed % (bytes.size() - last - 1);
  std::ofstream(folder / "ruler.jsonl", std::ios::binary | std::ios::trunc) << bytes.substr(0, cut);
  const RulerResult again = run();
  EXPECT_EQ(again.reused, 3);
  EXPECT_EQ(text_of(again.records), whole);
  EXPECT_EQ(text_of_log(folder / "ruler.jsonl"), log);
  // Cut inside the first line: nothing was finished.
  std::ofstream(folder / "ruler.jsonl", std::ios::binary | std::ios::trunc) << bytes.substr(0, 40);
  EXPECT_EQ(run().reused, 0);
  EXPECT_EQ(text_of_log(folder / "ruler.jsonl"), log);
}

TEST_F(RulerEval, OtherSettingsAndDamagedLogsAreRefused) {
  const TemporaryFolder folder;
  options.out = folder.path();
  options.samples = 1;
  run();
  options.prompts.seed += 1, options.stop_at_newline = true;
  expect_error([&] { run(); }, {"ruler.jsonl", "seed, stop_at_newline differ", "another folder"});
  options.prompts.seed -= 1, options.stop_at_newline = false;
  methods[1].rule.budget += 16;
  expect_error([&] { run(); }, {"methods differ"});
  methods[1].rule.budget -= 16;
  EXPECT_EQ(run().reused, 2);

  const std::string bytes = read_file(folder / "ruler.jsonl");
  const size_t second = bytes.find('\n') + 1;
  std::ofstream(folder / "ruler.jsonl", std::ios::binary | std::ios::trunc)
      << bytes.substr(0, second) + "{]\n" + bytes.substr(second);
  expect_error([&] { run(); }, {"ruler.jsonl", fmt::format("byte {}", second)});
  std::ofstream(folder / "ruler.jsonl", std::ios::binary | std::ios::trunc)
      << bytes.substr(0, second) + "{\"task\": \"vt\"}\n";
  expect_error([&] { run(); }, {"cannot be read back", "vt"});
}

TEST(RulerLogFile, OneProcessAtATime) {
  const TemporaryFolder folder;
  const nlohmann::json settings = {{"a", 1}};
  {
    RulerLog log(folder / "deep/log.jsonl", settings);
    expect_error([&] { RulerLog(folder / "deep/log.jsonl", settings); }, {"another run"});
    log.append({{"text", "two\nlines and a broken \xff byte"}});
  }
  const RulerLog log(folder / "deep/log.jsonl", settings);
  ASSERT_EQ(log.entries().size(), 1u);
  EXPECT_EQ(log.entries()[0]["text"], "two\nlines and a broken \xef\xbf\xbd byte");
}

TEST_F(RulerEval, MethodsThatKeepEverythingAnswerAsDenseAttentionDoes) {
  methods = {method("dense", "dense", 64)};
  SelectorConfig config = SelectorConfig::from_preset("spot");
  config.rope_dims = 8, config.cache_format = KeyFormat::f32;
  const Selector selector(config, backbone.config(), at::kCPU);
  for (const char* word : {"spot", "oracle", "quest", "streaming"})
    methods.push_back(method(word, word, 4000));
  options.mass_every = 3;
  const RulerResult result = evaluate_ruler(backbone, &selector, codec, "", methods, options);
  for (const RulerRecord& record : result.records) {
    EXPECT_EQ(record.outcomes[0].visible, 0);
    EXPECT_FALSE(record.outcomes[0].output.empty());
    for (size_t m = 1; m < methods.size(); ++m) {
      const RulerOutcome& outcome = record.outcomes[m];
      EXPECT_EQ(outcome.output, record.outcomes[0].output) << methods[m].name;
      EXPECT_EQ(outcome.attended, outcome.visible);
      EXPECT_GT(outcome.measured, 0);
      EXPECT_NEAR(outcome.captured / static_cast<double>(outcome.measured), 1.0, 1e-4);
    }
  }
}

TEST_F(RulerEval, MethodsDoNotDisturbOneAnother) {
  const std::vector<MethodSpec> all = {method("streaming", "streaming", 96), method("dense", "dense", 64),
                                       method("quest", "quest", 160), method("oracle", "oracle", 160)};
  options.samples = 1;
  methods = all;
  const RulerResult together = run();
  for (size_t m = 0; m < all.size(); ++m) {
    methods = {all[m]};
    const RulerResult alone = run();
    for (size_t r = 0; r < alone.records.size(); ++r) {
      const RulerOutcome &a = alone.records[r].outcomes[0], &b = together.records[r].outcomes[m];
      EXPECT_EQ(a.output, b.output) << all[m].name;
      EXPECT_EQ(a.attended, b.attended);
      EXPECT_NEAR(a.captured, b.captured, 1e-6 * a.captured);
    }
  }
  // A window of 96 tokens on about 670: blocks of 16 at both ends may add some.
  const RulerOutcome& window = together.records[0].outcomes[0];
  EXPECT_GE(window.attended / window.visible, 96.0 / 701);
  EXPECT_LE(window.attended / window.visible, 128.0 / 600);
  // The oracle's blocks hold the most mass.
  const RulerOutcome &quest = together.records[0].outcomes[2], &oracle = together.records[0].outcomes[3];
  EXPECT_GE(oracle.captured / static_cast<double>(oracle.measured),
            quest.captured / static_cast<double>(quest.measured) - 1e-6);
}

TEST_F(RulerEval, SparsePrefillReadsTheContextByItself) {
  options.samples = 1, options.mass_every = 0, options.stop_when_answered = false;
  MethodSpec sparse = method("sparse prefill", "oracle", 96);
  sparse.prefill = PrefillMode::sparse, sparse.query_tile = 1;
  const std::vector<MethodSpec> neighbours = {method("dense", "dense", 64), sparse,
                                              method("quest", "quest", 160)};
  // One random model in eight answers alike whatever it attends to; then another one shows that the prefill
  // was sparse.
  bool differs = false;
  for (uint64_t model = 0; model < 12 && !differs; ++model) {
    backbone = Backbone::random(small_config(), at::kCPU, at::kFloat, seed + model);
    methods = neighbours;
    const RulerResult together = run();
    methods = {sparse};
    const RulerResult alone = run();
    methods = {neighbours[0], neighbours[2]};
    const RulerResult without = run();
    methods = {method("dense prefill", "oracle", 96)};
    const RulerResult dense_prefill = run();
    for (size_t r = 0; r < alone.records.size(); ++r) {
      // The reference: the whole prompt through the same attention by the generator.
      const RulerGenerator generator(options.prompts, "", [&](const std::string& text, bool first) {
        return static_cast<int64_t>(codec.encode(text, first).size());
      });
      const RulerSample sample = generator.make(options.tasks[r], 701, 0);
      std::vector<int32_t> prompt = codec.encode(sample.context, true);
      for (int32_t id : codec.encode(sample.question + sample.answer_prefix, false)) prompt.push_back(id);
      AttentionStack reference(backbone, nullptr, {sparse}, {.num_pages = 50});
      Engine engine(backbone, reference, {.max_step_tokens = options.prefill_chunk, .max_sequences = 1});
      Request asked;
      asked.prompt = prompt, asked.max_new_tokens = sample.max_new_tokens;
      EXPECT_EQ(alone.records[r].outcomes[0].output, codec.decode(generate(engine, {asked})[0][0].tokens));
      EXPECT_EQ(together.records[r].outcomes[1].output, alone.records[r].outcomes[0].output);
      EXPECT_EQ(together.records[r].outcomes[0].output, without.records[r].outcomes[0].output);
      EXPECT_EQ(together.records[r].outcomes[2].output, without.records[r].outcomes[1].output);
      differs |= dense_prefill.records[r].outcomes[0].output != alone.records[r].outcomes[0].output;
    }
    EXPECT_NE(alone.settings["methods"], dense_prefill.settings["methods"]);
  }
  EXPECT_TRUE(differs);
}

TEST_F(RulerEval, TheBatchChangesNothingAndDuplicatesRunOnce) {
  options.samples = 1, options.lengths = {701, 640};
  methods = {method("dense", "dense", 64), method("quest", "quest", 160),
             method("streaming", "streaming", 96)};
  options.batch = 1;
  const std::vector<RulerRecord> alone = run().records;
  for (int64_t batch : {2, 40}) {
    options.batch = batch, options.prefill_chunk = 50 + 10 * batch;
    const std::vector<RulerRecord> together = run().records;
    ASSERT_EQ(together.size(), alone.size());
    for (size_t r = 0; r < alone.size(); ++r) {
      for (size_t m = 0; m < methods.size(); ++m) {
        const RulerOutcome &a = alone[r].outcomes[m], &b = together[r].outcomes[m];
        EXPECT_EQ(a.output, b.output) << methods[m].name << ", " << batch << " prompts at once";
        EXPECT_EQ(a.attended, b.attended);
        EXPECT_EQ(a.measured, b.measured);
        EXPECT_NEAR(a.captured, b.captured, 1e-4 * a.captured);
      }
    }
  }
  options.lengths = {701, 640, 701};
  options.tasks.push_back(options.tasks[0]);
  EXPECT_EQ(run().records.size(), 4u);
  options.batch = 0;
  expect_error([&] { run(); }, {"batch 0"});
}

TEST_F(RulerEval, RunsShareOutTheSamePrompts) {
  options.samples = 3;
  const std::vector<RulerRecord> whole = run().records;
  const TemporaryFolder folder;
  options.out = folder.path();
  options.samples = 2, options.first_sample = 1;
  const std::vector<RulerRecord> part = run().records;
  ASSERT_EQ(part.size(), 4u);
  for (size_t r = 0; r < 4; ++r) EXPECT_EQ(text_of({part[r]}), text_of({whole[r / 2 * 3 + r % 2 + 1]}));
  options.samples = 3, options.first_sample = 0;
  const RulerResult completed = run();
  EXPECT_EQ(completed.reused, 4);
  EXPECT_EQ(text_of(completed.records), text_of(whole));
  options.first_sample = -1;
  expect_error([&] { run(); }, {"first sample -1"});
}

TEST_F(RulerEval, AnswersEndWhereTheyShould) {
  options.samples = 1, options.tasks = {RulerTask::niah_single_1}, options.mass_every = 0;
  const RulerOutcome full = run().records[0].outcomes[0];
  EXPECT_EQ(full.answer_tokens, 128);
  EXPECT_EQ(full.score, 0);

  codec.stop_ids.resize(kVocabulary);
  std::iota(codec.stop_ids.begin(), codec.stop_ids.end(), 0);
  EXPECT_EQ(run().records[0].outcomes[0].answer_tokens, 0);
  codec.stop_ids = {std::stoi(full.output.substr(2))};  // the first word written
  EXPECT_EQ(run().records[0].outcomes[0].answer_tokens, 0);
  codec.stop_ids.clear();

  // Whatever the model writes, these read as a line break after text, and as the answer.
  codec.decode = [](std::span<const int32_t> ids) {
    return ids.size() < 5 ? std::string(ids.size(), '\n') : "\nx\n";
  };
  EXPECT_EQ(run().records[0].outcomes[0].answer_tokens, 128);
  options.stop_at_newline = true;
  EXPECT_EQ(run().records[0].outcomes[0].answer_tokens, 5);
  options.stop_at_newline = false;
  const std::string answer = run().records[0].references[0];
  codec.decode = [answer](std::span<const int32_t> ids) {
    return ids.size() < 7 ? "it is" : "it is " + answer;
  };
  const RulerOutcome right = run().records[0].outcomes[1];
  EXPECT_EQ(right.score, 1);
  EXPECT_EQ(right.answer_tokens, 7);
  options.stop_when_answered = false;
  EXPECT_EQ(run().records[0].outcomes[1].answer_tokens, 128);
}

TEST_F(RulerEval, DepthSweepPlacesTheNeedleAndDrawsAHeatMap) {
  options.tasks = {RulerTask::niah_single_1}, options.lengths = {600, 900}, options.depths = {0, 0.5, 1};
  options.samples = 1, options.mass_every = 0;
  const TemporaryFolder folder;
  options.out = folder.path();
  const RulerResult result = run();
  ASSERT_EQ(result.records.size(), 6u);
  for (size_t r = 0; r < 6; ++r) {
    EXPECT_EQ(result.records[r].asked_depth, options.depths[r % 3]);
    EXPECT_NEAR(result.records[r].depth, options.depths[r % 3], 0.12);
    EXPECT_EQ(result.records[r].references, result.records[r - r % 3].references);
  }
  EXPECT_EQ(run().reused, 6);
  EXPECT_EQ(result.scores().rows.size(), 2u * (3 + 1));
  EXPECT_EQ(result.measures().rows[1].back(), "not measured");
  Page page("sweep");
  result.add_to(page);
  const std::string html = page.html();
  EXPECT_NE(html.find("streaming, niah_single_1"), std::string::npos);
  EXPECT_NE(html.find("needle depth"), std::string::npos);
  options.tasks = {RulerTask::vt};
  expect_error([&] { run(); }, {"vt", "depth"});
}

TEST_F(RulerEval, TablesAndJsonSayWhatTheRecordsSay) {
  options.lengths = {701, 1200};
  RulerResult result = run();
  // Known scores in place of the random model's: the second method misses every third prompt.
  for (size_t r = 0; r < result.records.size(); ++r)
    result.records[r].outcomes[0].score = 1, result.records[r].outcomes[1].score = r % 3 ? 1 : 0;
  const nlohmann::json json =
      nlohmann::json::parse(result.to_json().dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  ASSERT_EQ(json["prompts"].size(), 8u);
  double lost = 0;
  int64_t prompts = 0;
  for (size_t r = 0; r < 8; ++r)
    if (json["prompts"][r]["length"] == 1200)
      lost += 1 - json["prompts"][r]["outcomes"][1]["score"].get<double>(), ++prompts;
  EXPECT_EQ(prompts, 4);
  const nlohmann::json& last = json["measures"].back();
  EXPECT_EQ(last["length"], 1200);
  EXPECT_EQ(last["method"], "streaming");
  EXPECT_NEAR(last["score"]["mean"].get<double>(), 100 - 100 * lost / 4, 1e-9);
  EXPECT_NEAR(last["difference_to_first"]["mean"].get<double>(), -100 * lost / 4, 1e-9);
  EXPECT_GT(last["captured_mass"].get<double>(), 0);
  EXPECT_LT(last["attended_share"].get<double>(), 0.3);
  const Table table = result.scores();
  ASSERT_EQ(table.rows.size(), 2u * (2 + 1));
  EXPECT_EQ(table.header, (std::vector<std::string>{"task", "length", "dense", "streaming"}));
  EXPECT_EQ(table.rows[5][0], "average");
  EXPECT_EQ(table.rows[5][2], "100.0 [100.0, 100.0]");
  EXPECT_EQ(table.rows[5][3].substr(0, 4), fmt::format("{:.1f}", 100 - 100 * lost / 4));
  Page page("ruler");
  result.add_to(page);
  EXPECT_NE(page.html().find("Average score by length"), std::string::npos);
}

TEST_F(RulerEval, RefusesBeforeAnyWork) {
  auto refused = [&](auto change, std::initializer_list<std::string> parts) {
    const RulerEvalOptions kept = options;
    change();
    expect_error([&] { run(); }, parts);
    options = kept;
  };
  refused([&] { options.lengths = {701, 5000}; }, {"5000", "2048"});
  refused([&] { options.lengths = {701, 200}; }, {"vt", "200"});
  refused([&] { options.tasks = {RulerTask::niah_single_2}; }, {"niah_single_2", "text"});
  refused([&] { options.samples = 0; }, {"samples"});
  refused(
      [&] {
        options.depths = {0.5, 2};
        options.tasks = {RulerTask::niah_single_1};
      },
      {"depth 2"});
  methods = {method("spot", "spot", 64)};
  refused([] {}, {"selector"});
  methods.clear();
  refused([] {}, {"method"});
}

}  // namespace
}  // namespace spot

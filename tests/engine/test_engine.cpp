#include <gtest/gtest.h>

#include "core/error.h"
#include "engine/engine.h"
#include "tests/model/configs.h"
#include "tests/selector/support.h"

namespace spot {
namespace {

ModelConfig small_config() {
  ModelConfig config = test::small_model(48, 3, 6, 2, 16);
  config.architecture = "LlamaForCausalLM", config.model_type = "llama", config.qk_norm = false;
  config.vocab_size = 101, config.max_position_embeddings = 4096;
  return config;
}

std::vector<int32_t> random_tokens(int64_t n, int64_t vocab) {
  const at::Tensor ids = at::randint(vocab, {n}, at::kInt);
  return {ids.data_ptr<int32_t>(), ids.data_ptr<int32_t>() + n};
}

Request request_of(std::vector<int32_t> prompt, int64_t new_tokens, int64_t method = 0) {
  Request request;
  request.prompt = std::move(prompt);
  request.max_new_tokens = new_tokens;
  request.method = method;
  return request;
}

TEST(Engine, EverySparseAttentionWithTheWholeContextEqualsDense) {
  const uint64_t seed = test::fresh_seed();
  const Backbone backbone = Backbone::random(small_config(), at::kCPU, at::kFloat, seed);
  const Selector selector(SelectorConfig::from_preset("spot"), backbone.config(), at::kCPU);
  MethodSettings everything;
  everything.budget = 4096, everything.cache_format = "f32";
  std::vector<MethodSpec> methods = {MethodSpec{}};
  for (const char* word : {"spot", "streaming", "oracle", "quest"})
    methods.push_back(make_spec(word, everything, nullptr));
  AttentionStack stack(backbone, &selector, methods, {.num_pages = 60, .num_sequences = 5});
  Engine engine(backbone, stack, {});
  std::vector<Request> requests;
  const std::vector<int32_t> prompt = random_tokens(700, 101);
  for (size_t m = 0; m < methods.size(); ++m)
    requests.push_back(request_of(prompt, 6, static_cast<int64_t>(m)));
  std::map<int64_t, std::vector<AttendedTokens>> attended;
  const auto answers = generate(engine, requests, [&](const Event& event) {
    if (event.finish) attended[event.request] = event.attended;
  });
  // One read the prompt; the others took its full pages and read what is left.
  EXPECT_EQ(engine.statistics().cached_tokens, 4 * (699 / 16 * 16));
  EXPECT_TRUE(attended[0].empty());
  for (size_t m = 1; m < methods.size(); ++m) {
    EXPECT_EQ(answers[m][0].tokens, answers[0][0].tokens) << methods[m].name;
    const auto& layers = attended[static_cast<int64_t>(m)];
    ASSERT_EQ(layers.size(), 3u) << methods[m].name;
    for (const AttendedTokens& layer : layers) {
      EXPECT_EQ(layer.queries, 5);
      EXPECT_EQ(layer.visible, 701 + 702 + 703 + 704 + 705);
      EXPECT_EQ(layer.attended, layer.visible) << methods[m].name;
    }
  }
}

TEST(Engine, CountsWhatAFixedBudgetAttends) {
  const uint64_t seed = test::fresh_seed();
  const Backbone backbone = Backbone::random(testing::small_qwen3(), at::kCPU, at::kFloat, seed);
  MethodSettings settings;
  settings.budget = 64, settings.sinks = 16, settings.recency = 16, settings.floor = 32;
  std::vector<MethodSpec> methods = {MethodSpec{}, make_spec("quest", settings, nullptr)};
  methods[1].dense_layers = {0};
  AttentionStack stack(backbone, nullptr, methods, {.num_pages = 60, .num_sequences = 3});
  Engine engine(backbone, stack, {.max_sequences = 3});
  Request request = request_of(random_tokens(201, 101), 4, 1);
  request.context = 190;  // the other 11 tokens select, and so do 3 of the answer
  std::vector<std::vector<AttendedTokens>> attended;
  generate(engine, {request, request_of(random_tokens(90, 101), 9), request}, [&](const Event& event) {
    if (event.finish && event.request != 1) attended.push_back(event.attended);
  });
  ASSERT_EQ(attended.size(), 2u);
  for (const auto& layers : attended) {
    ASSERT_EQ(layers.size(), 1u);
    EXPECT_EQ(layers[0].layer, 1);
    EXPECT_EQ(layers[0].queries, 14);
    double visible = 0, kept = 0;
    for (int64_t length = 191; length <= 204; ++length)
      visible += static_cast<double>(length), kept += 64.0 - static_cast<double>((16 - length % 16) % 16);
    EXPECT_EQ(layers[0].visible, visible);
    EXPECT_EQ(layers[0].attended, kept);
  }
}

TEST(Engine, StopsAndRefusesWhatDoesNotFit) {
  const uint64_t seed = test::fresh_seed();
  const Backbone backbone = Backbone::random(small_config(), at::kCPU, at::kFloat, seed);
  AttentionStack stack(backbone, nullptr, {MethodSpec{}}, {.num_pages = 7, .num_sequences = 2});
  Engine engine(backbone, stack, {});
  Request request = request_of(random_tokens(20, 101), 8);
  const GeneratedAnswer free_run = generate(engine, {request})[0][0];
  EXPECT_EQ(free_run.finish, FinishReason::length);
  EXPECT_EQ(free_run.tokens.size(), 8u);
  Request stopping = request;
  stopping.stop_ids = {free_run.tokens[2]};
  const GeneratedAnswer stopped = generate(engine, {stopping})[0][0];
  EXPECT_EQ(stopped.finish, FinishReason::stop);
  EXPECT_LE(stopped.tokens.size(), 2u);
  EXPECT_TRUE(std::equal(stopped.tokens.begin(), stopped.tokens.end(), free_run.tokens.begin()));
  request.max_new_tokens = 0;
  EXPECT_TRUE(generate(engine, {request})[0][0].tokens.empty());

  EXPECT_THROW(engine.add(request_of({}, 4)), Error);
  EXPECT_THROW(engine.add(request_of({101}, 4)), Error);
  EXPECT_THROW(engine.add(request_of({1}, 5000)), Error);
  EXPECT_THROW(engine.add(request_of(random_tokens(110, 101), 4)), Error);  // 114 tokens, 112 fit
  EXPECT_THROW(engine.add(request_of({1}, 4, 1)), Error);
  Request bad = request_of({1}, 4);
  bad.stop_strings = {"x"};
  EXPECT_THROW(engine.add(bad), Error);
  bad = request_of({1}, 4);
  bad.sampling.top_p = 2, bad.completions = 2;
  EXPECT_THROW(engine.add(bad), Error);
  bad = request_of({1}, 4);
  bad.context = 2;
  EXPECT_THROW(engine.add(bad), Error);
  EXPECT_TRUE(engine.idle());
  EXPECT_EQ(generate(engine, {request_of(random_tokens(104, 101), 8)})[0][0].tokens.size(), 8u);
  EXPECT_EQ(stack.cache().num_free_pages(), 7);
}

TEST(Engine, CancellingFreesPagesAtOnce) {
  const uint64_t seed = test::fresh_seed();
  const Backbone backbone = Backbone::random(testing::small_qwen3_5(), at::kCPU, at::kFloat, seed);
  AttentionStack stack(backbone, nullptr, {MethodSpec{}}, {.num_pages = 20, .num_sequences = 2});
  Engine engine(backbone, stack, {.max_step_tokens = 40, .max_sequences = 2});
  const int64_t first = engine.add(request_of(random_tokens(100, 97), 20));
  const int64_t second = engine.add(request_of(random_tokens(100, 97), 20));
  engine.step();
  EXPECT_LT(stack.cache().num_free_pages(), 20);
  engine.cancel(first);  // in the middle of its prompt
  engine.cancel(second);
  EXPECT_EQ(stack.cache().num_free_pages(), 20);
  EXPECT_TRUE(engine.idle());
  EXPECT_TRUE(engine.step().empty());
  engine.cancel(second);
  EXPECT_EQ(generate(engine, {request_of(random_tokens(300, 97), 20)})[0][0].tokens.size(), 20u);
}

TEST(Engine, AnswersOfOneRequestDrawApart) {
  const uint64_t seed = test::fresh_seed();
  const Backbone backbone = Backbone::random(small_config(), at::kCPU, at::kFloat, seed);
  AttentionStack stack(backbone, nullptr, {MethodSpec{}}, {.num_pages = 60, .num_sequences = 4});
  Engine engine(backbone, stack, {.max_sequences = 4});
  Request request = request_of(random_tokens(50, 101), 12);
  request.sampling.temperature = 1, request.sampling.top_k = 20, request.sampling.seed = 7,
  request.completions = 3;
  const auto answers = generate(engine, {request})[0];
  EXPECT_NE(answers[0].tokens, answers[1].tokens);
  request.sampling.seed = 9, request.completions = 1;
  EXPECT_EQ(generate(engine, {request})[0][0].tokens, answers[2].tokens);
}

// A backend that has nothing prepared: it stores keys and values, and its policy projects, after the fact.
class Unprepared : public AttentionBackend {
 public:
  explicit Unprepared(AttentionBackend& inner) : inner_(inner) {}
  at::Tensor forward(const AttentionInputs& inputs) override { return inner_.forward(inputs); }

 private:
  AttentionBackend& inner_;
};

// Multiples of `step` in ascending order, up to `last`; then nothing.
class Ascending : public TokenConstraint {
 public:
  Ascending(int32_t step, int32_t last) : step_(step), last_(last) {}
  bool allowed(int32_t* bits) override {
    std::fill(bits, bits + 4, 0);
    bool any = false;
    for (int32_t t = next_; t <= last_; t += step_)
      bits[t / 32] |= static_cast<int32_t>(uint32_t{1} << (t % 32)), any = true;
    return any;
  }
  void accept(int32_t token) override { next_ = token + step_; }
  bool complete() const override { return next_ > last_ && last_ > 0; }

 private:
  int32_t step_, last_, next_ = 0;
};

TEST(Engine, AnswersUnderAConstraintKeepItAndOthersAreAsAlone) {
  const uint64_t seed = test::fresh_seed();
  const Backbone backbone = Backbone::random(small_config(), at::kCPU, at::kFloat, seed);
  const auto stack = [&] {
    return AttentionStack(backbone, nullptr, {MethodSpec{}}, {.num_pages = 60, .num_sequences = 6});
  };
  Request free = request_of(random_tokens(50, 101), 30), tied = free, stuck = free;
  tied.completions = 3, tied.sampling.temperature = 5;
  tied.constraint = [] { return std::make_unique<Ascending>(7, 98); };
  stuck.constraint = [] { return std::make_unique<Ascending>(3, -1); };
  AttentionStack of_one = stack(), of_all = stack();
  Engine one(backbone, of_one, {}), all(backbone, of_all, {.max_sequences = 6});
  const auto alone = generate(one, {free});
  std::vector<std::vector<int32_t>> tokens(3);
  std::vector<int32_t> others;
  std::string error;
  all.add(free), all.add(tied), all.add(stuck);
  while (!all.idle())
    for (const Event& event : all.step()) {
      if (event.request == 2) error = event.error;
      if (event.request == 1 && event.finish) {
        EXPECT_EQ(*event.finish, FinishReason::stop);
      }
      if (!event.token) continue;
      (event.request == 0 ? others : tokens[static_cast<size_t>(event.completion)])
          .push_back(event.token->token);
    }
  EXPECT_EQ(others, alone[0][0].tokens);
  EXPECT_NE(error.find("no token"), std::string::npos);
  for (const auto& answer : tokens) {
    ASSERT_FALSE(answer.empty());
    EXPECT_EQ(answer.back(), 98);
    for (size_t i = 0; i < answer.size(); ++i) {
      EXPECT_EQ(answer[i] % 7, 0);
      if (i) {
        EXPECT_GT(answer[i], answer[i - 1]);
      }
    }
  }
  EXPECT_EQ(of_all.cache().num_free_pages(), of_all.cache().num_pages());
}

TEST(Stack, PreparedAndJoinedEqualUnprepared) {
  const uint64_t seed = test::fresh_seed();
  for (const ModelConfig& config :
       {testing::small_qwen3(), testing::small_qwen3_5(), testing::small_qwen2(), testing::small_smollm3()}) {
    SCOPED_TRACE(config.architecture);
    const Backbone backbone = Backbone::random(config, at::kCPU, at::kFloat, seed);
    Selector selector(SelectorConfig{}, config, at::kCPU, at::kFloat, seed);
    const int64_t layer = config.full_attention_layers().front();
    std::vector<at::Tensor> before;
    for (const at::Tensor& parameter : selector.parameters()) before.push_back(parameter.clone());
    const Backbone::Projection projection = backbone.projection(layer);
    const at::Tensor weight = projection.weight.clone();
    EXPECT_EQ(projection.bias.defined(), config.qkv_bias);
    const at::Tensor bias = config.qkv_bias ? projection.bias.clone() : at::Tensor();
    MethodSettings settings;
    settings.budget = 64, settings.sinks = 16, settings.recency = 16, settings.floor = 32;
    settings.cache_format = "f32";
    // Two selectors' worth of stores: the prologue serves one of them.
    const std::vector<MethodSpec> methods = {MethodSpec{}, make_spec("spot", settings, nullptr),
                                             make_spec("spot", settings, nullptr)};
    std::vector<at::Tensor> hidden;
    for (int way = 0; way < 3; ++way) {
      if (way == 2) selector.join(backbone);
      AttentionStack stack(backbone, &selector, methods, {.num_pages = 40, .num_sequences = 3});
      Unprepared plain(stack);
      AttentionBackend& backend = way == 0 ? static_cast<AttentionBackend&>(plain) : stack;
      std::vector<BatchEntry> entries(3);
      for (BatchEntry& entry : entries) entry.sequence = stack.cache().open_sequence();
      for (int32_t i = 0; i < 260; ++i) entries[static_cast<size_t>(i % 7) / 3].tokens.push_back(i * 31 % 97);
      const std::vector<Route> routes = {{.method = 0}, {.method = 1}, {.method = 2}};
      const auto run = [&] {
        const Batch batch = build_batch(stack.cache(), entries);
        stack.begin_pass(batch, routes);
        return backbone.forward(batch, backend, stack.cache().states());
      };
      at::Tensor all = run();
      for (int32_t step = 0; step < 5; ++step) {
        for (int32_t i = 0; i < 3; ++i) entries[static_cast<size_t>(i)].tokens = {step + 30 * i};
        all = at::cat({all, run()});
      }
      hidden.push_back(all);
    }
    for (int way : {1, 2})
      EXPECT_LT(((hidden[way] - hidden[0]).norm() / hidden[0].norm()).item<double>(), 1e-4) << "way " << way;
    // Only the memory has moved.
    const std::vector<at::Tensor> after = selector.parameters();
    for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(at::equal(after[i], before[i]));
    EXPECT_TRUE(at::equal(backbone.projection(layer).weight, weight));
    EXPECT_TRUE(backbone.projection(layer).weight.is_alias_of(after.front()));
    if (config.qkv_bias) {
      EXPECT_TRUE(at::equal(backbone.projection(layer).bias, bias));
    }
  }
}

// prefill=auto reads a chunk as its prompt's context asks for, wherever the chunk ends.
TEST(Stack, PrefillGoesByTheContext) {
  const uint64_t seed = test::fresh_seed();
  const ModelConfig config = testing::small_qwen3();
  const Backbone backbone = Backbone::random(config, at::kCPU, at::kFloat, seed);
  std::vector<MethodSpec> methods;
  for (const char* mode : {"auto", "dense", "sparse"})
    methods.push_back(parse_method(fmt::format("oracle:k=48,sinks=16,recency=16,floor=32,prefill={}", mode),
                                   MethodSettings{}, nullptr));
  AttentionStack stack(backbone, nullptr, methods, {.num_pages = 80, .num_sequences = 4});
  const std::vector<Route> routes = {{.method = 0, .context = kSparsePrefillFrom - 1},
                                     {.method = 1},
                                     {.method = 0, .context = kSparsePrefillFrom},
                                     {.method = 2}};
  std::vector<BatchEntry> entries(routes.size());
  for (BatchEntry& entry : entries) {
    entry.sequence = stack.cache().open_sequence();
    for (int32_t i = 0; i < 250; ++i) entry.tokens.push_back(i * 31 % 97);
  }
  const Batch batch = build_batch(stack.cache(), entries);
  stack.begin_pass(batch, routes);
  const auto rows = backbone.forward(batch, stack, stack.cache().states()).chunk(4);
  const auto apart = [&](int a, int b) {
    return ((rows[a] - rows[b]).norm() / rows[b].norm()).item<double>();
  };
  EXPECT_LT(apart(0, 1), 1e-5);
  EXPECT_LT(apart(2, 3), 1e-5);
  EXPECT_GT(apart(1, 3), 1e-3);
}

// A short prompt is read densely, so that what is kept of it serves requests of other methods too; what is read
// sparsely serves none.
TEST(Engine, DenselyReadPromptsAreSharedUnderAuto) {
  const uint64_t seed = test::fresh_seed();
  const Backbone backbone = Backbone::random(testing::small_qwen3(), at::kCPU, at::kFloat, seed);
  std::vector<MethodSpec> methods = {MethodSpec{}};
  for (const char* mode : {"auto", "sparse"})
    methods.push_back(parse_method(fmt::format("oracle:k=48,sinks=16,recency=16,floor=32,prefill={}", mode),
                                   MethodSettings{}, nullptr));
  AttentionStack stack(backbone, nullptr, methods, {.num_pages = 60, .num_sequences = 1});
  Engine engine(backbone, stack, {.max_sequences = 1});
  const std::vector<int32_t> prompt = random_tokens(200, 101);
  const auto cached = [&](int64_t method) {
    int64_t tokens = -1;
    generate(engine, {request_of(prompt, 2, method)}, [&](const Event& event) {
      if (event.token && tokens < 0) tokens = event.cached_tokens;
    });
    return tokens;
  };
  EXPECT_EQ(cached(0), 0);
  EXPECT_GT(cached(1), 0);
  EXPECT_EQ(cached(2), 0);
}

TEST(Methods, GrammarReadsAllAndNamesWhatIsWrong) {
  MethodSettings base;
  base.p = 0.8, base.dense_layers = 1;
  std::vector<MethodSpec> methods;
  for (const std::string& text : join_methods({"spot:p=0.9", "dense=2", "prefill=sparse", "quest", "k=10%",
                                               "sinks=64", "twilight:p=0.5", "k=512", "dense"}))
    methods.push_back(parse_method(text, base, nullptr));
  ASSERT_EQ(methods.size(), 4u);
  EXPECT_EQ(methods[0].name, "spot:p=0.9,dense=2,prefill=sparse");
  EXPECT_EQ(methods[0].rule.p, 0.9);
  EXPECT_EQ(methods[0].dense_layers, (std::set<int64_t>{0, 1}));
  EXPECT_TRUE(methods[0].has_sparse_prefill());
  EXPECT_EQ(methods[1].rule.budget_fraction, 0.1);
  EXPECT_EQ(methods[1].rule.sinks, 64);
  EXPECT_EQ(methods[1].dense_layers, (std::set<int64_t>{0}));
  EXPECT_FALSE(methods[1].has_sparse_prefill());
  EXPECT_EQ(methods[2].rule.p, 0.5);
  EXPECT_EQ(methods[2].rule.budget, 512);
  EXPECT_EQ(methods[2].describe(), "top-k 512 pruned to 0.5");
  EXPECT_TRUE(methods[3].is_dense());
  EXPECT_EQ(parse_method("oracle", base, nullptr).rule.p, 0.8);
  // What of the base a method reads: not what its own text replaces, nor what it does not know.
  base.recency = 32, base.cache_format = "int8", base.cap = 4096;
  const auto read = [&](const char* text) { return parse_method(text, base, nullptr).from_base; };
  EXPECT_EQ(read("spot"), (std::set<std::string>{"p", "dense", "recency", "cache", "cap"}));
  EXPECT_EQ(read("spot:k=10%,dense=2"), (std::set<std::string>{"recency", "cache"}));
  EXPECT_EQ(read("streaming"), (std::set<std::string>{"dense"}));
  EXPECT_EQ(read("dense"), std::set<std::string>{});
  EXPECT_EQ(parse_method("twilight", {}, nullptr).describe(), "top-k 25% pruned to 0.95");
  base.prefill = PrefillMode::sparse;
  EXPECT_EQ(read("spot:k=10%,cache=int4").count("prefill"), 1u);
  EXPECT_TRUE(parse_method("quest", base, nullptr).reads_sparsely(1));
  EXPECT_FALSE(parse_method("quest:prefill=dense", base, nullptr).reads_sparsely(1 << 20));
  EXPECT_FALSE(parse_method("dense", base, nullptr).reads_sparsely(1 << 20));
  const MethodSpec chooses = parse_method("spot:prefill=auto,tile=64", base, nullptr);
  EXPECT_EQ(chooses.query_tile, 64);
  EXPECT_FALSE(chooses.reads_sparsely(kSparsePrefillFrom - 1));
  EXPECT_TRUE(chooses.reads_sparsely(kSparsePrefillFrom));
  EXPECT_FALSE(chooses.reads_as(parse_method("spot:prefill=sparse,tile=64", base, nullptr)));
  EXPECT_FALSE(chooses.reads_as(parse_method("spot:prefill=auto,tile=32", base, nullptr)));
  for (const char* bad : {"Dense",
                          "spot:p",
                          "spot:p=",
                          "spot:q=3",
                          "spot:p=0.9x",
                          "spot:p=2",
                          "spot:k=0",
                          "spot:k=1.5",
                          "spot:p=0.9,k=10",
                          "quest:cache=int4",
                          "spot:cache=int5",
                          "dense:prefill=sparse",
                          "spot:prefill=maybe",
                          "spot:prefill=sparse,tile=8",
                          "spot:prefill=sparse,tile=1.5",
                          "quest:tile=16",
                          "spot:prefill=dense,tile=32",
                          "oracle:per=head",
                          "spot:per=layer",
                          "quest:sinks=5%",
                          "streaming:k=100",
                          "streaming:p=0.3",
                          "quest:k=512,cap=2048",
                          "quest:k=512,temperature=2",
                          "dense:p=0.5",
                          "twilight:cap=99",
                          "spot:dense=999999999"})
    EXPECT_THROW(
        {
          const MethodSpec spec = parse_method(bad, {}, nullptr);
          const Backbone backbone = Backbone::random(testing::small_qwen3(), at::kCPU, at::kFloat, 1);
          AttentionStack(backbone, nullptr, {spec}, {.num_pages = 4});
        },
        Error)
        << bad;
}

TEST(Methods, AMassBecomesTheThresholdThatTheSelectorNames) {
  SelectorConfig fitted;
  fitted.selection.residual_mass = {0.5};
  fitted.selection.mass_table = {{0.01, 0.6, 0.1}, {0.0001, 0.8, 0.2}, {0.00001, 0.9, 0.4}};
  const MethodSpec spec = parse_method("spot:m=0.7,floor=64", {}, &fitted);
  EXPECT_EQ(spec.rule.mode, SelectionMode::threshold);
  EXPECT_NEAR(spec.rule.threshold, 0.001, 1e-12);  // half of the way in mass, halfway in log threshold
  EXPECT_EQ(spec.rule.floor, 64);
  EXPECT_TRUE(parse_method("spot:t=0.01", {}, &fitted).reads_as(parse_method("spot:m=0.6", {}, &fitted)));
  MethodSettings base;
  base.mass = 0.8;
  EXPECT_NEAR(parse_method("spot", base, &fitted).rule.threshold, 1e-4, 1e-12);
  EXPECT_EQ(parse_method("spot", base, &fitted).from_base, (std::set<std::string>{"m"}));
  EXPECT_EQ(parse_method("spot:p=0.5", base, &fitted).rule.mode, SelectionMode::top_p);
  EXPECT_EQ(parse_method("spot:p=0.5", base, &fitted).from_base, std::set<std::string>{});
  // It is fitted for the selector's scores: other methods go on without it.
  EXPECT_EQ(parse_method("quest", base, &fitted).rule.mode, SelectionMode::top_p);
  EXPECT_EQ(parse_method("quest", base, &fitted).from_base, std::set<std::string>{});
  base = {.p = 0.5};
  EXPECT_NEAR(parse_method("spot:m=0.9", base, &fitted).rule.threshold, 1e-5, 1e-12);
  const auto error = [&](const char* text, const SelectorConfig* selector) -> std::string {
    try {
      parse_method(text, {}, selector);
      return "";
    } catch (const Error& e) {
      return e.what();
    }
  };
  const SelectorConfig plain;
  for (const auto& [text, selector, part] :
       std::vector<std::tuple<const char*, const SelectorConfig*, const char*>>{
           {"spot:m=0.95", &fitted, "0.6000 to 0.9000"},
           {"spot:m=0.8", &plain, "spot calibrate"},
           {"spot:m=0.8", nullptr, "needs a selector"},
           {"spot:m=0.8,p=0.9", &fitted, "give one of them"},
           {"spot:m=0.8,t=0.01", &fitted, "give one of them"},
           {"spot:m=0.8,k=10%", &fitted, "give one of them"},
           {"spot:m=80%", &fitted, "'m=80%' is not one of"},
           {"spot:p=0.9,p=0.8", &fitted, "p= is given twice"},
           {"quest:k=5%,k=5%", &fitted, "k= is given twice"},
           {"spot:cache=int4,cache=int8", &fitted, "cache= is given twice"},
           {"oracle:m=0.8", &fitted, "m= has no effect"},
           {"quest:m=0.8", &fitted, "m= has no effect"},
           {"twilight:m=0.8", &fitted, "m= has no effect"}})
    EXPECT_NE(error(text, selector).find(part), std::string::npos) << text << ": " << error(text, selector);
}

TEST(Stack, SpotNeedsASelector) {
  const Backbone backbone = Backbone::random(small_config(), at::kCPU, at::kFloat, 14);
  EXPECT_THROW(AttentionStack(backbone, nullptr, {make_spec("spot", {}, nullptr)}, {.num_pages = 4}), Error);
}

}  // namespace
}  // namespace spot

// The engine under random schedules: whatever shares a step, however prompts are cut, whatever the prefix cache
// holds and whoever gives way, a float32 model writes the text it writes alone.
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "core/error.h"
#include "engine/engine.h"
#include "tests/model/configs.h"
#include "tests/selector/support.h"

namespace spot {
namespace {

ModelConfig family(const std::string& name) {
  if (name == "qwen3") return testing::small_qwen3();
  if (name == "qwen3_5") return testing::small_qwen3_5();
  ModelConfig config = test::small_model(48, 3, 6, 2, 16);
  config.architecture = "LlamaForCausalLM", config.model_type = "llama", config.qk_norm = false;
  config.vocab_size = 101, config.max_position_embeddings = 400;
  return config;
}

MethodSpec sparse(const std::string& word, PrefillMode prefill = PrefillMode::dense, int32_t budget = 48) {
  MethodSpec spec{.name = word, .word = word};
  spec.rule.mode = SelectionMode::top_k;
  spec.rule.budget = budget, spec.rule.sinks = 16, spec.rule.recency = 16, spec.rule.floor = 32;
  spec.prefill = prefill;
  spec.cache_format = KeyFormat::f32;  // four bits would turn rounding into another code
  return spec;
}

struct World {
  Backbone backbone;
  Selector selector;
  std::vector<MethodSpec> methods;
  std::vector<MethodSpec> later;  // that no engine is made with

  World(const std::string& name, uint64_t seed)
      : backbone(Backbone::random(family(name), at::kCPU, at::kFloat, seed)),
        selector(SelectorConfig{}, backbone.config(), at::kCPU, at::kFloat, seed),
        methods({MethodSpec{}, sparse("spot"), sparse("quest"), sparse("streaming"),
                 sparse("spot", PrefillMode::sparse)}),
        later({sparse("spot", PrefillMode::dense, 64), sparse("quest", PrefillMode::dense, 64),
               sparse("spot", PrefillMode::sparse, 64), sparse("spot"), sparse("oracle")}) {
    later[3].rule.mode = SelectionMode::top_p, later[3].rule.p = 0.7;
  }
  // By the number that a request of random_requests has for its method.
  const MethodSpec& method(int64_t number) const {
    const auto index = static_cast<size_t>(number);
    return index < methods.size() ? methods[index] : later[index - methods.size()];
  }

  std::unique_ptr<AttentionStack> stack(int64_t pages, int64_t sequences, int64_t snapshots) const {
    return std::make_unique<AttentionStack>(
        backbone, &selector, methods,
        StackOptions{.num_pages = pages, .num_sequences = sequences, .num_snapshots = snapshots});
  }
};

std::vector<Request> random_requests(std::mt19937_64& random, const World& world, int count) {
  const int64_t vocab = world.backbone.config().vocab_size;
  const auto token = [&] { return static_cast<int32_t>(random() % static_cast<uint64_t>(vocab)); };
  std::vector<std::vector<int32_t>> texts(2);  // whose beginnings the prompts share
  for (auto& text : texts)
    for (int i = 0; i < 160; ++i) text.push_back(token());
  std::vector<Request> requests;
  for (int i = 0; i < count; ++i) {
    Request request;
    const auto& text = texts[random() % texts.size()];
    request.prompt.assign(text.begin(), text.begin() + 1 + static_cast<int64_t>(random() % 150));
    for (uint64_t j = random() % 20; j > 0; --j) request.prompt.push_back(token());
    if (random() % 3 == 0) request.context = static_cast<int64_t>(random() % (request.prompt.size() + 1));
    request.max_new_tokens = 1 + static_cast<int64_t>(random() % (random() % 3 ? 24 : 80));
    request.completions = random() % 5 ? 1 : 2;
    request.method = static_cast<int64_t>(random() % (world.methods.size() + world.later.size()));
    request.sampling.logprobs = 2;
    if (random() % 3 == 0) request.sampling.temperature = 1, request.sampling.top_k = 3;
    if (random() % 4 == 0) request.sampling.repetition_penalty = 1.3;
    request.sampling.seed = random();
    requests.push_back(std::move(request));
  }
  return requests;
}

// Whether two of the likeliest tokens were so near that rounding may choose.
bool near_tie(const SampledToken& token) {
  return token.top.size() == 2 && token.top[0].logprob - token.top[1].logprob < 1e-4;
}

void expect_same(const GeneratedAnswer& expected, const std::vector<int32_t>& tokens,
                 const std::string& what) {
  for (size_t i = 0; i < std::min(tokens.size(), expected.tokens.size()); ++i) {
    if (tokens[i] == expected.tokens[i]) continue;
    EXPECT_TRUE(near_tie(expected.sampled[i])) << what << " differs at token " << i;
    return;
  }
  EXPECT_EQ(tokens.size(), expected.tokens.size()) << what;
}

class Scheduling : public ::testing::TestWithParam<std::string> {};

TEST_P(Scheduling, EveryAnswerIsAsAlone) {
  std::mt19937_64 random(test::fresh_seed());
  at::set_num_threads(1);
  int64_t preemptions = 0, cached = 0, cancelled = 0, refused = 0;
  // Random schedules may all be idle ones: then further rounds, crowded like the first.
  const auto busy = [&] { return preemptions > 0 && cached > 0 && cancelled > 0 && refused > 0; };
  for (int round = 0; round < 4 || (!busy() && round < 40); ++round) {
    const bool crowded = round == 0 || round >= 4;
    const World world(GetParam(), random());
    const std::vector<Request> requests = random_requests(random, world, 16);
    std::vector<std::vector<GeneratedAnswer>> alone;
    {
      const auto stack = world.stack(40, 1, 0);
      Engine engine(world.backbone, *stack,
                    {.max_step_tokens = 400, .max_sequences = 1, .prefix_cache = false});
      for (Request request : requests) {
        request.method = engine.method(world.method(request.method));
        alone.push_back(generate(engine, {request})[0]);
      }
    }

    int64_t longest = 0;
    for (const Request& r : requests)
      longest = std::max(longest, static_cast<int64_t>(r.prompt.size()) + r.max_new_tokens);
    // Crowded: many sequences on few pages.
    const int64_t sequences = crowded ? 6 : 1 + static_cast<int64_t>(random() % 6);
    const int64_t spare = crowded ? 2 : static_cast<int64_t>(random() % 12);
    const auto stack =
        world.stack((longest + 15) / 16 + spare, sequences, static_cast<int64_t>(random() % 4));
    const int64_t pages = stack->cache().num_free_pages();
    EngineOptions options{.max_step_tokens = sequences + 16 + static_cast<int64_t>(random() % 150),
                          .max_sequences = sequences,
                          // Two of those that come later at once: others have to wait for a place.
                          .max_methods = static_cast<int64_t>(world.methods.size()) + 2,
                          .prefix_cache = crowded || random() % 4 != 0};
    Engine engine(world.backbone, *stack, options);
    std::map<int64_t, size_t> request_of;  // by the engine's number
    std::map<std::pair<size_t, int64_t>, std::vector<int32_t>> tokens;
    std::map<std::pair<size_t, int64_t>, FinishReason> finished;
    std::vector<size_t> gone;
    size_t next = 0;
    while (next < requests.size() || !engine.idle()) {
      while (next < requests.size() && (random() % 3 || engine.idle())) {
        Request request = requests[next];
        try {
          request.method = engine.method(world.method(request.method));
        } catch (const Error&) {
          EXPECT_FALSE(engine.idle());
          ++refused;
          break;
        }
        request_of[engine.add(request)] = next;
        ++next;
      }
      if (random() % 12 == 0 && !request_of.empty()) {
        const auto victim = std::next(request_of.begin(), static_cast<int64_t>(random() % request_of.size()));
        engine.cancel(victim->first);
        gone.push_back(victim->second);
        ++cancelled;
      }
      for (const Event& event : engine.step()) {
        const std::pair key{request_of.at(event.request), event.completion};
        EXPECT_EQ(finished.count(key), 0u) << "an event after the end";
        EXPECT_EQ(event.error, "");
        if (event.token) tokens[key].push_back(event.token->token);
        if (event.finish) finished[key] = *event.finish;
      }
      stack->cache().allocator().check();
    }
    for (size_t i = 0; i < requests.size(); ++i) {
      const bool was_cancelled = std::find(gone.begin(), gone.end(), i) != gone.end();
      for (int64_t c = 0; c < requests[i].completions; ++c) {
        std::vector<int32_t>& got = tokens[{i, c}];
        GeneratedAnswer expected = alone[i][static_cast<size_t>(c)];
        if (was_cancelled && !finished.count({i, c}) && got.size() < expected.tokens.size())
          expected.tokens.resize(got.size());
        expect_same(expected, got,
                    fmt::format("{} round {} request {} answer {} by {}", GetParam(), round, i, c,
                                world.method(requests[i].method).name));
        EXPECT_TRUE(was_cancelled || finished.count({i, c}));
      }
    }
    EXPECT_EQ(stack->cache().num_free_pages(), pages);
    EXPECT_EQ(stack->cache().allocator().num_sequences(), 0);
    preemptions += engine.statistics().preemptions;
    cached += engine.statistics().cached_tokens;
  }
  EXPECT_TRUE(busy()) << preemptions << " preemptions, " << cached << " tokens cached, " << cancelled
                      << " cancelled, " << refused << " refused";
}

TEST(Methods, ComeLaterWithTheStoresThatAreThere) {
  const World world("qwen3", test::fresh_seed());
  const auto stack = world.stack(8, 2, 0);
  Engine engine(world.backbone, *stack, {.max_step_tokens = 64, .max_sequences = 2, .max_methods = 7});
  // One store for each kind, whatever the number of methods; equal ones are one.
  const int64_t bytes = stack->cache().pools().page_bytes();
  EXPECT_EQ(engine.method(sparse("spot")), 1);
  const int64_t first = engine.method(world.later[0]), second = engine.method(world.later[1]);
  EXPECT_EQ(first, 5);
  EXPECT_EQ(engine.method(world.later[0]), 5);
  EXPECT_EQ(second, 6);
  EXPECT_EQ(engine.method(world.later[2]), second);  // in place of the one asked for least recently
  EXPECT_EQ(stack->cache().pools().page_bytes(), bytes);
  MethodSpec other = sparse("spot");
  other.cache_format = KeyFormat::bf16;
  EXPECT_THROW(engine.method(other), Error);
  EXPECT_THROW(engine.method(sparse("twilight")), Error);
  EXPECT_EQ(stack->methods().size(), 7u);
  // Those in use stay.
  Request request;
  request.prompt.assign(40, 7), request.max_new_tokens = 4;
  for (const int64_t method : {first, second}) request.method = method, engine.add(request);
  EXPECT_THROW(engine.method(world.later[3]), Error);
  while (!engine.idle()) engine.step();
  EXPECT_EQ(engine.method(world.later[3]), first);
}

// A context is read once, whichever methods ask of it in turn and however little room there is beside it.
TEST_P(Scheduling, AContextIsReadOnceForAllMethods) {
  std::mt19937_64 random(test::fresh_seed());
  const World world(GetParam(), random());
  std::vector<int32_t> prompt(181);
  for (int32_t& token : prompt) token = static_cast<int32_t>(random() % 90);
  const int64_t context = 163;  // whole blocks: 160
  const auto stack = world.stack(14, 1, 4);
  Engine engine(world.backbone, *stack, {.max_step_tokens = 64, .max_sequences = 1});
  const auto cached_by = [&](int64_t method) {
    const int64_t before = engine.statistics().cached_tokens;
    Request request;
    request.prompt = prompt, request.context = context, request.max_new_tokens = 8;
    request.method = method;
    generate(engine, {request});
    return engine.statistics().cached_tokens - before;
  };
  EXPECT_EQ(cached_by(0), 0);  // dense, which reads past the context
  for (int64_t method : {1, 2, 3, 1}) EXPECT_EQ(cached_by(method), 160) << "method " << method;
}

INSTANTIATE_TEST_SUITE_P(, Scheduling, ::testing::Values("llama", "qwen3", "qwen3_5"));

}  // namespace
}  // namespace spot

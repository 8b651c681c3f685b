// The engine for Python: torch.classes.spot.Engine, which spotattention.Engine wraps. A class of torch's own kind, so that
// one library serves every Python version. Requests and events cross as JSON: a few hundred bytes a step.
#include "engine/engine.h"

#include <torch/custom_class.h>

#include <nlohmann/json.hpp>
#include <optional>

#include "attention/stack.h"
#include "checkpoint/hub.h"
#include "core/error.h"
#include "core/progress.h"
#include "engine/self_check.h"
#include "ops/device.h"

namespace spot {
namespace {

using nlohmann::json;

const char* finish_word(FinishReason reason) {
  switch (reason) {
    case FinishReason::stop:
      return "stop";
    case FinishReason::length:
      return "length";
    case FinishReason::cancelled:
      return "cancelled";
    case FinishReason::error:
      return "error";
  }
  return "";
}

json to_json(const Event& event) {
  json object = {{"request", event.request}, {"completion", event.completion}, {"text", event.text}};
  if (event.token) {
    object["token"] = event.token->token;
    object["logprob"] = event.token->logprob;
    json top = json::array();
    for (const TokenLogprob& other : event.token->top) top.push_back({other.token, other.logprob});
    object["top"] = top;
  }
  if (event.finish) {
    object["finish"] = finish_word(*event.finish);
    object["error"] = event.error;
    json attended = json::array();
    for (const AttendedTokens& layer : event.attended)
      attended.push_back({layer.layer, layer.queries, layer.attended, layer.visible});
    object["attended"] = attended;
  }
  return object;
}

at::Device device_of(const std::string& name) {
  const bool cuda = at::globalContext().hasCUDA();
  if (name != "auto" && name != "cpu" && name.rfind("cuda", 0) != 0)
    fail("device '{}' is unknown; give auto, cpu, cuda or cuda:N", name);
  if (name == "cpu" || (name == "auto" && !cuda)) return at::Device(at::kCPU);
  if (!cuda) fail("device '{}': this build of torch has no CUDA; use device cpu", name);
  const at::Device device(name == "auto" || name == "cuda" ? "cuda:0" : name);
  if (const std::string refusal = ops::device_refusal(device); !refusal.empty())
    fail("device '{}': {}", device.str(), refusal);
  return device;
}

std::optional<at::ScalarType> dtype_of(const std::string& name) {
  if (name == "auto") return {};
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  fail("dtype '{}' is unknown; give auto, float32, bfloat16 or float16", name);
}

class EngineHandle : public torch::CustomClassHolder {
 public:
  // options: device, dtype, kv_cache_dtype, cache_tokens, max_sequences, max_step_tokens, prefix_cache, graphs, self_check
  EngineHandle(const std::string& model, const std::string& selector, const std::vector<std::string>& methods,
               const std::string& options_text) {
    silence();
    const json options = json::parse(options_text);
    const std::string kv_word = options.at("kv_cache_dtype");
    const std::optional<KvCacheDtype> kv_cache = kv_cache_dtype(kv_word);
    if (!kv_cache) fail("kv_cache_dtype '{}' is unknown; give auto or fp8", kv_word);
    const std::filesystem::path folder = find_checkpoint(model);
    backbone_.emplace(Backbone::load(folder, device_of(options.at("device")), dtype_of(options.at("dtype"))));
    const Backbone& backbone = *backbone_;
    if (!selector.empty()) {
      selector_.emplace(
          Selector::load(selector, folder, backbone.config(), backbone.device(), backbone.dtype()));
      foreign_ = foreign_weights(*selector_, backbone);
      selector_->join(backbone);
    }
    std::vector<MethodSpec> specs;
    for (const std::string& method : methods)
      check_kv_cache(*kv_cache, specs.emplace_back(
                                    parse_method(method, {}, selector_ ? &selector_->config() : nullptr)));
    const int64_t sequences = options.at("max_sequences"), tokens = options.at("cache_tokens");
    if (sequences < 1 || tokens < 1)
      fail("engine: max_sequences is {} and cache_tokens {}; both must be at least 1", sequences, tokens);
    stack_.emplace(backbone, selector_ ? &*selector_ : nullptr, specs,
                   StackOptions{.num_pages = (tokens + kBlockSize - 1) / kBlockSize,
                                .num_sequences = sequences,
                                .num_snapshots = sequences,
                                .kv_scales = kv_scales(*kv_cache, backbone)});
    tokenizer_.emplace(Tokenizer::load(folder));
    const int64_t every = options.at("self_check");
    engine_.emplace(
        backbone, *stack_,
        EngineOptions{.max_step_tokens = options.at("max_step_tokens"),
                      .max_sequences = sequences,
                      .prefix_cache = options.at("prefix_cache"),
                      .graphs = options.at("graphs"),
                      .tokenizer = &*tokenizer_,
                      .observe_every = foreign_.empty() ? every : std::min(every, kForeignCheckEvery),
                      .observer = [this](const SelectionEvent& event, int64_t row, int64_t, int64_t) {
                        check_.add(event, row);
                      }});
  }

  int64_t add(const std::vector<int64_t>& prompt, int64_t method, const std::string& request_text) {
    const json asked = json::parse(request_text);
    Request request;
    for (const int64_t token : prompt) {
      if (token < 0 || token >= backbone_->config().vocab_size)
        fail("the prompt holds token {}; the model's vocabulary has {}", token,
             backbone_->config().vocab_size);
      request.prompt.push_back(static_cast<int32_t>(token));
    }
    request.method = method;
    request.max_new_tokens = asked.at("max_new_tokens");
    request.completions = asked.at("completions");
    request.stop_ids = asked.at("stop_ids").is_null() ? backbone_->config().eos_token_ids
                                                      : asked.at("stop_ids").get<std::vector<int64_t>>();
    request.stop_strings = asked.at("stop").get<std::vector<std::string>>();
    SamplingOptions& sampling = request.sampling;
    sampling.temperature = asked.at("temperature");
    sampling.top_k = asked.at("top_k");
    sampling.top_p = asked.at("top_p");
    sampling.min_p = asked.at("min_p");
    sampling.repetition_penalty = asked.at("repetition_penalty");
    sampling.presence_penalty = asked.at("presence_penalty");
    sampling.frequency_penalty = asked.at("frequency_penalty");
    sampling.logit_bias = asked.at("logit_bias").get<std::vector<std::pair<int32_t, double>>>();
    sampling.seed = asked.at("seed");
    sampling.logprobs = asked.at("logprobs");
    return engine_->add(std::move(request));
  }

  std::string step() {
    json events = json::array();
    for (const Event& event : engine_->step()) events.push_back(to_json(event));
    return events.dump(-1, ' ', false, json::error_handler_t::replace);
  }

  void cancel(int64_t request) { engine_->cancel(request); }
  bool idle() const { return engine_->idle(); }

  std::string statistics() const {
    const EngineStatistics s = engine_->statistics();
    return json{{"prompt_tokens", s.prompt_tokens},
                {"cached_tokens", s.cached_tokens},
                {"read_tokens", s.read_tokens},
                {"decode_tokens", s.decode_tokens},
                {"steps", s.steps},
                {"preemptions", s.preemptions},
                {"prefill_seconds", s.prefill_seconds},
                {"decode_seconds", s.decode_seconds},
                {"running", engine_->num_running()},
                {"waiting", engine_->num_waiting()}}
        .dump();
  }

  // [[layer, samples, mean]] of the self-check.
  std::string captured() const {
    json layers = json::array();
    for (const auto& [layer, sum] : check_.layers()) layers.push_back({layer, sum.samples, sum.mean()});
    return layers.dump();
  }

  // A sentence where the selector was distilled on other weights; else empty.
  std::string foreign() const { return foreign_; }

  std::vector<int64_t> encode(const std::string& text) const {
    const std::vector<int32_t> ids = tokenizer_->encode(text, /*add_special_tokens=*/true);
    return {ids.begin(), ids.end()};
  }

 private:
  SelfCheck check_;
  std::string foreign_;
  // In the order of their lives: each reads those before it.
  std::optional<Backbone> backbone_;
  std::optional<Selector> selector_;
  std::optional<AttentionStack> stack_;
  std::optional<Tokenizer> tokenizer_;
  std::optional<Engine> engine_;
};

TORCH_LIBRARY_FRAGMENT(spot, library) {
  library.class_<EngineHandle>("Engine")
      .def(torch::init<const std::string&, const std::string&, const std::vector<std::string>&,
                       const std::string&>())
      .def("add", &EngineHandle::add)
      .def("step", &EngineHandle::step)
      .def("cancel", &EngineHandle::cancel)
      .def("idle", &EngineHandle::idle)
      .def("statistics", &EngineHandle::statistics)
      .def("captured", &EngineHandle::captured)
      .def("foreign", &EngineHandle::foreign)
      .def("encode", &EngineHandle::encode);
}

}  // namespace
}  // namespace spot

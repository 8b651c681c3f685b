// Runs a model folder over token ids and writes all logits, for comparison with another implementation:
//
//   logits_tool FOLDER INPUT.json OUTPUT.safetensors [float32|bfloat16] [cpu|cuda]
//
// INPUT.json: {"sequences": [[ids], ...], "chunks": [lengths], "prompts": [lengths]}. For each sequence i the
// output holds
//   prefill.i  the whole sequence at once
//   chunked.i  in chunks of the lengths given, repeated cyclically
//   decode.i   the first prompts[i] tokens at once, the rest one by one
//   batch.i    as decode.i, but all sequences together, each leaving the batch when it ends
// each [tokens, vocab_size] float32, and the model's rotary table as rope.cos and rope.sin.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "checkpoint/safetensors.h"
#include "core/error.h"
#include "core/files.h"
#include "model/backbone.h"
#include "model/rope.h"
#include "tests/model/dense_attention.h"

namespace spot {
namespace {

using Tokens = std::vector<int32_t>;

int64_t pages_for(const std::vector<Tokens>& sequences) {
  int64_t pages = 0;
  for (const Tokens& tokens : sequences) pages += static_cast<int64_t>(tokens.size()) / 16 + 1;
  return pages;
}

class Runner {
 public:
  Runner(const Backbone& model, const std::vector<Tokens>& sequences)
      : model_(model),
        cache_(model.config(), pages_for(sequences), model.dtype(), model.device(),
               static_cast<int64_t>(sequences.size())),
        attention_(cache_) {
    for (const Tokens& tokens : sequences) {
      ids_.push_back(cache_.open_sequence());
      left_.push_back(tokens);
      logits_.emplace_back();
    }
  }

  // Runs the next count[i] tokens of each sequence i (or what is left of it) in one forward pass.
  void step(const std::vector<int64_t>& count) {
    std::vector<int64_t> sequences;
    std::vector<Tokens> tokens;
    std::vector<size_t> owner;
    for (size_t i = 0; i < ids_.size(); ++i) {
      const auto end = left_[i].begin() + std::min<int64_t>(count[i], static_cast<int64_t>(left_[i].size()));
      if (end == left_[i].begin()) continue;
      sequences.push_back(ids_[i]);
      tokens.emplace_back(left_[i].begin(), end);
      left_[i].erase(left_[i].begin(), end);
      owner.push_back(i);
    }
    const Batch batch = make_batch(cache_, sequences, tokens);
    const at::Tensor logits = model_.logits(model_.forward(batch, attention_, cache_.states())).cpu();
    int64_t first = 0;
    for (size_t i = 0; i < owner.size(); ++i) {
      logits_[owner[i]].push_back(logits.narrow(0, first, batch.query_lengths[i]));
      first += batch.query_lengths[i];
    }
  }

  bool done() const {
    for (const Tokens& tokens : left_) {
      if (!tokens.empty()) return false;
    }
    return true;
  }

  at::Tensor logits(size_t i) const { return at::cat(logits_[i]); }

 private:
  const Backbone& model_;
  ModelCache cache_;
  testing::GatheredAttention attention_;
  std::vector<int64_t> ids_;
  std::vector<Tokens> left_;
  std::vector<std::vector<at::Tensor>> logits_;
};

void run(const std::vector<std::string>& arguments) {
  const at::ScalarType dtype =
      arguments.size() > 3 && arguments[3] == "bfloat16" ? at::kBFloat16 : at::kFloat;
  const at::Device device(arguments.size() > 4 ? arguments[4] : "cpu");
  const Backbone model = Backbone::load(arguments[0], device, dtype);
  const nlohmann::json input = read_json(arguments[1]);
  const auto sequences = input.at("sequences").get<std::vector<Tokens>>();
  const auto chunks = input.at("chunks").get<std::vector<int64_t>>();
  const auto prompts = input.at("prompts").get<std::vector<int64_t>>();

  std::vector<std::pair<std::string, at::Tensor>> outputs;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const auto keep = [&](const std::string& mode, const Runner& runner) {
      outputs.emplace_back(fmt::format("{}.{}", mode, i), runner.logits(0));
    };
    Runner whole(model, {sequences[i]});
    whole.step({static_cast<int64_t>(sequences[i].size())});
    keep("prefill", whole);
    Runner chunked(model, {sequences[i]});
    for (size_t c = 0; !chunked.done(); ++c) chunked.step({chunks[c % chunks.size()]});
    keep("chunked", chunked);
    Runner decode(model, {sequences[i]});
    decode.step({prompts[i]});
    while (!decode.done()) decode.step({1});
    keep("decode", decode);
  }
  Runner batch(model, sequences);
  batch.step(prompts);
  while (!batch.done()) batch.step(std::vector<int64_t>(sequences.size(), 1));
  for (size_t i = 0; i < sequences.size(); ++i)
    outputs.emplace_back(fmt::format("batch.{}", i), batch.logits(i));
  const ModelConfig& config = model.config();
  const RopeTable rope = rope_table(config.rope, config.max_position_embeddings, at::kCPU);
  outputs.emplace_back("rope.cos", rope.cos);
  outputs.emplace_back("rope.sin", rope.sin);
  write_safetensors(arguments[2], outputs, {{"fingerprint", model.fingerprint()}});
}

}  // namespace
}  // namespace spot

int main(int argc, char** argv) {
  try {
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    if (arguments.size() < 3)
      spot::fail("usage: logits_tool FOLDER INPUT.json OUTPUT.safetensors [dtype] [device]");
    spot::run(arguments);
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", spot::first_line(e).c_str());
    return 1;
  }
}

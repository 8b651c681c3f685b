// usage: schema_tool TOKENIZER
// Reads lines {"schema": ..., "answers": N, "seed": S} and writes for each {"answers": [texts], "unfinished": count, "seconds": of
// the compilation, "work", "slowest": step's seconds}, processor time both, or {"error": ..., "seconds"}. Answers are drawn from random logits under the constraint,
// a vocabulary padded as models pad theirs; closing characters are made likelier, and more so as the answer grows. With "texts"
// also {"may_be": of each, whether it may be the answer}.
#include <time.h>

#include <iostream>
#include <random>

#include "core/error.h"
#include "grammar/grammar.h"

using namespace spot;
using Json = nlohmann::ordered_json;

namespace {

// Of this thread's own work, however busy the machine is.
double processor_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

constexpr int kMostTokens = 3000;

struct Drawn {
  std::string text;
  bool finished = false;
};

Drawn draw(TokenConstraint& constraint, const Tokenizer& tokenizer, int64_t vocab, std::mt19937_64& random,
           double& slowest) {
  std::vector<int32_t> bits(static_cast<size_t>((vocab + 31) / 32)), ids, allowed, closing;
  const std::vector<int32_t>& stops = tokenizer.eos_ids();
  while (static_cast<int>(ids.size()) < kMostTokens) {
    const auto start = processor_seconds();
    if (!constraint.allowed(bits.data()))
      fail("{}: behind '{}'", constraint.problem(), tokenizer.decode(ids));
    slowest = std::max(slowest, processor_seconds() - start);
    allowed.clear(), closing.clear();
    bool may_stop = false;
    for (int32_t id = 0; id < static_cast<int32_t>(32 * bits.size()); ++id) {
      if (!(static_cast<uint32_t>(bits[static_cast<size_t>(id / 32)]) >> (id % 32) & 1)) continue;
      if (id >= vocab) fail("token {} is allowed and lies outside the vocabulary", id);
      if (std::find(stops.begin(), stops.end(), id) != stops.end()) {
        may_stop = true;
        continue;
      }
      if (tokenizer.is_added(id)) fail("the added token {} is allowed", id);
      allowed.push_back(id);
      const std::string& text = tokenizer.token_text(id);
      if (text == "\"" || text == "}" || text == "]" || text == "\"}" || text == "0" || text == "5")
        closing.push_back(id);
    }
    if (may_stop && (allowed.empty() || random() % 3 == 0)) return {tokenizer.decode(ids), true};
    const auto pressed = static_cast<uint64_t>(std::min<size_t>(20 + ids.size(), 95));
    const std::vector<int32_t>& from = !closing.empty() && random() % 100 < pressed ? closing : allowed;
    if (from.empty()) fail("no token may follow '{}'", tokenizer.decode(ids));
    ids.push_back(from[random() % from.size()]);
    const auto accepted = processor_seconds();
    constraint.accept(ids.back());
    slowest = std::max(slowest, processor_seconds() - accepted);
    if (constraint.complete()) return {tokenizer.decode(ids), true};
  }
  return {tokenizer.decode(ids), false};
}

bool may_be(TokenConstraint& constraint, const Tokenizer& tokenizer, int64_t vocab, const std::string& text) {
  std::vector<int32_t> bits(static_cast<size_t>((vocab + 31) / 32)), ids = tokenizer.encode(text, false);
  ids.push_back(tokenizer.eos_ids().front());
  for (const int32_t id : ids) {
    if (!constraint.allowed(bits.data()) ||
        !(static_cast<uint32_t>(bits[static_cast<size_t>(id / 32)]) >> (id % 32) & 1))
      return false;
    if (id != ids.back()) constraint.accept(id);
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const Tokenizer tokenizer = Tokenizer::load(argv[1]);
  const int64_t vocab = tokenizer.vocab_size() + 37;
  const auto& eos = tokenizer.eos_ids();
  SchemaCompiler compiler(tokenizer, vocab, {eos.begin(), eos.end()});
  for (std::string line; std::getline(std::cin, line);) {
    Json reply;
    const auto begin = processor_seconds();
    try {
      const Json asked = Json::parse(line);
      std::mt19937_64 random(asked.at("seed").get<uint64_t>());
      const auto start = processor_seconds();
      const MakeConstraint make = compiler.compile(asked.at("schema"));
      reply["seconds"] = processor_seconds() - start;
      reply["work"] = compiler.work();
      double slowest = 0;
      int64_t unfinished = 0;
      reply["answers"] = Json::array();
      for (int64_t i = 0; i < asked.at("answers").get<int64_t>(); ++i) {
        const Drawn drawn = draw(*make(), tokenizer, vocab, random, slowest);
        if (drawn.finished)
          reply["answers"].push_back(drawn.text);
        else
          ++unfinished;
      }
      for (const auto& text : asked.value("texts", Json::array()))
        reply["may_be"].push_back(may_be(*make(), tokenizer, vocab, text.get<std::string>()));
      reply["unfinished"] = unfinished, reply["slowest"] = slowest;
    } catch (const std::exception& error) {
      reply = {{"error", error.what()}, {"seconds", processor_seconds() - begin}};
    }
    std::cout << reply.dump(-1, ' ', true, Json::error_handler_t::replace) << std::endl;
  }
}

#include "grammar/grammar.h"

#include <xgrammar/xgrammar.h>

#include <algorithm>

#include "core/error.h"
#include "grammar/schema.h"
#include "grammar/work.h"
#include "text/decoder.h"

// xgrammar's messages come here. What it only warns of is something that it does not keep.
namespace {
thread_local std::string* warning = nullptr;
}
namespace xgrammar {
[[noreturn]] void LogFatalImpl(const std::string&, int, const std::string& message) {
  throw std::runtime_error(message);
}
void LogMessageImpl(const std::string&, int, int, const std::string& message) {
  if (warning && warning->empty()) *warning = message;
}
}  // namespace xgrammar

namespace spot {
namespace {

// Of the grammar as text, of which each byte takes some 300 ns before work is counted.
constexpr size_t kMostRuleBytes = size_t{2} << 20;
constexpr int64_t kMostStepWork = 20'000'000;  // some 0.1 s at most
constexpr int kMostWhitespace = 8;  // characters in a row: an answer cannot go on with blanks for ever

// Control characters may not stand in JSON's strings, where xgrammar lets them pass if the strings' lengths are given: tokens
// with any but line breaks, which may stand between values, are no part of an answer.
bool has_control(const std::string& text) {
  return std::any_of(text.begin(), text.end(),
                     [](char c) { return static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\r'; });
}

// The bytes that each token adds to a text; empty for those that cannot come.
std::vector<std::string> token_bytes(const Tokenizer& tokenizer, int64_t vocab_size) {
  std::vector<std::string> bytes(static_cast<size_t>(vocab_size));
  for (int64_t id = 0; id < std::min(vocab_size, tokenizer.vocab_size()); ++id) {
    const auto token = static_cast<int32_t>(id);
    if (!tokenizer.has_token(token) || tokenizer.is_added(token)) continue;
    if (!has_control(tokenizer.token_text(token)))
      bytes[static_cast<size_t>(id)] = tokenizer.token_text(token);
  }
  return bytes;
}

xgrammar::TokenizerInfo tokenizer_info(const Tokenizer& tokenizer, int64_t vocab_size,
                                       const std::vector<int64_t>& stop_ids) {
  return xgrammar::TokenizerInfo(
      token_bytes(tokenizer, vocab_size),
      tokenizer.decoder().is_byte_level() ? xgrammar::VocabType::RAW : xgrammar::VocabType::BYTE_FALLBACK,
      static_cast<int>(vocab_size), std::vector<int32_t>(stop_ids.begin(), stop_ids.end()));
}

std::string shortened(std::string text) {
  text = text.substr(0, text.find('\n'));
  return text.size() > 300 ? text.substr(0, 300) + "..." : text;
}

}  // namespace

struct SchemaCompiler::Tables {
  Tables(const Tokenizer& tokenizer, int64_t vocab, const std::vector<int64_t>& stops)
      : vocab_size(vocab),
        num_words((vocab + 31) / 32),
        stop_ids(stops),
        info(tokenizer_info(tokenizer, vocab, stops)),
        compiler(info, /*max_threads=*/1, /*cache_enabled=*/false) {}

  int64_t vocab_size, num_words;
  std::vector<int64_t> stop_ids;
  xgrammar::TokenizerInfo info;
  xgrammar::GrammarCompiler compiler;
};

// Refusals are kept as well: to find that something is too much takes as long as what is not.
struct SchemaCompiler::Grammar {
  std::shared_ptr<const Tables> tables;
  std::optional<xgrammar::CompiledGrammar> compiled;
  std::string refusal;

  size_t bytes() const { return compiled ? compiled->MemorySizeBytes() : 0; }
};

namespace {

void set(int32_t* bits, int64_t token, bool value) {
  const uint32_t bit = uint32_t{1} << (token % 32);
  auto word = static_cast<uint32_t>(bits[token / 32]);
  bits[token / 32] = static_cast<int32_t>(value ? word | bit : word & ~bit);
}

// `Grammar` is SchemaCompiler's.
template <typename Grammar>
class SchemaConstraint : public TokenConstraint {
 public:
  SchemaConstraint(std::shared_ptr<const Grammar> grammar, const AnswerOpening& opening)
      : grammar_(std::move(grammar)),
        opening_(opening),
        matcher_(*grammar_->compiled),
        next_(static_cast<size_t>(grammar_->tables->num_words)),
        stage_(opening.in_reasoning ? Stage::reasoning : Stage::opening) {
    step([&] { look_ahead(); });
  }

  bool allowed(int32_t* bits) override {
    const auto& tables = *grammar_->tables;
    if (overloaded_) {
      std::fill(bits, bits + tables.num_words, 0);
      return false;
    }
    if (stage_ == Stage::reasoning || stage_ == Stage::free) {
      std::fill(bits, bits + tables.num_words, -1);
      clear_tail(bits);
      if (stage_ == Stage::reasoning)
        for (const int64_t id : tables.stop_ids) set(bits, id, false);
      return true;
    }
    std::copy(next_.begin(), next_.end(), bits);
    if (stage_ == Stage::opening) {
      if (opening_.reasoning_begin && opening_.reasoning_end) set(bits, *opening_.reasoning_begin, true);
      if (opening_.tool_call) set(bits, *opening_.tool_call, true);
    }
    return std::any_of(bits, bits + tables.num_words, [](int32_t word) { return word != 0; });
  }

  void accept(int32_t token) override {
    if (stage_ == Stage::free) return;
    if (stage_ == Stage::reasoning) {
      if (token != opening_.reasoning_end) return;
      opening_.reasoning_begin.reset();  // it thinks once
      stage_ = Stage::opening;
      return;
    }
    if (stage_ == Stage::opening && opening_.reasoning_end && token == opening_.reasoning_begin) {
      stage_ = Stage::reasoning;
      return;
    }
    if (stage_ == Stage::opening && token == opening_.tool_call) {
      stage_ = Stage::free;
      return;
    }
    stage_ = Stage::json;
    step([&] {
      if (!matcher_.AcceptToken(token)) fail("token {} came, which the grammar does not allow here", token);
      look_ahead();
    });
  }

  std::string problem() const override {
    if (!overloaded_) return TokenConstraint::problem();
    return "the schema has too many alternatives that begin alike; give fewer, or tell them apart by an earlier member";
  }

  bool complete() const override { return complete_; }

 private:
  enum class Stage { opening, reasoning, json, free };

  // Of the last word what is beyond the vocabulary.
  void clear_tail(int32_t* bits) const {
    const auto& tables = *grammar_->tables;
    for (int64_t id = tables.vocab_size; id < 32 * tables.num_words; ++id) set(bits, id, false);
  }

  // All answers wait for each step of each.
  template <typename Work>
  void step(const Work& work) {
    const WorkLimit limit(kMostStepWork);
    try {
      work();
    } catch (const TooMuchWork&) {
      overloaded_ = true;
    }
  }

  void look_ahead() {
    complete_ = matcher_.IsTerminated();
    if (complete_) return;
    int64_t shape[1] = {static_cast<int64_t>(next_.size())};
    DLTensor tensor{.data = next_.data(),
                    .device = {kDLCPU, 0},
                    .ndim = 1,
                    .dtype = xgrammar::GetBitmaskDLType(),
                    .shape = shape,
                    .strides = nullptr,
                    .byte_offset = 0};
    matcher_.FillNextTokenBitmask(&tensor);
    clear_tail(next_.data());
    if (!matcher_.IsCompleted()) return;
    std::vector<int32_t> rest = next_;
    for (const int64_t id : grammar_->tables->stop_ids) set(rest.data(), id, false);
    complete_ = std::all_of(rest.begin(), rest.end(), [](int32_t word) { return word == 0; });
  }

  std::shared_ptr<const Grammar> grammar_;
  AnswerOpening opening_;
  xgrammar::GrammarMatcher matcher_;
  std::vector<int32_t> next_;
  Stage stage_;
  bool complete_ = false, overloaded_ = false;
};

}  // namespace

SchemaCompiler::SchemaCompiler(const Tokenizer& tokenizer, int64_t vocab_size,
                               const std::vector<int64_t>& stop_ids, int64_t most_work)
    : tables_(std::make_shared<Tables>(tokenizer, vocab_size, stop_ids)), most_work_(most_work) {}

SchemaCompiler::~SchemaCompiler() = default;

std::shared_ptr<const SchemaCompiler::Grammar> SchemaCompiler::find(const std::string& schema) {
  const std::lock_guard lock(cache_mutex_);
  for (auto entry = cache_.begin(); entry != cache_.end(); ++entry) {
    if (entry->first != schema) continue;
    cache_.splice(cache_.begin(), cache_, entry);
    return entry->second;
  }
  return nullptr;
}

SchemaCompiler::Grammar SchemaCompiler::make(const std::string& text) {
  Grammar made{.tables = tables_};
  std::string warned;
  warning = &warned;
  try {
    const WorkLimit limit(most_work_);
    const auto grammar =
        xgrammar::Grammar::FromJSONSchema(text, /*any_whitespace=*/true, std::nullopt, std::nullopt,
                                          /*strict_mode=*/true, kMostWhitespace);
    if (grammar.ToString().size() > kMostRuleBytes) throw TooMuchWork();
    made.compiled = tables_->compiler.CompileGrammar(grammar);
    work_ = limit.done();
  } catch (const TooMuchWork&) {
    made.refusal =
        "the schema takes too much work to compile; give fewer and shorter lengths, patterns, formats and lists of values, or "
        "fewer schemas";
  } catch (const std::bad_alloc&) {  // no property of the schema
    warning = nullptr;
    throw;
  } catch (const std::exception& error) {
    made.refusal = "the schema cannot be compiled: " + shortened(error.what());
  }
  warning = nullptr;
  if (!warned.empty() && made.compiled) made.refusal = "the schema cannot be kept: " + shortened(warned);
  if (made.compiled && made.bytes() > kMostGrammarBytes)
    made.refusal = fmt::format("the schema's grammar takes {} MiB, more than {}; make the schema smaller",
                               made.bytes() >> 20, kMostGrammarBytes >> 20);
  if (!made.refusal.empty()) made.compiled.reset();
  return made;
}

void SchemaCompiler::keep(const std::string& text, std::shared_ptr<const Grammar> grammar) {
  const std::lock_guard lock(cache_mutex_);
  cache_.emplace_front(text, std::move(grammar));
  size_t total = 0;
  for (const auto& [key, cached] : cache_) total += cached->bytes() + key.size();
  while (total > kMostCachedBytes && cache_.size() > 1) {
    total -= cache_.back().second->bytes() + cache_.back().first.size();
    cache_.pop_back();
  }
}

MakeConstraint SchemaCompiler::compile(const nlohmann::ordered_json& schema, const AnswerOpening& opening) {
  if (opening.in_reasoning && !opening.reasoning_end)
    fail(
        "the prompt opens a reasoning block whose end is no token of its own, so that JSON cannot be asked for behind it; turn "
        "the reasoning off");
  const std::string text = exact_schema(schema).dump();
  std::shared_ptr<const Grammar> grammar = find(text);
  if (!grammar) {
    const std::lock_guard lock(compiling_);
    grammar = find(text);
    if (!grammar) keep(text, grammar = std::make_shared<Grammar>(make(text)));
  }
  if (!grammar->compiled) fail("{}", grammar->refusal);
  return [grammar, opening] { return std::make_unique<SchemaConstraint<Grammar>>(grammar, opening); };
}

}  // namespace spot

// JSON schemas as constraints of answers, by xgrammar.
#pragma once

#include <atomic>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/token_constraint.h"
#include "text/tokenizer.h"

namespace spot {

// What may stand before the JSON text of a chat's answer. Ids are of single tokens; none where the tokenizer has no such token.
struct AnswerOpening {
  // An answer may begin with the first and then says what it likes up to the second. With `in_reasoning` it is there from the
  // start, and cannot end before the second has come.
  std::optional<int32_t> reasoning_begin, reasoning_end;
  bool in_reasoning = false;
  // In place of JSON, an answer may begin with this token and then says what it likes.
  std::optional<int32_t> tool_call;
};

// Turns schemas into constraints over one vocabulary, and keeps those that were asked for last. Any thread may call it; one
// schema compiles at a time.
class SchemaCompiler {
 public:
  // `stop_ids` end an answer; `vocab_size` is the model's. Tokens marked special, and added ones, are never part of JSON.
  SchemaCompiler(const Tokenizer& tokenizer, int64_t vocab_size, const std::vector<int64_t>& stop_ids,
                 int64_t most_work = kMostWork);
  ~SchemaCompiler();
  SchemaCompiler(const SchemaCompiler&) = delete;
  SchemaCompiler& operator=(const SchemaCompiler&) = delete;

  // Answers are then JSON texts that are valid under the schema, if they end by themselves. Throws Error as exact_schema, and
  // when xgrammar cannot keep it or its grammar takes too much work or memory.
  MakeConstraint compile(const nlohmann::ordered_json& schema, const AnswerOpening& opening = {});

  // What the last schema that was compiled took (grammar/work.h).
  int64_t work() const { return work_; }

  static constexpr int64_t kMostWork = 1'000'000'000;  // 5 s at most
  static constexpr size_t kMostGrammarBytes = size_t{64} << 20, kMostCachedBytes = size_t{256} << 20;

 private:
  struct Tables;
  struct Grammar;
  std::shared_ptr<const Grammar> find(const std::string& schema);
  Grammar make(const std::string& schema);
  void keep(const std::string& schema, std::shared_ptr<const Grammar> grammar);

  std::shared_ptr<Tables> tables_;
  std::mutex compiling_, cache_mutex_;
  const int64_t most_work_;
  std::atomic<int64_t> work_ = 0;
  std::list<std::pair<std::string, std::shared_ptr<const Grammar>>> cache_;  // the last asked for first
};

}  // namespace spot

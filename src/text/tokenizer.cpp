#include "text/tokenizer.h"

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"
#include "core/json_numbers.h"
#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/byte_characters.h"
#include "text/decoder.h"
#include "text/normalizer.h"
#include "text/pretokenizer.h"
#include "text/stream_decoder.h"
#include "text/unicode.h"

namespace spot {
namespace fs = std::filesystem;
using nlohmann::json;

// The ids that a TemplateProcessing post-processor puts around one sequence.
struct TokenFrame {
  std::vector<int32_t> before, after;
};

namespace {

const json& member(const json& object, const char* key) {
  static const json null;
  return object.contains(key) ? object.at(key) : null;
}

void read_post_processor(const json& processor, const std::string& where, TokenFrame& frame) {
  if (processor.is_null()) return;
  const std::string type = processor.at("type");
  if (type == "ByteLevel") return;  // it only moves offsets, which are not reported here
  if (type == "Sequence") {
    for (const auto& part : processor.at("processors")) read_post_processor(part, where, frame);
    return;
  }
  if (type != "TemplateProcessing") {
    fail("{}: the post_processor {} is not supported; TemplateProcessing, ByteLevel, Sequence and null are",
         where, type);
  }
  TokenFrame read;
  int sequences = 0;
  for (const auto& piece : processor.at("single")) {
    if (piece.contains("Sequence")) {
      ++sequences;
      continue;
    }
    const std::string name = piece.at("SpecialToken").at("id");
    for (const json& id : processor.at("special_tokens").at(name).at("ids")) {
      (sequences == 0 ? read.before : read.after).push_back(int32_in(id));
    }
  }
  if (sequences != 1)
    fail("{}: the post_processor's single template names the text {} times, not once", where, sequences);
  frame.before.insert(frame.before.begin(), read.before.begin(), read.before.end());
  frame.after.insert(frame.after.end(), read.after.begin(), read.after.end());
}

// eos_token_id and the like: a number, a list of numbers, or nothing.
std::vector<int32_t> ids_in(const json& value) {
  std::vector<int32_t> ids;
  if (value.is_number_integer() || value.is_array())
    for (const json& id : value.is_array() ? value : json::array({value})) ids.push_back(int32_in(id));
  return ids;
}

json read_if_there(const fs::path& path) {
  return has_file(path) ? read_json(path) : json::object();
}

}  // namespace

struct Tokenizer::Tables {
  Tables(const json& file, const json& config, const std::string& where);
  void read_special_ids(const fs::path& folder, const json& config);
  void check_id(int32_t id) const;

  struct Token {
    std::string text;  // bytes in a byte-level vocabulary
    bool known = false, special = false, added = false;
  };
  std::string where;
  PreTokenizer pre_tokenizer;
  BytePairEncoding bpe;
  Normalizer normalizer;
  Decoder decoder;
  TokenFrame frame;
  std::vector<AddedToken> added;
  std::vector<Token> tokens;  // by id
  StringMap<int32_t> added_ids;
  AddedTokenMatcher raw_matcher, normalized_matcher;
  std::vector<int32_t> eos_ids;
  std::optional<int32_t> bos_id, pad_id;

 private:
  static std::vector<AddedToken> read_added(const json& file, const json& config, const BytePairEncoding& bpe,
                                            const std::string& where);
};

std::vector<AddedToken> Tokenizer::Tables::read_added(const json& file, const json& config,
                                                      const BytePairEncoding& bpe, const std::string& where) {
  std::vector<AddedToken> added;
  for (const auto& entry : member(file, "added_tokens")) {
    added.push_back(AddedToken::from_json(entry, int32_in(entry.at("id"))));
  }
  // tokenizer_config.json may name tokens that tokenizer.json lacks.
  for (const auto& [key, entry] : member(config, "added_tokens_decoder").items()) {
    int32_t id = -1;
    if (std::from_chars(key.data(), key.data() + key.size(), id).ptr != key.data() + key.size()) id = -1;
    const AddedToken token = AddedToken::from_json(entry, id);
    const bool known = std::any_of(added.begin(), added.end(),
                                   [&](const AddedToken& t) { return t.content == token.content; });
    if (!known) added.push_back(token);
  }
  for (const AddedToken& token : added) {
    const auto found = bpe.vocab().find(token.content);
    if (token.id < 0 || token.id >= 1 << 24 || (found != bpe.vocab().end() && found->second != token.id)) {
      fail("{}: the added token {} has the id {}, which contradicts the vocabulary", where, token.content,
           token.id);
    }
  }
  return added;
}

Tokenizer::Tables::Tables(const json& file, const json& config, const std::string& path)
    : where(path),
      pre_tokenizer(member(file, "pre_tokenizer"), path),
      bpe(file.at("model"), pre_tokenizer.is_byte_level(), path),
      normalizer(member(file, "normalizer"), path),
      decoder(member(file, "decoder"), path),
      added(read_added(file, config, bpe, path)),
      raw_matcher(added, [](const AddedToken& t) { return t.normalized ? "" : t.content; }),
      normalized_matcher(added, [this](const AddedToken& t) {
        return t.normalized ? normalizer.normalize(t.content) : "";
      }) {
  read_post_processor(member(file, "post_processor"), path, frame);
  const auto place = [&](int32_t id, const std::string& text) -> Token& {
    if (static_cast<size_t>(id) >= tokens.size()) tokens.resize(static_cast<size_t>(id) + 1);
    // In a byte-level vocabulary a token with a character that stands for no byte means itself.
    const auto bytes = decoder.is_byte_level() ? bytes_of_characters(text) : std::nullopt;
    return tokens[static_cast<size_t>(id)] = {bytes.value_or(text), true, false, false};
  };
  for (const auto& [text, id] : bpe.vocab()) place(id, text);
  for (const AddedToken& token : added) {
    Token& placed = place(token.id, token.normalized ? normalizer.normalize(token.content) : token.content);
    placed.special = token.special, placed.added = true;
    added_ids.emplace(token.content, token.id);
  }
  for (const auto* ids : {&frame.before, &frame.after})
    std::for_each(ids->begin(), ids->end(), [&](int32_t id) { check_id(id); });
}

void Tokenizer::Tables::check_id(int32_t id) const {
  if (id < 0 || static_cast<size_t>(id) >= tokens.size()) {
    fail("{}: the id {} is outside the vocabulary of {} tokens", where, id, tokens.size());
  }
  if (!tokens[static_cast<size_t>(id)].known) fail("{}: no token has the id {}", where, id);
}

void Tokenizer::Tables::read_special_ids(const fs::path& folder, const json& config) {
  const json generation = read_if_there(folder / "generation_config.json");
  const json model = read_if_there(folder / "config.json");
  const auto named = [&](const char* key) -> std::optional<int32_t> {
    const json& value = member(config, key);
    if (value.is_null()) return std::nullopt;
    const std::string token = value.is_object() ? value.at("content") : value;
    const auto added_id = added_ids.find(token);
    if (added_id != added_ids.end()) return added_id->second;
    const auto id = bpe.vocab().find(token);
    if (id == bpe.vocab().end()) {
      fail("{}: {} is {}, which is not in the vocabulary", (folder / "tokenizer_config.json").string(), key,
           token);
    }
    return id->second;
  };
  const auto first = [](const std::vector<int32_t>& ids) {
    return ids.empty() ? std::nullopt : std::optional<int32_t>(ids.front());
  };
  const auto either = [&](const char* token_key, const char* id_key) {
    if (const auto id = named(token_key)) return id;
    if (const auto id = first(ids_in(member(generation, id_key)))) return id;
    return first(ids_in(member(model, id_key)));
  };
  bos_id = either("bos_token", "bos_token_id");
  pad_id = either("pad_token", "pad_token_id");
  eos_ids = ids_in(member(generation, "eos_token_id"));
  if (const auto eos = named("eos_token")) eos_ids.push_back(*eos);
  if (eos_ids.empty()) eos_ids = ids_in(member(model, "eos_token_id"));
  std::vector<int32_t> distinct;
  for (const int32_t id : eos_ids) {
    check_id(id);
    if (std::find(distinct.begin(), distinct.end(), id) == distinct.end()) distinct.push_back(id);
  }
  eos_ids = std::move(distinct);
}

Tokenizer Tokenizer::load(const fs::path& folder_or_file) {
  const bool is_folder = fs::is_directory(folder_or_file);
  const fs::path path = is_folder ? folder_or_file / "tokenizer.json" : folder_or_file;
  const json file = read_json(path);
  const json config = is_folder ? read_if_there(folder_or_file / "tokenizer_config.json") : json::object();
  std::shared_ptr<Tables> tables;
  try {
    tables = std::make_shared<Tables>(file, config, path.string());
  } catch (const json::exception& e) {
    fail("{}: not of the form of a tokenizer.json: {}", path.string(), e.what());
  }
  try {
    if (is_folder) tables->read_special_ids(folder_or_file, config);
  } catch (const json::exception& e) {
    fail(
        "{}: a token in tokenizer_config.json, generation_config.json or config.json is of the wrong form: "
        "{}",
        folder_or_file.string(), e.what());
  }
  return Tokenizer(std::move(tables));
}

std::vector<int32_t> Tokenizer::encode(std::string_view utf8, bool add_special_tokens) const {
  const Tables& tables = *tables_;
  if (const size_t offset = find_invalid_utf8(utf8); offset != std::string_view::npos) {
    fail("the text is not UTF-8: ill-formed bytes at offset {} of {}", offset, utf8.size());
  }
  std::vector<int32_t> ids;
  ids.reserve(utf8.size() / 4 + 2);
  if (add_special_tokens) ids = tables.frame.before;
  Splitter splitter(tables.pre_tokenizer);
  PieceCache cache(tables.bpe);
  for (const auto& raw : tables.raw_matcher.split(utf8)) {
    if (raw.id >= 0) {
      ids.push_back(raw.id);
      continue;
    }
    std::string normalized;
    std::string_view text = raw.text;
    bool at_start = text.data() == utf8.data();
    if (!tables.normalizer.is_empty()) text = normalized = tables.normalizer.normalize(text, at_start);
    for (const auto& part : tables.normalized_matcher.split(text)) {
      if (part.id >= 0) {
        ids.push_back(part.id);
      } else {
        splitter.split(part.text, at_start && part.text.data() == text.data(),
                       [&](std::string_view piece) { cache.encode(piece, ids); });
      }
    }
  }
  if (add_special_tokens) ids.insert(ids.end(), tables.frame.after.begin(), tables.frame.after.end());
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  StreamDecoder decoder(*this, skip_special_tokens);
  std::string text;
  for (const int32_t id : ids) text += decoder.push(id);
  return text + decoder.finish();
}

std::optional<int32_t> Tokenizer::token_id(std::string_view token) const {
  for (const auto* table : {&tables_->added_ids, &tables_->bpe.vocab()}) {
    if (const auto found = table->find(token); found != table->end()) return found->second;
  }
  return std::nullopt;
}

bool Tokenizer::has_token(int32_t id) const {
  return id >= 0 && static_cast<size_t>(id) < tables_->tokens.size() &&
         tables_->tokens[static_cast<size_t>(id)].known;
}

const std::string& Tokenizer::token_text(int32_t id) const {
  tables_->check_id(id);
  return tables_->tokens[static_cast<size_t>(id)].text;
}

const Decoder& Tokenizer::decoder() const {
  return tables_->decoder;
}

int64_t Tokenizer::vocab_size() const {
  return static_cast<int64_t>(tables_->tokens.size());
}

bool Tokenizer::is_special(int32_t id) const {
  return has_token(id) && tables_->tokens[static_cast<size_t>(id)].special;
}

bool Tokenizer::is_added(int32_t id) const {
  return has_token(id) && tables_->tokens[static_cast<size_t>(id)].added;
}

const std::vector<int32_t>& Tokenizer::eos_ids() const {
  return tables_->eos_ids;
}
std::optional<int32_t> Tokenizer::bos_id() const {
  return tables_->bos_id;
}
std::optional<int32_t> Tokenizer::pad_id() const {
  return tables_->pad_id;
}

}  // namespace spot

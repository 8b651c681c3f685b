#include "text/bpe.h"

#include <array>
#include <bit>
#include <nlohmann/json.hpp>
#include <queue>

#include "core/error.h"
#include "core/json_numbers.h"
#include "text/byte_characters.h"
#include "text/unicode.h"

namespace spot {
namespace {

constexpr int32_t kLargestId =
    (1 << 24) - 1;                  // far above any vocabulary; keeps a corrupt file from eating memory
constexpr size_t kShortPiece = 24;  // up to here rescanning beats a priority queue
constexpr size_t kLongestCached = 48;
constexpr size_t kLargestCache = 1 << 18;

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

size_t hash_pair(uint64_t pair) {
  pair *= 0x9E3779B97F4A7C15;  // 2^64 / golden ratio
  return pair ^ pair >> 32;
}

}  // namespace

BytePairEncoding::BytePairEncoding(const nlohmann::json& json, bool byte_level, const std::string& where)
    : byte_level_(byte_level) {
  // Files of the first years lack the type; they are told by their merges.
  const std::string type = json.contains("type") ? json.at("type").get<std::string>() : "BPE";
  if (type != "BPE" || !json.contains("merges")) {
    fail("{}: a model of type {} is not supported; only BPE is", where, type);
  }
  const auto set = [&](const char* key) { return json.contains(key) && !json.at(key).is_null(); };
  if (set("dropout") && json.at("dropout").get<double>() != 0)
    fail("{}: BPE dropout is not supported", where);
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (set(affix) && json.at(affix) != "") fail("{}: {} is not supported", where, affix);
  }
  byte_fallback_ = set("byte_fallback") && json.at("byte_fallback").get<bool>();
  if (byte_fallback_ && byte_level_) {
    fail(
        "{}: byte_fallback with a ByteLevel pre_tokenizer is not supported; it belongs to SentencePiece vocabularies",
        where);
  }
  ignore_merges_ = set("ignore_merges") && json.at("ignore_merges").get<bool>();
  fuse_unk_ = set("fuse_unk") && json.at("fuse_unk").get<bool>();

  id_of_byte_.assign(256, -1);
  for (const auto& [token, value] : json.at("vocab").items()) {
    const int32_t id = int32_in(value);
    if (id < 0 || id > kLargestId)
      fail("{}: the token {} has the id {}, outside 0..{}", where, token, id, kLargestId);
    vocab_.emplace(token, id);
    if (!byte_level_) continue;
    const auto bytes = bytes_of_characters(token);
    if (bytes && bytes->size() == 1) id_of_byte_[static_cast<unsigned char>(bytes->front())] = id;
    if (bytes && ignore_merges_) id_of_bytes_.emplace(*bytes, id);
  }
  for (int byte = 0; byte_fallback_ && byte < 256; ++byte) {
    if (const auto found = vocab_.find(fmt::format("<0x{:02X}>", byte)); found != vocab_.end())
      id_of_byte_[byte] = found->second;
  }
  if (set("unk_token")) {
    const std::string unk = json.at("unk_token");
    const auto found = vocab_.find(unk);
    if (found == vocab_.end()) fail("{}: the unk_token {} is not in the vocabulary", where, unk);
    unk_id_ = found->second;
  }
  read_merges(json.at("merges"), where);
}

void BytePairEncoding::read_merges(const nlohmann::json& merges, const std::string& where) {
  merges_.assign(std::bit_ceil(2 * merges.size() + 1), Slot{});
  int32_t rank = 0;
  for (const auto& entry : merges) {
    std::string left, right;
    if (entry.is_array() && entry.size() == 2) {
      left = entry[0];
      right = entry[1];
    } else {
      const std::string line = entry.get<std::string>();
      if (rank == 0 && line.starts_with("#version")) continue;
      const size_t space = line.find(' ');
      if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos) {
        fail("{}: merge {} is {}, which is not a pair of tokens", where, rank, line);
      }
      left = line.substr(0, space);
      right = line.substr(space + 1);
    }
    const auto id_of = [&](const std::string& token) {
      const auto found = vocab_.find(token);
      if (found == vocab_.end()) {
        fail("{}: merge {} is {} + {}, and {} is not in the vocabulary", where, rank, left, right, token);
      }
      return found->second;
    };
    const uint64_t pair = pair_key(id_of(left), id_of(right));
    size_t slot = hash_pair(pair) & (merges_.size() - 1);
    while (merges_[slot].pair != ~uint64_t{0} && merges_[slot].pair != pair)
      slot = (slot + 1) & (merges_.size() - 1);
    merges_[slot] = {pair, {rank++, id_of(left + right)}};
  }
}

const BytePairEncoding::Merge* BytePairEncoding::find_merge(int32_t left, int32_t right) const {
  const uint64_t pair = pair_key(left, right);
  for (size_t slot = hash_pair(pair) & (merges_.size() - 1);; slot = (slot + 1) & (merges_.size() - 1)) {
    if (merges_[slot].pair == pair) return &merges_[slot].merge;
    if (merges_[slot].pair == ~uint64_t{0}) return nullptr;
  }
}

bool BytePairEncoding::append_bytes(std::string_view character, std::vector<int32_t>& symbols) const {
  const auto id_of = [&](char byte) { return id_of_byte_[static_cast<unsigned char>(byte)]; };
  for (const char byte : character) {
    if (id_of(byte) < 0) return false;
  }
  for (const char byte : character) symbols.push_back(id_of(byte));
  return true;
}

// The tokens that merging begins with. An unknown one waits until the next known one comes, which with
// byte_fallback can let a character's bytes overtake it.
std::vector<int32_t> BytePairEncoding::first_symbols(std::string_view piece) const {
  std::vector<int32_t> symbols;
  symbols.reserve(piece.size());
  bool unknown_waits = false;
  const auto release = [&] {
    if (unknown_waits && unk_id_ >= 0) symbols.push_back(unk_id_);
    unknown_waits = false;
  };
  for (size_t begin = 0, end = 0; begin < piece.size(); begin = end) {
    int32_t id;
    if (byte_level_) {
      end = begin + 1;
      id = id_of_byte_[static_cast<unsigned char>(piece[begin])];
    } else {
      next_code_point(piece, end);
      const std::string_view character = piece.substr(begin, end - begin);
      const auto found = vocab_.find(character);
      id = found == vocab_.end() ? -1 : found->second;
      if (id < 0 && byte_fallback_ && append_bytes(character, symbols)) continue;
    }
    if (id >= 0 || !fuse_unk_) release();
    if (id >= 0) {
      symbols.push_back(id);
    } else {
      unknown_waits = true;
    }
  }
  release();
  return symbols;
}

void BytePairEncoding::encode(std::string_view piece, std::vector<int32_t>& ids) const {
  if (ignore_merges_) {
    const auto& whole_tokens = byte_level_ ? id_of_bytes_ : vocab_;
    if (const auto whole = whole_tokens.find(piece); whole != whole_tokens.end()) {
      ids.push_back(whole->second);
      return;
    }
  }
  std::vector<int32_t> symbols = first_symbols(piece);
  if (symbols.size() <= kShortPiece) {
    merge_short(symbols);
  } else {
    merge_long(symbols);
  }
  ids.insert(ids.end(), symbols.begin(), symbols.end());
}

void BytePairEncoding::merge_short(std::vector<int32_t>& symbols) const {
  constexpr Merge kNone{INT32_MAX, -1};
  std::array<Merge, kShortPiece> next;  // the merge of symbols i and i + 1
  const auto look_up = [&](size_t i) {
    const Merge* merge = find_merge(symbols[i], symbols[i + 1]);
    return merge ? *merge : kNone;
  };
  for (size_t i = 0; i + 1 < symbols.size(); ++i) next[i] = look_up(i);
  while (symbols.size() > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < symbols.size(); ++i) {
      if (next[i].rank < next[best].rank) best = i;
    }
    if (next[best].id < 0) return;
    symbols[best] = next[best].id;
    symbols.erase(symbols.begin() + static_cast<ptrdiff_t>(best) + 1);
    for (size_t i = best; i + 1 < symbols.size(); ++i) next[i] = next[i + 1];
    if (best + 1 < symbols.size()) next[best] = look_up(best);
    if (best > 0) next[best - 1] = look_up(best - 1);
  }
}

void BytePairEncoding::merge_long(std::vector<int32_t>& symbols) const {
  // A doubly linked list over the symbols' first positions, and a queue of merges of which some have expired:
  // one is valid as long as the two tokens it was entered for still stand there.
  constexpr uint32_t kEnd = UINT32_MAX;
  if (symbols.size() >= kEnd)
    fail("a piece of {} bytes without a split point is too long to encode", symbols.size());
  struct Candidate {
    int32_t rank;
    uint32_t position;
    int32_t left, right, id;
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };
  const auto size = static_cast<uint32_t>(symbols.size());
  std::vector<uint32_t> previous(size), next(size);
  for (uint32_t i = 0; i < size; ++i) {
    previous[i] = i == 0 ? kEnd : i - 1;
    next[i] = i + 1 == size ? kEnd : i + 1;
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto enter = [&](uint32_t position) {
    const int32_t left = symbols[position], right = symbols[next[position]];
    if (const Merge* merge = find_merge(left, right))
      queue.push({merge->rank, position, left, right, merge->id});
  };
  for (uint32_t i = 0; i + 1 < size; ++i) enter(i);
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    const uint32_t at = top.position;
    if (symbols[at] != top.left || next[at] == kEnd || symbols[next[at]] != top.right) continue;
    const uint32_t gone = next[at];
    symbols[at] = top.id;
    symbols[gone] = -1;
    next[at] = next[gone];
    if (next[at] != kEnd) previous[next[at]] = at;
    if (previous[at] != kEnd) enter(previous[at]);
    if (next[at] != kEnd) enter(at);
  }
  std::erase(symbols, -1);
}

void PieceCache::encode(std::string_view bytes, std::vector<int32_t>& ids) {
  if (bytes.size() > kLongestCached) return bpe_.encode(bytes, ids);
  if (const auto found = seen_.find(bytes); found != seen_.end()) {
    const auto [begin, count] = found->second;
    ids.resize(ids.size() + count);
    std::copy_n(ids.begin() + static_cast<ptrdiff_t>(begin), count,
                ids.end() - static_cast<ptrdiff_t>(count));
    return;
  }
  const size_t begin = ids.size();
  bpe_.encode(bytes, ids);
  if (seen_.size() < kLargestCache) seen_.emplace(bytes, Span{begin, ids.size() - begin});
}

}  // namespace spot

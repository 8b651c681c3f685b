// Byte-pair encoding of one piece of text: the `model` of a tokenizer.json.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace spot {

// Finds a string_view in a map keyed by std::string without copying it.
struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
};
template <typename Value>
using StringMap = std::unordered_map<std::string, Value, StringHash, std::equal_to<>>;

// Byte-level BPE prints each byte as one character: printable Latin-1 as itself, the other 68 bytes as U+0100
// up. Returns the bytes that `token` stands for, or nothing if it holds a character that stands for no byte.
std::optional<std::string> bytes_of_token(std::string_view token);

// A vocabulary and its ranked merges. Immutable; may be shared among threads.
class BytePairEncoding {
 public:
  // Reads `vocab`, `merges` ("a b" or ["a", "b"]), `ignore_merges`, `unk_token` and `fuse_unk` of a model of
  // type BPE. Throws Error, beginning with `where`, for dropout, subword affixes, byte fallback and
  // inconsistent tables.
  BytePairEncoding(const nlohmann::json& json, const std::string& where);

  // Token text as written in the file -> id.
  const StringMap<int32_t>& vocab() const { return vocab_; }

  // Appends the ids of a piece: repeatedly the pair of neighbours with the lowest merge rank is joined,
  // leftmost first. A byte without a token becomes `unk_token`; where there is none it is dropped, as the
  // reference implementation does (SmolLM2's vocabulary lacks a few control characters). O(n log n) in the
  // length of the piece.
  void encode(std::string_view bytes, std::vector<int32_t>& ids) const;

 private:
  struct Merge {
    int32_t rank, id;
  };
  // The merge of two neighbouring tokens, or null.
  const Merge* find_merge(int32_t left, int32_t right) const;
  void read_merges(const nlohmann::json& merges, const std::string& where);
  void merge_short(std::vector<int32_t>& symbols) const;
  void merge_long(std::vector<int32_t>& symbols) const;

  StringMap<int32_t> vocab_;
  StringMap<int32_t> id_of_bytes_;   // filled only if ignore_merges_
  std::vector<int32_t> id_of_byte_;  // 256; -1: no token
  // Open addressing, linear probing: a lookup in the tight loop touches one cache line.
  struct Slot {
    uint64_t pair = ~uint64_t{0};
    Merge merge{};
  };
  std::vector<Slot> merges_;
  bool ignore_merges_ = false, fuse_unk_ = false;
  int32_t unk_id_ = -1;
};

// Remembers, during one call of encode, where in its output the ids of a piece already stand.
class PieceCache {
 public:
  explicit PieceCache(const BytePairEncoding& bpe) : bpe_(bpe) {}
  void encode(std::string_view bytes, std::vector<int32_t>& ids);

 private:
  struct Span {
    size_t begin, count;
  };
  const BytePairEncoding& bpe_;
  StringMap<Span> seen_;
};

}  // namespace spot

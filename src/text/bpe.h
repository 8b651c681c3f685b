// Byte-pair encoding of one piece of text: the `model` of a tokenizer.json.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
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

// A vocabulary and its ranked merges. Immutable; may be shared among threads.
class BytePairEncoding {
 public:
  // Reads `vocab`, `merges` ("a b" or ["a", "b"]), `ignore_merges`, `unk_token`, `fuse_unk` and
  // `byte_fallback` of a model of type BPE. `byte_level`: merges begin with bytes, which tokens print as
  // characters, else with characters. Throws Error, beginning with `where`, for dropout, subword affixes, byte
  // fallback in a byte-level vocabulary and inconsistent tables.
  BytePairEncoding(const nlohmann::json& json, bool byte_level, const std::string& where);

  // Token text as written in the file -> id.
  const StringMap<int32_t>& vocab() const { return vocab_; }

  // Appends the ids of a piece: repeatedly the pair of neighbours with the lowest merge rank is joined,
  // leftmost first. A character without a token becomes the tokens of its bytes (<0x0A>) where byte_fallback
  // is set and all of them exist. What has no token becomes `unk_token`; where there is none it is dropped, as
  // the reference implementation does (SmolLM2's vocabulary lacks a few control characters). O(n log n) in the
  // length of the piece, which is UTF-8 unless the vocabulary is byte-level.
  void encode(std::string_view piece, std::vector<int32_t>& ids) const;

 private:
  struct Merge {
    int32_t rank, id;
  };
  // The merge of two neighbouring tokens, or null.
  const Merge* find_merge(int32_t left, int32_t right) const;
  void read_merges(const nlohmann::json& merges, const std::string& where);
  std::vector<int32_t> first_symbols(std::string_view piece) const;
  bool append_bytes(std::string_view character, std::vector<int32_t>& symbols) const;
  void merge_short(std::vector<int32_t>& symbols) const;
  void merge_long(std::vector<int32_t>& symbols) const;

  StringMap<int32_t> vocab_;
  StringMap<int32_t> id_of_bytes_;   // byte-level: filled only if ignore_merges_
  std::vector<int32_t> id_of_byte_;  // 256, of the byte itself or <0x0A>; -1: no token
  // Open addressing, linear probing: a lookup in the tight loop touches one cache line.
  struct Slot {
    uint64_t pair = ~uint64_t{0};
    Merge merge{};
  };
  std::vector<Slot> merges_;
  bool byte_level_, byte_fallback_ = false, ignore_merges_ = false, fuse_unk_ = false;
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

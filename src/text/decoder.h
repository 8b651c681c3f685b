// Tokens to text: the `decoder` of a tokenizer.json.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/regex.h"
#include "text/unicode.h"

namespace spot {

// Either byte-level, where a token is bytes and text is what they join to, or a chain of rewritings of tokens,
// as SentencePiece vocabularies have. Immutable; may be shared among threads.
class Decoder {
 public:
  // Reads ByteLevel alone, or Replace, ByteFallback, Fuse, Strip, Metaspace and Sequences of them. Throws
  // Error, beginning with `where`, for anything else, null included, and for a chain that could not give its
  // text token by token.
  Decoder(const nlohmann::json& json, const std::string& where);

  bool is_byte_level() const { return is_byte_level_; }

 private:
  friend class DecoderState;
  struct Step {
    enum class Kind { replace, byte_fallback, fuse, strip, metaspace } kind;
    bool fused = false;          // what comes are parts of one token
    std::string character;       // strip, metaspace
    std::optional<Regex> regex;  // replace; metaspace: that matches the character
    std::string content;         // replace
    size_t start = 0, stop = 0;  // strip: most characters at the front and at the end
    bool drops_first = false;    // metaspace: the first token's characters vanish, others become spaces
  };
  void add(const nlohmann::json& json, const std::string& where);

  bool is_byte_level_ = false;
  std::vector<Step> steps_;
};

// The decoding of one sequence of tokens; `decoder` must outlive it.
class DecoderState {
 public:
  explicit DecoderState(const Decoder& decoder) : decoder_(&decoder), states_(decoder.steps_.size()) {}

  // The text that a token completes, often empty. Byte-level: `token` is its bytes. Else it is its text, and
  // byte tokens (<0x0A>) come out with the first token that is none: only the whole run tells whether it is
  // UTF-8, and where it is not each byte becomes U+FFFD.
  std::string push(std::string_view token);

  // The rest. The state is then as new.
  std::string finish();

 private:
  // What a step remembers.
  struct State {
    std::string held;         // byte_fallback: the run's bytes; strip: characters that may be the last
    size_t stripped = 0;      // strip: characters taken off the front
    bool past_front = false;  // strip: another character came; metaspace: the first token is over
  };
  void push(size_t step, std::string token, std::string& out);
  void push_strip(size_t step, std::string token, std::string& out);
  void release_bytes(size_t step, std::string& out);

  const Decoder* decoder_;
  std::vector<State> states_;
  Utf8Stream stream_;
};

}  // namespace spot

// Text to token ids and back, as the checkpoint's own tokenizer.json says.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace spot {

class Decoder;

// A BPE tokenizer: byte-level (Qwen, Llama 3, SmolLM, Falcon 3, GPT-2 and their like) or converted from
// SentencePiece (Llama 2, TinyLlama, Yi, Mistral). Its ids and texts equal those of the Hugging Face
// `tokenizers` library. Immutable after load: all methods may be called from many
// threads; copies share the tables.
class Tokenizer {
 public:
  // Loads a checkpoint folder (tokenizer.json, and tokenizer_config.json, generation_config.json and
  // config.json where they exist, for the special ids) or one tokenizer.json. Throws Error naming the file
  // and the component when that is missing, malformed or of a kind that is not supported. `truncation` and
  // `padding` entries are ignored.
  static Tokenizer load(const std::filesystem::path& folder_or_file);

  // Token ids of UTF-8 text. Added tokens written out in the text (<|im_end|>) become their ids. With
  // `add_special_tokens`, the post-processor's template is applied: Llama 3 then begins with its bos token,
  // Qwen adds nothing. Throws Error with the byte offset of ill-formed UTF-8.
  std::vector<int32_t> encode(std::string_view utf8, bool add_special_tokens = false) const;

  // The text of `ids`; bytes that form no UTF-8 become U+FFFD. With `skip_special_tokens`, tokens marked
  // special are left out. An id without a token stands for nothing: models have more rows than tokens.
  std::string decode(std::span<const int32_t> ids, bool skip_special_tokens = false) const;

  // The id of a token written as in tokenizer.json ("<|im_end|>", "Ġthe"), if it is one.
  std::optional<int32_t> token_id(std::string_view token) const;

  bool has_token(int32_t id) const;
  // A token as decoder() takes it: its bytes in a byte-level vocabulary, not always whole characters, else its
  // text. Throws Error for an unknown id.
  const std::string& token_text(int32_t id) const;
  const Decoder& decoder() const;

  // The largest id plus one. A model may have more rows in its embedding: those ids stand for nothing.
  int64_t vocab_size() const;

  // Whether `id` is an added token marked special; an unknown id is not.
  bool is_special(int32_t id) const;
  // Whether `id` is an added token, special or not.
  bool is_added(int32_t id) const;

  // The ids that end a generation: those of generation_config.json, then the eos_token of
  // tokenizer_config.json (instruct models may name the end of a turn in one and the end of a document in the
  // other), and only if neither names one, those of config.json. Empty if nothing names one.
  const std::vector<int32_t>& eos_ids() const;
  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> pad_id() const;

 private:
  struct Tables;
  explicit Tokenizer(std::shared_ptr<const Tables> tables) : tables_(std::move(tables)) {}

  std::shared_ptr<const Tables> tables_;
};

}  // namespace spot

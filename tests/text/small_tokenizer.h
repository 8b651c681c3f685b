// A tokenizer.json small enough to write out, for tests to spoil.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <string>

#include "core/files.h"
#include "text/byte_characters.h"
#include "text/unicode.h"

namespace spot::testing {

// The character that stands for a byte in byte-level BPE, found by asking the reader about every candidate.
inline std::string character_of_byte(unsigned char byte) {
  for (char32_t c = 0; c < 0x200; ++c) {
    std::string character;
    append_utf8(character, c);
    const auto bytes = bytes_of_characters(character);
    if (bytes && *bytes == std::string(1, static_cast<char>(byte))) return character;
  }
  throw std::logic_error("no character stands for the byte");
}

// All 256 bytes as tokens 0..255, a few merges, and two added tokens: 300 <|end|> (special) and 301 <tool>.
inline nlohmann::json small_tokenizer() {
  nlohmann::json vocab, merges = nlohmann::json::array();
  for (int byte = 0; byte < 256; ++byte) vocab[character_of_byte(static_cast<unsigned char>(byte))] = byte;
  int next = 256;
  for (const auto& [left, right] : {std::pair{"l", "o"}, {"lo", "w"}, {"Ġ", "low"}, {"e", "r"}}) {
    vocab[std::string(left) + right] = next++;
    merges.push_back({left, right});
  }
  const auto added = [](int id, const char* content, bool special) {
    return nlohmann::json{{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
                          {"rstrip", false}, {"normalized", false}, {"special", special}};
  };
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", {added(300, "<|end|>", true), added(301, "<tool>", false)}},
          {"normalizer", nullptr},
          {"pre_tokenizer",
           {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}},
          {"post_processor", nullptr},
          {"decoder", {{"type", "ByteLevel"}}},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"vocab", vocab},
            {"merges", merges}}}};
}

// A folder that goes away with the object.
class TemporaryFolder {
 public:
  TemporaryFolder()
      : path_(std::filesystem::temp_directory_path() /
              ("spot_text_" + std::to_string(::getpid()) + "_" + std::to_string(std::random_device{}()))) {
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() { remove_folder(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  void write(const std::string& name, const nlohmann::json& json) const {
    write_file_atomically(path_ / name, json.dump());
  }

 private:
  std::filesystem::path path_;
};

}  // namespace spot::testing

// Training sequences: documents shuffled, tokenised, joined by end-of-text tokens and cut to one length,
// without end.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "distill/documents.h"

namespace spot {

// `share` of the sequences (relative to the sum of shares) are divided into parts of `length` tokens.
struct LengthShare {
  int64_t length = 0;
  double share = 0.0;
};

struct DataConfig {
  std::vector<std::filesystem::path> paths;  // see list_text_files
  std::string text_field = "text";           // of .jsonl lines
  int64_t sequence_length = 16384;           // tokens
  // Empty: every sequence is one part. Parts attend only within themselves, from position 0, so that short
  // contexts are trained too at the same number of tokens a step.
  std::vector<LengthShare> length_mix;
  // Of the documents of a file, counted from the file's own number in the corpus, every n-th is never trained
  // on; 0 holds nothing out.
  int64_t held_out_every = 100;
  // Documents are shuffled within windows of at most this many documents and bytes; the order of files is
  // shuffled as a whole.
  int64_t window_documents = 8192;
  int64_t window_bytes = int64_t{64} << 20;
  uint64_t seed = 42;
  std::filesystem::path spool_folder;  // where pipes among the paths are copied to; empty: the system's own

  // Throws Error naming the first impossible value.
  void validate() const;
};

struct TokenSequence {
  std::vector<int32_t> tokens;     // [sequence_length]
  std::vector<int64_t> parts;      // first token of each part; the first is 0
  std::vector<int64_t> documents;  // first token of each document or part; the first is 0
};

using Encode = std::function<std::vector<int32_t>(const std::string&)>;

class TrainingData {
 public:
  // Lists the files; reads nothing yet. `eos` ends each document.
  TrainingData(const DataConfig& config, Encode encode, int32_t eos);

  // The next sequence; after the last document the next epoch begins. A pure function of corpus, config and
  // how many were taken before. Throws Error when the corpus holds no training text, and as DocumentReader
  // does.
  TokenSequence next();

  // The first `count` sequences of the held-out documents, in corpus order; fewer when there are not enough
  // for that. `sequence_length` 0: the config's.
  std::vector<TokenSequence> held_out(int64_t count, int64_t sequence_length = 0) const;

  // Where next() stands, a small object. restore() continues exactly there. Throws Error when the corpus is
  // not the one of the state (paths or sizes of its files differ).
  nlohmann::json state() const;
  void restore(const nlohmann::json& state);

  int64_t epoch() const { return epoch_; }
  int64_t num_files() const { return static_cast<int64_t>(files_.size()); }
  // Training tokens of one epoch, end tokens included; 0 until the first one has been read to its end.
  int64_t corpus_tokens() const { return corpus_tokens_; }
  // Rows without text that this process has met in the training text, and the place of the first one.
  int64_t skipped_rows() const { return skipped_rows_; }
  const std::string& first_skipped() const { return first_skipped_; }

 private:
  struct Place {  // the next document to read from the files
    int64_t file = 0, document = 0;
  };
  bool is_held_out(int64_t file, int64_t document) const;
  void begin_epoch(int64_t epoch);
  void load_window();
  void next_document();

  DataConfig config_;
  Encode encode_;
  int32_t eos_;
  std::vector<TextFile> files_;
  std::string fingerprint_;

  int64_t epoch_ = -1;
  std::vector<int64_t> file_order_;         // of this epoch
  Place window_start_, window_end_;         // file: an index into file_order_
  std::unique_ptr<DocumentReader> reader_;  // stands at window_end_; null: its file is not open
  int64_t window_number_ = -1;              // within the epoch
  std::vector<std::string> window_;         // shuffled
  int64_t window_next_ = 0;                 // index in window_ of the next document to tokenise
  bool epoch_has_text_ = false;
  std::vector<int32_t> tokens_;  // of the current document, end token included
  int64_t token_next_ = 0;
  int64_t sequences_ = 0;  // taken so far
  int64_t epoch_tokens_ = 0, corpus_tokens_ = 0;
  int64_t skipped_rows_ = 0;
  std::string first_skipped_;
};

}  // namespace spot

#include "distill/data.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>

#include "core/error.h"

namespace spot {
namespace {

// One random stream for each purpose and index (the finaliser of splitmix64 over the words in turn).
std::mt19937_64 stream(uint64_t seed, std::initializer_list<uint64_t> words) {
  uint64_t state = seed;
  for (uint64_t word : words) {
    state += 0x9e3779b97f4a7c15ULL + word;
    state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9ULL;
    state = (state ^ (state >> 27)) * 0x94d049bb133111ebULL;
    state ^= state >> 31;
  }
  return std::mt19937_64(state);
}

// std::shuffle differs between standard libraries; this does not.
template <typename T>
void shuffle(std::vector<T>& list, std::mt19937_64 engine) {
  for (size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[engine() % i]);
}

// Tokens laid end to end and cut; marks where documents begin.
class Packer {
 public:
  explicit Packer(int64_t length) : length_(length) {}

  // Takes tokens of one document from `next` on; advances it. True when the sequence is full.
  bool take(const std::vector<int32_t>& tokens, int64_t& next) {
    const auto room = length_ - static_cast<int64_t>(sequence_.tokens.size());
    const auto count = std::min(room, static_cast<int64_t>(tokens.size()) - next);
    if (count > 0) {
      sequence_.documents.push_back(static_cast<int64_t>(sequence_.tokens.size()));
      sequence_.tokens.insert(sequence_.tokens.end(), tokens.begin() + next, tokens.begin() + next + count);
      next += count;
    }
    return static_cast<int64_t>(sequence_.tokens.size()) == length_;
  }

  // The full sequence, divided into parts of `part` tokens.
  TokenSequence finish(int64_t part) {
    for (int64_t start = 0; start < length_; start += part) sequence_.parts.push_back(start);
    std::vector<int64_t> merged;
    std::set_union(sequence_.documents.begin(), sequence_.documents.end(), sequence_.parts.begin(),
                   sequence_.parts.end(), std::back_inserter(merged));
    sequence_.documents = std::move(merged);
    return std::exchange(sequence_, {});
  }

 private:
  int64_t length_;
  TokenSequence sequence_;
};

}  // namespace

void DataConfig::validate() const {
  if (sequence_length < 2) fail("data: sequence_length is {}, it must be at least 2 tokens", sequence_length);
  for (const LengthShare& s : length_mix)
    if (s.length < 2 || s.length > sequence_length || !(s.share > 0.0))
      fail(
          "data: length_mix has length {} with share {}; lengths must be 2 to sequence_length ({}), shares "
          "positive",
          s.length, s.share, sequence_length);
  if (held_out_every == 1 || held_out_every < 0)
    fail("data: held_out_every is {}, it must be 0 (hold nothing out) or at least 2", held_out_every);
  if (window_documents < 1 || window_bytes < 1)
    fail("data: window_documents and window_bytes must be positive, they are {} and {}", window_documents,
         window_bytes);
}

TrainingData::TrainingData(const DataConfig& config, Encode encode, int32_t eos)
    : config_(config), encode_(std::move(encode)), eos_(eos) {
  config_.validate();
  files_ = list_text_files(config_.paths, config_.text_field);
  spool_pipes(files_,
              config_.spool_folder.empty() ? std::filesystem::temp_directory_path() : config_.spool_folder);
  uint64_t hash = 0xcbf29ce484222325ULL;  // FNV-1a over names and sizes
  const auto add = [&](const std::string& text) {
    for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
  };
  for (const auto& file : files_) {
    const std::string name = file.keep_alive ? file.format.string() : file.path.filename().string();
    add(fmt::format("{}\n{}\n", name, std::filesystem::file_size(file.path)));
  }
  fingerprint_ = fmt::format("{:016x}", hash);
}

bool TrainingData::is_held_out(int64_t file, int64_t document) const {
  return config_.held_out_every > 0 &&
         (file + document) % config_.held_out_every == config_.held_out_every - 1;
}

void TrainingData::begin_epoch(int64_t epoch) {
  if (epoch > 0 && epoch_tokens_ > 0 && corpus_tokens_ == 0) corpus_tokens_ = epoch_tokens_;
  epoch_ = epoch;
  epoch_tokens_ = 0;
  file_order_.resize(files_.size());
  std::iota(file_order_.begin(), file_order_.end(), 0);
  shuffle(file_order_, stream(config_.seed, {1, static_cast<uint64_t>(epoch)}));
  window_start_ = window_end_ = {};
  reader_.reset();
  window_number_ = -1;
  window_.clear();
  window_next_ = 0;
  epoch_has_text_ = false;
}

// Reads the window that begins at window_end_.
void TrainingData::load_window() {
  window_start_ = window_end_;
  ++window_number_;
  window_.clear();
  window_next_ = 0;
  int64_t bytes = 0;
  Place& place = window_end_;
  const auto full = [&] {
    return static_cast<int64_t>(window_.size()) >= config_.window_documents || bytes >= config_.window_bytes;
  };
  std::string text;
  while (place.file < num_files() && !full()) {
    const int64_t file = file_order_[static_cast<size_t>(place.file)];
    if (!reader_) {
      reader_ = std::make_unique<DocumentReader>(files_[static_cast<size_t>(file)], config_.text_field);
      reader_->skip(place.document);
    }
    const int64_t skipped_before = reader_->skipped_rows();
    if (!reader_->next(text)) {
      reader_.reset();
      place = {place.file + 1, 0};
      continue;
    }
    if (reader_->skipped_rows() > skipped_before && skipped_rows_++ == 0)
      first_skipped_ = reader_->first_skipped();
    if (is_held_out(file, place.document++) || is_blank(text)) continue;
    bytes += static_cast<int64_t>(text.size());
    window_.push_back(std::move(text));
  }
  epoch_has_text_ |= !window_.empty();
  shuffle(window_,
          stream(config_.seed, {2, static_cast<uint64_t>(epoch_), static_cast<uint64_t>(window_number_)}));
}

void TrainingData::next_document() {
  if (epoch_ < 0) begin_epoch(0);
  while (window_next_ == static_cast<int64_t>(window_.size())) {
    if (window_end_.file >= num_files()) {
      if (window_number_ >= 0 && !epoch_has_text_)
        fail("the training text is empty: the {} files from {} on hold no text beside held-out documents",
             num_files(), files_.front().name);
      if (window_number_ >= 0) begin_epoch(epoch_ + 1);
    }
    load_window();
  }
  tokens_ = encode_(window_[static_cast<size_t>(window_next_++)]);
  tokens_.push_back(eos_);
  token_next_ = 0;
  epoch_tokens_ += static_cast<int64_t>(tokens_.size());
}

TokenSequence TrainingData::next() {
  int64_t part = config_.sequence_length;
  if (!config_.length_mix.empty()) {
    double total = 0.0;
    for (const LengthShare& s : config_.length_mix) total += s.share;
    const double draw =
        static_cast<double>(stream(config_.seed, {3, static_cast<uint64_t>(sequences_)})() >> 11) * 0x1p-53 *
        total;
    double passed = 0.0;
    for (const LengthShare& s : config_.length_mix) {
      part = s.length;
      passed += s.share;
      if (draw < passed) break;
    }
  }
  Packer packer(config_.sequence_length);
  while (!packer.take(tokens_, token_next_)) next_document();
  ++sequences_;
  return packer.finish(part);
}

std::vector<TokenSequence> TrainingData::held_out(int64_t count, int64_t sequence_length) const {
  const int64_t length = sequence_length > 0 ? sequence_length : config_.sequence_length;
  std::vector<TokenSequence> sequences;
  if (config_.held_out_every == 0 || count <= 0) return sequences;
  Packer packer(length);
  std::string text;
  for (int64_t file = 0; file < num_files(); ++file) {
    DocumentReader reader(files_[static_cast<size_t>(file)], config_.text_field);
    for (int64_t document = 0;; ++document) {
      if (!is_held_out(file, document)) {
        if (reader.skip(1) == 0) break;
        continue;
      }
      if (!reader.next(text)) break;
      if (is_blank(text)) continue;
      std::vector<int32_t> tokens = encode_(text);
      tokens.push_back(eos_);
      for (int64_t next = 0; packer.take(tokens, next);) {
        sequences.push_back(packer.finish(length));
        if (static_cast<int64_t>(sequences.size()) == count) return sequences;
      }
    }
  }
  return sequences;
}

nlohmann::json TrainingData::state() const {
  return {{"corpus", fingerprint_},
          {"epoch", epoch_},
          {"window_file", window_start_.file},
          {"window_document", window_start_.document},
          {"window_number", window_number_},
          {"window_next", window_next_},
          {"token_next", token_next_},
          {"sequences", sequences_},
          {"epoch_has_text", epoch_has_text_},
          {"epoch_tokens", epoch_tokens_},
          {"corpus_tokens", corpus_tokens_}};
}

void TrainingData::restore(const nlohmann::json& state) {
  if (state.at("corpus") != fingerprint_)
    fail(
        "the training text has changed since the checkpoint was written (names or sizes of its {} files); "
        "restore it, or start a new run",
        num_files());
  const int64_t epoch = state.at("epoch"), window_next = state.at("window_next");
  sequences_ = state.at("sequences");
  tokens_.clear();
  token_next_ = 0;
  epoch_tokens_ = corpus_tokens_ = skipped_rows_ = 0;
  if (epoch < 0) {
    epoch_ = -1;
    window_.clear();
    window_next_ = 0;
    return;
  }
  begin_epoch(epoch);
  window_number_ = state.at("window_number").get<int64_t>() - 1;
  window_end_ = {state.at("window_file"), state.at("window_document")};
  load_window();
  epoch_has_text_ = state.at("epoch_has_text");
  if (window_next < 0 || window_next > static_cast<int64_t>(window_.size()))
    fail("the checkpoint's place in the training text does not exist there; start a new run");
  if (window_next > 0) {
    window_next_ = window_next - 1;
    next_document();
    token_next_ = state.at("token_next");
  }
  // A state of an earlier version does not know them: then they stay unknown.
  epoch_tokens_ = state.value("epoch_tokens", std::numeric_limits<int64_t>::min() / 2);
  corpus_tokens_ = state.value("corpus_tokens", int64_t{0});
}

}  // namespace spot

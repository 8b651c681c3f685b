#include "distill/documents.h"

#include <fcntl.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"
#include "core/notice.h"
#include "core/progress.h"
#include "core/text_file.h"
#include "text/unicode.h"

namespace spot {
namespace fs = std::filesystem;

namespace {

Packing packing_of(const fs::path& format) {
  if (format.extension() == ".gz") return Packing::gzip;
  return format.extension() == ".zst" ? Packing::zstd : Packing::none;
}

// The ending that says what the decompressed bytes are.
std::string inner_extension(const fs::path& format) {
  return (packing_of(format) == Packing::none ? format : format.stem()).extension().string();
}

RowLayout layout_of(const fs::path& format) {
  const std::string extension = inner_extension(format);
  if (extension == ".jsonl" || extension == ".ndjson") return RowLayout::lines;
  return extension == ".json" ? RowLayout::values : RowLayout::none;
}

// Whether the file's beginning is UTF-8 without control characters that no text holds.
bool begins_as_text(const TextFile& file) {
  std::string head(4096, '\0');
  try {
    head.resize(open_bytes(file.path, file.name, packing_of(file.format))->read(head.data(), head.size()));
  } catch (const Error&) {
    return false;  // not what its name says
  }
  const size_t bad = find_invalid_utf8(head);
  if (bad != std::string::npos && bad + 4 <= head.size()) return false;  // not merely a character cut in two
  return std::none_of(head.begin(), head.end(),
                      [](char c) { return (c > 0 && c < '\t') || (c > '\r' && c < '\x1b'); });
}

// Folders of data hold .json files that describe it beside those that are it.
bool begins_with_a_row(const TextFile& file, const std::string& text_field) {
  try {
    DocumentReader reader(file, text_field);
    std::string text;
    return reader.next(text) && reader.skipped_rows() == 0;
  } catch (const Error&) {
    return false;
  }
}

// Regular files in a folder and the folders below it; hidden ones, links and folders that may not be read are
// left out.
// (torch 2.11 exports parts of std::filesystem's recursive iterator that do not fit others.)
std::vector<fs::path> files_below(const fs::path& folder) {
  std::vector<fs::path> files;
  std::error_code code;
  for (fs::directory_iterator entry(folder, fs::directory_options::skip_permission_denied, code), end;
       !code && entry != end; entry.increment(code)) {
    const fs::path& path = entry->path();
    std::error_code unknown;
    if (path.filename().string().starts_with(".") || entry->is_symlink(unknown)) continue;
    if (entry->is_directory(unknown)) {
      const std::vector<fs::path> below = files_below(path);
      files.insert(files.end(), below.begin(), below.end());
    } else if (entry->is_regular_file(unknown)) {
      files.push_back(path);
    }
  }
  if (code) fail("{}: cannot be searched: {}", folder.string(), code.message());
  return files;
}

// The text of a row: the row itself where it is a string, else its text field; null where it has none.
const std::string* text_of(const nlohmann::json& row, const std::string& text_field) {
  if (row.is_string()) return row.get_ptr<const std::string*>();
  if (!row.is_object()) return nullptr;
  const auto field = row.find(text_field);
  return field == row.end() ? nullptr : field->get_ptr<const std::string*>();
}

// What a row has instead, for the error.
std::string fields_of(const nlohmann::json& row) {
  if (!row.is_object()) return fmt::format("a row is {}", row.type_name());
  std::vector<std::string> names;
  for (const auto& [name, value] : row.items()) {
    if (names.size() == 8) {
      names.push_back("...");
      break;
    }
    names.push_back(name);
  }
  return fmt::format("a row has {}", fmt::join(names, ", "));
}

// Bytes of a closed name, readable through the path for as long as it lives.
struct OpenFile {
  int descriptor;
  explicit OpenFile(int number) : descriptor(number) {}
  ~OpenFile() { ::close(descriptor); }
};

int open_unnamed(const fs::path& folder) {
  const int unnamed = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (unnamed >= 0) return unnamed;
  std::string name = (folder / ".spooled-XXXXXX").string();  // not every file system has files without a name
  const int named = ::mkostemp(name.data(), O_CLOEXEC);
  if (named >= 0) ::unlink(name.c_str());
  return named;
}

// The endings that a file of these bytes would have; only one whole line of JSON, or an array of it, makes rows.
std::string guess_format(const fs::path& path, const std::string& name) {
  std::string head(4, '\0');
  head.resize(open_bytes(path, name, Packing::none)->read(head.data(), head.size()));
  const Packing packing = head.starts_with("\x1f\x8b")           ? Packing::gzip
                          : head.starts_with("\x28\xb5\x2f\xfd") ? Packing::zstd
                                                                 : Packing::none;
  const std::string ending = packing == Packing::gzip ? ".gz" : packing == Packing::zstd ? ".zst" : "";
  head.assign(size_t{1} << 20, '\0');
  head.resize(open_bytes(path, name, packing)->read(head.data(), head.size()));
  if (head.starts_with(kUtf8Mark)) head.erase(0, kUtf8Mark.size());
  const size_t first = head.find_first_not_of(" \t\r\n");
  if (first == std::string::npos) return "pipe.txt" + ending;
  const std::string line = head.substr(first, head.find('\n', first) - first);
  if (head[first] == '{' && nlohmann::json::accept(line)) return "pipe.jsonl" + ending;
  if (head[first] == '[' && head.find_first_not_of(" \t\r\n", first + 1) == head.find('{', first + 1))
    return "pipe.json" + ending;
  return "pipe.txt" + ending;
}

TextFile spool(const TextFile& pipe, const fs::path& folder) {
  const auto source = open_bytes(pipe.path, pipe.name, Packing::none);
  const auto file = std::make_shared<OpenFile>(open_unnamed(folder));
  const auto give_up = [&](int why) {
    fail("{}: a pipe is copied to a file in {} first, which cannot be written: {}", pipe.name,
         folder.string(), std::strerror(why));
  };
  if (file->descriptor < 0) give_up(errno);
  std::string piece(size_t{1} << 20, '\0');
  size_t total = 0;
  while (const size_t count = source->read(piece.data(), piece.size())) {
    for (size_t done = 0; done < count;) {
      const ssize_t wrote = ::write(file->descriptor, piece.data() + done, count - done);
      if (wrote < 0 && errno != EINTR) give_up(errno);
      done += wrote > 0 ? static_cast<size_t>(wrote) : 0;
    }
    total += count;
  }
  if (total == 0) fail("{}: the pipe gave no bytes", pipe.name);
  TextFile spooled = pipe;
  spooled.path = fmt::format("/proc/self/fd/{}", file->descriptor);
  spooled.format = guess_format(spooled.path, pipe.name);
  spooled.keep_alive = file;
  return spooled;
}

}  // namespace

bool is_blank(const std::string& text) {
  return text.find_first_not_of(" \t\r\n") == std::string::npos;
}

void spool_pipes(std::vector<TextFile>& files, const fs::path& folder) {
  for (TextFile& file : files) {
    std::error_code code;
    if (fs::is_fifo(file.path, code) || fs::is_socket(file.path, code)) file = spool(file, folder);
  }
}

TextFile::TextFile(const fs::path& file) : path(file), name(file.string()) {
  std::string lower = file.filename().string();
  for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  format = lower;
}

std::vector<TextFile> list_text_files(const std::vector<fs::path>& paths, const std::string& text_field) {
  std::vector<TextFile> files;
  size_t left_out = 0;
  for (const fs::path& path : paths) {
    std::error_code code;
    if (!fs::exists(path, code))
      fail("{}: no such file or folder; name the training text with an existing path", path.string());
    if (!fs::is_directory(path, code)) {
      if (fs::is_character_file(path, code) || fs::is_block_file(path, code))
        fail("{}: is a device; name a file, a folder or a pipe", path.string());
      files.emplace_back(path);
      continue;
    }
    std::vector<fs::path> inside;
    for (const fs::path& below : files_below(path)) {
      const TextFile file(below);
      const std::string extension = inner_extension(file.format);
      if (extension == ".tar" || extension == ".tgz" || !begins_as_text(file)) {
        ++left_out;
      } else if (extension == ".json" && !begins_with_a_row(file, text_field)) {
        ++left_out;
        if (!is_silent())
          notice("{}: left out, it does not begin with an object that has the field \"{}\"\n", file.name,
                 text_field);
      } else {
        inside.push_back(below);
      }
    }
    std::sort(inside.begin(), inside.end());
    files.insert(files.end(), inside.begin(), inside.end());
  }
  if (files.empty())
    fail(
        "no text files in {}{}; give files, or folders that hold text, .jsonl, .ndjson, .json, .gz or .zst files",
        paths.empty() ? "an empty list of paths" : paths.front().string(),
        left_out > 0 ? fmt::format(" ({} files there are not text)", left_out) : "");
  return files;
}

DocumentReader::DocumentReader(const TextFile& file, std::string text_field)
    : file_(file),
      text_field_(std::move(text_field)),
      layout_(layout_of(file.format)),
      bytes_(open_bytes(file.path, file.name, packing_of(file.format))) {}

DocumentReader::~DocumentReader() = default;

bool DocumentReader::fill() {
  if (end_) return false;
  if (cursor_ > 0) {
    buffer_.erase(0, cursor_);
    buffer_start_ += cursor_;
    searched_ -= std::min(searched_, cursor_);
    cursor_ = 0;
  }
  constexpr size_t step = 1 << 16;
  const size_t old = buffer_.size();
  const bool begins = buffer_start_ == 0 && old == 0;
  buffer_.resize(old + step);
  const size_t got = bytes_->read(buffer_.data() + old, step);
  buffer_.resize(old + got);
  end_ = got == 0;
  if (begins) {
    if (is_utf16(buffer_))
      fail("{}: is UTF-16; convert it, for example with iconv -f UTF-16 -t UTF-8", file_.name);
    if (buffer_.starts_with(kUtf8Mark)) cursor_ = kUtf8Mark.size();
  }
  if (layout_ != RowLayout::none && buffer_.size() - cursor_ > kMaxRowBytes)
    fail("{}:{}: a row of more than {} MiB; is the file one JSON object a line, or an array of them?",
         file_.name, line_, kMaxRowBytes >> 20);
  return got > 0;
}

bool DocumentReader::next_raw(std::string& text) {
  if (layout_ == RowLayout::values) return next_value(text);
  const bool lines = layout_ == RowLayout::lines;
  const char separator = lines ? '\n' : '\0';
  ++line_;
  for (;;) {
    const size_t found = buffer_.find(separator, std::max(searched_, cursor_));
    if (found != std::string::npos && (lines || found - cursor_ <= kMaxDocumentBytes)) {
      text.assign(buffer_, cursor_, found - cursor_);
      raw_start_ = buffer_start_ + cursor_;
      cursor_ = searched_ = found + 1;
      return true;
    }
    if (!lines && buffer_.size() - cursor_ > kMaxDocumentBytes) {
      // Cut behind the last line end, else between two characters.
      size_t cut = buffer_.rfind('\n', cursor_ + kMaxDocumentBytes - 1);
      if (cut == std::string::npos || cut < cursor_) {
        cut = cursor_ + kMaxDocumentBytes;
        for (int back = 0; back < 3 && (buffer_[cut] & 0xC0) == 0x80; ++back) --cut;
      } else {
        ++cut;
      }
      text.assign(buffer_, cursor_, cut - cursor_);
      raw_start_ = buffer_start_ + cursor_;
      cursor_ = cut;
      searched_ = std::max(searched_, cut);
      return true;
    }
    if (found == std::string::npos) searched_ = buffer_.size();
    if (!fill()) {
      if (cursor_ == buffer_.size()) return false;
      text.assign(buffer_, cursor_);
      raw_start_ = buffer_start_ + cursor_;
      cursor_ = searched_ = buffer_.size();
      return true;
    }
  }
}

// JSON values after one another, or the elements of one array around them all, by counting brackets; the parser
// judges what stands between.
bool DocumentReader::next_value(std::string& text) {
  ++line_;
  const auto have = [&](size_t index) {
    return cursor_ + index < buffer_.size() || (fill() && cursor_ + index < buffer_.size());
  };
  const auto fault = [&](const char* what) { fail("{}: element {}: {}", file_.name, line_, what); };
  for (;; ++cursor_) {
    if (!have(0)) {
      if (array_ == Array::open) fault("the array does not end; the file is truncated, fetch it again");
      return false;
    }
    const char c = buffer_[cursor_];
    if (c == ' ' || c == '\t' || c == '\r' || c == '\n') continue;
    if (array_ == Array::unknown) {
      array_ = c == '[' ? Array::open : Array::none;
      if (array_ == Array::open) continue;
    } else if (array_ == Array::open && (c == ',' || c == ']')) {
      if (c == ',' && !separated_ && line_ > 1) {
        separated_ = true;
        continue;
      }
      if (c == ',' || separated_) fault("not valid JSON: a value is missing");
      array_ = Array::closed;
      continue;
    }
    break;
  }
  if (array_ == Array::closed) fault("the file goes on behind the array's end");
  if (array_ == Array::open && line_ > 1 && !separated_)
    fault("not valid JSON: a comma is missing before it");
  separated_ = false;
  size_t length = 0;
  int64_t depth = 0;
  bool in_string = false;
  for (bool ended = false; !ended && have(length); ++length) {
    const char c = buffer_[cursor_ + length];
    if (in_string) {
      if (c == '\\' && have(length + 1))
        ++length;
      else if (c == '"')
        in_string = false, ended = depth == 0;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      ++depth;
    } else if (c == '}' || c == ']') {
      ended = --depth <= 0;
    } else if (depth == 0 && (c == ',' || c == ' ' || c == '\t' || c == '\r' || c == '\n')) {
      break;
    }
    if (depth < 0) break;  // the array's own bracket
  }
  if (length == 0) fault("not valid JSON: a value was expected");
  raw_start_ = buffer_start_ + cursor_;
  text.assign(buffer_, cursor_, length);
  cursor_ += length;
  return true;
}

std::string DocumentReader::place() const {
  return layout_ == RowLayout::values ? fmt::format("{}: element {}", file_.name, line_)
                                      : fmt::format("{}:{}", file_.name, line_);
}

bool DocumentReader::next(std::string& text) {
  if (!next_raw(text)) {
    if (rows_ > 0 && skipped_rows_ == rows_ && !passed_over_)
      fail("{}: none of its {} rows has text in the field \"{}\" ({}); name the right field", file_.name,
           rows_, text_field_, skipped_fields_);
    return false;
  }
  if (layout_ == RowLayout::none) {
    const size_t bad = find_invalid_utf8(text);
    if (bad != std::string::npos)
      fail("{}: byte {} (0x{:02x}) is not UTF-8; convert the file, for example with iconv", file_.name,
           raw_start_ + bad, static_cast<unsigned char>(text[bad]));
    return true;
  }
  if (is_blank(text)) {
    text.clear();
    return true;
  }
  check_json_nesting(text, place());
  nlohmann::json row;
  try {
    row = nlohmann::json::parse(text);
  } catch (const nlohmann::json::parse_error& e) {
    fail("{}: not valid JSON at byte {} of the row; each row must be one JSON object", place(), e.byte);
  } catch (const nlohmann::json::out_of_range&) {
    fail("{}: holds a number beyond float64's range", place());
  }
  ++rows_;
  if (const std::string* found = text_of(row, text_field_)) {
    text = *found;
    return true;
  }
  text.clear();
  if (skipped_rows_++ == 0) first_skipped_ = place(), skipped_fields_ = fields_of(row);
  if (skipped_rows_ > kFewRows && skipped_rows_ * 10 > rows_)
    fail("{}: {} of {} rows have no text in the field \"{}\" ({}); name the right field, or mend the file",
         place(), skipped_rows_, rows_, text_field_, skipped_fields_);
  return true;
}

int64_t DocumentReader::skip(int64_t count) {
  std::string ignored;
  passed_over_ |= count > 0;
  for (int64_t skipped = 0; skipped < count; ++skipped)
    if (!next_raw(ignored)) return skipped;
  return count;
}

}  // namespace spot

#include "distill/documents.h"

#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "text/unicode.h"

namespace spot {
namespace fs = std::filesystem;

// A file's decompressed bytes, in order.
class DocumentReader::Bytes {
 public:
  virtual ~Bytes() = default;
  // Up to `count` bytes; 0 at the end.
  virtual size_t read(char* out, size_t count) = 0;
};

namespace {

class PlainBytes : public DocumentReader::Bytes {
 public:
  explicit PlainBytes(const fs::path& path) : path_(path), file_(std::fopen(path.c_str(), "rb")) {
    if (!file_) fail("{}: cannot be opened: {}", path.string(), std::strerror(errno));
  }
  ~PlainBytes() override { std::fclose(file_); }
  PlainBytes(const PlainBytes&) = delete;
  PlainBytes& operator=(const PlainBytes&) = delete;

  size_t read(char* out, size_t count) override {
    const size_t got = std::fread(out, 1, count, file_);
    if (got < count && std::ferror(file_))
      fail("{}: cannot be read: {}", path_.string(), std::strerror(errno));
    return got;
  }

 private:
  fs::path path_;
  std::FILE* file_;
};

class GzipBytes : public DocumentReader::Bytes {
 public:
  explicit GzipBytes(const fs::path& path) : path_(path), file_(gzopen(path.c_str(), "rb")) {
    if (!file_) fail("{}: cannot be opened: {}", path.string(), std::strerror(errno));
    gzbuffer(file_, 1 << 17);
    if (gzdirect(file_) && fs::file_size(path) > 0) {
      gzclose(file_);
      fail("{}: is not gzip data; rename the file if it is plain text", path.string());
    }
  }
  ~GzipBytes() override { gzclose(file_); }
  GzipBytes(const GzipBytes&) = delete;
  GzipBytes& operator=(const GzipBytes&) = delete;

  size_t read(char* out, size_t count) override {
    const int got = gzread(file_, out, static_cast<unsigned>(std::min<size_t>(count, 1 << 30)));
    int code = Z_OK;
    const char* message = gzerror(file_, &code);
    if (got < 0 || code != Z_OK)
      fail("{}: damaged or truncated gzip data ({}); fetch the file again", path_.string(),
           code == Z_ERRNO ? std::strerror(errno) : message);
    return static_cast<size_t>(got);
  }

 private:
  fs::path path_;
  gzFile file_;
};

class ZstdBytes : public DocumentReader::Bytes {
 public:
  explicit ZstdBytes(const fs::path& path)
      : path_(path), file_(path), context_(ZSTD_createDCtx()), input_(ZSTD_DStreamInSize(), '\0') {
    ZSTD_DCtx_setParameter(context_, ZSTD_d_windowLogMax, 31);
  }
  ~ZstdBytes() override { ZSTD_freeDCtx(context_); }
  ZstdBytes(const ZstdBytes&) = delete;
  ZstdBytes& operator=(const ZstdBytes&) = delete;

  size_t read(char* out, size_t count) override {
    ZSTD_outBuffer output{out, count, 0};
    while (output.pos < count) {
      if (unread_.pos == unread_.size && !drained_) {
        unread_ = {input_.data(), file_.read(input_.data(), input_.size()), 0};
        drained_ = unread_.size == 0;
      }
      const size_t before = output.pos;
      const size_t consumed = unread_.pos;
      const size_t code = ZSTD_decompressStream(context_, &output, &unread_);
      if (ZSTD_isError(code))
        fail("{}: damaged zstd data ({}); fetch the file again", path_.string(), ZSTD_getErrorName(code));
      // With no input left 0 means that the last frame is complete.
      if (unread_.pos != consumed || output.pos != before) frame_open_ = code != 0;
      if (drained_ && output.pos == before) {
        if (frame_open_) fail("{}: truncated zstd data; fetch the file again", path_.string());
        break;
      }
    }
    return output.pos;
  }

 private:
  fs::path path_;
  PlainBytes file_;
  ZSTD_DCtx* context_;
  std::string input_;
  ZSTD_inBuffer unread_{nullptr, 0, 0};
  bool drained_ = false, frame_open_ = false;
};

std::unique_ptr<DocumentReader::Bytes> open_bytes(const fs::path& path) {
  std::error_code code;
  if (!fs::exists(path, code)) fail("{}: no such file", path.string());
  if (fs::is_directory(path, code)) fail("{}: is a folder, a file was expected", path.string());
  if (path.extension() == ".gz") return std::make_unique<GzipBytes>(path);
  if (path.extension() == ".zst") return std::make_unique<ZstdBytes>(path);
  return std::make_unique<PlainBytes>(path);
}

fs::path inner_name(const fs::path& path) {
  return path.extension() == ".gz" || path.extension() == ".zst" ? path.stem() : path.filename();
}

// Whether the file's beginning is UTF-8 without control characters that no text holds.
bool begins_as_text(const fs::path& path) {
  std::string head(4096, '\0');
  try {
    head.resize(open_bytes(path)->read(head.data(), head.size()));
  } catch (const Error&) {
    return false;  // not what its name says
  }
  const size_t bad = find_invalid_utf8(head);
  if (bad != std::string::npos && bad + 4 <= head.size()) return false;  // not merely a character cut in two
  return std::none_of(head.begin(), head.end(),
                      [](char c) { return (c > 0 && c < '\t') || (c > '\r' && c < '\x1b'); });
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

}  // namespace

std::vector<fs::path> list_text_files(const std::vector<fs::path>& paths) {
  std::vector<fs::path> files;
  size_t left_out = 0;
  for (const fs::path& path : paths) {
    std::error_code code;
    if (!fs::exists(path, code))
      fail("{}: no such file or folder; name the training text with an existing path", path.string());
    if (!fs::is_directory(path, code)) {
      files.push_back(path);
      continue;
    }
    std::vector<fs::path> inside;
    for (const fs::path& file : files_below(path)) {
      if (inner_name(file).extension() != ".tar" && file.extension() != ".tgz" && begins_as_text(file)) {
        inside.push_back(file);
      } else {
        ++left_out;
      }
    }
    std::sort(inside.begin(), inside.end());
    files.insert(files.end(), inside.begin(), inside.end());
  }
  if (files.empty())
    fail("no text files in {}{}; give files, or folders that hold text, .jsonl, .gz or .zst files",
         paths.empty() ? "an empty list of paths" : paths.front().string(),
         left_out > 0 ? fmt::format(" ({} files there are not text)", left_out) : "");
  return files;
}

DocumentReader::DocumentReader(const fs::path& path, std::string text_field)
    : path_(path),
      text_field_(std::move(text_field)),
      lines_(inner_name(path).extension() == ".jsonl"),
      bytes_(open_bytes(path)) {}

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
  buffer_.resize(old + step);
  const size_t got = bytes_->read(buffer_.data() + old, step);
  buffer_.resize(old + got);
  end_ = got == 0;
  return got > 0;
}

bool DocumentReader::next_raw(std::string& text) {
  const char separator = lines_ ? '\n' : '\0';
  ++line_;
  for (;;) {
    const size_t found = buffer_.find(separator, std::max(searched_, cursor_));
    if (found != std::string::npos && (lines_ || found - cursor_ <= kMaxDocumentBytes)) {
      text.assign(buffer_, cursor_, found - cursor_);
      raw_start_ = buffer_start_ + cursor_;
      cursor_ = searched_ = found + 1;
      return true;
    }
    if (!lines_ && buffer_.size() - cursor_ > kMaxDocumentBytes) {
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

bool DocumentReader::next(std::string& text) {
  if (!next_raw(text)) return false;
  if (!lines_) {
    const size_t bad = find_invalid_utf8(text);
    if (bad != std::string::npos)
      fail("{}: byte {} (0x{:02x}) is not UTF-8; convert the file, for example with iconv", path_.string(),
           raw_start_ + bad, static_cast<unsigned char>(text[bad]));
    return true;
  }
  if (text.find_first_not_of(" \t\r") == std::string::npos) {
    text.clear();
    return true;
  }
  nlohmann::json object;
  try {
    object = nlohmann::json::parse(text);
  } catch (const nlohmann::json::parse_error& e) {
    fail("{}:{}: not valid JSON at byte {} of the line; each line must be one JSON object", path_.string(),
         line_, e.byte);
  }
  const auto field = object.is_object() ? object.find(text_field_) : object.end();
  if (!object.is_object() || field == object.end() || !field->is_string())
    fail("{}:{}: no string field \"{}\"; each line must be an object that has it", path_.string(), line_,
         text_field_);
  text = field->get<std::string>();
  return true;
}

int64_t DocumentReader::skip(int64_t count) {
  std::string ignored;
  for (int64_t skipped = 0; skipped < count; ++skipped)
    if (!next_raw(ignored)) return skipped;
  return count;
}

}  // namespace spot

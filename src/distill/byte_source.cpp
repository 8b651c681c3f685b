#include "distill/byte_source.h"

#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string_view>

#include "core/error.h"

namespace spot {
namespace fs = std::filesystem;

namespace {

class PlainBytes : public ByteSource {
 public:
  PlainBytes(const fs::path& path, const std::string& name)
      : name_(name), file_(std::fopen(path.c_str(), "rb")) {
    if (!file_) fail("{}: cannot be opened: {}", name, std::strerror(errno));
  }
  ~PlainBytes() override { std::fclose(file_); }
  PlainBytes(const PlainBytes&) = delete;
  PlainBytes& operator=(const PlainBytes&) = delete;

  size_t read(char* out, size_t count) override {
    const size_t got = std::fread(out, 1, count, file_);
    if (got < count && std::ferror(file_)) fail("{}: cannot be read: {}", name_, std::strerror(errno));
    return got;
  }

 private:
  std::string name_;
  std::FILE* file_;
};

// Members one after another are one text, zeros behind the last are padding, as gzip has it. What else lies there is
// damage: zlib's gzread would leave it out, and all members behind it, without a word.
class GzipBytes : public ByteSource {
 public:
  GzipBytes(const fs::path& path, const std::string& name)
      : name_(name), file_(path, name), input_(size_t{1} << 17, '\0') {
    if (fill() && !std::string_view(input_.data(), stream_.avail_in).starts_with("\x1f\x8b"))
      fail("{}: is not gzip data; rename the file if it is plain text", name);
    constexpr int kGzipOnly = 15 + 16;  // of inflateInit2
    if (inflateInit2(&stream_, kGzipOnly) != Z_OK) fail("{}: zlib has no memory", name);
  }
  ~GzipBytes() override { inflateEnd(&stream_); }
  GzipBytes(const GzipBytes&) = delete;
  GzipBytes& operator=(const GzipBytes&) = delete;

  size_t read(char* out, size_t count) override {
    count = std::min<size_t>(count, 1 << 30);
    stream_.next_out = reinterpret_cast<Bytef*>(out);
    stream_.avail_out = static_cast<uInt>(count);
    while (stream_.avail_out > 0 && fill()) {
      if (!member_open_ && members_ > 0 && *stream_.next_in == 0) {
        --stream_.avail_in, ++stream_.next_in, padded_ = true;
        continue;
      }
      if (padded_) damaged("data behind the padding");
      const int code = inflate(&stream_, Z_NO_FLUSH);
      if (code != Z_OK && code != Z_STREAM_END) damaged(stream_.msg ? stream_.msg : "inconsistent data");
      member_open_ = code == Z_OK;
      if (code == Z_STREAM_END) inflateReset(&stream_), ++members_;
    }
    if (member_open_ && drained_ && stream_.avail_out == count) damaged("unexpected end of file");
    return count - stream_.avail_out;
  }

 private:
  // Whether there is more input.
  bool fill() {
    if (stream_.avail_in > 0) return true;
    stream_.next_in = reinterpret_cast<Bytef*>(input_.data());
    stream_.avail_in = static_cast<uInt>(file_.read(input_.data(), input_.size()));
    drained_ = stream_.avail_in == 0;
    return !drained_;
  }
  [[noreturn]] void damaged(const std::string& what) const {
    fail("{}: damaged or truncated gzip data ({}); fetch the file again", name_, what);
  }

  std::string name_;
  PlainBytes file_;
  std::string input_;
  z_stream stream_{};
  int64_t members_ = 0;
  bool member_open_ = false, padded_ = false, drained_ = false;
};

class ZstdBytes : public ByteSource {
 public:
  ZstdBytes(const fs::path& path, const std::string& name)
      : name_(name), file_(path, name), context_(ZSTD_createDCtx()), input_(ZSTD_DStreamInSize(), '\0') {
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
        fail("{}: damaged zstd data ({}); fetch the file again", name_, ZSTD_getErrorName(code));
      // With no input left 0 means that the last frame is complete.
      if (unread_.pos != consumed || output.pos != before) frame_open_ = code != 0;
      if (drained_ && output.pos == before) {
        if (frame_open_) fail("{}: truncated zstd data; fetch the file again", name_);
        break;
      }
    }
    return output.pos;
  }

 private:
  std::string name_;
  PlainBytes file_;
  ZSTD_DCtx* context_;
  std::string input_;
  ZSTD_inBuffer unread_{nullptr, 0, 0};
  bool drained_ = false, frame_open_ = false;
};

}  // namespace

std::unique_ptr<ByteSource> open_bytes(const fs::path& path, const std::string& name, Packing packing) {
  std::error_code code;
  if (!fs::exists(path, code)) fail("{}: no such file", name);
  if (fs::is_directory(path, code)) fail("{}: is a folder, a file was expected", name);
  if (packing == Packing::gzip) return std::make_unique<GzipBytes>(path, name);
  if (packing == Packing::zstd) return std::make_unique<ZstdBytes>(path, name);
  return std::make_unique<PlainBytes>(path, name);
}

}  // namespace spot

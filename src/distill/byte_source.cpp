#include "distill/byte_source.h"

#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

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

class GzipBytes : public ByteSource {
 public:
  GzipBytes(const fs::path& path, const std::string& name) : name_(name), file_(gzopen(path.c_str(), "rb")) {
    if (!file_) fail("{}: cannot be opened: {}", name, std::strerror(errno));
    gzbuffer(file_, 1 << 17);
    if (gzdirect(file_) && fs::file_size(path) > 0) {
      gzclose(file_);
      fail("{}: is not gzip data; rename the file if it is plain text", name);
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
      fail("{}: damaged or truncated gzip data ({}); fetch the file again", name_,
           code == Z_ERRNO ? std::strerror(errno) : message);
    return static_cast<size_t>(got);
  }

 private:
  std::string name_;
  gzFile file_;
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

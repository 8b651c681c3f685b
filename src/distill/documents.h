// Documents from text files, streamed: plain or compressed, one document a file or many.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace spot {

// Longer documents are cut into several at line ends, so that no file needs to fit in memory.
inline constexpr size_t kMaxDocumentBytes = size_t{1} << 20;

// The files that `paths` name, folders searched recursively; each path's files are sorted by name. Inside
// folders, hidden files, symbolic links, archives and files that do not begin as text are left out; a file
// named directly is always taken. Throws Error on a path that does not exist and when no file is left.
std::vector<std::filesystem::path> list_text_files(const std::vector<std::filesystem::path>& paths);

// Reads one file's documents in order. By name: *.jsonl holds one JSON object a line, whose string
// `text_field` is the document; anything else is text, in which NUL bytes, if any, part documents. A further
// .gz or .zst is decompressed on the way.
class DocumentReader {
 public:
  explicit DocumentReader(const std::filesystem::path& path, std::string text_field = "text");
  ~DocumentReader();

  // The next document into `text` (it may be blank); false at the end. Throws Error on unreadable or damaged
  // files, on bytes that are not UTF-8 (with their offset) and on malformed lines (as file:line).
  bool next(std::string& text);
  // Passes over up to `count` documents without checking them; how many there were.
  int64_t skip(int64_t count);

  class Bytes;

 private:
  bool next_raw(std::string& text);
  bool fill();

  std::filesystem::path path_;
  std::string text_field_;
  bool lines_;
  std::unique_ptr<Bytes> bytes_;
  std::string buffer_;   // read ahead; begins at buffer_start_
  size_t cursor_ = 0;    // next unread byte of buffer_
  size_t searched_ = 0;  // no separator before this index of buffer_
  uint64_t buffer_start_ = 0;
  uint64_t raw_start_ = 0;  // offset of the last raw document in the decompressed file
  int64_t line_ = 0;
  bool end_ = false;
};

}  // namespace spot

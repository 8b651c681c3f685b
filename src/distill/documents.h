// Documents from text files, streamed: plain or compressed, one document a file or many.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "distill/byte_source.h"

namespace spot {

// Longer documents are cut into several at line ends, so that no file needs to fit in memory.
inline constexpr size_t kMaxDocumentBytes = size_t{1} << 20;
// A longer row is no row: the file is not what its name says.
inline constexpr size_t kMaxRowBytes = size_t{256} << 20;
// So many rows without text are skipped in any file; more only while they are less than a tenth of the rows.
inline constexpr int64_t kFewRows = 100;

// A file of training text.
struct TextFile {
  std::filesystem::path path;    // where the bytes are
  std::string name;              // what messages call it
  std::filesystem::path format;  // a file name in small letters, whose endings say how the bytes are read
  std::shared_ptr<const void> keep_alive;

  TextFile(const std::filesystem::path& file);  // NOLINT(google-explicit-constructor): a path names its file
};

// The files that `paths` name, folders searched recursively; each path's files are sorted by name. Inside
// folders, hidden files, symbolic links, archives, .json files that do not begin with a row of text and files that
// do not begin as text are left out; a file named directly is always taken. Throws Error on a path that does not
// exist, on devices, and when no file is left.
std::vector<TextFile> list_text_files(const std::vector<std::filesystem::path>& paths,
                                      const std::string& text_field = "text");

// Pipes, FIFOs and sockets give their bytes once, and training reads them again for each epoch, for the held-out
// text and when it is resumed. They are copied to a file in `folder` that has no name there and ends with the
// process; their first bytes say how they are read, as endings do for others. Throws Error when they give nothing
// and when the disk is full.
void spool_pipes(std::vector<TextFile>& files, const std::filesystem::path& folder);

// Whether there is nothing but white space.
bool is_blank(const std::string& text);

// How a file parts its rows: not at all (NUL bytes, if any, part documents), one JSON value a line, or JSON values one
// after another, if need be as elements of one array.
enum class RowLayout { none, lines, values };

// Reads one file's documents in order. By name: *.jsonl and *.ndjson hold one JSON value a line, *.json an array of
// them or one after another; each is an object whose string `text_field` is the document, or that string itself.
// Anything else is text, in which NUL bytes, if any, part documents. A further .gz or .zst is decompressed on the way.
// A UTF-8 mark at the beginning is no part of the text.
class DocumentReader {
 public:
  explicit DocumentReader(const TextFile& file, std::string text_field = "text");
  ~DocumentReader();

  // The next document into `text` (it may be blank); false at the end. A row without text (the field absent, null or
  // no string) counts as a blank document. Throws Error on unreadable or damaged files, on bytes that are not UTF-8
  // (with their offset), on malformed rows (as file:line), and when too many rows, or all, have no text.
  bool next(std::string& text);
  // Passes over up to `count` documents without checking them; how many there were.
  int64_t skip(int64_t count);

  // Rows without text that next() met, and the place of the first one.
  int64_t skipped_rows() const { return skipped_rows_; }
  const std::string& first_skipped() const { return first_skipped_; }

 private:
  bool next_raw(std::string& text);
  bool next_value(std::string& text);
  bool fill();
  std::string place() const;

  TextFile file_;
  std::string text_field_;
  RowLayout layout_;
  std::unique_ptr<ByteSource> bytes_;
  std::string buffer_;   // read ahead; begins at buffer_start_
  size_t cursor_ = 0;    // next unread byte of buffer_
  size_t searched_ = 0;  // no separator before this index of buffer_
  uint64_t buffer_start_ = 0;
  uint64_t raw_start_ = 0;  // offset of the last raw document in the decompressed file
  int64_t line_ = 0;        // of RowLayout::values: the element
  bool end_ = false;
  enum class Array { unknown, none, open, closed } array_ = Array::unknown;  // around the values
  bool separated_ = false;  // a comma stands before the next value
  bool passed_over_ = false;
  int64_t rows_ = 0, skipped_rows_ = 0;  // parsed by next()
  std::string first_skipped_, skipped_fields_;
};

}  // namespace spot

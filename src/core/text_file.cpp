#include "core/text_file.h"

#include "core/error.h"
#include "core/files.h"

namespace spot {
namespace fs = std::filesystem;

std::string read_text_file(const fs::path& path) {
  std::string text = read_file(path);
  if (text.starts_with(kUtf8Mark)) text.erase(0, kUtf8Mark.size());
  if (is_utf16(text))
    fail("{}: is UTF-16; convert it, for example with iconv -f UTF-16 -t UTF-8", path.string());
  return text;
}

bool is_utf16(std::string_view text) {
  return text.starts_with("\xff\xfe") || text.starts_with("\xfe\xff");
}

void refuse_pointer(std::string_view bytes, const std::string& name) {
  if (bytes.starts_with("version https://git-lfs"))
    fail("{}: is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`", name);
}

void check_json_nesting(std::string_view text, const std::string& where) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\')
        ++i;
      else if (c == '"')
        in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > kMaxJsonDepth)
        fail("{}: JSON nested deeper than {} levels at byte {}; no file of this kind is", where,
             kMaxJsonDepth, i);
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
}

}  // namespace spot

#include "core/new_folder.h"

#include "core/error.h"
#include "core/files.h"

namespace spot {

namespace fs = std::filesystem;

fs::path free_folder(const fs::path& given) {
  if (given.empty()) fail("the new folder has an empty name; name one");
  std::error_code code;
  fs::path out = fs::weakly_canonical(fs::absolute(given), code);
  if (!out.has_filename()) out = out.parent_path();
  if (out.empty() || !out.has_filename()) fail("{}: cannot be a new folder; name another", given.string());
  if (!fs::exists(out, code) && !fs::is_symlink(out, code)) return out;
  if (!fs::is_directory(out, code)) fail("{}: is a file already; name another folder", out.string());
  if (!fs::is_empty(out, code)) fail("{}: holds files already; name another folder", out.string());
  return out;
}

NewFolder::NewFolder(const fs::path& out, const std::string& command)
    : out_(out), path_(out.string() + ".unfinished") {
  for (fs::path above = out_.parent_path(); !fs::exists(above); above = above.parent_path())
    made_.push_back(above);
  try {
    make_folder(path_);
    lock_ = FolderLock(path_, command);
    free_folder(out_);
  } catch (...) {
    discard(false);
    throw;
  }
  // What a run that was killed left.
  std::vector<fs::path> old;
  std::error_code code;
  for (fs::directory_iterator entry(path_, code), end; !code && entry != end; entry.increment(code))
    if (entry->path().filename() != ".lock") old.push_back(entry->path());
  for (const fs::path& entry : old) remove_folder(entry);
}

NewFolder::~NewFolder() {
  if (!path_.empty()) discard(true);
}

void NewFolder::finish() {
  std::error_code code;
  fs::rename(path_, out_, code);
  if (code)
    fail("{}: cannot be made of {}: {}; name another folder", out_.string(), path_.string(), code.message());
  path_.clear();
  fs::remove(out_ / ".lock", code);
  sync_folder(out_.parent_path());
}

// Of a folder whose lock another process holds nothing may go.
void NewFolder::discard(bool whole) {
  std::error_code ignored;
  if (whole) {
    remove_folder(path_);
  } else {
    lock_ = {};
    fs::remove(path_, ignored);
  }
  for (const fs::path& above : made_) fs::remove(above, ignored);
}

}  // namespace spot

// Folders of results that appear whole or not at all.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "core/folder_lock.h"

namespace spot {

// The absolute path of a folder to be made. Throws Error unless nothing is there, or an empty folder.
std::filesystem::path free_folder(const std::filesystem::path& given);

// A new folder under another name, OUT.unfinished, which becomes `out` when all is there. What is not finished goes, and what
// a killed run left goes with the next one. One process at a time.
class NewFolder {
 public:
  // `out`: of free_folder; `command`: what a second process is told of the first. Throws Error, as free_folder too.
  NewFolder(const std::filesystem::path& out, const std::string& command);
  ~NewFolder();
  NewFolder(const NewFolder&) = delete;
  NewFolder& operator=(const NewFolder&) = delete;

  // Where to write.
  const std::filesystem::path& path() const { return path_; }
  void finish();

 private:
  void discard(bool whole);

  std::filesystem::path out_, path_;
  std::vector<std::filesystem::path> made_;  // parents, the deepest first
  FolderLock lock_;
};

}  // namespace spot

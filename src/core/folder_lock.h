// One process at a time writes into a folder.
#pragma once

#include <filesystem>
#include <string>

namespace spot {

// Holds folder/.lock while alive. The lock is the kernel's (flock): a crash, kill -9 or a reboot ends it with the
// process, and the file that a crash leaves behind locks nothing. The file says who holds it.
class FolderLock {
 public:
  // Locks nothing.
  FolderLock() = default;
  // `command` is what the holder is said to be. The folder must exist. Throws Error when another process holds the
  // lock, naming its process id, machine, time of start and command, and when the file cannot be made. A file
  // system without locks is met with a notice.
  FolderLock(const std::filesystem::path& folder, const std::string& command);
  ~FolderLock();
  FolderLock(FolderLock&& other) noexcept;
  FolderLock& operator=(FolderLock&& other) noexcept;

 private:
  std::filesystem::path path_;
  int file_ = -1;
};

}  // namespace spot

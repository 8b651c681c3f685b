#include "core/folder_lock.h"

#include <fcntl.h>
#include <fmt/chrono.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <utility>

#include "core/error.h"
#include "core/notice.h"

namespace spot {
namespace {

std::string holder_text(const std::string& command) {
  std::array<char, 256> host{};
  ::gethostname(host.data(), host.size() - 1);
  return fmt::format("process {} on {} since {:%Y-%m-%d %H:%M:%S} UTC: {}\n", ::getpid(), host.data(),
                     fmt::gmtime(std::time(nullptr)), command);
}

std::string read_holder(int file) {
  std::array<char, 512> text{};
  const ssize_t count = ::pread(file, text.data(), text.size(), 0);
  std::string holder(text.data(), count > 0 ? static_cast<size_t>(count) : 0);
  holder = holder.substr(0, holder.find('\n'));
  return holder.empty() ? "another process" : holder;
}

// Whether the path still names the open file; its last holder may have removed it before this process locked it.
bool is_current(int file, const std::filesystem::path& path) {
  struct stat open_file{}, named{};
  return ::fstat(file, &open_file) == 0 && ::stat(path.c_str(), &named) == 0 &&
         open_file.st_ino == named.st_ino && open_file.st_dev == named.st_dev;
}

}  // namespace

FolderLock::FolderLock(const std::filesystem::path& folder, const std::string& command)
    : path_(folder / ".lock") {
  for (;;) {
    file_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (file_ < 0) fail("{}: cannot be written: {}", path_.string(), std::strerror(errno));
    if (::flock(file_, LOCK_EX | LOCK_NB) != 0) {
      const int why = errno;
      const std::string holder = read_holder(file_);
      ::close(std::exchange(file_, -1));
      if (why == EWOULDBLOCK)
        fail("{} is in use by {}; wait for it or end it, or choose another output folder", folder.string(),
             holder);
      notice("{}: no lock here ({}); see to it that no other process writes into the folder\n",
             path_.string(), std::strerror(why));
      return;
    }
    if (is_current(file_, path_)) break;
    ::close(std::exchange(file_, -1));
  }
  const std::string text = holder_text(command);
  // Who holds it is a courtesy: a full disk shows itself at the writes that matter.
  if (::ftruncate(file_, 0) != 0 || ::pwrite(file_, text.data(), text.size(), 0) < 0) return;
}

FolderLock::~FolderLock() {
  if (file_ < 0) return;
  ::unlink(path_.c_str());  // before the lock ends: whoever waits for it finds that the file has gone
  ::close(file_);
}

FolderLock::FolderLock(FolderLock&& other) noexcept
    : path_(std::move(other.path_)), file_(std::exchange(other.file_, -1)) {}

FolderLock& FolderLock::operator=(FolderLock&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(file_, other.file_);
  return *this;
}

}  // namespace spot

#include "eval/ruler_log.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/error.h"
#include "core/files.h"
#include "eval/ruler_random.h"

namespace spot {
namespace {

// One line without a line break inside; text that is no UTF-8 is replaced.
std::string one_line(const nlohmann::json& json) {
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string hash_of(const nlohmann::json& settings) {
  return fmt::format("{:016x}", stable_hash(one_line(settings)));
}

std::string differing(const nlohmann::json& a, const nlohmann::json& b) {
  std::string names;
  auto add = [&](const std::string& name) { names += (names.empty() ? "" : ", ") + name; };
  for (const auto& [name, value] : a.items())
    if (!b.contains(name) || b[name] != value) add(name);
  for (const auto& [name, value] : b.items())
    if (!a.contains(name)) add(name);
  return names;
}

}  // namespace

RulerLog::RulerLog(const std::filesystem::path& file, const nlohmann::json& settings) : file_(file) {
  if (file.has_parent_path()) make_folder(file.parent_path());
  refuse_special(file);
  descriptor_ = ::open(file.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (descriptor_ < 0) fail("{}: cannot be opened for writing: {}", file.string(), std::strerror(errno));
  try {
    if (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0)
      fail("{}: another run is writing to it; wait for its end, or choose another folder", file.string());
    const std::string bytes = read_file(file);
    size_t begin = 0;
    bool header = false;
    for (size_t end; (end = bytes.find('\n', begin)) != std::string::npos; begin = end + 1) {
      const auto line = nlohmann::json::parse(bytes.begin() + static_cast<std::ptrdiff_t>(begin),
                                              bytes.begin() + static_cast<std::ptrdiff_t>(end), nullptr,
                                              /*allow_exceptions=*/false);
      if (!line.is_object() || (!header && (!line.contains("settings_hash") || !line.contains("settings")))) {
        fail("{}: the line at byte {} is not one of ours; delete that line, or choose another folder",
             file.string(), begin);
      }
      if (header) {
        entries_.push_back(line);
        continue;
      }
      header = true;
      if (line["settings_hash"] != hash_of(settings)) {
        fail("{}: holds results of other settings ({} differ); choose another folder, or delete the file",
             file.string(), differing(line["settings"], settings));
      }
    }
    if (begin < bytes.size() && ::ftruncate(descriptor_, static_cast<off_t>(begin)) != 0)
      fail("{}: its unfinished last line cannot be removed: {}", file.string(), std::strerror(errno));
    if (!header) write(one_line({{"settings_hash", hash_of(settings)}, {"settings", settings}}));
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

RulerLog::~RulerLog() {
  ::close(descriptor_);
}

void RulerLog::append(const nlohmann::json& entry) {
  write(one_line(entry));
}

void RulerLog::write(const std::string& line) {
  struct stat before{};
  if (::fstat(descriptor_, &before) != 0)
    fail("{}: cannot be written: {}", file_.string(), std::strerror(errno));
  size_t done = 0;
  while (done < line.size()) {
    const ssize_t written = ::write(descriptor_, line.data() + done, line.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) break;
    done += static_cast<size_t>(written);
  }
  if (done < line.size() || ::fsync(descriptor_) != 0) {
    const int error = errno;
    // If this fails too, the next run drops the unfinished line.
    [[maybe_unused]] const int ignored = ::ftruncate(descriptor_, before.st_size);
    fail("{}: cannot be written: {}", file_.string(), std::strerror(error));
  }
}

}  // namespace spot

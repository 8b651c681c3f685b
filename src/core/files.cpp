#include "core/files.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <vector>

#include "core/error.h"
#include "core/text_file.h"

namespace spot {
namespace fs = std::filesystem;

bool has_file(const fs::path& path) {
  std::error_code code;
  if (fs::exists(path, code)) return true;
  if (fs::is_symlink(path, code))
    fail("{}: is a link to a file that is not there; fetch it again", path.string());
  return false;
}

void refuse_special(const fs::path& path) {
  std::error_code code;
  if (const fs::file_status there = fs::status(path, code);
      fs::exists(there) && !fs::is_regular_file(there) && !fs::is_directory(there))
    fail("{}: is not a regular file", path.string());
}

std::string read_file(const fs::path& path) {
  std::error_code code;
  if (!has_file(path)) fail("{}: no such file", path.string());
  if (fs::is_directory(path, code)) fail("{}: is a folder, a file was expected", path.string());
  std::ifstream in(path, std::ios::binary);
  if (!in) fail("{}: cannot be opened: {}", path.string(), std::strerror(errno));
  std::string bytes;
  constexpr size_t piece = 1 << 20, most = size_t{1} << 31;
  while (in) {
    if (bytes.size() >= most) fail("{}: is larger than 2 GiB, which no such file is", path.string());
    const size_t before = bytes.size();
    bytes.resize(before + piece);
    in.read(bytes.data() + before, piece);
    bytes.resize(before + static_cast<size_t>(in.gcount()));
  }
  if (in.bad()) fail("{}: cannot be read: {}", path.string(), std::strerror(errno));
  return bytes;
}

nlohmann::json read_json(const fs::path& path) {
  refuse_special(path);
  const std::string bytes = read_file(path);
  refuse_pointer(bytes, path.string());
  check_json_nesting(bytes, path.string());
  try {
    return nlohmann::json::parse(bytes);
  } catch (const nlohmann::json::parse_error& e) {
    fail("{}: not valid JSON at byte {} of {}; the file may be truncated; fetch or make it anew",
         path.string(), e.byte, bytes.size());
  } catch (const nlohmann::json::out_of_range&) {
    fail("{}: holds a number beyond float64's range", path.string());
  }
}

void write_file_atomically(const fs::path& given, const std::function<void(std::ostream&)>& write) {
  refuse_special(given);
  fs::path path = given;
  std::error_code no_link;
  for (int links = 0; fs::is_symlink(path, no_link) && links < 40; ++links)
    path = path.parent_path() / fs::read_symlink(path);
  const fs::path temporary = path.string() + fmt::format(".tmp{}", ::getpid());
  auto give_up = [&](const std::string& why) {
    std::error_code ignored;
    fs::remove(temporary, ignored);
    fail("{}: cannot be written: {}", path.string(), why);
  };
  {
    std::ofstream out(temporary, std::ios::binary | std::ios::trunc);
    if (!out) give_up(std::strerror(errno));
    errno = 0;
    try {
      write(out);
    } catch (...) {
      std::error_code ignored;
      out.close();
      fs::remove(temporary, ignored);
      throw;
    }
    out.flush();
    if (!out) give_up(errno ? std::strerror(errno) : "the write failed");
  }
  const int fd = ::open(temporary.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) give_up(std::strerror(errno));
  const int synced = ::fsync(fd);
  const int sync_errno = errno;
  ::close(fd);
  if (synced != 0) give_up(std::strerror(sync_errno));
  std::error_code code;
  fs::rename(temporary, path, code);
  if (code) give_up(code.message());
  sync_folder(path.has_parent_path() ? path.parent_path() : fs::path("."));
}

void sync_folder(const fs::path& path) {
  const int folder = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (folder < 0) return;
  ::fsync(folder);
  ::close(folder);
}

void remove_temporary_files(const fs::path& folder) {
  std::error_code code, ignored;
  std::vector<fs::path> found;
  for (fs::directory_iterator entry(folder, code), end; !code && entry != end; entry.increment(code)) {
    const std::string name = entry->path().filename().string();
    const size_t mark = name.rfind(".tmp");
    if (mark != std::string::npos && mark + 4 < name.size() &&
        name.find_first_not_of("0123456789", mark + 4) == std::string::npos)
      found.push_back(entry->path());
  }
  for (const fs::path& file : found) fs::remove(file, ignored);
}

void write_file_atomically(const fs::path& path, std::string_view bytes) {
  write_file_atomically(
      path, [&](std::ostream& out) { out.write(bytes.data(), static_cast<std::streamsize>(bytes.size())); });
}

void make_folder(const fs::path& path) {
  std::error_code code;
  fs::create_directories(path, code);
  if (code || !fs::is_directory(path))
    fail("{}: cannot be created as a folder: {}", path.string(), code.message());
}

void remove_folder(const fs::path& path) {
  std::error_code code, ignored;
  if (!fs::is_symlink(path, ignored)) {
    for (fs::directory_iterator entry(path, code), end; !code && entry != end; entry.increment(code)) {
      if (entry->is_directory(ignored) && !entry->is_symlink(ignored)) {
        remove_folder(entry->path());
      } else {
        fs::remove(entry->path(), ignored);
      }
    }
  }
  fs::remove(path, ignored);
}

}  // namespace spot

#include "core/memory.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <new>
#include <regex>
#include <sstream>

#include "core/error.h"

namespace spot {
namespace {

constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();

// The number behind a word in a file such as /proc/meminfo; 0 where there is none.
int64_t number_in(const std::string& path, const std::string& word) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string name;
    int64_t number = 0;
    if (words >> name >> number && name == word) return number;
  }
  return 0;
}

int64_t free_in_system() {
  const int64_t kib = number_in("/proc/meminfo", "MemAvailable:") + number_in("/proc/meminfo", "SwapFree:");
  return kib > 0 ? kib * 1024 : kUnknown;
}

// Of control groups v2, as containers see their own: at the root. File pages are given up first.
int64_t free_in_group() {
  const std::string folder = "/sys/fs/cgroup/";
  int64_t most = 0, used = 0;
  std::ifstream limit(folder + "memory.max"), current(folder + "memory.current");
  if (!(limit >> most) || !(current >> used)) return kUnknown;  // "max" is no number
  used -=
      number_in(folder + "memory.stat", "inactive_file") + number_in(folder + "memory.stat", "active_file");
  return std::max<int64_t>(most - std::max<int64_t>(used, 0), 0);
}

int64_t free_addresses() {
  rlimit limit{};
  int64_t pages = 0;
  std::ifstream statm("/proc/self/statm");
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY || !(statm >> pages))
    return kUnknown;
  const int64_t used = pages * sysconf(_SC_PAGESIZE);
  return std::max<int64_t>(static_cast<int64_t>(std::min<rlim_t>(limit.rlim_cur, kUnknown)) - used, 0);
}

std::string size_text(double bytes) {
  return bytes < (1 << 30) ? fmt::format("{:.1f} MiB", bytes / (1 << 20))
                           : fmt::format("{:.2f} GiB", bytes / (1 << 30));
}

}  // namespace

int64_t available_memory() {
  return std::min({free_in_system(), free_in_group(), free_addresses()});
}

bool is_out_of_memory(const std::exception& error, std::string& asked) {
  asked.clear();
  if (dynamic_cast<const std::bad_alloc*>(&error)) return true;
  static const std::regex host("you tried to allocate ([0-9]+) bytes"),
      device("out of memory\\. Tried to allocate ([0-9.]+ [KMGT]iB)"),
      other("CUDA(\\w*_| error: )(ALLOC_FAILED|out of memory)");
  std::cmatch found;
  if (std::regex_search(error.what(), found, host))
    asked = size_text(std::stod(found[1]));
  else if (std::regex_search(error.what(), found, device) || std::regex_search(error.what(), found, other))
    asked = found.size() == 2 ? found[1].str() : "";
  else
    return false;
  return true;
}

void within_memory(const MemoryNeed& need, const std::function<void()>& work) {
  const std::string wanted = need.bytes > 0 ? size_text(need.bytes) : "more memory than there is";
  if (need.on_host && need.bytes > 0) {
    const int64_t available = available_memory();
    if (need.bytes > static_cast<double>(available))
      fail("out of memory: {} needs {}, {} are available; {}", need.what, wanted,
           size_text(static_cast<double>(available)), need.remedy);
  }
  try {
    work();
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    std::string asked;
    if (!is_out_of_memory(error, asked)) throw;
    fail("out of memory: {} needs {}{}; {}", need.what, wanted,
         asked.empty() ? "" : fmt::format(", and {} in one piece were not to be had", asked), need.remedy);
  }
}

}  // namespace spot

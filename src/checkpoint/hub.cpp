#include "checkpoint/hub.h"

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <vector>

#include "core/error.h"
#include "core/files.h"

namespace spot {
namespace fs = std::filesystem;
namespace {

std::optional<std::string> environment(const char* name) {
  const char* value = std::getenv(name);
  return value && *value ? std::optional<std::string>(value) : std::nullopt;
}

fs::path expanded(const std::string& path) {
  const auto home = environment("HOME");
  return home && (path == "~" || path.starts_with("~/")) ? fs::path(*home + path.substr(1)) : fs::path(path);
}

fs::path hub_cache() {
  for (const char* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}) {
    if (const auto path = environment(name)) return expanded(*path);
  }
  if (const auto home = environment("HF_HOME")) return expanded(*home) / "hub";
  const auto cache = environment("XDG_CACHE_HOME");
  return (cache ? expanded(*cache) : expanded("~/.cache")) / "huggingface" / "hub";
}

bool is_plain(const std::string& name) {
  return !name.empty() && name.front() != '.' && std::all_of(name.begin(), name.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '.';
  });
}

// Whether `text` can be a model's name on the hub.
bool is_hub_name(const std::string& text) {
  const size_t slash = text.find('/');
  return slash != std::string::npos && is_plain(text.substr(0, slash)) && is_plain(text.substr(slash + 1));
}

// The snapshot that refs/main names, or the only one there is.
std::optional<fs::path> snapshot_of(const fs::path& repository) {
  std::error_code code;
  const fs::path reference = repository / "refs" / "main", snapshots = repository / "snapshots";
  if (fs::exists(reference, code)) {
    std::string revision = read_file(reference);
    revision.erase(
        std::find_if(revision.begin(), revision.end(), [](char c) { return c == '\n' || c == '\r'; }),
        revision.end());
    if (!is_plain(revision)) fail("{}: names no revision", reference.string());
    return snapshots / revision;
  }
  std::vector<fs::path> found;
  for (fs::directory_iterator entry(snapshots, code), end; !code && entry != end; entry.increment(code))
    found.push_back(entry->path());
  return found.size() == 1 ? std::optional(found.front()) : std::nullopt;
}

[[noreturn]] void refuse_file(const fs::path& path) {
  if (path.extension() == ".gguf") {
    fail("{}: is a GGUF file; tools/convert_gguf.py makes a checkpoint folder of it", path.string());
  }
  const fs::path parent = path.has_parent_path() ? path.parent_path() : fs::path(".");
  fail("{}: is a file, a checkpoint's folder was expected; give {}", path.string(), parent.string());
}

}  // namespace

fs::path find_checkpoint(const std::string& given) {
  std::error_code code;
  const fs::path path = given;
  if (fs::is_directory(path, code)) return path;
  if (fs::exists(path, code)) refuse_file(path);
  if (!is_hub_name(given)) fail("{}: no such folder", given);

  const size_t slash = given.find('/');
  const fs::path cache = hub_cache();
  const fs::path repository =
      cache / fmt::format("models--{}--{}", given.substr(0, slash), given.substr(slash + 1));
  if (!fs::is_directory(repository, code)) {
    fail(
        "{}: no such folder, and the hub cache {} does not hold a model of that name; `hf download {}` fetches it",
        given, cache.string(), given);
  }
  const auto snapshot = snapshot_of(repository);
  if (!snapshot || !fs::exists(*snapshot / "config.json", code)) {
    fail("{}: the hub cache holds it only in part ({} lacks {}); `hf download {}` fetches the rest", given,
         (snapshot ? *snapshot : repository).string(), snapshot ? "config.json" : "refs/main", given);
  }
  return *snapshot;
}

}  // namespace spot

// Reading and writing whole files, with errors that name the path and leave nothing half-written behind.
#pragma once

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <string_view>

namespace spot {

// Whether there is something at `path`. Throws Error where that is a link to nothing, as a cache fetched in part has.
bool has_file(const std::filesystem::path& path);

// Throws Error where something at `path` is neither file nor folder: a pipe, of which reading might never end, or a device, which
// a report would replace. Links are followed.
void refuse_special(const std::filesystem::path& path);

// The bytes of `path`. Throws Error when it is missing, a folder, or cannot be read.
std::string read_file(const std::filesystem::path& path);

// Parses `path` as JSON. Throws Error with the byte offset of the first fault.
nlohmann::json read_json(const std::filesystem::path& path);

// Writes through a temporary file in the same folder, flushed to disk and renamed over `path`: a reader sees
// the old file or the new one. A link stays, and its file is replaced. On any failure (full disk included) the
// temporary file is removed and Error thrown.
void write_file_atomically(const std::filesystem::path& path, std::string_view bytes);
void write_file_atomically(const std::filesystem::path& path,
                           const std::function<void(std::ostream&)>& write);

// Asks that what was created, renamed or removed in a folder outlives a loss of power, where the file system can.
void sync_folder(const std::filesystem::path& path);

// Removes what write_file_atomically left in a folder when its process was killed. No other process may be writing there.
void remove_temporary_files(const std::filesystem::path& folder);

// Creates a folder and its parents; throws Error if that fails.
void make_folder(const std::filesystem::path& path);

// Removes a folder with all it holds, as far as that can be done; links are removed, not followed. Stands in
// for std::filesystem::remove_all: torch 2.11 exports one of its own, which crashes.
void remove_folder(const std::filesystem::path& path);

}  // namespace spot

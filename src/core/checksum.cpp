#include "core/checksum.h"

#define XXH_INLINE_ALL
#include <fmt/format.h>
#include <xxhash.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "core/error.h"

namespace spot {

struct Checksum::State {
  XXH3_state_t xxh3;
};

Checksum::Checksum() : state_(std::make_unique<State>()) {
  XXH3_64bits_reset(&state_->xxh3);
}
Checksum::~Checksum() = default;

void Checksum::add(std::string_view bytes) {
  XXH3_64bits_update(&state_->xxh3, bytes.data(), bytes.size());
}

std::string Checksum::text() const {
  return fmt::format("{:016x}", XXH3_64bits_digest(&state_->xxh3));
}

std::string checksum_of(std::string_view bytes) {
  Checksum sum;
  sum.add(bytes);
  return sum.text();
}

std::string checksum_of_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) fail("{}: cannot be opened: {}", path.string(), std::strerror(errno));
  Checksum sum;
  std::string piece(size_t{1} << 20, '\0');
  while (in.read(piece.data(), static_cast<std::streamsize>(piece.size())) || in.gcount() > 0)
    sum.add({piece.data(), static_cast<size_t>(in.gcount())});
  if (in.bad()) fail("{}: cannot be read: {}", path.string(), std::strerror(errno));
  return sum.text();
}

namespace {

std::string checksum_without_seal(nlohmann::json object) {
  object.erase("checksum");
  return checksum_of(object.dump());
}

}  // namespace

void seal(nlohmann::json& object) {
  object["checksum"] = checksum_without_seal(object);
}

void check_seal(const nlohmann::json& object, const std::string& source) {
  if (!object.is_object() || !object.contains("checksum")) return;
  if (object.at("checksum") != checksum_without_seal(object))
    fail(
        "{}: its contents are not those that its checksum was made of; the file is damaged, restore it (or, after a change "
        "that is meant, remove the field \"checksum\")",
        source);
}

void check_file(const std::filesystem::path& path, const nlohmann::json& expected) {
  if (!expected.is_null() && expected != checksum_of_file(path))
    fail("{}: its checksum is not the one noted beside it; the file is damaged, restore it", path.string());
}

}  // namespace spot

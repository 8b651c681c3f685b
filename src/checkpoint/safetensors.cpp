#include "checkpoint/safetensors.h"

#include <fcntl.h>
#include <fmt/ranges.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "core/text_file.h"

namespace spot {
namespace {

using nlohmann::json;
static_assert(std::endian::native == std::endian::little,
              "the format is little-endian and tensors are mapped as stored");

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit

struct DtypeName {
  const char* name;
  at::ScalarType dtype;
};
constexpr DtypeName kDtypes[] = {
    {"F64", at::kDouble},
    {"F32", at::kFloat},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"I64", at::kLong},
    {"I32", at::kInt},
    {"I16", at::kShort},
    {"I8", at::kChar},
    {"U64", at::kUInt64},
    {"U32", at::kUInt32},
    {"U16", at::kUInt16},
    {"U8", at::kByte},
    {"BOOL", at::kBool},
    {"F8_E4M3", at::kFloat8_e4m3fn},
    {"F8_E5M2", at::kFloat8_e5m2},
};

// Parses the header; nullopt when a key occurs twice in one object (the JSON parser itself keeps the last
// one).
std::optional<json> parse_header(const char* begin, const char* end, std::string& duplicate) {
  std::vector<std::set<std::string>> keys;  // of each open object
  bool twice = false;
  const auto watch = [&](int, json::parse_event_t event, json& value) {
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second && !twice) {
      twice = true;
      duplicate = value.get<std::string>();
    }
    return true;
  };
  json header = json::parse(begin, end, watch);
  if (twice) return std::nullopt;
  return header;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

}  // namespace

struct SafetensorsFile::Mapping {
  char* bytes = nullptr;
  uint64_t size = 0;

  explicit Mapping(const std::filesystem::path& path) {
    if (!has_file(path)) fail("{}: no such file", path.string());
    const int file =
        ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe is refused, not waited for
    if (file < 0) fail("{}: cannot be opened: {}", path.string(), std::strerror(errno));
    struct stat info{};
    if (::fstat(file, &info) != 0 || !S_ISREG(info.st_mode)) {
      ::close(file);
      fail("{}: is not a regular file", path.string());
    }
    size = static_cast<uint64_t>(info.st_size);
    if (size < 8) {
      ::close(file);
      fail("{}: {} bytes are too few for a safetensors file; it is truncated, fetch or make it anew",
           path.string(), size);
    }
    // Private and writable: a tensor changed in place must not fault, nor reach the file.
    void* address = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file, 0);
    const int map_errno = errno;
    ::close(file);
    if (address == MAP_FAILED) fail("{}: cannot be mapped: {}", path.string(), std::strerror(map_errno));
    bytes = static_cast<char*>(address);
  }
  ~Mapping() { ::munmap(bytes, size); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
};

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path)
    : path_(path), mapping_(std::make_shared<Mapping>(path)) {
  read_header();
}

void SafetensorsFile::read_header() {
  const std::string file = path_.string();
  refuse_pointer({mapping_->bytes, std::min<uint64_t>(mapping_->size, 200)}, file);
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, mapping_->bytes, 8);
  if (header_bytes > kMaxHeaderBytes) {
    fail("{}: header length {} exceeds the format's limit of {} bytes; this is no safetensors file", file,
         header_bytes, kMaxHeaderBytes);
  }
  if (header_bytes > mapping_->size - 8) {
    fail(
        "{}: header of {} bytes does not fit in the file of {} bytes; it is truncated, fetch or make it anew",
        file, header_bytes, mapping_->size);
  }
  data_offset_ = 8 + header_bytes;
  const uint64_t data_bytes = mapping_->size - data_offset_;
  const char* begin = mapping_->bytes + 8;
  if (header_bytes == 0 || *begin != '{') fail("{}: the header does not start with '{{'", file);

  check_json_nesting({begin, header_bytes}, file);
  json header;
  try {
    std::string duplicate;
    auto parsed = parse_header(begin, begin + header_bytes, duplicate);
    if (!parsed) fail("{}: the header names '{}' twice", file, duplicate);
    header = std::move(*parsed);
  } catch (const json::exception& e) {
    const auto* parse = dynamic_cast<const json::parse_error*>(&e);
    fail("{}: the header is not valid JSON (byte {} of {})", file, parse ? parse->byte : 0, header_bytes);
  }

  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) fail("{}: __metadata__ is not an object", file);
      for (const auto& [key, text] : value.items()) {
        if (!text.is_string()) fail("{}: __metadata__ '{}' is not a string", file, key);
        metadata_[key] = text.get<std::string>();
      }
      continue;
    }
    const bool has_fields = value.is_object() && value.size() == 3 && value.contains("dtype") &&
                            value.contains("shape") && value.contains("data_offsets");
    if (!has_fields)
      fail("{}: tensor '{}' must have dtype, shape and data_offsets, and nothing else", file, name);
    const json &dtype = value["dtype"], &shape = value["shape"], &offsets = value["data_offsets"];
    if (!dtype.is_string()) fail("{}: tensor '{}': dtype is not a string", file, name);
    const auto* known = std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const DtypeName& d) {
      return dtype.get_ref<const std::string&>() == d.name;
    });
    if (known == std::end(kDtypes)) {
      fail("{}: tensor '{}': dtype {} is not supported", file, name, dtype.get_ref<const std::string&>());
    }
    Entry entry{known->dtype, {}, 0, 0};
    if (!shape.is_array()) fail("{}: tensor '{}': shape is not a list", file, name);
    uint64_t bytes = c10::elementSize(entry.dtype);
    bool empty = false;
    for (const json& dim : shape) {
      if (!dim.is_number_unsigned() || dim.get<uint64_t>() > INT64_MAX) {
        fail("{}: tensor '{}': shape holds {}, a count was expected", file, name, dim.dump());
      }
      entry.shape.push_back(dim.get<int64_t>());
      empty |= entry.shape.back() == 0;
    }
    for (const int64_t dim : entry.shape) {
      // Also with a zero dimension: the strides of the others must not overflow.
      if (dim != 0 && __builtin_mul_overflow(bytes, static_cast<uint64_t>(dim), &bytes)) {
        fail("{}: tensor '{}': shape {} overflows", file, name, shape_text(entry.shape));
      }
    }
    if (bytes > INT64_MAX) fail("{}: tensor '{}': shape {} overflows", file, name, shape_text(entry.shape));
    if (empty) bytes = 0;
    if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
        !offsets[1].is_number_unsigned()) {
      fail("{}: tensor '{}': data_offsets must be two counts", file, name);
    }
    entry.begin = offsets[0].get<uint64_t>();
    entry.end = offsets[1].get<uint64_t>();
    if (entry.begin > entry.end) fail("{}: tensor '{}': data_offsets run backwards", file, name);
    if (entry.end > data_bytes) {
      fail("{}: tensor '{}' ends at byte {} of {}; the file is truncated, fetch or make it anew", file, name,
           entry.end, data_bytes);
    }
    if (entry.end - entry.begin != bytes) {
      fail("{}: tensor '{}': shape {} of {} needs {} bytes, data_offsets give {}", file, name,
           shape_text(entry.shape), known->name, bytes, entry.end - entry.begin);
    }
    entries_.emplace(name, std::move(entry));
  }

  // The tensors must tile the data: sorted by place, each begins where the one before ends.
  // Equal places are told apart by name, so that the error names the same tensor in every run.
  std::vector<std::pair<std::pair<uint64_t, uint64_t>, std::string>> places;
  for (const auto& [name, entry] : entries_) places.push_back({{entry.begin, entry.end}, name});
  std::sort(places.begin(), places.end());
  uint64_t reached = 0;
  for (const auto& [place, name] : places) {
    if (place.first < reached)
      fail("{}: tensor '{}' overlaps another one at byte {}", file, name, place.first);
    if (place.first > reached)
      fail("{}: bytes {} to {} before tensor '{}' belong to none", file, reached, place.first, name);
    reached = place.second;
  }
  if (reached != data_bytes)
    fail("{}: bytes {} to {} at the end belong to no tensor", file, reached, data_bytes);
}

const SafetensorsFile::Entry& SafetensorsFile::entry(const std::string& name) const {
  const auto it = entries_.find(name);
  if (it == entries_.end()) fail("{}: tensor '{}' is missing", path_.string(), name);
  return it->second;
}

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> names;
  for (const auto& [name, entry] : entries_) names.push_back(name);
  return names;
}

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const Entry& found = entry(name);
  char* data = mapping_->bytes + data_offset_ + found.begin;
  const auto options = at::TensorOptions().dtype(found.dtype);
  if (found.begin == found.end) return at::empty(found.shape, options);
  // The format aligns only its header; a tensor that is not aligned to its element is copied.
  if (reinterpret_cast<uintptr_t>(data) % c10::elementSize(found.dtype) != 0) {
    at::Tensor copy = at::empty(found.shape, options);
    std::memcpy(copy.data_ptr(), data, found.end - found.begin);
    return copy;
  }
  return at::from_blob(data, found.shape, [keep = mapping_](void*) {}, options);
}

void write_safetensors(const std::filesystem::path& path,
                       std::vector<std::pair<std::string, at::Tensor>> tensors,
                       const std::map<std::string, std::string>& metadata,
                       const std::function<void(uint64_t bytes)>& before) {
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    const auto a_size = c10::elementSize(a.second.scalar_type()),
               b_size = c10::elementSize(b.second.scalar_type());
    return a_size != b_size ? a_size > b_size : a.first < b.first;
  });
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    if (name == "__metadata__" || header.contains(name))
      fail("{}: tensor '{}' is given twice", path.string(), name);
    const auto dtype = tensor.scalar_type();
    const auto* known = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                     [&](const DtypeName& d) { return d.dtype == dtype; });
    if (known == std::end(kDtypes)) {
      fail("{}: tensor '{}': element type {} has no safetensors name", path.string(), name,
           c10::toString(dtype));
    }
    const uint64_t end = offset + static_cast<uint64_t>(tensor.numel()) * c10::elementSize(dtype);
    header[name] = {{"dtype", known->name}, {"shape", tensor.sizes().vec()}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const json::exception&) {
    fail("{}: a tensor name or metadata string is not valid UTF-8", path.string());
  }
  text.append((8 - text.size() % 8) % 8, ' ');
  if (text.size() > kMaxHeaderBytes)
    fail("{}: a header of {} bytes exceeds the format's limit", path.string(), text.size());

  write_file_atomically(path, [&](std::ostream& out) {
    const uint64_t header_bytes = text.size();
    out.write(reinterpret_cast<const char*>(&header_bytes), 8);
    out.write(text.data(), static_cast<std::streamsize>(text.size()));
    for (const auto& [name, tensor] : tensors) {
      if (before) before(tensor.nbytes());
      const at::Tensor bytes = tensor.detach().cpu().contiguous();
      out.write(static_cast<const char*>(bytes.const_data_ptr()),
                static_cast<std::streamsize>(bytes.nbytes()));
    }
  });
}

}  // namespace spot

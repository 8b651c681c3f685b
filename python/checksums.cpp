// The checksums of selector files for Python: those that `spot` writes and checks.
#include <torch/library.h>

#include <nlohmann/json.hpp>

#include "core/checksum.h"

namespace spot {
namespace {

using nlohmann::json;

TORCH_LIBRARY_FRAGMENT(spot, library) {
  library.def("file_checksum", [](const std::string& path) { return checksum_of_file(path); });
  // A JSON object with its checksum; indented, as `spot` writes it.
  library.def("sealed", [](const std::string& text) {
    json object = json::parse(text);
    seal(object);
    return object.dump(2);
  });
  library.def("check_sealed", [](const std::string& text, const std::string& source) {
    check_seal(json::parse(text), source);
  });
}

}  // namespace
}  // namespace spot

// model.safetensors.index.json beside one real shard.
#include "checkpoint/checkpoint.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto& folder = spot::fuzz::folder();
  static const std::string header = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  static const bool shard = [&] {
    std::string bytes(8, '\0');
    bytes[0] = static_cast<char>(header.size());
    bytes += header + std::string(8, '\1');
    folder.write("model-00001-of-00001.safetensors", reinterpret_cast<const uint8_t*>(bytes.data()),
                 bytes.size());
    return true;
  }();
  (void)shard;
  folder.write("model.safetensors.index.json", data, size);
  return spot::fuzz::expect_nothing_but_errors([&] {
    const spot::Checkpoint checkpoint(folder.path());
    for (const std::string& name : checkpoint.names()) checkpoint.tensor(name);
  });
}

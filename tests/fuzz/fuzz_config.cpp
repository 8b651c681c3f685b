// config.json, and generation_config.json, which hold the same bytes.
#include "checkpoint/config.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto& folder = spot::fuzz::folder();
  folder.write("config.json", data, size);
  folder.write("generation_config.json", data, size);
  return spot::fuzz::expect_nothing_but_errors([&] {
    const spot::ModelConfig config = spot::ModelConfig::load(folder.path());
    config.full_attention_layers();
    for (int64_t layer = 0; layer < config.num_layers; ++layer) config.rotates(layer);
  });
}

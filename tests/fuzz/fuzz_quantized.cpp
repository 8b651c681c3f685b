// The parts of a quantised checkpoint: quantization_config, a zero byte, and the safetensors file that it speaks of.
#include <algorithm>

#include "checkpoint/checkpoint.h"
#include "core/files.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const uint8_t* end = std::find(data, data + size, uint8_t{0});
  if (end == data + size) return 0;
  const auto& folder = spot::fuzz::folder();
  const auto form = folder.write("quantization.json", data, static_cast<size_t>(end - data));
  const auto weights = folder.write("model.safetensors", end + 1, static_cast<size_t>(data + size - end - 1));
  return spot::fuzz::expect_nothing_but_errors([&] {
    const auto quantization = spot::Quantization::from_json(spot::read_json(form), "config.json");
    const spot::Checkpoint checkpoint(weights, quantization);
    for (const std::string& name : checkpoint.names()) {
      const std::vector<int64_t> shape = checkpoint.shape(name);
      const at::Tensor values = checkpoint.tensor(name).contiguous();
      if (values.sizes() != at::IntArrayRef(shape)) std::abort();  // what is promised is what comes
      const auto* bytes = static_cast<const unsigned char*>(values.const_data_ptr());
      volatile unsigned sum = 0;
      for (size_t i = 0; i < values.nbytes(); ++i) sum = sum + bytes[i];
    }
  });
}

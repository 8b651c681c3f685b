// Every tensor of a safetensors file, its values read to the last byte.
#include <ATen/ATen.h>

#include "checkpoint/safetensors.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto path = spot::fuzz::folder().write("model.safetensors", data, size);
  return spot::fuzz::expect_nothing_but_errors([&] {
    const spot::SafetensorsFile file(path);
    for (const std::string& name : file.names()) {
      const at::Tensor tensor = file.tensor(name).contiguous();
      const auto* bytes = static_cast<const unsigned char*>(tensor.const_data_ptr());
      volatile unsigned sum = 0;
      for (size_t i = 0; i < tensor.nbytes(); ++i) sum = sum + bytes[i];
    }
  });
}

// safetensors_copy IN OUT: reads a file or model folder and writes all its tensors into one file, for tests
// against the format's own library.
#include <cstdio>

#include "checkpoint/checkpoint.h"
#include "core/error.h"

int main(int argc, char** argv) {
  try {
    if (argc != 3) spot::fail("usage: safetensors_copy IN OUT");
    const spot::Checkpoint in(argv[1]);
    std::vector<std::pair<std::string, at::Tensor>> tensors;
    for (const std::string& name : in.names()) tensors.emplace_back(name, in.tensor(name));
    spot::write_safetensors(argv[2], tensors, {{"format", "pt"}});
    return 0;
  } catch (const spot::Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
}

// The card that launches go to, and what of it decides between kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

namespace spot::kernels {

struct Device {
  int architecture = 0;  // of the code that it runs (device_code.h); 0: there is none
  bool warpgroup_products = false;
  size_t shared_bytes = 0;  // what a block may have at most
  int multiprocessors = 0;

  // Clusters and programmatic dependent launch are for code of 9.0 and later, not for later cards: such code below
  // lacks the waits.
  bool has_clusters() const { return architecture >= 90; }
  bool has_dependent_launch() const { return architecture >= 90; }
};

// The current device; each is asked once a process. cudaErrorNoKernelImageForDevice where this build has no code for it.
// SPOT_SHARED_BYTES in the environment makes `shared_bytes` less, so that a large card tests what small ones run.
cudaError_t current_device(Device& device);

// One sentence where the device `index` cannot run this build, else nothing.
std::string device_refusal(int index);

}  // namespace spot::kernels

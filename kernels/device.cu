// Contract: device.h. SPOT_BUILT_ARCHITECTURES is what CMake compiled the kernels for.
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "kernels/device.h"
#include "kernels/device_code.h"
#if defined(SPOT_EMULATED)
#include "tests/kernels/emulator/emulator.h"
#endif

namespace spot::kernels {
namespace {

size_t shared_limit(size_t of_card) {
  const char* const asked = std::getenv("SPOT_SHARED_BYTES");
  return asked == nullptr ? of_card : std::min<size_t>(of_card, std::strtoull(asked, nullptr, 10));
}

}  // namespace

#if defined(SPOT_EMULATED)
// A card of three multiprocessors.
cudaError_t current_device(Device& device) {
  device = {emulator::architecture(), false, shared_limit(227 * 1024), 3};
  return cudaSuccess;
}
#else
namespace {

cudaError_t capability_of(int index, int& capability) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  capability = 10 * major + minor;
  return error;
}

cudaError_t ask(int index, Device& device) {
  int capability = 0, shared_bytes = 0;
  cudaError_t error = capability_of(index, capability);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (error != cudaSuccess) return error;
  const DeviceCode code = device_code(SPOT_BUILT_ARCHITECTURES, capability);
  device.architecture = code.architecture;
  device.warpgroup_products = code.architecture == 90 && code.specific;
  device.shared_bytes = shared_limit(static_cast<size_t>(shared_bytes));
  return cudaSuccess;
}

}  // namespace

cudaError_t current_device(Device& device) {
  static std::mutex mutex;
  static std::vector<Device> known;  // without multiprocessors: not asked yet
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<size_t>(index) >= known.size()) known.resize(static_cast<size_t>(index) + 1);
  Device& own = known[static_cast<size_t>(index)];
  if (own.multiprocessors == 0) error = ask(index, own);
  device = own;
  if (error == cudaSuccess && own.architecture == 0) error = cudaErrorNoKernelImageForDevice;
  return error;
}

std::string device_refusal(int index) {
  int capability = 0;
  cudaDeviceProp properties;
  if (capability_of(index, capability) != cudaSuccess ||
      cudaGetDeviceProperties(&properties, index) != cudaSuccess)
    return "";  // whatever is wrong, the first use of the card says it
  return device_refusal(SPOT_BUILT_ARCHITECTURES, properties.name, capability);
}
#endif

}  // namespace spot::kernels

// Kernel launches with Hopper's attributes (clusters, programmatic dependent launch), where the device has them.
#pragma once

#include <cuda_runtime.h>

#include "kernels/device.h"
#include "kernels/types.h"
#if defined(SPOT_EMULATED)
#include "tests/kernels/emulator/emulator.h"
#endif

namespace spot::kernels {

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster_size = 1;  // along x
  Overlap overlap = Overlap::kNone;
};

#if defined(SPOT_EMULATED)
// tests/kernels/emulator: runs the grid on the CPU before it returns.
template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t,
                   const Parameters&... arguments) {
  emulator::run(shape.grid, shape.block, shape.cluster_size, shape.shared_bytes,
                [&]() { kernel(arguments...); });
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t set_shared_bytes(Kernel, size_t) {
  return cudaSuccess;
}
#else
// `attributes` holds two and outlives the result.
inline cudaLaunchConfig_t launch_config(const Device& device, const LaunchShape& shape, cudaStream_t stream,
                                        cudaLaunchAttribute* attributes) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  unsigned count = 0;
  if (shape.cluster_size > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster_size;
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (shape.overlap != Overlap::kNone && device.has_dependent_launch()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  return config;
}

template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   const Parameters&... arguments) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = launch_config(device, shape, stream, attributes);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename Kernel>
cudaError_t set_shared_bytes(Kernel kernel, size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}
#endif

// Dynamic shared memory above 48 KB must be allowed once a kernel. cudaErrorLaunchOutOfResources: more than the current
// device has.
template <typename Kernel>
cudaError_t allow_shared_bytes(Kernel kernel, size_t bytes) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  return bytes > device.shared_bytes ? cudaErrorLaunchOutOfResources : set_shared_bytes(kernel, bytes);
}
// Multiprocessors of the current device.
inline cudaError_t multiprocessor_count(int* count) {
  Device device;
  const cudaError_t error = current_device(device);
  *count = device.multiprocessors;
  return error;
}
// Whether the current device runs code built for sm_90a.
inline cudaError_t has_warpgroup_products(bool* has) {
  Device device;
  const cudaError_t error = current_device(device);
  *has = device.warpgroup_products;
  return error;
}

}  // namespace spot::kernels

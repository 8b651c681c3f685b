// Kernel launches with Hopper's attributes (clusters, programmatic dependent launch).
#pragma once

#include <cuda_runtime.h>

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
cudaError_t allow_shared_bytes(Kernel, size_t) {
  return cudaSuccess;
}
inline cudaError_t multiprocessor_count(int* count) {
  *count = 3;
  return cudaSuccess;
}
#else
// `attributes` holds two and outlives the result.
inline cudaLaunchConfig_t launch_config(const LaunchShape& shape, cudaStream_t stream,
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
  if (shape.overlap != Overlap::kNone) {
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
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = launch_config(shape, stream, attributes);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Dynamic shared memory above 48 KB must be allowed once a kernel.
template <typename Kernel>
cudaError_t allow_shared_bytes(Kernel kernel, size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}
// Multiprocessors of the current device.
inline cudaError_t multiprocessor_count(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}
// Whether the current device runs code built for sm_90a.
inline cudaError_t has_warpgroup_products(bool* has) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *has = major == 9 && minor == 0;
  return error;
}
#endif

}  // namespace spot::kernels

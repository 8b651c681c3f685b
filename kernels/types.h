// Words shared by the launch functions of kernels/: every one takes raw device pointers and a stream,
// allocates nothing, never waits for the device, may be captured in a CUDA graph, and returns the CUDA error
// of its argument check or launch (cudaErrorInvalidValue for shapes, strides or alignments it does not take).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/key_format.h"

namespace spot::kernels {

enum class DataType : int32_t { kBf16 = 0, kF16 = 1, kF32 = 2 };

// How a launch may overlap its predecessor in the stream (programmatic dependent launch).
//
//   kNone      ordinary stream order.
//   kLaunch    the launch is prepared while the predecessor drains; everything is read after it has finished.
//   kHistory   as kLaunch, and lengths, page tables and all key pages but each row's last block are read at
//              once: they must have been written by work that had finished before the predecessor started.
enum class Overlap : int32_t { kNone = 0, kLaunch = 1, kHistory = 2 };

// Workspaces begin with this many bytes of counters, which every launch leaves zeroed: so launches of any size
// may share one, whatever lies behind the counters.
inline constexpr int64_t kCounterBytes = 65536 * 4;

}  // namespace spot::kernels

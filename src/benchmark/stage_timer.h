// Times pieces of device work beside each other: CUDA graph replays between events, or wall time on the CPU.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace spot {

// Work on one of several sets of buffers, which are used in turn so that caches do not flatter.
using StageWork = std::function<void(int64_t set)>;

// On a GPU every stage becomes one CUDA graph of at least 16 calls over the sets; clocks are warmed by a
// second of replays, then the stages are replayed in turn, round by round, so that drift reaches all alike.
// On the CPU (and for a torch without CUDA) the same rounds by wall time, one call over each set.
class StageTimer {
 public:
  StageTimer(at::Device device, int64_t sets, int64_t rounds);
  ~StageTimer();

  // Runs the work once over every set, then captures it. Throws c10::Error as the work does; then nothing was
  // added.
  void add(const std::string& name, const StageWork& work);
  // Microseconds of one call, the median over rounds, by name.
  std::map<std::string, double> measure();

 private:
  struct Stage;
  at::Device device_;
  int64_t sets_, rounds_;
  std::vector<std::unique_ptr<Stage>> stages_;
};

// "NVIDIA H100 80GB HBM3" or "cpu", and torch's version.
std::string describe_device(at::Device device);

// Bytes that can still be allocated on the device; a machine's half for the CPU.
int64_t free_bytes(at::Device device);

struct Bandwidth {
  double read = 0, copy = 0;  // bytes a second: a sum, and a copy (read and written bytes)
};
Bandwidth measure_bandwidth(at::Device device);

}  // namespace spot

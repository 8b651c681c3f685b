// How long the parts of a piece of work take, one after the other.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <memory>
#include <string>

namespace spot {

// CUDA events between the parts on a GPU, so that nothing waits while they run; wall time on the CPU.
class SpanTimer {
 public:
  explicit SpanTimer(at::Device device);
  ~SpanTimer();

  // Whatever is asked of the device from now on belongs to this part, whose name may come again; an empty name: to none.
  void mark(const std::string& name);
  // Ends the last part, waits for the device and starts anew: the seconds of each part.
  std::map<std::string, double> take();

 private:
  struct Mark;
  struct Marks;
  std::unique_ptr<Marks> marks_;
};

}  // namespace spot

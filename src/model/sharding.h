// A frozen backbone that does not fit one device, held by several processes together.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace spot {

struct LayerWeights;

// One of `count` processes.
struct Shards {
  int64_t rank = 0, count = 1;
  // whole = the processes' equally long parts in the order of their ranks. All processes call it in the same
  // order.
  std::function<void(at::Tensor& whole, const at::Tensor& part)> gather;
};

// Each process keeps 1 / count of every layer's matrices, as one flat stretch, and gathers a layer just
// before its use.
// Norms, biases, embedding and head stay whole. docs/distillation.md argues why layers are not split in other
// ways.
class ShardedLayers {
 public:
  explicit ShardedLayers(Shards shards) : shards_(std::move(shards)) {}

  // Takes the next layer's matrices out of it; all but this process' part is freed with them.
  void take(LayerWeights& layer);
  // Puts the matrices of the layer taken as number `index` into `layer`, for as long as those tensors live.
  void put(size_t index, LayerWeights& layer) const;

 private:
  struct Part {
    at::Tensor values;                         // [length], the end filled up with zeros
    std::vector<std::vector<int64_t>> shapes;  // of the matrices; empty where this kind of layer has none
  };
  Shards shards_;
  std::vector<Part> parts_;
};

}  // namespace spot

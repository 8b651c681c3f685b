#include "model/sharding.h"

#include <array>

#include "model/weights.h"

namespace spot {
namespace {

std::array<at::Tensor*, 6> matrices(LayerWeights& layer) {
  return {&layer.attention.qkv.weight, &layer.attention.out.weight, &layer.delta.in.weight,
          &layer.delta.out.weight,     &layer.gate_up.weight,       &layer.down.weight};
}

}  // namespace

void ShardedLayers::take(LayerWeights& layer) {
  Part part;
  std::vector<at::Tensor> flat;
  for (at::Tensor* matrix : matrices(layer)) {
    part.shapes.emplace_back();
    if (!matrix->defined()) continue;
    part.shapes.back() = matrix->sizes().vec();
    flat.push_back(matrix->reshape({-1}));
    matrix->reset();
  }
  at::Tensor whole = at::cat(flat);
  flat.clear();
  const int64_t length = (whole.numel() + shards_.count - 1) / shards_.count;
  whole = at::constant_pad_nd(whole, {0, length * shards_.count - whole.numel()}, 0);
  part.values = whole.narrow(0, shards_.rank * length, length).clone();
  parts_.push_back(std::move(part));
}

void ShardedLayers::put(size_t index, LayerWeights& layer) const {
  const Part& part = parts_[index];
  at::Tensor whole = at::empty({part.values.numel() * shards_.count}, part.values.options());
  shards_.gather(whole, part.values);
  int64_t first = 0;
  const auto targets = matrices(layer);
  for (size_t i = 0; i < targets.size(); ++i) {
    if (part.shapes[i].empty()) continue;
    const int64_t count = c10::multiply_integers(part.shapes[i]);
    *targets[i] = whole.narrow(0, first, count).view(part.shapes[i]);
    first += count;
  }
}

}  // namespace spot

#include "cache/state_slots.h"

#include <algorithm>

#include "core/error.h"

namespace spot {

StateSlots::StateSlots(int64_t num_sequences, int64_t num_snapshots, at::Device device)
    : num_sequences_(num_sequences), num_snapshots_(num_snapshots), device_(device) {
  if (num_sequences < 1 || num_snapshots < 0)
    fail("state slots for {} sequences and {} snapshots were asked for; at least 1 and 0 are needed",
         num_sequences, num_snapshots);
  for (int64_t slot = num_sequences - 1; slot >= 0; --slot) free_.push_back(slot);
  for (int64_t slot = spare() - 1; slot >= num_sequences; --slot) free_snapshots_.push_back(slot);
  touched_.assign(static_cast<size_t>(num_sequences), false);
}

void StateSlots::add(const std::string& name, const std::vector<int64_t>& layers,
                     const std::vector<int64_t>& shape, at::ScalarType dtype) {
  if (num_sequences_ == 0 || num_free() != num_sequences_)
    fail("the state '{}' must be declared in a store with slots, before the first of them is taken", name);
  std::vector<int64_t> sizes = {static_cast<int64_t>(layers.size()), spare() + 1};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  states_.push_back({name, layers, at::zeros(sizes, at::TensorOptions(device_).dtype(dtype))});
}

at::Tensor StateSlots::get(const std::string& name, int64_t layer) const {
  for (const State& state : states_) {
    if (state.name != name) continue;
    const auto found = std::find(state.layers.begin(), state.layers.end(), layer);
    if (found != state.layers.end()) return state.storage.select(0, found - state.layers.begin());
  }
  fail("layer {} has no {} state in the cache", layer, name);
}

int64_t StateSlots::take() {
  if (empty()) return 0;
  if (free_.empty())
    fail("the cache has states for {} sequences and all are open; close one, or make the cache for more",
         num_sequences_);
  const int64_t slot = free_.back();
  free_.pop_back();
  if (touched_[slot])
    for (const State& state : states_) state.storage.select(1, slot).zero_();
  touched_[slot] = true;
  return slot;
}

void StateSlots::release(int64_t slot) {
  if (!empty()) free_.push_back(slot);
}

int64_t StateSlots::num_free() const {
  return static_cast<int64_t>(free_.size());
}

int64_t StateSlots::take_snapshot() {
  if (free_snapshots_.empty()) return -1;
  const int64_t slot = free_snapshots_.back();
  free_snapshots_.pop_back();
  return slot;
}

void StateSlots::release_snapshot(int64_t slot) {
  free_snapshots_.push_back(slot);
}

void StateSlots::copy(int64_t from, int64_t to) {
  for (const State& state : states_) state.storage.select(1, to).copy_(state.storage.select(1, from));
}

std::vector<at::Tensor> StateSlots::save(int64_t slot) const {
  std::vector<at::Tensor> saved;
  for (const State& state : states_) saved.push_back(state.storage.select(1, slot).clone());
  return saved;
}

void StateSlots::restore(int64_t slot, const std::vector<at::Tensor>& saved) {
  if (saved.size() != states_.size())
    fail("{} saved states do not fit a cache with {}", saved.size(), states_.size());
  for (size_t i = 0; i < states_.size(); ++i) states_[i].storage.select(1, slot).copy_(saved[i]);
}

int64_t StateSlots::slot_bytes() const {
  int64_t bytes = 0;
  for (const State& state : states_) bytes += static_cast<int64_t>(state.storage.nbytes()) / (spare() + 1);
  return bytes;
}

}  // namespace spot

// Fixed-size states of sequences (the recurrent states of linear-attention layers), one slot a sequence, with
// snapshots in slots of the same tensors.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <string>
#include <vector>

namespace spot {

// Slots 0 .. num_sequences - 1 are for open sequences, the next num_snapshots for snapshots; the last is the
// spare one, which every padded row of a batch uses and nobody reads: its contents are whatever was last
// written there.
class StateSlots {
 public:
  // Without states (a model without linear-attention layers): slots are numbers alone and never run out.
  StateSlots() = default;
  StateSlots(int64_t num_sequences, int64_t num_snapshots, at::Device device);

  // Declares a state of some layers: a tensor [slots, shape...] a layer, zeroed. Throws Error once a slot is
  // taken.
  void add(const std::string& name, const std::vector<int64_t>& layers, const std::vector<int64_t>& shape,
           at::ScalarType dtype = at::kFloat);
  bool empty() const { return states_.empty(); }

  // [slots, shape...]. Throws Error when the layer has no such state.
  at::Tensor get(const std::string& name, int64_t layer) const;

  // A slot for a sequence, zeroed (an empty past). Throws Error when all are taken.
  int64_t take();
  void release(int64_t slot);
  int64_t num_free() const;
  // A slot for a snapshot, or -1 when all are taken.
  int64_t take_snapshot();
  void release_snapshot(int64_t slot);
  int64_t num_snapshots() const { return num_snapshots_; }
  int64_t spare() const { return num_sequences_ + num_snapshots_; }
  // Copies one slot to another, in every state.
  void copy(int64_t from, int64_t to);

  // Copies of a slot's states, apart from any slot, and putting them back.
  std::vector<at::Tensor> save(int64_t slot) const;
  void restore(int64_t slot, const std::vector<at::Tensor>& saved);

  int64_t slot_bytes() const;  // of one slot, all layers
  int64_t bytes() const { return slot_bytes() * (spare() + 1); }
  at::Device device() const { return device_; }

 private:
  struct State {
    std::string name;
    std::vector<int64_t> layers;
    at::Tensor storage;  // [layers, slots, shape...]: a slot of all layers is copied at once
  };
  int64_t num_sequences_ = 0, num_snapshots_ = 0;
  at::Device device_ = at::kCPU;
  std::vector<State> states_;
  std::vector<int64_t> free_, free_snapshots_;  // the next at the back
  std::vector<bool> touched_;                   // slots that a sequence has had since they were last zeroed
};

}  // namespace spot

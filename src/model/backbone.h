// A pretrained decoder-only transformer, frozen.
#pragma once

#include <ATen/ATen.h>

#include <filesystem>
#include <memory>

#include "cache/state_slots.h"
#include "checkpoint/config.h"
#include "model/attention.h"
#include "model/sharding.h"

namespace spot {

// Text models of the families that ModelConfig reads, on any device, in float32, bfloat16 or float16. Weights are as
// published; norms and softmax run in float32.
class Backbone {
 public:
  // Loads a Hugging Face folder. Throws Error on missing, misshapen or non-finite tensors. Without an
  // explicit dtype the checkpoint's is kept on CUDA, and float32 is used on the CPU.
  static Backbone load(const std::filesystem::path& folder, at::Device device,
                       std::optional<at::ScalarType> dtype = {});
  // The same with a config that differs from the folder's in what does not change the weights, such as YaRN.
  // With several `shards` each process keeps its part of the layers, and every forward() is one of all
  // processes.
  static Backbone load(const std::filesystem::path& folder, const ModelConfig& config, at::Device device,
                       std::optional<at::ScalarType> dtype = {}, const Shards& shards = {});
  // Random weights of the given shape (normal, standard deviation 0.02), for benchmarks and tests.
  static Backbone random(const ModelConfig& config, at::Device device, at::ScalarType dtype, uint64_t seed);

  const ModelConfig& config() const;
  at::Device device() const;
  at::ScalarType dtype() const;
  bool is_sharded() const;

  // Final hidden states [T, hidden_size], after the last norm, of the batch's tokens. Attention goes through
  // `attention`; the recurrent states of linear-attention layers live in `states`, at batch.state_slots (both
  // unused by pure-attention models), and advance by this call: one step for the decode rows, in chunks for
  // the others. Throws Error on token ids outside the vocabulary (on a GPU only build_batch sees them) and on
  // positions past max_position_embeddings.
  //
  // Runs without autograd; a backend that trains turns it on itself (at::AutoGradMode). A decode batch can be
  // captured in a CUDA graph if the backend can: nothing waits for the GPU or depends on its data.
  at::Tensor forward(const Batch& batch, AttentionBackend& attention, const StateSlots& states) const;
  // What makes a full-attention layer's queries, keys and values: the tensors the layer itself reads, so that
  // their memory can be moved (Tensor::set_) to where a selector's rows follow the matrix, and as many zeros
  // the bias.
  struct Projection {
    at::Tensor weight;  // [rows, hidden_size]; undefined where shards hold it
    at::Tensor bias;    // [rows], or undefined
  };
  Projection projection(int64_t layer) const;
  // float32 logits [rows, vocab_size] of hidden states [rows, hidden_size].
  at::Tensor logits(const at::Tensor& hidden) const;

  // A short hash over config and a sample of the weights: what a selector was distilled against.
  std::string fingerprint() const;

 private:
  struct Weights;
  explicit Backbone(std::shared_ptr<const Weights> weights) : weights_(std::move(weights)) {}
  std::shared_ptr<const Weights> weights_;
};

}  // namespace spot

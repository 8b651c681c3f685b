// An FP8 checkpoint of a plain one, as Qwen and DeepSeek publish them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

namespace spot {

struct QuantizeReport {
  int64_t matrices = 0;                  // that became codes
  uint64_t bytes_before = 0, bytes = 0;  // of all tensors
  double largest_change = 0;             // of all matrices: |new - old| / |old|, Frobenius norms
  std::string most_changed;              // the matrix of which that is
  int64_t shards = 0;
};

// Writes a copy of the checkpoint `model` into the new folder `out` (or an empty one) in which the matrices of every
// layer are FP8 codes with block scales (quantize_fp8): "x.weight" E4M3 [out, in] and "x.weight_scale_inv" float32
// [out / 128, in / 128] (rounded up). Embeddings, head, norms, biases, and of Gated DeltaNet conv1d, A_log, dt_bias,
// in_proj_a and in_proj_b (a row a head) stay as they are, as in Qwen's FP8 checkpoints, and so do a vision tower and
// multi-token prediction. config.json gets a quantization_config that names every module that stays. All other files
// are copied (through links), but for other forms of the weights, hidden files, and training checkpoints in
// selectors. Tensors lie in files of at most `shard_bytes` (a larger tensor in its own) with an index where there are
// several; the codes of one file at a time are in memory. The same checkpoint gives the same bytes.
//
// The folder appears whole under its name or not at all: until then it is OUT.unfinished, which the next run removes
// when this one was killed. nullopt: `stop`, asked between tensors, said so, and nothing is left. Throws Error when `out`
// holds anything or lies within `model`, when the checkpoint is quantised already or does not fit its config.json, naming
// a tensor that is not finite, and when the disk cannot hold the result.
std::optional<QuantizeReport> quantize_checkpoint(const std::filesystem::path& model,
                                                  const std::filesystem::path& out, uint64_t shard_bytes,
                                                  const std::function<bool()>& stop = {});

}  // namespace spot

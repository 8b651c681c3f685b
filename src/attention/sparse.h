// Attention over the blocks that a policy chooses.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <set>

#include "attention/policy.h"
#include "model/attention.h"

namespace spot {

// How a prompt's context is read. automatic: densely where it is short, else sparsely (MethodSpec::reads_sparsely); it is
// for those who choose, not for SparseAttention, which reads as it is told.
enum class PrefillMode { dense, sparse, automatic };

// What an observer sees: one call per covered sparse layer for all decode rows together (chunk.sequence = -1,
// rows are the batch's sequences), or per chunk of a sparse prefill.
struct SelectionEvent {
  int64_t layer;
  const AttentionInputs& inputs;  // of the decode rows alone, or of the prefill chunks alone
  // The pool of the layer's keys; sequence_tokens() reads a sequence of inputs.batch.
  const TokenPool& keys;
  QueryChunk chunk;
  const SelectionPolicy& policy;  // that chose
  SelectionRule rule;
  const Selection& selection;  // one row per query of the chunk, or per sequence
};
using SelectionObserver = std::function<void(const SelectionEvent&)>;
// The same of decode rows, and of chunks with a set for each query, with nothing computed for it (no predicted mass),
// so that a CUDA graph can hold it: layer, selection, and the tokens that each of its rows sees, [rows] int32.
using SelectionRecorder = std::function<void(int64_t, const Selection&, const at::Tensor&)>;

struct SparseOptions {
  PrefillMode prefill = PrefillMode::dense;
  std::set<int64_t> dense_layers;  // besides those the policy does not cover
  int64_t query_tile = 1;          // 1, 16, 32 or 64: queries that share one set in sparse prefill
  int64_t prefill_chunk = 512;     // queries selected and attended at once in sparse prefill
  SelectionObserver observer;
  SelectionRecorder recorder;
  bool count = true;  // keep the counters; a benchmark saves their small kernels
};

// Decode rows select and attend sparsely; prefill chunks, in the same batch or another, attend densely or
// sparsely by `prefill`. The policy's stores are fed either way. Queries up to the rule's floor get
// DenseAttention's result, exactly unless the policy prunes tokens or tiles of queries run on the GPU
// (ops/prefill/prefill.h).
class SparseAttention : public AttentionBackend {
 public:
  struct Counters {
    int64_t rows = 0;            // sparse queries
    double tokens_attended = 0;  // summed over rows, averaged over groups
    int64_t tokens_visible = 0;  // summed over rows
    double predicted_mass = 0;   // summed over rows, averaged over groups
  };

  // The cache and the policy outlive this object. Throws Error on an unsupported query_tile.
  SparseAttention(const PagedCache& cache, SelectionPolicy& policy, SparseOptions options = {});

  AttentionPreparation prepare(int64_t layer, const at::Tensor& hidden, const Batch& batch) override;
  at::Tensor forward(const AttentionInputs& inputs) override;
  // The same of tokens that are stored already, in the policy's stores too, with another reading of prefill chunks.
  at::Tensor attend(const AttentionInputs& inputs, PrefillMode prefill, int64_t query_tile);
  // Of prefill chunks, each of whose queries chooses for itself, such as a question's behind its context.
  at::Tensor attend_queries(const AttentionInputs& inputs);

  void set_prefill(PrefillMode mode) { options_.prefill = mode; }
  void set_observer(SelectionObserver observer) { options_.observer = std::move(observer); }
  SelectionPolicy& policy() { return policy_; }
  int64_t query_tile() const { return options_.query_tile; }
  // By model layer, since the last reset; dense layers have none. Copies from the device.
  std::map<int64_t, Counters> counters() const;
  void reset_counters() { sums_.clear(); }

 private:
  bool selects(int64_t layer) const;
  at::Tensor decode(const AttentionInputs& inputs);
  // Every row of `inputs` is a prefill chunk's.
  at::Tensor sparse_prefill(const AttentionInputs& inputs, int64_t query_tile);
  // With the kernels for tiles; nothing where they do not serve.
  std::optional<at::Tensor> tile_prefill(const AttentionInputs& inputs, int64_t query_tile);
  at::Tensor attend_chunk(const AttentionInputs& inputs, const QueryChunk& chunk, const at::Tensor& lengths,
                          const Selection& selection);
  void count(int64_t layer, const Selection& selection, const at::Tensor& lengths);
  void add_counts(int64_t layer, const at::Tensor& addend);

  const PagePools& pools_;
  SelectionPolicy& policy_;
  SparseOptions options_;
  std::map<int64_t, at::Tensor> sums_;  // by layer: [4] float64 on the device, fields of Counters in order
};

}  // namespace spot

#include "engine/decode_step.h"

#include <c10/core/InferenceMode.h>

#include "core/error.h"

#ifdef SPOT_TORCH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace spot {

struct DecodeStep::Graph {
#ifdef SPOT_TORCH_CUDA
  at::cuda::CUDAGraph graph;
#endif
};

DecodeStep::DecodeStep(const Backbone& backbone, AttentionBackend& attention, BatchView& view, KvCache& cache,
                       std::vector<int64_t> sequences, int64_t max_tokens)
    : backbone_(backbone), attention_(attention), view_(view), cache_(cache), max_tokens_(max_tokens) {
  if (sequences.empty()) fail("a decode step needs at least one sequence");
  const auto count = static_cast<int64_t>(sequences.size());
  const int64_t pages = (max_tokens + kPageSize - 1) / kPageSize;
  const auto on_device = at::TensorOptions().device(backbone.device());
  batch_.sequences = std::move(sequences);
  batch_.query_lengths.assign(count, 1);
  batch_.starts.assign(count, 0);
  batch_.tokens = at::zeros({count}, on_device.dtype(at::kLong));
  batch_.positions = at::zeros({count}, on_device.dtype(at::kLong));
  batch_.state_slots = cache.state_slots(batch_);
  view_.slots = at::zeros({count}, on_device.dtype(at::kLong));
  view_.page_table = at::zeros({count, pages}, on_device.dtype(at::kInt));
  view_.lengths = at::zeros({count}, on_device.dtype(at::kInt));
  view_.fix();
}

DecodeStep::~DecodeStep() = default;

// Extends every sequence by its token and writes the step's inputs into the fixed buffers.
void DecodeStep::refresh(const std::vector<int32_t>& tokens) {
  const auto count = static_cast<size_t>(batch_.num_sequences());
  if (tokens.size() != count) fail("a decode step of {} sequences was given {} tokens", count, tokens.size());
  for (size_t i = 0; i < count; ++i) {
    if (cache_.length(batch_.sequences[i]) >= max_tokens_)
      fail("sequence {} is full: the decode step was made for {} tokens", batch_.sequences[i], max_tokens_);
  }
  const Batch next = make_batch(cache_, batch_.sequences, [&] {
    std::vector<std::vector<int32_t>> lists;
    for (int32_t token : tokens) lists.push_back({token});
    return lists;
  }());
  batch_.starts = next.starts;
  batch_.tokens.copy_(next.tokens);
  batch_.positions.copy_(next.positions);
  view_.slots.copy_(cache_.slots(next));
  view_.lengths.copy_(cache_.lengths(next));
  const at::Tensor table = cache_.page_table(next);
  view_.page_table.narrow(1, 0, table.size(1)).copy_(table);
}

at::Tensor DecodeStep::forward() {
  return backbone_.logits(backbone_.forward(batch_, attention_, cache_));
}

at::Tensor DecodeStep::run(const std::vector<int32_t>& tokens) {
  const c10::InferenceMode inference;
  refresh(tokens);
  if (!graph_) return forward();
#ifdef SPOT_TORCH_CUDA
  graph_->graph.replay();
#endif
  return logits_;
}

void DecodeStep::capture() {
#ifdef SPOT_TORCH_CUDA
  if (!backbone_.device().is_cuda())
    fail("a decode step on {} cannot be captured; CUDA graphs need a CUDA device", backbone_.device().str());
  const c10::InferenceMode inference;
  const c10::cuda::CUDAGuard device(backbone_.device());
  // Lengths of 0 would leave nothing to attend to: the warm-up runs as if each sequence's next token were its
  // last.
  for (int64_t i = 0; i < batch_.num_sequences(); ++i) {
    const int64_t length = cache_.length(batch_.sequences[i]);
    if (length >= max_tokens_)
      fail("sequence {} is full: the decode step was made for {} tokens", batch_.sequences[i], max_tokens_);
  }
  std::vector<KvCache::Mark> marks;
  for (int64_t id : batch_.sequences) marks.push_back(cache_.mark(id));
  refresh(std::vector<int32_t>(batch_.sequences.size(), 0));
  // Capture must not run on the default stream; library handles and workspaces are made in the warm-up.
  const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool();
  c10::cuda::getCurrentCUDAStream().synchronize();
  {
    const c10::cuda::CUDAStreamGuard guard(stream);
    for (int i = 0; i < 2; ++i) logits_ = forward();
    stream.synchronize();
    graph_ = std::make_unique<Graph>();
    graph_->graph.capture_begin();
    logits_ = forward();
    graph_->graph.capture_end();
  }
  stream.synchronize();
  for (size_t i = 0; i < marks.size(); ++i) cache_.rollback(batch_.sequences[i], marks[i]);
#else
  fail("this build of torch has no CUDA, so there are no CUDA graphs; run the step without capture()");
#endif
}

}  // namespace spot

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

DecodeStep::DecodeStep(const Backbone& backbone, AttentionBackend& attention, PagedCache& cache,
                       std::vector<int64_t> sequences, int64_t max_tokens)
    : backbone_(backbone), attention_(attention), cache_(cache), sequences_(std::move(sequences)) {
  if (sequences_.empty()) fail("a decode step needs at least one sequence");
  shape_ = {.rows = static_cast<int64_t>(sequences_.size()),
            .table_width = (max_tokens + cache.page_size() - 1) / cache.page_size()};
  batch_ = build_batch(cache, {}, shape_);
}

DecodeStep::~DecodeStep() = default;

// Extends every sequence by its token and writes the step's inputs into the fixed buffers.
void DecodeStep::refresh(const std::vector<int32_t>& tokens) {
  if (tokens.size() != sequences_.size())
    fail("a decode step of {} sequences was given {} tokens", sequences_.size(), tokens.size());
  std::vector<BatchEntry> entries;
  for (size_t i = 0; i < tokens.size(); ++i)
    entries.push_back({.sequence = sequences_[i], .tokens = {tokens[i]}});
  rebuild_batch(cache_, entries, shape_, batch_);
}

at::Tensor DecodeStep::forward() {
  return backbone_.logits(backbone_.forward(batch_, attention_, cache_.states()));
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
  std::vector<PagedCache::Mark> marks;
  for (int64_t id : sequences_) marks.push_back(cache_.mark(id));
  refresh(std::vector<int32_t>(sequences_.size(), 0));
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
  for (size_t i = 0; i < marks.size(); ++i) cache_.rollback(sequences_[i], marks[i]);
#else
  fail("this build of torch has no CUDA, so there are no CUDA graphs; run the step without capture()");
#endif
}

}  // namespace spot

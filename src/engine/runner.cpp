#include "engine/runner.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "core/error.h"

#ifdef SPOT_TORCH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace spot {

struct Runner::Graph {
  BatchShape shape;
  std::vector<Route> routes;
  Batch batch;        // its memory is what the graph reads
  StepResult result;  // its memory is what the graph writes
#ifdef SPOT_TORCH_CUDA
  at::cuda::CUDAGraph graph;
#endif
};

Runner::Runner(const Backbone& backbone, AttentionStack& attention, const RunnerOptions& options)
    : backbone_(backbone),
      attention_(attention),
      options_(options),
      on_gpu_(options.graphs && backbone.device().is_cuda()) {
  if (options_.max_tokens == 0) options_.max_tokens = backbone.config().max_position_embeddings;
}

Runner::~Runner() = default;

StepResult Runner::forward(const Batch& batch, const std::vector<Route>& routes) {
  attention_.begin_pass(batch, routes);
  const at::Tensor hidden = backbone_.forward(batch, attention_, attention_.cache().states());
  StepResult result;
  if (batch.logit_rows.numel() > 0)
    result.logits = backbone_.logits(hidden.index_select(0, batch.logit_rows));
  result.attended = attention_.attended();
  return result;
}

bool Runner::captures(int64_t method) const {
#ifdef SPOT_TORCH_CUDA
  return on_gpu_ && attention_.decodes_on_device(method);
#else
  return false;
#endif
}

StepResult Runner::run(const std::vector<StepEntry>& entries, bool eager) {
  const c10::InferenceMode inference;
  if (entries.empty()) fail("a step of no sequence was asked for");
  const int64_t method = entries.front().route.method;
  bool decodes = true, uniform = true;  // all rows decode; and by one method
  std::vector<BatchEntry> tokens;
  std::vector<Route> routes;
  for (const StepEntry& entry : entries) {
    decodes &= entry.tokens.decode.value_or(false) && entry.tokens.logits;
    uniform &= decodes && entry.route.method == method;
    tokens.push_back(entry.tokens);
    routes.push_back(entry.route);
  }
  if (!eager && decodes && !uniform && on_gpu_) return run_by_method(entries);
  if (eager || !uniform || !captures(method) || static_cast<int64_t>(entries.size()) > options_.max_sequences)
    return forward(build_batch(attention_.cache(), tokens), routes);
#ifdef SPOT_TORCH_CUDA
  int64_t bucket = 1;
  while (bucket < static_cast<int64_t>(entries.size())) bucket *= 2;
  Graph& captured = graph(method, bucket);
  rebuild_batch(attention_.cache(), tokens, captured.shape, captured.batch);
  captured.graph.replay();
  StepResult result = captured.result;
  result.logits = result.logits.narrow(0, 0, static_cast<int64_t>(entries.size()));
  return result;
#else
  fail("this build of torch has no CUDA graphs");
#endif
}

// A graph holds the rows of one method: a replay for each is faster than one eager step of all.
StepResult Runner::run_by_method(const std::vector<StepEntry>& entries) {
  StepResult all;
  std::vector<at::Tensor> logits;
  for (size_t first = 0, end = 0; first < entries.size(); first = end) {
    while (end < entries.size() && entries[end].route.method == entries[first].route.method) ++end;
    const auto begin = entries.begin();
    StepResult part =
        run({begin + static_cast<std::ptrdiff_t>(first), begin + static_cast<std::ptrdiff_t>(end)});
    logits.push_back(part.logits);
    for (AttendedRows& rows : part.attended) {
      // Without the padding, whose rows would be taken for the next method's.
      rows.sums = rows.sums.narrow(1, 0, std::min(rows.sums.size(1), static_cast<int64_t>(end - first)));
      rows.first += static_cast<int64_t>(first);
      all.attended.push_back(std::move(rows));
    }
  }
  all.logits = at::cat(logits);
  return all;
}

void Runner::capture(int64_t method, int64_t rows) {
  if (!captures(method)) return;
  const c10::InferenceMode inference;
  int64_t bucket = 1;
  while (bucket < rows) bucket *= 2;
  for (; bucket >= 1; bucket /= 2)
    graph(method, bucket);  // the largest first: the others fit into its memory
}

void Runner::forget(int64_t method) {
  std::erase_if(graphs_, [&](const auto& graph) { return graph.first.first == method; });
}

Runner::Graph& Runner::graph(int64_t method, int64_t bucket) {
  std::unique_ptr<Graph>& made = graphs_[{method, bucket}];
  if (made) return *made;
#ifdef SPOT_TORCH_CUDA
  auto next = std::make_unique<Graph>();
  const int64_t page = attention_.cache().page_size();
  next->shape = {.rows = bucket, .table_width = (options_.max_tokens + page - 1) / page};
  next->batch = build_batch(attention_.cache(), {}, next->shape);
  next->routes.assign(static_cast<size_t>(bucket), Route{.method = method});
  const c10::cuda::CUDAGuard device(backbone_.device());
  // Capture must not run on the default stream; library handles and workspaces are made in the warm-up.
  const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool();
  c10::cuda::getCurrentCUDAStream().synchronize();
  {
    const c10::cuda::CUDAStreamGuard guard(stream);
    for (int i = 0; i < 2; ++i) forward(next->batch, next->routes);
    stream.synchronize();
    // One step runs at a time, so all graphs can work in the same memory.
    std::optional<at::cuda::MempoolId_t> pool;
    for (auto& [key, other] : graphs_)
      if (other) pool = other->graph.pool();
    next->graph.capture_begin(pool.value_or(at::cuda::MempoolId_t{0, 0}));
    next->result = forward(next->batch, next->routes);
    next->graph.capture_end();
  }
  stream.synchronize();
  made = std::move(next);
#endif
  return *made;
}

}  // namespace spot

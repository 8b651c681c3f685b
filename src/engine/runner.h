// Runs one step through the model: eagerly anywhere, decode steps as CUDA graphs on a GPU.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "attention/stack.h"
#include "cache/batch_builder.h"
#include "model/backbone.h"

namespace spot {

struct RunnerOptions {
  bool graphs = true;         // on a GPU
  int64_t max_sequences = 1;  // most decode rows of a step
  int64_t max_tokens = 0;     // of one sequence; 0: as many as the model has positions
};

// The next tokens of a sequence, and how it attends.
struct StepEntry {
  BatchEntry tokens;
  Route route;
};

struct StepResult {
  at::Tensor logits;  // [entries that want logits, vocab_size] float32, overwritten by the next step
  // What sparse queries attended to: rows are the batch's sequences, in order.
  std::vector<AttendedRows> attended;
};

// Decode steps of one method are padded to the next of 1, 2, 4, 8, ... rows and replay a graph captured for that
// many; padded rows have slot -1, length 0 and the spare state slot, so that nothing of theirs is kept. Rows of
// several methods replay one graph after another. A step with prompt chunks, and methods whose decode needs the host, run
// eagerly.
class Runner {
 public:
  // All arguments outlive the runner.
  Runner(const Backbone& backbone, AttentionStack& attention, const RunnerOptions& options);
  ~Runner();

  // Extends the entries' sequences by their tokens. Decode rows first, those of one method side by side. `eager`:
  // no graph, so that the stack's observer is called.
  StepResult run(const std::vector<StepEntry>& entries, bool eager = false);

  // Captures the graphs of a method's decode steps for up to `rows` sequences, so that the first steps need not.
  void capture(int64_t method, int64_t rows);
  bool captures(int64_t method) const;  // whether its decode steps become graphs
  // Drops the graphs of a method that another takes the place of.
  void forget(int64_t method);

 private:
  struct Graph;
  Graph& graph(int64_t method, int64_t bucket);
  StepResult run_by_method(const std::vector<StepEntry>& entries);
  StepResult forward(const Batch& batch, const std::vector<Route>& routes);

  const Backbone& backbone_;
  AttentionStack& attention_;
  RunnerOptions options_;
  bool on_gpu_;
  std::map<std::pair<int64_t, int64_t>, std::unique_ptr<Graph>> graphs_;  // by method and rows
};

}  // namespace spot

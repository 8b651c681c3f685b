// Prefill attention of one layer, stage by stage, chunk by chunk of a prompt: dense, and in tiles over selected blocks.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "attention/methods.h"
#include "checkpoint/config.h"
#include "selector/config.h"

namespace spot {

// A prompt of `length` tokens in chunks of `chunk`, and which of them are run; the last may be shorter.
struct PrefillChunks {
  int64_t length = 0, chunk = 0;
  std::vector<int64_t> run;  // ascending

  int64_t count() const { return (length + chunk - 1) / chunk; }
  bool whole() const { return static_cast<int64_t>(run.size()) == count(); }
  int64_t tokens(int64_t index) const { return std::min(chunk, length - index * chunk); }
  // What all chunks come to when those that are run come to `values`: a chunk between two of them lies on the line
  // between theirs, as the work of a chunk grows with its position.
  double sum(const std::vector<double>& values) const;
};
// At most `most` of the chunks, evenly spread with the first and the last among them (0: all). Throws Error when the
// length is no multiple of 64, and when some of the chunks would stand for a last one that is shorter.
PrefillChunks spread_chunks(int64_t length, int64_t chunk, int64_t most);

struct PrefillLayerOptions {
  at::ScalarType dtype = at::kBFloat16;
  at::Device device = at::kCPU;
  int64_t rounds = 3;  // after one that warms up; the one of the median total counts
  bool flash = false;  // torch's flash kernel too, on a GPU
};

// A way to attend, over the whole prompt.
struct PrefillLayerRow {
  std::string name;                       // "dense", "dense, flash" or the method's
  int64_t tile = 0;                       // queries of a tile; 0: dense
  std::map<std::string, double> seconds;  // stage_keys, score, select, attend; dense: attend
  double attended = 0, visible = 0;       // pairs of query and token

  double total() const;
  double density() const { return attended / visible; }
};

// Operations of a pair of query and token, 2 a multiplication and addition: in attention over all query heads, and in
// the selector's scores.
double attention_flop(const ModelConfig& model);
double score_flop(const SelectorConfig& selector);

// Dense attention (causal_attention: what dense prefill runs), then each method. Keys, values and
// selector keys are random; the selector's queries are half common to 128 neighbours, so that neighbouring tiles choose
// some blocks alike. `tick` is called after each chunk of each round. Throws Error when a method is not spot.
std::vector<PrefillLayerRow> measure_prefill_layer(const ModelConfig& model, const SelectorConfig& selector,
                                                   const std::vector<MethodSpec>& methods,
                                                   const PrefillChunks& chunks,
                                                   const PrefillLayerOptions& options,
                                                   const std::function<void()>& tick = {});
// How often tick is called.
int64_t prefill_layer_ticks(const std::vector<MethodSpec>& methods, const PrefillChunks& chunks,
                            const PrefillLayerOptions& options);

}  // namespace spot

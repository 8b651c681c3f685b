// The distillation loss of one layer: KL(teacher || student) between the attention distribution of the
// backbone's heads and that of the selector, with gradients by hand, tile by tile. No [T, T] tensor ever
// exists.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "selector/config.h"

namespace spot {

// For a query at position i of its document let A be its active tokens, p the mean over the query heads (of a
// group) of softmax over positions 0..i, and s the selector's scores. All distributions below are
// renormalised on their set.
//   loss dense       KL over A.
//   loss sparse        KL over S: the k_train tokens of A with the highest s (the student's own choice, so S
//                      follows it); ties go to the lower index. k_train >= |A| is the dense loss.
//   rest_bucket        with sparse: teacher and student are normalised over A, and A \ S counts as one more
//                      outcome, so that the student's mass outside S stays calibrated.
//   teacher block_max  outcomes are blocks of block_size tokens counted from the document's start: teacher
//                      mass is the largest p in the block (renormalised), student score the largest s. S then
//                      has k_train / block_size blocks.
//   scope residual     A leaves out what dual top-p reserves: whole blocks holding the first `sinks` tokens,
//                      and blocks from (i + 1 - recency) / block_size on. Queries whose A is empty are not
//                      counted.
// The groups are those of the selector's weights: group g of G sees num_heads / G consecutive query heads;
// the loss is the mean over counted queries and groups.
struct LayerLossOptions {
  DistillLoss loss = DistillLoss::sparse;
  int64_t k_train = 8192;
  Teacher teacher = Teacher::token;
  TeacherScope scope = TeacherScope::all;
  int64_t sinks = 128, recency = 256;
  bool rest_bucket = false;
  int64_t block_size = kBlockSize;
  // Measured on the way: the share of the teacher's mass on A inside the blocks with the highest student
  // block score. A budget below 1 is a share of |A|, else a number of tokens; both are rounded up to whole
  // blocks.
  std::vector<double> budgets;
  // That on at most so many counted queries, in evenly spaced runs of 16; 0: on all, which keeps the fused
  // kernels from being used.
  int64_t measured_queries = 0;
  bool gradients = true;  // false: the gradients stay undefined
  // What gradients are multiplied by, and whether they are rounded to the types of what they belong to, in
  // one pass.
  double gradient_weight = 1.0;
  bool gradients_rounded = false;
  // Queries handled at once; 0 picks a number that keeps the working set near `tile_bytes`.
  int64_t tile_rows = 0;
  int64_t tile_bytes = 0;  // 0: 24 MiB on the CPU, 512 MiB elsewhere
  // The operators of ops/distill_ops.h, which strips of queries from several documents run through: on GPUs
  // that have them fused, never, or wherever they cover the loss (for tests: their ATen form is no faster).
  enum class Operators { fused, never, always } operators = Operators::fused;
};

struct LayerLossInputs {
  at::Tensor query;  // [T, num_heads, head_dim], backbone, after norm and RoPE; float64, float32, bfloat16 or
                     // float16
  at::Tensor key;    // [T, num_kv_heads, head_dim]
  double scale = 1.0;
  // [num_heads, T] float32 (or float64): log of the sum of e^(scale q . k) over the keys a query sees; what
  // attention over the same query and key found. Undefined: found again, and no operators are used.
  at::Tensor logsumexp;
  at::Tensor selector_query;   // [T, heads, dim]
  at::Tensor selector_key;     // [T, heads or 1, dim]
  at::Tensor selector_weight;  // [T, G, heads]; score = sum_h weight_h ReLU(query_h . key_h)
  // First token of each document, ascending, the first 0. Empty: one document. Nothing attends across
  // documents.
  std::vector<int64_t> document_starts;
  // The queries on which the loss is taken, ascending int64 on the CPU; undefined: all. A uniformly drawn
  // subset gives an unbiased estimate of the mean.
  at::Tensor query_rows;
};

// All tensors lie on the inputs' device. Accumulation is float32, or float64 for float64 inputs. On GPUs the
// gradients of bfloat16 inputs pass one rounding to bfloat16, of their scores' gradients.
struct LayerLoss {
  at::Tensor loss;  // 0-dim float64: the mean; 0 when nothing is counted
  at::Tensor grad_query, grad_key,
      grad_weight;             // of the mean times gradient_weight; shapes of the selector inputs
  int64_t queries = 0;         // counted
  at::Tensor covered;          // [budgets] float64, mean over measured queries and groups
  at::Tensor covered_oracle;   // the same for blocks ranked by their true mass: what no selector can exceed
  at::Tensor teacher_entropy;  // 0-dim float64, nats, of p on A
};

// Dense and sparse losses with a token teacher and one group go to the operators; other losses (rest bucket,
// block_max, several groups) take from them the teacher alone.
// Memory: O(tile_rows x longest document) beyond inputs and gradients. Deterministic for a given device and
// thread count. Throws Error on shapes that do not fit and on impossible options.
LayerLoss layer_loss(const LayerLossInputs& inputs, const LayerLossOptions& options);

}  // namespace spot

// The sparse distillation loss' choice: each query's k keys with the highest student scores, to which teacher
// and student are restricted.
#pragma once

#include "kernels/query_strip.h"

namespace spot::kernels {

struct TopMembersParams {
  QueryStrip strip;
  int32_t k = 0;  // at least 1; a row that sees no more than k keys keeps all
  const float* scores =
      nullptr;  // [rows, width], contiguous: log2 of the student's e^score, read where a row sees
  // [rows, width], contiguous. In: the teacher. Out, where a row sees: the teacher renormalised over the
  // members, -1 on keys that are none (on all keys, where the members have no mass, less than kSmallestMass).
  float* mass = nullptr;
  // Row r's number at r * logsumexp_stride, log2 of the members' sum of e^score; the other numbers up to the
  // next row become -inf.
  float* logsumexp = nullptr;
  int32_t logsumexp_stride = 1;
  float* entropy = nullptr;  // [rows], nats: of the teacher renormalised over all keys seen
};

// Among equal scores the lower column is chosen first.
cudaError_t top_members(const TopMembersParams& params, cudaStream_t stream);

}  // namespace spot::kernels

#include "cache/batch.h"

namespace spot {

Batch Batch::decodes() const {
  if (is_decode()) return *this;
  Batch part = *this;
  for (std::vector<int64_t>* list : {&part.sequences, &part.starts, &part.query_lengths, &part.first_pages})
    list->resize(static_cast<size_t>(num_decodes));
  // Row i is sequence i here. logit_rows may lie anywhere: nobody asks a part for them.
  for (at::Tensor* tensor :
       {&part.tokens, &part.positions, &part.slots, &part.page_table, &part.lengths, &part.state_slots})
    if (tensor->defined()) *tensor = tensor->narrow(0, 0, num_decodes);
  if (query_starts.defined()) part.query_starts = query_starts.narrow(0, 0, num_decodes + 1);
  part.logit_rows = at::Tensor();
  return part;
}

Batch Batch::prefills() const {
  if (num_decodes == 0) return *this;
  Batch part = *this;
  part.num_decodes = 0;
  for (std::vector<int64_t>* list : {&part.sequences, &part.starts, &part.query_lengths, &part.first_pages})
    list->erase(list->begin(), list->begin() + num_decodes);
  // The first num_decodes sequences are as many rows.
  for (at::Tensor* tensor :
       {&part.tokens, &part.positions, &part.slots, &part.page_table, &part.lengths, &part.state_slots})
    if (tensor->defined()) *tensor = tensor->narrow(0, num_decodes, tensor->size(0) - num_decodes);
  if (query_starts.defined())
    part.query_starts = query_starts.narrow(0, num_decodes, part.num_sequences() + 1) - num_decodes;
  part.logit_rows = at::Tensor();
  return part;
}

Batch Batch::rows() const {
  Batch made = *this;
  made.num_decodes = num_tokens();
  for (std::vector<int64_t>* list : {&made.sequences, &made.starts, &made.query_lengths, &made.first_pages})
    list->clear();
  for (int64_t i = 0; i < num_sequences(); ++i)
    for (int64_t done = 0; done < query_lengths[i]; ++done) {
      made.sequences.push_back(sequences[i]);
      made.starts.push_back(starts[i] + done);
      made.query_lengths.push_back(1);
      made.first_pages.push_back(first_pages[i]);
    }
  const at::Tensor sequence =
      at::repeat_interleave(query_starts.diff(), std::optional<int64_t>(num_tokens()));
  made.page_table = page_table.index_select(0, sequence);
  if (state_slots.defined()) made.state_slots = state_slots.index_select(0, sequence);
  made.lengths = (positions + 1).to(at::kInt);
  made.query_starts = at::arange(num_tokens() + 1, query_starts.options());
  made.logit_rows = at::Tensor();
  return made;
}

std::vector<QueryChunk> query_chunks(const Batch& batch) {
  std::vector<QueryChunk> chunks;
  int64_t row = 0;
  for (int64_t i = 0; i < batch.num_sequences(); ++i) {
    chunks.push_back({i, row, batch.query_lengths[i], batch.starts[i]});
    row += batch.query_lengths[i];
  }
  return chunks;
}

std::vector<QueryChunk> prefill_chunks(const Batch& batch) {
  std::vector<QueryChunk> chunks = query_chunks(batch);
  chunks.erase(chunks.begin(), chunks.begin() + batch.num_decodes);
  return chunks;
}

at::Tensor sequence_pages(const Batch& batch, int64_t sequence, int64_t length) {
  return batch.page_table.select(0, sequence).narrow(0, 0, (length + batch.page_size - 1) / batch.page_size);
}

at::Tensor sequence_tokens(const TokenPool& pool, const Batch& batch, int64_t sequence, int64_t length) {
  const int64_t first = batch.first_pages[sequence];
  return first >= 0 ? view_tokens(pool, first, length)
                    : gather_tokens(pool, batch.page_table.select(0, sequence), length);
}

Batch unpaged_batch(const std::vector<int32_t>& tokens, const std::vector<int64_t>& part_starts,
                    at::Device device) {
  Batch batch;
  const auto length = static_cast<int64_t>(tokens.size());
  std::vector<at::Tensor> positions;
  for (size_t i = 0; i < part_starts.size(); ++i) {
    const int64_t count = (i + 1 < part_starts.size() ? part_starts[i + 1] : length) - part_starts[i];
    batch.sequences.push_back(static_cast<int64_t>(i));
    batch.starts.push_back(0);
    batch.query_lengths.push_back(count);
    batch.first_pages.push_back(-1);
    positions.push_back(at::arange(count, at::kLong));
  }
  batch.tokens = at::tensor(tokens, at::kInt).to(at::kLong).to(device);
  batch.positions = at::cat(positions).to(device);
  return batch;
}

}  // namespace spot

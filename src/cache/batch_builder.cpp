#include "cache/batch_builder.h"

#include <algorithm>
#include <set>

#include "core/error.h"

namespace spot {
namespace {

// The tensors of a batch in one piece of memory: the int64 ones, then the int32 ones.
struct Layout {
  int64_t tokens, sequences, logit_rows, table_width;
  bool states;

  int64_t bytes() const {
    return 8 * (3 * tokens + logit_rows + (states ? sequences : 0)) +
           4 * (sequences + (sequences + 1) + sequences * table_width);
  }
};

void lay_out(Batch& batch, const Layout& layout) {
  int64_t offset = 0;
  const auto part = [&](at::ScalarType dtype, int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(c10::elementSize(dtype));
    const at::Tensor tensor = batch.storage.narrow(0, offset, bytes).view(dtype);
    offset += bytes;
    return tensor;
  };
  batch.tokens = part(at::kLong, layout.tokens);
  batch.positions = part(at::kLong, layout.tokens);
  batch.slots = part(at::kLong, layout.tokens);
  batch.logit_rows = part(at::kLong, layout.logit_rows);
  if (layout.states) batch.state_slots = part(at::kLong, layout.sequences);
  batch.lengths = part(at::kInt, layout.sequences);
  batch.query_starts = part(at::kInt, layout.sequences + 1);
  batch.page_table =
      part(at::kInt, layout.sequences * layout.table_width).view({layout.sequences, layout.table_width});
}

// Which entries are decode rows. Throws Error at the first thing that cannot be; the cache is as it was.
std::vector<bool> check_entries(const PagedCache& cache, const std::vector<BatchEntry>& entries) {
  std::vector<bool> decode;
  std::set<int64_t> seen;
  std::vector<int64_t> sequences, counts;
  for (const BatchEntry& entry : entries) {
    const auto count = static_cast<int64_t>(entry.tokens.size());
    if (!seen.insert(entry.sequence).second) fail("sequence {} occurs twice in a batch", entry.sequence);
    if (count == 0) fail("sequence {} has no token in a batch", entry.sequence);
    const int64_t end = cache.length(entry.sequence) + count;
    if (end > cache.options().max_tokens) {
      fail(
          "a sequence of {} tokens exceeds the model's {} positions; shorten the prompt or the answer, or extend the "
          "model with YaRN",
          end, cache.options().max_tokens);
    }
    for (const int32_t id : entry.tokens) {
      if (id < 0 || id >= cache.options().vocab_size)
        fail("token id {} lies outside the model's vocabulary of {}; is this the model's own tokenizer?", id,
             cache.options().vocab_size);
    }
    const bool after_prefill = !decode.empty() && !decode.back();
    decode.push_back(entry.decode.value_or(count == 1 && !after_prefill));
    if (decode.back() && count != 1)
      fail("sequence {} has {} tokens in a batch, a decode row has one; make it a prefill chunk",
           entry.sequence, count);
    if (decode.back() && after_prefill)
      fail("sequence {} is a decode row behind a prefill chunk; put the decode rows first", entry.sequence);
    sequences.push_back(entry.sequence);
    counts.push_back(count);
  }
  const int64_t needed = cache.allocator().pages_needed(sequences, counts);
  if (needed > cache.num_free_pages()) {
    fail(
        "the KV cache of {} tokens is full: the batch needs {} more pages of {} tokens, {} are free; make the cache "
        "larger or the requests shorter or fewer",
        cache.num_pages() * cache.page_size(), needed, cache.page_size(), cache.num_free_pages());
  }
  return decode;
}

// Fills `batch`, whose storage is made here unless it has some of the right size.
void fill(PagedCache& cache, const std::vector<BatchEntry>& entries, const std::vector<bool>& decode,
          const BatchShape* shape, Batch& batch) {
  for (const BatchEntry& entry : entries) cache.extend(entry.sequence, entry.tokens);

  const int64_t page_size = cache.page_size();
  const auto padding = shape ? shape->rows - static_cast<int64_t>(entries.size()) : 0;
  Layout layout{padding, padding, padding, shape ? shape->table_width : 0, !cache.states().empty()};
  batch.sequences.clear(), batch.starts.clear(), batch.query_lengths.clear(), batch.first_pages.clear();
  batch.page_size = page_size;
  batch.num_decodes = std::count(decode.begin(), decode.end(), true) + padding;
  for (const BatchEntry& entry : entries) {
    const auto count = static_cast<int64_t>(entry.tokens.size());
    batch.sequences.push_back(entry.sequence);
    batch.query_lengths.push_back(count);
    batch.starts.push_back(cache.length(entry.sequence) - count);
    batch.first_pages.push_back(cache.allocator().first_of_run(entry.sequence));
    layout.tokens += count;
    ++layout.sequences;
    layout.logit_rows += entry.logits;
    if (!shape)
      layout.table_width =
          std::max(layout.table_width, static_cast<int64_t>(cache.pages(entry.sequence).size()));
  }
  for (int64_t i = 0; i < padding; ++i) {
    batch.sequences.push_back(-1);
    batch.query_lengths.push_back(1);
    batch.starts.push_back(0);
    batch.first_pages.push_back(-1);
  }

  const bool on_host = cache.device().is_cpu();
  Batch host;  // the same tensors on the host
  host.storage = at::zeros({layout.bytes()}, at::TensorOptions(at::kByte).pinned_memory(!on_host));
  lay_out(host, layout);
  auto* tokens = host.tokens.mutable_data_ptr<int64_t>();
  auto* positions = host.positions.mutable_data_ptr<int64_t>();
  auto* slots = host.slots.mutable_data_ptr<int64_t>();
  auto* logit_rows = host.logit_rows.mutable_data_ptr<int64_t>();
  auto* lengths = host.lengths.mutable_data_ptr<int32_t>();
  auto* query_starts = host.query_starts.mutable_data_ptr<int32_t>();
  auto* table = host.page_table.mutable_data_ptr<int32_t>();
  auto* states = layout.states ? host.state_slots.mutable_data_ptr<int64_t>() : nullptr;
  int64_t row = 0;
  for (int64_t i = 0; i < layout.sequences; ++i) {
    query_starts[i] = static_cast<int32_t>(row);
    if (i >= static_cast<int64_t>(entries.size())) {  // padding: token 0 at position 0, length 0
      slots[row] = -1;
      *logit_rows++ = row;
      if (states) states[i] = cache.states().spare();
      ++row;
      continue;
    }
    const BatchEntry& entry = entries[i];
    const std::vector<int32_t>& pages = cache.pages(entry.sequence);
    const auto count = static_cast<int64_t>(entry.tokens.size());
    for (int64_t j = 0; j < count; ++j, ++row) {
      const int64_t position = batch.starts[i] + j;
      tokens[row] = entry.tokens[j];
      positions[row] = position;
      slots[row] = int64_t{pages[position / page_size]} * page_size + position % page_size;
    }
    if (entry.logits) *logit_rows++ = row - 1;
    lengths[i] = static_cast<int32_t>(batch.starts[i] + count);
    std::copy(pages.begin(), pages.end(), table + i * layout.table_width);
    if (states) states[i] = cache.state_slot(entry.sequence);
  }
  query_starts[layout.sequences] = static_cast<int32_t>(row);

  if (batch.storage.defined()) {
    batch.storage.copy_(host.storage, /*non_blocking=*/true);
    return;
  }
  batch.storage = on_host ? host.storage : host.storage.to(cache.device(), /*non_blocking=*/true);
  lay_out(batch, layout);
}

std::vector<bool> check_shape(const PagedCache& cache, const std::vector<BatchEntry>& entries,
                              const BatchShape& shape) {
  if (shape.rows < 1 || shape.table_width < 1 || static_cast<int64_t>(entries.size()) > shape.rows)
    fail("a batch of {} sequences does not fit a shape of {} rows with {} pages each", entries.size(),
         shape.rows, shape.table_width);
  std::vector<bool> decode = check_entries(cache, entries);
  for (size_t i = 0; i < entries.size(); ++i) {
    if (!decode[i] || !entries[i].logits)
      fail("sequence {} is no decode row with logits; only those can be padded to a shape",
           entries[i].sequence);
    if (cache.length(entries[i].sequence) >= shape.table_width * cache.page_size())
      fail("sequence {} is full: the batch's shape holds {} tokens a sequence", entries[i].sequence,
           shape.table_width * cache.page_size());
  }
  return decode;
}

}  // namespace

Batch build_batch(PagedCache& cache, const std::vector<BatchEntry>& entries) {
  if (entries.empty()) fail("a batch of 0 sequences was asked for; give at least one");
  const std::vector<bool> decode = check_entries(cache, entries);
  Batch batch;
  fill(cache, entries, decode, nullptr, batch);
  return batch;
}

Batch build_batch(PagedCache& cache, const std::vector<BatchEntry>& entries, const BatchShape& shape) {
  const std::vector<bool> decode = check_shape(cache, entries, shape);
  Batch batch;
  fill(cache, entries, decode, &shape, batch);
  return batch;
}

void rebuild_batch(PagedCache& cache, const std::vector<BatchEntry>& entries, const BatchShape& shape,
                   Batch& batch) {
  const std::vector<bool> decode = check_shape(cache, entries, shape);
  if (!batch.page_table.defined() || batch.page_table.size(0) != shape.rows ||
      batch.page_table.size(1) != shape.table_width)
    fail("a batch of another shape cannot be refilled with {} rows of {} pages", shape.rows,
         shape.table_width);
  fill(cache, entries, decode, &shape, batch);
}

Batch make_batch(PagedCache& cache, const std::vector<int64_t>& sequences,
                 const std::vector<std::vector<int32_t>>& tokens) {
  if (sequences.size() != tokens.size())
    fail("a batch of {} sequences was given {} token lists", sequences.size(), tokens.size());
  std::vector<BatchEntry> entries;
  for (size_t i = 0; i < sequences.size(); ++i) entries.push_back({sequences[i], tokens[i]});
  return build_batch(cache, entries);
}

void commit_batch(PagedCache& cache, const Batch& batch) {
  for (const int64_t sequence : batch.sequences)
    if (sequence >= 0) cache.commit(sequence);
}

}  // namespace spot

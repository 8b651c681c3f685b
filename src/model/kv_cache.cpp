#include "model/kv_cache.h"

#include <algorithm>

#include "core/error.h"

namespace spot {
namespace {

int64_t pages_for(int64_t tokens) {
  return (tokens + kPageSize - 1) / kPageSize;
}

// A host vector as a tensor on the device.
template <typename T>
at::Tensor to_tensor(const std::vector<T>& values, at::ScalarType dtype, at::Device device) {
  const auto size = static_cast<int64_t>(values.size());
  at::Tensor host = at::empty({size}, at::TensorOptions().dtype(dtype));
  std::copy(values.begin(), values.end(), host.mutable_data_ptr<T>());
  return host.to(device);
}

}  // namespace

KvCache::KvCache(const ModelConfig& config, int64_t num_pages, at::ScalarType dtype, at::Device device,
                 int64_t num_sequences)
    : config_(config), num_pages_(num_pages), dtype_(dtype), device_(device) {
  if (num_pages < 1 || num_pages * kPageSize > INT32_MAX) {
    fail("a KV cache of {} pages was asked for; 1 to {} are possible", num_pages, INT32_MAX / kPageSize);
  }
  if (num_sequences < 1)
    fail("a KV cache for {} sequences was asked for; at least 1 is needed", num_sequences);
  for (int64_t page = num_pages - 1; page >= 0; --page) free_pages_.push_back(static_cast<int32_t>(page));
  const auto layers = static_cast<size_t>(config.num_layers);
  keys_.resize(layers);
  values_.resize(layers);
  conv_.resize(layers);
  recurrent_.resize(layers);
  // Zeroed: kernels may read whole pages and multiply what lies past the end by zero, which a NaN would
  // survive.
  const auto options = at::TensorOptions().dtype(dtype).device(device);
  for (const int64_t layer : config.full_attention_layers()) {
    const std::vector<int64_t> shape = {config.num_kv_heads, num_pages, kPageSize, config.head_dim};
    keys_[layer] = at::zeros(shape, options);
    values_[layer] = at::zeros(shape, options);
  }
  grow_states(num_sequences);
}

void KvCache::grow_states(int64_t num_slots) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device_);
  const auto& linear = config_.linear;
  const int64_t channels =
      2 * linear.num_key_heads * linear.key_head_dim + linear.num_value_heads * linear.value_head_dim;
  const int64_t old = num_state_slots_;
  const auto grow = [&](at::Tensor& pool, const std::vector<int64_t>& shape) {
    at::Tensor larger = at::zeros(shape, options);
    if (pool.defined()) larger.narrow(0, 0, old).copy_(pool);
    pool = larger;
  };
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    if (config_.is_full_attention(layer)) continue;
    grow(conv_[layer], {num_slots, linear.conv_kernel - 1, channels});
    grow(recurrent_[layer], {num_slots, linear.num_value_heads, linear.key_head_dim, linear.value_head_dim});
  }
  for (int64_t slot = old; slot < num_slots; ++slot) free_state_slots_.push_back(slot);
  std::sort(free_state_slots_.begin(), free_state_slots_.end(), std::greater<>());
  num_state_slots_ = num_slots;
}

int64_t KvCache::open_sequence() {
  if (free_state_slots_.empty()) grow_states(2 * num_state_slots_);
  Sequence sequence;
  sequence.state_slot = free_state_slots_.back();
  free_state_slots_.pop_back();
  sequences_[next_id_] = std::move(sequence);
  return next_id_++;
}

void KvCache::close_sequence(int64_t id) {
  const Sequence& sequence = find(id);
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    if (config_.is_full_attention(layer)) continue;
    conv_[layer].select(0, sequence.state_slot).zero_();
    recurrent_[layer].select(0, sequence.state_slot).zero_();
  }
  free_state_slots_.push_back(sequence.state_slot);
  std::sort(free_state_slots_.begin(), free_state_slots_.end(), std::greater<>());
  free_pages_.insert(free_pages_.end(), sequence.pages.begin(), sequence.pages.end());
  std::sort(free_pages_.begin(), free_pages_.end(), std::greater<>());
  sequences_.erase(id);
}

int64_t KvCache::copy_sequence(int64_t id) {
  return import_sequence(export_sequence(id));
}

SequenceState KvCache::export_sequence(int64_t id) const {
  const Sequence& sequence = find(id);
  SequenceState state;
  state.length = sequence.length;
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    const bool full = config_.is_full_attention(layer);
    state.keys.push_back(full ? gather(keys_[layer], id, sequence.length).clone() : at::Tensor());
    state.values.push_back(full ? gather(values_[layer], id, sequence.length).clone() : at::Tensor());
    state.conv.push_back(full ? at::Tensor() : conv_[layer].select(0, sequence.state_slot).clone());
    state.recurrent.push_back(full ? at::Tensor() : recurrent_[layer].select(0, sequence.state_slot).clone());
  }
  return state;
}

int64_t KvCache::import_sequence(const SequenceState& state) {
  // Checked as a whole before anything is taken from the pools.
  const auto layers = static_cast<size_t>(config_.num_layers);
  bool fits = state.keys.size() == layers && state.values.size() == layers && state.conv.size() == layers &&
              state.recurrent.size() == layers;
  const auto same_shape = [](const at::Tensor& tensor, at::IntArrayRef shape) {
    return tensor.defined() && tensor.sizes() == shape;
  };
  for (size_t layer = 0; fits && layer < layers; ++layer) {
    if (config_.is_full_attention(static_cast<int64_t>(layer))) {
      const std::vector<int64_t> shape = {config_.num_kv_heads, state.length, config_.head_dim};
      fits = same_shape(state.keys[layer], shape) && same_shape(state.values[layer], shape);
    } else {
      fits = same_shape(state.conv[layer], conv_[layer].sizes().slice(1)) &&
             same_shape(state.recurrent[layer], recurrent_[layer].sizes().slice(1));
    }
  }
  if (!fits) fail("a saved sequence of {} tokens does not fit this model's cache", state.length);

  const int64_t id = open_sequence();
  try {
    extend(id, state.length);
  } catch (...) {
    close_sequence(id);
    throw;
  }
  Batch batch;
  batch.sequences = {id};
  batch.starts = {0};
  batch.query_lengths = {state.length};
  const at::Tensor all_slots = slots(batch);
  const int64_t state_slot = find(id).state_slot;
  for (size_t layer = 0; layer < layers; ++layer) {
    if (config_.is_full_attention(static_cast<int64_t>(layer))) {
      write(static_cast<int64_t>(layer), all_slots, state.keys[layer].to(device_).transpose(0, 1),
            state.values[layer].to(device_).transpose(0, 1));
    } else {
      conv_[layer].select(0, state_slot).copy_(state.conv[layer]);
      recurrent_[layer].select(0, state_slot).copy_(state.recurrent[layer]);
    }
  }
  return id;
}

KvCache::Mark KvCache::mark(int64_t id) const {
  const Sequence& sequence = find(id);
  Mark mark;
  mark.length = sequence.length;
  mark.conv.resize(conv_.size());
  mark.recurrent.resize(recurrent_.size());
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    if (config_.is_full_attention(layer)) continue;
    mark.conv[layer] = conv_[layer].select(0, sequence.state_slot).clone();
    mark.recurrent[layer] = recurrent_[layer].select(0, sequence.state_slot).clone();
  }
  return mark;
}

void KvCache::rollback(int64_t id, const Mark& mark) {
  find(id);
  Sequence& sequence = sequences_.at(id);
  if (mark.length > sequence.length) {
    fail("sequence {} has {} tokens and cannot return to {}", id, sequence.length, mark.length);
  }
  while (static_cast<int64_t>(sequence.pages.size()) > pages_for(mark.length)) {
    free_pages_.push_back(sequence.pages.back());
    sequence.pages.pop_back();
  }
  std::sort(free_pages_.begin(), free_pages_.end(), std::greater<>());
  sequence.length = mark.length;
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    if (config_.is_full_attention(layer)) continue;
    conv_[layer].select(0, sequence.state_slot).copy_(mark.conv[layer]);
    recurrent_[layer].select(0, sequence.state_slot).copy_(mark.recurrent[layer]);
  }
}

int64_t KvCache::pages_needed(int64_t id, int64_t count) const {
  const Sequence& sequence = find(id);
  return pages_for(sequence.length + count) - static_cast<int64_t>(sequence.pages.size());
}

void KvCache::extend(int64_t id, int64_t count) {
  if (count < 0) fail("sequence {} cannot be extended by {} tokens", id, count);
  const int64_t needed = pages_needed(id, count);
  Sequence& sequence = sequences_.at(id);
  if (sequence.length + count > config_.max_position_embeddings) {
    fail(
        "a sequence of {} tokens exceeds the model's {} positions; shorten the prompt or the answer, or "
        "extend the model with YaRN",
        sequence.length + count, config_.max_position_embeddings);
  }
  if (needed > num_free_pages()) {
    fail(
        "the KV cache of {} tokens is full: {} more tokens need {} pages of {} tokens, {} are free; make the "
        "cache larger or the request shorter",
        num_pages_ * kPageSize, count, needed, kPageSize, num_free_pages());
  }
  for (int64_t i = 0; i < needed; ++i) {
    sequence.pages.push_back(free_pages_.back());
    free_pages_.pop_back();
  }
  sequence.length += count;
}

const KvCache::Sequence& KvCache::find(int64_t id) const {
  const auto it = sequences_.find(id);
  if (it == sequences_.end()) fail("sequence {} is not open in the KV cache", id);
  return it->second;
}

int64_t KvCache::length(int64_t id) const {
  return find(id).length;
}
const std::vector<int32_t>& KvCache::pages(int64_t id) const {
  return find(id).pages;
}

const at::Tensor& KvCache::pool_of(const std::vector<at::Tensor>& pools, int64_t layer,
                                   const char* what) const {
  if (layer < 0 || layer >= config_.num_layers || !pools[layer].defined()) {
    fail("layer {} of {} has no {} in the KV cache", layer, config_.num_layers, what);
  }
  return pools[layer];
}

at::Tensor KvCache::keys(int64_t layer) const {
  return pool_of(keys_, layer, "keys");
}
at::Tensor KvCache::values(int64_t layer) const {
  return pool_of(values_, layer, "values");
}
at::Tensor KvCache::conv_states(int64_t layer) const {
  return pool_of(conv_, layer, "convolution state");
}
at::Tensor KvCache::recurrent_states(int64_t layer) const {
  return pool_of(recurrent_, layer, "recurrent state");
}

at::Tensor KvCache::slots(const Batch& batch) const {
  std::vector<int64_t> slots;
  for (int64_t i = 0; i < batch.num_sequences(); ++i) {
    const Sequence& sequence = find(batch.sequences[i]);
    const int64_t end = batch.starts[i] + batch.query_lengths[i];
    if (end > sequence.length) {
      fail("tokens {} to {} of sequence {} lie past its length {} in the KV cache", batch.starts[i], end,
           batch.sequences[i], sequence.length);
    }
    for (int64_t t = batch.starts[i]; t < end; ++t) {
      slots.push_back(int64_t{sequence.pages[t / kPageSize]} * kPageSize + t % kPageSize);
    }
  }
  return to_tensor(slots, at::kLong, device_);
}

at::Tensor KvCache::page_table(const Batch& batch) const {
  int64_t most = 0;
  for (const int64_t id : batch.sequences) most = std::max(most, static_cast<int64_t>(find(id).pages.size()));
  std::vector<int32_t> table(batch.num_sequences() * most, 0);
  for (int64_t i = 0; i < batch.num_sequences(); ++i) {
    const auto& pages = find(batch.sequences[i]).pages;
    std::copy(pages.begin(), pages.end(), table.begin() + i * most);
  }
  return to_tensor(table, at::kInt, device_).view({batch.num_sequences(), most});
}

at::Tensor KvCache::lengths(const Batch& batch) const {
  std::vector<int32_t> lengths;
  for (int64_t i = 0; i < batch.num_sequences(); ++i) {
    lengths.push_back(static_cast<int32_t>(batch.starts[i] + batch.query_lengths[i]));
  }
  return to_tensor(lengths, at::kInt, device_);
}

at::Tensor KvCache::state_slots(const Batch& batch) const {
  std::vector<int64_t> slots;
  for (const int64_t id : batch.sequences) slots.push_back(find(id).state_slot);
  return to_tensor(slots, at::kLong, device_);
}

void KvCache::write(int64_t layer, const at::Tensor& slots, const at::Tensor& key, const at::Tensor& value) {
  const std::vector<int64_t> flat = {config_.num_kv_heads, num_pages_ * kPageSize, config_.head_dim};
  keys(layer).view(flat).index_copy_(1, slots, key.transpose(0, 1).to(dtype_));
  values(layer).view(flat).index_copy_(1, slots, value.transpose(0, 1).to(dtype_));
}

at::Tensor KvCache::gather(const at::Tensor& pool, int64_t id, int64_t length) const {
  const Sequence& sequence = find(id);
  if (length < 0 || length > sequence.length) {
    fail("{} tokens of sequence {} were asked for, it has {}", length, id, sequence.length);
  }
  const int64_t count = pages_for(length);
  bool consecutive = true;
  for (int64_t i = 1; i < count; ++i) consecutive &= sequence.pages[i] == sequence.pages[i - 1] + 1;
  at::Tensor pages;
  if (count == 0 || consecutive) {
    pages = pool.narrow(1, count == 0 ? 0 : sequence.pages[0], count);
  } else {
    const std::vector<int64_t> index(sequence.pages.begin(), sequence.pages.begin() + count);
    pages = pool.index_select(1, to_tensor(index, at::kLong, pool.device()));
  }
  return pages.view({pool.size(0), count * kPageSize, pool.size(3)}).narrow(1, 0, length);
}

}  // namespace spot

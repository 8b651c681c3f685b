#include "benchmark/prefill_model.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>

#include "attention/stack.h"
#include "benchmark/device.h"
#include "benchmark/noise.h"
#include "benchmark/span_timer.h"
#include "cache/batch_builder.h"

namespace spot {
namespace {

// The stack, with the time that is spent in it apart.
class TimedAttention : public AttentionBackend {
 public:
  TimedAttention(AttentionStack& stack, SpanTimer& timer) : stack_(stack), timer_(timer) {}
  AttentionPreparation prepare(int64_t layer, const at::Tensor& hidden, const Batch& batch) override {
    return stack_.prepare(layer, hidden, batch);
  }
  at::Tensor forward(const AttentionInputs& inputs) override {
    timer_.mark("attention");
    at::Tensor output = stack_.forward(inputs);
    timer_.mark("rest");
    return output;
  }

 private:
  AttentionStack& stack_;
  SpanTimer& timer_;
};

// Rows, columns and number of a kind of matrix that every token is multiplied with.
struct Product {
  int64_t rows, columns, layers;
};

std::vector<Product> products_of(const ModelConfig& m) {
  const auto full = static_cast<int64_t>(m.full_attention_layers().size()), linear = m.num_layers - full;
  const int64_t heads = m.num_heads * m.head_dim, kv = m.num_kv_heads * m.head_dim;
  std::vector<Product> products = {{(m.attention_output_gate ? 2 : 1) * heads + 2 * kv, m.hidden_size, full},
                                   {m.hidden_size, heads, full},
                                   {2 * m.intermediate_size, m.hidden_size, m.num_layers},
                                   {m.hidden_size, m.intermediate_size, m.num_layers}};
  if (linear > 0) {
    const LinearAttentionConfig& l = m.linear;
    const int64_t values = l.num_value_heads * l.value_head_dim;
    products.push_back(
        {2 * l.num_key_heads * l.key_head_dim + 2 * values + 2 * l.num_value_heads, m.hidden_size, linear});
    products.push_back({m.hidden_size, values, linear});
  }
  return products;
}

std::vector<int32_t> prompt_of(int64_t start, int64_t count, int64_t vocabulary) {
  std::vector<int32_t> tokens;
  for (int64_t i = start; i < start + count; ++i)
    tokens.push_back(static_cast<int32_t>((i * 7919 + 13) % vocabulary));
  return tokens;
}

double since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double products_flop(const ModelConfig& model) {
  double flop = 0;
  for (const Product& p : products_of(model)) flop += 2 * static_cast<double>(p.rows * p.columns * p.layers);
  return flop;
}

double measure_products(const ModelConfig& model, int64_t tokens, at::ScalarType dtype, at::Device device) {
  const auto numbers = at::TensorOptions(device).dtype(dtype);
  double seconds = 0;
  for (const Product& p : products_of(model)) {
    const at::Tensor x = at::randn({tokens, p.columns}, numbers),
                     weight = at::randn({p.rows, p.columns}, numbers);
    seconds += 1e-3 * static_cast<double>(p.layers) * median_ms(device, 3, [&] { at::linear(x, weight); });
  }
  return seconds;
}

PrefillModelRow measure_prefill_model(const Backbone& backbone, const Selector* selector,
                                      const MethodSpec& method, const PrefillChunks& chunks, int64_t rounds,
                                      const std::function<void()>& tick) {
  const c10::InferenceMode inference;
  const at::Device device = backbone.device();
  PrefillModelRow row{.name = method.name, .sparse = method.has_sparse_prefill()};
  AttentionStack stack(backbone, selector, {method},
                       {.num_pages = (chunks.length + kBlockSize - 1) / kBlockSize, .num_sequences = 1});
  PagedCache& cache = stack.cache();
  SpanTimer timer(device);
  TimedAttention attention(stack, timer);
  const auto run = [&](int64_t sequence, int64_t start, int64_t count, bool last) {
    timer.mark("rest");
    const Batch batch = build_batch(cache, {{.sequence = sequence,
                                             .tokens = prompt_of(start, count, backbone.config().vocab_size),
                                             .decode = false,
                                             .logits = last}});
    stack.begin_pass(batch);
    const at::Tensor hidden = backbone.forward(batch, attention, cache.states());
    if (last) backbone.logits(hidden.index_select(0, batch.logit_rows)).argmax().item<int64_t>();
    return timer.take();
  };
  const auto fill = [&](int64_t sequence, int64_t first, int64_t end) {
    for (int64_t index = first; index < end; ++index)
      fill_with_noise(backbone, stack, sequence, chunks.tokens(index));
  };
  {
    const int64_t sequence = cache.open_sequence();
    run(sequence, 0, chunks.tokens(0), true);
    cache.close_sequence(sequence);
  }
  reset_peak(device);
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t sequence = cache.open_sequence();
    std::vector<double> in_attention, in_rest;
    synchronize(device);
    const auto begin = std::chrono::steady_clock::now();
    int64_t done = 0;
    for (const int64_t index : chunks.run) {
      fill(sequence, done, index);
      const auto seconds =
          run(sequence, index * chunks.chunk, chunks.tokens(index), index == chunks.count() - 1);
      in_attention.push_back(seconds.at("attention")), in_rest.push_back(seconds.at("rest"));
      done = index + 1;
      if (tick) tick();
    }
    const double attended = chunks.sum(in_attention), rest = chunks.sum(in_rest),
                 seconds = chunks.whole() ? since(begin) : attended + rest;
    cache.close_sequence(sequence);
    if (round == 0 || seconds < row.seconds)
      row.seconds = seconds, row.attention = attended, row.rest = seconds - attended;
  }
  row.peak_gib = peak_gib(device);
  return row;
}

}  // namespace spot

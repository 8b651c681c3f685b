// The gated delta rule by ATen: its parts, and the operators' form that serves every device.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <utility>

#include "ops/linear_attention/gated_delta.h"
#include "ops/linear_attention/gated_delta_check.h"
#include "ops/linear_attention/pieces.h"

namespace spot::ops {
namespace {

using Shape = GatedDeltaShape;

// Tokens worked on at once in prefill: enough for wide batches of matrix products, few enough that the
// float32 intermediates stay near a hundred megabytes.
constexpr int64_t kPieceTokens = 2048;

struct Parts {
  at::Tensor query, key, value;
};

// q | k | v of the convolution's output, per head; q and k normalised, q scaled.
Parts split_heads(const at::Tensor& u, const Shape& s) {
  const int64_t tokens = u.size(0), key_channels = s.num_key_heads * s.key_head_dim;
  const auto heads = [&](int64_t start) {
    return l2_normalized(u.narrow(1, start, key_channels).reshape({tokens, s.num_key_heads, s.key_head_dim}));
  };
  return {heads(0).mul_(1.0 / std::sqrt(static_cast<double>(s.key_head_dim))), heads(key_channels),
          u.narrow(1, 2 * key_channels, s.num_value_heads * s.value_head_dim)
              .reshape({tokens, s.num_value_heads, s.value_head_dim})};
}

// Where the chunks of a ragged batch lie: step by step (chunk 0 of every sequence, chunk 1 of every sequence
// that has one, ...), sequences with more chunks first, so that the sequences still running at a step are a
// prefix.
struct ChunkPlan {
  std::vector<int64_t> order;    // sequences, most chunks first
  std::vector<int64_t> running;  // sequences at each step
  int64_t num_chunks = 0;
  std::optional<at::Tensor> positions;  // [T] row of each token among num_chunks * 64; absent: the identity
};

ChunkPlan plan_chunks(at::IntArrayRef query_lengths, at::Device device) {
  const int64_t num_sequences = static_cast<int64_t>(query_lengths.size());
  const auto chunks_of = [&](int64_t i) {
    return (query_lengths[i] + kDeltaChunkTokens - 1) / kDeltaChunkTokens;
  };
  ChunkPlan plan;
  plan.order.resize(num_sequences);
  std::iota(plan.order.begin(), plan.order.end(), 0);
  std::stable_sort(plan.order.begin(), plan.order.end(),
                   [&](int64_t i, int64_t j) { return chunks_of(i) > chunks_of(j); });
  const int64_t steps = num_sequences > 0 ? chunks_of(plan.order[0]) : 0;
  std::vector<int64_t> first_chunk(steps);
  for (int64_t step = 0, count = num_sequences; step < steps; ++step) {
    while (chunks_of(plan.order[count - 1]) <= step) --count;
    first_chunk[step] = plan.num_chunks;
    plan.running.push_back(count);
    plan.num_chunks += count;
  }
  if (num_sequences == 1) return plan;
  std::vector<int64_t> rank(num_sequences), rows;
  for (int64_t i = 0; i < num_sequences; ++i) rank[plan.order[i]] = i;
  for (int64_t i = 0; i < num_sequences; ++i)
    for (int64_t t = 0; t < query_lengths[i]; ++t)
      rows.push_back((first_chunk[t / kDeltaChunkTokens] + rank[i]) * kDeltaChunkTokens +
                     t % kDeltaChunkTokens);
  plan.positions = at::tensor(rows, at::kLong).to(device);
  return plan;
}

// x [T, heads, ...] as chunks [num_chunks, heads, 64, ...], contiguous, zero where a chunk has no token.
// Tokens of zeros with a gate of zeros leave the state alone.
at::Tensor into_chunks(const at::Tensor& x, const ChunkPlan& plan) {
  std::vector<int64_t> sizes = x.sizes().vec();
  const int64_t tokens = sizes[0];
  sizes[0] = plan.num_chunks * kDeltaChunkTokens;
  at::Tensor padded;
  if (plan.positions) {
    padded = at::zeros(sizes, x.options()).index_copy_(0, *plan.positions, x);
  } else if (sizes[0] == tokens) {
    padded = x;
  } else {
    padded = at::empty(sizes, x.options());
    padded.narrow(0, 0, tokens).copy_(x);
    padded.narrow(0, tokens, sizes[0] - tokens).zero_();
  }
  sizes.insert(sizes.begin(), plan.num_chunks);
  sizes[1] = kDeltaChunkTokens;
  return padded.view(sizes).transpose(1, 2).contiguous();
}

at::Tensor out_of_chunks(const at::Tensor& chunks, int64_t num_tokens, const ChunkPlan& plan) {
  const at::Tensor rows =
      chunks.transpose(1, 2).reshape({plan.num_chunks * kDeltaChunkTokens, chunks.size(1), chunks.size(3)});
  return plan.positions ? rows.index_select(0, *plan.positions) : rows.narrow(0, 0, num_tokens);
}

// [n, H_k, rows, cols] -> [n * H_v, rows, cols], each key head repeated for its value heads.
at::Tensor repeat_heads(const at::Tensor& x, int64_t repeats) {
  if (repeats == 1) return x.reshape({x.size(0) * x.size(1), x.size(2), x.size(3)});
  return x.unsqueeze(2)
      .expand({x.size(0), x.size(1), repeats, x.size(2), x.size(3)})
      .reshape({x.size(0) * x.size(1) * repeats, x.size(2), x.size(3)});
}

}  // namespace

GatedDeltaWeights gated_delta_weights(const at::Tensor& conv1d_weight, const at::Tensor& a_log,
                                      const at::Tensor& dt_bias, const at::Tensor& norm_weight,
                                      double norm_epsilon) {
  if (conv1d_weight.defined() && conv1d_weight.dim() == 3)
    expect(conv1d_weight, {-1, 1, -1}, {}, "conv1d.weight");
  else
    expect(conv1d_weight, {-1, -1}, {}, "conv1d.weight");
  expect(a_log, {-1}, {}, "A_log");
  expect(dt_bias, {a_log.size(0)}, {}, "dt_bias");
  expect(norm_weight, {-1}, {}, "norm.weight");
  GatedDeltaWeights w;
  w.conv = conv1d_weight.reshape({conv1d_weight.size(0), -1}).to(at::kFloat).t().contiguous();
  w.decay_rate = a_log.to(at::kFloat).exp().contiguous();
  w.dt_bias = dt_bias.to(at::kFloat).contiguous();
  w.norm = norm_weight.to(at::kFloat).contiguous();
  w.norm_epsilon = norm_epsilon;
  return w;
}

at::Tensor causal_conv_silu(const at::Tensor& x, const at::Tensor& weight, at::Tensor conv_states,
                            const at::Tensor& state_slots, const std::vector<int64_t>& query_lengths) {
  expect(weight, {-1, -1}, at::kFloat, "the convolution weight");
  const int64_t taps = weight.size(0), channels = weight.size(1), history = taps - 1;
  expect(x, {-1, channels}, {}, "the convolution's input");
  expect(conv_states, {-1, history, channels}, at::kFloat, "conv_states");
  const int64_t num_sequences = expect_lengths(query_lengths, x.size(0));
  expect_sequences(state_slots, num_sequences);
  const at::Tensor states = conv_states.index_select(0, state_slots);
  if (all_ones(query_lengths)) {
    const at::Tensor window = at::cat({states, x.unsqueeze(1).to(at::kFloat)}, 1);
    conv_states.index_copy_(0, state_slots, window.narrow(1, 1, history));
    return at::silu(window.mul(weight).sum(1));
  }
  // Each sequence's history and tokens end to end. Windows that run over a seam are computed and dropped.
  std::vector<at::Tensor> rows;
  for (int64_t i = 0, token = 0; i < num_sequences; token += query_lengths[i++]) {
    rows.push_back(states.select(0, i));
    rows.push_back(x.narrow(0, token, query_lengths[i]).to(at::kFloat));
  }
  const at::Tensor inputs = at::cat(rows);
  const int64_t num_windows = inputs.size(0) - history;
  at::Tensor sums = inputs.narrow(0, 0, num_windows).mul(weight.select(0, 0));
  for (int64_t tap = 1; tap < taps; ++tap)
    sums.addcmul_(inputs.narrow(0, tap, num_windows), weight.select(0, tap));
  std::vector<at::Tensor> outputs, last;
  for (int64_t i = 0, row = 0; i < num_sequences; row += history + query_lengths[i++]) {
    outputs.push_back(sums.narrow(0, std::min(row, num_windows), query_lengths[i]));
    last.push_back(inputs.narrow(0, row + query_lengths[i], history));
  }
  conv_states.index_copy_(0, state_slots, at::stack(last));
  at::Tensor output = num_sequences == 1 ? outputs[0] : at::cat(outputs);
  return at::silu_(output);
}

at::Tensor l2_normalized(const at::Tensor& x) {
  const at::Tensor y = x.to(at::kFloat);
  return y * y.square().sum(-1, /*keepdim=*/true).add_(1e-6).rsqrt_();
}

DeltaGates delta_gates(const at::Tensor& b, const at::Tensor& a, const GatedDeltaWeights& weights) {
  return {at::softplus(a.to(at::kFloat) + weights.dt_bias).mul_(weights.decay_rate).neg_(),
          at::sigmoid(b.to(at::kFloat))};
}

namespace {

Shape expect_recurrence(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const DeltaGates& gates, const at::Tensor& recurrent_states) {
  expect(query, {-1, -1, -1}, at::kFloat, "query");
  expect(value, {query.size(0), -1, -1}, at::kFloat, "value");
  const Shape s = {query.size(1), value.size(1), query.size(2), value.size(2)};
  expect(key, query.sizes(), at::kFloat, "key");
  expect(gates.log_decay, {query.size(0), s.num_value_heads}, at::kFloat, "log_decay");
  expect(gates.beta, {query.size(0), s.num_value_heads}, at::kFloat, "beta");
  expect(recurrent_states, {-1, s.num_value_heads, s.key_head_dim, s.value_head_dim}, at::kFloat,
         "recurrent_states");
  TORCH_CHECK(s.num_key_heads > 0 && s.num_value_heads % s.num_key_heads == 0,
              "gated delta rule: ", s.num_value_heads, " value heads are no multiple of ", s.num_key_heads,
              " key heads");
  return s;
}

}  // namespace

at::Tensor gated_delta_chunked(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const DeltaGates& gates, at::Tensor recurrent_states,
                               const at::Tensor& state_slots, const std::vector<int64_t>& query_lengths) {
  const Shape s = expect_recurrence(query, key, value, gates, recurrent_states);
  const int64_t num_sequences = expect_lengths(query_lengths, query.size(0));
  expect_sequences(state_slots, num_sequences);
  const int64_t heads = s.num_value_heads, repeats = heads / s.num_key_heads;
  const ChunkPlan plan = plan_chunks(query_lengths, query.device());
  if (plan.num_chunks == 0) return at::empty_like(value);
  const int64_t n = plan.num_chunks;

  // Within the chunks, all at once. Sums of g are kept in double: a token that forgets much (g of -50) would
  // otherwise round away the small differences of the tokens after it.
  const at::Tensor k = into_chunks(key, plan), v = into_chunks(value, plan);      // [n, heads, 64, dim]
  const at::Tensor keys_and_queries = at::cat({k, into_chunks(query, plan)}, 2);  // [n, H_k, 128, D_k]
  const at::Tensor beta = into_chunks(gates.beta, plan).unsqueeze(-1);            // [n, H_v, 64, 1]
  const at::Tensor sums = into_chunks(gates.log_decay.to(at::kDouble), plan).cumsum(-1);
  const at::Tensor decay =
      (sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(at::kFloat).exp_().tril_();  // [n, H_v, 64, 64]
  const at::Tensor decay_in = sums.exp().to(at::kFloat).unsqueeze(-1);          // from the chunk's start
  const at::Tensor decay_out =
      (sums.narrow(-1, kDeltaChunkTokens - 1, 1) - sums).exp_().to(at::kFloat).unsqueeze(-1);
  const at::Tensor products =
      at::matmul(keys_and_queries, k.transpose(2, 3))
          .unsqueeze(2)
          .mul(decay.view({n, s.num_key_heads, repeats, 1, kDeltaChunkTokens, kDeltaChunkTokens})
                   .expand({n, s.num_key_heads, repeats, 2, kDeltaChunkTokens, kDeltaChunkTokens})
                   .reshape({n, s.num_key_heads, repeats, 2 * kDeltaChunkTokens, kDeltaChunkTokens}))
          .reshape({n, heads, 2 * kDeltaChunkTokens, kDeltaChunkTokens});
  const at::Tensor attention =
      products.narrow(2, kDeltaChunkTokens, kDeltaChunkTokens);  // causal q k^T with decay
  // I + A is unit lower triangular; the solver reads only what lies below the diagonal.
  const at::Tensor inverse = at::linalg_solve_triangular(
      products.narrow(2, 0, kDeltaChunkTokens) * beta,
      at::eye(kDeltaChunkTokens, beta.options()).expand({n, heads, kDeltaChunkTokens, kDeltaChunkTokens}),
      /*upper=*/false, /*left=*/true, /*unitriangular=*/true);
  const at::Tensor beta_v = v * beta, beta_decay = beta * decay_in;

  // From chunk to chunk: r = beta (v - e^G K S), new values = (I + A)^-1 r.
  const at::Tensor slots =
      num_sequences == 1 ? state_slots
                         : state_slots.index_select(0, at::tensor(plan.order, at::kLong).to(query.device()));
  at::Tensor states = recurrent_states.index_select(0, slots);  // [sequences, H_v, D_k, D_v]
  at::Tensor o = at::empty_like(v);
  int64_t first = 0;
  for (const int64_t count : plan.running) {
    const int64_t batch = count * heads;
    const auto at_step = [&](const at::Tensor& t) {
      const at::Tensor part = t.narrow(0, first, count);
      return part.reshape({batch, part.size(2), part.size(3)});
    };
    at::Tensor state = states.narrow(0, 0, count).view({batch, s.key_head_dim, s.value_head_dim});
    const at::Tensor kq = repeat_heads(keys_and_queries.narrow(0, first, count), repeats);
    const at::Tensor read = at::bmm(kq, state);  // K S and Q S
    const at::Tensor r =
        at::addcmul(at_step(beta_v), read.narrow(1, 0, kDeltaChunkTokens), at_step(beta_decay), /*value=*/-1);
    const at::Tensor new_values = at::bmm(at_step(inverse), r);
    at_step(o).copy_(at::baddbmm(read.narrow(1, kDeltaChunkTokens, kDeltaChunkTokens) * at_step(decay_in),
                                 at_step(attention), new_values));
    state.mul_(at_step(decay_in).narrow(1, kDeltaChunkTokens - 1, 1));
    state.baddbmm_(kq.narrow(1, 0, kDeltaChunkTokens).transpose(1, 2), new_values * at_step(decay_out));
    first += count;
  }
  recurrent_states.index_copy_(0, slots, states);
  return out_of_chunks(o, query.size(0), plan);
}

at::Tensor gated_delta_step(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const DeltaGates& gates, at::Tensor recurrent_states,
                            const at::Tensor& state_slots) {
  const Shape s = expect_recurrence(query, key, value, gates, recurrent_states);
  const int64_t num_sequences = query.size(0), heads = s.num_value_heads, batch = num_sequences * heads;
  expect_sequences(state_slots, num_sequences);
  if (num_sequences == 0) return at::empty_like(value);
  const at::Tensor kq = repeat_heads(at::stack({key, query}, 2), heads / s.num_key_heads);  // [batch, 2, D_k]
  const at::Tensor decay = gates.log_decay.exp().reshape({batch, 1, 1});
  at::Tensor states =
      recurrent_states.index_select(0, state_slots).view({batch, s.key_head_dim, s.value_head_dim});
  // One pass over the state reads for key and query; the query's share of the new value is added by hand:
  // S'^T q = e^g S^T q + (k.q) d.
  const at::Tensor read = at::bmm(kq, states).mul_(decay);  // [batch, 2, D_v]
  const at::Tensor k = kq.narrow(1, 0, 1), q = kq.narrow(1, 1, 1);
  const at::Tensor d = (value.reshape({batch, 1, s.value_head_dim}) - read.narrow(1, 0, 1))
                           .mul_(gates.beta.reshape({batch, 1, 1}));
  states.mul_(decay).baddbmm_(k.transpose(1, 2), d);
  recurrent_states.index_copy_(0, state_slots,
                               states.view({num_sequences, heads, s.key_head_dim, s.value_head_dim}));
  return at::addcmul(read.narrow(1, 1, 1), d, (k * q).sum(-1, /*keepdim=*/true))
      .view({num_sequences, heads, s.value_head_dim});
}

at::Tensor gated_rms_norm(const at::Tensor& o, const at::Tensor& z, const at::Tensor& weight,
                          double epsilon) {
  expect(o, {-1, -1, -1}, at::kFloat, "the norm's input");
  expect(weight, {o.size(2)}, at::kFloat, "the norm weight");
  TORCH_CHECK(z.defined() && z.numel() == o.numel(), "gated delta rule: the gate z is ", shape_text(z),
              " for an output of ", shape_text(o), "; they must have as many elements");
  const at::Tensor gate = at::silu(z.reshape(o.sizes()).to(at::kFloat));
  return (o * o.square().mean(-1, /*keepdim=*/true).add_(epsilon).rsqrt_())
      .mul_(weight)
      .mul_(gate)
      .reshape({o.size(0), o.size(1) * o.size(2)})
      .to(z.scalar_type());
}

namespace aten {

at::Tensor gated_delta_decode(const GatedDeltaDecode& arguments) {
  const auto& [mixed_qkv, z, b, a, w, conv_states, recurrent_states, state_slots] = arguments.layer;
  const Shape shape = expect_layer(arguments.layer, mixed_qkv.size(0));
  const std::vector<int64_t> ones(static_cast<size_t>(mixed_qkv.size(0)), 1);
  const Parts p = split_heads(causal_conv_silu(mixed_qkv, w.conv, conv_states, state_slots, ones), shape);
  const at::Tensor o =
      gated_delta_step(p.query, p.key, p.value, delta_gates(b, a, w), recurrent_states, state_slots);
  return gated_rms_norm(o, z, w.norm, w.norm_epsilon);
}

at::Tensor gated_delta_prefill(const GatedDeltaPrefill& arguments) {
  const auto num_sequences = static_cast<int64_t>(arguments.query_lengths.size());
  const Shape shape = expect_layer(arguments.layer, num_sequences);
  return by_pieces(
      arguments, kPieceTokens, [&](const GatedDeltaLayer& l, const std::vector<int64_t>& lengths) {
        const Parts p = split_heads(
            causal_conv_silu(l.mixed_qkv, l.weights.conv, l.conv_states, l.state_slots, lengths), shape);
        const at::Tensor o = gated_delta_chunked(p.query, p.key, p.value, delta_gates(l.b, l.a, l.weights),
                                                 l.recurrent_states, l.state_slots, lengths);
        return gated_rms_norm(o, l.z, l.weights.norm, l.weights.norm_epsilon);
      });
}

}  // namespace aten
}  // namespace spot::ops

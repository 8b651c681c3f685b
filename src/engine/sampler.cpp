#include "engine/sampler.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"

namespace spot {
namespace {

constexpr double kUnit = 0x1p40;  // the likeliest token's weight
constexpr int64_t kLowBits = 0xffffffff;

// A uniform number in [0, 1) of 53 random bits: the counter-th of the seed's. SplitMix64's finaliser (Steele,
// Lea and Flood 2014), twice.
double uniform(uint64_t seed, uint64_t counter) {
  const auto mix = [](uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  };
  return static_cast<double>(mix(mix(seed) ^ counter) >> 11) * 0x1p-53;
}

template <typename T>
at::Tensor to_device(const std::vector<T>& values, at::ScalarType dtype, at::Device device) {
  at::Tensor host = at::empty({static_cast<int64_t>(values.size())},
                              at::TensorOptions().dtype(dtype).pinned_memory(device.is_cuda()));
  std::copy(values.begin(), values.end(), host.mutable_data_ptr<T>());
  return host.to(device, /*non_blocking=*/true);
}

// Distinct int64 keys that order tokens by descending logit, then by ascending id: library sorts and top-k
// searches do not say how they order equals.
at::Tensor order_keys(const at::Tensor& logits) {
  const at::Tensor bits = (logits + 0.0).view(at::kInt);  // -0 becomes 0
  const at::Tensor ordered = at::where(bits < 0, bits.bitwise_xor(0x7fffffff), bits).to(at::kLong);
  const at::Tensor ids = at::arange(logits.size(1), ordered.options());
  return ordered * (kLowBits + 1) + (kLowBits - ids);
}

// The `count` tokens of each row that come first, [rows, count] int64.
at::Tensor first_tokens(const at::Tensor& logits, int64_t count) {
  const at::Tensor keys = order_keys(logits);
  const at::Tensor first = count < keys.size(1)
                               ? std::get<0>(keys.topk(count, 1, /*largest=*/true, /*sorted=*/true))
                               : std::get<0>(keys.sort(1, /*descending=*/true));
  return kLowBits - first.bitwise_and(kLowBits);
}

}  // namespace

Sampler::Sampler(int64_t vocab_size, at::Device device) : vocab_size_(vocab_size), device_(device) {
  if (vocab_size < 1 || vocab_size >= (int64_t{1} << 22))
    fail("a sampler for a vocabulary of {} tokens was asked for; 1 to 2^22 are possible", vocab_size);
}

const Sampler::Request& Sampler::find(int64_t id) const {
  const auto found = requests_.find(id);
  if (found == requests_.end()) fail("request {} is not known to the sampler", id);
  return found->second;
}

void Sampler::add(int64_t id, const SamplingOptions& options, std::span<const int32_t> prompt) {
  const c10::InferenceMode inference;
  options.check(vocab_size_);
  if (requests_.count(id)) fail("request {} is known to the sampler already", id);
  for (int32_t token : prompt) {
    if (token < 0 || token >= vocab_size_)
      fail("token id {} lies outside the model's vocabulary of {}; is this the model's own tokenizer?", token,
           vocab_size_);
  }
  Request request{.options = options};
  if (!options.logit_bias.empty()) {
    std::map<int64_t, double> biases;  // a token that is named twice has the last one
    for (const auto& [token, bias] : options.logit_bias) biases[token] = bias;
    std::vector<int64_t> tokens;
    std::vector<float> values;
    for (const auto& [token, bias] : biases)
      tokens.push_back(token), values.push_back(static_cast<float>(bias));
    request.bias_ids = to_device(tokens, at::kLong, device_);
    request.bias = to_device(values, at::kFloat, device_);
  }
  if (options.has_penalties()) {
    if (free_history_.empty()) {
      const int64_t rows = history_.defined() ? history_.size(0) : 0, more = std::max<int64_t>(rows, 1);
      const at::Tensor zeros =
          at::zeros({more, vocab_size_}, at::TensorOptions().dtype(at::kInt).device(device_));
      history_ = rows ? at::cat({history_, zeros}) : zeros;
      for (int64_t row = rows + more; row-- > rows;) free_history_.push_back(row);
    }
    request.history = free_history_.back();
    free_history_.pop_back();
    at::Tensor row = history_[request.history].zero_();
    const std::vector<int64_t> tokens(prompt.begin(), prompt.end());
    if (!tokens.empty()) row.index_fill_(0, to_device(tokens, at::kLong, device_), 1);
  }
  requests_.emplace(id, std::move(request));
}

void Sampler::remove(int64_t id) {
  const Request& request = find(id);
  if (request.history >= 0) free_history_.push_back(request.history);
  requests_.erase(id);
}

// The logits with biases and penalties.
at::Tensor Sampler::adjusted(const at::Tensor& logits, const std::vector<int64_t>& ids) const {
  std::vector<int64_t> rows, histories;
  std::vector<float> repetition, frequency, presence;
  at::Tensor changed = logits;
  for (size_t i = 0; i < ids.size(); ++i) {
    const Request& request = find(ids[i]);
    const SamplingOptions& options = request.options;
    if (options.changes_logits() && changed.is_same(logits)) changed = logits.clone();
    if (request.bias.defined())
      changed[static_cast<int64_t>(i)].index_add_(0, request.bias_ids, request.bias);
    if (!options.has_penalties()) continue;
    rows.push_back(static_cast<int64_t>(i));
    histories.push_back(request.history);
    repetition.push_back(static_cast<float>(options.repetition_penalty));
    frequency.push_back(static_cast<float>(options.frequency_penalty));
    presence.push_back(static_cast<float>(options.presence_penalty));
  }
  if (rows.empty()) return changed;
  const auto column = [&](const std::vector<float>& values) {
    return to_device(values, at::kFloat, device_).unsqueeze(1);
  };
  const at::Tensor index = to_device(rows, at::kLong, device_);
  const at::Tensor history = history_.index_select(0, to_device(histories, at::kLong, device_));
  at::Tensor penalised = changed.index_select(0, index);
  const at::Tensor penalty = column(repetition);
  penalised =
      at::where(history > 0, at::where(penalised > 0, penalised / penalty, penalised * penalty), penalised);
  const at::Tensor times = history.bitwise_right_shift(1);
  penalised = penalised - column(frequency) * times - column(presence) * (times > 0);
  changed.index_copy_(0, index, penalised);
  return changed;
}

// Minus infinity where the mask's bits are not set.
at::Tensor Sampler::masked(const at::Tensor& logits, const TokenMask& mask) const {
  if (mask.rows.empty()) return logits;
  const auto rows = static_cast<int64_t>(mask.rows.size());
  const at::Tensor words = mask.bits.to(device_, /*non_blocking=*/true).unsqueeze(2);
  const at::Tensor bits = words.bitwise_right_shift(at::arange(32, words.options())).bitwise_and(1);
  const at::Tensor forbidden = bits.view({rows, -1}).narrow(1, 0, vocab_size_) == 0;
  const at::Tensor index = to_device(mask.rows, at::kLong, device_);
  return logits.index_copy(
      0, index,
      logits.index_select(0, index).masked_fill(forbidden, -std::numeric_limits<float>::infinity()));
}

// Greedy rows get weights too, which nobody reads.
Sampler::Candidates Sampler::candidates(const at::Tensor& logits, const std::vector<int64_t>& ids) const {
  std::vector<double> settings;  // [4, rows]: temperature, top_k, top_p, min_p in weights
  int64_t most = 1;
  const auto add = [&](auto value_of) {
    for (int64_t id : ids) settings.push_back(value_of(find(id).options));
  };
  const auto kept = [&](const SamplingOptions& o) {
    return o.temperature == 0 ? 1 : o.top_k > 0 ? std::min(o.top_k, vocab_size_) : vocab_size_;
  };
  add([](const SamplingOptions& o) { return o.temperature > 0 ? o.temperature : 1.0; });
  add([&](const SamplingOptions& o) {
    most = std::max(most, kept(o));
    return static_cast<double>(kept(o));
  });
  add([](const SamplingOptions& o) { return o.top_p; });
  add([](const SamplingOptions& o) { return o.min_p * kUnit; });
  const at::Tensor columns = to_device(settings, at::kDouble, device_).view({4, -1, 1});

  const at::Tensor tokens = first_tokens(logits, most);
  const at::Tensor values = logits.gather(1, tokens).to(at::kDouble);
  at::Tensor weights =
      (((values - values.narrow(1, 0, 1)) / columns[0]).exp() * kUnit).round().nan_to_num(0).to(at::kLong);
  weights = weights * (at::arange(most, columns.options()) < columns[1]);
  const at::Tensor before = weights.cumsum(1) - weights;
  const at::Tensor nucleus = columns[2] * weights.sum(1, /*keepdim=*/true).to(at::kDouble);
  weights = weights * (before < nucleus) * (weights >= columns[3]);
  return {tokens, weights};
}

// The first candidate at which the running sum of weights passes a random share of their total.
at::Tensor Sampler::draw(const Candidates& from, const std::vector<int64_t>& ids) const {
  std::vector<double> numbers;
  for (int64_t id : ids) {
    const Request& request = find(id);
    numbers.push_back(uniform(request.options.seed, static_cast<uint64_t>(request.drawn)));
  }
  const at::Tensor sums = from.weights.cumsum(1);
  const at::Tensor total = sums.narrow(1, sums.size(1) - 1, 1);
  const at::Tensor target = at::minimum(
      (to_device(numbers, at::kDouble, device_).unsqueeze(1) * total.to(at::kDouble)).to(at::kLong),
      total - 1);
  const at::Tensor index = (sums <= target).sum(1, /*keepdim=*/true).clamp_max(sums.size(1) - 1);
  return from.ids.gather(1, index).squeeze(1);
}

std::vector<SampledToken> Sampler::sample(const at::Tensor& logits, const std::vector<int64_t>& ids,
                                          const TokenMask& mask) {
  const c10::InferenceMode inference;
  if (logits.dim() != 2 || logits.size(0) != static_cast<int64_t>(ids.size()) ||
      logits.size(1) != vocab_size_ || logits.scalar_type() != at::kFloat)
    fail("the sampler was given logits of another shape or dtype than [{}, {}] float32", ids.size(),
         vocab_size_);
  if (ids.empty()) return {};
  const at::Tensor changed = masked(adjusted(logits, ids), mask);
  const auto [greatest, greedy] = changed.max(1);  // the first of equal maxima
  at::Tensor tokens = greedy;
  std::vector<int64_t> drawing;
  for (size_t i = 0; i < ids.size(); ++i)
    if (find(ids[i]).options.temperature > 0) drawing.push_back(static_cast<int64_t>(i));
  if (drawing.size() == ids.size()) {
    tokens = draw(candidates(changed, ids), ids);
  } else if (!drawing.empty()) {
    std::vector<int64_t> of_rows;
    for (int64_t row : drawing) of_rows.push_back(ids[static_cast<size_t>(row)]);
    const at::Tensor rows = to_device(drawing, at::kLong, device_);
    tokens = greedy.index_copy(0, rows, draw(candidates(changed.index_select(0, rows), of_rows), of_rows));
  }

  // A history row counts what was drawn; a request whose logits are broken ends anyway.
  std::vector<int64_t> histories, rows;
  for (size_t i = 0; i < ids.size(); ++i) {
    Request& request = requests_.at(ids[i]);
    request.drawn++;
    if (request.history < 0) continue;
    histories.push_back(request.history);
    rows.push_back(static_cast<int64_t>(i));
  }
  if (!rows.empty()) {
    const at::Tensor drawn = tokens.index_select(0, to_device(rows, at::kLong, device_));
    history_.index_put_({to_device(histories, at::kLong, device_), drawn},
                        at::full({}, 2, history_.options()), /*accumulate=*/true);
  }

  const at::Tensor host = at::stack({tokens.to(at::kDouble), greatest.to(at::kDouble)}).cpu();
  const auto values = host.accessor<double, 2>();
  std::vector<SampledToken> sampled(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto row = static_cast<int64_t>(i);
    sampled[i].token = static_cast<int32_t>(values[0][row]);
    if (std::isnan(values[1][row]))
      sampled[i].error = "the logits hold NaN; the model or its weights are broken";
    else if (!std::isfinite(values[1][row]))
      sampled[i].error = "the logits have no finite maximum; the model or its weights are broken";
  }
  add_logprobs(sampled, logits, ids);
  return sampled;
}

void Sampler::add_logprobs(std::vector<SampledToken>& sampled, const at::Tensor& logits,
                           const std::vector<int64_t>& ids) const {
  std::vector<int64_t> rows, chosen;
  int64_t most = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    const int64_t wanted = find(ids[i]).options.logprobs;
    if (wanted < 0 || !sampled[i].error.empty()) continue;
    rows.push_back(static_cast<int64_t>(i));
    chosen.push_back(sampled[i].token);
    most = std::max(most, wanted);
  }
  if (rows.empty()) return;
  const at::Tensor own = logits.index_select(0, to_device(rows, at::kLong, device_));
  at::Tensor tokens = to_device(chosen, at::kLong, device_).unsqueeze(1);
  if (most > 0) tokens = at::cat({tokens, first_tokens(own, most)}, 1);
  const at::Tensor logprobs = at::log_softmax(own, 1).gather(1, tokens).cpu();
  tokens = tokens.cpu();
  for (size_t i = 0; i < rows.size(); ++i) {
    SampledToken& of = sampled[static_cast<size_t>(rows[i])];
    const auto* ids_of = tokens.const_data_ptr<int64_t>() + i * static_cast<size_t>(most + 1);
    const auto* values = logprobs.const_data_ptr<float>() + i * static_cast<size_t>(most + 1);
    of.logprob = values[0];
    const int64_t wanted = find(ids[static_cast<size_t>(rows[i])]).options.logprobs;
    for (int64_t j = 1; j <= wanted; ++j) of.top.push_back({static_cast<int32_t>(ids_of[j]), values[j]});
  }
}

at::Tensor Sampler::probabilities(const at::Tensor& logits, const std::vector<int64_t>& ids) const {
  const c10::InferenceMode inference;
  const Candidates from = candidates(adjusted(logits, ids), ids);
  const at::Tensor shares =
      from.weights.to(at::kDouble) / from.weights.sum(1, /*keepdim=*/true).to(at::kDouble);
  return at::zeros(logits.sizes(), shares.options()).scatter_(1, from.ids, shares);
}

}  // namespace spot

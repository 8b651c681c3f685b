#include "attention/kv_scales.h"

#include <algorithm>
#include <cmath>

#include "attention/dense.h"
#include "core/error.h"
#include "ops/e4m3.h"

namespace spot {
namespace {

// Dense attention of whole sequences without a cache, that notes each head's largest numbers.
class LargestNumbers : public AttentionBackend {
 public:
  at::Tensor forward(const AttentionInputs& inputs) override {
    scales_.keys[inputs.layer] = scales_of(inputs.key, inputs.layer);
    scales_.values[inputs.layer] = scales_of(inputs.value, inputs.layer);
    return causal_attention(inputs.query, inputs.key.transpose(0, 1), inputs.value.transpose(0, 1), 0,
                            inputs.scale);
  }
  KvScales scales() && { return std::move(scales_); }

 private:
  static at::Tensor scales_of(const at::Tensor& x, int64_t layer) {
    const at::Tensor largest =
        x.abs().amax(at::IntArrayRef({0, 2})).to(at::kCPU, at::kDouble).contiguous();  // [num_kv_heads]
    at::Tensor scales = at::empty(largest.sizes(), at::kFloat);
    for (int64_t head = 0; head < largest.size(0); ++head) {
      const double number = largest.const_data_ptr<double>()[head];
      if (!std::isfinite(number))
        fail(
            "layer {}: keys or values are not finite, so that an FP8 KV cache has no scale; use --kv-cache-dtype auto",
            layer);
      scales.mutable_data_ptr<float>()[head] = static_cast<float>(kv_scale(number, x.scalar_type()));
    }
    return scales.to(x.device());
  }

  KvScales scales_;
};

}  // namespace

std::optional<KvCacheDtype> kv_cache_dtype(const std::string& word) {
  if (word == "auto") return KvCacheDtype::automatic;
  if (word == "fp8") return KvCacheDtype::fp8;
  return std::nullopt;
}

std::string to_string(KvCacheDtype dtype) {
  return dtype == KvCacheDtype::fp8 ? "fp8" : "auto";
}

double kv_scale(double largest, at::ScalarType dtype) {
  if (!std::isfinite(largest))
    fail("the scale of an FP8 KV cache was asked for a largest number of {}", largest);
  if (largest == 0) return 1;
  int exponent = 0;
  const double fraction = std::frexp(kKvHeadRoom * largest / ops::kLargestE4m3, &exponent);  // [1/2, 1)
  if (fraction == 0.5) --exponent;
  // 448 * 2^7 is below float16's end, 2^-14 its first normal number.
  if (dtype == at::kHalf) exponent = std::clamp(exponent, -14, 7);
  return std::ldexp(1.0, exponent);
}

KvScales measure_kv_scales(const Backbone& backbone) {
  const ModelConfig& config = backbone.config();
  std::vector<int32_t> tokens(static_cast<size_t>(std::min(kKvScaleTokens, config.max_position_embeddings)));
  uint64_t state = 1;
  for (int32_t& token : tokens) {
    state = state * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX
    token = static_cast<int32_t>((state >> 33) % static_cast<uint64_t>(config.vocab_size));
  }
  Batch batch = unpaged_batch(tokens, {0}, backbone.device());
  StateSlots states(1, 0, backbone.device());
  declare_states(states, config);
  if (!states.empty()) batch.state_slots = at::zeros({1}, batch.positions.options());
  LargestNumbers attention;
  backbone.forward(batch, attention, states);
  return std::move(attention).scales();
}

std::shared_ptr<const KvScales> kv_scales(KvCacheDtype dtype, const Backbone& backbone) {
  return dtype == KvCacheDtype::fp8 ? std::make_shared<const KvScales>(measure_kv_scales(backbone)) : nullptr;
}

void check_kv_cache(KvCacheDtype dtype, const MethodSpec& method) {
  if (dtype != KvCacheDtype::fp8 || !attention_method(method.word).reads_stored_keys) return;
  std::string served;
  for (const AttentionMethod& other : attention_methods())
    if (!other.reads_stored_keys) served += (served.empty() ? "" : ", ") + other.word;
  fail(
      "attention '{}' reads keys as numbers, and an FP8 KV cache holds codes; leave out --kv-cache-dtype fp8, or choose "
      "one of {}",
      method.name, served);
}

}  // namespace spot

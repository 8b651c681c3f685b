// The scales of an FP8 KV cache: measured once of a model, the same for every request.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <optional>
#include <string>

#include "attention/methods.h"
#include "model/backbone.h"
#include "model/model_cache.h"

namespace spot {

// How keys and values are kept: in the model's dtype, or as float8_e4m3fn codes with a scale a layer and KV head.
enum class KvCacheDtype { automatic, fp8 };
// "auto" or "fp8"; empty for another word.
std::optional<KvCacheDtype> kv_cache_dtype(const std::string& word);
std::string to_string(KvCacheDtype dtype);

// The scale of a head whose largest number is `largest`: the least power of two that leaves kKvHeadRoom times as much
// representable. E4M3 is a floating-point format, so that head room costs no precision until numbers reach its subnormal
// range, a 2^14th of the largest one. 1 where a head is all zeros. For tokens of float16 within what keeps codes and
// scale representable there. Throws Error when `largest` is not finite.
inline constexpr double kKvHeadRoom = 8;
double kv_scale(double largest, at::ScalarType dtype);

// Of the keys and values of one forward pass over a fixed pseudo-random sequence of kKvScaleTokens tokens (or as many as
// the model has positions).
inline constexpr int64_t kKvScaleTokens = 256;
KvScales measure_kv_scales(const Backbone& backbone);
// StackOptions::kv_scales: null for a cache in the model's dtype.
std::shared_ptr<const KvScales> kv_scales(KvCacheDtype dtype, const Backbone& backbone);

// Throws Error, one sentence, where the cache does not serve the method.
void check_kv_cache(KvCacheDtype dtype, const MethodSpec& method);

}  // namespace spot

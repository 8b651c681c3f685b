// Linear layers of published quantised checkpoints, given back as plain matrices.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace spot {

// How a checkpoint stores the matrix `name.weight`, [out, in]:
//   fp8   weight E4M3 [out, in], weight_scale_inv [out / block, in / block] (rounded up):  w = code * scale_inv
//   gptq  qweight int32 [in / 8, out], eight 4-bit rows a word from the lowest bits; qzeros [groups, out / 8] likewise by
//         columns, one less than the zero point (not in gptq_v2); scales [groups, out]; g_idx [in] gives each row's group
//         (without it they follow one another):  w = (code - zero) * scale
//   awq   qweight int32 [in, out / 8], a word's eight columns in the order 0 2 4 6 1 3 5 7; qzeros [groups, out / 8]
//         likewise; scales [groups, out]:  w = (code - zero) * scale
// Matrices without such parts are read as they are (modules_to_not_convert).
struct Quantization {
  enum class Method { none, fp8, gptq, awq };
  Method method = Method::none;
  int64_t block_rows = 128, block_columns = 128;  // fp8
  int64_t group_size = 128;                       // gptq, awq: rows of the input a scale
  bool zero_less_one = false;                     // gptq before v2

  // From config.json's quantization_config. Throws Error on another method, other than 4 bits (gptq, awq), dynamic
  // per-module settings and a scale format that is not known.
  static Quantization from_json(const nlohmann::json& config, const std::string& source);

  static constexpr const char* kOptionalPart = "g_idx";
  // The parts of a matrix beside or instead of its ".weight", without the name before the dot; the first marks it.
  std::vector<std::string> parts() const;
  // [out, in] of the matrix whose parts `shape_of` gives by their suffix.
  std::vector<int64_t> shape(const std::function<std::vector<int64_t>(const std::string&)>& shape_of) const;
  // The matrix, float32 [out, in] on the CPU; a part that is not there is undefined. `where` names it in messages. Throws Error when parts do not fit together.
  at::Tensor dequantize(const std::function<at::Tensor(const std::string&)>& part,
                        const std::string& where) const;
};

// E4M3 codes of a matrix, and float32 scales [out / 128, in / 128] (rounded up) as `fp8` above has them: a block's
// largest magnitude becomes the largest code, 448. A block of zeros has scale 1.
struct Fp8Blocks {
  at::Tensor codes, scales;
};
Fp8Blocks quantize_fp8(const at::Tensor& matrix);

}  // namespace spot

#include "checkpoint/quantization.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <limits>

#include "core/error.h"
#include "ops/e4m3.h"

namespace spot {
namespace {

using nlohmann::json;
using Part = std::function<at::Tensor(const std::string&)>;

constexpr int64_t kPerWord = 8;  // 4-bit codes an int32

// Also keeps sums and products of sizes far from overflow.
bool is_int32(const json& value) {
  return value.is_number_integer() && value >= INT32_MIN && value <= INT32_MAX;
}

int64_t whole(const json& config, const char* name, int64_t otherwise, const std::string& source) {
  const auto it = config.find(name);
  if (it == config.end() || it->is_null()) return otherwise;
  if (!is_int32(*it))
    fail("{}: quantization_config.{} is {}, an integer was expected", source, name, it->dump());
  return it->get<int64_t>();
}

std::string text(const at::Tensor& x) {
  return fmt::format("{} [{}]", c10::toString(x.scalar_type()), fmt::join(x.sizes(), ", "));
}

void expect(bool holds, const std::string& where, const char* name, const at::Tensor& x,
            const std::string& wanted) {
  if (!holds) fail("{}.{} is {}; {} was expected", where, name, text(x), wanted);
}

// Codes 0..15 as bytes: each word's eight along a new last axis, from the lowest bits.
at::Tensor unpack(const at::Tensor& words) {
  const at::Tensor shifts = at::arange(0, 32, 4, at::kInt);
  return words.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(15).to(at::kByte);
}

at::Tensor dequantize_fp8(const Quantization& form, const Part& part, const std::string& where) {
  const at::Tensor codes = part("weight"), scales = part("weight_scale_inv");
  expect(codes.dim() == 2 && codes.scalar_type() == at::kFloat8_e4m3fn, where, "weight", codes,
         "Float8_e4m3fn [out, in]");
  const int64_t rows = codes.size(0), columns = codes.size(1);
  // A block larger than the matrix says no more than one of its size, and would be as large in memory.
  const int64_t block_rows = std::min(form.block_rows, rows),
                block_columns = std::min(form.block_columns, columns);
  const auto blocks = [](int64_t n, int64_t block) { return (n + block - 1) / block; };
  const std::vector<int64_t> wanted = {blocks(rows, block_rows), blocks(columns, block_columns)};
  expect(at::isFloatingType(scales.scalar_type()) && scales.sizes() == at::IntArrayRef(wanted), where,
         "weight_scale_inv", scales,
         fmt::format("a scale for each block of {} x {}, [{}]", form.block_rows, form.block_columns,
                     fmt::join(wanted, ", ")));
  const at::Tensor factors = scales.to(at::kFloat)
                                 .repeat_interleave(block_rows, 0)
                                 .narrow(0, 0, rows)
                                 .repeat_interleave(block_columns, 1)
                                 .narrow(1, 0, columns);
  return codes.to(at::kFloat).mul_(factors);
}

at::Tensor dequantize_int4(const Quantization& form, const Part& part, const std::string& where) {
  const bool gptq = form.method == Quantization::Method::gptq;
  const at::Tensor words = part("qweight"), zero_words = part("qzeros"), scales = part("scales");
  expect(words.dim() == 2 && words.scalar_type() == at::kInt, where, "qweight", words, "int32 of two dims");
  const int64_t in = words.size(0) * (gptq ? kPerWord : 1), out = words.size(1) * (gptq ? 1 : kPerWord);
  const int64_t group = form.group_size > 0 ? form.group_size : in, groups = (in + group - 1) / group;
  expect(scales.dim() == 2 && at::isFloatingType(scales.scalar_type()) && scales.size(0) == groups &&
             scales.size(1) == out,
         where, "scales", scales, fmt::format("floating point [{}, {}]", groups, out));
  expect(zero_words.dim() == 2 && zero_words.scalar_type() == at::kInt && zero_words.size(0) == groups &&
             zero_words.size(1) * kPerWord == out,
         where, "qzeros", zero_words, fmt::format("int32 [{}, {}]", groups, out / kPerWord));
  // AWQ's word holds columns 0 2 4 6 1 3 5 7: column c lies at place[c].
  const at::Tensor place = at::tensor({0, 4, 1, 5, 2, 6, 3, 7}, at::kLong);
  at::Tensor zeros = unpack(zero_words), codes = unpack(words);
  if (gptq) {
    codes = codes.transpose(1, 2).reshape({in, out});
  } else {
    zeros = zeros.index_select(-1, place);
    codes = codes.index_select(-1, place).reshape({in, out});
  }
  zeros = zeros.reshape({groups, out});
  if (form.zero_less_one) zeros = zeros.add(1).bitwise_and(15);
  zeros = zeros.to(at::kFloat);
  at::Tensor row_group = at::div(at::arange(in, at::kLong), group, "floor");
  if (const at::Tensor stored = gptq ? part(Quantization::kOptionalPart) : at::Tensor(); stored.defined()) {
    row_group = stored.to(at::kLong);
    expect(at::isIntegralType(stored.scalar_type(), false) && row_group.dim() == 1 &&
               row_group.size(0) == in && row_group.min().item<int64_t>() >= 0 &&
               row_group.max().item<int64_t>() < groups,
           where, "g_idx", stored, fmt::format("[{}] of groups below {}", in, groups));
  }
  const at::Tensor factors = scales.to(at::kFloat);
  return codes.to(at::kFloat)
      .sub_(zeros.index_select(0, row_group))
      .mul_(factors.index_select(0, row_group))
      .t()
      .contiguous();
}

}  // namespace

Quantization Quantization::from_json(const json& config, const std::string& source) {
  if (!config.is_object()) fail("{}: quantization_config is no object", source);
  const json method = config.value("quant_method", json());
  Quantization form;
  if (method == "fp8") {
    form.method = Method::fp8;
    const json block = config.value("weight_block_size", json());
    if (!block.is_array() || block.size() != 2 || !is_int32(block[0]) || !is_int32(block[1]) ||
        block[0] < 1 || block[1] < 1)
      fail(
          "{}: quantization_config.weight_block_size is {}; fp8 checkpoints are read with block scales, such as [128, 128]",
          source, block.dump());
    form.block_rows = block[0];
    form.block_columns = block[1];
    const json format = config.value("fmt", json("e4m3"));
    if (format != "e4m3")
      fail("{}: quantization_config.fmt {} is not supported, e4m3 is", source, format.dump());
    return form;
  }
  if (method != "gptq" && method != "awq")
    fail(
        "{}: quantised checkpoints of quant_method {} are not supported; fp8 with block scales, gptq and awq are, and the bfloat16 "
        "or float32 checkpoint",
        source, method.dump());
  form.method = method == "gptq" ? Method::gptq : Method::awq;
  const int64_t bits = whole(config, "bits", whole(config, "w_bit", 4, source), source);
  if (bits != 4)
    fail("{}: {} of {} bits is not supported, 4 bits are", source, method.get<std::string>(), bits);
  form.group_size = whole(config, "group_size", whole(config, "q_group_size", 128, source), source);
  if (form.group_size < -1 || form.group_size == 0)
    fail("{}: quantization_config.group_size is {}; a positive number or -1 (one group) was expected", source,
         form.group_size);
  if (const json dynamic = config.value("dynamic", json()); dynamic.is_object() && !dynamic.empty())
    fail("{}: quantization_config.dynamic (settings by module) is not supported", source);
  const json version = config.value("version", json("gemm"));
  const std::string layout = version.is_string() ? version.get<std::string>() : version.dump();
  if (form.method == Method::awq && layout != "gemm" && layout != "GEMM")
    fail("{}: awq of version {} is not supported, gemm is", source, layout);
  const json stored = config.value("checkpoint_format", json("gptq"));
  if (form.method == Method::gptq && stored != "gptq" && stored != "gptq_v2")
    fail("{}: quantization_config.checkpoint_format {} is not supported, gptq and gptq_v2 are", source,
         stored.dump());
  form.zero_less_one = form.method == Method::gptq && stored == "gptq";
  return form;
}

std::vector<std::string> Quantization::parts() const {
  switch (method) {
    case Method::none:
      return {};
    case Method::fp8:
      return {"weight_scale_inv"};
    case Method::gptq:
      return {"qweight", "qzeros", "scales", "g_idx"};
    case Method::awq:
      return {"qweight", "qzeros", "scales"};
  }
  return {};
}

std::vector<int64_t> Quantization::shape(
    const std::function<std::vector<int64_t>(const std::string&)>& shape_of) const {
  if (method == Method::fp8) return shape_of("weight");
  std::vector<int64_t> words = shape_of("qweight");
  if (words.size() != 2) return words;
  return method == Method::gptq ? std::vector<int64_t>{words[1], words[0] * kPerWord}
                                : std::vector<int64_t>{words[1] * kPerWord, words[0]};
}

at::Tensor Quantization::dequantize(const Part& part, const std::string& where) const {
  return method == Method::fp8 ? dequantize_fp8(*this, part, where) : dequantize_int4(*this, part, where);
}

// The formula of DeepSeek-V3 (act_quant in inference/kernel.py), in float32. transformers' Fp8Quantize multiplies by
// 448 / max |w| instead, which differs in the last bit. 448 is E4M3's largest number, so that nothing saturates.
Fp8Blocks quantize_fp8(const at::Tensor& matrix) {
  constexpr int64_t kBlock = 128;
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const int64_t down = (rows + kBlock - 1) / kBlock, across = (columns + kBlock - 1) / kBlock;
  Fp8Blocks made{at::empty({rows, columns}, matrix.options().dtype(at::kFloat8_e4m3fn)),
                 at::empty({down, across}, matrix.options().dtype(at::kFloat))};
  for (int64_t i = 0; i < down; ++i) {  // so that float32 numbers are few at a time
    const int64_t count = std::min(kBlock, rows - i * kBlock);
    const at::Tensor wide = matrix.narrow(0, i * kBlock, count).to(at::kFloat);
    const at::Tensor blocks =
        at::constant_pad_nd(wide, {0, across * kBlock - columns}).view({count, across, kBlock});
    const at::Tensor largest = blocks.abs().amax({0, 2});
    // Of a block of the smallest numbers the quotient would lose its bits, or be 0.
    const at::Tensor scale = at::where(
        largest > 0, (largest / ops::kLargestE4m3).clamp_min(std::numeric_limits<float>::min()), 1.0);
    made.scales.select(0, i).copy_(scale);
    made.codes.narrow(0, i * kBlock, count)
        .copy_(blocks.div(scale.unsqueeze(1)).view({count, across * kBlock}).narrow(1, 0, columns));
  }
  return made;
}

}  // namespace spot

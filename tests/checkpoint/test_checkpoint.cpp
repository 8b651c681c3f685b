#include "checkpoint/checkpoint.h"
#include "core/files.h"
#include "tests/checkpoint/support.h"

namespace spot {
namespace {

using testing::expect_error;
using testing::fresh_seed;
using testing::TemporaryFolder;

void write_index(const TemporaryFolder& folder, const nlohmann::json& weight_map) {
  write_file_atomically(folder / "model.safetensors.index.json",
                        nlohmann::json{{"metadata", {{"total_size", 1}}}, {"weight_map", weight_map}}.dump());
}

TEST(Checkpoint, ReadsOneFileByFolderOrPath) {
  TemporaryFolder folder;
  at::manual_seed(fresh_seed());
  const at::Tensor x = at::randn({3, 5});
  write_safetensors(folder / "model.safetensors", {{"x", x}, {"y", x.to(at::kBFloat16)}});
  for (const auto& path : {folder.path(), folder / "model.safetensors"}) {
    const Checkpoint checkpoint(path);
    EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"x", "y"}));
    EXPECT_TRUE(checkpoint.has("x"));
    EXPECT_FALSE(checkpoint.has("z"));
    EXPECT_TRUE(at::equal(checkpoint.tensor("x"), x));
    EXPECT_EQ(checkpoint.dtype("y"), at::kBFloat16);
    EXPECT_EQ(checkpoint.shape("y"), (std::vector<int64_t>{3, 5}));
    expect_error([&] { checkpoint.tensor("z"); }, {folder.path().string(), "'z' is missing"});
  }
}

TEST(Checkpoint, ReadsShards) {
  TemporaryFolder folder;
  at::manual_seed(fresh_seed());
  const at::Tensor a = at::randn({4}), b = at::randn({2, 3}), c = at::randn({});
  write_safetensors(folder / "model-1.safetensors", {{"a", a}, {"c", c}});
  write_safetensors(folder / "model-2.safetensors", {{"b", b}});
  write_index(folder,
              {{"a", "model-1.safetensors"}, {"b", "model-2.safetensors"}, {"c", "model-1.safetensors"}});
  const Checkpoint checkpoint(folder.path());
  EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_TRUE(at::equal(checkpoint.tensor("a"), a));
  EXPECT_TRUE(at::equal(checkpoint.tensor("b"), b));
  EXPECT_TRUE(at::equal(checkpoint.tensor("c"), c));
  EXPECT_EQ(checkpoint.where("b"), (folder / "model-2.safetensors").string());
}

TEST(Checkpoint, RefusesBrokenIndexes) {
  TemporaryFolder folder;
  const auto open = [&] { Checkpoint checkpoint(folder.path()); };
  expect_error(open, {folder.path().string(), "neither"});
  write_safetensors(folder / "one.safetensors", {{"a", at::zeros({4})}});
  write_index(folder, {{"a", "two.safetensors"}});
  expect_error(open, {"two.safetensors", "no such file"});
  write_index(folder, {{"a", "one.safetensors"}, {"b", "one.safetensors"}});
  expect_error(open, {"one.safetensors", "'b'"});
  for (const char* escape : {"../one.safetensors", "/etc/passwd", "sub/one.safetensors", "", "..", "."}) {
    write_index(folder, {{"a", escape}});
    expect_error(open, {"'a'", "no file name"});
  }
  write_index(folder, {{"a", 3}});
  expect_error(open, {"'a'", "not a string"});
  write_index(folder, nlohmann::json::object());
  expect_error(open, {"weight_map is empty"});
  for (const char* text : {"{}", "[]", "3", R"({"weight_map":[]})"}) {
    write_file_atomically(folder / "model.safetensors.index.json", text);
    expect_error(open, {"weight_map is missing"});
  }
  write_file_atomically(folder / "model.safetensors.index.json", "{");
  expect_error(open, {"not valid JSON"});
  write_file_atomically(folder / "model.safetensors.index.json", R"({"weight_map":{}, "size": -1e777})");
  expect_error(open, {"float64"});
}

// A matrix [4, 16] in each form, and what is changed in its parts or its configuration.
using Parts = std::map<std::string, at::Tensor>;

struct Quantized {
  nlohmann::json config;
  Parts parts;
};

Quantized quantized(const std::string& method) {
  if (method == "fp8")
    return {
        {{"quant_method", "fp8"}, {"weight_block_size", {3, 7}}},
        {{"a.weight", at::randn({4, 16}).to(at::kFloat8_e4m3fn)}, {"a.weight_scale_inv", at::rand({2, 3})}}};
  const auto words = [](int64_t rows, int64_t columns) {
    return at::randint(INT32_MIN, INT32_MAX, {rows, columns}, at::kLong).to(at::kInt);
  };
  Parts parts = {{"a.qzeros", words(2, 1)}, {"a.scales", at::rand({2, 8}).to(at::kHalf)}};
  parts["a.qweight"] = method == "gptq" ? words(2, 8) : words(16, 1);
  if (method == "gptq") parts["a.g_idx"] = at::randint(2, {16}, at::kInt);
  return {{{"quant_method", method}, {"bits", 4}, {"group_size", 8}}, parts};
}

at::Tensor read_quantized(const Quantized& q) {
  TemporaryFolder folder;
  write_safetensors(folder / "model.safetensors", {q.parts.begin(), q.parts.end()});
  const Checkpoint checkpoint(folder.path(), Quantization::from_json(q.config, "config.json"));
  const at::Tensor values = checkpoint.tensor("a.weight");
  EXPECT_EQ(values.sizes().vec(), checkpoint.shape("a.weight"));
  return values;
}

TEST(Checkpoint, QuantizedPartsThatDoNotFitAreErrors) {
  at::manual_seed(spot::testing::fresh_seed());
  for (const std::string method : {"fp8", "gptq", "awq"}) {
    const Quantized whole = quantized(method);
    EXPECT_EQ(read_quantized(whole).numel(), method == "fp8" ? 64 : 128) << method;
    for (const auto& [name, tensor] : whole.parts) {
      for (const at::Tensor& other :
           {tensor.new_empty({0}), tensor.new_empty({0, 8}), tensor.new_empty({int64_t{1} << 56, 0}),
            tensor.new_empty({0, int64_t{1} << 56}), at::rand({}), at::rand({3, 5, 2}), tensor.unsqueeze(0),
            at::full(tensor.sizes(), NAN, at::kFloat), at::full(tensor.sizes(), INT64_MIN, at::kLong)}) {
        if (name == "a.weight_scale_inv" && other.sizes() == tensor.sizes() && other.is_floating_point())
          continue;
        Quantized changed = whole;
        changed.parts[name] = other;
        if (name == "a.scales" && other.is_floating_point() && other.sizes() == tensor.sizes())
          read_quantized(changed);  // not a number is the model loader's to find
        else
          EXPECT_THROW(read_quantized(changed), Error) << method << " " << name << " " << other.sizes();
      }
      Quantized changed = whole;
      changed.parts.erase(name);
      if (name != "a.g_idx" && name != "a.weight_scale_inv" && name != "a.qweight") {
        EXPECT_THROW(read_quantized(changed), Error) << method << " without " << name;
      }
    }
    const std::vector<nlohmann::json> numbers = {
        0, -2, 2.5, "8", INT64_MAX, INT64_MIN, UINT64_MAX, int64_t{1} << 31, 1e30, nlohmann::json::array()};
    for (const nlohmann::json& number : numbers) {
      Quantized changed = whole;
      if (method == "fp8") {
        changed.config["weight_block_size"][1] = number;
      } else {
        changed.config["group_size"] = number;
      }
      EXPECT_THROW(read_quantized(changed), Error) << method << " " << number;
    }
  }
  // A block may be larger than the matrix, by any number that is one.
  Quantized one = quantized("fp8");
  one.config["weight_block_size"] = {INT32_MAX, INT32_MAX};
  one.parts["a.weight_scale_inv"] = at::full({1, 1}, 2.0);
  EXPECT_TRUE(at::equal(read_quantized(one), one.parts["a.weight"].to(at::kFloat) * 2));
}

// Each number within half a step of the codes, at whose top a block's largest magnitude lies.
TEST(Fp8, CodesAndScalesStandForTheMatrix) {
  at::manual_seed(fresh_seed());
  TemporaryFolder folder;
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{128, 128}, {1, 7}, {300, 130}, {257, 512}}) {
    at::Tensor matrix = at::randn({rows, columns}) * at::exp(3 * at::randn({rows, 1}));
    matrix.narrow(0, 0, std::min<int64_t>(rows, 128))
        .narrow(1, 0, std::min<int64_t>(columns, 128))
        .mul_(rows == 300 ? 0 : 1);
    const Fp8Blocks blocks = quantize_fp8(matrix);
    ASSERT_EQ(blocks.codes.sizes(), matrix.sizes());
    ASSERT_EQ(blocks.scales.sizes(), (std::vector<int64_t>{(rows + 127) / 128, (columns + 127) / 128}));
    write_safetensors(folder / "model.safetensors",
                      {{"a.weight", blocks.codes}, {"a.weight_scale_inv", blocks.scales}});
    Quantization form;
    form.method = Quantization::Method::fp8;
    const Checkpoint checkpoint(folder.path(), form);
    EXPECT_TRUE(checkpoint.has_fp8_blocks("a.weight"));
    EXPECT_TRUE(
        at::equal(checkpoint.part("a.weight", "weight").view(at::kByte), blocks.codes.view(at::kByte)));
    const at::Tensor decoded = checkpoint.tensor("a.weight");
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; ++column) {
        const double scale = blocks.scales[row / 128][column / 128].item<double>();
        const double x = matrix[row][column].item<double>(), y = decoded[row][column].item<double>();
        ASSERT_LE(std::abs(x), 448.001 * scale);
        // Three bits of fraction; below 2^-6 steps of 2^-9.
        ASSERT_NEAR(x, y, std::max(std::abs(x) * 0x1p-4, scale * 0x1p-10) * 1.0001) << row << ", " << column;
      }
  }
}

}  // namespace
}  // namespace spot

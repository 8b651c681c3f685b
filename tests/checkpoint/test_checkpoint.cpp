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

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "checkpoint/safetensors.h"
#include "core/files.h"
#include "tests/checkpoint/support.h"

namespace spot {
namespace {

using testing::error_of;
using testing::expect_error;
using testing::fresh_seed;
using testing::TemporaryFolder;

// The bytes of a file with this header text and this much data.
std::string assemble(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

std::string tensor_header(const std::string& name, const std::string& dtype, const std::string& shape,
                          uint64_t begin, uint64_t end) {
  return fmt::format(R"("{}":{{"dtype":"{}","shape":{},"data_offsets":[{},{}]}})", name, dtype, shape, begin,
                     end);
}

using Named = std::vector<std::pair<std::string, at::Tensor>>;

Named sample_tensors(uint64_t seed) {
  at::manual_seed(seed);
  return {{"weight", at::randn({7, 13})},
          {"half", at::randn({3, 5}).to(at::kHalf)},
          {"brain", at::randn({11}).to(at::kBFloat16)},
          {"double", at::randn({2, 2, 3}).to(at::kDouble)},
          {"long", at::randint(-1000, 1000, {9}, at::kLong)},
          {"int", at::randint(-1000, 1000, {3}, at::kInt)},
          {"short", at::randint(-1000, 1000, {3}, at::kShort)},
          {"char", at::randint(-100, 100, {5}, at::kChar)},
          {"byte", at::randint(0, 255, {3}, at::kByte)},
          {"bool", at::randn({5}) > 0},
          {"scalar", at::randn({})},
          {"empty", at::zeros({0, 4})},
          {"strided", at::randn({6, 4}).t()}};
}

TEST(Safetensors, WritesAndReadsEveryDtypeExactly) {
  TemporaryFolder folder;
  const Named tensors = sample_tensors(fresh_seed());
  write_safetensors(folder / "a.safetensors", tensors, {{"format", "pt"}, {"note", "äß\""}});
  const SafetensorsFile file(folder / "a.safetensors");
  EXPECT_EQ(file.names().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor read = file.tensor(name);
    EXPECT_EQ(read.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(read, tensor)) << name;
  }
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(file.metadata().at("note"), "äß\"");
}

TEST(Safetensors, SameTensorsInAnyOrderGiveSameBytes) {
  TemporaryFolder folder;
  const uint64_t seed = fresh_seed();
  Named tensors = sample_tensors(seed);
  write_safetensors(folder / "a", tensors, {{"b", "1"}, {"a", "2"}});
  std::shuffle(tensors.begin(), tensors.end(), std::mt19937(seed));
  write_safetensors(folder / "b", tensors, {{"a", "2"}, {"b", "1"}});
  EXPECT_EQ(read_file(folder / "a"), read_file(folder / "b"));
}

TEST(Safetensors, TensorOutlivesTheFileObjectAndWritesStayPrivate) {
  TemporaryFolder folder;
  at::manual_seed(fresh_seed());
  const at::Tensor original = at::randn({1000});
  write_safetensors(folder / "a", {{"x", original}});
  const std::string before = read_file(folder / "a");
  at::Tensor read = SafetensorsFile(folder / "a").tensor("x");
  EXPECT_TRUE(at::equal(read, original));
  read.add_(1);
  EXPECT_TRUE(at::equal(read, original + 1));
  EXPECT_EQ(read_file(folder / "a"), before);
}

TEST(Safetensors, MisalignedTensorIsReadByCopy) {
  TemporaryFolder folder;
  const float value = 1.5f;
  const std::string header =
      "{" + tensor_header("a", "U8", "[1]", 0, 1) + "," + tensor_header("b", "F32", "[1]", 1, 5) + "}";
  write_file_atomically(
      folder / "a",
      assemble(header, std::string(1, '\7') + std::string(reinterpret_cast<const char*>(&value), 4)));
  const SafetensorsFile file(folder / "a");
  EXPECT_EQ(file.tensor("b").item<float>(), 1.5f);
  EXPECT_EQ(file.tensor("a").item<int>(), 7);
}

TEST(Safetensors, RefusesWhatTheFormatForbids) {
  TemporaryFolder folder;
  const auto refuse = [&](const std::string& bytes, std::initializer_list<std::string> parts) {
    write_file_atomically(folder / "bad", bytes);
    const std::string message = error_of([&] { SafetensorsFile file(folder / "bad"); });
    EXPECT_NE(message.find((folder / "bad").string()), std::string::npos) << message;
    for (const std::string& part : parts)
      EXPECT_NE(message.find(part), std::string::npos) << part << " not in " << message;
  };
  const std::string good = tensor_header("a", "F32", "[2]", 0, 8);
  const std::string data(8, '\0');
  refuse("", {"too few"});
  refuse("1234567", {"too few"});
  refuse(std::string(8, '\xff'), {"header length"});
  refuse(assemble("{" + good + "}", data).substr(0, 30), {"does not fit"});
  refuse(assemble("", ""), {"'{'"});
  refuse(assemble(" {" + good + "}", data), {"'{'"});
  refuse(assemble("{" + good, data), {"JSON"});
  refuse(assemble("{" + good + "} x", data), {"JSON"});
  refuse(assemble("{\"\xff\":1}", ""), {"JSON"});
  refuse(assemble("{" + good + "}", data.substr(1)), {"'a'", "truncated"});
  refuse(assemble("{" + good + "}", data + "x"), {"bytes 8 to 9"});
  refuse(assemble("{" + good + "," + good + "}", data), {"'a' twice"});
  refuse(assemble("{" + good + "," + tensor_header("b", "F32", "[1]", 4, 8) + "}", data), {"'b' overlaps"});
  refuse(assemble("{" + good + "," + tensor_header("b", "F32", "[2]", 0, 8) + "}", data), {"'b' overlaps"});
  refuse(assemble("{" + good + "," + tensor_header("b", "F32", "[1]", 12, 16) + "}", std::string(16, '\0')),
         {"8 to 12", "'b'"});
  refuse(assemble("{" + tensor_header("a", "F32", "[3]", 0, 8) + "}", data), {"'a'", "12 bytes"});
  refuse(assemble("{" + tensor_header("a", "F33", "[2]", 0, 8) + "}", data), {"F33"});
  refuse(assemble("{" + tensor_header("a", "F32", "[-2]", 0, 8) + "}", data), {"-2"});
  refuse(assemble("{" + tensor_header("a", "F32", "[2.0]", 0, 8) + "}", data), {"2.0"});
  refuse(assemble("{" + tensor_header("a", "F32", "2", 0, 8) + "}", data), {"shape"});
  refuse(assemble("{" + tensor_header("a", "F32", "[4611686018427387904,4]", 0, 0) + "}", ""), {"overflows"});
  refuse(assemble("{" + tensor_header("a", "F32", "[0,4611686018427387904,4]", 0, 0) + "}", ""),
         {"overflows"});
  refuse(assemble("{" + tensor_header("a", "F32", "[18446744073709551615]", 0, 0) + "}", ""),
         {"18446744073709551615"});
  refuse(assemble("{" + tensor_header("a", "F32", "[2]", 8, 0) + "}", data), {"backwards"});
  refuse(assemble("{" + tensor_header("a", "F32", "[2]", 18446744073709551608u, 0) + "}", data),
         {"backwards"});
  refuse(assemble(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}})", data), {"data_offsets"});
  refuse(assemble(R"({"a":{"dtype":"F32","shape":[2]}})", data), {"'a'"});
  refuse(assemble(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}})", data), {"'a'"});
  refuse(assemble(R"({"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})", data),
         {"twice"});
  refuse(assemble(R"({"a":[]})", data), {"'a'"});
  refuse(assemble(R"({"__metadata__":{"k":1}})", ""), {"__metadata__"});
  refuse(assemble(R"({"__metadata__":[]})", ""), {"__metadata__"});
}

TEST(Safetensors, NamesMissingFilesAndTensors) {
  TemporaryFolder folder;
  expect_error([&] { SafetensorsFile file(folder / "none"); }, {"none", "no such file"});
  expect_error([&] { SafetensorsFile file(folder.path()); }, {"not a regular file"});
  write_safetensors(folder / "a", {{"x", at::zeros({2})}});
  expect_error([&] { SafetensorsFile(folder / "a").tensor("y"); }, {"/a", "'y' is missing"});
  expect_error([&] { write_safetensors(folder / "b", {{"x", at::zeros({2})}, {"x", at::zeros({2})}}); },
               {"twice"});
  expect_error([&] { write_safetensors(folder / "b", {{"x", at::zeros({2}, at::kComplexFloat)}}); },
               {"'x'", "ComplexFloat"});
  expect_error([&] { write_safetensors(folder / "b", {{"\xff", at::zeros({2})}}); }, {"UTF-8"});
  EXPECT_FALSE(std::filesystem::exists(folder / "b"));
}

// Thousands of small files: without the flush to disk of the atomic writer.
void write_plainly(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

// Reads every tensor whole: a bad offset or shape that slipped through would fault here.
void read_everything(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  for (const std::string& name : file.names()) {
    const at::Tensor tensor = file.tensor(name);
    volatile unsigned char last = 0;
    const auto* bytes = static_cast<const unsigned char*>(tensor.const_data_ptr());
    for (size_t i = 0; i < tensor.nbytes(); ++i) last = bytes[i];
    (void)last;
  }
}

TEST(Safetensors, WritingThatIsEndedLeavesNothing) {
  TemporaryFolder folder;
  const Named tensors = sample_tensors(fresh_seed());
  uint64_t told = 0, all = 0;
  for (const auto& [name, tensor] : tensors) all += tensor.nbytes();
  write_safetensors(folder / "whole", tensors, {}, [&](uint64_t bytes) { told += bytes; });
  EXPECT_EQ(told, all);
  EXPECT_THROW(write_safetensors(folder / "ended", tensors, {}, [](uint64_t) { fail("stop"); }), Error);
  size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
    EXPECT_EQ(entry.path().filename(), "whole");
    ++files;
  }
  EXPECT_EQ(files, 1);
}

TEST(Safetensors, EveryTruncationIsRefused) {
  TemporaryFolder folder;
  write_safetensors(folder / "a", sample_tensors(fresh_seed()), {{"k", "v"}});
  const std::string bytes = read_file(folder / "a");
  for (size_t length = 0; length < bytes.size(); ++length) {
    write_plainly(folder / "cut", bytes.substr(0, length));
    EXPECT_THROW(read_everything(folder / "cut"), Error) << "cut to " << length;
  }
}

TEST(Safetensors, FlippedBytesGiveAnErrorOrAValidFileNeverACrash) {
  TemporaryFolder folder;
  std::mt19937_64 random(fresh_seed());
  write_safetensors(folder / "a", sample_tensors(random()), {{"k", "v"}});
  const std::string bytes = read_file(folder / "a");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), 8);
  int refused = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string flipped = bytes;
    const int flips = 1 + static_cast<int>(random() % 3);
    for (int i = 0; i < flips; ++i) {
      flipped[random() % (8 + header_bytes)] =
          static_cast<char>(random() % 2 ? random() : '0' + random() % 10);
    }
    write_plainly(folder / "flipped", flipped);
    try {
      read_everything(folder / "flipped");
    } catch (const Error& e) {
      ++refused;
      EXPECT_NE(std::string(e.what()).find("flipped"), std::string::npos);
    }
  }
  EXPECT_GT(refused, 1000);
}

}  // namespace
}  // namespace spot

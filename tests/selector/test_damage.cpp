// Damaged selector files: what is shipped, bit by bit, and documents that are JSON but not ours.
#include <gtest/gtest.h>

#include "core/checksum.h"
#include "selector/selector.h"
#include "support.h"

namespace spot {
namespace {

using nlohmann::json;
using test::fresh_seed, test::random_int, test::TemporaryFolder;
namespace fs = std::filesystem;

struct Loaded {
  SelectorConfig config;
  json notes;
  std::vector<at::Tensor> weights;
};

Loaded load(const fs::path& folder, const ModelConfig& model) {
  const Selector selector = Selector::load(folder.string(), "", model, at::kCPU);
  return {selector.config(), selector.notes(), selector.parameters()};
}

bool equal(const Loaded& a, const Loaded& b) {
  if (!(a.config == b.config) || a.notes != b.notes || a.weights.size() != b.weights.size()) return false;
  for (size_t i = 0; i < a.weights.size(); ++i)
    if (!at::equal(a.weights[i], b.weights[i])) return false;
  return true;
}

void flip(std::string& bytes, int64_t bit) {
  bytes[static_cast<size_t>(bit / 8)] =
      static_cast<char>(static_cast<unsigned char>(bytes[static_cast<size_t>(bit / 8)]) ^ (1u << (bit % 8)));
}

// The shipped selectors as they are (bfloat16), and stored in rows of 8 and 4 bits.
TEST(SelectorFiles, EveryFlippedBitOfWhatIsShippedIsNoticedOrHarmless) {
  fresh_seed();
  std::vector<std::pair<std::string, WeightFormat>> cases;
  for (const char* name : {"tiny-qwen3", "tiny-qwen3.5"})
    for (const WeightFormat format : {WeightFormat::bfloat16, WeightFormat::int8, WeightFormat::int4})
      cases.emplace_back(name, format);
  for (const auto& [name, format] : cases) {
    const ModelConfig model = ModelConfig::load(fs::path("models") / name);
    const TemporaryFolder folder, rows;
    fs::path shipped = fs::path("models") / name / "selectors" / "spot";
    if (format != WeightFormat::bfloat16) {
      Selector::load(shipped.string(), "", model, at::kCPU).save(rows.path(), "", {}, format);
      shipped = rows.path();
    }
    const Loaded whole = load(shipped, model);
    ASSERT_TRUE(read_json(shipped / "selector.json").contains("tensors_checksum")) << name;
    int noticed = 0;
    for (const char* file : {"selector.json", "selector.safetensors"}) {
      for (const char* each : {"selector.json", "selector.safetensors"})
        fs::copy_file(shipped / each, folder.path() / each, fs::copy_options::overwrite_existing);
      const std::string bytes = read_file(shipped / file);
      for (int i = 0; i < 16; ++i) {
        // Half of them in the first kilobytes: the header of one, what is read of the other.
        const auto bits = static_cast<int64_t>(8 * bytes.size());
        const int64_t bit = random_int(0, (i % 2 ? bits : std::min<int64_t>(bits, 8 * 4096)) - 1);
        std::string damaged = bytes;
        flip(damaged, bit);
        write_file_atomically(folder.path() / file, damaged);
        try {
          EXPECT_TRUE(equal(load(folder.path(), model), whole)) << name << " " << file << " bit " << bit;
        } catch (const Error&) {
          ++noticed;
        }
      }
    }
    EXPECT_GT(noticed, 16) << name;
  }
}

TEST(SelectorFiles, ThoseOfEarlierVersionsLoadWithoutChecksums) {
  const ModelConfig model = test::small_model(24, 2, 4, 2, 16);
  const TemporaryFolder folder;
  Selector(SelectorConfig{}, model, at::kCPU, at::kFloat, fresh_seed())
      .save(folder.path(), "abc", {{"steps", 3}});
  const Loaded whole = load(folder.path(), model);
  json document = read_json(folder.path() / "selector.json");
  check_seal(document, "as saved");
  document.erase("checksum"), document.erase("tensors_checksum");
  write_file_atomically(folder.path() / "selector.json", document.dump());
  EXPECT_TRUE(equal(load(folder.path(), model), whole));
  // Of the selector.safetensors of another run with the same id, only the checksum can tell.
  document["tensors_checksum"] = "0123456789abcdef";
  write_file_atomically(folder.path() / "selector.json", document.dump());
  EXPECT_NE(test::error_of([&] { load(folder.path(), model); }).find("damaged"), std::string::npos);
}

// Any value in the place of a random one.
void mutate(json& value) {
  if (value.is_structured() && !value.empty() && random_int(0, 3) > 0) {
    auto at = value.begin();
    std::advance(at, random_int(0, static_cast<int64_t>(value.size()) - 1));
    if (random_int(0, 9) == 0)
      value.erase(at);
    else
      mutate(*at);
    return;
  }
  const std::vector<json> others = {nullptr,
                                    true,
                                    -1,
                                    0,
                                    1e300,
                                    1.5,
                                    INT64_MAX,
                                    UINT64_MAX,
                                    "",
                                    "spot",
                                    json::array(),
                                    {1, 2},
                                    json::object(),
                                    {{"a", 1}},
                                    std::string(100, 'x'),
                                    INT64_MIN};
  value = others[static_cast<size_t>(random_int(0, static_cast<int64_t>(others.size()) - 1))];
}

TEST(SelectorFiles, NumbersBeyondFloat64AreErrorsWhereverTheyStand) {
  const ModelConfig model = test::small_model(24, 2, 4, 2, 16);
  const TemporaryFolder folder;
  Selector(SelectorConfig{}, model, at::kCPU).save(folder.path(), "abc");
  const json whole = read_json(folder.path() / "selector.json").flatten();
  int places = 0;
  for (const auto& [path, value] : whole.items()) {
    if (!value.is_number()) continue;
    json changed = whole;
    changed[path] = "HERE";
    std::string text = changed.unflatten().dump();
    text.replace(text.find("\"HERE\""), 6, places++ % 2 ? "1e777" : "-1e777");
    write_file_atomically(folder.path() / "selector.json", text);
    EXPECT_THROW(load(folder.path(), model), Error) << path;
  }
  EXPECT_GT(places, 10);
}

// tests/python/test_selector.py reads the same list.
TEST(SelectorFiles, BothLanguagesTakeAndRefuseTheSameSettings) {
  const ModelConfig model = test::small_model(24, 2, 4, 2, 16);
  const TemporaryFolder folder;
  Selector(SelectorConfig{}, model, at::kCPU).save(folder.path(), "abc");
  const json settings = read_json("tests/selector/settings.json"),
             whole = read_json(folder.path() / "selector.json");
  for (const auto& [verdict, list] : settings.items())
    for (const auto& [pointer, value] : list.get<std::vector<std::pair<std::string, std::string>>>()) {
      json document = whole;
      document.erase("checksum");
      document[json::json_pointer(pointer)] = "HERE";
      std::string text = document.dump();
      text.replace(text.find("\"HERE\""), 6, value);
      write_file_atomically(folder.path() / "selector.json", text);
      std::string error;
      try {
        load(folder.path(), model);
      } catch (const Error& e) {
        error = e.what();
      }
      EXPECT_EQ(error.empty(), verdict == "taken") << pointer << " " << value << ": " << error;
    }
}

TEST(SelectorFiles, NothingButErrorsComesOfOtherDocuments) {
  fresh_seed();
  const ModelConfig model = test::small_model(32, 2, 4, 2, 16);
  const TemporaryFolder folder;
  Selector(SelectorConfig{}, model, at::kCPU)
      .save(folder.path(), "abc", {}, static_cast<WeightFormat>(random_int(0, 3)));
  json whole = read_json(folder.path() / "selector.json");
  whole.erase("checksum"), whole.erase("tensors_checksum");
  for (int i = 0; i < 400; ++i) {
    json document = whole;
    for (int64_t n = random_int(1, 3); n > 0; --n) mutate(document);
    write_file_atomically(folder.path() / "selector.json", document.dump());
    try {
      load(folder.path(), model);
    } catch (const Error&) {
    } catch (const std::exception& e) {
      ADD_FAILURE() << e.what() << " of " << document.dump();
    }
  }
}

}  // namespace
}  // namespace spot

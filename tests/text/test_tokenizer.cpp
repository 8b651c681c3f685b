// Errors, special ids and the parts of the tokenizer that have an oracle small enough to stand here. That ids
// equal the reference implementation's is tested in test_tokenizer_oracle.py.
#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <thread>

#include "core/error.h"
#include "small_tokenizer.h"
#include "text/bpe.h"
#include "text/stream_decoder.h"
#include "text/tokenizer.h"

namespace spot {
namespace {

using nlohmann::json;
using testing::small_tokenizer;
using testing::TemporaryFolder;
using Ids = std::vector<int32_t>;

void expect_parts(const std::string& message, const std::vector<std::string>& parts) {
  for (const std::string& part : parts)
    EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
}

std::mt19937 seeded() {
  const unsigned seed = std::random_device{}();
  std::cout << "seed " << seed << "\n";
  return std::mt19937(seed);
}

int random_int(std::mt19937& rng, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(rng);
}

Tokenizer load(const json& file) {
  TemporaryFolder folder;
  folder.write("tokenizer.json", file);
  return Tokenizer::load(folder.path());
}

template <typename Action>
std::string error_of(Action&& action) {
  try {
    action();
  } catch (const Error& e) {
    EXPECT_EQ(std::string_view(e.what()).find('\n'), std::string_view::npos);
    return e.what();
  }
  return "no error";
}

TEST(Tokenizer, EncodesMergesAndAddedTokens) {
  const Tokenizer tokenizer = load(small_tokenizer());
  EXPECT_EQ(tokenizer.encode("low lower<|end|>"), (Ids{257, 258, 259, 300}));
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{257, 258, 259, 300}), "low lower<|end|>");
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{257, 300, 301, 258}, true), "low<tool> low");
  EXPECT_TRUE(tokenizer.encode("").empty());
  EXPECT_EQ(tokenizer.decode({}), "");
  EXPECT_EQ(tokenizer.vocab_size(), 302);
  EXPECT_EQ(tokenizer.token_id("<|end|>"), 300);
  EXPECT_EQ(tokenizer.token_id("Ġlow"), 258);
  EXPECT_EQ(tokenizer.token_id(" low"), std::nullopt);
  EXPECT_EQ(tokenizer.token_text(258), " low");
  EXPECT_TRUE(tokenizer.is_special(300));
  EXPECT_FALSE(tokenizer.is_special(301));
  EXPECT_FALSE(tokenizer.is_special(257));
}

TEST(Tokenizer, UnknownIdsStandForNothing) {
  const Tokenizer tokenizer = load(small_tokenizer());
  StreamDecoder decoder(tokenizer);
  for (const int32_t id : {-1, 302, 260, 299, INT32_MAX, INT32_MIN}) {  // 260 to 299 are holes
    EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{0xC3, id, 0xA9, 257}), "élow");
    EXPECT_FALSE(tokenizer.has_token(id));
    EXPECT_FALSE(tokenizer.is_special(id));
    EXPECT_EQ(decoder.push(id), "");
    expect_parts(error_of([&] { tokenizer.token_text(id); }),
                 {"the id " + std::to_string(id), "tokenizer.json"});
  }
}

TEST(Tokenizer, IllFormedTextIsNamedByItsOffset) {
  const Tokenizer tokenizer = load(small_tokenizer());
  auto rng = seeded();
  const std::vector<std::string> ill_formed = {"\x80",              // a continuation byte alone
                                               "\xC0\xAF",          // overlong
                                               "\xC3",              // cut off
                                               "\xE0\x80\x80",      // overlong
                                               "\xE6\x97",          // cut off
                                               "\xED\xA0\x80",      // a surrogate
                                               "\xF0\x8F\xBF\xBF",  // overlong
                                               "\xF0\x9F\x98",      // cut off
                                               "\xF4\x90\x80\x80",  // above U+10FFFF
                                               "\xF5\x80\x80\x80",
                                               "\xFF"};
  for (const std::string& bad : ill_formed) {
    std::string before;
    for (int i = random_int(rng, 0, 40); i > 0; --i)
      before += std::vector<std::string>{"a", "é", "日", "😀"}[random_int(rng, 0, 3)];
    for (const std::string after : {"", " and more", "é"}) {
      expect_parts(error_of([&] { tokenizer.encode(before + bad + after); }),
                   {"offset " + std::to_string(before.size()) + " of"});
    }
  }
}

struct Spoiled {
  const char* patch;  // RFC 7396 merge patch
  std::vector<std::string> parts;
};

class UnsupportedFile : public ::testing::TestWithParam<Spoiled> {};

TEST_P(UnsupportedFile, FailsWithOneSentence) {
  json file = small_tokenizer();
  file.merge_patch(json::parse(GetParam().patch));
  const std::string message = error_of([&] { load(file); });
  expect_parts(message, {"tokenizer.json: "});
  expect_parts(message, GetParam().parts);
}

INSTANTIATE_TEST_SUITE_P(
    All, UnsupportedFile,
    ::testing::Values(
        Spoiled{R"({"model": {"type": "Unigram"}})", {"Unigram", "BPE"}},
        Spoiled{R"({"model": {"dropout": 0.1}})", {"dropout"}},
        Spoiled{R"({"model": {"byte_fallback": true}})", {"byte_fallback"}},
        Spoiled{R"({"model": {"continuing_subword_prefix": "##"}})", {"continuing_subword_prefix"}},
        Spoiled{R"({"model": {"end_of_word_suffix": "</w>"}})", {"end_of_word_suffix"}},
        Spoiled{R"({"model": {"unk_token": "<unk>"}})", {"unk_token", "<unk>"}},
        Spoiled{R"({"model": {"merges": ["l o", "l ow", "zz z"]}})", {"merge 1", "ow", "vocabulary"}},
        Spoiled{R"({"model": {"merges": ["l o w"]}})", {"merge 0", "l o w"}},
        Spoiled{R"({"model": {"vocab": {"x": -4}}})", {"-4"}},
        Spoiled{R"({"model": {"vocab": {"x": 2000000000}}})", {"2000000000"}},
        Spoiled{R"({"model": {"vocab": {"x": "one"}}})", {"form"}},
        Spoiled{R"({"model": {"vocab": {"x": 3.1e34}}})", {"form"}},
        Spoiled{R"({"model": {"vocab": {"x": 4294967301}}})", {"form"}},
        Spoiled{R"({"added_tokens": [{"id": 1e300, "content": "x"}]})", {"form"}},
        Spoiled{R"({"added_tokens": [{"id": 5.5, "content": "x"}]})", {"form"}},
        Spoiled{R"({"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "b"}},
                    {"Sequence": {"id": "A"}}], "special_tokens": {"b": {"ids": [1e300]}}}})",
                {"form"}},
        Spoiled{R"({"model": null})", {"form"}},
        Spoiled{R"({"normalizer": {"type": "Nmt"}})", {"normalizer Nmt"}},
        Spoiled{
            R"({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "BertNormalizer"}]}})",
            {"BertNormalizer"}},
        Spoiled{R"({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}})",
                {"empty"}},
        Spoiled{R"({"normalizer": {"type": "Strip", "strip_left": true}})", {"form"}},
        Spoiled{R"({"pre_tokenizer": {"type": "BertPreTokenizer"}})", {"pre_tokenizer BertPreTokenizer"}},
        Spoiled{R"({"pre_tokenizer": {"type": "Metaspace"}})", {"form"}},
        Spoiled{R"({"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "odd"}})",
                {"prepend_scheme odd"}},
        Spoiled{R"({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                    {"type": "ByteLevel", "add_prefix_space": false}, {"type": "Metaspace", "replacement": "_"}]}})",
                {"Metaspace", "after ByteLevel"}},
        Spoiled{R"({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                    {"type": "ByteLevel", "add_prefix_space": false},
                    {"type": "ByteLevel", "add_prefix_space": false}]}})",
                {"ByteLevel", "after ByteLevel"}},
        Spoiled{R"({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Shuffled"}})",
                {"behavior Shuffled"}},
        Spoiled{
            R"({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\w+"}, "behavior": "Isolated"}})",
            {"\\w"}},
        Spoiled{R"({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated"}})",
                {"malformed"}},
        Spoiled{R"({"decoder": {"type": "WordPiece"}})", {"decoder WordPiece"}},
        Spoiled{R"({"decoder": {"type": "Strip", "content": " ", "start": -1, "stop": 0}})", {"Strip", "-1"}},
        Spoiled{R"({"decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 1e300}})", {"form"}},
        Spoiled{R"({"decoder": {"type": "Metaspace", "replacement": "__"}})",
                {"replacement", "one character"}},
        Spoiled{
            R"({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]}})",
            {"ByteFallback", "after Fuse"}},
        Spoiled{R"({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"},
                    {"type": "Replace", "pattern": {"String": "ab"}, "content": "c"}]}})",
                {"Replace", "after Fuse"}},
        Spoiled{R"({"decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "Fuse"}]}})",
                {"combines ByteLevel"}},
        Spoiled{R"({"decoder": null})", {"decoder"}},
        Spoiled{R"({"post_processor": {"type": "BertProcessing"}})", {"post_processor BertProcessing"}},
        Spoiled{R"({"post_processor": {"type": "TemplateProcessing", "single": [], "special_tokens": {}}})",
                {"0 times"}},
        Spoiled{R"({"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "b"}},
                    {"Sequence": {"id": "A"}}], "special_tokens": {"b": {"ids": [777]}}}})",
                {"777"}},
        Spoiled{R"({"added_tokens": [{"id": 3, "content": "low"}]})", {"added token low", "id 3"}},
        Spoiled{R"({"added_tokens": [{"content": "low"}]})", {"form"}}));

TEST(Tokenizer, DamagedFilesAreErrors) {
  TemporaryFolder folder;
  expect_parts(error_of([&] { Tokenizer::load(folder.path()); }), {"tokenizer.json", "no such file"});
  auto rng = seeded();
  const std::string text = small_tokenizer().dump();
  write_file_atomically(folder.path() / "tokenizer.json",
                        text.substr(0, random_int(rng, 1, static_cast<int>(text.size()) - 1)));
  expect_parts(error_of([&] { Tokenizer::load(folder.path()); }), {"not valid JSON"});
  folder.write("tokenizer.json", json::array({1, 2}));
  expect_parts(error_of([&] { Tokenizer::load(folder.path()); }), {"not of the form"});
}

TEST(Tokenizer, SpecialIdsComeFromTheConfigurations) {
  TemporaryFolder folder;
  folder.write("tokenizer.json", small_tokenizer());
  Tokenizer tokenizer = Tokenizer::load(folder.path());
  EXPECT_TRUE(tokenizer.eos_ids().empty());
  EXPECT_EQ(tokenizer.bos_id(), std::nullopt);
  EXPECT_EQ(tokenizer.pad_id(), std::nullopt);

  folder.write("config.json", {{"eos_token_id", 7}, {"bos_token_id", 8}, {"pad_token_id", nullptr}});
  tokenizer = Tokenizer::load(folder.path());
  EXPECT_EQ(tokenizer.eos_ids(), (Ids{7}));
  EXPECT_EQ(tokenizer.bos_id(), 8);
  EXPECT_EQ(tokenizer.pad_id(), std::nullopt);

  folder.write("tokenizer_config.json",
               {{"eos_token", "<|end|>"}, {"bos_token", {{"content", "low"}}}, {"pad_token", nullptr}});
  tokenizer = Tokenizer::load(folder.path());
  EXPECT_EQ(tokenizer.eos_ids(), (Ids{300}));
  EXPECT_EQ(tokenizer.bos_id(), 257);

  folder.write("generation_config.json", {{"eos_token_id", {301, 300}}, {"pad_token_id", 301}});
  tokenizer = Tokenizer::load(folder.path());
  EXPECT_EQ(tokenizer.eos_ids(), (Ids{301, 300}));
  EXPECT_EQ(tokenizer.pad_id(), 301);

  folder.write("generation_config.json", {{"eos_token_id", 299}});
  expect_parts(error_of([&] { Tokenizer::load(folder.path()); }), {"no token has the id 299"});
  for (const json& other : {json("one"), json(1e300), json(4294967296 + 7)}) {
    folder.write("generation_config.json", {{"eos_token_id", {other}}});
    expect_parts(error_of([&] { Tokenizer::load(folder.path()); }), {"generation_config.json", "wrong form"});
  }
  folder.write("generation_config.json", json::object());
  folder.write("tokenizer_config.json", {{"bos_token", "<nowhere>"}});
  expect_parts(error_of([&] { Tokenizer::load(folder.path()); }), {"tokenizer_config.json", "<nowhere>"});
}

TEST(Tokenizer, ConfigurationsMayNotContradictTheVocabulary) {
  TemporaryFolder folder;
  folder.write("tokenizer.json", small_tokenizer());
  for (const char* key : {"twelve", "-1", "99999999999", "12x", ""}) {
    folder.write("tokenizer_config.json", {{"added_tokens_decoder", {{key, {{"content", "<late>"}}}}}});
    expect_parts(error_of([&] { Tokenizer::load(folder.path()); }), {"<late>", "contradicts"});
  }
}

TEST(Tokenizer, TokensNamedOnlyInTheConfigurationAreAdded) {
  TemporaryFolder folder;
  folder.write("tokenizer.json", small_tokenizer());
  folder.write("tokenizer_config.json", {{"added_tokens_decoder",
                                          {{"305", {{"content", "<late>"}, {"special", true}}},
                                           {"300", {{"content", "<|end|>"}, {"special", true}}}}}});
  const Tokenizer tokenizer = Tokenizer::load(folder.path());
  EXPECT_EQ(tokenizer.encode("<late>low<|end|>"), (Ids{305, 257, 300}));
  EXPECT_EQ(tokenizer.vocab_size(), 306);
}

// Byte-pair encoding by definition: find the adjacent pair of lowest rank, join its leftmost place, begin
// again.
std::vector<std::string> encode_by_definition(
    const std::string& word, const std::map<std::pair<std::string, std::string>, int>& ranks) {
  std::vector<std::string> symbols;
  for (const char c : word) symbols.emplace_back(1, c);
  while (true) {
    int best = INT32_MAX;
    size_t at = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto rank = ranks.find({symbols[i], symbols[i + 1]});
      if (rank != ranks.end() && rank->second < best) {
        best = rank->second;
        at = i;
      }
    }
    if (best == INT32_MAX) return symbols;
    symbols[at] += symbols[at + 1];
    symbols.erase(symbols.begin() + static_cast<ptrdiff_t>(at) + 1);
  }
}

TEST(BytePairEncoding, EqualsItsDefinition) {
  auto rng = seeded();
  for (int trial = 0; trial < 20; ++trial) {
    const std::string letters = std::string("abcdefgh").substr(0, static_cast<size_t>(random_int(rng, 1, 8)));
    json vocab, merges = json::array();
    std::vector<std::string> tokens, text_of_id;
    std::map<std::pair<std::string, std::string>, int> ranks;
    const auto add = [&](const std::string& token) {
      vocab[token] = tokens.size();
      tokens.push_back(token);
    };
    for (const char c : letters) add(std::string(1, c));
    for (int i = random_int(rng, 1, 60); i > 0; --i) {
      const std::string left =
          tokens[static_cast<size_t>(random_int(rng, 0, static_cast<int>(tokens.size()) - 1))];
      const std::string right =
          tokens[static_cast<size_t>(random_int(rng, 0, static_cast<int>(tokens.size()) - 1))];
      if (!ranks.try_emplace({left, right}, static_cast<int>(ranks.size())).second) continue;
      merges.push_back({left, right});
      if (!vocab.contains(left + right)) add(left + right);
    }
    const BytePairEncoding bpe({{"type", "BPE"}, {"vocab", vocab}, {"merges", merges}}, true, "test");
    PieceCache cache(bpe);
    std::vector<int32_t> cached;
    for (int n = 0; n < 60; ++n) {
      std::string word;
      for (int i = random_int(rng, 0, n % 2 ? 12 : 120); i > 0; --i)
        word += letters[static_cast<size_t>(random_int(rng, 0, static_cast<int>(letters.size()) - 1))];
      const auto wanted = encode_by_definition(word, ranks);
      std::vector<int32_t> ids;
      bpe.encode(word, ids);
      std::vector<std::string> found;
      for (const int32_t id : ids) found.push_back(tokens[static_cast<size_t>(id)]);
      ASSERT_EQ(found, wanted) << word;
      for (int twice = 0; twice < 2; ++twice) {
        const size_t before = cached.size();
        cache.encode(word, cached);
        ASSERT_EQ(std::vector<int32_t>(cached.begin() + static_cast<ptrdiff_t>(before), cached.end()), ids)
            << word;
      }
    }
  }
}

TEST(BytePairEncoding, BytesWithoutATokenVanishOrBecomeUnknown) {
  const json vocab = {{"a", 0}, {"b", 1}, {"ab", 2}, {"<unk>", 3}};
  const auto encode = [&](const json& extra, const std::string& bytes) {
    json model = {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"a b"}}};
    model.update(extra);
    std::vector<int32_t> ids;
    BytePairEncoding(model, true, "test").encode(bytes, ids);
    return ids;
  };
  EXPECT_EQ(encode(json::object(), "axxb"), Ids{2});  // as the reference implementation: a and b meet
  EXPECT_EQ(encode({{"unk_token", "<unk>"}}, "axxb"), (Ids{0, 3, 3, 1}));
  EXPECT_EQ(encode({{"unk_token", "<unk>"}, {"fuse_unk", true}}, "axxbx"), (Ids{0, 3, 1, 3}));
}

TEST(StreamDecoder, HoldsBackUnfinishedCharacters) {
  const Tokenizer tokenizer = load(small_tokenizer());  // ids 0..255 are the bytes
  StreamDecoder decoder(tokenizer);
  EXPECT_EQ(decoder.push('a'), "a");
  EXPECT_EQ(decoder.push(0xF0), "");
  EXPECT_EQ(decoder.push(0x9F), "");
  EXPECT_EQ(decoder.push(0x98), "");
  EXPECT_EQ(decoder.push(0x80), "😀");
  EXPECT_EQ(decoder.push(0xE6), "");
  EXPECT_EQ(decoder.push(257), "\uFFFDlow");  // the character never came
  EXPECT_EQ(decoder.push(0xE6), "");
  EXPECT_EQ(decoder.push(0x97), "");
  EXPECT_EQ(decoder.finish(), "\uFFFD");
  EXPECT_EQ(decoder.finish(), "");
  EXPECT_EQ(decoder.push(0xA5), "\uFFFD");  // nothing of the last text is left
}

TEST(StreamDecoder, UnfinishedCharactersGoOnAfterASkippedToken) {
  const Tokenizer tokenizer = load(small_tokenizer());
  StreamDecoder decoder(tokenizer, true);
  EXPECT_EQ(decoder.push(0xC3), "");
  EXPECT_EQ(decoder.push(300), "");
  EXPECT_EQ(decoder.push(0xA9), "é");
  const std::vector<int32_t> ids = {0xC3, 300, 0xA9};
  EXPECT_EQ(tokenizer.decode(ids, true), "é");
  EXPECT_EQ(tokenizer.decode(ids, false), "\uFFFD<|end|>\uFFFD");
}

TEST(StreamDecoder, JoinedPartsEqualDecode) {
  const Tokenizer tokenizer = load(small_tokenizer());
  auto rng = seeded();
  // Bytes that matter to UTF-8, drawn so that both whole and broken characters are common.
  const std::vector<int32_t> ids_to_draw = {0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF,
                                            0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xED, 0xEF, 0xF0,
                                            0xF1, 0xF4, 0xF5, 0xFF, 257,  300,  301};
  for (int trial = 0; trial < 300; ++trial) {
    const bool skip = random_int(rng, 0, 1);
    StreamDecoder decoder(tokenizer, skip);
    std::vector<int32_t> ids;
    std::string joined;
    const auto take = [&](const std::string& part) {
      ASSERT_EQ(find_invalid_utf8(part), std::string::npos);
      joined += part;
    };
    for (int i = random_int(rng, 0, 60); i > 0; --i) {
      ids.push_back(
          ids_to_draw[static_cast<size_t>(random_int(rng, 0, static_cast<int>(ids_to_draw.size()) - 1))]);
      take(decoder.push(ids.back()));
    }
    take(decoder.finish());
    EXPECT_EQ(joined, tokenizer.decode(ids, skip));
  }
}

TEST(Tokenizer, ServesManyThreads) {
  auto rng = seeded();
  const Tokenizer tokenizer = load(small_tokenizer());
  std::string text;
  for (int i = 0; i < 20000; ++i)
    text += std::vector<std::string>{
        "low", " low", "er", "é", "<|end|>", " ", "7"}[static_cast<size_t>(random_int(rng, 0, 6))];
  const auto wanted = tokenizer.encode(text);
  std::vector<std::vector<int32_t>> found(4);
  std::vector<std::thread> threads;
  for (auto& ids : found) threads.emplace_back([&ids, &text, copy = tokenizer] { ids = copy.encode(text); });
  for (auto& thread : threads) thread.join();
  for (const auto& ids : found) EXPECT_EQ(ids, wanted);
  EXPECT_EQ(tokenizer.decode(wanted), text);
}

}  // namespace
}  // namespace spot

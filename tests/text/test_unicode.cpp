#include <gtest/gtest.h>
#include <utf8proc.h>

#include <cstdlib>
#include <random>

#include "core/error.h"
#include "text/regex.h"
#include "text/unicode.h"

namespace spot {
namespace {

std::mt19937 seeded() {
  const unsigned seed = std::random_device{}();
  std::cout << "seed " << seed << "\n";
  return std::mt19937(seed);
}

int random_int(std::mt19937& rng, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(rng);
}

std::string lossy(std::string_view bytes) {
  Utf8Stream stream;
  std::string out;
  stream.push(bytes, out);
  stream.finish(out);
  return out;
}

TEST(Unicode, CodePointsRoundTrip) {
  for (char32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    std::string bytes = "x";
    append_utf8(bytes, c);
    ASSERT_EQ(find_invalid_utf8(bytes), std::string::npos);
    ASSERT_EQ(previous_offset(bytes, bytes.size()), 1u);
    size_t offset = 1;
    ASSERT_EQ(next_code_point(bytes, offset), c);
    ASSERT_EQ(offset, bytes.size());
  }
}

TEST(Unicode, IllFormedPartsBecomeOneReplacementEach) {
  // The examples of the Unicode standard, tables 3-8 to 3-11.
  EXPECT_EQ(lossy("\x61\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64"),
            "a\uFFFD\uFFFD\uFFFDb\uFFFDc\uFFFD\uFFFDd");
  EXPECT_EQ(lossy("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDA");
  EXPECT_EQ(lossy("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDA");
  EXPECT_EQ(lossy("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"), "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDA\uFFFD\uFFFDB");
  EXPECT_EQ(lossy("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), "\uFFFD\uFFFD\uFFFD\uFFFDA");
}

TEST(Unicode, NfcEqualsTheLibrarysOnOldCharacters) {
  auto rng = seeded();
  // Blocks that no version after Unicode 9 added combining characters to; U+11A7 has its own test.
  const std::vector<std::pair<int, int>> blocks = {
      {0x20, 0x7E},     {0xC0, 0x17F},     {0x300, 0x36F},   {0x300, 0x36F},   {0x591, 0x5C7},
      {0x64B, 0x65F},   {0x915, 0x94D},    {0xB92, 0xBD7},   {0x1100, 0x1112}, {0x1161, 0x1175},
      {0x11A8, 0x11C2}, {0xAC00, 0xAC40},  {0x1E00, 0x1EFF}, {0x1F00, 0x1FFF}, {0x3046, 0x3099},
      {0xF900, 0xFAD0}, {0x1D15E, 0x1D164}};
  for (int trial = 0; trial < 20000; ++trial) {
    std::string text;
    for (int i = random_int(rng, 0, 9); i > 0; --i) {
      const auto [low, high] =
          blocks[static_cast<size_t>(random_int(rng, 0, static_cast<int>(blocks.size()) - 1))];
      append_utf8(text, static_cast<char32_t>(random_int(rng, low, high)));
    }
    utf8proc_uint8_t* wanted = utf8proc_NFC(reinterpret_cast<const utf8proc_uint8_t*>(text.c_str()));
    ASSERT_NE(wanted, nullptr);
    EXPECT_EQ(normalize(text, NormalizationForm::nfc), reinterpret_cast<const char*>(wanted));
    std::free(wanted);
  }
}

TEST(Unicode, NfcKeepsWhatTheReferenceKeeps) {
  EXPECT_EQ(normalize("\uBC14\u11A7", NormalizationForm::nfc), "\uBC14\u11A7");  // no trailing consonant
  EXPECT_EQ(normalize("e\u0301", NormalizationForm::nfc), "\u00E9");
  EXPECT_EQ(normalize("a\u0315\u0300\u05AE\u0300b", NormalizationForm::nfc), "\u00E0\u05AE\u0300\u0315b");
  EXPECT_EQ(normalize("\U00011935\U00011930", NormalizationForm::nfc),
            "\U00011935\U00011930");  // composes since Unicode 13
  EXPECT_EQ(normalize("a\u0301\u1DF9", NormalizationForm::nfc),
            "\u00E1\u1DF9");  // class 220 since Unicode 10, not moved
}

TEST(Regex, RefusesWhatTheDialectsReadDifferently) {
  for (const char* pattern :
       {"^a", "a$", ".", "\\w", "\\d", "\\h", "\\b", "\\R", "[a[b]]", "[a&&b]", "[\\S]", "\\p{Han}", "\\pL",
        "a{1,2}+", "(?<name>a)", "(?m:a)", "[]a]", "a\\", "\\p{L"}) {
    EXPECT_THROW(Regex(pattern, "test"), Error) << pattern;
  }
}

TEST(Regex, FindsLeftmostMatchesFromAnOffset) {
  const Regex regex(R"((?i:'s)|\s+(?!\S)|\p{L}+)", "test");
  RegexMatcher matcher(regex);
  RegexMatcher::Match match{};
  const std::string text = "?é日 'S  x";
  std::vector<std::string> found;
  for (size_t from = 0; matcher.find(text, from, match); from = match.end) {
    found.push_back(text.substr(match.begin, match.end - match.begin));
  }
  EXPECT_EQ(found, (std::vector<std::string>{"é日", "'S", " ", "x"}));
  EXPECT_FALSE(matcher.find("", 0, match));
}

TEST(Regex, WhiteSpaceIsTheUnicodeProperty) {
  const Regex regex(R"(\s)", "test"), negated(R"(\S)", "test");
  RegexMatcher matcher(regex), negated_matcher(negated);
  RegexMatcher::Match match{};
  int count = 0;
  for (char32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    std::string text;
    append_utf8(text, c);
    ASSERT_EQ(matcher.find(text, 0, match), is_white_space(c)) << std::hex << static_cast<int>(c);
    ASSERT_EQ(negated_matcher.find(text, 0, match), !is_white_space(c)) << std::hex << static_cast<int>(c);
    count += is_white_space(c);
  }
  EXPECT_EQ(count, 25);
}

}  // namespace
}  // namespace spot

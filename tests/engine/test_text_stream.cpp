#include <gtest/gtest.h>

#include "core/error.h"
#include "engine/text_stream.h"
#include "tests/selector/support.h"
#include "tests/text/small_tokenizer.h"

namespace spot {
namespace {

class TextStreams : public ::testing::Test {
 protected:
  TextStreams() {
    write_file_atomically(folder.path() / "tokenizer.json", testing::small_tokenizer().dump());
    tokenizer.emplace(Tokenizer::load(folder.path()));
  }
  testing::TemporaryFolder folder;
  std::optional<Tokenizer> tokenizer;
};

// A token is one of few bytes, so that stop strings and their beginnings come up all the time.
TEST_F(TextStreams, EndBeforeTheFirstStopStringThatIsWhole) {
  const uint64_t seed = test::fresh_seed();
  std::mt19937_64 random(seed);
  int stopped = 0, whole = 0;
  for (int round = 0; round < 400; ++round) {
    const auto letters = [&](uint64_t count) {
      std::string text;
      for (uint64_t i = 0; i < count; ++i) text += static_cast<char>('a' + random() % 3);
      return text;
    };
    std::vector<std::string> stops;
    for (uint64_t i = random() % 3; i > 0; --i) stops.push_back(letters(1 + random() % 6));
    TextStream stream(*tokenizer, stops);
    std::string given, full, expected;
    bool ended = false;
    for (int i = 0; i < 40 && !ended; ++i) {
      const std::string piece = letters(1);
      full += piece;
      given += stream.push(static_cast<unsigned char>(piece[0]));
      size_t first = std::string::npos;
      for (const std::string& stop : stops) first = std::min(first, full.find(stop));
      ended = first != std::string::npos;
      EXPECT_EQ(stream.stopped(), ended);
      if (ended) expected = full.substr(0, first);
      // Nothing is given out that has to be taken back.
      EXPECT_TRUE(ended || given == full.substr(0, given.size()));
    }
    given += stream.finish();
    EXPECT_EQ(given, ended ? expected : full) << "seed " << seed << " round " << round;
    (ended ? stopped : whole) += 1;
  }
  EXPECT_GT(stopped, 20);
  EXPECT_GT(whole, 20);
}

TEST_F(TextStreams, AStopStringMayCrossTokensAndCharacters) {
  TextStream stream(*tokenizer, {"\u00e9x"});
  EXPECT_EQ(stream.push('a'), "a");
  EXPECT_EQ(stream.push(0xc3), "");
  EXPECT_EQ(stream.push(0xa9), "");  // may be the stop string's first character
  EXPECT_EQ(stream.push('y'), "\u00e9y");
  EXPECT_EQ(stream.push(300), "");  // special tokens are no text
  EXPECT_EQ(stream.push(0xc3), "");
  EXPECT_EQ(stream.push(0xa9), "");
  EXPECT_EQ(stream.push('x'), "");
  EXPECT_TRUE(stream.stopped());
  EXPECT_EQ(stream.finish(), "");
  EXPECT_THROW(TextStream(*tokenizer, {""}), Error);
}

}  // namespace
}  // namespace spot

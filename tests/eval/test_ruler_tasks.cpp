#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cctype>
#include <cmath>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "eval/ruler_random.h"
#include "eval/ruler_score.h"
#include "eval/ruler_tasks.h"
#include "eval/words.h"
#include "tests/checkpoint/support.h"

namespace spot {
namespace {

using testing::expect_error;
using testing::fresh_seed;

// A stand-in for a tokenizer: runs of letters are cut after `longest`, every other character but a space is a
// token.
TokenCounter letters_counter(int longest) {
  return [longest](const std::string& text, bool first) {
    int64_t tokens = first ? 1 : 0;
    int run = 0;
    for (char c : text) {
      const bool letter = std::isalpha(static_cast<unsigned char>(c)) != 0;
      if (letter ? run % longest == 0 : c != ' ') ++tokens;
      run = letter ? run + 1 : 0;
    }
    return tokens;
  };
}

// Sentences of 4 to 25 words, without digits, capitals or hyphens.
std::string random_essay(RulerRandom& random, int64_t sentences) {
  std::string text;
  for (int64_t s = 0; s < sentences; ++s) {
    const int64_t words = 4 + random.below(22);
    for (int64_t w = 0; w < words; ++w)
      text += random.pick(nouns()) + (w + 1 < words ? random.below(9) ? " " : ",\n" : ".  ");
  }
  return text;
}

int64_t occurrences(const std::string& text, const std::string& part) {
  int64_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

std::map<std::string, int64_t> word_counts(const std::string& text) {
  std::map<std::string, int64_t> counts;
  std::istringstream in(text);
  for (std::string word; in >> word;) counts[word]++;
  return counts;
}

class Ruler : public ::testing::Test {
 protected:
  Ruler()
      : random(fmt::format("{}", fresh_seed())),
        seed(random.bits()),
        version(1 + static_cast<int>(random.below(kRulerVersion))),
        longest(2 + static_cast<int>(random.below(5))) {
    essay = random_essay(random, 40 + random.below(400));
  }
  RulerGenerator generator(int wording = 0) const {
    return RulerGenerator({.seed = seed, .version = version, .wording = wording}, essay,
                          letters_counter(longest));
  }
  RulerRandom random;
  uint64_t seed;
  int version;
  int longest;
  std::string essay;
};

TEST_F(Ruler, PromptsFitTheirLengthAndComeClose) {
  const RulerGenerator made = generator();
  const TokenCounter count = letters_counter(longest);
  for (RulerTask task : all_ruler_tasks()) {
    for (int64_t lowest : {2500, 5000, 30000}) {
      const int64_t length = lowest + random.below(lowest);
      const RulerSample s = made.make(task, length, random.below(100));
      SCOPED_TRACE(fmt::format("{} at {}: {} tokens, haystack {}", to_string(task), length, s.prompt_tokens,
                               s.haystack_size));
      EXPECT_EQ(s.max_new_tokens, ruler_answer_tokens(task));
      EXPECT_EQ(s.prompt_tokens, count(s.context, true) + count(s.question + s.answer_prefix, false));
      EXPECT_LE(s.prompt_tokens + s.max_new_tokens, length);
      // Two units of haystack at most are missing, or 1/256 of the length. (One more coded word can add one
      // to several ranks' counts at once.)
      const int64_t unit = s.prompt_tokens / s.haystack_size + 1, units = task == RulerTask::fwe ? 8 : 2;
      // With more words than the lists hold, other sizes have other common words: ten that stand 30 times
      // each.
      const int64_t other_words = task == RulerTask::cwe && lowest == 30000 ? 300 : 0;
      EXPECT_LE(length - s.prompt_tokens - s.max_new_tokens,
                std::max(length / 256, units * unit) + other_words);
      EXPECT_EQ(s.context.back(), '\n');
    }
  }
}

TEST_F(Ruler, AnswersOccurAsOftenAsTheyShould) {
  const int wording = static_cast<int>(random.below(kRulerWordings));
  const RulerGenerator made = generator(wording);
  for (RulerTask task : all_ruler_tasks()) {
    const int64_t length = 3000 + random.below(9000);
    const RulerSample s = made.make(task, length, random.below(100));
    SCOPED_TRACE(fmt::format("{} at {}, wording {}", to_string(task), length, wording));
    const std::string name = to_string(task);
    EXPECT_EQ(std::set<std::string>(s.references.begin(), s.references.end()).size(), s.references.size());
    // As words: "pear" is part of "appear".
    const auto asked = word_counts(s.question + s.answer_prefix);
    for (const std::string& r : s.references) EXPECT_EQ(asked.count(r), 0u) << r;
    if (name.rfind("niah", 0) == 0 || name.rfind("qa", 0) == 0) {
      const bool four = task == RulerTask::niah_multivalue || task == RulerTask::niah_multiquery;
      EXPECT_EQ(s.references.size(), four ? 4u : 1u);
      for (const std::string& r : s.references) EXPECT_EQ(occurrences(s.context, r), 1) << r;
    } else if (task == RulerTask::vt) {
      ASSERT_EQ(s.references.size(), 5u);
      for (size_t i = 0; i < 5; ++i)
        EXPECT_EQ(occurrences(s.context, "VAR " + s.references[i] + "\n") +
                      occurrences(s.context, "VAR " + s.references[i] + " ="),
                  i < 4 ? 2 : 1);
    } else {
      const auto counts = word_counts(s.context);
      ASSERT_EQ(s.references.size(), task == RulerTask::cwe ? 10u : 3u);
      for (size_t i = 0; i < s.references.size(); ++i) {
        const auto n = static_cast<double>(s.haystack_size), rank = static_cast<double>(i + 2);
        const auto expected = task == RulerTask::cwe
                                  ? (length < 4096 ? 6 : 30)
                                  : static_cast<int64_t>(n / (rank * rank * 1.6449340668482264));
        EXPECT_EQ(counts.at(s.references[i]), expected) << s.references[i];
      }
    }
  }
}

TEST_F(Ruler, HaystacksHoldTheDistractorsTheyShould) {
  const RulerGenerator made = generator();
  auto sample = [&](RulerTask task) { return made.make(task, 6000, random.below(100)); };
  auto needles = [](const RulerSample& s) { return occurrences(s.context, "One of the special magic "); };
  EXPECT_EQ(needles(sample(RulerTask::niah_single_2)), 1);
  for (RulerTask task : {RulerTask::niah_multikey_1, RulerTask::niah_multivalue, RulerTask::niah_multiquery})
    EXPECT_EQ(needles(sample(task)), 4) << to_string(task);
  for (RulerTask task : {RulerTask::niah_multikey_2, RulerTask::niah_multikey_3}) {
    const RulerSample s = sample(task);
    EXPECT_EQ(needles(s), s.haystack_size + 1);
    // One line announces, every other holds a needle.
    EXPECT_EQ(occurrences(s.context, "\n"), s.haystack_size + 2);
  }
  const RulerSample noise = sample(RulerTask::niah_single_1);
  EXPECT_EQ(occurrences(noise.context, "The grass is green."), noise.haystack_size);
  const RulerSample qa = sample(RulerTask::qa_2);
  EXPECT_EQ(occurrences(qa.context, "Document "), qa.haystack_size);
  const RulerSample cwe = sample(RulerTask::cwe);
  EXPECT_NE(cwe.context.find(fmt::format(" {}. ", 10 * 30 + 3 * cwe.haystack_size)), std::string::npos);
  EXPECT_EQ(cwe.context.find(fmt::format(" {}. ", 10 * 30 + 3 * cwe.haystack_size + 1)), std::string::npos);
}

TEST_F(Ruler, EssaysAreContinuousSentencesOfTheTextGivenAndGoRound) {
  const RulerSample s = generator().make(RulerTask::niah_single_2, 25000, 0, 0.5);
  std::istringstream in(essay);
  std::string normal;
  for (std::string word; in >> word;) normal += (normal.empty() ? "" : " ") + word;
  const size_t needle = s.context.find("One of the special"), after = s.context.find(". ", needle) + 2;
  const std::string before = s.context.substr(s.context.find('\n') + 1, needle - s.context.find('\n') - 1);
  const std::string round = normal + " " + normal;
  for (const std::string& part :
       {before.substr(0, std::min<size_t>(before.size(), 600)), s.context.substr(after, 600)})
    EXPECT_NE((round + " " + round).find(part.substr(0, std::min(part.size(), normal.size()))),
              std::string::npos)
        << part;
}

TEST_F(Ruler, TheOneNeedleLiesWhereItWasAsked) {
  const RulerGenerator made = generator();
  for (RulerTask task : all_ruler_tasks()) {
    SCOPED_TRACE(to_string(task));
    if (!has_one_needle(task)) {
      EXPECT_TRUE(std::isnan(made.make(task, 4000, 1).depth));
      expect_error([&] { made.make(task, 4000, 1, 0.5); }, {to_string(task), "depth"});
      continue;
    }
    const double drawn = made.make(task, 8000, 1).depth;
    EXPECT_TRUE(drawn >= 0 && drawn <= 1);
    const RulerSample start = made.make(task, 8000, 1, 0), end = made.make(task, 8000, 1, 1);
    EXPECT_EQ(start.depth, 0);
    EXPECT_EQ(end.depth, 1);
    EXPECT_EQ(start.references, end.references);
    for (double depth : {0.25, 0.5, 0.9}) {
      const RulerSample s = made.make(task, 8000, 1, depth);
      EXPECT_NEAR(s.depth, depth, 0.05);
      EXPECT_NEAR(
          static_cast<double>(s.context.find(s.references[0])) / static_cast<double>(s.context.size()), depth,
          0.08);
    }
  }
  expect_error([&] { made.make(RulerTask::niah_single_1, 4000, 0, 1.5); }, {"1.5"});
}

TEST_F(Ruler, PromptsDependOnTheirNameAlone) {
  const RulerGenerator one = generator(), two = generator();
  const RulerGenerator other({.seed = seed + 1, .version = version}, essay, letters_counter(longest));
  for (RulerTask task : all_ruler_tasks()) {
    SCOPED_TRACE(to_string(task));
    const RulerSample a = one.make(task, 3000, 4);
    two.make(task, 7000, 2);
    const RulerSample b = two.make(task, 3000, 4);
    EXPECT_EQ(a.context, b.context);
    EXPECT_EQ(a.question, b.question);
    EXPECT_EQ(a.references, b.references);
    EXPECT_NE(a.references, one.make(task, 3000, 5).references);
    EXPECT_NE(a.references, one.make(task, 3001, 4).references);
    EXPECT_NE(a.references, other.make(task, 3000, 4).references);
  }
}

// The prompts of this version, on every platform and compiler. When they change on purpose, kRulerVersion
// must too.
TEST(RulerPrompts, AreTheSameEverywhere) {
  std::string essay;
  for (int i = 0; i < 200; ++i) essay += fmt::format("Sentence {} tells of a river and {} boats. ", i, 7 * i);
  const std::vector<uint64_t> expected = {10716601447154355040u, 3435509946209508945u};
  ASSERT_EQ(expected.size(), static_cast<size_t>(kRulerVersion));
  for (int version = 1; version <= kRulerVersion; ++version) {
    std::string all;
    for (int wording = 0; wording < kRulerWordings; ++wording) {
      const RulerGenerator made({.seed = 7, .version = version, .wording = wording}, essay,
                                letters_counter(4));
      for (RulerTask task : all_ruler_tasks()) {
        const RulerSample s = made.make(task, 3000 + 1500 * wording, 3);
        all += fmt::format("{}{}{}{:.6f}", s.context, s.question, s.answer_prefix,
                           std::isnan(s.depth) ? -1 : s.depth);
      }
    }
    EXPECT_EQ(stable_hash(all), expected[static_cast<size_t>(version - 1)])
        << "prompts of version " << version << " changed";
  }
  expect_error([&] { RulerGenerator({.version = kRulerVersion + 1}, essay, letters_counter(4)); },
               {"version", "choose 1 to"});
}

// What tells the versions apart, and nothing else in the tasks that have neither words nor keys.
TEST_F(Ruler, VersionsDifferInWordsAndInTheHint) {
  const RulerGenerator first({.seed = seed, .version = 1}, essay, letters_counter(longest));
  const RulerGenerator second({.seed = seed, .version = 2}, essay, letters_counter(longest));
  for (RulerTask task : {RulerTask::niah_multikey_3, RulerTask::fwe, RulerTask::qa_1, RulerTask::qa_2})
    EXPECT_EQ(first.make(task, 4000, 1).context, second.make(task, 4000, 1).context) << to_string(task);
  EXPECT_NE(first.make(RulerTask::vt, 4000, 1).question.find("directly or through"), std::string::npos);
  EXPECT_EQ(second.make(RulerTask::vt, 4000, 1).question.find("through"), std::string::npos);
  // A list as long as that of a prompt of 128K: all of it English.
  const RulerSample common = second.make(RulerTask::cwe, 60000, 1);
  const std::vector<std::string>& english = english_words().all;
  std::istringstream in(common.context.substr(common.context.rfind("1. ")));
  std::set<std::string> named;
  const std::string asked = common.question + common.answer_prefix;
  for (std::string number, word; in >> number >> word;) {
    EXPECT_TRUE(std::binary_search(english.begin(), english.end(), word)) << word;
    if (word_counts(asked).contains(word)) named.insert(word);
  }
  EXPECT_TRUE(named.empty()) << *named.begin();
}

TEST_F(Ruler, WordingsSayTheSameInOtherWords) {
  const RulerSample usual = generator(0).make(RulerTask::niah_multiquery, 4000, 2);
  std::set<std::string> questions = {usual.question}, prefixes = {usual.answer_prefix};
  for (int wording = 1; wording < kRulerWordings; ++wording) {
    const RulerSample s = generator(wording).make(RulerTask::niah_multiquery, 4000, 2);
    EXPECT_EQ(s.references, usual.references);
    EXPECT_EQ(s.context.find("special magic"), std::string::npos);
    questions.insert(s.question), prefixes.insert(s.answer_prefix);
  }
  EXPECT_EQ(questions.size(), static_cast<size_t>(kRulerWordings));
  EXPECT_EQ(prefixes.size(), static_cast<size_t>(kRulerWordings));
  expect_error([&] { generator(kRulerWordings); }, {"wording"});
}

TEST_F(Ruler, ChatTemplatesWrapTheTaskAndCountAsTokens) {
  const RulerGenerator wrapped({.seed = seed, .before = "<user> ", .after = " </user> <model>"}, essay,
                               letters_counter(longest));
  const RulerSample s = wrapped.make(RulerTask::qa_1, 3000, 0);
  EXPECT_EQ(s.context.rfind("<user> Answer", 0), 0u);
  EXPECT_TRUE(s.question.ends_with("? </user> <model>"));
  EXPECT_EQ(s.answer_prefix, " Answer:");
  EXPECT_LE(s.prompt_tokens + s.max_new_tokens, 3000);
}

TEST_F(Ruler, RefusesWhatCannotBeMade) {
  const RulerGenerator made = generator();
  for (RulerTask task : all_ruler_tasks())
    expect_error([&] { made.make(task, 120, 0); }, {to_string(task), "greater length"});
  const RulerGenerator no_essay({.seed = seed}, "too short", letters_counter(3));
  expect_error([&] { no_essay.make(RulerTask::niah_single_2, 4000, 0); }, {"niah_single_2", "2 words"});
  EXPECT_FALSE(no_essay.make(RulerTask::niah_multikey_3, 4000, 0).references.empty());
  expect_error([] { ruler_task_from_string("niah_single_4"); }, {"niah_single_4", "qa_2"});
  for (RulerTask task : all_ruler_tasks()) EXPECT_EQ(ruler_task_from_string(to_string(task)), task);
}

// An independent program answers every prompt from its text, and scores random outputs by RULER's Python
// rules.
TEST_F(Ruler, AnOracleSolvesThePrompts) {
  nlohmann::json samples = nlohmann::json::array(), scores = nlohmann::json::array();
  const std::string noise("a B\n\t\r\x01 ,.Ä\u00a0z", 16);
  for (int wording = 0; wording < kRulerWordings; ++wording) {
    const RulerGenerator made = generator(wording);
    for (RulerTask task : all_ruler_tasks()) {
      for (int64_t repeat = 0; repeat < 4; ++repeat) {
        const RulerSample s = made.make(task, 2500 + random.below(8000), random.below(1000));
        samples.push_back({{"task", to_string(task)},
                           {"wording", wording},
                           {"context", s.context},
                           {"question", s.question},
                           {"answer_prefix", s.answer_prefix},
                           {"references", s.references}});
        std::string output = random.below(2) ? "\n " : "";
        for (const std::string& reference : s.references) {
          std::string part = reference;
          for (char& c : part)
            if (random.below(3) == 0) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
          if (random.below(3) == 0)
            part[static_cast<size_t>(random.below(static_cast<int64_t>(part.size())))] = '\x02';
          if (random.below(4) != 0) output += part + (random.below(2) ? ", " : "\x07 Ä ");
        }
        scores.push_back({{"task", to_string(task)},
                          {"output", output},
                          {"references", s.references},
                          {"score", ruler_score(task, output, s.references)}});
      }
    }
  }
  const testing::TemporaryFolder folder;
  const std::string file = (folder / "samples.json").string();
  std::ofstream(file) << nlohmann::json{{"samples", samples}, {"scores", scores}}.dump();
  EXPECT_EQ(std::system(("python3 tests/eval/ruler_oracle.py '" + file + "'").c_str()), 0);
}

TEST(Words, ListsAreDistinctPlainWords) {
  std::set<std::string> all;
  size_t total = 0;
  for (const auto* list : {&adjectives(), &nouns(), &verbs()}) {
    EXPECT_GE(list->size(), 300u);
    all.insert(list->begin(), list->end()), total += list->size();
  }
  EXPECT_EQ(all.size(), total);
  EXPECT_EQ(total, 1351u);  // as the generator's header says
  for (const std::string& word : all)
    for (char c : word) EXPECT_TRUE(c >= 'a' && c <= 'z') << word;
}

TEST(Words, EnglishOnesAreRulers) {
  const EnglishWords& words = english_words();
  EXPECT_EQ(words.adjectives.size(), 909u);
  EXPECT_EQ(words.nouns.size(), 6775u);
  EXPECT_EQ(words.all.size(), 8158u);
  for (const auto* list : {&words.adjectives, &words.nouns, &words.all})
    EXPECT_EQ(std::set<std::string>(list->begin(), list->end()).size(), list->size());
  for (const std::string& word : words.all)
    for (char c : word) EXPECT_TRUE(c == '-' || std::isalpha(static_cast<unsigned char>(c))) << word;
}

TEST(Words, InventedWordsNeverRepeatNorContainOneAnother) {
  RulerRandom random(fmt::format("{}", fresh_seed()));
  const auto words = distinct_words(5000, plain_words(), random);
  EXPECT_EQ(std::set<std::string>(words.begin(), words.end()).size(), 5000u);
  int64_t invented = 0;
  std::set<std::string> embedded(adjectives().begin(), adjectives().end());
  embedded.insert(nouns().begin(), nouns().end()), embedded.insert(verbs().begin(), verbs().end());
  for (const std::string& word : words) {
    if (embedded.count(word)) continue;
    EXPECT_EQ(word.size(), 7u);
    ++invented;
  }
  EXPECT_EQ(invented, 5000 - static_cast<int64_t>(embedded.size()));
  NameSource names(random);
  std::set<std::string> seen;
  for (int i = 0; i < 3000; ++i) EXPECT_TRUE(seen.insert(names.next()).second);
}

TEST(RulerRandomNumbers, AreUniformDistinctAndRepeatable) {
  const std::string stream = fmt::format("{}", fresh_seed());
  RulerRandom random(stream), again(stream);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(random.below(1000003), again.below(1000003));
  constexpr int64_t kDraws = 70000;
  std::vector<int64_t> seen(7, 0);
  for (int64_t i = 0; i < kDraws; ++i) seen[static_cast<size_t>(random.below(7))]++;
  for (int64_t n : seen) EXPECT_NEAR(static_cast<double>(n), kDraws / 7.0, 6 * std::sqrt(kDraws * 6.0 / 49));
  std::vector<int64_t> drawn(9, 0);
  for (int64_t i = 0; i < kDraws / 10; ++i) {
    const auto some = random.sample(9, 4);
    ASSERT_EQ(some.size(), 4u);
    for (size_t j = 1; j < 4; ++j) ASSERT_LT(some[j - 1], some[j]);
    for (int64_t n : some) drawn[static_cast<size_t>(n)]++;
  }
  for (int64_t n : drawn)
    EXPECT_NEAR(static_cast<double>(n), kDraws / 10 * 4 / 9.0, 6 * std::sqrt(kDraws / 10 * 20.0 / 81));
  EXPECT_EQ(random.sample(5, 5), (std::vector<int64_t>{0, 1, 2, 3, 4}));
  std::vector<int64_t> items = random.sample(100, 100);
  random.shuffle(items);
  EXPECT_FALSE(std::is_sorted(items.begin(), items.end()));
  std::sort(items.begin(), items.end());
  EXPECT_EQ(items, random.sample(100, 100));
}

}  // namespace
}  // namespace spot

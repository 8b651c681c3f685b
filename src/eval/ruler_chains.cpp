// Variable tracking, common words and frequent words.
#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <iterator>
#include <set>
#include <sstream>

#include "core/error.h"
#include "eval/ruler_build.h"
#include "eval/words.h"

namespace spot::ruler {
namespace {

std::string random_letters(RulerRandom& random, int64_t count, char first) {
  std::string text;
  for (int64_t i = 0; i < count; ++i) text += static_cast<char>(first + random.below(26));
  return text;
}

std::vector<std::string> distinct_letters(RulerRandom& random, int64_t words, int64_t letters, char first) {
  std::set<std::string> used;
  std::vector<std::string> out;
  while (static_cast<int64_t>(out.size()) < words) {
    std::string word = random_letters(random, letters, first);
    if (used.insert(word).second) out.push_back(std::move(word));
  }
  return out;
}

// One chain VAR A = 12345, VAR B = VAR A, ... in `lines` lines of noise.
struct Chain {
  std::vector<std::string> names;
  std::string value, text;
};

Chain make_chain(RulerRandom& random, const std::string& value, int64_t letters, int64_t lines) {
  constexpr int64_t kVariables = 5;  // 4 hops
  Chain chain{distinct_letters(random, kVariables, letters, 'A'), value, ""};
  const std::vector<int64_t> at = random.sample(lines, kVariables);
  size_t next = 0;
  for (int64_t line = 0; line < lines; ++line) {
    if (next < at.size() && at[next] == line) {
      const std::string from = next == 0 ? value : "VAR " + chain.names[next - 1];
      chain.text += fmt::format("VAR {} = {}\n", chain.names[next], from);
      ++next;
    }
    chain.text += kNoise + "\n";
  }
  return chain;
}

const std::string kTrackIntro =
    "The following text hides a chain of variable assignments. Memorise it and follow the chain.\n\n";

std::string track_question(const Chain& chain, int version) {
  return fmt::format("Question: Which variables are assigned the value {} in the text above{}?", chain.value,
                     version == 1 ? ", directly or through others" : "");
}
std::string track_prefix(const Chain& chain) {
  return fmt::format(
      " Answer: According to the chain of variable assignments in the text above, {} variables are assigned "
      "the value {}, they are:",
      chain.names.size(), chain.value);
}

// "1. word 2. word ..." of each of `words` `repeats` times, shuffled.
struct Repeats {
  std::vector<std::string> words;
  int64_t repeats;
};
std::string numbered_list(RulerRandom& random, const std::vector<Repeats>& groups) {
  std::vector<std::string> all;
  for (const Repeats& group : groups)
    for (const std::string& word : group.words)
      all.insert(all.end(), static_cast<size_t>(group.repeats), word);
  random.shuffle(all);
  std::string text;
  for (size_t i = 0; i < all.size(); ++i) text += fmt::format("{}{}. {}", i ? " " : "", i + 1, all[i]);
  return text;
}

const std::string kCommonIntro =
    "Here is a numbered list of words. Some of the words stand in it more often than the others. Memorise "
    "those.\n";
const std::string kCommonQuestion = "Question: Which 10 words are the most common ones in the list above?";
const std::string kCommonPrefix = " Answer: The top 10 words that appear most often in the list are:";

// Those that a list may hold: none that the question names, whose mention would count.
std::vector<std::string> countable_words(int version) {
  if (version == 1) return plain_words();
  static const std::vector<std::string> words = [] {
    std::string text = kCommonIntro + kCommonQuestion + kCommonPrefix;
    for (char& c : text)
      c = std::isalpha(static_cast<unsigned char>(c)) ? static_cast<char>(std::tolower(c)) : ' ';
    std::istringstream in(text);
    const std::set<std::string> named{std::istream_iterator<std::string>(in), {}};
    std::vector<std::string> all = english_words().all;
    std::erase_if(all, [&](const std::string& word) { return named.contains(word); });
    return all;
  }();
  return words;
}

}  // namespace

Draft build_variable_tracking(const Request& request) {
  RulerRandom& random = request.random;
  const int64_t number = 10000 + random.below(90000);
  // The worked example has names of three letters, so that none of them looks like an answer.
  const std::string other = std::to_string(10000 + (number - 10000 + 1 + random.below(89999)) % 90000);
  const Chain example = make_chain(random, other, 3, request.length < 4096 ? 6 : 14);
  const Chain chain = make_chain(random, std::to_string(number), 5, request.size);

  Draft draft;
  draft.context =
      kTrackIntro + example.text + track_question(example, request.version) + track_prefix(example);
  for (const std::string& name : example.names) draft.context += " " + name;
  draft.context += "\n\n" + kTrackIntro + chain.text;
  draft.question = track_question(chain, request.version);
  draft.answer_prefix = track_prefix(chain);
  draft.references = chain.names;
  return draft;
}

Draft build_common_words(const Request& request) {
  constexpr int64_t kCommon = 10;
  const bool small = request.length < 4096;
  const int64_t example_size = small ? 20 : 40;
  const std::vector<std::string> all =
      distinct_words(example_size + kCommon + request.size, countable_words(request.version), request.random);
  auto part = [&](int64_t begin, int64_t count) {
    return std::vector<std::string>(all.begin() + begin, all.begin() + begin + count);
  };
  const std::vector<std::string> example_common = part(0, kCommon), common = part(example_size, kCommon);

  Draft draft;
  draft.context = kCommonIntro +
                  numbered_list(request.random, {{example_common, small ? 3 : 10},
                                                 {part(kCommon, example_size - kCommon), small ? 1 : 3}}) +
                  "\n" + kCommonQuestion + kCommonPrefix;
  for (size_t i = 0; i < example_common.size(); ++i)
    draft.context += fmt::format(" {}. {}", i + 1, example_common[i]);
  draft.context +=
      "\n\n" + kCommonIntro +
      numbered_list(request.random,
                    {{common, small ? 6 : 30}, {part(example_size + kCommon, request.size), small ? 1 : 3}}) +
      "\n";
  draft.question = kCommonQuestion;
  draft.answer_prefix = kCommonPrefix;
  draft.references = common;
  return draft;
}

Draft build_frequent_words(const Request& request) {
  constexpr double kZeta2 = 1.6449340668482264;  // of the exponent 2
  const int64_t vocabulary = std::max<int64_t>(request.length / 50, 8);
  const std::vector<std::string> coded = distinct_letters(request.random, vocabulary, 6, 'a');
  std::vector<std::string> all;
  for (int64_t rank = 1; rank <= vocabulary; ++rank) {
    const auto square = static_cast<double>(rank * rank);
    const auto count = static_cast<size_t>(static_cast<double>(request.size) / (square * kZeta2));
    // The most frequent one is written as dots, which the question says to ignore.
    all.insert(all.end(), count, rank == 1 ? "..." : coded[static_cast<size_t>(rank - 1)]);
  }
  request.random.shuffle(all);

  Draft draft;
  draft.context =
      "Read the coded text below and count how often each coded word occurs in it. Find the three words that "
      "occur most often.\n";
  for (const std::string& word : all) draft.context += word + " ";
  draft.context.back() = '\n';
  draft.question =
      "Question: Explain nothing and leave the dots '...' out of account. Which three words occur most often "
      "in the coded text above?";
  draft.answer_prefix =
      " Answer: According to the coded text above, the three most frequently appeared words are:";
  draft.references.assign(coded.begin() + 1, coded.begin() + 4);
  return draft;
}

}  // namespace spot::ruler

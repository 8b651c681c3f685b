// RULER's words, as the build has found them.
#include <algorithm>
#include <sstream>
#include <string_view>

#include "eval/words.h"

namespace spot {
namespace {

#include "wonderwords.inc"

std::vector<std::string> words_of(std::string_view text) {
  std::istringstream in{std::string(text)};
  std::vector<std::string> words;
  for (std::string word; in >> word;) words.push_back(word);
  return words;
}

}  // namespace

const EnglishWords& english_words() {
  static const EnglishWords words = [] {
    EnglishWords made{words_of(kAdjectiveList), words_of(kNounList), {}};
    made.all = words_of(kVerbList);
    for (const auto* list : {&made.adjectives, &made.nouns})
      made.all.insert(made.all.end(), list->begin(), list->end());
    std::sort(made.all.begin(), made.all.end());
    made.all.erase(std::unique(made.all.begin(), made.all.end()), made.all.end());
    return made;
  }();
  return words;
}

}  // namespace spot

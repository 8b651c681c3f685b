// Words for synthetic prompts: RULER's English ones, fewer plain ones of ours, and invented ones without end.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "eval/ruler_random.h"

namespace spot {

// The lists of the PyPI package wonderwords 3.0.1, from which RULER draws too; each sorted. cmake/ruler_words.py leaves out
// eight entries with spaces and other characters.
struct EnglishWords {
  std::vector<std::string> adjectives;  // 909
  std::vector<std::string> nouns;       // 6,775
  std::vector<std::string> all;         // 8,158, with the verbs
};
const EnglishWords& english_words();

// Everyday words in lower case, alphabetical; no word is in two lists, and none is in the instructions of a
// prompt that counts words.
const std::vector<std::string>& adjectives();  // about 400
const std::vector<std::string>& nouns();       // about 650
const std::vector<std::string>& verbs();       // about 300

// An invented word of seven lower-case letters, vowels and consonants mixed so that it can be spoken (such as
// "maldore"), none of those above; 24 million exist. All have one length, so none is part of another.
std::string pseudo_word(RulerRandom& random);

// `count` distinct words: those of `known` drawn at random where they suffice, else all of them and invented ones, in
// random order, so that nothing but its frequency tells one word of a prompt from another.
std::vector<std::string> distinct_words(int64_t count, std::vector<std::string> known, RulerRandom& random);
// adjectives(), nouns() and verbs().
std::vector<std::string> plain_words();

// Invented names with a capital letter, never the same twice.
class NameSource {
 public:
  explicit NameSource(RulerRandom& random) : random_(random) {}
  std::string next();

 private:
  RulerRandom& random_;
  std::set<std::string> used_;
};

}  // namespace spot

// Words for synthetic prompts: plain English ones embedded here, and invented ones without end.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "eval/ruler_random.h"

namespace spot {

// Everyday words in lower case, alphabetical; no word is in two lists, and none is in the instructions of a
// prompt that counts words.
const std::vector<std::string>& adjectives();  // about 400
const std::vector<std::string>& nouns();       // about 650
const std::vector<std::string>& verbs();       // about 300

// An invented word of seven lower-case letters, vowels and consonants mixed so that it can be spoken (such as
// "maldore"), none of those above; 24 million exist. All have one length, so none is part of another.
std::string pseudo_word(RulerRandom& random);

// `count` distinct words: embedded ones drawn at random where the three lists suffice, else all of them and
// invented ones, in random order, so that nothing but its frequency tells one word of a prompt from another.
std::vector<std::string> distinct_words(int64_t count, RulerRandom& random);

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

// Between ruler_tasks.cpp and the files that write one family of prompts each.
#pragma once

#include <string>
#include <vector>

#include "eval/ruler_random.h"
#include "eval/ruler_tasks.h"

namespace spot::ruler {

// A text as words, and the words that begin a sentence.
struct Essay {
  std::vector<std::string> words;
  std::vector<int64_t> sentence_starts;  // ascending, the first is 0

  static Essay parse(const std::string& text);
  // The sentences of `num_words` words from sentence `first` on, going round at the end; the last may be cut.
  std::vector<std::string> sentences(int64_t first, int64_t num_words) const;
};

// What a builder is given: everything it draws comes from `random`, which begins anew for every size tried.
struct Request {
  RulerTask task;
  int64_t length;  // tokens of the whole prompt: sets the examples and the vocabulary, not the haystack
  int64_t size;    // of the haystack
  double depth;    // of the one needle; NaN: drawn
  int wording, version;
  const Essay& essay;
  RulerRandom& random;
};

// What a builder returns, without what RulerOptions puts around it.
struct Draft {
  std::string context, question, answer_prefix;
  std::vector<std::string> references;
  double depth = std::numeric_limits<double>::quiet_NaN();
};

Draft build_niah(const Request& request);
Draft build_variable_tracking(const Request& request);
Draft build_common_words(const Request& request);
Draft build_frequent_words(const Request& request);
Draft build_questions(const Request& request);

// The smallest haystack that makes a sound prompt.
int64_t smallest_size(RulerTask task);

// The noise unit: five short sentences.
extern const std::string kNoise;

// "a, b, and c"
std::string enumerate(const std::vector<std::string>& items);
// Replaces each {name} of `pattern` by its value; every {name} must be given.
std::string fill(const std::string& pattern, const std::vector<std::pair<std::string, std::string>>& values);

}  // namespace spot::ruler

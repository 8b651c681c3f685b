// The thirteen RULER tasks (Hsieh et al. 2024, arXiv 2404.06654) as a generator: prompts of any token length
// for any tokenizer, offline, from a seed, the same on every platform.
//
// Structure, counts, answer lengths and the rule that fits a prompt to its length are RULER's defaults. What
// differs:
// - The instructions and questions are in our own words; the needle sentence and the answer prefixes of
// wording 0 keep
//   RULER's form. Three more wordings ask for the same things in other words, so that one that was trained on
//   can be told from one that was not.
// - Essays are whatever text the caller supplies, cut from a random sentence on and repeated when too short;
// a
//   sentence ends at a word that ends in . ! or ?, and after 60 words at the latest.
// - Words and keys come from RULER's lists, without eight entries that hold spaces or other characters and, in cwe, without
//   the words of the question; where a prompt needs more than the 8,158 there are, the rest are invented. Keys and values
//   of one prompt, distractors included, are all distinct.
// - qa_1 and qa_2 stand in for SQuAD and HotpotQA: "Document i:" blocks about invented people, institutions
// and towns,
//   whose facts no model knows. qa_1 has one gold document, qa_2 two that must be joined; the rest are
//   distractors of the same kinds. The answer occurs in one document only.
// - The size of the haystack is found for each prompt by itself, so that a prompt depends on nothing but its
// name.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace spot {

enum class RulerTask {
  niah_single_1,    // noise, word -> number
  niah_single_2,    // essay, word -> number
  niah_single_3,    // essay, word -> uuid
  niah_multikey_1,  // essay, 4 keys, one asked
  niah_multikey_2,  // nothing but needles, word -> number
  niah_multikey_3,  // nothing but needles, uuid -> uuid
  niah_multivalue,  // essay, one key with 4 values, all asked
  niah_multiquery,  // essay, 4 keys, all asked
  vt,               // noise, a chain of 5 variables with one value
  cwe,              // the 10 common words of a numbered list
  fwe,              // the 3 most frequent of Zipf-distributed coded words
  qa_1,             // one document answers
  qa_2              // two documents must be joined
};

std::string to_string(RulerTask task);
// Throws Error naming the accepted words.
RulerTask ruler_task_from_string(const std::string& word);
const std::vector<RulerTask>& all_ruler_tasks();
bool needs_essay(RulerTask task);
// Whether the prompt has exactly one needle, whose depth can be asked for (niah_single_1..3,
// niah_multikey_2..3).
bool has_one_needle(RulerTask task);
// Room for the answer, in tokens; RULER's default.
int64_t ruler_answer_tokens(RulerTask task);

// Raised whenever the same seed gives other prompts than before; all versions can still be made.
//   1  words from our own lists, 1,351 and 398 x 645 keys, invented ones beyond; variable tracking asks for what is
//      assigned "directly or through others"
//   2  RULER's words and keys (words.h), and no such hint
inline constexpr int kRulerVersion = 2;
inline constexpr int kRulerWordings = 4;

// One prompt: context + question + answer_prefix, to be continued by the model.
struct RulerSample {
  RulerTask task;
  std::string context;        // instruction, examples and haystack; ends in a line break
  std::string question;       // what is asked
  std::string answer_prefix;  // begins the answer
  std::vector<std::string> references;
  int64_t max_new_tokens = 0;
  int64_t prompt_tokens = 0;  // as the counter counts: context, then question with answer prefix
  int64_t haystack_size =
      0;  // noise lines, essay words, distractor needles, uncommon words, coded words or documents
  // Where the one needle lies, as the share of the haystack's characters before it; NaN with none or several.
  double depth = std::numeric_limits<double>::quiet_NaN();
};

// Tokens of a text. `first`: the text begins the prompt, where a tokenizer may add a token of its own.
using TokenCounter = std::function<int64_t(const std::string& text, bool first)>;

struct RulerOptions {
  uint64_t seed = 42;
  int version = kRulerVersion;
  int wording = 0;  // of needles and their question, 0 .. kRulerWordings - 1
  // Around the task, for models that expect a chat template: `before` goes in front of the context, `after`
  // between question and answer prefix.
  std::string before, after;
};

class RulerGenerator {
 public:
  // `essay` may be empty if no task that needs one is made.
  RulerGenerator(const RulerOptions& options, const std::string& essay, TokenCounter counter);
  ~RulerGenerator();
  RulerGenerator(RulerGenerator&&) noexcept;

  // Prompt `sample` (0, 1, ...) with prompt_tokens + max_new_tokens <= length, short of it by less than one
  // step of the haystack's size or by at most length / 256 tokens. `depth` in [0, 1] places the one needle;
  // NaN leaves it to chance. A pure function of the options, the essay, the tokenizer and the arguments.
  // Throws Error when the length cannot hold the task's smallest prompt, when the essay is missing, and on a
  // depth the task cannot have.
  RulerSample make(RulerTask task, int64_t length, int64_t sample,
                   double depth = std::numeric_limits<double>::quiet_NaN()) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace spot

#include "eval/ruler_tasks.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <sstream>

#include "core/error.h"
#include "eval/ruler_build.h"

namespace spot {
namespace {

struct TaskFacts {
  RulerTask task;
  const char* name;
  int64_t answer_tokens;
  bool essay, one_needle;
};

constexpr std::array<TaskFacts, 13> kTasks = {
    {{RulerTask::niah_single_1, "niah_single_1", 128, false, true},
     {RulerTask::niah_single_2, "niah_single_2", 128, true, true},
     {RulerTask::niah_single_3, "niah_single_3", 128, true, true},
     {RulerTask::niah_multikey_1, "niah_multikey_1", 128, true, false},
     {RulerTask::niah_multikey_2, "niah_multikey_2", 128, false, true},
     {RulerTask::niah_multikey_3, "niah_multikey_3", 128, false, true},
     {RulerTask::niah_multivalue, "niah_multivalue", 128, true, false},
     {RulerTask::niah_multiquery, "niah_multiquery", 128, true, false},
     {RulerTask::vt, "vt", 30, false, false},
     {RulerTask::cwe, "cwe", 120, false, false},
     {RulerTask::fwe, "fwe", 50, false, false},
     {RulerTask::qa_1, "qa_1", 32, false, false},
     {RulerTask::qa_2, "qa_2", 32, false, false}}};

const TaskFacts& facts(RulerTask task) {
  for (const TaskFacts& entry : kTasks)
    if (entry.task == task) return entry;
  fail("RULER task {} has no name", static_cast<int>(task));
}

}  // namespace

std::string to_string(RulerTask task) {
  return facts(task).name;
}
bool needs_essay(RulerTask task) {
  return facts(task).essay;
}
bool has_one_needle(RulerTask task) {
  return facts(task).one_needle;
}
int64_t ruler_answer_tokens(RulerTask task) {
  return facts(task).answer_tokens;
}

RulerTask ruler_task_from_string(const std::string& word) {
  std::string known;
  for (const TaskFacts& entry : kTasks) {
    if (word == entry.name) return entry.task;
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  fail("RULER task '{}' is unknown; choose among {}", word, known);
}

const std::vector<RulerTask>& all_ruler_tasks() {
  static const std::vector<RulerTask> all = [] {
    std::vector<RulerTask> tasks;
    for (const TaskFacts& entry : kTasks) tasks.push_back(entry.task);
    return tasks;
  }();
  return all;
}

namespace ruler {

const std::string kNoise =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

std::string enumerate(const std::vector<std::string>& items) {
  std::string text;
  for (size_t i = 0; i < items.size(); ++i)
    text += (i == 0 ? "" : i + 1 < items.size() ? ", " : items.size() > 2 ? ", and " : " and ") + items[i];
  return text;
}

std::string fill(const std::string& pattern, const std::vector<std::pair<std::string, std::string>>& values) {
  std::string text;
  for (size_t at = 0; at < pattern.size();) {
    const size_t open = pattern.find('{', at), close = pattern.find('}', open);
    if (open == std::string::npos) return text + pattern.substr(at);
    const std::string name = pattern.substr(open + 1, close - open - 1);
    const auto value =
        std::find_if(values.begin(), values.end(), [&](const auto& v) { return v.first == name; });
    if (value == values.end()) fail("prompt pattern '{}': nothing to put in place of '{}'", pattern, name);
    text += pattern.substr(at, open - at) + value->second;
    at = close + 1;
  }
  return text;
}

Essay Essay::parse(const std::string& text) {
  constexpr int64_t kLongestSentence = 60;  // words
  Essay essay;
  std::istringstream in(text);
  bool begins = true;
  for (std::string word; in >> word;) {
    const auto index = static_cast<int64_t>(essay.words.size());
    if (begins || index - essay.sentence_starts.back() >= kLongestSentence)
      essay.sentence_starts.push_back(index);
    // Closing quotes and brackets may follow the full stop.
    const size_t last = word.find_last_not_of("\"')]");
    begins = last != std::string::npos && (word[last] == '.' || word[last] == '!' || word[last] == '?');
    essay.words.push_back(std::move(word));
  }
  return essay;
}

std::vector<std::string> Essay::sentences(int64_t first, int64_t num_words) const {
  std::vector<std::string> out;
  auto sentence = static_cast<size_t>(first);
  while (num_words > 0) {
    const int64_t begin = sentence_starts[sentence];
    const int64_t next = sentence + 1 < sentence_starts.size() ? sentence_starts[sentence + 1]
                                                               : static_cast<int64_t>(words.size());
    const int64_t count = std::min(num_words, next - begin);
    std::string text = words[static_cast<size_t>(begin)];
    for (int64_t w = begin + 1; w < begin + count; ++w) text += " " + words[static_cast<size_t>(w)];
    out.push_back(std::move(text));
    num_words -= count;
    sentence = (sentence + 1) % sentence_starts.size();
  }
  return out;
}

int64_t smallest_size(RulerTask task) {
  switch (task) {
    case RulerTask::niah_single_1:
      return 1;
    case RulerTask::niah_multikey_2:
    case RulerTask::niah_multikey_3:
      return 2;
    case RulerTask::vt:
      return 5;  // a line of noise after each assignment
    case RulerTask::cwe:
      return 10;
    case RulerTask::fwe:
      return 100;  // ranks 4 and 5 then occur 3 and 2 times
    case RulerTask::qa_1:
      return 2;
    case RulerTask::qa_2:
      return 3;
    default:
      return 40;  // words of an essay
  }
}

namespace {

Draft build(const Request& request) {
  switch (request.task) {
    case RulerTask::vt:
      return build_variable_tracking(request);
    case RulerTask::cwe:
      return build_common_words(request);
    case RulerTask::fwe:
      return build_frequent_words(request);
    case RulerTask::qa_1:
    case RulerTask::qa_2:
      return build_questions(request);
    default:
      return build_niah(request);
  }
}

}  // namespace
}  // namespace ruler

struct RulerGenerator::State {
  RulerOptions options;
  ruler::Essay essay;
  TokenCounter count;

  RulerSample attempt(RulerTask task, int64_t length, int64_t size, double depth,
                      const std::string& stream) const {
    RulerRandom random(stream);
    ruler::Draft draft =
        ruler::build({task, length, size, depth, options.wording, options.version, essay, random});
    RulerSample sample{task, options.before + draft.context, draft.question + options.after,
                       draft.answer_prefix, draft.references};
    sample.max_new_tokens = ruler_answer_tokens(task);
    sample.haystack_size = size;
    sample.depth = draft.depth;
    sample.prompt_tokens = count(sample.context, true) + count(sample.question + sample.answer_prefix, false);
    return sample;
  }
};

namespace {

int64_t total_tokens(const RulerSample& sample) {
  return sample.prompt_tokens + sample.max_new_tokens;
}

// The largest haystack that fits, or one within length / 256 tokens of it: counting the tokens of a long
// prompt takes time, so sizes are tried where a straight line through the known ones says, and halved between
// only if that is slow.
RulerSample fit(const std::function<RulerSample(int64_t)>& attempt, RulerTask task, int64_t length) {
  const int64_t smallest = ruler::smallest_size(task), slack = length / 256;
  RulerSample best = attempt(smallest);
  const int64_t least = total_tokens(best);
  if (least > length)
    fail(
        "RULER task {}: its smallest prompt and answer take {} tokens, {} were asked for; ask for a greater "
        "length",
        to_string(task), least, length);
  int64_t too_large = 0, too_many = 0;  // a size that does not fit, and its tokens; 0: none is known yet
  for (int tries = 0;; ++tries) {
    const int64_t size = best.haystack_size, missing = length - total_tokens(best);
    if (missing <= slack || too_large == size + 1) return best;
    const int64_t aim = std::max<int64_t>(missing - slack / 2, 1);
    int64_t next = 0;
    if (too_large == 0) {
      const int64_t rise = std::max<int64_t>(total_tokens(best) - least, 1);
      next = size == smallest ? 2 * size : std::min(size + aim * (size - smallest) / rise, 16 * size);
    } else {
      next = tries < 12 ? size + aim * (too_large - size) / (too_many - total_tokens(best))
                        : (size + too_large) / 2;
      next = std::min(next, too_large - 1);
    }
    RulerSample sample = attempt(std::max(next, size + 1));
    if (total_tokens(sample) > length) {
      too_large = sample.haystack_size, too_many = total_tokens(sample);
    } else {
      best = std::move(sample);
    }
  }
}

}  // namespace

RulerGenerator::RulerGenerator(const RulerOptions& options, const std::string& essay, TokenCounter counter)
    : state_(new State{options, ruler::Essay::parse(essay), std::move(counter)}) {
  if (options.wording < 0 || options.wording >= kRulerWordings)
    fail("RULER wording {} does not exist; choose 0 to {}", options.wording, kRulerWordings - 1);
  if (options.version < 1 || options.version > kRulerVersion)
    fail("RULER prompts of version {} do not exist; choose 1 to {}", options.version, kRulerVersion);
}
RulerGenerator::~RulerGenerator() = default;
RulerGenerator::RulerGenerator(RulerGenerator&&) noexcept = default;

RulerSample RulerGenerator::make(RulerTask task, int64_t length, int64_t sample, double depth) const {
  const std::string name = to_string(task);
  if (needs_essay(task) && state_->essay.words.size() < 100)
    fail(
        "RULER task {} hides its needles in running text, and {} words of it were given; supply a text of at "
        "least 100 words",
        name, state_->essay.words.size());
  if (!std::isnan(depth) && !has_one_needle(task))
    fail("RULER task {} has several needles or none, only a single one has a depth; leave the depth out",
         name);
  if (depth < 0 || depth > 1) fail("RULER task {}: depth {} is not in [0, 1]", name, depth);
  const std::string stream = fmt::format("{}/{}/{}/{}", state_->options.seed, name, length, sample);
  return fit([&](int64_t size) { return state_->attempt(task, length, size, depth, stream); }, task, length);
}

}  // namespace spot

// The eight needle tasks.
#include <fmt/format.h>

#include <array>
#include <cmath>

#include "core/error.h"
#include "eval/ruler_build.h"
#include "eval/words.h"

namespace spot::ruler {
namespace {

enum class Haystack { noise, essay, needles };

struct Shape {
  Haystack haystack;
  bool uuid_keys, uuid_values;
  int64_t keys, values_per_key, queries;
};

Shape shape_of(RulerTask task) {
  switch (task) {
    case RulerTask::niah_single_1:
      return {Haystack::noise, false, false, 1, 1, 1};
    case RulerTask::niah_single_2:
      return {Haystack::essay, false, false, 1, 1, 1};
    case RulerTask::niah_single_3:
      return {Haystack::essay, false, true, 1, 1, 1};
    case RulerTask::niah_multikey_1:
      return {Haystack::essay, false, false, 4, 1, 1};
    case RulerTask::niah_multikey_2:
      return {Haystack::needles, false, false, 1, 1, 1};
    case RulerTask::niah_multikey_3:
      return {Haystack::needles, true, true, 1, 1, 1};
    case RulerTask::niah_multivalue:
      return {Haystack::essay, false, false, 1, 4, 1};
    case RulerTask::niah_multiquery:
      return {Haystack::essay, false, false, 4, 1, 4};
    default:
      fail("{} is no needle task", to_string(task));
  }
}

// {kind}: number or uuid; {key}, {value}: of a needle; {query}: the keys asked for. The first of a pair is
// used when exactly one value is asked for.
struct Wording {
  std::array<const char*, 2> intro;
  const char* needle;
  std::array<const char*, 2> question, prefix;
};

constexpr std::array<Wording, kRulerWordings> kWordings = {{
    {{"A special magic {kind} is hidden in the text below. Memorise it: you will be asked for the {kind} "
      "afterwards.\n",
      "Some special magic {kind}s are hidden in the text below. Memorise them: you will be asked for the "
      "{kind}s afterwards.\n"},
     "One of the special magic {kind}s for {key} is: {value}.",
     {"What is the special magic {kind} for {query} that the text above mentions?",
      "What are all the special magic {kind}s for {query} that the text above mentions?"},
     {" The special magic {kind} for {query} mentioned in the provided text is",
      " The special magic {kind}s for {query} mentioned in the provided text are"}},
    {{"Somewhere in the following pages a record with a {kind} has been filed. Keep it in mind, a question "
      "about it follows.\n",
      "Somewhere in the following pages records with {kind}s have been filed. Keep them in mind, a question "
      "about them follows.\n"},
     "For the record: the {kind} filed under the name {key} is {value}.",
     {"Which {kind} has been filed under the name {query}?",
      "Which {kind}s have been filed under the name {query}?"},
     {" The {kind} filed under the name {query} is", " The {kind}s filed under the name {query} are"}},
    {{"Read this text with care. It tells you what to reply when somebody asks a certain thing of you.\n",
      "Read this text with care. It tells you what to reply when somebody asks certain things of you.\n"},
     "Whoever asks you about {key} must get the {kind} {value} as a reply.",
     {"Somebody asks you about {query}. Which {kind} must they get as a reply?",
      "Somebody asks you about {query}. Which {kind}s must they get as a reply?"},
     {" When asked about {query}, the {kind} to reply with is",
      " When asked about {query}, the {kind}s to reply with are"}},
    {{"One line of a ledger got mixed into the text below. Look for its {kind}.\n",
      "Some lines of a ledger got mixed into the text below. Look for their {kind}s.\n"},
     "In the ledger, {value} stands as the {kind} beside the entry {key}.",
     {"Look up {query} in the ledger: which {kind} stands beside it?",
      "Look up {query} in the ledger: which {kind}s stand beside that?"},
     {" In the ledger, the {kind} beside {query} is", " In the ledger, the {kind}s beside {query} are"}},
}};

std::string uuid4(RulerRandom& random) {
  const uint64_t high = (random.bits() & ~0xf000ull) | 0x4000ull;       // version 4
  const uint64_t low = (random.bits() & ~(3ull << 62)) | (2ull << 62);  // RFC 4122 variant
  return fmt::format("{:08x}-{:04x}-{:04x}-{:04x}-{:012x}", high >> 32, high >> 16 & 0xffff, high & 0xffff,
                     low >> 48, low & 0xffffffffffffull);
}

// Keys and values that do not repeat within a prompt.
class Draws {
 public:
  Draws(const Shape& shape, int version, RulerRandom& random)
      : shape_(shape),
        adjectives_(version == 1 ? adjectives() : english_words().adjectives),
        nouns_(version == 1 ? nouns() : english_words().nouns),
        random_(random) {}

  std::string key() {
    return fresh([&] {
      if (shape_.uuid_keys) return uuid4(random_);
      const std::string adjective =
          random_.pick(adjectives_);  // one draw a statement: their order is then fixed
      return adjective + "-" + random_.pick(nouns_);
    });
  }
  std::string value() {
    return fresh([&] {
      return shape_.uuid_values ? uuid4(random_) : std::to_string(1000000 + random_.below(9000000));
    });
  }

 private:
  template <typename Make>
  std::string fresh(Make make) {
    for (;;) {
      std::string made = make();
      if (used_.insert(made).second) return made;
    }
  }

  const Shape& shape_;
  const std::vector<std::string>&adjectives_, &nouns_;
  RulerRandom& random_;
  std::set<std::string> used_;
};

// Where `count` needles go among the units: before units[positions[i]], ascending.
std::vector<int64_t> positions(const Request& request, const Shape& shape,
                               const std::vector<std::string>& units, int64_t count) {
  const auto size = static_cast<int64_t>(units.size());
  if (!std::isnan(request.depth)) {
    // The boundary nearest to the asked share of characters.
    size_t all = 0;
    for (const std::string& unit : units) all += unit.size();
    const double wanted = request.depth * static_cast<double>(all);
    double before = 0;
    int64_t at = 0;
    for (; at < size; ++at) {
      const auto next = static_cast<double>(units[static_cast<size_t>(at)].size());
      if (before + next / 2 > wanted) break;
      before += next;
    }
    return {at};
  }
  if (shape.haystack != Haystack::essay) return request.random.sample(size, count);
  // RULER's grid for essays: 40 depths from 0 to 100 percent, rounded.
  std::vector<int64_t> at;
  for (int64_t point : request.random.sample(40, count)) at.push_back(size * ((200 * point + 39) / 78) / 100);
  return at;
}

}  // namespace

Draft build_niah(const Request& request) {
  const Shape shape = shape_of(request.task);
  RulerRandom& random = request.random;
  const Wording& words = kWordings.at(static_cast<size_t>(request.wording));
  Draws draws(shape, request.version, random);
  const std::string kind = shape.uuid_values ? "uuid" : "number";
  auto needle = [&](const std::string& key, const std::string& value) {
    return fill(words.needle, {{"kind", kind}, {"key", key}, {"value", value}});
  };

  Draft draft;
  std::vector<std::string> needles, queries;
  for (int64_t k = 0; k < shape.keys; ++k) {
    const std::string key = draws.key();
    for (int64_t v = 0; v < shape.values_per_key; ++v) {
      const std::string value = draws.value();
      needles.push_back(needle(key, value));
      if (k < shape.queries) draft.references.push_back(value);
    }
    if (k < shape.queries) queries.push_back(key);
  }
  random.shuffle(needles);

  std::vector<std::string> units;
  switch (shape.haystack) {
    case Haystack::noise:
      units.assign(static_cast<size_t>(request.size), kNoise);
      break;
    case Haystack::essay: {
      const auto first = random.below(static_cast<int64_t>(request.essay.sentence_starts.size()));
      units = request.essay.sentences(first, request.size);
      break;
    }
    case Haystack::needles:
      for (int64_t i = 0; i < request.size; ++i) {
        const std::string key = draws.key();
        units.push_back(needle(key, draws.value()));
      }
  }
  const char* separator = shape.haystack == Haystack::essay ? " " : "\n";
  const auto at = positions(request, shape, units, static_cast<int64_t>(needles.size()));
  std::string haystack;
  size_t before = 0, next = 0;
  auto append = [&](const std::string& text) { haystack += (haystack.empty() ? "" : separator) + text; };
  for (size_t unit = 0; unit <= units.size(); ++unit) {
    for (; next < at.size() && at[next] == static_cast<int64_t>(unit); ++next)
      before = haystack.size(), append(needles[next]);
    if (unit < units.size()) append(units[unit]);
  }
  if (needles.size() == 1) {
    const size_t rest = haystack.size() - needles[0].size() - 1;  // without the needle and its separator
    draft.depth = static_cast<double>(before) / static_cast<double>(rest);
  }

  const size_t several = draft.references.size() > 1 ? 1 : 0;
  const std::string query = enumerate(queries);
  draft.context = fill(words.intro.at(several), {{"kind", kind}}) + haystack + "\n";
  draft.question = fill(words.question.at(several), {{"kind", kind}, {"query", query}});
  draft.answer_prefix = fill(words.prefix.at(several), {{"kind", kind}, {"query", query}});
  return draft;
}

}  // namespace spot::ruler

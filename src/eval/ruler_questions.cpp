// Question answering over invented documents: one gold document (qa_1) or two to be joined (qa_2), among
// distractors.
#include <fmt/format.h>

#include "eval/ruler_build.h"
#include "eval/words.h"

namespace spot::ruler {
namespace {

struct Person {
  std::string first, last, birth_town, teacher, institution;
  std::string name() const { return first + " " + last; }
};
struct Institution {
  std::string name, town, founder, director;
};
struct Town {
  std::string name, river, mayor;
};

class World {
 public:
  explicit World(RulerRandom& random) : random_(random), names_(random) {}

  std::string place() { return names_.next(); }
  std::string full_name() {
    const std::string first = names_.next();
    return first + " " + names_.next();
  }
  std::string institution_name() {
    static const std::vector<std::string> kinds = {"Observatory", "Library", "Museum",
                                                   "Academy",     "Theatre", "Hospital"};
    const std::string name = names_.next();
    return name + " " + random_.pick(kinds);
  }

  Person person() {
    Person made;
    made.first = names_.next(), made.last = names_.next(), made.birth_town = place();
    made.teacher = full_name(), made.institution = institution_name();
    return made;
  }
  Institution institution() {
    Institution made;
    made.name = institution_name(), made.town = place(), made.founder = full_name(),
    made.director = full_name();
    return made;
  }
  Town town() {
    Town made;
    made.name = place(), made.river = place(), made.mayor = full_name();
    return made;
  }

  std::string document(const Person& who) {
    return write(who.name(),
                 {who.name() + " was born in the town of " + who.birth_town + " in {year}.",
                  who.last + " learned the trade from " + who.teacher +
                      ", whose workshop was known far beyond the region.",
                  "For {number} years " + who.last + " worked at the " + who.institution + "."},
                 {"Friends remember that " + who.last + " kept {thing} on the desk.",
                  "In {year} a drawing of {thing} brought " + who.last + " some fame.",
                  who.last + " used to say that every {noun} deserves {thing}.",
                  "Two letters of that time tell of a long journey with {thing}.",
                  "There is still {thing} in use that " + who.last + " once repaired."});
  }
  std::string document(const Institution& what) {
    return write("The " + what.name,
                 {"The " + what.name + " stands in the town of " + what.town + ".",
                  "It was founded in {year} by " + what.founder + ".",
                  "Its first director was " + what.director + "."},
                 {"Visitors come above all to see {thing} in the entrance hall.",
                  "In {year} fire broke out, and only {thing} could be saved.",
                  "Its emblem shows {thing} above a {noun}.",
                  "For {number} years the cellar held nothing but {thing}.",
                  "By the gate, {thing} reminds of its early days."});
  }
  std::string document(const Town& where) {
    return write(where.name,
                 {where.name + " is a town on the river " + where.river + ".",
                  "The mayor of " + where.name + " is " + where.mayor + "."},
                 {"Around {year} some {number} thousand people lived here.",
                  "Each autumn the town holds a fair where the finest {noun} wins a prize.",
                  "Its coat of arms shows {thing}.", "The oldest house is named after {thing}.",
                  "Guests are advised to see {thing} behind the market."});
  }
  std::string distractor() {
    switch (random_.below(3)) {
      case 0:
        return document(person());
      case 1:
        return document(institution());
      default:
        return document(town());
    }
  }

 private:
  // The first fact opens the document; the others stand among the remarks in any order.
  std::string write(const std::string& title, const std::vector<std::string>& facts,
                    const std::vector<std::string>& remarks) {
    std::vector<std::string> rest(facts.begin() + 1, facts.end());
    rest.insert(rest.end(), remarks.begin(), remarks.end());
    random_.shuffle(rest);
    std::string text = title + "\n" + finish(facts[0]);
    for (const std::string& sentence : rest) text += " " + finish(sentence);
    return text;
  }
  // Puts drawn details in place; one draw a statement, so that their order is fixed.
  std::string finish(const std::string& sentence) {
    const std::string year = std::to_string(1700 + random_.below(290));
    const std::string number = std::to_string(3 + random_.below(57));
    const std::string noun = random_.pick(nouns());
    const std::string adjective = random_.pick(adjectives());
    const bool vowel = std::string("aeiou").find(adjective[0]) != std::string::npos;
    const std::string thing = (vowel ? "an " : "a ") + adjective + " " + random_.pick(nouns());
    return fill(sentence, {{"year", year}, {"number", number}, {"noun", noun}, {"thing", thing}});
  }

  RulerRandom& random_;
  NameSource names_;
};

struct Case {
  std::string question, answer;
  std::vector<std::string> gold;  // documents
};

Case one_hop(World& world, RulerRandom& random) {
  switch (random.below(3)) {
    case 0: {
      const Person who = world.person();
      const std::string document = world.document(who);
      switch (random.below(3)) {
        case 0:
          return {fmt::format("In which town was {} born?", who.name()), who.birth_town, {document}};
        case 1:
          return {fmt::format("From whom did {} learn the trade?", who.name()), who.teacher, {document}};
        default:
          return {fmt::format("At which institution did {} work?", who.name()), who.institution, {document}};
      }
    }
    case 1: {
      const Institution what = world.institution();
      const std::string document = world.document(what);
      switch (random.below(3)) {
        case 0:
          return {fmt::format("In which town does the {} stand?", what.name), what.town, {document}};
        case 1:
          return {fmt::format("Who founded the {}?", what.name), what.founder, {document}};
        default:
          return {fmt::format("Who was the first director of the {}?", what.name), what.director, {document}};
      }
    }
    default: {
      const Town where = world.town();
      const std::string document = world.document(where);
      if (random.below(2) == 0)
        return {fmt::format("On which river does the town of {} lie?", where.name), where.river, {document}};
      return {fmt::format("Who is the mayor of {}?", where.name), where.mayor, {document}};
    }
  }
}

Case two_hops(World& world, RulerRandom& random) {
  const Person who = world.person();
  const std::string first = world.document(who);
  if (random.below(2) == 0) {
    Institution what = world.institution();
    what.name = who.institution;
    const std::string second = world.document(what);
    switch (random.below(3)) {
      case 0:
        return {fmt::format("In which town does the institution stand where {} worked?", who.name()),
                what.town,
                {first, second}};
      case 1:
        return {fmt::format("Who founded the institution where {} worked?", who.name()),
                what.founder,
                {first, second}};
      default:
        return {fmt::format("Who was the first director of the institution where {} worked?", who.name()),
                what.director,
                {first, second}};
    }
  }
  Town where = world.town();
  where.name = who.birth_town;
  const std::string second = world.document(where);
  if (random.below(2) == 0)
    return {fmt::format("On which river lies the town where {} was born?", who.name()),
            where.river,
            {first, second}};
  return {fmt::format("Who is the mayor of the town where {} was born?", who.name()),
          where.mayor,
          {first, second}};
}

}  // namespace

Draft build_questions(const Request& request) {
  RulerRandom& random = request.random;
  World world(random);
  const Case made = request.task == RulerTask::qa_1 ? one_hop(world, random) : two_hops(world, random);
  std::vector<std::string> documents = made.gold;
  while (static_cast<int64_t>(documents.size()) < request.size) documents.push_back(world.distractor());
  random.shuffle(documents);

  const std::string instruction = "Answer the question from the documents. Give nothing but the answer.\n\n";
  Draft draft;
  draft.context = instruction;
  for (size_t i = 0; i < documents.size(); ++i)
    draft.context += fmt::format("Document {}:\n{}\n\n", i + 1, documents[i]);
  draft.question = instruction + "Question: " + made.question;
  draft.answer_prefix = " Answer:";
  draft.references = {made.answer};
  return draft;
}

}  // namespace spot::ruler

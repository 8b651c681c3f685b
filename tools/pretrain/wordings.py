"""How needles are stated and asked for: a grammar for training, and wordings that training never sees.

A pattern is a string with {key}, {value}, {query} (the keys asked for) and {kind} ("number", "uuid", ...) in it. Each
placeholder but {kind} stands after a space or at the start of a line, so that a pattern can be tokenised in parts.
"""

import dataclasses
import random
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Wording:
    """intro, question and prefix in two forms: one value is asked for, or several."""

    intro: tuple[str, str]
    needle: str
    question: tuple[str, str]
    prefix: tuple[str, str]


# The wordings of `spot eval`'s needle tasks (src/eval/ruler_niah.cpp). The first is in the training rows.
SUITE = [
    Wording(
        ("A special magic {kind} is hidden in the text below. Memorise it: you will be asked for the {kind} afterwards.\n",
         "Some special magic {kind}s are hidden in the text below. Memorise them: you will be asked for the {kind}s afterwards.\n"),
        "One of the special magic {kind}s for {key} is: {value}.",
        ("What is the special magic {kind} for {query} that the text above mentions?",
         "What are all the special magic {kind}s for {query} that the text above mentions?"),
        (" The special magic {kind} for {query} mentioned in the provided text is",
         " The special magic {kind}s for {query} mentioned in the provided text are")),
    Wording(
        ("Somewhere in the following pages a record with a {kind} has been filed. Keep it in mind, a question about it follows.\n",
         "Somewhere in the following pages records with {kind}s have been filed. Keep them in mind, a question about them follows.\n"),
        "For the record: the {kind} filed under the name {key} is {value}.",
        ("Which {kind} has been filed under the name {query}?", "Which {kind}s have been filed under the name {query}?"),
        (" The {kind} filed under the name {query} is", " The {kind}s filed under the name {query} are")),
    Wording(
        ("Read this text with care. It tells you what to reply when somebody asks a certain thing of you.\n",
         "Read this text with care. It tells you what to reply when somebody asks certain things of you.\n"),
        "Whoever asks you about {key} must get the {kind} {value} as a reply.",
        ("Somebody asks you about {query}. Which {kind} must they get as a reply?",
         "Somebody asks you about {query}. Which {kind}s must they get as a reply?"),
        (" When asked about {query}, the {kind} to reply with is", " When asked about {query}, the {kind}s to reply with are")),
    Wording(
        ("One line of a ledger got mixed into the text below. Look for its {kind}.\n",
         "Some lines of a ledger got mixed into the text below. Look for their {kind}s.\n"),
        "In the ledger, {value} stands as the {kind} beside the entry {key}.",
        ("Look up {query} in the ledger: which {kind} stands beside it?",
         "Look up {query} in the ledger: which {kind}s stand beside that?"),
        (" In the ledger, the {kind} beside {query} is", " In the ledger, the {kind}s beside {query} are")),
]
SUITE_TRAINED, SUITE_HELD_OUT = SUITE[:1], SUITE[1:]

# Wordings of our own that training never sees either.
OWN_HELD_OUT = [
    Wording(
        ("A traveller left a {kind} in this story. Watch for it.\n", "A traveller left some {kind}s in this story. Watch for them.\n"),
        "The traveller called {key} wrote down the {kind} {value} at dusk.",
        ("Which {kind} did the traveller called {query} write down?", "Which {kind}s did the traveller called {query} write down?"),
        (" The traveller called {query} wrote down the {kind}", " The traveller called {query} wrote down the {kind}s")),
    Wording(
        ("Parcels are mentioned below. Mind their labels.\n", "Parcels are mentioned below. Mind all of their labels.\n"),
        "On the parcel meant for {key} somebody glued the label {value}.",
        ("What label did somebody glue on the parcel meant for {query}?", "What labels did somebody glue on the parcel meant for {query}?"),
        (" On the parcel meant for {query} there was the label", " On the parcel meant for {query} there were the labels")),
    Wording(
        ("Mind the stamps in what follows.\n", "Mind all stamps in what follows.\n"),
        "With {value} they stamped whatever came from {key} that winter.",
        ("With what did they stamp things from {query}?", "With what did they stamp things from {query}?"),
        (" Things from {query} that winter were stamped with", " Things from {query} that winter were stamped with")),
]
# Further ones, written after the scenes below; when draw_glue was added, it was known how a model without it answers them.
FRESH_HELD_OUT = [
    Wording(
        ("An auction is reported below. Mind the prices.\n", "An auction is reported below. Mind all prices.\n"),
        "At the auction, lot {key} went for {value} in the end.",
        ("For what did lot {query} go at the auction?", "For what did lot {query} go at the auction?"),
        (" At the auction, lot {query} went for", " At the auction, lot {query} went for")),
    Wording(
        ("A choir is mentioned in what follows.\n", "A choir is mentioned several times in what follows.\n"),
        "It was {value} that the choir sang while {key} climbed the stairs.",
        ("What did the choir sing while {query} climbed the stairs?", "What did the choir sing while {query} climbed the stairs?"),
        (" While {query} climbed the stairs the choir sang", " While {query} climbed the stairs the choir sang")),
    Wording(
        ("Neighbours get things mixed up in this text.\n", "Neighbours get many things mixed up in this text.\n"),
        "My neighbour could never tell {key} and the {kind} {value} apart.",
        ("From which {kind} could my neighbour never tell {query} apart?", "From which {kind}s could my neighbour never tell {query} apart?"),
        (" My neighbour could not tell {query} from the {kind}", " My neighbour could not tell {query} from the {kind}s")),
]
# Written before the shipped tiny-qwen3.5 was trained, and not changed since.
LATER_HELD_OUT = [
    Wording(
        ("A miller pays for grain in this text.\n", "A miller pays for grain several times in this text.\n"),
        "Down by the mill {value} is what the miller paid for {key}.",
        ("What did the miller pay for {query}?", "What did the miller pay for {query}?"),
        (" For {query} the miller paid", " For {query} the miller paid")),
    Wording(
        ("There is much knitting in this text.\n", "There is very much knitting in this text.\n"),
        "Grandmother knitted {value} into the scarf that {key} wears.",
        ("What did grandmother knit into the scarf of {query}?", "What did grandmother knit into the scarf of {query}?"),
        (" Into the scarf of {query} grandmother knitted", " Into the scarf of {query} grandmother knitted")),
    Wording(
        ("Telegrams are sent below. Mind how they begin.\n", "Telegrams are sent below. Mind how all of them begin.\n"),
        "A telegram began with {value} and went straight to {key}.",
        ("With what did the telegram to {query} begin?", "With what did the telegrams to {query} begin?"),
        (" The telegram to {query} began with", " The telegrams to {query} began with")),
    Wording(
        ("Bottles with a {kind} turn up in this text.\n", "Bottles with {kind}s turn up in this text.\n"),
        "Every bottle from {key} bears the {kind} {value} on its cork.",
        ("Which {kind} do bottles from {query} bear on their cork?", "Which {kind}s do bottles from {query} bear on their cork?"),
        (" On its cork, a bottle from {query} bears the {kind}", " On its cork, a bottle from {query} bears the {kind}s")),
    Wording(
        ("Ferries leave a pier in this text.\n", "Many ferries leave a pier in this text.\n"),
        "Ferry {key} leaves the pier at mark {value} this week.",
        ("At which mark does ferry {query} leave the pier?", "At which marks does ferry {query} leave the pier?"),
        (" Ferry {query} leaves the pier at mark", " Ferry {query} leaves the pier at marks")),
    Wording(
        ("Some survived a storm with their sheep.\n", "Many survived a storm with their sheep.\n"),
        "Only {key} survived the storm, with {value} sheep on board.",
        ("With how many sheep on board did {query} survive the storm?", "With how many sheep on board did {query} survive the storm?"),
        (" The number of sheep with which {query} survived the storm is", " The numbers of sheep with which {query} survived the storm are")),
]
# Strings by which a test recognises a held-out wording.
HELD_OUT_MARKS = ["filed under the name", "Whoever asks you", "ledger", "as a reply", "he traveller called", "parcel meant for",
                  "they stamp", "auction", "choir", "neighbour",
                  "miller pa", "randmother knit", "elegram", "its cork", "their cork", "the pier", "the storm"]

NOUNS = ["special magic {kind}", "secret {kind}", "{kind}", "registered {kind}", "access {kind}", "reference {kind}", "hidden {kind}",
         "private {kind}", "official {kind}", "serial {kind}", "pass {kind}", "lucky {kind}", "internal {kind}", "final {kind}",
         "correct {kind}", "stored {kind}", "magic {kind}", "confirmed {kind}"]
KIND_WORDS = {"number": ["number", "value", "code", "key", "figure"], "uuid": ["uuid", "identifier", "id", "token", "value"],
              "word": ["word", "name", "term", "value", "label"], "code": ["code", "token", "value", "key", "tag"]}
OPENERS = ["", "", "", "", "", "", "Note: ", "By the way, ", "Remember that ", "It is known that ", "According to the notes, ",
           "As agreed, ", "One more thing: ", "Fact: ", "Please note that ", "They say that ", "We were told that ", "Important: ",
           "Today we learned that ", "For later use: "]
# {noun} and {key}; a connector and the value follow.
SUBJECTS = ["the {noun} for {key}", "the {noun} of {key}", "the {noun} assigned to {key}", "the {noun} given to {key}",
            "the {noun} that belongs to {key}", "for {key} the {noun}", "one of the {noun}s for {key}", "one {noun} of {key}",
            "the {noun} at {key}", "the {noun} linked to {key}", "the {noun} chosen by {key}", "the {noun} used with {key}",
            "with {key} the {noun}", "in the case of {key} the {noun}", "the {noun} we keep for {key}", "the {noun} behind {key}"]
CONNECTORS = [" is", " is:", " is now", " was", " equals", " =", " reads", " has been set to", " was chosen as", " turned out to be",
              " will be", " is simply", " became", " is recorded as", " has the form", " shall be", " is still", " -", " =>", ":"]
ENDINGS = [".", ".", ".", ".", ".", ";", "", " from now on.", " and nothing else.", " as always.", " until further notice.",
           ", remember it.", ", they said.", " for the time being.", ". Do not forget it.", " (confirmed)."]
# Complete statements whose value comes first, or whose order differs.
STATEMENTS = ["{value} is the {noun} of {key}", "use {value} for {key}", "we gave the {noun} {value} to {key}",
              "the value {value} goes with {key}", "{value} belongs to {key}", "if you need {key} then take {value}",
              "set {key} to {value}", "they wrote {value} next to {key}", "{key} has the {noun} {value}", "{key} received {value}",
              "{key} was sold together with {value}", "whenever {key} is named you should say {value}", "the pair {key} and {value}",
              "{value} was found beside {key}", "someone replaced {key} by {value}", "{key} carries the {noun} {value}",
              "ask for {key} and you get the {noun} {value}", "among others {value} stands for {key}", "{key} {value}", "{key}: {value}",
              "{key} = {value}", "{key} -> {value}"]
QUESTION_OPENINGS = ["what is the {noun} for {query}", "what is the {noun} of {query}", "which {noun} belongs to {query}",
                     "tell me the {noun} for {query}", "give the {noun} of {query}", "find the {noun} that goes with {query}",
                     "which {noun} was assigned to {query}", "what {noun} does the text state for {query}", "name the {noun} of {query}",
                     "look for {query} and say which {noun} it has", "I need the {noun} for {query}", "what did {query} get",
                     "what goes with {query}", "which {noun} is linked to {query}", "state the {noun} used with {query}",
                     "do you remember the {noun} of {query}", "what was said about {query}", "recall {query}", "get {query}",
                     "can you repeat the {noun} for {query}"]
QUESTION_OPENINGS_MANY = ["what are all the {noun}s for {query}", "list the {noun}s of {query}", "which {noun}s belong to {query}",
                          "tell me all {noun}s for {query}", "give every {noun} of {query}", "find the {noun}s that go with {query}",
                          "name the {noun}s of {query}", "I need the {noun}s for {query}", "which {noun}s were assigned to {query}",
                          "state all {noun}s that the text has for {query}"]
QUESTION_CLOSINGS = ["?", "?", "?", " in the text above?", " mentioned before?", " according to the passage?", ".", " please?",
                     " in the provided text?", " that was given earlier?", " as stated above?", ":"]
LEADS = ["", "", "", "Question: ", "Q: ", "Now: ", "Task: "]
# {noun} and {query}; the answer follows.
PREFIXES = [" The {noun} for {query} mentioned in the text is", " The {noun} for {query} is", " The {noun} of {query} is:",
            " The {noun} for {query} that the passage gives is", " Answer: the {noun} of {query} is", " For {query} it is",
            " {query} has the {noun}", " The text says that the {noun} of {query} is", " In the text, {query} goes with", " {query}:",
            " {query} =", " According to the text, the {noun} linked to {query} must be", " As for {query}, the answer is",
            " What belongs to {query} is", " Regarding {query}, the text above states", " The one for {query} in the given text is the {noun}",
            " Answer:", " A:", " It is", " The answer is", "\nAnswer:", "\nThe {noun} is"]
PREFIXES_MANY = [" The {noun}s for {query} mentioned in the text are", " The {noun}s for {query} are", " The {noun}s of {query} are:",
                 " Answer: the {noun}s of {query} are", " For {query} they are", " The text says that the {noun}s of {query} are",
                 " In the text, {query} goes with", " According to the text, the {noun}s linked to {query} must be", " {query}:",
                 " Regarding {query}, the text above states", " Answer:", " They are", "\nAnswer:"]
INTROS = ["", "", "A {noun} is hidden in this text. Remember it.\n", "Read the text and keep the facts in mind.\n",
          "The following text contains some facts. You will be asked about them.\n", "Below is a long text. Pay attention to each {noun}.\n",
          "Memorise the {noun}s that occur in this text. Questions follow.\n", "Text:\n", "Notes:\n", "Here is what we know.\n"]


# Statements that tell something, with a question and an answer prefix of their own; {role} is a word for what has the key, or nothing.
# Where the value stands first, nothing behind the key says it: the model has to look back from there.
SCENES = [
    ("with {value} they signed all letters from {role}{key}", "with what were the letters from {query} signed", " Letters from {query} were signed with"),
    ("by {value} one recognised everything that {role}{key} had sent", "by what did one recognise things that {query} had sent",
     " What {query} had sent was recognised by"),
    ("{value} was painted on the door of {role}{key}", "what was painted on the door of {query}", " On the door of {query} was painted"),
    ("under {value} you find whatever {role}{key} left behind", "under what do you find the things {query} left", " Things that {query} left are under"),
    ("the guard said {value} and let {role}{key} pass", "what did the guard say before {query} passed", " To let {query} pass the guard said"),
    ("at noon {value} appeared as the {noun} next to {role}{key}", "which {noun} appeared next to {query}", " The {noun} next to {query} was"),
    ("on a list, {value} is given as the {noun} of {role}{key}", "which {noun} does the list give for {query}", " On the list, the {noun} of {query} is"),
    ("in the drawer lay {value}, the {noun} of {role}{key}", "which {noun} of {query} lay in the drawer", " In the drawer, the {noun} of {query} was"),
    ("someone carved {value} into the desk of {role}{key}", "what did someone carve into the desk of {query}", " Into the desk of {query} someone carved"),
    ("using {value} we opened the box that came with {role}{key}", "using what did we open the box of {query}", " The box of {query} was opened using"),
    ("the number {value} hung over the bed of {role}{key}", "what hung over the bed of {query}", " Over the bed of {query} hung the number"),
    ("the card says {value} and below that {role}{key}", "what does the card say above {query}", " Above {query} the card says"),
    ("{value} paid the rent for {role}{key}", "what paid the rent for {query}", " The rent for {query} was paid by"),
    ("they shouted {value} as soon as they saw {role}{key}", "what did they shout at the sight of {query}", " At the sight of {query} they shouted"),
    ("for {value} you could buy the house of {role}{key}", "for what could you buy the house of {query}", " The house of {query} was to be had for"),
    ("as the {noun} they proposed {value} to {role}{key}", "which {noun} did they propose to {query}", " To {query} they proposed the {noun}"),
    ("{value} stood there as the {noun}, right beside {role}{key}", "which {noun} stood right beside {query}", " The {noun} right beside {query} was"),
    ("a page with {value} was torn out by {role}{key}", "what was on the page torn out by {query}", " The page torn out by {query} had"),
    ("with {value} the clerk marked each box from {role}{key}", "with what did the clerk mark boxes from {query}",
     " Each box from {query} was marked by the clerk with"),
    ("from {value} to nothing, so went the story of {role}{key}", "from what did the story of {query} go to nothing",
     " To nothing went the story of {query}, from"),
    ("{role}{key} carried a sign that read {value}", "what did the sign of {query} read", " The sign that {query} carried read"),
    ("when {role}{key} came home the {noun} was {value}", "which {noun} was it when {query} came home", " When {query} came home the {noun} was"),
    ("{role}{key} dreamt of the {noun} {value}", "of which {noun} did {query} dream", " {query} dreamt of the {noun}"),
    ("above the gate of {role}{key} one could read {value}", "what could one read above the gate of {query}",
     " Above the gate of {query} one could read"),
    ("the clock of {role}{key} stopped at {value}", "at what did the clock of {query} stop", " The clock of {query} stopped at"),
    ("on the ticket of {role}{key} they printed the {noun} {value}", "which {noun} did they print on the ticket of {query}",
     " On the ticket of {query} they printed the {noun}"),
    ("inside the coat of {role}{key} a tailor sewed {value}", "what did a tailor sew inside the coat of {query}",
     " Inside the coat of {query} a tailor sewed"),
    ("{role}{key} asked three times for {value}", "for what did {query} ask three times", " Three times {query} asked for"),
]
ROLES = ["", "", "", "", "the sailor ", "the city of ", "our friend ", "the ship ", "a brand named ", "the farmer ", "the street of ", "project ",
         "the planet ", "somebody known as ", "the lake of ", "doctor ", "the firm ", "whoever is "]
# Scenes put together at random, so that many shapes are met instead of a list that can be learned by heart: what somebody did with or at a
# value, as (told with the preposition in front, asked for, answered), and by what it belongs to a key.
PREPOSITIONS = ["with", "by", "under", "at", "from", "using", "behind", "near", "after", "through", "against", "on", "for", "instead of", "above",
                "because of", "thanks to", "upon", "before"]
DEEDS = [("they closed the account", "close the account"), ("a clerk sealed the envelope", "seal the envelope"), ("we found the bag", "find the bag"),
         ("he opened the gate", "open the gate"), ("the crew hid all the gold", "hide all the gold"), ("one pays the whole bill", "pay the whole bill"),
         ("she locked up every letter", "lock up every letter"), ("the judge ended the case", "end the case"), ("people know the voice", "know the voice"),
         ("a boy drew the face", "draw the face"), ("the cook served the meal", "serve the meal"), ("you reach the office", "reach the office"),
         ("the police keep the file", "keep the file"), ("somebody tuned the piano", "tune the piano"), ("the tower shows the flag", "show the flag"),
         ("an editor printed the poem", "print the poem"), ("they measured anything", "measure anything"), ("I remember the day", "remember the day")]
BELONGS = ["of", "for", "from", "beside", "next to", "sent to", "in favour of", "that concerns", "written for", "on behalf of", "owned by",
           "known to", "close to", "left by", "made for", "together with", "about", "meant to please", "in the name of", "which came with"]
# "{value} is noted as the {noun} ... {key}": a whole clause between the two; then how the answer names it.
NOTED = ["is noted as", "serves as", "counts as", "was entered as", "appears as", "figures as", "passes for", "is listed as", "came up as",
         "was handed over as", "remains", "was announced as", "stood out as", "has been printed as"]
TOLD = ["should say", "has to enter", "must write down", "needs to name", "ought to give", "will want to use", "is told to take", "may choose",
        "shall bring", "had better note"]
WHEN = ["If somebody mentions {key}", "Anyone who looks for {key}", "Everybody who writes to {key}", "A person that meets {key}", "People who call {key}",
        "Each visitor of {key}", "One who thinks of {key}", "A guest that wants {key}", "The man who hears of {key}"]
ANSWER_VERBS = ["say", "enter", "write down", "name", "give", "use", "take", "choose", "bring", "note", "remember", "send", "look for", "show"]
TAILS = ["", "", "", "", " in spring", " two years ago", " on a Monday", " and left", " without a word", " before noon", " at the harbour",
         " that day", " for the last time", " and nobody minded", " at once", " back then"]


def _upper(text: str) -> str:
    return text if text.startswith("{") else text[:1].upper() + text[1:]


def draw_scene(rng: random.Random) -> tuple[str, str, str]:
    """Statement, question and answer prefix of a scene that is put together at random; most have the value first."""
    shape = rng.random()
    if shape < 0.4:  # a deed with, under, behind ... the value, for what has the key
        preposition, (told, asked), belongs = rng.choice(PREPOSITIONS), rng.choice(DEEDS), rng.choice(BELONGS)
        if rng.random() < 0.8:
            statement = f"{preposition} {{value}} {told} {belongs} {{role}}{{key}}"
        else:
            statement = f"{told} {belongs} {{role}}{{key}} {preposition} {{value}}"
        question = rng.choice((f"{preposition} what did they {asked} {belongs} {{query}}", f"what did they {asked} {belongs} {{query}} {preposition}"))
        prefix = rng.choice((f" {_upper(told)} {belongs} {{query}} {preposition}", f" To {asked} {belongs} {{query}} it took",
                             f" They did {asked} {belongs} {{query}} {preposition}", f" What concerns {{query}} happened {preposition}"))
    elif shape < 0.7:  # the value is noted as something, a clause away from the key
        noted, belongs = rng.choice(NOTED), rng.choice(BELONGS)
        where = rng.choice(("", "", "on the third page, ", "in our books, ", "at the museum, ", "on a wall, ", "in her notes, ", "since monday, "))
        statement = f"{where}{{value}} {noted} the {{noun}} {belongs} {{role}}{{key}}"
        question = rng.choice((f"which {{noun}} {belongs} {{query}} is it", f"{where}what {noted} the {{noun}} {belongs} {{query}}",
                               "look at {query} and tell which {noun} there is"))
        prefix = rng.choice((f" The {{noun}} {belongs} {{query}} is", f" {_upper(where)}the {{noun}} {belongs} {{query}} is", f" As the {{noun}} {belongs} {{query}} we have",
                             f" Seen {belongs} {{query}}, the {{noun}} is"))
    else:  # what one does about the key, with the value
        when, told = rng.choice(WHEN), rng.choice(TOLD)
        statement = f"{when} {told} the {{noun}} {{value}}" if rng.random() < 0.6 else f"{{value}} is the {{noun}} one {told} about {{role}}{{key}}"
        question = rng.choice(("which {noun} is to be said about {query}", "what is one told about {query}", "what about {query}"))
        verb = rng.choice(ANSWER_VERBS)
        prefix = rng.choice((f" When it comes to {{query}}, the {{noun}} to {verb} is", f" With {{query}} in mind, the {{noun}} to {verb} is",
                             f" For those who want {{query}}, the right {{noun}} to {verb} would be", f" About {{query}} one has to {verb}",
                             f" The {{noun}} to {verb} for {{query}} is"))
    return statement, question, prefix


def draw_wording(rng: random.Random) -> Wording:
    """A wording of the training grammar; {kind} is left in it."""
    noun = rng.choice(NOUNS)
    opener = rng.choice(OPENERS)
    choice, scene = rng.random(), None
    if choice < 0.25:
        body = rng.choice(SUBJECTS) + rng.choice(CONNECTORS) + " {value}"
    elif choice < 0.45:
        body = rng.choice(STATEMENTS)
    else:
        scene = draw_scene(rng) if choice < 0.8 else rng.choice(SCENES)
        body = scene[0].replace("{role}", rng.choice(ROLES)) + rng.choice(TAILS)
    needle = opener + (body if opener and not opener.endswith(": ") else _upper(body)) + rng.choice(ENDINGS)
    lead, closing = rng.choice(LEADS), rng.choice(QUESTION_CLOSINGS)
    questions = [lead + _upper(rng.choice(openings)) + closing for openings in (QUESTION_OPENINGS, QUESTION_OPENINGS_MANY)]
    prefixes = [rng.choice(PREFIXES), rng.choice(PREFIXES_MANY)]
    if scene and rng.random() < 0.8:
        questions = [lead + _upper(scene[1]) + closing] * 2
        if rng.random() < 0.7:
            prefixes = [scene[2]] * 2
    if questions[0].endswith(":") and rng.random() < 0.3:
        prefixes = ["", ""]
    intro = rng.choice(INTROS)
    parts = [text.replace("{noun}", noun) for text in (intro, needle, *questions, *prefixes)]
    return Wording((parts[0], parts[0]), parts[1], (parts[2], parts[3]), (parts[4], parts[5]))


def draw_glue(rng: random.Random, take: Callable[[int], list[str]], value_first: float = 0.65) -> Wording:
    """Words that `take` gives, of any sense, around key and value, so that nothing but the key itself leads to the value.

    The value stands first in a share of them: more often than not, as that is harder to learn, most of all for a hybrid."""

    def some(low: int, high: int) -> str:
        return " ".join(take(rng.randint(low, high)))

    def join(*parts: str) -> str:
        return " ".join(part for part in parts if part)

    ends = [".", "", ";", ":", ","]
    first, second = ("{value}", "{key}") if rng.random() < value_first else ("{key}", "{value}")
    needle = join(some(0, 5), first, some(0, 10), second, some(0, 4)) + rng.choice(ends)
    question = _upper(join(some(0, 5), "{query}", some(0, 4))) + rng.choice(["?", ".", ":", ""])
    if rng.random() < 0.6:
        prefix = " " + join(some(0, 4), "{query}", some(0, 6))
    else:
        prefix = rng.choice(["", " " + some(1, 4)])
    intro = some(3, 10) + ".\n" if rng.random() < 0.3 else ""
    return Wording((intro, intro), needle, (question, question), (prefix, prefix))


# Variable tracking: (question, answer prefix) with {value} and {count}. The first pair is that of `spot eval`.
TRACK_INTRO = "The following text hides a chain of variable assignments. Memorise it and follow the chain.\n\n"
TRACK_SUITE = ("Question: Which variables are assigned the value {value} in the text above, directly or through others?",
               " Answer: According to the chain of variable assignments in the text above, {count} variables are assigned the value"
               " {value}, they are:")
TRACK_INTROS = ["", "Follow the assignments.\n", "Memorize and track the chains of variable assignments hidden in the following text.\n\n",
                "Variables are assigned below. Keep track of them.\n", "Text:\n"]
TRACK_QUESTIONS = ["Question: Find all variables that are assigned the value {value} in the text above.",
                   "Which variables have the value {value}?", "List every variable that holds {value}.",
                   "Find all variables assigned the value {value}.", "Name the variables equal to {value}, in order.",
                   "Question: Which names stand for {value}?", "What variables does the value {value} reach?",
                   "Q: All variables with the value {value}?"]
TRACK_PREFIXES = [" Answer: According to the text, {count} variables are assigned the value {value}, they are:", " Answer:", " They are:",
                  " The variables with the value {value} are", " The {count} variables are:", " A:",
                  " Answer: the variables assigned {value} are:", " Following the chain from {value} gives"]


def draw_tracking(rng: random.Random) -> tuple[str, str, str]:
    """intro, question and answer prefix of a variable-tracking row."""
    if rng.random() < 0.3:
        return (TRACK_INTRO, *TRACK_SUITE)
    return rng.choice(TRACK_INTROS), rng.choice(TRACK_QUESTIONS), rng.choice(TRACK_PREFIXES)

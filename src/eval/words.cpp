#include "eval/words.h"

#include <algorithm>
#include <array>
#include <sstream>
#include <string_view>

namespace spot {
namespace {

constexpr std::string_view kAdjectives =
    "able active aged agile airy alert amber ample ancient angry aquatic arctic arid ashen austere awake "
    "bare "
    "basic bent bitter black bland blank blazing bleak blond blue blunt bold bony brave brief bright brisk "
    "brittle broad bronze brown bulky bumpy busy calm candid careful careless casual caustic central cheap "
    "cheerful chilly civil classic clean clear clever cloudy clumsy coarse coastal cold compact complex "
    "copper cosmic costly cozy cranky crimson crisp crooked crude cruel curious curly cyan daily damp daring "
    "dark dazzling deep delicate dense desert devout dim distant dizzy double dry dull dusty eager early "
    "earnest earthy eastern easy elastic elegant empty endless equal exact exotic external faded faint fair "
    "faithful famous fancy fast feeble fertile festive fierce final fine firm flat flexible floral fluent "
    "fond "
    "foreign formal fragile frank free fresh friendly frosty frozen frugal full funny fuzzy gentle giant "
    "gilded "
    "glad gloomy glossy golden graceful grand grateful gray greedy green grim hairy handy happy hardy harsh "
    "hasty hazy healthy heavy helpful hollow hot huge humble humid hungry icy ideal idle immense indigo "
    "inner intact ivory jagged jealous jolly joyful keen kind lanky large late lavish lazy lean level light "
    "limber liquid lively local lofty lonely long loose loud loyal lucky lunar magnetic major marine massive "
    "mature mellow merry mighty mild minor misty mobile modern modest moist muddy mute mutual narrow native "
    "neat nervous nimble noble noisy northern numb oblong odd olive open orange orderly outer oval pale "
    "patient "
    "peaceful perfect petite placid plain playful pleasant plump polar polite portable precise pretty "
    "prickly "
    "prime private proper proud prudent purple puzzled quaint quick quiet random rapid rare raw ready real "
    "regal remote rigid ripe robust rocky rosy rough round royal rugged rural rusty sacred salty sandy "
    "scarce "
    "scarlet secret serene severe shady shaky shallow sharp shiny short shy silent silken simple sincere "
    "sleepy slender slim slippery slow sly small smart smooth snowy sober soft solar solemn solid sorry sour "
    "southern "
    "spare sparse spicy spiral splendid square stable stale stark steady steep sticky stiff stormy strange "
    "strict strong sturdy subtle sudden sullen sunny superb sweet swift tall tame tangy tart tasty tender "
    "tense "
    "thick thin thirsty thorny tidy timid tiny tired tough tranquil tropical true turquoise typical upper "
    "urban vacant vague vast verbal vibrant violet vital vivid warm wary watery wavy weak wealthy weary "
    "western wet white whole wicked wide wild wise witty wooden woolen worthy yellow young zealous";

constexpr std::string_view kNouns =
    "abbey acorn acre actor airport alarm album alley almond alphabet altar anchor angle ankle antenna anvil "
    "apple apron arch archer arena armor arrow artist atlas attic author autumn avenue award axle badge "
    "badger "
    "bag baker balcony balloon bamboo banjo banner barn barrel basin basket bat bathtub beach beacon bead "
    "beaver bell bench berry bicycle biscuit bishop blade blanket blossom board boat bonfire book boot "
    "border "
    "bottle boulder bow bowl bracelet branch bread brick bride bridge broom brother brush bucket buffalo "
    "builder bulb burrow bush butter button cabbage cabin cable cactus cake calendar camel camera camp canal "
    "candle cannon canoe canvas canyon captain caravan carpet carrot cart cashew castle cathedral cave cedar "
    "ceiling cellar cello chair chalk chapel charcoal cherry chess chestnut chimney choir church cider "
    "circle "
    "circus citizen clarinet cliff clock cloth cloud clover coast coat cobra cocoa coffee coin collar comet "
    "compass cook coral cord cottage cotton cousin cowboy crab cradle crane crater crayon creek cricket crow "
    "crown crystal cup curtain cushion dairy daisy dancer dawn deer dentist desk diary dice dinner dish "
    "doctor dolphin donkey door dove dragon drawer dream dress drum duck dune eagle easel echo eclipse elbow "
    "elephant "
    "elm ember emerald engine envelope equator fabric factory falcon family farmer fashion father feather "
    "fence "
    "fern ferry fiddle field fig finch finger fire fish flag flame flask flower flute foam fog forest fork "
    "fortress fossil fountain fox frame freight frog fruit furnace galaxy gallery garage garden garlic gate "
    "gazelle geyser ghost ginger giraffe glacier glass globe glove goat goose grain granite grape grass "
    "gravel "
    "grove guitar gull hail hammer hammock harbor harp harvest hat hawk hazel hedge helmet herb hero hill "
    "hinge honey hook horizon horn horse hotel hound hut iceberg igloo insect iron island jacket jaguar jar "
    "jasmine "
    "jelly jewel journal judge jug juice jungle kayak kennel kettle key kingdom kite kitten knight knot "
    "ladder lagoon lake lamb lamp lantern lark lava lawn leaf leather lemon lentil leopard letter library "
    "lighthouse "
    "lily lime linen lion lizard lobster locket loom lotus lumber lynx magnet mango mantle map maple marble "
    "market marsh mask mast meadow medal melon merchant meteor mill mineral mirror mist mitten moat monkey "
    "moon "
    "moose moss moth motor mountain mouse mouth museum mushroom mustard nail napkin necklace needle nest "
    "nettle "
    "nickel night noodle notebook novel nurse nutmeg oak oar oasis oboe ocean office onion opal opera orbit "
    "orchard orchid organ ostrich otter oven owl oyster paddle palace palm panda panther paper parade park "
    "parrot parsley pasture path peach peacock pear pearl pebble pelican pencil penguin pepper petal phone "
    "piano picnic pier pigeon pillar pillow pine pirate pistol planet plaza plow plum pocket poem pond pony "
    "poppy porch port potato pottery powder prairie prince printer prism pumpkin puppet puzzle pyramid "
    "quarry "
    "quartz queen quilt rabbit raccoon radar radio raft railway rain raisin raven razor reef ribbon rice "
    "ridge "
    "rifle ring river road robin robot rocket roof root rope rose ruby rudder saddle sailor salmon salt "
    "sandal "
    "sapphire satin saucer sausage scarf school scissors scout scroll sculptor seal season seed shadow shark "
    "shed shelf shell shepherd shield ship shirt shoe shore shovel shrimp shrine silk silver sister skate "
    "sketch skull sky sled slipper snail snake soap sock soldier sparrow spear spider spinach spindle spoon "
    "spring squid squirrel stairs stamp star statue steam steel stem stone storm stove straw stream street "
    "string sugar suitcase summer sunset swallow swamp swan sweater sword table tailor tambourine target "
    "teacher teapot temple tent theater thimble thistle throne thumb thunder ticket tide tiger timber toast "
    "tomato topaz torch tortoise tower town toy tractor trail train tray treasure tree trumpet tulip tunnel "
    "turkey turnip turtle tweed umbrella uncle unicorn valley vase velvet vest viking village vine vineyard "
    "viola violin volcano voyage wagon waiter wall walnut walrus warehouse waterfall wax weasel weaver wheat "
    "wheel whisker whistle widow willow window wine wing winter wizard wolf wreath wrench yacht yard yarn "
    "zebra zipper";

constexpr std::string_view kVerbs =
    "accept achieve admire adopt advise agree allow amuse announce applaud argue arrange arrive "
    "assist attach avoid bake balance become begin behave believe belong blend blink boil borrow bounce "
    "breathe "
    "bring build bury calculate carry carve celebrate chase choose clap climb collect combine compare "
    "complain "
    "compose conceal confess confirm connect consider contain continue convince count cover create cross "
    "crush decide declare decorate defend deliver depend descend describe deserve destroy detect develop dig "
    "discover "
    "discuss divide doubt drag drift drink drive earn eat employ encourage enjoy enter escape examine expand "
    "expect explain explore extend fade fetch fight find float flow fold follow forget forgive gather gaze "
    "give "
    "glide grasp greet grow guard guess guide happen hesitate hide hire hope hover hurry identify ignore "
    "imagine improve include inform inherit insist inspect invent invite join juggle jump kneel knit know "
    "laugh "
    "launch learn lend lift listen live load lower manage marry measure melt mend mention migrate mingle "
    "move "
    "multiply navigate notice obey observe obtain offer operate paint participate pause perform persuade "
    "plant polish possess pour praise preach predict prefer prepare preserve pretend prevent produce promise "
    "protect prove provide publish pull punish pursue race reach receive recognize recommend reduce reflect "
    "refuse relax release remain remember remind remove repair repeat replace reply request rescue retire "
    "return reveal rinse roam roar sail satisfy save scatter scrape scream search seem select send serve "
    "settle "
    "shake share shelter shiver shout sing sit skip sleep slide smile sneeze solve speak spend spill spread "
    "sprout squeeze stare start stay steer stir stitch stretch stroll study succeed suffer suggest supply "
    "support surprise surround survive suspect swim swing tease tell thank think throw tickle touch "
    "translate "
    "travel tremble trust try tumble twist understand unite unlock unpack vanish visit wait wake walk wander "
    "warn wash waste watch wear weave welcome whisper win wink wipe wonder work worry wrap wrestle write "
    "yawn yell";

std::vector<std::string> split(std::string_view text) {
  std::istringstream in{std::string(text)};
  std::vector<std::string> words;
  for (std::string word; in >> word;) words.push_back(word);
  return words;
}

}  // namespace

const std::vector<std::string>& adjectives() {
  static const std::vector<std::string> words = split(kAdjectives);
  return words;
}

const std::vector<std::string>& nouns() {
  static const std::vector<std::string> words = split(kNouns);
  return words;
}

const std::vector<std::string>& verbs() {
  static const std::vector<std::string> words = split(kVerbs);
  return words;
}

std::string pseudo_word(RulerRandom& random) {
  static const std::set<std::string> embedded = [] {
    std::set<std::string> all;
    for (const auto* list : {&adjectives(), &nouns(), &verbs()}) all.insert(list->begin(), list->end());
    return all;
  }();
  // c: consonant, v: vowel. Letters that English doubles or pairs oddly (c, q, w, x, y) are left out.
  constexpr std::array<std::string_view, 3> kShapes = {"cvccvcv", "cvcvcvc", "vccvcvc"};
  constexpr std::string_view kConsonants = "bdfghjklmnprstvz", kVowels = "aeiou";
  for (;;) {
    std::string word;
    for (char kind : random.pick(kShapes)) word += random.pick(kind == 'c' ? kConsonants : kVowels);
    if (embedded.count(word) == 0) return word;
  }
}

std::vector<std::string> plain_words() {
  std::vector<std::string> words;
  for (const auto* list : {&adjectives(), &nouns(), &verbs()})
    words.insert(words.end(), list->begin(), list->end());
  return words;
}

std::vector<std::string> distinct_words(int64_t count, std::vector<std::string> words, RulerRandom& random) {
  const auto wanted = static_cast<size_t>(count);
  std::set<std::string> invented(words.begin(), words.end());
  while (words.size() < wanted) {
    std::string word = pseudo_word(random);
    if (invented.insert(word).second) words.push_back(std::move(word));
  }
  random.shuffle(words);
  words.resize(wanted);
  return words;
}

std::string NameSource::next() {
  for (;;) {
    std::string name = pseudo_word(random_);
    if (!used_.insert(name).second) continue;
    name[0] = static_cast<char>(name[0] - 'a' + 'A');
    return name;
  }
}

}  // namespace spot

#include <gtest/gtest.h>
#include <stdlib.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <random>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "distill/data.h"
#include "distill/documents.h"
#include "text/unicode.h"

namespace spot {
namespace {
namespace fs = std::filesystem;

class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "spot_data_XXXXXX").string();
    path = ::mkdtemp(name.data());
  }
  ~Folder() { remove_folder(path); }
  fs::path write(const std::string& name, const std::string& bytes) const {
    fs::create_directories((path / name).parent_path());
    std::ofstream(path / name, std::ios::binary) << bytes;
    return path / name;
  }
  fs::path path;
};

std::string gzipped(const std::string& bytes, const fs::path& scratch) {
  gzFile file = gzopen(scratch.c_str(), "wb");
  gzwrite(file, bytes.data(), static_cast<unsigned>(bytes.size()));
  gzclose(file);
  std::ifstream in(scratch, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::string zstandard(const std::string& bytes) {
  std::string out(ZSTD_compressBound(bytes.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), bytes.data(), bytes.size(), 3));
  return out;
}

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

std::mt19937_64 fresh_engine() {
  const uint64_t seed = std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  return std::mt19937_64(seed);
}

constexpr int32_t kEos = 256;
std::vector<int32_t> bytes_as_tokens(const std::string& text) {
  std::vector<int32_t> tokens;
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

std::vector<std::string> all_documents(const fs::path& path) {
  DocumentReader reader(path);
  std::vector<std::string> documents;
  for (std::string text; reader.next(text);) documents.push_back(text);
  return documents;
}

std::string random_text(std::mt19937_64& engine, size_t size) {
  static const std::vector<std::string> pieces = {"a", "spot", " ", "\n", "é", "漢", "🙂", "0"};
  std::string text;
  while (text.size() < size) text += pieces[engine() % pieces.size()];
  return text;
}

// Documents of a training run's first tokens, by the end tokens between them.
std::vector<std::string> documents_of(TrainingData& data, int64_t sequences) {
  std::vector<std::string> documents(1);
  for (int64_t i = 0; i < sequences; ++i)
    for (const int32_t token : data.next().tokens) {
      if (token == kEos) {
        documents.emplace_back();
      } else {
        documents.back().push_back(static_cast<char>(token));
      }
    }
  documents.pop_back();  // cut off
  return documents;
}

TEST(DocumentReader, ReadsTheSameFromEveryPacking) {
  auto engine = fresh_engine();
  const Folder folder;
  std::vector<std::string> want;
  std::string with_nul, lines;
  for (int i = 0; i < 57; ++i) {
    want.push_back(random_text(engine, 1 + engine() % 40000));
    with_nul += (i ? std::string(1, '\0') : "") + want.back();
    lines += nlohmann::json({{"id", i}, {"text", want.back()}}).dump() + "\n";
  }
  const fs::path scratch = folder.path / "scratch";
  EXPECT_EQ(all_documents(folder.write("a.txt", with_nul)), want);
  EXPECT_EQ(all_documents(folder.write("a.md.gz", gzipped(with_nul, scratch))), want);
  EXPECT_EQ(all_documents(folder.write("a.txt.zst", zstandard(with_nul))), want);
  EXPECT_EQ(all_documents(folder.write("b.jsonl", lines)), want);
  EXPECT_EQ(all_documents(folder.write("b.jsonl.gz", gzipped(lines, scratch))), want);
  // Members one after another, and padding behind them.
  std::string members;
  for (size_t done = 0, step = 0; done < lines.size(); done += step) {
    step = std::min(lines.size() - done, 1 + engine() % 100000);
    members += gzipped(lines.substr(done, step), scratch);
  }
  EXPECT_EQ(all_documents(folder.write("b.jsonl.gz", members)), want);
  EXPECT_EQ(all_documents(folder.write("b.jsonl.gz", members + std::string(1 + engine() % 1000, '\0'))),
            want);
  // Two zstd frames in one file, as `zstd a b > c` leaves them.
  EXPECT_EQ(all_documents(folder.write("b.jsonl.zst",
                                       zstandard(lines.substr(0, 1000)) + zstandard(lines.substr(1000)))),
            want);

  DocumentReader reader(folder.path / "b.jsonl.zst");
  const int64_t skipped = static_cast<int64_t>(engine() % want.size());
  EXPECT_EQ(reader.skip(skipped), skipped);
  std::string text;
  ASSERT_TRUE(reader.next(text));
  EXPECT_EQ(text, want[static_cast<size_t>(skipped)]);
  EXPECT_EQ(reader.skip(1000), static_cast<int64_t>(want.size()) - skipped - 1);
}

TEST(DocumentReader, CutsLongDocumentsWithoutLosingAByte) {
  auto engine = fresh_engine();
  const Folder folder;
  std::string no_line_ends = random_text(engine, 3 * kMaxDocumentBytes + engine() % 1000);
  std::replace(no_line_ends.begin(), no_line_ends.end(), '\n', ' ');
  for (const std::string& text :
       {random_text(engine, 2 * kMaxDocumentBytes + engine() % 100000), no_line_ends}) {
    std::string joined;
    const auto documents =
        all_documents(folder.write("long.txt", text));  // would throw where a character is cut
    EXPECT_GE(documents.size(), 3u);
    for (const std::string& piece : documents) {
      EXPECT_LE(piece.size(), kMaxDocumentBytes);
      joined += piece;
    }
    EXPECT_EQ(joined, text);
  }
}

TEST(DocumentReader, NamesWhatIsWrong) {
  const Folder folder;
  const auto fault = [&](const std::string& name, const std::string& bytes) {
    const fs::path path = folder.write(name, bytes);
    return message_of([&] { all_documents(path); });
  };
  const std::string good = "{\"text\": \"x\"}\n";
  EXPECT_NE(fault("a.txt", std::string("first\0second \xff", 14)).find("a.txt: byte 13 (0xff)"),
            std::string::npos);
  EXPECT_NE(fault("a.jsonl", good + "\n" + good + "{\"text\": \n").find("a.jsonl:4: not valid JSON"),
            std::string::npos);
  // All rows without text: another field is meant. Some: see SkipsAndCountsRowsWithoutText.
  EXPECT_NE(fault("b.jsonl", "{\"tex\": \"x\"}\n").find("none of its 1 rows has text in the field \"text\""),
            std::string::npos);
  EXPECT_NE(fault("c.jsonl", good + std::string(300, '[') + "\n").find("nested deeper"), std::string::npos);
  EXPECT_NE(fault("d.jsonl", good + "{\"text\": \"\xc3(\"}\n").find("d.jsonl:2: not valid JSON"),
            std::string::npos);
  const std::string long_text(100000, 'x');
  const std::string gz = gzipped(long_text, folder.path / "scratch"), zst = zstandard(long_text);
  EXPECT_NE(fault("e.txt.gz", gz.substr(0, gz.size() / 2)).find("gzip"), std::string::npos);
  for (const std::string& behind :
       {std::string("x"), std::string("\0\0x", 3), "\x1f" + gz.substr(1, 1) + "xxxx"})
    EXPECT_NE(fault("e.txt.gz", gz + behind).find("damaged or truncated gzip data"), std::string::npos);
  for (size_t bit = 0; bit < 8; ++bit) {  // of the second member's first byte
    std::string damaged = gz + gz;
    damaged[gz.size()] = static_cast<char>(damaged[gz.size()] ^ (1 << bit));
    EXPECT_NE(fault("e.txt.gz", damaged).find("damaged or truncated gzip data"), std::string::npos);
  }
  EXPECT_NE(fault("f.txt.gz", long_text).find("is not gzip data"), std::string::npos);
  EXPECT_NE(fault("g.txt.zst", zst.substr(0, zst.size() - 3)).find("zstd"), std::string::npos);
  EXPECT_NE(fault("h.txt.zst", long_text).find("damaged zstd data"), std::string::npos);
  EXPECT_NE(message_of([&] { DocumentReader(TextFile(folder.path / "none.txt")); }).find("no such file"),
            std::string::npos);
}

TEST(DocumentReader, ReadsArraysHoweverTheyAreLaidOut) {
  auto engine = fresh_engine();
  const Folder folder;
  const auto space = [&] {
    static const std::vector<std::string> spaces = {"", " ", "\n", "\t", "\r\n  "};
    return spaces[engine() % spaces.size()];
  };
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<std::string> want;
    std::string array = space() + "[", lines;
    const size_t count = engine() % 40;
    for (size_t i = 0; i < count; ++i) {
      // Brackets, quotes and backslashes in strings are no structure.
      want.push_back(random_text(engine, 1 + engine() % 30000) + "]}\\\"[{,");
      const nlohmann::json row = engine() % 4 == 0
                                     ? nlohmann::json(want.back())
                                     : nlohmann::json({{"a", {1, {{"b", "]"}}}}, {"text", want.back()}});
      const std::string text = row.dump(engine() % 2 ? 1 : -1);
      array += (i ? space() + "," : "") + space() + text;
      lines += text + space() + (row.is_string() ? "" : space());
    }
    array += space() + "]" + space();
    EXPECT_EQ(all_documents(folder.write("a.json", array)), want);
    EXPECT_EQ(all_documents(folder.write("b.json", "\xef\xbb\xbf" + lines)), want);
    const std::string cut =
        array.substr(0, array.find('[') + 1 + engine() % (array.rfind(']') - array.find('[')));
    EXPECT_NE(message_of([&] { all_documents(folder.write("c.json", cut)); }), "") << cut;
  }
}

TEST(DocumentReader, SkipsAndCountsRowsWithoutText) {
  auto engine = fresh_engine();
  const Folder folder;
  const std::vector<std::string> bad = {"{\"text\": null}", "{}", "[1]", "7", "{\"text\": [\"x\"]}"};
  std::string lines;
  int64_t skipped = 0, first = -1;
  std::vector<std::string> want;
  for (int64_t i = 0; i < 1500; ++i) {
    const bool is_bad = i > 0 && engine() % 40 == 0;
    if (is_bad && skipped++ == 0) first = i + 1;
    want.push_back(is_bad ? "" : fmt::format("text {}", i));
    lines += (is_bad ? bad[engine() % bad.size()] : nlohmann::json({{"text", want.back()}}).dump()) + "\n";
  }
  const fs::path path = folder.write("a.jsonl", lines);
  DocumentReader reader(path);
  std::string text;
  for (const std::string& one : want) {
    ASSERT_TRUE(reader.next(text));
    EXPECT_EQ(text, one);
  }
  EXPECT_FALSE(reader.next(text));
  EXPECT_EQ(reader.skipped_rows(), skipped);
  EXPECT_EQ(reader.first_skipped(), first > 0 ? fmt::format("{}:{}", path.string(), first) : "");
  std::string many;
  for (int64_t i = 0; i < kFewRows + 1; ++i) many += bad[0] + "\n";
  EXPECT_NE(message_of([&] {
              all_documents(folder.write("b.jsonl", lines.substr(0, lines.find('\n') + 1) + many));
            }),
            "");
}

TEST(FindInvalidUtf8, AgreesWithTheTableOfWellFormedSequences) {
  const auto encode = [](uint32_t c) {  // as if every value could be encoded in `n` bytes
    std::string s;
    if (c < 0x80) return std::string(1, static_cast<char>(c));
    if (c < 0x800)
      s = {static_cast<char>(0xC0 | c >> 6)};
    else if (c < 0x10000)
      s = {static_cast<char>(0xE0 | c >> 12), static_cast<char>(0x80 | (c >> 6 & 63))};
    else
      s = {static_cast<char>(0xF0 | c >> 18), static_cast<char>(0x80 | (c >> 12 & 63)),
           static_cast<char>(0x80 | (c >> 6 & 63))};
    return s + static_cast<char>(0x80 | (c & 63));
  };
  for (uint32_t c = 0; c < 0x120000; c += c % 7 + 1) {
    const bool valid = c <= 0x10FFFF && (c < 0xD800 || c > 0xDFFF);
    EXPECT_EQ(find_invalid_utf8("ab" + encode(c) + "z"), valid ? std::string::npos : 2) << c;
  }
  for (const char* overlong : {"\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xF0\x8F\xBF\xBF"})
    EXPECT_EQ(find_invalid_utf8(overlong), 0u);
  EXPECT_EQ(find_invalid_utf8("x\x80"), 1u);
  EXPECT_EQ(find_invalid_utf8("x\xE6\xBC"), 1u);  // cut short
}

TEST(ListTextFiles, TakesTextAndLeavesTheRest) {
  const Folder folder;
  folder.write("b/two.rst", "two");
  folder.write("a/one.txt", "one");
  folder.write("a/picture.png", "\x89PNG\r\n\x1a\n");
  folder.write("a/program.pyc", std::string("\xcb\r\r\n\0\0\0", 7));
  folder.write("a/box.tar.gz", "zzz");
  folder.write(".hidden/three.txt", "three");
  folder.write("c.txt.gz", gzipped("three", folder.path / ".scratch"));
  folder.write("d.gz", gzipped(std::string("\x01\x02\xfe", 3), folder.path / ".scratch"));
  fs::create_symlink(folder.path / "a/one.txt", folder.path / "link.txt");
  const std::vector<fs::path> want = {folder.path / "a/one.txt", folder.path / "b/two.rst",
                                      folder.path / "c.txt.gz"};
  std::vector<fs::path> found;
  for (const TextFile& file : list_text_files({folder.path})) found.push_back(file.path);
  EXPECT_EQ(found, want);
  EXPECT_EQ(list_text_files({folder.path / "a/picture.png"}).size(), 1u);  // named directly
  EXPECT_NE(message_of([&] { list_text_files({folder.path / "nowhere"}); }).find("no such file or folder"),
            std::string::npos);
  fs::create_directories(folder.path / "empty");
  EXPECT_NE(message_of([&] { list_text_files({folder.path / "empty"}); }).find("no text files"),
            std::string::npos);
}

// A corpus of some files of each kind whose documents are all different.
struct Corpus {
  explicit Corpus(std::mt19937_64& engine, int64_t files = 9) {
    for (int64_t f = 0; f < files; ++f) {
      std::string lines;
      const int64_t count = f % 3 == 0 ? 1 : 1 + static_cast<int64_t>(engine() % 40);
      for (int64_t d = 0; d < count; ++d) {
        std::string text = fmt::format("<{} {}> {}", f, d, std::string(engine() % 60, 'x'));
        lines += f % 3 == 0 ? text : nlohmann::json({{"text", text}}).dump() + "\n";
        documents.insert(text);
        if (f % 3 != 0 && engine() % 5 == 0) lines += "\n";  // a blank document
      }
      folder.write(fmt::format("{:02}.{}", f, f % 3 == 0 ? "txt" : "jsonl"), lines);
    }
    config.paths = {folder.path};
    config.held_out_every = 0;
    config.window_documents = 17;
    config.sequence_length = 41;
    config.seed = engine();
  }
  TrainingData data() const { return TrainingData(config, bytes_as_tokens, kEos); }
  int64_t tokens() const {
    int64_t total = 0;
    for (const auto& d : documents) total += static_cast<int64_t>(d.size()) + 1;
    return total;
  }
  Folder folder;
  std::set<std::string> documents;
  DataConfig config;
};

TEST(TrainingData, EachEpochHoldsEveryDocumentOnceInAnotherOrder) {
  auto engine = fresh_engine();
  Corpus corpus(engine);
  TrainingData data = corpus.data();
  const auto count = corpus.documents.size();
  const auto read = documents_of(data, 3 * corpus.tokens() / corpus.config.sequence_length);
  ASSERT_GE(read.size(), 2 * count);
  const std::vector<std::string> first(read.begin(), read.begin() + static_cast<long>(count));
  const std::vector<std::string> second(read.begin() + static_cast<long>(count),
                                        read.begin() + static_cast<long>(2 * count));
  EXPECT_EQ(std::set<std::string>(first.begin(), first.end()), corpus.documents);
  EXPECT_EQ(std::set<std::string>(second.begin(), second.end()), corpus.documents);
  EXPECT_NE(first, second);
  EXPECT_FALSE(std::is_sorted(first.begin(), first.end()));

  corpus.config.seed ^= 1;
  TrainingData other = corpus.data();
  EXPECT_NE(documents_of(other, 50), std::vector<std::string>(read.begin(), read.begin() + 50));
}

TEST(TrainingData, CountsTheTokensOfAnEpochAcrossAStop) {
  auto engine = fresh_engine();
  const Corpus corpus(engine);
  TrainingData whole = corpus.data();
  EXPECT_EQ(whole.corpus_tokens(), 0);
  const int64_t sequences = corpus.tokens() / corpus.config.sequence_length + 2;
  const auto stop = static_cast<int64_t>(engine() % static_cast<uint64_t>(sequences));
  for (int64_t i = 0; i < stop; ++i) whole.next();
  TrainingData resumed = corpus.data();
  resumed.restore(whole.state());
  for (int64_t i = stop; i < sequences; ++i) whole.next(), resumed.next();
  EXPECT_EQ(whole.corpus_tokens(), corpus.tokens());
  EXPECT_EQ(resumed.corpus_tokens(), corpus.tokens());
}

TEST(TrainingData, MarksDocumentsAndParts) {
  auto engine = fresh_engine();
  Corpus corpus(engine);
  corpus.config.length_mix = {{41, 0.5}, {16, 0.3}, {7, 0.2}};
  TrainingData data = corpus.data();
  std::map<size_t, int> seen;
  int32_t previous = kEos;  // the corpus begins with a document
  for (int i = 0; i < 400; ++i) {
    const TokenSequence s = data.next();
    ASSERT_EQ(s.tokens.size(), 41u);
    std::set<int64_t> starts(s.parts.begin(), s.parts.end());
    for (int64_t t = 0; t < 41; ++t) {
      if (previous == kEos) starts.insert(t);
      previous = s.tokens[static_cast<size_t>(t)];
    }
    EXPECT_EQ(s.documents, std::vector<int64_t>(starts.begin(), starts.end()));
    ++seen[s.parts.size()];
    if (s.parts.size() == 3) {
      EXPECT_EQ(s.parts, (std::vector<int64_t>{0, 16, 32}));
    }
  }
  // Parts of 41, 16 and 7 tokens make 1, 3 and 6 of them; shares within five standard deviations.
  EXPECT_NEAR(seen[1], 200, 50);
  EXPECT_NEAR(seen[3], 120, 46);
  EXPECT_NEAR(seen[6], 80, 40);
}

TEST(TrainingData, ContinuesExactlyFromItsState) {
  auto engine = fresh_engine();
  Corpus corpus(engine);
  corpus.config.held_out_every = 7;
  corpus.config.length_mix = {{41, 0.5}, {16, 0.5}};
  TrainingData straight = corpus.data();
  std::vector<nlohmann::json> states;
  std::vector<TokenSequence> sequences;
  const int64_t count = 3 * corpus.tokens() / corpus.config.sequence_length;
  for (int64_t i = 0; i < count; ++i) {
    states.push_back(straight.state());
    sequences.push_back(straight.next());
  }
  EXPECT_GE(straight.epoch(), 2);
  for (int trial = 0; trial < 40; ++trial) {
    const size_t from = trial == 0 ? 0 : engine() % sequences.size();
    TrainingData resumed = corpus.data();
    if (trial % 2) resumed.next();  // a used object too
    resumed.restore(nlohmann::json::parse(states[from].dump()));
    for (size_t i = from; i < std::min(sequences.size(), from + 20); ++i) {
      const TokenSequence s = resumed.next();
      ASSERT_EQ(s.tokens, sequences[i].tokens) << "resumed at " << from << ", differs at " << i;
      ASSERT_EQ(s.documents, sequences[i].documents);
      ASSERT_EQ(s.parts, sequences[i].parts);
    }
  }
  corpus.folder.write("zz.txt", "one more");
  EXPECT_NE(message_of([&] { corpus.data().restore(states[3]); }).find("has changed"), std::string::npos);
}

TEST(TrainingData, HeldOutDocumentsAreNeverTrainedOn) {
  auto engine = fresh_engine();
  Corpus corpus(engine, 24);
  corpus.config.held_out_every = 5;
  TrainingData data = corpus.data();
  const auto trained_list = documents_of(data, 2 * corpus.tokens() / corpus.config.sequence_length);
  const std::set<std::string> trained(trained_list.begin(), trained_list.end());
  std::string held;
  for (const TokenSequence& s : data.held_out(1000)) {
    EXPECT_EQ(s.documents.front(), 0);
    for (const int32_t t : s.tokens) held += t == kEos ? '\n' : static_cast<char>(t);
  }
  size_t held_count = 0;
  for (const std::string& document : corpus.documents) {
    const bool in_held = held.find(document + "\n") != std::string::npos;
    held_count += in_held;
    EXPECT_FALSE(in_held && trained.count(document)) << document;
  }
  // Exactly a fifth up to one document a file and the last, cut-off sequence.
  EXPECT_NEAR(static_cast<double>(held_count), static_cast<double>(corpus.documents.size()) / 5, 24.0);
  EXPECT_GT(held_count, 5u);
  EXPECT_EQ(data.held_out(3).size(), 3u);
  EXPECT_EQ(data.held_out(2, 11).front().tokens.size(), 11u);
}

TEST(TrainingData, RefusesAnEmptyCorpusAndImpossibleConfigs) {
  const Folder folder;
  DataConfig config{.paths = {folder.write("blank.txt", " \n\n")}};
  EXPECT_NE(
      message_of([&] { TrainingData(config, bytes_as_tokens, kEos).next(); }).find("training text is empty"),
      std::string::npos);
  config.held_out_every = 1;
  EXPECT_NE(message_of([&] { TrainingData(config, bytes_as_tokens, kEos); }).find("held_out_every is 1"),
            std::string::npos);
  config.held_out_every = 0;
  config.length_mix = {{99999, 1.0}};
  EXPECT_NE(message_of([&] { TrainingData(config, bytes_as_tokens, kEos); }).find("length 99999"),
            std::string::npos);
}

}  // namespace
}  // namespace spot

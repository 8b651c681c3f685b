// Training text. The first byte chooses what the file is called, and so how it is read.
#include <iterator>

#include "distill/documents.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static constexpr const char* kNames[] = {"a.txt",     "b.jsonl",    "c.json",    "d.ndjson.gz",
                                           "e.txt.zst", "f.json.zst", "g.json.gz", "h.jsonl.zst"};
  if (size == 0) return 0;
  const auto path = spot::fuzz::folder().write(kNames[data[0] % std::size(kNames)], data + 1, size - 1);
  return spot::fuzz::expect_nothing_but_errors([&] {
    std::string text;
    size_t read = 0;
    for (spot::DocumentReader reader(path); reader.next(text) && read < (size_t{1} << 24);)
      read += text.size() + 1;
    spot::DocumentReader again(path);
    again.skip(3);
    again.next(text);
  });
}

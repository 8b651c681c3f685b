// tokenizer.json, and what it makes of texts.
#include <vector>

#include "fuzz.h"
#include "text/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto path = spot::fuzz::folder().write("tokenizer.json", data, size);
  return spot::fuzz::expect_nothing_but_errors([&] {
    const spot::Tokenizer tokenizer = spot::Tokenizer::load(path);
    for (const char* text : {"", "Hello  world\n", "<s>a</s> ab abc",
                             "Grüße, 日本 12345 👩‍👩‍👧", "e\u0301\u200d"}) {
      const std::vector<int32_t> ids = tokenizer.encode(text, true);
      tokenizer.decode(ids);
      tokenizer.decode(ids, true);
    }
    std::vector<int32_t> all;
    for (int32_t id = -1; id < 40; ++id) all.push_back(id);
    tokenizer.decode(all);
  });
}

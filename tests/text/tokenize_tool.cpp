// Encodes a file and writes the ids one a line, or decodes such a file: what the tests in Python drive.
//   tokenize_tool encode TOKENIZER TEXT IDS [special]
//   tokenize_tool decode TOKENIZER IDS TEXT [skip]
//   tokenize_tool stream TOKENIZER IDS TEXT [skip]     decodes id by id
//   tokenize_tool speed  TOKENIZER TEXT                prints megabytes a second
#include <chrono>
#include <cstdio>
#include <iostream>
#include <sstream>

#include "core/error.h"
#include "core/files.h"
#include "text/stream_decoder.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace {

std::vector<int32_t> read_ids(const std::string& path) {
  std::istringstream in(spot::read_file(path));
  std::vector<int32_t> ids;
  for (int32_t id; in >> id;) ids.push_back(id);
  return ids;
}

int run(const std::vector<std::string>& arguments) {
  if (arguments.size() < 3)
    spot::fail("usage: tokenize_tool encode|decode|stream|speed TOKENIZER IN [OUT [special|skip]]");
  const std::string& mode = arguments[0];
  const auto tokenizer = spot::Tokenizer::load(arguments[1]);
  const bool flag = arguments.size() > 4;
  if (mode == "speed") {
    const std::string text = spot::read_file(arguments[2]);
    const auto start = std::chrono::steady_clock::now();
    const auto ids = tokenizer.encode(text);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%.3f\n", static_cast<double>(text.size()) / 1e6 / seconds.count());
    return 0;
  }
  if (arguments.size() < 4) spot::fail("an output file is missing");
  if (mode == "encode") {
    std::string lines;
    for (const int32_t id : tokenizer.encode(spot::read_file(arguments[2]), flag))
      lines += std::to_string(id) + "\n";
    spot::write_file_atomically(arguments[3], lines);
  } else if (mode == "decode") {
    spot::write_file_atomically(arguments[3], tokenizer.decode(read_ids(arguments[2]), flag));
  } else if (mode == "stream") {
    spot::StreamDecoder decoder(tokenizer, flag);
    std::string text;
    const auto take = [&](const std::string& part) {
      if (spot::find_invalid_utf8(part) != std::string::npos)
        spot::fail("a streamed part is not whole characters");
      text += part;
    };
    for (const int32_t id : read_ids(arguments[2])) take(decoder.push(id));
    take(decoder.finish());
    spot::write_file_atomically(arguments[3], text);
  } else {
    spot::fail("unknown mode {}", mode);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) try { return run({argv + 1, argv + argc}); } catch (const spot::Error& e) {
  std::cerr << "error: " << e.what() << "\n";
  return 1;
}

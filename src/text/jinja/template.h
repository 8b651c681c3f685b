// Jinja templates as chat templates use them, rendered with the results of jinja2 as transformers sets it up.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/jinja/value.h"

namespace spot::jinja {

struct ScopedBlock;

// Variables of a rendering, a later one of the same name hides an earlier one.
using Variables = std::vector<std::pair<std::string, Value>>;

// A template, read once. Immutable: rendering may go on in many threads at once.
//
// It knows: text with whitespace control (trim_blocks, lstrip_blocks), for with else, if, recursive, break and
// continue; if; set and set blocks; macro, call, filter, with, generation and raw blocks; all expressions; the
// methods of str, dict and list that do not change them; namespace, dict, range, raise_exception and
// strftime_now. What it does not know it refuses, most of it when the template is read: see
// docs/chat-templates.md.
class Template {
 public:
  // `name` begins every error. Throws Error with the line for a template that jinja2 would not compile either,
  // and for one that uses what is not supported.
  Template(std::string_view source, std::string name);

  // Throws Error with the line and the construct: where jinja2 raises, for raise_exception, for what is not
  // supported, and beyond the limits of limits.h.
  std::string render(const Variables& variables) const;

 private:
  std::string name_;
  std::shared_ptr<const ScopedBlock> root_;
};

}  // namespace spot::jinja

// Which JSON schemas an answer can be held to.
#pragma once

#include <nlohmann/json.hpp>

namespace spot {

// A schema of the same or fewer values, in the keywords that the grammar keeps exactly: whatever the grammar lets pass is valid
// under `schema` by JSON Schema 2020-12. Objects hold the members that are described, in that order, and others only where
// additionalProperties asks for them; annotations and unknown keywords are dropped, as validators pass them over; `format` is
// kept for the formats that xgrammar knows, and says nothing for others. Throws Error naming the keyword and where it stands
// (a JSON pointer) for what cannot be kept (not, if, uniqueItems, contains, patternProperties and so on), for what no value can
// fulfil, a recursion without an end among it, and for what is too large. One gap: xgrammar compares names as they are spelt, so
// that a member under additionalProperties may, by an escape in its name, repeat a described one.
nlohmann::ordered_json exact_schema(const nlohmann::ordered_json& schema);

}  // namespace spot

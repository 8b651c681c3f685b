#include "server/fields.h"

#include <cmath>
#include <limits>
#include <set>
#include <vector>

namespace spot::server {
namespace {

constexpr int kMostDepth = 64;
// Objects keep their order and search their members one by one: a megabyte of members would hold a thread for half a minute.
constexpr size_t kMostMembers = 2048;

struct TooDeep {};
struct TooWide {};

Json parse_shallow(std::string_view text, bool refuse_twice) {
  std::vector<std::set<std::string>> keys;  // of each open object
  return Json::parse(text, [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth > kMostDepth) throw TooDeep();
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event != Json::parse_event_t::key) return true;
    if (!keys.back().insert(value.get<std::string>()).second && refuse_twice)
      throw ApiError(400, fmt::format("the body names {} twice in one object; give it once", shown(value)));
    if (keys.back().size() > kMostMembers) throw TooWide();
    return true;
  });
}

}  // namespace

Json parse_value(std::string_view text) {
  try {
    return parse_shallow(text, false);
  } catch (const TooDeep&) {
  } catch (const TooWide&) {
  } catch (const nlohmann::json::exception&) {
  }
  return Json(Json::value_t::discarded);
}

Json parse_object(std::string_view text) {
  Json object;
  try {
    object = parse_shallow(text, true);  // clients and proxies differ in which one counts
  } catch (const TooDeep&) {
    throw ApiError(400, fmt::format("the body is nested deeper than {} levels", kMostDepth));
  } catch (const TooWide&) {
    throw ApiError(400, fmt::format("an object of the body has more than {} members", kMostMembers));
  } catch (const nlohmann::json::parse_error& error) {
    throw ApiError(400, fmt::format("the body is no JSON text: the first fault is at byte {}", error.byte));
  } catch (const nlohmann::json::exception&) {  // a number beyond float64
    throw ApiError(400, "the body is no JSON text that can be read: a number is too large");
  }
  if (!object.is_object()) throw ApiError(400, "the body must be a JSON object");
  return object;
}

std::string shown(const Json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return "a list";
  std::string text = to_text(value);
  constexpr size_t most = 40;
  if (text.size() > most) {
    size_t end = most;
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
    text = text.substr(0, end) + "...";
  }
  return text;
}

const Json* Fields::find(const std::string& name) const {
  const auto found = object_.find(name);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

bool Fields::boolean(const std::string& name, bool otherwise) const {
  const Json* value = find(name);
  if (!value) return otherwise;
  if (!value->is_boolean())
    refuse(path_ + name, "{}{} is {}; true or false was expected", path_, name, shown(*value));
  return value->get<bool>();
}

int64_t Fields::integer(const std::string& name, int64_t otherwise, int64_t low, int64_t high) const {
  const Json* value = find(name);
  if (!value) return otherwise;
  const double real = value->is_number() ? value->get<double>() : 0;
  if (!value->is_number() || real != std::floor(real))
    refuse(path_ + name, "{}{} is {}; a whole number was expected", path_, name, shown(*value));
  if (real < static_cast<double>(low))
    refuse(path_ + name, "{}{} is {}; {} is the least", path_, name, shown(*value), low);
  if (real > static_cast<double>(high))
    refuse(path_ + name, "{}{} is {}; {} is the most", path_, name, shown(*value), high);
  return value->is_number_float() ? static_cast<int64_t>(real) : value->get<int64_t>();
}

double Fields::number(const std::string& name, double otherwise, double low, double high) const {
  const Json* value = find(name);
  if (!value) return otherwise;
  if (!value->is_number())
    refuse(path_ + name, "{}{} is {}; a number was expected", path_, name, shown(*value));
  const auto real = value->get<double>();
  if (!(real >= low && real <= high))
    refuse(path_ + name, "{}{} is {}; {} to {} is possible", path_, name, shown(*value),
           low == std::numeric_limits<double>::min() ? "above 0" : shown(low), high);
  return real;
}

std::string Fields::text(const std::string& name, const std::string& otherwise) const {
  const Json* value = find(name);
  if (!value) return otherwise;
  if (!value->is_string())
    refuse(path_ + name, "{}{} is {}; a text was expected", path_, name, shown(*value));
  return value->get<std::string>();
}

}  // namespace spot::server

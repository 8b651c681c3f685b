#include "grammar/schema.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "core/error.h"

namespace spot {
namespace {

using Json = nlohmann::ordered_json;

// What bounds the time and the memory that a grammar takes to compile (tests/grammar has the measurements).
constexpr int64_t kMostSchemas = 400, kMostOptional = 128, kMostValues = 2000, kMostValueBytes = 16 << 10,
                  kMostPatternBytes = 256;
constexpr int64_t kMostRepeats = 100'000;
constexpr size_t kMostGivenBytes = 256 << 10, kMostPlaceBytes = 4096;
// Each counted character is a state, for which every token of the vocabulary is tried; xgrammar counts no further than this one
// by one.
constexpr int64_t kCountedOneByOne = 128, kMostCounted = 512;

using Names = std::set<std::string>;
const Names kObjectKeys = {"properties", "required", "additionalProperties", "minProperties",
                           "maxProperties"};
const Names kArrayKeys = {"items", "prefixItems", "minItems", "maxItems"};
const Names kStringKeys = {"minLength", "maxLength", "pattern", "format"};
const Names kNumberKeys = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"};
const Names kApplicators = {"$ref", "const", "enum", "anyOf", "oneOf", "allOf"};
const Names kDefinitions = {"$defs", "definitions"};
const Names kTypes = {"null", "boolean", "object", "array", "number", "string", "integer"};
const Names kRefused = {"not",
                        "if",
                        "then",
                        "else",
                        "dependentRequired",
                        "dependentSchemas",
                        "dependencies",
                        "contains",
                        "minContains",
                        "maxContains",
                        "patternProperties",
                        "propertyNames",
                        "unevaluatedItems",
                        "additionalItems",
                        "$dynamicRef",
                        "$recursiveRef",
                        "$anchor",
                        "$dynamicAnchor"};

const Names& keys_of(const std::string& type) {
  static const Names none;
  return type == "object"    ? kObjectKeys
         : type == "array"   ? kArrayKeys
         : type == "string"  ? kStringKeys
         : type == "integer" ? kNumberKeys
         : type == "number"  ? kNumberKeys
                             : none;
}

bool has_type(const Json& value, const std::string& type) {
  if (type == "null") return value.is_null();
  if (type == "boolean") return value.is_boolean();
  if (type == "object") return value.is_object();
  if (type == "array") return value.is_array();
  if (type == "string") return value.is_string();
  if (type == "integer") return value.is_number_integer();
  return value.is_number();
}

std::string escaped(const std::string& name) {
  std::string text;
  for (const char c : name) text += c == '~' ? "~0" : c == '/' ? "~1" : std::string(1, c);
  return text;
}

class Checker {
 public:
  explicit Checker(const Json& root) : root_(root) {}

  Json run() {
    Json made = check(root_, "#");
    for (const auto& [where, target] : references_)
      if (!places_.count(target))
        fail("{}: $ref '{}' names no schema; give # or one under #/$defs/", where, target);
    for (const auto& [place, next] : within_) check_progress(place);
    // What has a value is found from the inside out, round after round.
    for (size_t before = finite_.size() + 1; before != finite_.size();) {
      before = finite_.size();
      note(made, "#");
    }
    // Anywhere: a value that is begun must be one that can end.
    for (const std::string& place : seen_)
      if (!finite_.count(place))
        fail("{}: no value can end: it holds itself; make a part of it optional", place);
    return made;
  }

 private:
  void count_schema() {
    if (++schemas_ > kMostSchemas)
      fail("the schema holds more than {} schemas; make it smaller", kMostSchemas);
  }

  Json check(const Json& schema, const std::string& where) {
    count_schema();
    if (where.size() > kMostPlaceBytes)
      fail("{}...: the names on the way to a schema are longer than {} bytes; shorten them",
           where.substr(0, 80), kMostPlaceBytes);
    places_.insert(where);
    if (schema.is_boolean()) {
      if (!schema.get<bool>()) fail("{}: the schema false lets nothing pass", where);
      return Json::object();
    }
    if (!schema.is_object()) fail("{}: a schema must be an object", where);
    for (const auto& [key, value] : schema.items()) {
      if (kRefused.count(key)) fail("{}: the keyword {} cannot be kept; leave it out", where, key);
      if (key == "uniqueItems" && value != false)
        fail("{}: the keyword uniqueItems cannot be kept; leave it out", where);
      // Members that are not described are never written.
      if (key == "unevaluatedProperties" && value != false)
        fail("{}: the keyword unevaluatedProperties cannot be kept; leave it out", where);
      if (key == "$id" && where != "#") fail("{}: $id is kept at the top alone; leave it out", where);
    }
    Json made = Json::object();
    for (const std::string& name : kDefinitions) {
      if (!schema.contains(name)) continue;
      if (!schema.at(name).is_object()) fail("{}: {} must be an object", where, name);
      for (const auto& [key, value] : schema.at(name).items())
        made[name][key] = check(value, where + "/" + name + "/" + escaped(key));
    }
    std::string applicator;
    for (const std::string& name : kApplicators) {
      if (!schema.contains(name)) continue;
      if (!applicator.empty())
        fail("{}: {} beside {} cannot be kept; give one of them", where, name, applicator);
      applicator = name;
    }
    if (applicator.empty()) return check_types(schema, where, std::move(made));
    for (const auto& [key, value] : schema.items())
      if (key != "type" && is_assertion(key))
        fail("{}: {} beside {} cannot be kept; give one of them", where, key, applicator);
    const Json& value = schema.at(applicator);
    if (applicator == "$ref") {
      made["$ref"] = reference(value, where);
      within_[where].push_back(made["$ref"]);
      refuse_type(schema, applicator, where);
    } else if (applicator == "const" || applicator == "enum") {
      made[applicator] = value;
      check_values(schema, applicator == "const" ? Json::array({value}) : value, where + "/" + applicator);
    } else {
      refuse_type(schema, applicator, where);
      if (!value.is_array() || value.empty()) fail("{}: {} must be a list of schemas", where, applicator);
      if (applicator == "allOf" && value.size() != 1)
        fail("{}: allOf of {} schemas cannot be kept; merge them into one", where, value.size());
      if (applicator == "oneOf") check_disjoint(value, where);
      Json& options = made[applicator == "oneOf" ? "anyOf" : applicator] = Json::array();
      for (size_t i = 0; i < value.size(); ++i) {
        const std::string place = fmt::format("{}/{}/{}", where, applicator, i);
        within_[where].push_back(place);
        options.push_back(check(value[i], place));
      }
    }
    return made;
  }

  // A schema that is applied to the value that it is itself applied to would never be done.
  void check_progress(const std::string& place) {
    const auto found = within_.find(place);
    if (found == within_.end() || passed_.count(place)) return;
    if (!passing_.insert(place).second)
      fail("{}: no value can end: the schema refers to itself without going deeper", place);
    for (const std::string& next : found->second) check_progress(next);
    passing_.erase(place);
    passed_.insert(place);
  }

  static bool is_assertion(const std::string& key) {
    for (const Names* names : {&kObjectKeys, &kArrayKeys, &kStringKeys, &kNumberKeys})
      if (names->count(key)) return true;
    return false;
  }

  static void refuse_type(const Json& schema, const std::string& applicator, const std::string& where) {
    if (schema.contains("type")) fail("{}: type beside {} cannot be kept; give it within", where, applicator);
  }

  std::string reference(const Json& value, const std::string& where) {
    if (!value.is_string()) fail("{}: $ref must be a text", where);
    const std::string target = value.get<std::string>();
    const bool plain = target == "#" || target.rfind("#/", 0) == 0;
    if (!plain || target.find_first_of("~%") != std::string::npos || target.find("//") != std::string::npos)
      fail("{}: $ref '{}' cannot be followed; give # or #/$defs/NAME without ~ and %", where, target);
    references_.emplace_back(where, target);
    return target;
  }

  void check_values(const Json& schema, const Json& values, const std::string& where) {
    if (!values.is_array() || values.empty()) fail("{}: a list of values was expected", where);
    num_values_ += static_cast<int64_t>(values.size());
    value_bytes_ += static_cast<int64_t>(values.dump(-1, ' ', false, Json::error_handler_t::replace).size());
    if (num_values_ > kMostValues || value_bytes_ > kMostValueBytes)
      fail("{}: the schema lists more than {} values or {} KiB of them; shorten the list", where, kMostValues,
           kMostValueBytes >> 10);
    if (!schema.contains("type")) return;
    const std::vector<std::string> types = types_of(schema.at("type"), where);
    for (const Json& value : values)
      if (std::none_of(types.begin(), types.end(), [&](const std::string& t) { return has_type(value, t); }))
        fail("{}: a value is not of the type beside it; mend one of them", where);
  }

  std::vector<std::string> types_of(const Json& type, const std::string& where) const {
    const Json list = type.is_array() ? type : Json::array({type});
    std::vector<std::string> types;
    for (const Json& one : list) {
      if (!one.is_string() || !kTypes.count(one.get<std::string>()))
        fail("{}: type must be one of null, boolean, object, array, number, string, integer, or a list",
             where);
      if (std::find(types.begin(), types.end(), one.get<std::string>()) == types.end())
        types.push_back(one.get<std::string>());
    }
    if (types.empty()) fail("{}: the list of types is empty", where);
    return types;
  }

  Json check_types(const Json& schema, const std::string& where, Json made) {
    std::vector<std::string> types;
    if (schema.contains("type")) {
      types = types_of(schema.at("type"), where);
    } else if (schema.contains("properties") || schema.contains("additionalProperties")) {
      types = {"object"};
    } else if (schema.contains("items") || schema.contains("prefixItems")) {
      types = {"array"};
    } else {
      for (const auto& [key, value] : schema.items())
        if (is_assertion(key)) fail("{}: {} without a type cannot be kept; give a type", where, key);
      return made;
    }
    made["type"] = types.size() == 1 ? Json(types[0]) : Json(types);
    for (const std::string& type : types) {
      for (const std::string& key : keys_of(type))
        if (schema.contains(key) && key != "properties" && key != "items" && key != "prefixItems" &&
            key != "additionalProperties" && key != "required")
          made[key] = number_or_text(schema, key, where);
      // Equal lengths share their states.
      if (type == "string" && (made.contains("minLength") || made.contains("maxLength"))) {
        const int64_t least = made.value("minLength", int64_t{0}), most = made.value("maxLength", int64_t{0});
        if (lengths_.emplace(least, most).second) count(std::max(least, most), where);
      }
      if (type == "object") check_object(schema, where, made);
      if (type == "array") check_array(schema, where, made);
    }
    if (made.contains("multipleOf") && types != std::vector<std::string>{"integer"})
      fail("{}: multipleOf is kept for integers alone; leave it out", where);
    return made;
  }

  Json number_or_text(const Json& schema, const std::string& key, const std::string& where) {
    const Json& value = schema.at(key);
    if (key == "pattern" || key == "format") {
      if (!value.is_string()) fail("{}: {} must be a text", where, key);
      if (static_cast<int64_t>(value.get_ref<const std::string&>().size()) > kMostPatternBytes)
        fail("{}: {} is longer than {} bytes; shorten it", where, key, kMostPatternBytes);
      if (key == "pattern") check_pattern(value.get_ref<const std::string&>(), where);
      return value;
    }
    if (!value.is_number()) fail("{}: {} must be a number", where, key);
    const bool counts = key.rfind("min", 0) == 0 || key.rfind("max", 0) == 0;
    if (!counts || key == "minimum" || key == "maximum") return value;
    const auto count = value.get<double>();
    if (!(count >= 0 && count <= static_cast<double>(kMostRepeats)) ||
        count != static_cast<double>(static_cast<int64_t>(count)))
      fail("{}: {} must be a whole number of at most {}", where, key, kMostRepeats);
    return static_cast<int64_t>(count);
  }

  // In other patterns xgrammar would write a quote or a line break into a JSON string as it is.
  void check_pattern(const std::string& pattern, const std::string& where) {
    for (size_t i = 0; i < pattern.size(); ++i) {
      if (pattern[i] < 0x20 || pattern[i] > 0x7e || pattern[i] == '"')
        fail("{}: a pattern cannot hold quotes or other than ASCII characters", where);
      if (pattern[i] != '\\' || i + 1 == pattern.size()) continue;
      const char next = pattern[i + 1];
      if (std::isalnum(static_cast<unsigned char>(next)) && !std::strchr("dDwWs", next))
        fail("{}: a pattern cannot hold \\{}; \\d, \\D, \\w, \\W and \\s are possible", where, next);
      if (next == '\\') fail("{}: a pattern cannot hold a backslash itself", where);
    }
    const int64_t characters = pattern_characters(pattern);
    if (characters > kCountedOneByOne)
      fail("{}: a pattern's parts and counts come to {} characters, more than {}; make it smaller", where,
           characters, kCountedOneByOne);
    count(4 * characters, where);  // a text can be at several places of a pattern at once
  }

  // Characters of a regular expression, each as often as counts of it and of its groups ask for at most.
  static int64_t pattern_characters(const std::string& pattern) {
    constexpr int64_t most = 1 << 20;
    struct Group {
      int64_t all = 0, last = 0;
    };
    std::vector<Group> groups(1);
    const auto add = [&](int64_t characters) {
      groups.back().last = characters;
      groups.back().all = std::min(groups.back().all + characters, most);
    };
    for (size_t i = 0; i < pattern.size(); ++i) {
      switch (pattern[i]) {
        case '(':
          groups.emplace_back();
          break;
        case ')': {
          const int64_t inside = groups.back().all;
          if (groups.size() > 1) groups.pop_back();
          add(inside);
          break;
        }
        case '[':
          while (++i < pattern.size() && pattern[i] != ']') i += pattern[i] == '\\';
          add(1);
          break;
        case '{': {
          int64_t count = 0, largest = 0;
          for (++i; i < pattern.size() && pattern[i] != '}'; ++i) {
            count = std::isdigit(static_cast<unsigned char>(pattern[i]))
                        ? std::min(10 * count + pattern[i] - '0', most)
                        : 0;
            largest = std::max(largest, count);
          }
          add(std::min(groups.back().last * std::max<int64_t>(largest - 1, 0), most));
          break;
        }
        case '\\':
          ++i;
          [[fallthrough]];
        default:
          add(1);
      }
    }
    int64_t all = 0;
    for (const Group& group : groups) all += group.all;
    return all;
  }

  void count(int64_t characters, const std::string& where) {
    counted_ += std::min(characters, kCountedOneByOne);
    if (counted_ > kMostCounted)
      fail(
          "{}: lengths and, four times, the characters of patterns come to more than {} in all, where each counts for at "
          "most {}; give fewer",
          where, kMostCounted, kCountedOneByOne);
  }

  void check_object(const Json& schema, const std::string& where, Json& made) {
    const bool described = schema.contains("properties");
    Json properties = Json::object();
    if (described) {
      if (!schema.at("properties").is_object()) fail("{}: properties must be an object", where);
      for (const auto& [key, value] : schema.at("properties").items())
        properties[key] = check(value, where + "/properties/" + escaped(key));
    }
    const bool open =
        schema.contains("additionalProperties") ? schema.at("additionalProperties") != false : !described;
    Json others = Json::object();
    if (open && schema.contains("additionalProperties"))
      others = check(schema.at("additionalProperties"), where + "/additionalProperties");
    if (schema.contains("required")) {
      const Json& required = schema.at("required");
      if (!required.is_array()) fail("{}: required must be a list of names", where);
      Names names;
      for (const Json& name : required) {
        if (!name.is_string()) fail("{}: required must be a list of names", where);
        const std::string& text = name.get_ref<const std::string&>();
        if (!names.insert(text).second) continue;
        made["required"].push_back(text);
        if (properties.contains(text)) continue;
        if (schema.contains("additionalProperties") && !open)
          fail("{}: '{}' is required and not among the properties; add it", where, text);
        count_schema();
        properties[text] = others;
      }
    }
    // A name may come twice where names are free, and counts once.
    if (open && schema.contains("minProperties") && made.at("minProperties").is_number() &&
        made.at("minProperties").get<double>() >
            static_cast<double>(made.value("required", Json::array()).size()))
      fail("{}: minProperties cannot be kept where members are not named; name and require them", where);
    // What may come next is looked for behind each that may be left out, at each step of an answer.
    const auto optional = static_cast<int64_t>(properties.size()) -
                          static_cast<int64_t>(made.value("required", Json::array()).size());
    if (optional > kMostOptional)
      fail("{}: {} properties may be left out, at most {} are possible; require some", where, optional,
           kMostOptional);
    if (!properties.empty()) made["properties"] = std::move(properties);
    made["additionalProperties"] = open ? others.empty() ? Json(true) : others : Json(false);
  }

  void check_array(const Json& schema, const std::string& where, Json& made) {
    if (schema.contains("prefixItems")) {
      const Json& items = schema.at("prefixItems");
      if (!items.is_array()) fail("{}: prefixItems must be a list of schemas", where);
      for (size_t i = 0; i < items.size(); ++i)
        made["prefixItems"].push_back(check(items[i], fmt::format("{}/prefixItems/{}", where, i)));
    }
    if (schema.contains("items")) {
      const Json& items = schema.at("items");
      made["items"] = items == false ? Json(false) : check(items, where + "/items");
    } else {
      made["items"] = made.contains("prefixItems") ? Json(false) : Json::object();
    }
  }

  const Json& resolved(const Json& schema, int depth = 0) const {
    if (!schema.is_object() || !schema.contains("$ref") || !schema.at("$ref").is_string() || depth > 32)
      return schema;
    const std::string target = schema.at("$ref").get<std::string>();
    if (target.rfind('#', 0) != 0) return schema;
    try {
      return resolved(root_.at(Json::json_pointer(target.substr(1))), depth + 1);
    } catch (const nlohmann::json::exception&) {
      return schema;
    }
  }

  // The values of a required property, where they are listed.
  static Json listed(const Json& option, const std::string& name) {
    if (!option.is_object() || !option.contains("properties") || !option.contains("required")) return {};
    const Json& required = option.at("required");
    if (!required.is_array() || std::find(required.begin(), required.end(), Json(name)) == required.end())
      return {};
    const Json& properties = option.at("properties");
    if (!properties.is_object() || !properties.contains(name) || !properties.at(name).is_object()) return {};
    const Json& property = properties.at(name);
    if (property.contains("const")) return Json::array({property.at("const")});
    return property.contains("enum") && property.at("enum").is_array() ? property.at("enum") : Json();
  }

  // oneOf is anyOf where no value can pass two of its schemas: they are of different types, or all are objects that one
  // required property tells apart.
  void check_disjoint(const Json& options, const std::string& where) const {
    Names types, seen;
    bool by_type = true;
    for (const Json& given : options) {
      const Json& option = resolved(given);
      if (!option.is_object() || !option.contains("type") || !option.at("type").is_string()) {
        by_type = false;
        break;
      }
      std::string type = option.at("type").get<std::string>();
      if (type == "integer") type = "number";
      by_type &= types.insert(type).second;
    }
    if (by_type || options.size() == 1) return;
    const Json& first = resolved(options.front());
    if (first.is_object() && first.contains("properties") && first.at("properties").is_object())
      for (const auto& [name, property] : first.at("properties").items()) {
        Names values;
        bool apart = true;
        for (const Json& given : options) {
          const Json& option = resolved(given);
          const Json list = listed(option, name);
          apart &= list.is_array() && option.contains("type") && option.at("type") == "object";
          if (!apart) break;
          Names own;
          for (const Json& value : list)
            own.insert(value.dump(-1, ' ', false, Json::error_handler_t::replace));
          for (const std::string& value : own) apart &= values.insert(value).second;
        }
        if (apart) return;
      }
    fail(
        "{}: oneOf is kept where its schemas are of different types, or objects that a required property with its own const "
        "tells apart; give anyOf",
        where);
  }

  // Whether some value of finite depth passes, as far as finite_ knows. Notes places on the way.
  bool ends(const Json& schema, const std::string& where) {
    for (const std::string& name : kDefinitions)
      if (schema.contains(name))
        for (const auto& [key, value] : schema.at(name).items())
          note(value, where + "/" + name + "/" + escaped(key));
    if (schema.contains("$ref")) return finite_.count(schema.at("$ref").get<std::string>()) > 0;
    for (const char* name : {"anyOf", "allOf"}) {
      if (!schema.contains(name)) continue;
      bool any = false;
      for (size_t i = 0; i < schema.at(name).size(); ++i)
        any |= note(schema.at(name)[i], fmt::format("{}/{}/{}", where, name, i));
      return any;
    }
    if (!schema.contains("type")) return true;
    const Json types = schema.at("type").is_array() ? schema.at("type") : Json::array({schema.at("type")});
    bool any = false;
    for (const Json& type : types)
      any |= type == "object"  ? object_ends(schema, where)
             : type == "array" ? array_ends(schema, where)
                               : true;
    return any;
  }

  bool note(const Json& schema, const std::string& where) {
    seen_.insert(where);
    const bool found = ends(schema, where);
    if (found) finite_.insert(where);
    return found;
  }

  bool object_ends(const Json& schema, const std::string& where) {
    bool all = true;
    const Json required = schema.value("required", Json::array());
    if (schema.contains("properties"))
      for (const auto& [key, value] : schema.at("properties").items()) {
        const bool found = note(value, where + "/properties/" + escaped(key));
        if (std::find(required.begin(), required.end(), Json(key)) != required.end()) all &= found;
      }
    if (schema.at("additionalProperties").is_object())
      note(schema.at("additionalProperties"), where + "/additionalProperties");
    return all;
  }

  bool array_ends(const Json& schema, const std::string& where) {
    bool all = true;
    size_t prefix = 0;
    if (schema.contains("prefixItems"))
      for (const Json& item : schema.at("prefixItems"))
        all &= note(item, fmt::format("{}/prefixItems/{}", where, prefix++));
    if (schema.at("items").is_object()) {
      const bool found = note(schema.at("items"), where + "/items");
      if (schema.value("minItems", int64_t{0}) > static_cast<int64_t>(prefix)) all &= found;
    }
    return all;
  }

  const Json& root_;
  int64_t schemas_ = 0, num_values_ = 0, value_bytes_ = 0, counted_ = 0;
  std::set<std::pair<int64_t, int64_t>> lengths_;
  std::map<std::string, std::vector<std::string>> within_;  // what is applied to the same value
  Names passing_, passed_;
  Names places_, seen_, finite_;                                 // JSON pointers
  std::vector<std::pair<std::string, std::string>> references_;  // where, and to what
};

}  // namespace

Json exact_schema(const Json& schema) {
  if (schema.dump(-1, ' ', false, Json::error_handler_t::replace).size() > kMostGivenBytes)
    fail("the schema takes more than {} KiB; make it smaller", kMostGivenBytes >> 10);
  return Checker(schema).run();
}

}  // namespace spot

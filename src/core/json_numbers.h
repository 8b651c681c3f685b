// Numbers of JSON documents, without the conversions that nlohmann makes in silence.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>

namespace spot {

// An integer of 32 bits. Throws json::type_error on any other value: 4294967301 would become 5, and 1e300 anything.
inline int32_t int32_in(const nlohmann::json& value) {
  if (!value.is_number_integer() || value < INT32_MIN || value > INT32_MAX)
    throw nlohmann::json::type_error::create(302, "not an integer of 32 bits", &value);
  return value.get<int32_t>();
}

}  // namespace spot

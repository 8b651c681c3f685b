// The words of the kernels' enums in schemas, configs and on the command line; written here alone.
#pragma once

#include <c10/util/Exception.h>

#include <array>
#include <string>
#include <utility>

#include "kernels/select_rules.h"
#include "kernels/selector_key_math.h"

namespace spot::ops {

template <typename Enum>
struct Words;

template <>
struct Words<kernels::KeyFormat> {
  using Enum = kernels::KeyFormat;
  static constexpr const char* kWhat = "a selector key format";
  static constexpr std::array<std::pair<Enum, const char*>, 6> kList = {{{Enum::f32, "f32"},
                                                                         {Enum::bf16, "bf16"},
                                                                         {Enum::int8, "int8"},
                                                                         {Enum::int4, "int4"},
                                                                         {Enum::mxfp4, "mxfp4"},
                                                                         {Enum::nvfp4, "nvfp4"}}};
};
template <>
struct Words<kernels::KeyNorm> {
  using Enum = kernels::KeyNorm;
  static constexpr const char* kWhat = "a key norm";
  static constexpr std::array<std::pair<Enum, const char*>, 3> kList = {
      {{Enum::none, "none"}, {Enum::layernorm, "layernorm"}, {Enum::rmsnorm, "rmsnorm"}}};
};
template <>
struct Words<kernels::SelectionMode> {
  using Enum = kernels::SelectionMode;
  static constexpr const char* kWhat = "a selection mode";
  static constexpr std::array<std::pair<Enum, const char*>, 3> kList = {
      {{Enum::top_k, "top_k"}, {Enum::top_p, "top_p"}, {Enum::threshold, "threshold"}}};
};

template <typename Enum>
const char* word_of(Enum value) {
  for (const auto& [candidate, word] : Words<Enum>::kList)
    if (candidate == value) return word;
  return "?";
}

template <typename Enum>
Enum value_of(const std::string& word) {
  std::string accepted;
  for (const auto& [candidate, name] : Words<Enum>::kList) {
    if (word == name) return candidate;
    accepted += (accepted.empty() ? "" : ", ") + std::string(name);
  }
  TORCH_CHECK(false, "spot: ", Words<Enum>::kWhat, " is \"", word, "\"; it must be one of ", accepted);
}

}  // namespace spot::ops

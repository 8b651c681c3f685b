// An operator is a struct: its fields are the arguments, written and described once. From the struct follow the
// schema, the function that the dispatcher calls (torch.ops.spot.* from Python) and the C++ function beside it.
//
//   struct Scale {                                            // x.h
//     static constexpr const char* kName = "scale";           // torch.ops.spot.scale
//     using Result = at::Tensor;                              // or void, or a struct of tensors with kNames
//     at::Tensor x;
//     double factor = 2.0;
//     static constexpr auto fields() {
//       return std::tuple(required<&Scale::x>("x"), optional<&Scale::factor>("factor"));
//     }
//     void check() const;                                     // throws c10::Error in one sentence
//   };
//   at::Tensor scale(const Scale& arguments);                 // goes through the dispatcher
//
//   namespace cpu { decltype(ops::scale) scale; }             // x.cpp; the body is in x_cpu.cpp
//   TORCH_LIBRARY_FRAGMENT(spot, library) { define<Scale>(library); }
//   TORCH_LIBRARY_IMPL(spot, CPU, library) { implement<cpu::scale>(library); }
//   TORCH_LIBRARY_IMPL(spot, Meta, library) { implement<fake::scale>(library); }
//   at::Tensor scale(const Scale& arguments) { return call(arguments); }
//
// An optional tensor is undefined in the struct and None in Python. An enum is its word in the schema.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops/words.h"

namespace spot::ops {

using MaybeTensor = std::optional<at::Tensor>;

// Optional arguments have a default: None, or what the struct says. Updated tensors are written to.
enum class Use { required, optional, updated, optional_updated };

namespace detail {

template <typename Member>
struct MemberOf;
template <typename Class_, typename Value_>
struct MemberOf<Value_ Class_::*> {
  using Class = Class_;
  using Value = Value_;
};

template <typename Struct>
constexpr auto& follow(Struct& value) {
  return value;
}
template <typename Struct, typename First, typename... Rest>
constexpr auto& follow(Struct& value, First first, Rest... rest) {
  return follow(value.*first, rest...);
}

// How a value travels through the dispatcher: Type is the kernel's parameter, kSchema its word in a schema.
template <typename Value, Use kUse>
struct Wire {
  static_assert(std::is_enum_v<Value>, "an argument of an operator has a type that schemas do not know");
  using Type = std::string;
  static constexpr const char* kSchema = "str";
  static std::string out(Value value) { return word_of(value); }
  static Value in(const std::string& word) { return value_of<Value>(word); }
  static std::string text(Value value) { return std::string("'") + word_of(value) + "'"; }
};
template <Use kUse>
struct Wire<at::Tensor, kUse> {
  static constexpr bool kOptional = kUse == Use::optional || kUse == Use::optional_updated;
  using Type = std::conditional_t<kOptional, const MaybeTensor&,
                                  std::conditional_t<kUse == Use::updated, at::Tensor, const at::Tensor&>>;
  static constexpr const char* kSchema = "Tensor";
  static std::conditional_t<kOptional, MaybeTensor, const at::Tensor&> out(const at::Tensor& value) {
    if constexpr (kOptional)
      return value.defined() ? MaybeTensor(value) : std::nullopt;
    else
      return value;
  }
  static at::Tensor in(const at::Tensor& value) { return value; }
  static at::Tensor in(const MaybeTensor& value) { return value.value_or(at::Tensor()); }
  static std::string text(const at::Tensor&) { return "None"; }
};
template <Use kUse>
struct Wire<int64_t, kUse> {
  using Type = int64_t;
  static constexpr const char* kSchema = "int";
  static int64_t out(int64_t value) { return value; }
  static int64_t in(int64_t value) { return value; }
  static std::string text(int64_t value) { return std::to_string(value); }
};
template <Use kUse>
struct Wire<int32_t, kUse> : Wire<int64_t, kUse> {
  static int32_t in(int64_t value) {
    TORCH_CHECK(value >= std::numeric_limits<int32_t>::min() && value <= std::numeric_limits<int32_t>::max(),
                "spot: the argument ", value, " does not fit 32 bits");
    return static_cast<int32_t>(value);
  }
};
template <Use kUse>
struct Wire<double, kUse> {
  using Type = double;
  static constexpr const char* kSchema = "float";
  static double out(double value) { return value; }
  static double in(double value) { return value; }
  static std::string text(double value) {
    std::ostringstream stream;
    stream.precision(15);
    stream << value;
    const std::string digits = stream.str();
    return digits.find_first_of(".e") == std::string::npos ? digits + ".0" : digits;
  }
};
template <Use kUse>
struct Wire<bool, kUse> {
  using Type = bool;
  static constexpr const char* kSchema = "bool";
  static bool out(bool value) { return value; }
  static bool in(bool value) { return value; }
  static std::string text(bool value) { return value ? "True" : "False"; }
};
template <Use kUse>
struct Wire<std::string, kUse> {
  using Type = std::string;
  static constexpr const char* kSchema = "str";
  static std::string out(const std::string& value) { return value; }
  static std::string in(const std::string& value) { return value; }
  static std::string text(const std::string& value) { return "'" + value + "'"; }
};
template <Use kUse>
struct Wire<std::vector<int64_t>, kUse> {
  using Type = at::IntArrayRef;
  static constexpr const char* kSchema = "int[]";
  static at::IntArrayRef out(const std::vector<int64_t>& value) { return value; }
  static std::vector<int64_t> in(at::IntArrayRef value) { return value.vec(); }
};

template <Use kUse>
struct Wire<kernels::SetThresholds, kUse> {
  using Type = at::ArrayRef<double>;
  static constexpr const char* kSchema = "float[]";
  static at::ArrayRef<double> out(const kernels::SetThresholds& value) {
    return {value.of, static_cast<size_t>(value.count)};
  }
  static kernels::SetThresholds in(at::ArrayRef<double> value) {
    TORCH_CHECK(value.size() <= kernels::kMostSets, "spot: ", value.size(),
                " thresholds were given; at most ", kernels::kMostSets, " sets are supported");
    kernels::SetThresholds thresholds;
    for (const double threshold : value) thresholds.of[thresholds.count++] = threshold;
    return thresholds;
  }
  static std::string text(const kernels::SetThresholds&) { return "[]"; }
};

// A result as the dispatcher returns it: a struct of tensors is a tuple.
template <typename Result>
struct Returned {
  static constexpr size_t kSize = std::tuple_size_v<decltype(Result::kNames)>;
  template <size_t>
  using Each = at::Tensor;
  template <size_t... kAt>
  static std::tuple<Each<kAt>...> tuple_type(std::index_sequence<kAt...>);
  using Type = decltype(tuple_type(std::make_index_sequence<kSize>()));
  static Type out(Result r) {
    if constexpr (kSize == 2) {
      auto& [a, b] = r;
      return {a, b};
    } else if constexpr (kSize == 3) {
      auto& [a, b, c] = r;
      return {a, b, c};
    } else if constexpr (kSize == 4) {
      auto& [a, b, c, d] = r;
      return {a, b, c, d};
    } else {
      static_assert(kSize == 5, "results have 2 to 5 tensors");
      auto& [a, b, c, d, e] = r;
      return {a, b, c, d, e};
    }
  }
  static Result in(Type tuple) {
    return std::apply([](auto&&... each) { return Result{std::move(each)...}; }, std::move(tuple));
  }
  static std::string schema() {
    std::string text;
    for (const char* name : Result::kNames)
      text += (text.empty() ? "(Tensor " : ", Tensor ") + std::string(name);
    return text + ")";
  }
};
template <>
struct Returned<at::Tensor> {
  using Type = at::Tensor;
  static at::Tensor out(at::Tensor result) { return result; }
  static at::Tensor in(at::Tensor result) { return result; }
  static std::string schema() { return "Tensor"; }
};
template <>
struct Returned<void> {
  using Type = void;
  static std::string schema() { return "()"; }
};

}  // namespace detail

// An argument: its name in the schema, and the way to it in the struct (more than one member where structs are
// nested).
template <Use kUse, auto kFirst, auto... kRest>
struct Field {
  using Arguments = typename detail::MemberOf<decltype(kFirst)>::Class;
  using Value =
      std::remove_reference_t<decltype(detail::follow(std::declval<Arguments&>(), kFirst, kRest...))>;
  using Wire = detail::Wire<Value, kUse>;
  const char* name;

  static const Value& get(const Arguments& arguments) { return detail::follow(arguments, kFirst, kRest...); }
  static void set(Arguments& arguments, typename Wire::Type value) {
    detail::follow(arguments, kFirst, kRest...) = Wire::in(value);
  }
  static decltype(auto) wire(const Arguments& arguments) { return Wire::out(get(arguments)); }
  // Whether shapes are symbols of a compiler, which no check can compare.
  static bool symbolic(const Arguments& arguments) {
    if constexpr (std::is_same_v<Value, at::Tensor>) {
      const at::Tensor& x = get(arguments);
      return x.defined() && x.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
    } else {
      return false;
    }
  }
  std::string schema(const Arguments& defaults, char& alias) const {
    std::string type = Wire::kSchema;
    if (kUse == Use::updated || kUse == Use::optional_updated) type += std::string("(") + alias++ + "!)";
    const bool has_default = kUse == Use::optional || kUse == Use::optional_updated;
    if (has_default && std::is_same_v<Value, at::Tensor>) type += "?";
    std::string text = type + " " + name;
    if constexpr (kUse == Use::optional || kUse == Use::optional_updated)
      text += "=" + Wire::text(get(defaults));
    return text;
  }
};

template <auto... kPath>
constexpr auto required(const char* name) {
  return Field<Use::required, kPath...>{name};
}
template <auto... kPath>
constexpr auto optional(const char* name) {
  return Field<Use::optional, kPath...>{name};
}
template <auto... kPath>
constexpr auto updated(const char* name) {
  return Field<Use::updated, kPath...>{name};
}
template <auto... kPath>
constexpr auto optional_updated(const char* name) {
  return Field<Use::optional_updated, kPath...>{name};
}

namespace detail {

template <typename Arguments, typename Fields>
struct Boundary;
template <typename Arguments, typename... Each>
struct Boundary<Arguments, std::tuple<Each...>> {
  using Result = typename Arguments::Result;
  using Signature = typename Returned<Result>::Type(typename Each::Wire::Type...);

  template <auto kImplementation>
  static typename Returned<Result>::Type kernel(typename Each::Wire::Type... values) {
    Arguments arguments;
    (Each::set(arguments, values), ...);
    if (!(Each::symbolic(arguments) || ...)) arguments.check();
    if constexpr (std::is_void_v<Result>)
      kImplementation(arguments);
    else
      return Returned<Result>::out(kImplementation(arguments));
  }

  static std::string schema() {
    const Arguments defaults;
    char alias = 'a';
    std::string text;
    std::apply(
        [&](const auto&... field) {
          ((text += (text.empty() ? "" : ", ") + field.schema(defaults, alias)), ...);
        },
        Arguments::fields());
    return std::string(Arguments::kName) + "(" + text + ") -> " + Returned<Result>::schema();
  }

  static Result call(const Arguments& arguments) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow((std::string("spot::") + Arguments::kName).c_str(), "")
                               .template typed<Signature>();
    if constexpr (std::is_void_v<Result>)
      op.call(Each::wire(arguments)...);
    else
      return Returned<Result>::in(op.call(Each::wire(arguments)...));
  }
};

template <typename Arguments>
using BoundaryOf = Boundary<Arguments, decltype(Arguments::fields())>;

template <typename Function>
struct ArgumentsOf;
template <typename Result, typename Arguments>
struct ArgumentsOf<Result (*)(const Arguments&)> {
  using Type = Arguments;
};

}  // namespace detail

template <typename Arguments>
void define(torch::Library& library) {
  library.def(detail::BoundaryOf<Arguments>::schema().c_str(), {at::Tag::pt2_compliant_tag});
}

// One device's implementation of the operator whose struct it takes; the checks run before it.
template <auto kImplementation>
void implement(torch::Library& library) {
  using Arguments = typename detail::ArgumentsOf<decltype(kImplementation)>::Type;
  library.impl(Arguments::kName, &detail::BoundaryOf<Arguments>::template kernel<kImplementation>);
}

template <typename Arguments>
typename Arguments::Result call(const Arguments& arguments) {
  return detail::BoundaryOf<Arguments>::call(arguments);
}

}  // namespace spot::ops

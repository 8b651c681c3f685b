// The variable `loop` of a for statement.
#pragma once

#include <functional>
#include <string>

#include "text/jinja/value.h"

namespace spot::jinja {

struct LoopObject final : Object {
  explicit LoopObject(const Value& iterable, int64_t nesting);

  // Moves to the next item; false after the last.
  bool advance(Value& item);
  // loop.NAME; kMissing if there is no such attribute.
  Value attribute(const std::string& name, const std::shared_ptr<LoopObject>& self);
  int64_t length();
  std::string description();
  // Lets go of all values, so that a loop stored in a namespace is no part of a cycle.
  void clear();

  std::function<Value(Arguments)> recurse;  // of a loop marked recursive

 private:
  bool peek(Value& item);

  Value iterable_;
  std::unique_ptr<Iteration> iteration_;
  std::vector<Value> ahead_;  // read in advance, in order
  size_t ahead_begin_ = 0;
  int64_t index0_ = -1, depth0_, length_ = -1;
  Value before_, current_, changed_;
};

LoopObject& loop_of(const Value& value);

}  // namespace spot::jinja

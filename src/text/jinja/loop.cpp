#include "text/jinja/loop.h"

namespace spot::jinja {

LoopObject::LoopObject(const Value& iterable, int64_t nesting)
    : iterable_(iterable), iteration_(std::make_unique<Iteration>(iterable)), depth0_(nesting) {
  depth = 1 + iterable.depth();
}

bool LoopObject::peek(Value& item) {
  if (ahead_begin_ == ahead_.size()) {
    Value next;
    if (!iteration_->next(next)) return false;
    ahead_.clear(), ahead_begin_ = 0;
    ahead_.push_back(std::move(next));
  }
  item = ahead_[ahead_begin_];
  return true;
}

bool LoopObject::advance(Value& item) {
  if (!peek(item)) return false;
  ++ahead_begin_, ++index0_;
  before_ = std::move(current_);
  current_ = item;
  return true;
}

int64_t LoopObject::length() {
  if (length_ >= 0) return length_;
  if (const auto known = length_of(iterable_)) return length_ = *known;
  std::vector<Value> rest(ahead_.begin() + static_cast<ptrdiff_t>(ahead_begin_), ahead_.end());
  for (Value next; iteration_->next(next);) rest.push_back(std::move(next));
  ahead_ = std::move(rest), ahead_begin_ = 0;
  return length_ = index0_ + 1 + static_cast<int64_t>(ahead_.size());
}

std::string LoopObject::description() {
  return fmt::format("<LoopContext {}/{}>", index0_ + 1, length());
}

void LoopObject::clear() {
  iterable_ = before_ = current_ = changed_ = Value();
  ahead_.clear(), ahead_begin_ = 0;
  iteration_ = std::make_unique<Iteration>(Value::undefined(""));
  recurse = nullptr;
}

Value LoopObject::attribute(const std::string& name, const std::shared_ptr<LoopObject>& self) {
  const auto method = [&](std::function<Value(LoopObject&, Arguments)> body) {
    auto callable = std::make_shared<CallableObject>();
    callable->name = "loop." + name;
    callable->depth = 1 + depth;
    callable->call = [self, body = std::move(body)](Arguments arguments) {
      return body(*self, std::move(arguments));
    };
    return Value::object(Type::kCallable, std::move(callable));
  };
  Value next;
  if (name == "index") return Value::integer(index0_ + 1);
  if (name == "index0") return Value::integer(index0_);
  if (name == "first") return Value::boolean(index0_ == 0);
  if (name == "last") return Value::boolean(!peek(next));
  if (name == "length") return Value::integer(length());
  if (name == "revindex") return Value::integer(length() - index0_);
  if (name == "revindex0") return Value::integer(length() - index0_ - 1);
  if (name == "depth") return Value::integer(depth0_ + 1);
  if (name == "depth0") return Value::integer(depth0_);
  if (name == "previtem") return index0_ == 0 ? Value::undefined("there is no previous item") : before_;
  if (name == "nextitem") return peek(next) ? next : Value::undefined("there is no next item");
  if (name == "cycle") {
    return method([](LoopObject& loop, Arguments arguments) {
      if (!arguments.named.empty()) fault("loop.cycle takes no named arguments");
      if (arguments.positional.empty()) fault("loop.cycle: no items for cycling given");
      return arguments.positional[static_cast<size_t>(loop.index0_) % arguments.positional.size()];
    });
  }
  if (name == "changed") {
    return method([](LoopObject& loop, Arguments arguments) {
      if (!arguments.named.empty()) fault("loop.changed takes no named arguments");
      Value now = Value::tuple(std::move(arguments.positional));
      if (!loop.changed_.is_missing() && equal(loop.changed_, now)) return Value::boolean(false);
      loop.changed_ = std::move(now);
      return Value::boolean(true);
    });
  }
  return Value();
}

LoopObject& loop_of(const Value& value) {
  return static_cast<LoopObject&>(*value.object());
}

}  // namespace spot::jinja

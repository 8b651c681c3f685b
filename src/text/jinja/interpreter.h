// Walks the syntax tree of a template.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "text/jinja/loop.h"
#include "text/jinja/syntax.h"
#include "text/jinja/template.h"
#include "text/jinja/value.h"

namespace spot::jinja {

// The variables of one entered scope.
struct Scope {
  std::vector<Value> slots;
  std::shared_ptr<Scope> parent;
};

// One rendering. Throws Fault; line() then says where.
class Interpreter {
 public:
  Interpreter() = default;
  ~Interpreter();
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

  std::string render(const ScopedBlock& root, const Variables& variables);
  int line() const { return line_; }

 private:
  using ScopePtr = std::shared_ptr<Scope>;
  enum class Flow { kNormal, kBreak, kContinue };

  // interpreter.cpp: statements
  ScopePtr open(const std::vector<Load>& loads, const ScopePtr& parent);
  void enter(Scope& scope, const std::vector<Load>& loads);
  Flow run(const Block& block, const ScopePtr& scope, std::string& out);
  Flow run(const Statement& statement, const ScopePtr& scope, std::string& out);
  Flow run_if(const Statement& statement, const ScopePtr& scope, std::string& out);
  Flow run_loop(const Statement& statement, const ScopePtr& scope, const Value& source, int64_t nesting,
                std::string& out);
  Value recursive_loop(const Statement& statement, const ScopePtr& scope, const Value& source,
                       int64_t nesting);
  Value filtered(const Statement& statement, const ScopePtr& scope, const Value& source);
  Flow run_set(const Statement& statement, const ScopePtr& scope);
  Flow run_captured(const Statement& statement, const ScopePtr& scope, std::string& out);
  void run_call_block(const Statement& statement, const ScopePtr& scope, std::string& out);
  Flow run_with(const Statement& statement, const ScopePtr& scope, std::string& out);
  void assign(const Expression& target, Value value, const ScopePtr& scope);
  void check_namespaces(const Expression& target, const ScopePtr& scope);
  Value make_macro(const Statement& statement, const ScopePtr& scope);
  Value call_macro(const Statement& statement, const ScopePtr& scope, const std::string& name,
                   Arguments arguments);
  void write(std::string& out, std::string_view text);

  // evaluation.cpp: expressions
  Value evaluate(const Expression& expression, const ScopePtr& scope);
  Value evaluate_operands(const Expression& expression, const ScopePtr& scope);
  Value evaluate_dict(const Expression& expression, const ScopePtr& scope);
  Value evaluate_compare(const Expression& expression, const ScopePtr& scope);
  Value evaluate_call(const Expression& expression, const ScopePtr& scope, const Value* caller);
  Value evaluate_slice(const Expression& expression, const ScopePtr& scope);
  Value apply_filters(const Expression& expression, const ScopePtr& scope, const Value* innermost);
  Arguments evaluate_arguments(const ArgumentList& list, const ScopePtr& scope);
  Value call(const Value& callee, Arguments arguments);
  Value* variable(const Expression& name, const ScopePtr& scope);

  // globals.cpp
  void add_globals();
  Value make_namespace(Arguments arguments);

  struct Depth;

  std::unordered_map<std::string, Value> context_;
  // Kept to the end and emptied then: what could hold itself.
  std::vector<std::shared_ptr<NamespaceObject>> namespaces_;
  std::vector<ScopePtr> captured_scopes_;
  std::vector<std::shared_ptr<LoopObject>> kept_loops_;
  int line_ = 1, depth_ = 0;
};

// Counts nested evaluations while it lives.
struct Interpreter::Depth {
  explicit Depth(Interpreter& owner) : interpreter(owner) {
    if (++interpreter.depth_ > kMaxCallDepth) {
      --interpreter.depth_;
      fault("calls and expressions are nested more than {} deep", kMaxCallDepth);
    }
  }
  ~Depth() { --interpreter.depth_; }
  Interpreter& interpreter;
};

}  // namespace spot::jinja

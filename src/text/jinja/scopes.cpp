#include "text/jinja/scopes.h"

#include <algorithm>
#include <set>
#include <tuple>

#include "text/jinja/filters.h"

namespace spot::jinja {
namespace {

using Expressions = std::vector<ExpressionPtr>;
using Kind = Expression::Kind;

// The variables of one scope while they are found, after jinja2's Symbols.
struct Symbols {
  const Symbols* parent = nullptr;
  std::vector<Load> loads;  // every name that the scope knows itself
  std::set<std::string> stores;

  Load* own(const std::string& name) {
    for (Load& load : loads)
      if (load.name == name) return &load;
    return nullptr;
  }
  bool knows(const std::string& name) const {
    for (const Symbols* scope = this; scope; scope = scope->parent)
      for (const Load& load : scope->loads)
        if (load.name == name) return true;
    return false;
  }
  void define(const std::string& name, Load::Kind kind) {
    if (Load* load = own(name)) {
      load->kind = kind;
    } else {
      loads.push_back({name, kind});
    }
  }
  void load(const std::string& name) {
    if (!knows(name)) define(name, Load::Kind::kContext);
  }
  void store(const std::string& name) {
    stores.insert(name);
    if (own(name)) return;
    define(name, parent && parent->knows(name) ? Load::Kind::kOuter : Load::Kind::kUnset);
  }
  void parameter(const std::string& name) {
    stores.insert(name);
    define(name, Load::Kind::kParameter);
  }
  // Joins what the branches of a condition did to copies of this scope: a name that only some of them store
  // begins as what it was outside.
  void join(const std::vector<Symbols>& branches) {
    std::set<std::string> stored;
    for (const Symbols& branch : branches) stored.insert(branch.stores.begin(), branch.stores.end());
    for (const std::string& name : stores) stored.erase(name);
    for (const Symbols& branch : branches) {
      for (const Load& load : branch.loads) define(load.name, load.kind);
      stores.insert(branch.stores.begin(), branch.stores.end());
    }
    for (const std::string& name : stored)
      define(name, parent && parent->knows(name) ? Load::Kind::kOuter : Load::Kind::kContext);
  }
};

// --- finding the variables of a scope ---

void find_in(const Expression& expression, Symbols& symbols);

void find_in(const ArgumentList& arguments, Symbols& symbols) {
  for (const auto& argument : arguments.positional) find_in(*argument, symbols);
  for (const auto& [name, argument] : arguments.named) find_in(*argument, symbols);
  if (arguments.rest) find_in(*arguments.rest, symbols);
  if (arguments.named_rest) find_in(*arguments.named_rest, symbols);
}

void find_in(const Expression& expression, Symbols& symbols) {
  if (expression.kind == Kind::kName || expression.kind == Kind::kNamespaceRef) symbols.load(expression.name);
  for (const auto& operand : expression.operands)
    if (operand) find_in(*operand, symbols);
  find_in(expression.arguments, symbols);
}

void find_target(const Expression& target, Symbols& symbols, bool as_parameter) {
  if (target.kind == Kind::kTuple) {
    for (const auto& item : target.operands) find_target(*item, symbols, as_parameter);
  } else if (target.kind == Kind::kNamespaceRef) {
    symbols.load(target.name);
  } else if (as_parameter) {
    symbols.parameter(target.name);
  } else {
    symbols.store(target.name);
  }
}

void find_in(const Block& block, Symbols& symbols);

void find_in_branches(const Statement& statement, size_t first, Symbols& symbols) {
  find_in(*statement.branches[first].first, symbols);
  std::vector<Symbols> branches(3, symbols);
  find_in(statement.branches[first].second, branches[0]);
  if (first == 0) {
    for (size_t i = 1; i < statement.branches.size(); ++i) {
      find_in(*statement.branches[i].first, branches[1]);
      std::vector<Symbols> alone(1, branches[1]);
      find_in(statement.branches[i].second, alone[0]);
      branches[1].join(alone);
    }
    find_in(statement.otherwise.block, branches[2]);
  }
  symbols.join(branches);
}

// Nested scopes are left out, except what they evaluate in this one.
void find_in(const Block& block, Symbols& symbols) {
  for (const auto& statement : block) {
    switch (statement->kind) {
      case Statement::Kind::kOutput:
      case Statement::Kind::kWith:
        for (const auto& expression : statement->expressions) find_in(*expression, symbols);
        break;
      case Statement::Kind::kIf:
        find_in_branches(*statement, 0, symbols);
        break;
      case Statement::Kind::kSet:
        find_in(*statement->source, symbols);
        find_target(*statement->target, symbols, false);
        break;
      case Statement::Kind::kSetBlock:
        find_target(*statement->target, symbols, false);
        break;
      case Statement::Kind::kFor:
        find_in(*statement->source, symbols);
        break;
      case Statement::Kind::kMacro:
        symbols.store(statement->name);
        break;
      case Statement::Kind::kCallBlock:
        find_in(*statement->call, symbols);
        break;
      case Statement::Kind::kFilterBlock:
        find_in(*statement->filter, symbols);
        break;
      default:
        break;
    }
  }
}

// --- names that a body reads before it stores them ---

class Undeclared {
 public:
  explicit Undeclared(std::set<std::string> names) : names_(std::move(names)) {}

  bool found(const std::string& name) const { return found_.count(name) > 0; }

  void visit(const Block& block) {
    for (const auto& statement : block) visit(*statement);
  }

 private:
  void visit(const Statement& s) {
    if (s.kind == Statement::Kind::kMacro || s.kind == Statement::Kind::kCallBlock) {
      if (s.call) visit(*s.call);
      for (const Parameter& parameter : s.parameters) names_.erase(parameter.name);
      for (const Parameter& parameter : s.parameters)
        if (parameter.default_value) visit(*parameter.default_value);
      return visit(s.body.block);
    }
    if (s.target) target(*s.target);
    for (const auto& item : s.targets) target(*item);
    if (s.source) visit(*s.source);
    if (s.filter && s.kind == Statement::Kind::kSetBlock) visit(*s.filter);
    for (const auto& expression : s.expressions) visit(*expression);
    for (const auto& [test, block] : s.branches) visit(*test), visit(block);
    visit(s.body.block);
    visit(s.otherwise.block);
    if (s.test) visit(*s.test);
    if (s.filter && s.kind == Statement::Kind::kFilterBlock) visit(*s.filter);
  }

  void target(const Expression& e) {
    for (const auto& item : e.operands) target(*item);
    if (e.kind == Kind::kName) names_.erase(e.name);
  }

  void visit(const Expression& e) {
    if (e.kind == Kind::kName && names_.count(e.name)) found_.insert(e.name);
    for (const auto& operand : e.operands)
      if (operand) visit(*operand);
    for (const auto& argument : e.arguments.positional) visit(*argument);
    for (const auto& [name, argument] : e.arguments.named) visit(*argument);
    if (e.arguments.rest) visit(*e.arguments.rest);
    if (e.arguments.named_rest) visit(*e.arguments.named_rest);
  }

  std::set<std::string> names_, found_;
};

// --- placing the variables ---

class Resolver {
 public:
  void root(ScopedBlock& block) {
    Symbols symbols;
    find_in(block.block, symbols);
    place(block.block, symbols, false);
    block.loads = symbols.loads;
  }

 private:
  static std::pair<int, int> where(const std::string& name, const Symbols* scope) {
    for (int hops = 0; scope; scope = scope->parent, ++hops)
      for (size_t i = 0; i < scope->loads.size(); ++i)
        if (scope->loads[i].name == name) return {hops, static_cast<int>(i)};
    return {-1, -1};
  }

  // Settles a scope whose variables have all been found.
  static void settle(Symbols& symbols) {
    for (Load& load : symbols.loads)
      if (load.kind == Load::Kind::kOuter) std::tie(load.hops, load.slot) = where(load.name, symbols.parent);
  }

  void place(Expression& e, const Symbols& symbols, bool soft) {
    const bool inner_soft = soft || e.kind == Kind::kCondition;
    if (e.kind == Kind::kName || e.kind == Kind::kNamespaceRef)
      std::tie(e.hops, e.slot) = where(e.name, &symbols);
    if (e.kind == Kind::kFilter || e.kind == Kind::kTest) check_name(e, soft);
    for (auto& operand : e.operands)
      if (operand) place(*operand, symbols, inner_soft);
    for (auto& argument : e.arguments.positional) place(*argument, symbols, inner_soft);
    for (auto& [name, argument] : e.arguments.named) place(*argument, symbols, inner_soft);
    if (e.arguments.rest) place(*e.arguments.rest, symbols, inner_soft);
    if (e.arguments.named_rest) place(*e.arguments.named_rest, symbols, inner_soft);
  }

  static void check_name(const Expression& e, bool soft) {
    const bool is_filter = e.kind == Kind::kFilter;
    switch (is_filter ? filter_support(e.name) : test_support(e.name)) {
      case Support::kSupported:
        return;
      case Support::kUnsupported:
        throw SyntaxFault(e.line,
                          fmt::format("the {} {} is not supported", is_filter ? "filter" : "test", e.name));
      case Support::kUnknown:
        if (!soft)
          throw SyntaxFault(e.line, fmt::format("no {} named '{}'", is_filter ? "filter" : "test", e.name));
    }
  }

  void place(Block& block, Symbols& symbols, bool soft) {
    for (auto& statement : block) place(*statement, symbols, soft);
  }

  // A nested scope: `find` finds its own variables, `more` places what else belongs to it.
  template <typename Find, typename More>
  std::vector<Load> nested(Block* block, const Symbols& parent, Find find, More more) {
    Symbols symbols;
    symbols.parent = &parent;
    find(symbols);
    settle(symbols);
    if (block) place(*block, symbols, false);
    more(symbols);
    return symbols.loads;
  }

  void place(Statement& s, Symbols& symbols, bool soft) {
    switch (s.kind) {
      case Statement::Kind::kOutput:
        for (auto& expression : s.expressions) place(*expression, symbols, soft);
        return;
      case Statement::Kind::kIf:
        for (auto& [test, block] : s.branches) place(*test, symbols, true), place(block, symbols, true);
        return place(s.otherwise.block, symbols, true);
      case Statement::Kind::kSet:
        place(*s.source, symbols, soft);
        return place(*s.target, symbols, soft);
      case Statement::Kind::kSetBlock:
        place(*s.target, symbols, soft);
        s.body.loads = nested(
            &s.body.block, symbols, [&](Symbols& inner) { find_in(s.body.block, inner); },
            [&](const Symbols& inner) {
              if (s.filter) place(*s.filter, inner, false);
            });
        return;
      case Statement::Kind::kFor:
        return place_for(s, symbols, soft);
      case Statement::Kind::kMacro:
        s.slot = where(s.name, &symbols).second;
        return place_macro(s, symbols);
      case Statement::Kind::kCallBlock:
        place(*s.call, symbols, soft);
        return place_macro(s, symbols);
      case Statement::Kind::kGeneration:
        return place_macro(s, symbols);
      case Statement::Kind::kFilterBlock:
        s.body.loads = nested(
            &s.body.block, symbols,
            [&](Symbols& inner) { find_in(s.body.block, inner), find_in(*s.filter, inner); },
            [&](const Symbols& inner) { place(*s.filter, inner, false); });
        return;
      case Statement::Kind::kWith:
        for (auto& expression : s.expressions) place(*expression, symbols, soft);
        s.body.loads = nested(
            &s.body.block, symbols,
            [&](Symbols& inner) {
              for (const auto& target : s.targets) find_target(*target, inner, true);
              find_in(s.body.block, inner);
            },
            [&](const Symbols& inner) {
              for (auto& target : s.targets) place(*target, inner, false);
            });
        return;
      case Statement::Kind::kBreak:
      case Statement::Kind::kContinue:
        return;
    }
  }

  void place_for(Statement& s, Symbols& symbols, bool soft) {
    place(*s.source, symbols, soft);
    check_loop_target(*s.target);
    check_loop_stores(s.body.block), check_loop_stores(s.otherwise.block);
    Undeclared undeclared({"loop"});
    undeclared.visit(s.body.block);
    const bool needs_loop = s.recursive || undeclared.found("loop");
    if (s.test) {
      s.test_target = copy_target(*s.target);
      s.test_loads = nested(
          nullptr, symbols,
          [&](Symbols& inner) { find_target(*s.test_target, inner, true), find_in(*s.test, inner); },
          [&](const Symbols& inner) { place(*s.test_target, inner, false), place(*s.test, inner, false); });
    }
    s.body.loads = nested(
        &s.body.block, symbols,
        [&](Symbols& inner) {
          if (needs_loop) inner.parameter("loop");
          find_target(*s.target, inner, true);
          find_in(s.body.block, inner);
        },
        [&](const Symbols& inner) { place(*s.target, inner, false); });
    s.otherwise.loads = nested(
        &s.otherwise.block, symbols, [&](Symbols& inner) { find_in(s.otherwise.block, inner); },
        [](const Symbols&) {});
  }

  void place_macro(Statement& s, Symbols& symbols) {
    std::set<std::string> given;
    for (const Parameter& parameter : s.parameters) {
      if (parameter.name == "caller") throw SyntaxFault(s.line, "a parameter named caller is not supported");
      given.insert(parameter.name);
    }
    Undeclared undeclared({"caller", "kwargs", "varargs"});
    undeclared.visit(s.body.block);
    s.takes_caller = undeclared.found("caller");
    s.takes_named = undeclared.found("kwargs") && !given.count("kwargs");
    s.takes_rest = undeclared.found("varargs") && !given.count("varargs");
    s.body.loads = nested(
        &s.body.block, symbols,
        [&](Symbols& inner) {
          for (const Parameter& parameter : s.parameters) inner.parameter(parameter.name);
          if (s.takes_caller) inner.parameter("caller");
          if (s.takes_named) inner.parameter("kwargs");
          if (s.takes_rest) inner.parameter("varargs");
          for (const Parameter& parameter : s.parameters)
            if (parameter.default_value) find_in(*parameter.default_value, inner);
          find_in(s.body.block, inner);
        },
        [&](const Symbols& inner) {
          for (Parameter& parameter : s.parameters)
            if (parameter.default_value) place(*parameter.default_value, inner, false);
        });
  }

  static ExpressionPtr copy_target(const Expression& target) {
    auto copy = std::make_unique<Expression>();
    copy->kind = target.kind, copy->line = target.line, copy->name = target.name;
    for (const auto& item : target.operands) copy->operands.push_back(copy_target(*item));
    return copy;
  }

  static void check_loop_target(const Expression& target) {
    if (target.kind == Kind::kName && target.name == "loop")
      throw SyntaxFault(target.line, "can't assign to the special variable loop in a for statement");
    for (const auto& item : target.operands) check_loop_target(*item);
  }

  static void check_loop_stores(const Block& block) {
    for (const auto& s : block) {
      if (s->target) check_loop_target(*s->target);
      for (const auto& [test, inner] : s->branches) check_loop_stores(inner);
      check_loop_stores(s->body.block), check_loop_stores(s->otherwise.block);
    }
  }
};

}  // namespace

void resolve_scopes(ScopedBlock& root) {
  Resolver().root(root);
}

}  // namespace spot::jinja

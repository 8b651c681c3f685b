// The syntax tree of a template.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "text/jinja/limits.h"
#include "text/jinja/operators.h"
#include "text/jinja/value.h"

namespace spot::jinja {

// A template that cannot be read: where and why.
struct SyntaxFault : Fault {
  SyntaxFault(int at, const std::string& message) : Fault(message), line(at) {}
  int line;
};

struct Expression;
using ExpressionPtr = std::unique_ptr<Expression>;

// Arguments of a call, a filter or a test, as written.
struct ArgumentList {
  std::vector<ExpressionPtr> positional;
  std::vector<std::pair<std::string, ExpressionPtr>> named;
  ExpressionPtr rest, named_rest;  // *rest, **named_rest
};

struct Expression {
  enum class Kind {
    kConstant,   // value
    kName,       // name
    kList,       // operands
    kTuple,      // operands
    kDict,       // operands: key, value, key, value
    kCondition,  // operands: test, then[, else]
    kAnd,        // operands: left, right
    kOr,
    kNot,  // operands: one, as for the next two
    kNegate,
    kPlus,
    kBinary,       // op; operands: left, right
    kConcat,       // operands, joined as text
    kCompare,      // operands: first, second, ...; comparisons between them
    kAttribute,    // operands: value; name
    kItem,         // operands: value, key
    kSlice,        // operands: value, start, stop, step (null where omitted)
    kCall,         // operands: callee; arguments
    kFilter,       // operands: value (null in a filter or set block); name, arguments
    kTest,         // operands: value; name, arguments
    kNamespaceRef  // as a target of set: name.attribute
  };
  Kind kind;
  int line = 1;
  std::string name, attribute;
  int hops = -1, slot = -1;  // of a variable: scopes to go up, and its place there; -1: out of reach
  Value value;
  Operator op = Operator::kAdd;
  std::vector<Comparison> comparisons;
  std::vector<ExpressionPtr> operands;
  ArgumentList arguments;
};

// What a variable holds when its scope is entered.
struct Load {
  enum class Kind {
    kParameter,  // set by the statement that opens the scope
    kContext,    // looked up among the template's inputs
    kOuter,      // a copy of the variable of the scope around
    kUnset
  };
  std::string name;
  Kind kind;
  int hops = 0, slot = 0;  // of kOuter: where the outer variable is, seen from the scope around
};

struct Statement;
using Block = std::vector<std::unique_ptr<Statement>>;

struct Parameter {
  std::string name;
  ExpressionPtr default_value;  // may be null
};

// A body that opens a scope, with the variables it has.
struct ScopedBlock {
  Block block;
  std::vector<Load> loads;
};

struct Statement {
  enum class Kind {
    kOutput,       // expressions; constants are text
    kFor,          // target, source, test, body, otherwise, recursive
    kIf,           // branches, otherwise.block
    kSet,          // target, source
    kSetBlock,     // target, filter, body
    kMacro,        // name, parameters, body
    kCallBlock,    // call, parameters, body
    kGeneration,   // body: what transformers marks as the assistant's
    kFilterBlock,  // filter, body
    kWith,         // targets, expressions (their values), body
    kBreak,
    kContinue
  };
  Kind kind;
  int line = 1;
  std::string name;
  ExpressionPtr target, source, test, filter, call;
  std::vector<ExpressionPtr> expressions, targets;
  std::vector<std::pair<ExpressionPtr, Block>> branches;
  std::vector<Parameter> parameters;
  ScopedBlock body, otherwise;
  std::vector<Load> test_loads;  // of a for statement's filter
  ExpressionPtr test_target;     // the for statement's target as variables of test_loads
  int slot = -1;                 // of a macro: the variable that holds it
  bool recursive = false;
  // Whether a macro's body names these without being given them.
  bool takes_caller = false, takes_named = false, takes_rest = false;
};

// Reads a template. Throws SyntaxFault for what jinja2 refuses to compile and for what is not supported here.
ScopedBlock parse(std::string_view source);

}  // namespace spot::jinja

#include "text/jinja/template.h"

#include "core/error.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/syntax.h"

namespace spot::jinja {

Template::Template(std::string_view source, std::string name) : name_(std::move(name)) {
  try {
    root_ = std::make_shared<const ScopedBlock>(parse(source));
  } catch (const SyntaxFault& e) {
    fail("{}: line {} of the template: {}", name_, e.line, e.what());
  }
}

std::string Template::render(const Variables& variables) const {
  const Budget budget;
  Interpreter interpreter;
  try {
    return interpreter.render(*root_, variables);
  } catch (const Fault& e) {
    fail("{}: line {} of the template: {}", name_, interpreter.line(), e.what());
  }
}

}  // namespace spot::jinja

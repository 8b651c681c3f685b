// Which scope each variable of a template lives in.
#pragma once

#include "text/jinja/syntax.h"

namespace spot::jinja {

// Fills in the loads of every scope and the place of every variable. jinja2 decides both before a template
// runs: a name that a scope stores is that scope's own from its beginning on, set or not. Throws SyntaxFault
// for filters and tests that do not exist (outside of conditions) or are not supported, and for assignments
// to `loop`.
void resolve_scopes(ScopedBlock& root);

}  // namespace spot::jinja

// How much xgrammar may do for one schema.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace spot {

struct TooMuchWork : std::runtime_error {
  TooMuchWork() : std::runtime_error("it takes too much work") {}
};

// While one lives, xgrammar's work in this thread is counted (cmake/XGrammar.cmake has the weights; a unit is 1 to 4 ns), and what
// goes past the limit throws TooMuchWork. Counts, unlike seconds, are the same on every machine. They do not nest.
class WorkLimit {
 public:
  explicit WorkLimit(int64_t most);
  ~WorkLimit();
  WorkLimit(const WorkLimit&) = delete;
  WorkLimit& operator=(const WorkLimit&) = delete;

  int64_t done() const;

 private:
  int64_t most_;
};

}  // namespace spot

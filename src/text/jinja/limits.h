// What keeps a stranger's template from taking all time, memory or stack.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace spot::jinja {

constexpr int kMaxValueDepth = 100;             // nesting of lists and dicts
constexpr int kMaxSyntaxDepth = 240;            // nesting of expressions and statements in the source
constexpr int kMaxCallDepth = 1500;             // nested evaluations while rendering
constexpr int64_t kMaxStringBytes = 64 << 20;   // of one string, the rendered text included
constexpr int64_t kMaxLiveBytes = 1 << 30;      // of all values at one time
constexpr int64_t kMaxWork = 200'000'000;       // evaluated nodes, elements, and 64-byte pieces of text
constexpr int64_t kMaxTemplateBytes = 4 << 20;  // of the source

// A fault of the template or its data, before the interpreter has added where it happened.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Args>
[[noreturn]] void fault(fmt::format_string<Args...> format, Args&&... args) {
  throw Fault(fmt::format(format, std::forward<Args>(args)...));
}

// Counts the work and the memory of the rendering that runs on this thread.
class Budget {
 public:
  Budget();
  ~Budget();
  Budget(const Budget&) = delete;
  Budget& operator=(const Budget&) = delete;

 private:
  Budget* outer_;
  friend void spend(int64_t);
  friend void hold(int64_t);
  int64_t work_left_ = kMaxWork;
  int64_t bytes_before_;
};

// Spends work; throws Fault when the rendering has used all of its own. Free outside a rendering.
void spend(int64_t work);
inline void spend_bytes(size_t bytes) {
  spend(1 + static_cast<int64_t>(bytes / 64));
}
// Counts bytes held by values of this thread; throws Fault beyond kMaxLiveBytes.
void hold(int64_t bytes);
void release(int64_t bytes) noexcept;

}  // namespace spot::jinja

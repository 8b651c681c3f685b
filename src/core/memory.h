// Memory that may not suffice: asked for before it is taken, and named where it ends.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <string>

namespace spot {

// Bytes that this process may still take on the host: what the system has free or can free (swap included), within the limits
// of its control group and of its address space (ulimit -v). The largest int64_t where nothing says.
int64_t available_memory();

// What a large allocation serves: "{what} needs 3.20 GiB ...; {remedy}".
struct MemoryNeed {
  std::string what;    // "the cache of 4096 tokens"
  std::string remedy;  // "use a shorter context"
  double bytes = 0;    // 0: not known
  bool on_host = true;
};

// Runs `work`. Throws Error, one sentence of what was needed, what there is and what to do, before it where the host has less
// than `bytes`, and in place of whatever says that memory has ended in it (std::bad_alloc, torch's CPU and CUDA allocators).
void within_memory(const MemoryNeed& need, const std::function<void()>& work);

// Whether an exception says that memory has ended; `asked` then is what was asked for, as text, or empty.
bool is_out_of_memory(const std::exception& error, std::string& asked);

}  // namespace spot

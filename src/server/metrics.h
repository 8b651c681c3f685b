// The server's metrics, under vLLM's names where vLLM has them, so that its dashboards and autoscalers read them.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "engine/request.h"
#include "server/prometheus.h"

namespace spot::server {

class Metrics {
 public:
  // cache_dtype: as --kv-cache-dtype was given.
  Metrics(const std::string& model, int64_t page_tokens, int64_t num_pages, const std::string& cache_dtype,
          bool prefix_cache);

  std::string text() const { return registry_.text(); }

 private:
  Registry registry_;

 public:
  // Of the engine, set after each step.
  Metric &running, &waiting, &cache_usage;
  Metric &cache_queries, &cache_hits, &preemptions;  // tokens, tokens, times
  Metric &prompt_tokens, &generation_tokens;
  Histogram& step_tokens;
  // Of requests: seconds since a request's body was there.
  Histogram &first_token, &between_tokens, &mean_between_tokens, &whole, &queue, &prefill, &decode,
      &inference;
  Histogram &request_prompt_tokens, &request_generation_tokens, &request_completions, &request_max_tokens;
  // Of sparse attention: queries, tokens that they attended to and tokens that they could have, summed over layers.
  Metric &sparse_queries, &attended_tokens, &visible_tokens;
  Metric &captured_mass, &captured_mass_queries;  // sum and number of what was watched
  Metric& connections;

  // Ends of answers ("stop", "length", "abort", "error") and of connections ("gone", "slow").
  Metric& ended(const std::string& reason) { return *ended_.at(reason); }
  Metric& dropped(const std::string& reason) { return *dropped_.at(reason); }
  Metric& refused(int status);  // requests answered by an error

 private:
  std::map<std::string, Metric*> ended_, dropped_;
  std::map<int, Metric*> refused_;
};

}  // namespace spot::server

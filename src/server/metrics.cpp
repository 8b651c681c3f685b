#include "server/metrics.h"

namespace spot::server {
namespace {

// vLLM's bounds, so that one dashboard serves both.
const std::vector<double> kFirstToken = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
                                         1,     2.5,   5,    7.5,  10,   20,   40,   80,  160,  640, 2560};
const std::vector<double> kBetweenTokens = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
                                            0.75, 1,     2.5,  5,     7.5, 10,   20,  40,  80};
const std::vector<double> kSeconds = {0.3, 0.5, 0.8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                      30,  40,  50,  60, 120, 240, 480, 960, 1920, 7680};
const std::vector<double> kTokens = {1,    2,    5,    10,    20,    50,    100,    200,   500,
                                     1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000};
const std::vector<double> kStepTokens = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
const std::vector<double> kFew = {1, 2, 5, 10, 20};

}  // namespace

Metrics::Metrics(const std::string& model, int64_t page_tokens, int64_t num_pages,
                 const std::string& cache_dtype, bool prefix_cache)
    : registry_({{"model_name", model}, {"engine", "0"}}),
      running(registry_.gauge("vllm:num_requests_running", "Answers in progress.")),
      waiting(registry_.gauge("vllm:num_requests_waiting", "Answers that wait for their turn.")),
      cache_usage(
          registry_.gauge("vllm:kv_cache_usage_perc", "Share of the pages that requests hold, 0 to 1.")),
      cache_queries(registry_.counter("vllm:prefix_cache_queries_total",
                                      "Prompt tokens looked up in the prefix cache.")),
      cache_hits(
          registry_.counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.")),
      preemptions(registry_.counter("vllm:num_preemptions_total",
                                    "Answers that gave up their pages to be read again.")),
      prompt_tokens(
          registry_.counter("vllm:prompt_tokens_total", "Prompt tokens read, cached ones included.")),
      generation_tokens(registry_.counter("vllm:generation_tokens_total", "Tokens written.")),
      step_tokens(registry_.histogram("vllm:iteration_tokens_total", "Tokens of a step.", kStepTokens)),
      first_token(registry_.histogram("vllm:time_to_first_token_seconds", "Arrival to the first token.",
                                      kFirstToken)),
      between_tokens(registry_.histogram("vllm:inter_token_latency_seconds",
                                         "Between two tokens of an answer.", kBetweenTokens)),
      mean_between_tokens(registry_.histogram("vllm:request_time_per_output_token_seconds",
                                              "Mean time between an answer's tokens.", kBetweenTokens)),
      whole(registry_.histogram("vllm:e2e_request_latency_seconds", "Arrival to the last token.", kSeconds)),
      queue(registry_.histogram("vllm:request_queue_time_seconds", "In the queue.", kSeconds)),
      prefill(registry_.histogram("vllm:request_prefill_time_seconds", "First step to the first token.",
                                  kSeconds)),
      decode(registry_.histogram("vllm:request_decode_time_seconds", "First token to the last.", kSeconds)),
      inference(registry_.histogram("vllm:request_inference_time_seconds", "First step to the last token.",
                                    kSeconds)),
      request_prompt_tokens(
          registry_.histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", kTokens)),
      request_generation_tokens(
          registry_.histogram("vllm:request_generation_tokens", "Tokens of an answer.", kTokens)),
      request_completions(registry_.histogram("vllm:request_params_n", "n of a request.", kFew)),
      request_max_tokens(
          registry_.histogram("vllm:request_params_max_tokens", "max_tokens of a request.", kTokens)),
      sparse_queries(registry_.counter("spot:sparse_queries_total",
                                       "Queries of ended answers that selected, summed over layers.")),
      attended_tokens(registry_.counter("spot:attended_tokens_total", "Tokens that these attended to.")),
      visible_tokens(
          registry_.counter("spot:visible_tokens_total", "Tokens that these could have attended to.")),
      captured_mass(
          registry_.counter("spot:captured_mass_sum",
                            "True attention mass on what was selected, summed over watched queries.")),
      captured_mass_queries(registry_.counter("spot:captured_mass_count", "Queries watched for it.")),
      connections(registry_.gauge("spot:http_connections", "Open connections.")) {
  registry_
      .gauge("vllm:cache_config_info", "The cache's settings.",
             {{"block_size", std::to_string(page_tokens)},
              {"cache_dtype", cache_dtype},
              {"num_gpu_blocks", std::to_string(num_pages)},
              {"enable_prefix_caching", prefix_cache ? "True" : "False"}})
      .set(1);
  for (const char* reason : {"stop", "length", "abort", "error"})
    ended_[reason] = &registry_.counter("vllm:request_success_total", "Answers that ended, by how.",
                                        {{"finished_reason", reason}});
  for (const char* reason : {"gone", "slow"})
    dropped_[reason] = &registry_.counter("spot:dropped_connections_total",
                                          "Connections with a request in progress that were dropped, by why.",
                                          {{"reason", reason}});
  for (const int status : {400, 401, 404, 405, 408, 413, 415, 429, 431, 500, 503})
    refused_[status] = &registry_.counter("spot:refused_requests_total", "Requests answered by an error.",
                                          {{"status", std::to_string(status)}});
}

Metric& Metrics::refused(int status) {
  const auto found = refused_.find(status);
  return *(found == refused_.end() ? refused_.at(400) : found->second);
}

}  // namespace spot::server

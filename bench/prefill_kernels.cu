// Times the stages of a sparse prefill on the GPU it runs on: one layer, one sequence, all its queries.
//
//   prefill_kernels [--lengths 65536,131072] [--tile 32] [--groups 1] [--scattered] [--json FILE]
//
// Shapes are Qwen3-8B's: 32 query and 8 KV heads of 128, bf16; selector with a shared INT4 key. A row of the table is
// a length and a budget: 4,096 tokens a tile, and 10% of the tokens before it. Neighbouring queries of the selector
// resemble each other, as real ones do (--scattered: they do not, the worst case for locality). Each figure is the
// median of 5 runs. bench/prefill_kernels.py runs it beside cuDNN's dense attention. No torch.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/attend_tiles.h"
#include "kernels/score_tiles.h"
#include "kernels/select_blocks.h"

namespace {

using namespace spot::kernels;

void check(cudaError_t error, const char* what, int line) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "bench/prefill_kernels.cu:%d: %s: %s\n", line, what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check(call, #call, __LINE__)

template <typename T>
struct Device {
  T* data = nullptr;
  explicit Device(size_t n) { CHECK(cudaMalloc(&data, std::max<size_t>(n, 1) * sizeof(T))); }
  explicit Device(const std::vector<T>& v) : Device(v.size()) {
    CHECK(cudaMemcpy(data, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Device() { cudaFree(data); }
  Device(const Device&) = delete;
};

__device__ float normal(uint64_t i, uint32_t seed) {
  uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull + seed;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  x ^= x >> 31;
  float sum = 0;
  for (int k = 0; k < 4; ++k) sum += static_cast<float>(x >> (16 * k) & 0xffff) / 65536.0f - 0.5f;
  return sum * 1.7320508f;
}
// Roughly normal numbers, in rows of `width`; `shared` of the variance is common to `run` rows after each other.
__global__ void fill_kernel(__nv_bfloat16* out, size_t n, uint32_t seed, int width, int run, float shared) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    const size_t row = i / width;
    out[i] = __float2bfloat16(sqrtf(1 - shared) * normal(i, seed) +
                              sqrtf(shared) * normal(row / run * width + i % width, seed + 1));
  }
}
void fill(__nv_bfloat16* out, size_t n, uint32_t seed, int width = 1, int run = 1, float shared = 0) {
  fill_kernel<<<2048, 256>>>(out, n, seed, width, run, shared);
  CHECK(cudaGetLastError());
}

double milliseconds(const std::function<cudaError_t()>& work) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 6; ++i) {
    CHECK(cudaEventRecord(begin));
    CHECK(work());
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i > 0) times.push_back(ms);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

constexpr int kHeads = 32, kKvHeads = 8, kHeadDim = 128;

struct Options {
  std::vector<int> lengths = {65536, 131072, 262144};
  int tile = 32, groups = 1;
  bool scattered = false;
  std::string json;
};

void run(int length, const Options& options, std::FILE* json) {
  using Bf16 = __nv_bfloat16;
  const int T = options.tile, groups = options.groups,
            tiles = (length + kStripQueries - 1) / kStripQueries * (kStripQueries / T);
  const int blocks = (length + kPageTokens - 1) / kPageTokens;
  std::vector<QueryTile> tile_list;
  std::vector<int32_t> ends;
  for (int i = 0; i < tiles; ++i) {
    const int count = std::clamp(length - i * T, 0, T);
    tile_list.push_back({0, i * T, count, i * T});
    ends.push_back(count > 0 ? i * T + count : 0);
  }
  std::vector<int32_t> pages(blocks);
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), std::mt19937(7));
  const Device<QueryTile> device_tiles(tile_list);
  const Device<int32_t> device_ends(ends), page_table(pages), zero(std::vector<int32_t>{0}),
      device_length(std::vector<int32_t>{length});
  const size_t tokens = length;
  Device<Bf16> queries(tokens * kHeads * kHeadDim),
      keys(static_cast<size_t>(blocks) * 16 * kKvHeads * kHeadDim),
      values(static_cast<size_t>(blocks) * 16 * kKvHeads * kHeadDim), out(tokens * kHeads * kHeadDim);
  fill(queries.data, tokens * kHeads * kHeadDim, 1);
  fill(keys.data, static_cast<size_t>(blocks) * 16 * kKvHeads * kHeadDim, 2);
  fill(values.data, static_cast<size_t>(blocks) * 16 * kKvHeads * kHeadDim, 3);
  Device<Bf16> selector_queries(tokens * 4 * 128), staged(tokens * 128);
  if (options.scattered)
    fill(selector_queries.data, tokens * 4 * 128, 4);
  else
    fill(selector_queries.data, tokens * 4 * 128, 4, 512, 300, 0.8f);
  std::vector<float> weights(tokens * groups * 4);
  std::mt19937 random(5);
  for (float& w : weights) w = std::normal_distribution<float>(0.05f, 0.02f)(random);
  const Device<float> device_weights(weights);
  // Any bytes are INT4 codes; scales are bf16 near 0.4.
  std::vector<uint8_t> key_pages(static_cast<size_t>(blocks) * page_head_bytes(KeyFormat::int4));
  for (size_t i = 0; i < key_pages.size(); ++i) {
    const size_t at = i % page_head_bytes(KeyFormat::int4);
    key_pages[i] = static_cast<int>(at) < page_code_bytes(KeyFormat::int4) ? static_cast<uint8_t>(random())
                   : at % 2 == 0                                           ? 0xcd
                                                                           : 0x3e;
  }
  const Device<uint8_t> device_key_pages(key_pages);
  const size_t score_rows = static_cast<size_t>(tiles) * groups;
  Device<float> scores(score_rows * blocks);

  StageKeysParams stage;
  stage.pages = device_key_pages.data, stage.sequences = 1, stage.page_table = page_table.data;
  stage.page_table_stride = blocks, stage.lengths = device_length.data, stage.longest = length;
  stage.key_begins = zero.data, stage.keys = staged.data, stage.key_tokens = length;
  ScoreTilesParams score;
  score.num_tiles = tiles, score.tile_queries = T, score.tiles = device_tiles.data, score.groups = groups;
  score.queries = selector_queries.data, score.query_row_stride = 512, score.weights = device_weights.data;
  score.keys = staged.data, score.key_tokens = length, score.key_begins = zero.data, score.longest = length;
  score.scores = scores.data, score.score_stride = blocks;
  const double stage_ms = milliseconds([&] { return stage_keys(stage, nullptr); });
  const double score_ms = milliseconds([&] { return score_tiles(score, nullptr); });
  const double score_flop = 1024.0 * tokens * tokens / 2;

  for (const double share : {0.0, 0.1}) {
    SelectBlocksParams select;
    select.rules.mode = SelectionMode::top_k;
    select.rules.budget = 4096;
    select.rules.budget_fraction = share;
    select.rows = static_cast<int32_t>(score_rows), select.rows_per_sequence = groups;
    select.scores = scores.data, select.score_stride = blocks, select.lengths = device_ends.data;
    select.max_selected = share > 0 ? blocks / 10 + 40 : 256 + 40;
    Device<int32_t> selected(score_rows * select.max_selected), counts(score_rows);
    select.selected = selected.data, select.counts = counts.data;
    AttendTilesParams attend;
    attend.num_tiles = tiles, attend.tile_queries = T, attend.tiles = device_tiles.data;
    attend.num_heads = kHeads, attend.num_kv_heads = kKvHeads, attend.head_dim = kHeadDim,
    attend.scale = 0.0884f;
    attend.queries = queries.data, attend.query_row_stride = kHeads * kHeadDim,
    attend.query_head_stride = kHeadDim;
    attend.keys = keys.data, attend.values = values.data, attend.num_pages = blocks;
    attend.token_stride = kHeadDim, attend.page_stride = 16 * kHeadDim;
    attend.head_stride = static_cast<int64_t>(blocks) * attend.page_stride;
    attend.page_table = page_table.data, attend.page_table_stride = blocks;
    attend.selected = selected.data, attend.counts = counts.data, attend.max_selected = select.max_selected;
    attend.rows_per_tile = groups, attend.out = out.data;
    const double select_ms = milliseconds([&] { return select_blocks(select, nullptr); });
    const double attend_ms = milliseconds([&] { return attend_tiles(attend, nullptr); });

    std::vector<int32_t> host_counts(score_rows), lists(score_rows * select.max_selected);
    CHECK(cudaMemcpy(host_counts.data(), counts.data, score_rows * 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(lists.data(), selected.data, lists.size() * 4, cudaMemcpyDeviceToHost));
    double products = 0, common = 0, listed = 0;
    for (size_t r = 0; r < score_rows; ++r) {
      products += 16.0 * host_counts[r] * tile_list[r / groups].count * (kHeads / groups);
      if (r < static_cast<size_t>(groups)) continue;
      const int32_t *a = &lists[r * select.max_selected], *b = &lists[(r - groups) * select.max_selected];
      std::vector<int32_t> both;
      std::set_intersection(a, a + host_counts[r], b, b + host_counts[r - groups], std::back_inserter(both));
      common += static_cast<double>(both.size()), listed += host_counts[r];
    }
    const double flop = 4.0 * kHeadDim * products, total = stage_ms + score_ms + select_ms + attend_ms;
    std::printf("%7d %9s %8.0f %6.2f | %7.3f %8.3f (%4.0f) %7.3f %9.3f (%4.0f) | %8.2f\n", length,
                share > 0 ? "10%" : "4096",
                16.0 * std::accumulate(host_counts.begin(), host_counts.end(), 0.0) / score_rows,
                listed > 0 ? common / listed : 0, stage_ms, score_ms, score_flop / score_ms / 1e9, select_ms,
                attend_ms, flop / attend_ms / 1e9, total);
    std::fflush(stdout);
    if (json != nullptr)
      std::fprintf(
          json,
          "{\"length\": %d, \"share\": %g, \"tile\": %d, \"groups\": %d, \"stage_ms\": %.4f, \"score_ms\": %.4f, "
          "\"select_ms\": %.4f, \"attend_ms\": %.4f, \"attend_tflops\": %.1f, \"score_tflops\": %.1f}\n",
          length, share, T, groups, stage_ms, score_ms, select_ms, attend_ms, flop / attend_ms / 1e9,
          score_flop / score_ms / 1e9);
  }
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&]() -> std::string {
      if (++i < argc) return argv[i];
      std::fprintf(stderr, "error: %s needs a value\n", word.c_str());
      std::exit(2);
    };
    if (word == "--lengths") {
      options.lengths.clear();
      const std::string list = value();
      for (size_t at = 0; at < list.size(); at = std::min(list.find(',', at), list.size() - 1) + 1)
        options.lengths.push_back(std::atoi(list.c_str() + at));
    } else if (word == "--tile") {
      options.tile = std::atoi(value().c_str());
    } else if (word == "--groups") {
      options.groups = std::atoi(value().c_str());
    } else if (word == "--scattered") {
      options.scattered = true;
    } else if (word == "--json") {
      options.json = value();
    } else {
      std::fprintf(stderr, "error: %s is not an option of prefill_kernels\n", word.c_str());
      return 2;
    }
  }
  if ((options.tile != 16 && options.tile != 32 && options.tile != 64) ||
      (options.groups != 1 && options.groups != kKvHeads) ||
      std::any_of(options.lengths.begin(), options.lengths.end(), [](int n) { return n < 1024; })) {
    std::fprintf(stderr,
                 "error: --tile takes 16, 32 or 64, --groups 1 or 8, --lengths numbers from 1,024 on\n");
    return 2;
  }
  std::FILE* json = options.json.empty() ? nullptr : std::fopen(options.json.c_str(), "w");
  std::printf("tiles of %d queries, %d groups%s; ms (TFLOP/s; attended products)\n", options.tile,
              options.groups, options.scattered ? ", scattered" : "");
  std::printf("%7s %9s %8s %6s | %7s %15s %7s %16s | %8s\n", "tokens", "budget", "listed", "common", "stage",
              "score", "select", "attend", "total");
  for (int length : options.lengths) run(length, options, json);
  if (json != nullptr) std::fclose(json);
}

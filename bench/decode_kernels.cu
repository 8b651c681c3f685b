// Times every stage of a sparse decode step on the GPU it runs on, and prints them beside their byte floors.
//
//   decode_kernels [--json FILE] [--quick] [--e4m3]
//
// --e4m3: keys and values are E4M3 codes (of any bits) instead of bf16; bench/kernel_ratio.py lays two runs side by side.
// Selector key formats, launch overlaps and fused or separate kernels; `spot bench decode` has the other
// methods and dense attention beside them.
//
// Every figure is the median of replays of a CUDA graph that runs the stage over 8 sets of buffers in turn
// (selector keys, page tables and so selected pages differ), far more bytes than the L2 holds. Data are
// random; selections are scattered over the whole context, which is the worst case for locality. No torch.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/score_blocks.h"
#include "kernels/select_and_attend.h"
#include "kernels/selector_key_append.h"

namespace {

using namespace spot::kernels;

constexpr int kSets = 8;

void check(cudaError_t error, const char* what, int line) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "bench/decode_kernels.cu:%d: %s: %s\n", line, what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check(call, #call, __LINE__)

template <typename T>
struct Device {
  T* data = nullptr;
  size_t count = 0;
  explicit Device(size_t n) : count(n) { CHECK(cudaMalloc(&data, std::max<size_t>(n, 1) * sizeof(T))); }
  explicit Device(const std::vector<T>& v) : Device(v.size()) {
    CHECK(cudaMemcpy(data, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Device() { cudaFree(data); }
  Device(const Device&) = delete;
};

// Roughly normal bf16 numbers.
__global__ void fill_kernel(__nv_bfloat16* out, size_t n, uint32_t seed, float deviation) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull + seed;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    x ^= x >> 31;
    float sum = 0.0f;
    for (int j = 0; j < 4; ++j) sum += static_cast<float>(x >> (16 * j) & 0xffff) * (1.0f / 65536.0f) - 0.5f;
    out[i] = __float2bfloat16_rn(sum * 1.7320508f * deviation);
  }
}
void fill(Device<__nv_bfloat16>& buffer, uint32_t seed, float deviation = 1.0f) {
  fill_kernel<<<2048, 256>>>(buffer.data, buffer.count, seed, deviation);
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());  // `stream` does not wait for this one
}

cudaStream_t stream;

// Median microseconds of one call of `step(set)`.
double time_us(const std::function<void(int)>& step, int rounds = 4) {
  for (int set = 0; set < kSets; ++set) step(set);
  CHECK(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < rounds * kSets; ++i) step(i % kSets);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 25; ++i) {
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 5) times.push_back(ms);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  CHECK(cudaGraphExecDestroy(exec));
  CHECK(cudaGraphDestroy(graph));
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return static_cast<double>(times[times.size() / 2]) * 1000 / (rounds * kSets);
}

struct Shape {
  const char* name;
  int32_t num_heads, num_kv_heads, head_dim;
};

bool e4m3 = false;
double copy_gbps = 0;
FILE* json = nullptr;
bool first_row = true;

void report(const Shape& shape, int32_t length, int32_t batch, const std::string& stage, double us,
            double bytes) {
  const double floor = bytes / copy_gbps * 1e-3;
  std::printf("%-12s %7d %3d  %-44s %9.2f %9.2f %8.0f %6.1f%% %6.2f\n", shape.name, length, batch,
              stage.c_str(), us, bytes * 1e-6, bytes / us * 1e-3, 100 * floor / us, us / floor);
  std::fflush(stdout);
  if (json == nullptr) return;
  std::fprintf(json,
               "%s\n{\"shape\": \"%s\", \"num_heads\": %d, \"num_kv_heads\": %d, \"head_dim\": %d, "
               "\"length\": %d, \"batch\": %d, \"stage\": \"%s\", \"us\": %.3f, \"bytes\": %.0f}",
               first_row ? "" : ",", shape.name, shape.num_heads, shape.num_kv_heads, shape.head_dim, length,
               batch, stage.c_str(), us, bytes);
  first_row = false;
}

const char* format_name(KeyFormat format) {
  const char* names[] = {"bf16", "int8", "int4", "mxfp4", "nvfp4"};
  return names[static_cast<int>(format)];
}

// One (shape, length, batch): pools, and 8 sets of page tables, queries, selector pools.
struct Setting {
  Shape shape;
  int32_t length, batch, blocks;
  int64_t num_pages;
  Device<__nv_bfloat16> keys, values, queries, out, selector_queries;
  Device<float> weights, scores;
  Device<int32_t> lengths, tables, selected, counts;
  Device<uint8_t> workspace;
  int32_t capacity;

  Setting(const Shape& shape, int32_t length, int32_t batch)
      : shape(shape),
        length(length),
        batch(batch),
        blocks((length + 15) / 16),
        num_pages(int64_t{batch} * blocks),
        keys(num_pages * 16 * shape.num_kv_heads * shape.head_dim),
        values(keys.count),
        queries(static_cast<size_t>(kSets) * batch * shape.num_heads * shape.head_dim),
        out(queries.count),
        selector_queries(static_cast<size_t>(kSets) * batch * kSelectorHeads * kKeyDim),
        weights(std::vector<float>(static_cast<size_t>(kSets) * batch * kSelectorHeads, 0.044f)),
        scores(static_cast<size_t>(kSets) * batch * blocks),
        lengths(std::vector<int32_t>(batch, length)),
        tables(static_cast<size_t>(kSets) * num_pages),
        selected(static_cast<size_t>(kSets) * batch * std::max(blocks, 64)),
        counts(static_cast<size_t>(kSets) * batch),
        workspace(sparse_decode_workspace_bytes(batch, shape.num_heads, shape.num_kv_heads, shape.head_dim)),
        capacity(std::max(blocks, 64)) {
    fill(keys, 1);
    fill(values, 2);
    fill(queries, 3);
    fill(selector_queries, 4);
    CHECK(cudaMemset(workspace.data, 0, workspace.count));
    std::mt19937 random(5);
    std::vector<int32_t> order(static_cast<size_t>(kSets) * num_pages);
    for (int set = 0; set < kSets; ++set) {
      std::iota(order.begin() + set * num_pages, order.begin() + (set + 1) * num_pages, 0);
      std::shuffle(order.begin() + set * num_pages, order.begin() + (set + 1) * num_pages, random);
    }
    CHECK(cudaMemcpy(tables.data, order.data(), order.size() * 4, cudaMemcpyHostToDevice));
  }
  double kv_bytes(double tokens) const {
    return tokens * batch * shape.num_kv_heads * shape.head_dim * (e4m3 ? 2 : 4);
  }
  double selector_bytes(KeyFormat format, int32_t key_heads) const {
    return static_cast<double>(length) * batch * key_heads * key_bytes(format);
  }

  ScoreBlocksParams score_params(int set, KeyFormat format, int32_t key_heads, const uint8_t* pool,
                                 Overlap overlap) const {
    ScoreBlocksParams p;
    p.format = format;
    p.key_heads = key_heads;
    p.batch = batch;
    p.max_blocks = blocks;
    p.queries = selector_queries.data + static_cast<size_t>(set) * batch * kSelectorHeads * kKeyDim;
    p.weights = weights.data + static_cast<size_t>(set) * batch * kSelectorHeads;
    p.pages = pool;
    p.page_table = tables.data + set * num_pages;
    p.page_table_stride = blocks;
    p.lengths = lengths.data;
    p.block_scores = scores.data + static_cast<size_t>(set) * batch * blocks;
    p.score_stride = blocks;
    p.overlap = overlap;
    return p;
  }
  SelectAndAttendParams attend_params(int set, const SelectionRule& rules, Overlap overlap) const {
    SelectAndAttendParams p;
    p.rules = rules;
    p.scores = scores.data + static_cast<size_t>(set) * batch * blocks;
    p.score_stride = blocks;
    p.max_blocks = blocks;
    p.selected = selected.data + static_cast<size_t>(set) * batch * capacity;
    p.max_selected = capacity;
    p.counts = counts.data + static_cast<size_t>(set) * batch;
    p.overlap = overlap;
    SparseDecodeAttentionParams& a = p.attention;
    a.e4m3 = e4m3;
    a.batch = batch;
    a.num_heads = shape.num_heads;
    a.num_kv_heads = shape.num_kv_heads;
    a.head_dim = shape.head_dim;
    a.scale = 0.088f;
    a.queries = queries.data + static_cast<size_t>(set) * batch * shape.num_heads * shape.head_dim;
    a.keys = keys.data;
    a.values = values.data;
    a.page_stride = 16 * shape.head_dim;
    a.head_stride = num_pages * a.page_stride;
    a.token_stride = shape.head_dim;
    a.page_table = tables.data + set * num_pages;
    a.page_table_stride = blocks;
    a.lengths = lengths.data;
    a.out = out.data + static_cast<size_t>(set) * batch * shape.num_heads * shape.head_dim;
    a.workspace = workspace.data;
    a.workspace_bytes = workspace.count;
    return p;
  }
};

// 8 selector pools, filled through the append kernel.
struct SelectorPools {
  Device<uint8_t> bytes;
  int64_t pool_bytes;
  SelectorPools(const Setting& s, KeyFormat format, int32_t key_heads)
      : bytes(kSets * s.num_pages * page_bytes(format, key_heads)),
        pool_bytes(s.num_pages * page_bytes(format, key_heads)) {
    const int64_t tokens = std::min<int64_t>(s.num_pages * 16, 1 << 18);
    Device<__nv_bfloat16> raw(tokens * key_heads * kKeyDim);
    std::vector<int64_t> slots(tokens);
    for (int64_t first = 0; first < kSets * s.num_pages * 16; first += tokens) {
      const int64_t count = std::min(tokens, kSets * s.num_pages * 16 - first);
      fill(raw, static_cast<uint32_t>(first + 17));
      std::iota(slots.begin(), slots.end(), first);
      Device<int64_t> device_slots(slots);
      SelectorKeyAppendParams p;
      p.format = format;
      p.key_heads = key_heads;
      p.num_tokens = count;
      p.keys = raw.data;
      p.token_stride = key_heads * kKeyDim;
      p.slots = device_slots.data;
      p.pages = bytes.data;
      CHECK(selector_key_append(p, stream));
      CHECK(cudaStreamSynchronize(stream));
    }
  }
  const uint8_t* pool(int set) const { return bytes.data + set * pool_bytes; }
};

SelectionRule top_k(int32_t tokens) {
  SelectionRule rules;
  rules.mode = SelectionMode::top_k;
  rules.budget = tokens;
  return rules;
}
// The whole top-p path, ending at the same number of tokens through its cap.
SelectionRule top_p(int32_t tokens) {
  SelectionRule rules;
  rules.p = 0.9f;
  rules.cap = tokens;
  rules.temperature = 4.0f;
  return rules;
}

void score_stage(const Setting& s, KeyFormat format, int32_t key_heads, const SelectorPools& pools) {
  const double us = time_us([&](int set) {
    CHECK(score_blocks(s.score_params(set, format, key_heads, pools.pool(set), Overlap::kNone), stream));
  });
  report(s.shape, s.length, s.batch,
         std::string("score ") + format_name(format) + (key_heads == 1 ? " shared" : " per-head"), us,
         s.selector_bytes(format, key_heads));
}
void whole_stage(const Setting& s, KeyFormat format, int32_t key_heads, const SelectorPools& pools,
                 const SelectionRule& rules, int32_t tokens, Overlap overlap, const char* name) {
  const Overlap first = overlap;
  const double us = time_us([&](int set) {
    CHECK(score_blocks(s.score_params(set, format, key_heads, pools.pool(set), first), stream));
    CHECK(select_and_attend(s.attend_params(set, rules, overlap), stream));
  });
  report(s.shape, s.length, s.batch,
         std::string(name) + " " + format_name(format) + (key_heads == 1 ? " shared " : " per-head ") +
             std::to_string(tokens),
         us, s.selector_bytes(format, key_heads) + s.kv_bytes(std::min(tokens, s.length)));
}

void run(const Shape& shape, int32_t length, int32_t batch, bool thorough) {
  const Setting s(shape, length, batch);
  const int32_t tokens = 4096;
  SelectorPools shared_int4(s, KeyFormat::int4, 1);
  score_stage(s, KeyFormat::int4, 1, shared_int4);
  const double attended = s.kv_bytes(std::min(tokens, length));

  const auto select_only = [&](const SelectionRule& rules, const char* name) {
    const double us = time_us([&](int set) {
      const SelectAndAttendParams a = s.attend_params(set, rules, Overlap::kNone);
      SelectBlocksParams p;
      p.rules = rules;
      p.rows = batch;
      p.scores = a.scores;
      p.score_stride = a.score_stride;
      p.lengths = s.lengths.data;
      p.selected = a.selected;
      p.max_selected = a.max_selected;
      p.counts = a.counts;
      CHECK(select_blocks(p, stream));
    });
    report(shape, length, batch, name, us, 4.0 * s.blocks * batch);
  };
  select_only(top_p(tokens), "select top-p");
  select_only(top_k(tokens), "select top-k");
  std::vector<int32_t> counts(batch);
  CHECK(cudaMemcpy(counts.data(), s.counts.data, batch * 4, cudaMemcpyDeviceToHost));
  if (counts[0] != std::min(tokens, length) / 16) {
    std::fprintf(stderr, "expected %d selected blocks, got %d\n", std::min(tokens, length) / 16, counts[0]);
    std::exit(1);
  }
  const auto attend_only = [&](bool dense) {
    const double us = time_us(
        [&](int set) {
          const SelectAndAttendParams a = s.attend_params(set, top_k(tokens), Overlap::kNone);
          SparseDecodeAttentionParams p = a.attention;
          p.selected = dense ? nullptr : a.selected;
          p.counts = a.counts;
          p.max_selected = a.max_selected;
          CHECK(sparse_decode_attention(p, stream));
        },
        dense ? 1 : 4);
    report(shape, length, batch, dense ? "dense, same kernel" : "attend 4096 of a list", us,
           dense ? s.kv_bytes(length) : attended);
  };
  attend_only(false);
  attend_only(true);
  const struct {
    SelectAndAttendPath path;
    const char* name;
  } paths[] = {{SelectAndAttendPath::kFused, "select+attend 4096, fused"},
               {SelectAndAttendPath::kTwoKernels, "select+attend 4096, two kernels"}};
  for (const auto& path : paths) {
    const double us = time_us([&](int set) {
      CHECK(select_and_attend(s.attend_params(set, top_k(tokens), Overlap::kNone), stream, path.path));
    });
    report(shape, length, batch, path.name, us, attended);
  }
  whole_stage(s, KeyFormat::int4, 1, shared_int4, top_k(tokens), tokens, Overlap::kNone, "step, no overlap");
  whole_stage(s, KeyFormat::int4, 1, shared_int4, top_k(tokens), tokens, Overlap::kLaunch,
              "step, launch overlap");
  whole_stage(s, KeyFormat::int4, 1, shared_int4, top_k(tokens), tokens, Overlap::kHistory, "step");
  whole_stage(s, KeyFormat::int4, 1, shared_int4, top_p(tokens), tokens, Overlap::kHistory, "step, top-p");
  if (!thorough) return;
  for (int32_t other : {1024, 2048, 8192, 16384})
    if (other < length)
      whole_stage(s, KeyFormat::int4, 1, shared_int4, top_k(other), other, Overlap::kHistory, "step");
  for (int32_t key_heads : {1, 4})
    for (KeyFormat format :
         {KeyFormat::bf16, KeyFormat::int8, KeyFormat::int4, KeyFormat::mxfp4, KeyFormat::nvfp4}) {
      if (key_heads == 1 && format == KeyFormat::int4) continue;
      const SelectorPools pools(s, format, key_heads);
      score_stage(s, format, key_heads, pools);
      whole_stage(s, format, key_heads, pools, top_k(tokens), tokens, Overlap::kHistory, "step");
    }
}

}  // namespace

int main(int argc, char** argv) {
  bool quick = false;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--quick") == 0) quick = true;
    if (std::strcmp(argv[i], "--e4m3") == 0) e4m3 = true;
    if (std::strcmp(argv[i], "--json") == 0 && i + 1 < argc) json = std::fopen(argv[++i], "w");
  }
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  {
    const size_t bytes = size_t{1} << 30;
    Device<uint8_t> from(bytes * 2), to(bytes * 2);
    CHECK(cudaMemset(from.data, 1, bytes * 2));
    // About a second of work, so that no figure is taken while clocks rise.
    for (int i = 0; i < 1500; ++i)
      CHECK(cudaMemcpyAsync(to.data, from.data, bytes, cudaMemcpyDeviceToDevice, stream));
    CHECK(cudaStreamSynchronize(stream));
    const double us = time_us(
        [&](int set) {
          CHECK(cudaMemcpyAsync(to.data + set % 2 * bytes, from.data + set % 2 * bytes, bytes,
                                cudaMemcpyDeviceToDevice, stream));
        },
        1);
    copy_gbps = 2.0 * static_cast<double>(bytes) / us * 1e-3;
  }
  std::printf("%s, %d multiprocessors, L2 %.0f MB, copy %.0f GB/s (read + write), pages of %s\n", device.name,
              device.multiProcessorCount, device.l2CacheSize * 1e-6, copy_gbps, e4m3 ? "E4M3" : "bf16");
  std::printf("%-12s %7s %3s  %-44s %9s %9s %8s %7s %6s\n", "shape", "L", "B", "stage", "us", "MB", "GB/s",
              "copy", "floors");
  if (json != nullptr)
    std::fprintf(json, "{\"device\": \"%s\", \"copy_gbps\": %.1f, \"rows\": [", device.name, copy_gbps);

  const Shape qwen3_8b = {"Qwen3-8B", 32, 8, 128}, qwen3_14b = {"Qwen3-14B", 40, 8, 128},
              qwen3_32b = {"Qwen3-32B", 64, 8, 128}, qwen35_9b = {"Qwen3.5-9B", 16, 4, 256};
  run(qwen3_8b, 131072, 1, true);
  run(qwen35_9b, 131072, 1, false);
  run(qwen3_8b, 131072, 4, false);
  if (!quick) {
    for (int32_t length : {8192, 32768, 65536, 524288}) run(qwen3_8b, length, 1, false);
    for (int32_t length : {8192, 32768, 65536}) run(qwen3_8b, length, 4, false);
    for (int32_t length : {8192, 32768, 131072}) run(qwen3_8b, length, 16, false);
    run(qwen3_14b, 131072, 1, false);
    run(qwen3_32b, 131072, 1, false);
    run(qwen35_9b, 131072, 4, false);
    run(qwen35_9b, 131072, 16, false);
  }
  if (json != nullptr) {
    std::fprintf(json, "\n]}\n");
    std::fclose(json);
  }
  return 0;
}

// sparse_decode_attention and select_and_attend against float64 and each other, on the GPU or emulated.
#include <memory>

#include "kernels/score_blocks.h"
#include "kernels/select_and_attend.h"
#include "kernels/select_reference.h"
#include "tests/kernels/device.h"
#include "tests/kernels/reference.h"

namespace spot::kernels {
namespace {

using testing::Buffer;
using testing::check;
using testing::kEmulated;
using testing::PageTable;
using testing::Random;
using testing::Typed;

// Pools of keys and of values: [heads, pages, 16, dim], [pages, 16, heads, dim], or [pages, heads, 16, 2 dim], of which
// half is read.
enum class Layout { kHeads, kTokens, kSpaced };

// A batch of sequences with paged random keys and values, of the queries' type or E4M3 codes with scales.
struct Scene {
  DataType type;
  int32_t num_heads, num_kv_heads, head_dim;
  Layout layout;
  bool e4m3;
  float query_power;  // of two: queries are multiplied, keys divided by it
  PageTable pages;
  Typed queries, keys, values;
  Buffer<float> key_scales, value_scales;
  Buffer<uint8_t> device_queries, device_keys, device_values, workspace;
  Buffer<int32_t> table, lengths;

  Scene(Random& random, DataType type, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
        Layout layout, const std::vector<int32_t>& row_lengths, bool e4m3 = false)
      : type(type),
        num_heads(num_heads),
        num_kv_heads(num_kv_heads),
        head_dim(head_dim),
        layout(layout),
        e4m3(e4m3),
        query_power(e4m3 && type == DataType::kBf16 ? std::ldexp(1.0f, static_cast<int>(random() % 121) - 60)
                                                    : 1.0f),
        pages(random, row_lengths),
        queries(type, testing::normal(random, row_lengths.size() * num_heads * head_dim, 1.5f * query_power)),
        keys(type, testing::normal(random, pool_size())),
        values(type, testing::normal(random, pool_size())),
        key_scales(std::vector<float>(num_kv_heads, 1.0f)),
        value_scales(std::vector<float>(num_kv_heads, 1.0f)),
        device_queries(queries.bytes),
        device_keys(keys.bytes),
        device_values(values.bytes),
        workspace(sparse_decode_workspace_bytes(static_cast<int32_t>(row_lengths.size()), num_heads,
                                                num_kv_heads, head_dim)),
        table(pages.table),
        lengths(pages.lengths) {
    workspace.fill(0);
    if (e4m3) {
      to_codes(random, keys, key_scales, 1.0f / query_power);
      to_codes(random, values, value_scales, 1.0f);
    }
    poison_unseen();
  }
  // Random codes of both signs, small ones too, and a scale a head; times `power`.
  void to_codes(Random& random, Typed& pool, Buffer<float>& device_scales, float power) const {
    std::vector<float> scales(num_kv_heads);
    for (float& scale : scales) scale = power * (0.004f + 0.002f * static_cast<float>(random() % 10));
    device_scales.upload(scales);
    const std::vector<float> numbers = testing::normal(random, pool_size(), 130.0f);
    pool.bytes.assign(pool_size(), 0);
    for (int32_t page = 0; page < pages.num_pages; ++page)
      for (int32_t head = 0; head < num_kv_heads; ++head)
        for (int32_t token = 0; token < kPageTokens; ++token)
          for (int32_t dim = 0; dim < head_dim; ++dim) {
            const size_t i = page * page_stride() + head * head_stride() + token * token_stride() + dim;
            const uint32_t size = float_to_e4m3(std::fabs(i % 7 == 0 ? numbers[i] * 1e-4f : numbers[i]));
            const float number = std::copysign(e4m3_to_float(size), numbers[i]);
            pool.bytes[i] = static_cast<uint8_t>(size | (numbers[i] < 0 ? 0x80 : 0));
            pool.values[i] = number * scales[head];
          }
  }
  // What lies behind a sequence's last token in its last page is NaN, in either type.
  void poison_unseen() {
    for (int32_t row = 0; row < batch(); ++row)
      for (int32_t token = pages.lengths[row]; token % kPageTokens != 0; ++token)
        for (int32_t head = 0; head < num_kv_heads; ++head)
          for (Typed* pool : {&keys, &values})
            std::memset(pool->bytes.data() + (e4m3 ? 1 : 2) * at(row, head, token), 0xff,
                        (e4m3 ? 1 : 2) * head_dim);
    device_keys.upload(keys.bytes);
    device_values.upload(values.bytes);
  }
  size_t pool_size() const {
    return static_cast<size_t>(pages.num_pages) * kPageTokens * num_kv_heads * row_size();
  }
  int32_t batch() const { return static_cast<int32_t>(pages.lengths.size()); }
  int64_t page_stride() const {
    return layout == Layout::kHeads ? kPageTokens * row_size() : kPageTokens * num_kv_heads * row_size();
  }
  int64_t head_stride() const {
    return layout == Layout::kTokens   ? head_dim
           : layout == Layout::kSpaced ? kPageTokens * row_size()
                                       : pages.num_pages * kPageTokens * row_size();
  }
  int64_t token_stride() const { return layout == Layout::kTokens ? num_kv_heads * row_size() : row_size(); }
  int64_t row_size() const { return layout == Layout::kSpaced ? 2 * head_dim : head_dim; }
  int64_t at(size_t row, int32_t kv_head, int32_t token) const {
    return pages.page(row, token / kPageTokens) * page_stride() + kv_head * head_stride() +
           token % kPageTokens * token_stride();
  }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }

  SparseDecodeAttentionParams params(size_t first = 0, int32_t rows = -1) const {
    SparseDecodeAttentionParams p;
    p.type = type;
    p.batch = rows < 0 ? batch() : rows;
    p.num_heads = num_heads;
    p.num_kv_heads = num_kv_heads;
    p.head_dim = head_dim;
    p.scale = scale();
    p.queries = device_queries.data() + first * num_heads * head_dim * 2;
    p.keys = device_keys.data();
    p.values = device_values.data();
    p.page_stride = page_stride();
    p.head_stride = head_stride();
    p.token_stride = token_stride();
    if (e4m3) {
      p.e4m3 = true;
      p.key_scales = key_scales.data();
      p.value_scales = value_scales.data();
      p.key_scale_stride = p.value_scale_stride = 1;
    }
    p.page_table = table.data() + first * pages.stride;
    p.page_table_stride = pages.stride;
    p.lengths = lengths.data() + first;
    p.workspace = workspace.data();
    p.workspace_bytes = workspace.size();
    return p;
  }
};

struct Output {
  std::vector<uint16_t> out;
  std::vector<float> log_sum_exp;
  bool operator==(const Output& other) const {
    return out == other.out &&
           std::memcmp(log_sum_exp.data(), other.log_sum_exp.data(), log_sum_exp.size() * 4) == 0;
  }
};
Output run_attention(SparseDecodeAttentionParams p) {
  Buffer<uint16_t> out(static_cast<size_t>(p.batch) * p.num_heads * p.head_dim);
  Buffer<float> lse(static_cast<size_t>(p.batch) * p.num_heads);
  p.out = out.data();
  p.log_sum_exp = lse.data();
  check(sparse_decode_attention(p, nullptr));
  return {out.download(), lse.download()};
}

// Block lists of rows (or of rows and KV heads), checked against float64.
void expect_matches(const Scene& scene, const Output& output, const std::vector<std::vector<int32_t>>& lists,
                    const char* what) {
  std::vector<double> expected(output.out.size());
  const int32_t d = scene.head_dim, group = scene.num_heads / scene.num_kv_heads;
  const bool per_head = lists.size() > static_cast<size_t>(scene.batch());
  for (int32_t row = 0; row < scene.batch(); ++row)
    for (int32_t head = 0; head < scene.num_heads; ++head) {
      const int32_t kv = head / group, q = row * scene.num_heads + head;
      const double lse = testing::attention_reference(
          scene.queries.values.data() + q * d,
          [&](int32_t token) { return scene.keys.values.data() + scene.at(row, kv, token); },
          [&](int32_t token) { return scene.values.values.data() + scene.at(row, kv, token); }, d,
          lists[per_head ? row * scene.num_kv_heads + kv : row], scene.pages.lengths[row],
          static_cast<double>(scene.scale()), expected.data() + static_cast<size_t>(q) * d);
      if (std::isinf(lse))
        EXPECT_EQ(output.log_sum_exp[q], -INFINITY);
      else
        EXPECT_NEAR(output.log_sum_exp[q], lse, 2e-3) << what;
    }
  const double error = testing::relative_error(testing::to_double(scene.type, output.out), expected);
  EXPECT_LT(error, scene.type == DataType::kBf16 ? 6e-3 : 8e-4)
      << what << ": heads " << scene.num_heads << "/" << scene.num_kv_heads << " dim " << d;
}

// Random ascending lists, some empty, some whole, most with the newest block.
std::vector<std::vector<int32_t>> random_lists(Random& random, const Scene& scene,
                                               int32_t rows_per_sequence) {
  std::vector<std::vector<int32_t>> lists;
  for (int32_t row = 0; row < scene.batch() * rows_per_sequence; ++row) {
    const int32_t n = (scene.pages.lengths[row / rows_per_sequence] + 15) / 16;
    std::vector<int32_t> list;
    const uint32_t kind = random() % 6;
    for (int32_t b = 0; b < n && kind != 0; ++b)
      if (kind == 1 || random() % 3 == 0 || (b == n - 1 && kind != 2)) list.push_back(b);
    lists.push_back(list);
  }
  return lists;
}
struct DeviceLists {
  int32_t width = 1;
  std::unique_ptr<Buffer<int32_t>> selected, counts;
  explicit DeviceLists(const std::vector<std::vector<int32_t>>& lists) {
    for (const auto& list : lists) width = std::max(width, static_cast<int32_t>(list.size()));
    std::vector<int32_t> flat(lists.size() * width, -1), count;
    for (size_t i = 0; i < lists.size(); ++i) {
      std::copy(lists[i].begin(), lists[i].end(), flat.begin() + i * width);
      count.push_back(static_cast<int32_t>(lists[i].size()));
    }
    selected = std::make_unique<Buffer<int32_t>>(flat);
    counts = std::make_unique<Buffer<int32_t>>(count);
  }
};

struct Shape {
  int32_t num_heads, num_kv_heads, head_dim;
};
std::vector<Shape> shapes() {
  if (kEmulated) return {{8, 2, 128}, {3, 1, 64}, {12, 1, 256}};
  return {{32, 8, 128}, {40, 8, 128}, {64, 8, 128}, {16, 4, 256}, {9, 3, 64},
          {16, 1, 128}, {7, 7, 64},   {24, 2, 256}, {11, 1, 64}};
}
std::vector<int32_t> some_lengths() {
  return kEmulated ? std::vector<int32_t>{777, 1, 0, 333}
                   : std::vector<int32_t>{5000, 1, 16, 0, 333, 9001, 4096, 15};
}

void expect_float64_and_no_batch(bool e4m3) {
  Random random(testing::fresh_seed());
  for (const Shape& shape : shapes())
    for (DataType type : {DataType::kBf16, DataType::kF16}) {
      const Scene scene(random, type, shape.num_heads, shape.num_kv_heads, shape.head_dim,
                        static_cast<Layout>(random() % 3), some_lengths(), e4m3);
      for (int32_t rows_per_sequence : {1, shape.num_kv_heads}) {
        const auto lists = random_lists(random, scene, rows_per_sequence);
        const DeviceLists device(lists);
        SparseDecodeAttentionParams p = scene.params();
        p.selected = device.selected->data();
        p.counts = device.counts->data();
        p.max_selected = device.width;
        p.rows_per_sequence = rows_per_sequence;
        const Output output = run_attention(p);
        expect_matches(scene, output, lists, "lists");
        EXPECT_TRUE(run_attention(p) == output);  // and the counters were left as they were found
        const size_t row = random() % scene.batch();
        SparseDecodeAttentionParams one = scene.params(row, 1);
        one.selected = p.selected + row * rows_per_sequence * device.width;
        one.counts = p.counts + row * rows_per_sequence;
        one.max_selected = device.width;
        one.rows_per_sequence = rows_per_sequence;
        const Output alone = run_attention(one);
        EXPECT_TRUE(std::equal(alone.out.begin(), alone.out.end(),
                               output.out.begin() + row * scene.num_heads * scene.head_dim));
      }
      std::vector<std::vector<int32_t>> all(scene.batch());
      for (int32_t row = 0; row < scene.batch(); ++row) {
        all[row].resize((scene.pages.lengths[row] + 15) / 16);
        std::iota(all[row].begin(), all[row].end(), 0);
      }
      expect_matches(scene, run_attention(scene.params()), all, "dense");
    }
}

TEST(SparseDecodeAttention, MatchesFloat64AndIgnoresTheBatch) {
  expect_float64_and_no_batch(false);
}
TEST(SparseDecodeAttention, OfE4m3PagesMatchesFloat64AndIgnoresTheBatch) {
  expect_float64_and_no_batch(true);
}

// One scale for all heads, or none, gives what a scale a head gives of equal ones.
TEST(SparseDecodeAttention, TakesE4m3ScalesInEveryForm) {
  Random random(testing::fresh_seed());
  Scene scene(random, DataType::kBf16, 6, 3, 64, Layout::kHeads,
              {static_cast<int32_t>(random() % 300 + 1), 40}, true);
  for (const float scale : {0.03125f, 1.0f}) {
    scene.key_scales.upload({scale, scale, scale});
    scene.value_scales.upload({scale, scale, scale});
    SparseDecodeAttentionParams p = scene.params();
    p.scale /= scene.query_power;
    const Output output = run_attention(p);
    p.key_scale_stride = 0;
    EXPECT_TRUE(run_attention(p) == output);
    p.value_scale_stride = 0;
    EXPECT_TRUE(run_attention(p) == output);
    p.key_scales = p.value_scales = nullptr;
    EXPECT_EQ(run_attention(p) == output, scale == 1.0f);
  }
}

// Counters of a large launch must not lie where a small one keeps its partial results.
TEST(SparseDecodeAttention, LaunchesOfAnySizeShareAWorkspace) {
  Random random(testing::fresh_seed());
  const Scene scene(random, DataType::kBf16, 2, 2, 64, Layout::kHeads, std::vector<int32_t>(70, 40));
  const Output output = run_attention(scene.params());
  run_attention(scene.params(3, 1));
  EXPECT_TRUE(run_attention(scene.params()) == output);
}

void expect_equal_paths(bool e4m3) {
  Random random(testing::fresh_seed());
  for (const Shape& shape : shapes()) {
    const DataType type = random() % 2 == 0 ? DataType::kBf16 : DataType::kF16;
    for (int trial = 0; trial < (kEmulated ? 1 : 6); ++trial) {
      std::vector<int32_t> lengths = {kEmulated ? 900 : 20000 - trial};
      if (trial % 2 == 1) lengths = {3000, 70, 600};
      if (trial == 4) lengths = {shape.num_heads == 32 ? 140000 : 50000};
      const Layout layout = random() % 2 == 0 ? Layout::kHeads : Layout::kSpaced;
      const Scene scene(random, type, shape.num_heads, shape.num_kv_heads, shape.head_dim, layout, lengths,
                        e4m3);
      const int32_t rows_per_sequence = trial % 3 == 2 ? shape.num_kv_heads : 1,
                    rows = scene.batch() * rows_per_sequence;
      const int32_t width = scene.pages.max_blocks() + 2, capacity = std::max(scene.pages.max_blocks(), 40);
      const std::vector<float> scores = testing::normal(random, static_cast<size_t>(rows) * width, 2.0f);
      Buffer<float> device_scores(scores), share(rows),
          lse(static_cast<size_t>(scene.batch()) * shape.num_heads);
      Buffer<int32_t> selected(static_cast<size_t>(rows) * capacity), counts(rows);
      Buffer<uint16_t> out(static_cast<size_t>(scene.batch()) * shape.num_heads * shape.head_dim);
      SelectAndAttendParams p;
      p.rules.mode = static_cast<SelectionMode>(random() % 3);
      p.rules.budget = kEmulated ? 700 : 4096;
      p.rules.p = 0.8f;
      p.rules.thresholds.count = rows_per_sequence;
      for (int32_t set = 0; set < rows_per_sequence; ++set)
        p.rules.thresholds.of[set] = 1e-4 * static_cast<double>(1 + random() % 100);
      p.scores = device_scores.data();
      p.score_stride = width;
      p.max_blocks = scene.pages.max_blocks();
      p.selected = selected.data();
      p.max_selected = capacity;
      p.counts = counts.data();
      p.covered_share = share.data();
      p.attention = scene.params();
      p.attention.rows_per_sequence = rows_per_sequence;
      p.attention.out = out.data();
      p.attention.log_sum_exp = lse.data();
      const auto run = [&](SelectAndAttendPath path) {
        out.fill(0xff);
        lse.fill(0xff);
        selected.fill(0x11);
        counts.fill(0xff);
        share.fill(0xff);
        check(select_and_attend(p, nullptr, path));
        const std::vector<float> shares = share.download();
        std::vector<uint32_t> bits(shares.size());
        std::memcpy(bits.data(), shares.data(), bits.size() * 4);
        return std::make_tuple(Output{out.download(), lse.download()}, selected.download(), counts.download(),
                               bits);
      };
      const auto two = run(SelectAndAttendPath::kTwoKernels);
      std::vector<std::vector<int32_t>> lists;
      for (int32_t row = 0; row < rows; ++row)
        lists.push_back(select_blocks_reference(scores.data() + static_cast<size_t>(row) * width,
                                                lengths[row / rows_per_sequence], p.rules, nullptr, capacity,
                                                row % rows_per_sequence));
      if (trial != 4) expect_matches(scene, std::get<0>(two), lists, "two kernels");
      p.overlap = static_cast<Overlap>(trial % 3);
      EXPECT_TRUE(run(SelectAndAttendPath::kFused) == two) << "dim " << shape.head_dim << " trial " << trial;
      EXPECT_TRUE(run(SelectAndAttendPath::kChoose) == two);
    }
  }
}

TEST(SelectAndAttend, EveryPathGivesTheSameBits) {
  expect_equal_paths(false);
}
TEST(SelectAndAttend, EveryPathGivesTheSameBitsOfE4m3Pages) {
  expect_equal_paths(true);
}

TEST(SelectAndAttend, RejectsWhatItCannotDo) {
  Random random(testing::fresh_seed());
  const Scene scene(random, DataType::kBf16, 4, 1, 64, Layout::kHeads, {100});
  SparseDecodeAttentionParams p = scene.params();
  Buffer<uint16_t> out(4 * 64);
  p.out = out.data();
  EXPECT_EQ(check_attention(p), cudaSuccess);
  p.head_dim = 96;
  EXPECT_EQ(sparse_decode_attention(p, nullptr), cudaErrorInvalidValue);
  p = scene.params();
  p.out = out.data();
  p.token_stride = 65;
  EXPECT_EQ(sparse_decode_attention(p, nullptr), cudaErrorInvalidValue);
  p = scene.params();
  p.out = out.data();
  p.workspace_bytes = 10;
  EXPECT_EQ(sparse_decode_attention(p, nullptr), cudaErrorInvalidValue);
  p = scene.params();
  p.out = out.data();
  p.key_scales = scene.key_scales.data();  // of numbers that are no codes
  EXPECT_EQ(sparse_decode_attention(p, nullptr), cudaErrorInvalidValue);
  p.e4m3 = true;
  p.token_stride = 72;
  EXPECT_EQ(sparse_decode_attention(p, nullptr), cudaErrorInvalidValue);
}

#if !defined(SPOT_EMULATED)
// A decode step is captured once at a short length and replayed at others: nothing but device memory may
// change.
TEST(SelectAndAttend, CapturedOnceReplaysAtAnyLength) {
  Random random(testing::fresh_seed());
  const int32_t longest = 70000, batch = 2;
  const Scene scene(random, DataType::kBf16, 32, 8, 128, Layout::kHeads, {longest, longest});
  const testing::KeyPool pool(random, KeyFormat::int4, 1, scene.pages.num_pages, 1.0f);
  const Typed queries(DataType::kBf16, testing::normal(random, batch * kSelectorHeads * kKeyDim));
  Buffer<uint8_t> device_pool(pool.bytes), device_queries(queries.bytes);
  Buffer<float> weights(testing::normal(random, batch * kSelectorHeads, 0.05f));
  const int32_t max_blocks = scene.pages.max_blocks();
  Buffer<float> scores(static_cast<size_t>(batch) * max_blocks);
  Buffer<int32_t> lengths(std::vector<int32_t>{40, 700}), selected(static_cast<size_t>(batch) * max_blocks),
      counts(batch);
  Buffer<uint16_t> out(static_cast<size_t>(batch) * 32 * 128);
  ScoreBlocksParams score;
  score.batch = batch;
  score.max_blocks = max_blocks;
  score.queries = device_queries.data();
  score.weights = weights.data();
  score.pages = device_pool.data();
  score.page_table = scene.table.data();
  score.page_table_stride = scene.pages.stride;
  score.lengths = lengths.data();
  score.block_scores = scores.data();
  score.score_stride = max_blocks;
  score.overlap = Overlap::kLaunch;
  SelectAndAttendParams p;
  p.scores = scores.data();
  p.score_stride = max_blocks;
  p.max_blocks = max_blocks;
  p.selected = selected.data();
  p.max_selected = max_blocks;
  p.counts = counts.data();
  p.attention = scene.params();
  p.attention.lengths = lengths.data();
  p.attention.out = out.data();
  p.overlap = Overlap::kLaunch;
  for (SelectAndAttendPath path :
       {SelectAndAttendPath::kChoose, SelectAndAttendPath::kTwoKernels, SelectAndAttendPath::kFused}) {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    const auto step = [&]() {
      check(score_blocks(score, stream));
      check(select_and_attend(p, stream, path));
    };
    step();  // the first call asks the device what fits
    check(cudaStreamSynchronize(stream));
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < 3; ++i) step();
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&exec, graph, 0));
    for (const std::vector<int32_t>& now :
         {std::vector<int32_t>{40, 700}, {longest, 1}, {33333, longest - 7}, {0, 12345}}) {
      lengths.upload(now);
      out.fill(0xff);
      check(cudaGraphLaunch(exec, stream));
      check(cudaStreamSynchronize(stream));
      const std::vector<uint16_t> replayed = out.download();
      const std::vector<int32_t> replayed_counts = counts.download();
      out.fill(0xff);
      step();
      check(cudaStreamSynchronize(stream));
      EXPECT_EQ(replayed, out.download());
      EXPECT_EQ(replayed_counts, counts.download());
      for (int row = 0; row < batch; ++row)
        EXPECT_GE(replayed_counts[row], std::min((now[row] + 15) / 16, 32)) << "length " << now[row];
    }
    check(cudaGraphExecDestroy(exec));
    check(cudaGraphDestroy(graph));
    check(cudaStreamDestroy(stream));
  }
}
#endif

}  // namespace
}  // namespace spot::kernels

#include <ATen/ATen.h>

#include "cache/batch_builder.h"
#include "tests/cache/e4m3.h"
#include "tests/checkpoint/support.h"

namespace spot {
namespace {

using test::kept_by_e4m3;
using testing::expect_error;
using Tokens = std::vector<int32_t>;

CacheOptions options(int64_t num_pages) {
  return {.num_pages = num_pages, .max_tokens = 500, .vocab_size = 100, .num_sequences = 4};
}

std::vector<int64_t> list(const at::Tensor& tensor) {
  const at::Tensor whole = tensor.to(at::kLong).flatten().contiguous();
  return {whole.const_data_ptr<int64_t>(), whole.const_data_ptr<int64_t>() + whole.numel()};
}
using List = std::vector<int64_t>;

TEST(BatchBuilder, SaysWhereEverythingLies) {
  PagedCache cache(options(9), at::kCPU);
  cache.states().add("recurrent", {0}, {1});
  const int64_t a = cache.open_sequence(), b = cache.open_sequence(), c = cache.open_sequence();
  make_batch(cache, {a}, {Tokens(20, 1)});
  make_batch(cache, {b}, {{1}});
  const Batch batch = build_batch(cache, {{.sequence = b, .tokens = {7}},
                                          {.sequence = c, .tokens = {4, 5}, .logits = false},
                                          {.sequence = a, .tokens = Tokens(14, 9)}});
  EXPECT_EQ(batch.sequences, (List{b, c, a}));
  EXPECT_EQ(batch.starts, (List{1, 0, 20}));
  EXPECT_EQ(batch.query_lengths, (List{1, 2, 14}));
  EXPECT_EQ(batch.num_decodes, 1);
  EXPECT_FALSE(batch.is_decode());
  EXPECT_EQ(list(batch.tokens.narrow(0, 0, 4)), (List{7, 4, 5, 9}));
  EXPECT_EQ(list(batch.positions.narrow(0, 0, 5)), (List{1, 0, 1, 20, 21}));
  EXPECT_EQ(list(batch.page_table), (List{2, 0, 0, 3, 0, 0, 0, 1, 4}));
  EXPECT_EQ(list(batch.lengths), (List{2, 2, 34}));
  EXPECT_EQ(list(batch.query_starts), (List{0, 1, 3, 17}));
  EXPECT_EQ(list(batch.logit_rows), (List{0, 16}));
  EXPECT_EQ(list(batch.state_slots), (List{cache.state_slot(b), cache.state_slot(c), cache.state_slot(a)}));
  List slots = {2 * 16 + 1, 3 * 16, 3 * 16 + 1};
  for (int64_t t = 20; t < 32; ++t) slots.push_back(t);
  slots.push_back(4 * 16), slots.push_back(4 * 16 + 1);
  EXPECT_EQ(list(batch.slots), slots);
  EXPECT_EQ(batch.first_pages, (List{2, 3, -1}));
  EXPECT_EQ(batch.page_table.scalar_type(), at::kInt);

  const Batch decodes = batch.decodes();
  EXPECT_TRUE(decodes.is_decode());
  EXPECT_EQ(decodes.sequences, (List{b}));
  EXPECT_EQ(list(decodes.slots), (List{33}));
  EXPECT_EQ(list(decodes.page_table), (List{2, 0, 0}));
  EXPECT_TRUE(decodes.slots.is_alias_of(batch.slots));
  const Batch rows = batch.prefills().rows();
  EXPECT_TRUE(rows.is_decode());
  EXPECT_EQ(rows.num_sequences(), 16);
  EXPECT_EQ(List(rows.sequences.begin(), rows.sequences.begin() + 4), (List{c, c, a, a}));
  EXPECT_EQ(List(rows.starts.begin(), rows.starts.begin() + 4), (List{0, 1, 20, 21}));
  EXPECT_EQ(List(rows.first_pages.begin(), rows.first_pages.begin() + 3), (List{3, 3, -1}));
  EXPECT_EQ(list(rows.page_table.narrow(0, 1, 2)), (List{3, 0, 0, 0, 1, 4}));
  EXPECT_EQ(list(rows.lengths.narrow(0, 0, 4)), (List{1, 2, 21, 22}));
  EXPECT_EQ(list(rows.query_starts), list(at::arange(17)));
  EXPECT_EQ(list(rows.state_slots.narrow(0, 1, 2)), (List{cache.state_slot(c), cache.state_slot(a)}));
  EXPECT_TRUE(rows.slots.is_alias_of(batch.slots));
  const std::vector<QueryChunk> chunks = prefill_chunks(batch);
  ASSERT_EQ(chunks.size(), 2u);
  EXPECT_EQ(chunks[1].sequence, 2);
  EXPECT_EQ(chunks[1].first, 3);
  EXPECT_EQ(chunks[1].count, 14);
  EXPECT_EQ(chunks[1].start, 20);
  EXPECT_EQ(list(sequence_pages(batch, 2, 33)), (List{0, 1, 4}));
  EXPECT_EQ(list(sequence_pages(batch, 2, 32)), (List{0, 1}));
}

TEST(BatchBuilder, OneTokenIsAPromptsOrADecodeRows) {
  PagedCache cache(options(9), at::kCPU);
  const int64_t a = cache.open_sequence(), b = cache.open_sequence(), c = cache.open_sequence();
  EXPECT_EQ(make_batch(cache, {a, b}, {{1}, {1}}).num_decodes, 2);
  EXPECT_EQ(make_batch(cache, {a, b, c}, {{1}, {1, 2}, {1}}).num_decodes, 1);
  EXPECT_EQ(build_batch(cache, {{.sequence = a, .tokens = {1}, .decode = false}}).num_decodes, 0);
  expect_error([&] { build_batch(cache, {{.sequence = a, .tokens = {1, 2}, .decode = true}}); },
               {"a decode row has one"});
  expect_error(
      [&] {
        build_batch(cache,
                    {{.sequence = a, .tokens = {1, 2}}, {.sequence = b, .tokens = {1}, .decode = true}});
      },
      {"decode rows first"});
}

TEST(BatchBuilder, RefusesWithoutChange) {
  PagedCache cache(options(4), at::kCPU);
  const int64_t a = cache.open_sequence(), b = cache.open_sequence();
  make_batch(cache, {a}, {{1, 2, 3}});
  expect_error([&] { make_batch(cache, {a, b}, {{1, 2}, {3, 100}}); }, {"token id 100"});
  expect_error([&] { make_batch(cache, {a, b}, {{1, 2}, {-1}}); }, {"token id -1"});
  expect_error([&] { make_batch(cache, {a, b}, {Tokens(40, 1), Tokens(17, 1)}); },
               {"64 tokens is full", "4 more pages", "3 are free"});
  expect_error([&] { make_batch(cache, {a, a}, {{1}, {2}}); }, {"twice"});
  expect_error([&] { make_batch(cache, {a}, {{}}); }, {"no token"});
  expect_error([&] { make_batch(cache, {}, {}); }, {"0 sequences"});
  expect_error([&] { make_batch(cache, {a}, {}); }, {"0 token lists"});
  expect_error([&] { make_batch(cache, {a, 99}, {{1}, {1}}); }, {"sequence 99"});
  expect_error([&] { make_batch(cache, {a}, {Tokens(500, 1)}); }, {"503", "positions", "YaRN"});
  EXPECT_EQ(cache.length(a), 3);
  EXPECT_EQ(cache.length(b), 0);
  EXPECT_EQ(cache.num_free_pages(), 3);
}

TEST(BatchBuilder, PadsToAShapeInTheSameMemory) {
  PagedCache cache(options(9), at::kCPU);
  cache.states().add("recurrent", {0}, {1});
  const BatchShape shape{.rows = 4, .table_width = 3};
  Batch batch = build_batch(cache, {}, shape);
  EXPECT_EQ(batch.sequences, (List{-1, -1, -1, -1}));
  EXPECT_EQ(batch.num_decodes, 4);
  EXPECT_EQ(list(batch.slots), (List{-1, -1, -1, -1}));
  EXPECT_EQ(list(batch.lengths), (List{0, 0, 0, 0}));
  EXPECT_EQ(list(batch.state_slots), List(4, cache.states().spare()));
  EXPECT_EQ(cache.num_free_pages(), 9);
  const void* const slots = batch.slots.const_data_ptr();
  const int64_t a = cache.open_sequence(), b = cache.open_sequence();
  make_batch(cache, {a, b}, {Tokens(17, 1), Tokens(30, 2)});
  rebuild_batch(cache, {{.sequence = b, .tokens = {5}}, {.sequence = a, .tokens = {6}}}, shape, batch);
  EXPECT_EQ(batch.slots.const_data_ptr(), slots);
  EXPECT_EQ(batch.sequences, (List{b, a, -1, -1}));
  EXPECT_EQ(list(batch.tokens), (List{5, 6, 0, 0}));
  EXPECT_EQ(list(batch.positions), (List{30, 17, 0, 0}));
  EXPECT_EQ(list(batch.slots), (List{3 * 16 + 14, 16 + 1, -1, -1}));
  EXPECT_EQ(list(batch.lengths), (List{31, 18, 0, 0}));
  EXPECT_EQ(list(batch.page_table), (List{2, 3, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(list(batch.logit_rows), (List{0, 1, 2, 3}));
  rebuild_batch(cache, {{.sequence = a, .tokens = {8}}}, shape, batch);
  EXPECT_EQ(list(batch.slots), (List{16 + 2, -1, -1, -1}));
  expect_error(
      [&] { rebuild_batch(cache, {{.sequence = a, .tokens = {8}}}, {.rows = 2, .table_width = 3}, batch); },
      {"another shape"});
  expect_error([&] { build_batch(cache, {{.sequence = a, .tokens = {8, 9}}}, shape); }, {"decode row"});
  expect_error([&] { build_batch(cache, {{.sequence = a, .tokens = {8}}}, {.rows = 1, .table_width = 1}); },
               {"full"});
  expect_error([&] { build_batch(cache, {{.sequence = a, .tokens = {8}}}, {.rows = 0, .table_width = 1}); },
               {"0 rows"});
  EXPECT_EQ(cache.length(a), 19);
}

TEST(Batch, CutsDocumentsApart) {
  const Batch batch = unpaged_batch({5, 6, 7, 8, 9}, {0, 2}, at::kCPU);
  EXPECT_EQ(batch.query_lengths, (List{2, 3}));
  EXPECT_EQ(list(batch.positions), (List{0, 1, 0, 1, 2}));
  EXPECT_EQ(list(batch.tokens), (List{5, 6, 7, 8, 9}));
  EXPECT_EQ(batch.num_decodes, 0);
}

TEST(PagedTensors, PaddedRowsAreNotWritten) {
  at::Tensor pool = at::zeros({2, 3, 4, 5});
  const at::Tensor rows = at::randn({4, 2, 5});
  write_tokens(pool, at::tensor({6, -1, 0, -1}, at::kLong), rows);
  EXPECT_TRUE(at::equal(pool.select(1, 1).select(1, 2), rows[0]));
  EXPECT_TRUE(at::equal(pool.select(1, 0).select(1, 0), rows[2]));
  EXPECT_EQ(pool.count_nonzero().item<int64_t>(), 20);
  EXPECT_TRUE(view_tokens(pool, 1, 7).is_alias_of(pool));
  EXPECT_TRUE(at::equal(view_tokens(pool, 1, 7), gather_tokens(pool, at::tensor({1, 2, 0}, at::kInt), 7)));
  expect_error([&] { write_tokens(pool, at::tensor({0}, at::kLong), rows); }, {"cannot be written"});
}

TEST(PagedTensors, CodesAreTheNearestNumbersAndSaturate) {
  at::manual_seed(testing::fresh_seed());
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const int64_t heads = 3, dim = 10, tokens = 37;
    PagePools pools(5, 8, at::kCPU);
    const at::Tensor scale = at::tensor({0.0625f, 1.0f, 0.001953125f});
    pools.add_codes("keys", 4, {{heads}, {8, dim}}, scale, dtype);
    EXPECT_EQ(pools.page_bytes(), heads * 8 * dim);
    // From what becomes zero to what saturates in every head.
    at::Tensor rows = (at::randn({tokens, heads, dim}) *
                       at::exp2(at::randint(-18, 12, {tokens, heads, dim})) * scale.unsqueeze(1))
                          .to(dtype);
    rows[3][2].fill_(3.0);  // past 448 times the scale
    const TokenPool pool = pools.tokens("keys", 4);
    const at::Tensor slots = at::arange(tokens, at::kLong);
    write_tokens(pool, slots, rows);
    const at::Tensor read = view_tokens(pool, 0, tokens).transpose(0, 1);
    EXPECT_EQ(read.scalar_type(), dtype);
    EXPECT_TRUE(at::equal(read, kept_by_e4m3(rows, scale)));
    EXPECT_EQ(read[3][2].min().item<double>(), 448 * 0.001953125);
    EXPECT_FALSE(at::equal(read, rows));
    EXPECT_TRUE(
        at::equal(gather_tokens(pool, at::arange(5, at::kInt), tokens), view_tokens(pool, 0, tokens)));
    // Stored again what was read: nothing changes.
    const at::Tensor before = pool.stored.clone();
    write_tokens(pool, slots, read);
    EXPECT_TRUE(at::equal(before.view(at::kByte), pool.stored.view(at::kByte)));
  }
  PagePools pools(5, 8, at::kCPU);
  expect_error([&] { pools.add_codes("keys", 4, {{2}, {8, 6}}, at::ones({3}), at::kFloat); },
               {"layer 4", "scales of 3 were given for 2 heads"});
}

}  // namespace
}  // namespace spot

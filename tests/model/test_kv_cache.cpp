#include "model/kv_cache.h"
#include "tests/checkpoint/support.h"
#include "tests/model/configs.h"

namespace spot {
namespace {

using testing::expect_error;
using testing::fresh_seed;
using testing::small_qwen3;
using testing::small_qwen3_5;

Batch batch_of(const KvCache& cache, const std::vector<int64_t>& sequences,
               const std::vector<int64_t>& counts) {
  Batch batch;
  batch.sequences = sequences;
  batch.query_lengths = counts;
  for (size_t i = 0; i < sequences.size(); ++i)
    batch.starts.push_back(cache.length(sequences[i]) - counts[i]);
  return batch;
}

TEST(KvCache, PagesComeLowestFirstAndReturn) {
  KvCache cache(small_qwen3(), 6, at::kFloat, at::kCPU);
  const int64_t a = cache.open_sequence(), b = cache.open_sequence();
  cache.extend(a, 17);
  cache.extend(b, 16);
  EXPECT_EQ(cache.pages(a), (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(cache.pages(b), (std::vector<int32_t>{2}));
  EXPECT_EQ(cache.pages_needed(a, 15), 0);
  EXPECT_EQ(cache.pages_needed(a, 16), 1);
  cache.extend(a, 15);
  cache.extend(a, 1);
  EXPECT_EQ(cache.pages(a), (std::vector<int32_t>{0, 1, 3}));
  EXPECT_EQ(cache.num_free_pages(), 2);
  cache.close_sequence(a);
  EXPECT_EQ(cache.num_free_pages(), 5);
  const int64_t c = cache.open_sequence();
  cache.extend(c, 50);
  EXPECT_EQ(cache.pages(c), (std::vector<int32_t>{0, 1, 3, 4}));
  expect_error([&] { cache.length(a); }, {"sequence 0"});
}

TEST(KvCache, RefusesWithoutChange) {
  KvCache cache(small_qwen3(), 30, at::kFloat, at::kCPU);
  const int64_t a = cache.open_sequence(), b = cache.open_sequence();
  cache.extend(a, 390);
  expect_error([&] { cache.extend(a, 11); }, {"401", "400 positions"});
  EXPECT_EQ(cache.length(a), 390);
  expect_error([&] { cache.extend(b, 100); }, {"480 tokens is full", "7 pages", "5 are free"});
  EXPECT_EQ(cache.length(b), 0);
  EXPECT_EQ(cache.num_free_pages(), 5);
  expect_error([&] { cache.extend(a, -1); }, {"-1"});
  expect_error([&] { cache.keys(7); }, {"layer 7"});
  expect_error([&] { cache.conv_states(0); }, {"layer 0"});
  expect_error([&] { KvCache none(small_qwen3(), 0, at::kFloat, at::kCPU); }, {"0 pages"});
}

// Random appends, closings and copies against plain per-sequence tensors.
TEST(KvCache, HoldsWhatAPlainStoreHolds) {
  const uint64_t seed = fresh_seed();
  std::mt19937_64 random(seed);
  at::manual_seed(seed);
  const ModelConfig config = small_qwen3();
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    KvCache cache(config, 40, dtype, at::kCPU);
    std::map<int64_t, std::pair<at::Tensor, at::Tensor>> plain;  // [tokens, heads, dim]
    for (int round = 0; round < 200; ++round) {
      const auto pick = [&] {
        return std::next(plain.begin(), static_cast<long>(random() % plain.size()))->first;
      };
      const auto action = random() % 10;
      if (plain.empty() || (action < 2 && plain.size() < 5)) {
        const at::Tensor nothing = at::zeros({0, config.num_kv_heads, config.head_dim}, dtype);
        plain[cache.open_sequence()] = {nothing, nothing};
      } else if (action == 2) {
        const int64_t id = pick();
        cache.close_sequence(id);
        plain.erase(id);
      } else if (action == 3) {
        const int64_t id = pick();
        if (cache.pages_needed(id, 0) <= 0 &&
            cache.num_free_pages() >= static_cast<int64_t>(cache.pages(id).size())) {
          const int64_t copy = cache.copy_sequence(id);
          plain[copy] = plain[id];
          EXPECT_EQ(cache.length(copy), cache.length(id));
        }
      } else {
        std::vector<int64_t> ids, counts;
        int64_t total = 0, pages = 0;
        for (const auto& [id, tensors] : plain) {
          const auto count = static_cast<int64_t>(random() % 21);
          if (cache.length(id) + count > config.max_position_embeddings) continue;
          if (count == 0 || pages + cache.pages_needed(id, count) > cache.num_free_pages()) continue;
          pages += cache.pages_needed(id, count);
          ids.push_back(id);
          counts.push_back(count);
          total += count;
        }
        for (size_t i = 0; i < ids.size(); ++i) cache.extend(ids[i], counts[i]);
        const Batch batch = batch_of(cache, ids, counts);
        const at::Tensor key = at::randn({total, config.num_kv_heads, config.head_dim}).to(dtype),
                         value = at::randn_like(key);
        cache.write(1, cache.slots(batch), key, value);
        int64_t first = 0;
        for (size_t i = 0; i < ids.size(); ++i) {
          auto& [keys, values] = plain[ids[i]];
          keys = at::cat({keys, key.narrow(0, first, counts[i])});
          values = at::cat({values, value.narrow(0, first, counts[i])});
          first += counts[i];
        }
      }
      for (const auto& [id, tensors] : plain) {
        const int64_t length = cache.length(id);
        ASSERT_EQ(length, tensors.first.size(0));
        const int64_t part = length == 0 ? 0 : static_cast<int64_t>(random() % (length + 1));
        ASSERT_TRUE(at::equal(cache.gather(cache.keys(1), id, part),
                              tensors.first.narrow(0, 0, part).transpose(0, 1)));
        ASSERT_TRUE(at::equal(cache.gather(cache.values(1), id, length), tensors.second.transpose(0, 1)));
      }
    }
    EXPECT_EQ(cache.keys(0).count_nonzero().item<int64_t>(), 0);
  }
}

TEST(KvCache, TablesDescribeTheBatch) {
  KvCache cache(small_qwen3(), 9, at::kFloat, at::kCPU);
  const int64_t a = cache.open_sequence(), b = cache.open_sequence();
  cache.extend(a, 20);
  cache.extend(b, 3);
  cache.extend(a, 14);
  const Batch batch = batch_of(cache, {b, a}, {2, 14});
  EXPECT_TRUE(at::equal(cache.page_table(batch), at::tensor({2, 0, 0, 0, 1, 3}, at::kInt).view({2, 3})));
  EXPECT_TRUE(at::equal(cache.lengths(batch), at::tensor({3, 34}, at::kInt)));
  std::vector<int64_t> slots = {2 * 16 + 1, 2 * 16 + 2};
  for (int64_t t = 20; t < 32; ++t) slots.push_back(t);
  slots.push_back(3 * 16);
  slots.push_back(3 * 16 + 1);
  EXPECT_TRUE(at::equal(cache.slots(batch), at::tensor(slots, at::kLong)));
  Batch beyond = batch;
  beyond.query_lengths[0] = 3;
  expect_error([&] { cache.slots(beyond); }, {"past its length 3"});
}

TEST(KvCache, ConsecutivePagesAreAView) {
  KvCache cache(small_qwen3(), 9, at::kFloat, at::kCPU);
  const int64_t a = cache.open_sequence();
  cache.extend(a, 40);
  EXPECT_TRUE(cache.gather(cache.keys(0), a, 40).is_alias_of(cache.keys(0)));
}

TEST(KvCache, RecurrentStatesAreOneSlotASequence) {
  KvCache cache(small_qwen3_5(), 9, at::kFloat, at::kCPU, 2);
  EXPECT_EQ(cache.recurrent_states(0).sizes(), (std::vector<int64_t>{2, 6, 8, 12}));
  EXPECT_EQ(cache.conv_states(0).sizes(), (std::vector<int64_t>{2, 3, 2 * 2 * 8 + 6 * 12}));
  expect_error([&] { cache.keys(0); }, {"layer 0", "no keys"});
  expect_error([&] { cache.recurrent_states(2); }, {"layer 2"});
  std::vector<int64_t> ids;
  for (int i = 0; i < 5; ++i) {
    ids.push_back(cache.open_sequence());
    Batch batch;
    batch.sequences = {ids.back()};
    cache.recurrent_states(4).index_fill_(0, cache.state_slots(batch), i + 1);
    cache.conv_states(4).index_fill_(0, cache.state_slots(batch), -i - 1);
  }
  Batch batch;
  batch.sequences = {ids[3], ids[0], ids[4]};
  const auto values_of = [&] {
    return cache.recurrent_states(4)
        .index_select(0, cache.state_slots(batch))
        .select(1, 0)
        .select(1, 0)
        .select(1, 0);
  };
  EXPECT_TRUE(at::equal(values_of(), at::tensor({4.0f, 1.0f, 5.0f})));
  cache.close_sequence(ids[0]);
  const int64_t fresh = cache.open_sequence();
  batch.sequences = {fresh};
  EXPECT_TRUE(at::equal(values_of(), at::tensor({0.0f})));
  // A copy has a state of its own.
  const int64_t copy = cache.copy_sequence(ids[3]);
  batch.sequences = {copy};
  EXPECT_TRUE(at::equal(values_of(), at::tensor({4.0f})));
  cache.recurrent_states(4).index_fill_(0, cache.state_slots(batch), 9);
  batch.sequences = {ids[3]};
  EXPECT_TRUE(at::equal(values_of(), at::tensor({4.0f})));
}

TEST(KvCache, RefusesForeignStates) {
  KvCache cache(small_qwen3(), 4, at::kFloat, at::kCPU);
  KvCache other(small_qwen3_5(), 4, at::kFloat, at::kCPU);
  const int64_t a = cache.open_sequence();
  cache.extend(a, 60);
  const SequenceState state = cache.export_sequence(a);
  expect_error([&] { other.import_sequence(state); }, {"60 tokens", "does not fit"});
  expect_error([&] { cache.import_sequence(state); }, {"full"});
  EXPECT_EQ(cache.num_free_pages(), 0);
  cache.close_sequence(a);
  EXPECT_EQ(cache.length(cache.import_sequence(state)), 60);
}

}  // namespace
}  // namespace spot

#include <ATen/ATen.h>

#include "cache/batch_builder.h"
#include "cache/paged_cache.h"
#include "tests/cache/e4m3.h"
#include "tests/checkpoint/support.h"

namespace spot {
namespace {

using test::kept_by_e4m3;
using testing::expect_error;
using testing::fresh_seed;
using Tokens = std::vector<int32_t>;

constexpr int64_t kHeads = 2, kDim = 3;

CacheOptions options(int64_t num_pages, int64_t page_size = 16) {
  return {.num_pages = num_pages, .page_size = page_size, .max_tokens = 400, .vocab_size = 100};
}

TEST(PagePools, CopyAPageInEveryPool) {
  PagePools pools(5, 4, at::kCPU);
  const at::Tensor keys = pools.add("keys", 1, {{kHeads}, {4, kDim}}, at::kFloat),
                   bytes = pools.add("selector_keys", 1, {{}, {2, 7}}, at::kByte),
                   bounds = pools.add("bounds", 3, {{kHeads, 2}, {}}, at::kHalf);
  EXPECT_EQ(keys.sizes(), (std::vector<int64_t>{kHeads, 5, 4, kDim}));
  EXPECT_EQ(bytes.sizes(), (std::vector<int64_t>{5, 2, 7}));
  EXPECT_EQ(pools.page_bytes("keys"), kHeads * 4 * kDim * 4);
  EXPECT_EQ(pools.page_bytes(), kHeads * 4 * kDim * 4 + 14 + kHeads * 2 * 2);
  EXPECT_EQ(pools.bytes(), 5 * pools.page_bytes());
  EXPECT_EQ(pools.names(), (std::vector<std::string>{"keys", "selector_keys", "bounds"}));
  keys.normal_(), bytes.random_(), bounds.normal_();
  const at::Tensor old = keys.clone();
  pools.copy({{3, 0}, {1, 4}});
  EXPECT_TRUE(at::equal(keys.select(1, 0), old.select(1, 3)));
  EXPECT_TRUE(at::equal(keys.select(1, 4), old.select(1, 1)));
  EXPECT_TRUE(at::equal(keys.narrow(1, 1, 3), old.narrow(1, 1, 3)));
  EXPECT_TRUE(at::equal(bytes[0], bytes[3]));
  EXPECT_TRUE(at::equal(bounds.select(2, 4), bounds.select(2, 1)));
  EXPECT_TRUE(pools.get("keys", 1).is_same(keys));
  expect_error([&] { pools.get("keys", 3); }, {"layer 3", "no keys"});
  EXPECT_FALSE(pools.has("keys", 3));
  pools.add("bounds", 3, {{1}, {}}, at::kFloat);
  expect_error([&] { pools.get("bounds", 3); }, {"several pools"});
  EXPECT_EQ(pools.page_bytes("bounds"), kHeads * 2 * 2 + 4);
  expect_error([&] { PagePools none(0, 16, at::kCPU); }, {"0 pages"});
}

// Random appends, closings, forks, prefix openings and rollbacks against plain per-sequence tensors: what a
// token's row holds is drawn anew for each token that is computed, so that a page in the wrong hands shows.
TEST(PagedCache, HoldsWhatAPlainStoreHolds) {
  const uint64_t seed = fresh_seed();
  at::manual_seed(seed);
  int64_t reused = 0;  // in one of thirteen worlds nothing is
  for (uint64_t world = 0; world < 6; ++world) {
    const auto dtype = world % 2 ? at::kBFloat16 : at::kFloat;
    const bool codes = world % 3 == 2;
    const at::Tensor scale = at::exp2(at::randint(-5, 6, {kHeads}).to(at::kFloat));
    std::mt19937_64 random(seed + world);
    PagedCache cache(options(40, 8), at::kCPU);
    if (codes)
      cache.pools().add_codes("keys", 0, {{kHeads}, {8, kDim}}, scale, dtype);
    else
      cache.pools().add("keys", 0, {{kHeads}, {8, kDim}}, dtype);
    const TokenPool pool = cache.pools().tokens("keys", 0);
    struct Plain {
      Tokens tokens;
      at::Tensor rows;  // [length, heads, dim]
    };
    std::map<int64_t, Plain> plain;
    std::vector<Tokens> closed;
    std::map<Tokens, std::vector<at::Tensor>> computed;  // rows of a full page, by all tokens up to its end
    for (int round = 0; round < 400; ++round) {
      const auto pick = [&] {
        return std::next(plain.begin(), static_cast<long>(random() % plain.size()))->first;
      };
      const auto action = random() % 12;
      if (plain.empty() || (action < 2 && plain.size() < 5)) {
        plain[cache.open_sequence()] = {{}, at::zeros({0, kHeads, kDim}, dtype)};
      } else if (action == 2) {
        const int64_t id = pick();
        cache.close_sequence(id);
        closed.push_back(plain[id].tokens);
        plain.erase(id);
      } else if (action == 3 && plain.size() < 5) {
        const int64_t id = pick();
        plain[cache.fork_sequence(id)] = plain[id];
      } else if (action < 6 && !closed.empty() && plain.size() < 5) {
        const Tokens& old = closed[random() % closed.size()];
        const int64_t promised = cache.cached_prefix(old), id = cache.open_sequence(old),
                      length = cache.length(id);
        ASSERT_EQ(length, promised);
        reused += length;
        Plain& p = plain[id];
        p.tokens.assign(old.begin(), old.begin() + length);
        p.rows = gather_tokens(pool, at::tensor(cache.pages(id), at::kInt), length).transpose(0, 1).clone();
        // Each page holds what was once computed for just these tokens.
        for (int64_t end = 8; end <= length; end += 8) {
          bool known = false;
          for (const at::Tensor& rows : computed[Tokens(old.begin(), old.begin() + end)])
            known |= at::equal(rows, p.rows.narrow(0, end - 8, 8));
          ASSERT_TRUE(known) << end;
        }
      } else if (action == 6) {
        const int64_t id = pick();
        const auto length = static_cast<int64_t>(random() % (plain[id].tokens.size() + 1));
        cache.rollback(id, {length, {}});
        plain[id].tokens.resize(static_cast<size_t>(length));
        plain[id].rows = plain[id].rows.narrow(0, 0, length);
      } else {
        std::vector<BatchEntry> entries;
        std::vector<int64_t> ids, counts;
        for (const auto& [id, sequence] : plain) {
          const auto count = static_cast<int64_t>(random() % 21);
          if (cache.length(id) + count > 400 || count == 0) continue;
          ids.push_back(id), counts.push_back(count);
          if (cache.allocator().pages_needed(ids, counts) > cache.num_free_pages()) {
            ids.pop_back(), counts.pop_back();
            continue;
          }
          BatchEntry entry{.sequence = id, .decode = false};
          for (int64_t i = 0; i < count; ++i) entry.tokens.push_back(static_cast<int32_t>(random() % 2));
          entries.push_back(entry);
        }
        if (entries.empty()) continue;
        const Batch batch = build_batch(cache, entries);
        at::Tensor rows = at::randn({batch.num_tokens(), kHeads, kDim}).to(dtype);
        if (codes) rows = kept_by_e4m3(rows, scale);
        write_tokens(pool, batch.slots, rows);
        commit_batch(cache, batch);
        int64_t first = 0;
        for (const BatchEntry& entry : entries) {
          Plain& p = plain[entry.sequence];
          const auto count = static_cast<int64_t>(entry.tokens.size());
          p.tokens.insert(p.tokens.end(), entry.tokens.begin(), entry.tokens.end());
          p.rows = at::cat({p.rows, rows.narrow(0, first, count)});
          first += count;
          const auto length = static_cast<int64_t>(p.tokens.size());
          for (int64_t end = ((length - count) / 8 + 1) * 8; end <= length; end += 8)
            computed[Tokens(p.tokens.begin(), p.tokens.begin() + end)].push_back(
                p.rows.narrow(0, end - 8, 8).clone());
        }
      }
      cache.allocator().check();
      for (const auto& [id, sequence] : plain) {
        const int64_t length = cache.length(id);
        ASSERT_EQ(length, sequence.rows.size(0));
        const auto part = static_cast<int64_t>(random() % (length + 1));
        const at::Tensor pages = at::tensor(cache.pages(id), at::kInt);
        ASSERT_TRUE(
            at::equal(gather_tokens(pool, pages, part), sequence.rows.narrow(0, 0, part).transpose(0, 1)));
      }
    }
  }
  EXPECT_GT(reused, 0);
}

PagedCache& with_states(PagedCache& cache) {
  cache.states().add("conv", {0, 2}, {3, 5});
  cache.states().add("recurrent", {0, 2}, {2, 4}, at::kDouble);
  return cache;
}

// A recurrent state that tells the text: after a token it is 3 times itself plus the token.
void advance(PagedCache& cache, int64_t sequence, const Tokens& tokens) {
  cache.extend(sequence, tokens);
  const at::Tensor state = cache.states().get("recurrent", 2).select(0, cache.state_slot(sequence));
  for (const int32_t token : tokens) state.mul_(3).add_(token).remainder_(1009);
  cache.commit(sequence);
}

double state_of(PagedCache& cache, int64_t sequence) {
  return cache.states().get("recurrent", 2)[cache.state_slot(sequence)][1][3].item<double>();
}

TEST(PagedCache, StatesAreOneSlotASequence) {
  CacheOptions wanted = options(9);
  wanted.num_sequences = 3;
  PagedCache cache(wanted, at::kCPU);
  with_states(cache);
  EXPECT_EQ(cache.states().get("recurrent", 0).sizes(), (std::vector<int64_t>{4, 2, 4}));
  EXPECT_EQ(cache.states().slot_bytes(), 2 * (15 * 4 + 8 * 8));
  EXPECT_EQ(cache.states().bytes(), 4 * cache.states().slot_bytes());
  expect_error([&] { cache.states().get("recurrent", 1); }, {"layer 1", "recurrent"});
  std::vector<int64_t> ids;
  for (int32_t i = 0; i < 3; ++i) {
    ids.push_back(cache.open_sequence());
    advance(cache, ids.back(), {i + 1});
  }
  expect_error([&] { cache.open_sequence(); }, {"3 sequences", "all are open"});
  expect_error([&] { cache.open_sequence(Tokens{1, 2}); }, {"3 sequences"});
  EXPECT_EQ(cache.allocator().num_sequences(), 3);
  expect_error([&] { cache.states().add("late", {0}, {1}); }, {"before the first"});
  cache.close_sequence(ids[1]);
  ids[1] = cache.fork_sequence(ids[2]);
  EXPECT_EQ(state_of(cache, ids[1]), 3);
  advance(cache, ids[1], {5});
  EXPECT_EQ(state_of(cache, ids[1]), 14);
  EXPECT_EQ(state_of(cache, ids[2]), 3);
  cache.close_sequence(ids[1]);
  EXPECT_EQ(state_of(cache, cache.open_sequence()), 0);  // an empty past
}

TEST(PagedCache, RollsBack) {
  PagedCache cache(options(9), at::kCPU);
  with_states(cache);
  const int64_t id = cache.open_sequence();
  advance(cache, id, {1, 2, 3});
  const PagedCache::Mark mark = cache.mark(id);
  for (int i = 0; i < 3; ++i) {
    advance(cache, id, Tokens(40, 7));
    cache.rollback(id, mark);
    EXPECT_EQ(cache.length(id), 3);
    EXPECT_EQ(state_of(cache, id), 18);
    EXPECT_EQ(cache.num_free_pages(), 8);
  }
}

// A prefix of a hybrid is found at block ends with a snapshot only, and goes on from its state.
TEST(PagedCache, SnapshotsServePrefixes) {
  CacheOptions wanted = options(30, 4);
  wanted.num_sequences = 2, wanted.num_snapshots = 2;
  PagedCache cache(wanted, at::kCPU);
  with_states(cache);
  Tokens text;
  for (int32_t i = 0; i < 21; ++i) text.push_back(i * 5 % 17);
  const auto part = [&](int64_t first, int64_t last) {
    return Tokens(text.begin() + first, text.begin() + last);
  };
  const int64_t a = cache.open_sequence();
  std::map<int64_t, double> states;
  for (int64_t end = 4; end <= 16; end += 4) {
    advance(cache, a, part(end - 4, end));
    states[end] = state_of(cache, a);
    if (end != 12) cache.snapshot(a);  // at 4, 8, and 16, for which the first one goes
  }
  cache.snapshot(a);  // is there already
  advance(cache, a, part(16, 21));
  expect_error([&] { cache.snapshot(a); }, {"multiple of 4"});
  cache.close_sequence(a);
  EXPECT_EQ(cache.cached_prefix(part(0, 8)), 0);
  EXPECT_EQ(cache.cached_prefix(part(0, 9)), 8);
  EXPECT_EQ(cache.cached_prefix(part(0, 16)), 8);
  EXPECT_EQ(cache.cached_prefix(text), 16);
  for (const int64_t end : {int64_t{9}, int64_t{21}}) {
    const int64_t b = cache.open_sequence(part(0, end)), found = cache.length(b);
    EXPECT_EQ(state_of(cache, b), states.at(found));
    advance(cache, b, part(found, end));
    const int64_t c = cache.open_sequence();
    for (const int32_t token : part(0, end)) advance(cache, c, {token});
    EXPECT_EQ(state_of(cache, b), state_of(cache, c));
    cache.close_sequence(b);
    cache.close_sequence(c);
  }
  // Pages that are needed take their snapshots along, whose slots serve again.
  const int64_t d = cache.open_sequence();
  advance(cache, d, Tokens(120, 3));
  EXPECT_EQ(cache.cached_prefix(text), 0);
  cache.snapshot(d);
  EXPECT_EQ(cache.cached_prefix(Tokens(130, 3)), 120);
  cache.close_sequence(d);
  EXPECT_EQ(cache.length(cache.open_sequence(Tokens(121, 3))), 120);
}

TEST(PagedCache, RefusesWithoutChange) {
  PagedCache cache(options(30), at::kCPU);
  const int64_t a = cache.open_sequence(), b = cache.open_sequence();
  cache.extend(a, Tokens(390, 1));
  expect_error([&] { cache.extend(a, Tokens(11, 1)); }, {"401", "400 positions", "YaRN"});
  EXPECT_EQ(cache.length(a), 390);
  expect_error([&] { cache.extend(b, Tokens(100, 1)); }, {"480 tokens is full", "7 pages", "5 are free"});
  EXPECT_EQ(cache.length(b), 0);
  EXPECT_EQ(cache.num_free_pages(), 5);
  expect_error([&] { cache.state_slot(17); }, {"sequence 17"});
}

}  // namespace
}  // namespace spot

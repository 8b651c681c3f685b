#include <algorithm>
#include <set>

#include "cache/block_allocator.h"
#include "tests/checkpoint/support.h"

namespace spot {
namespace {

using testing::expect_error;
using testing::fresh_seed;
using Tokens = std::vector<int32_t>;

Tokens counting(int32_t first, int64_t count) {
  Tokens tokens;
  for (int64_t i = 0; i < count; ++i) tokens.push_back(first + static_cast<int32_t>(i));
  return tokens;
}

// An allocator beside plain lists of tokens, and beside what its pages would hold: for every place of a page
// the whole text up to there.
class Model {
 public:
  Model(int64_t num_pages, int64_t page_size) : allocator(num_pages, page_size) {
    held_.resize(static_cast<size_t>(num_pages * page_size));
    allocator.on_snapshot_dropped(
        [this](int64_t snapshot) { EXPECT_EQ(live_snapshots.erase(snapshot), 1u); });
  }

  void extend(int64_t id, const Tokens& more) {
    const auto copy = allocator.extend(id, more);
    const int64_t size = allocator.page_size();
    if (copy) {
      std::copy_n(held_.begin() + copy->from * size, size, held_.begin() + copy->to * size);
      ++copies;
    }
    for (const int32_t token : more) {
      texts.at(id).second.push_back(token);
      const int64_t position = static_cast<int64_t>(texts.at(id).second.size()) - 1;
      held_[allocator.pages(id)[position / size] * size + position % size] = texts.at(id);
    }
  }

  // Every sequence reads its own text, pages are shared only where texts agree, and none is lost.
  void check() const {
    allocator.check();
    const int64_t size = allocator.page_size();
    std::set<int32_t> held;
    for (const auto& [id, text] : texts) {
      ASSERT_EQ(allocator.tokens(id), text.second);
      ASSERT_EQ(allocator.length(id), static_cast<int64_t>(text.second.size()));
      for (size_t i = 0; i < text.second.size(); ++i) {
        const auto& there = held_[allocator.pages(id)[i / size] * size + i % size];
        ASSERT_EQ(there.first, text.first);
        ASSERT_EQ(there.second,
                  Tokens(text.second.begin(), text.second.begin() + static_cast<int64_t>(i) + 1));
      }
      held.insert(allocator.pages(id).begin(), allocator.pages(id).end());
      const auto& pages = allocator.pages(id);
      bool run = !pages.empty();
      for (size_t i = 1; i < pages.size(); ++i) run &= pages[i] == pages[i - 1] + 1;
      ASSERT_EQ(allocator.first_of_run(id), run ? pages[0] : -1);
    }
    ASSERT_EQ(allocator.num_free_pages(), allocator.num_pages() - static_cast<int64_t>(held.size()));
  }

  BlockAllocator allocator;
  std::map<int64_t, std::pair<uint64_t, Tokens>> texts;  // salt and tokens of open sequences
  std::set<int64_t> live_snapshots;
  int64_t copies = 0;

 private:
  std::vector<std::pair<uint64_t, Tokens>> held_;
};

// Thousands of random operations. `roomy`: no page is ever needed twice, so every committed prefix must be
// found.
void run_randomly(uint64_t seed, int64_t num_pages, int64_t page_size, bool roomy, int operations) {
  std::mt19937_64 random(seed);
  const auto below = [&](size_t n) { return static_cast<int64_t>(random() % n); };
  Model model(num_pages, page_size);
  BlockAllocator& allocator = model.allocator;
  std::vector<std::pair<uint64_t, Tokens>> seen;    // texts to begin new sequences with
  std::set<std::pair<uint64_t, Tokens>> committed;  // prefixes of full blocks
  int64_t next_snapshot = 0, found_tokens = 0, refused = 0;
  const auto pick = [&] { return std::next(model.texts.begin(), below(model.texts.size()))->first; };
  for (int step = 0; step < operations; ++step) {
    SCOPED_TRACE(step);
    const int64_t action = below(12);
    if (model.texts.empty() || (action == 0 && model.texts.size() < 8)) {
      const auto salt = static_cast<uint64_t>(below(2));
      model.texts[allocator.open(salt)] = {salt, {}};
    } else if (action == 1 && !seen.empty() && model.texts.size() < 8) {
      auto [salt, tokens] = seen[below(seen.size())];
      if (below(4) == 0) salt ^= 1;
      if (below(3) == 0 && !tokens.empty()) tokens[below(tokens.size())] ^= 1;
      tokens.resize(tokens.size() - below(tokens.size() + 1));
      const bool needs_snapshot = below(3) == 0;
      int64_t expected = 0;
      for (int64_t end = page_size; end < static_cast<int64_t>(tokens.size()); end += page_size)
        if (committed.count({salt, Tokens(tokens.begin(), tokens.begin() + end)}))
          expected = end;
        else
          break;
      const int64_t promised = allocator.match(tokens, salt, needs_snapshot);
      const int64_t id = allocator.open(tokens, salt, needs_snapshot), length = allocator.length(id);
      ASSERT_EQ(length, promised);
      ASSERT_EQ(length % page_size, 0);
      ASSERT_LE(length, expected);
      if (roomy && !needs_snapshot) {
        ASSERT_EQ(length, expected);
      }
      if (needs_snapshot && length > 0) {
        const auto snapshot = allocator.use_snapshot(id);
        ASSERT_TRUE(snapshot && model.live_snapshots.count(*snapshot));
      }
      found_tokens += length;
      model.texts[id] = {salt, Tokens(tokens.begin(), tokens.begin() + length)};
    } else if (action == 2 && model.texts.size() < 8) {
      const int64_t id = pick(), copy = allocator.fork(id);
      model.texts[copy] = model.texts[id];
      ASSERT_EQ(allocator.pages(copy), allocator.pages(id));
    } else if (action == 3) {
      const int64_t id = pick();
      seen.push_back(model.texts[id]);
      allocator.close(id);
      model.texts.erase(id);
    } else if (action == 4 && !roomy) {  // writing behind a shorter end takes a page from the index
      const int64_t id = pick(), length = below(model.texts[id].second.size() + 1);
      allocator.shrink(id, length);
      model.texts[id].second.resize(length);
    } else if (action == 5) {
      const int64_t id = pick();
      const Tokens& text = model.texts[id].second;
      if (!text.empty() && text.size() % page_size == 0) {
        allocator.commit(id);
        for (int64_t end = page_size; end <= static_cast<int64_t>(text.size()); end += page_size)
          committed.insert({model.texts[id].first, Tokens(text.begin(), text.begin() + end)});
        if (allocator.takes_snapshot(id)) {
          allocator.attach_snapshot(id, next_snapshot);
          model.live_snapshots.insert(next_snapshot++);
        } else {
          expect_error([&] { allocator.attach_snapshot(id, next_snapshot); }, {"already"});
        }
      }
    } else if (action == 6 && model.live_snapshots.size() > 3) {
      const auto dropped = allocator.drop_oldest_snapshot();
      ASSERT_TRUE(dropped && model.live_snapshots.erase(*dropped) == 1);
    } else {
      const int64_t id = pick();
      if (model.texts[id].second.size() > 90) continue;
      Tokens more;
      for (int64_t i = below(3 * page_size); i >= 0; --i) more.push_back(static_cast<int32_t>(below(2)));
      const int64_t needed = allocator.pages_needed(id, static_cast<int64_t>(more.size()));
      const int64_t free = allocator.num_free_pages();
      if (needed > free) {
        ++refused;
        expect_error([&] { allocator.extend(id, more); }, {"is full"});
      } else {
        model.extend(id, more);
        ASSERT_EQ(free - allocator.num_free_pages(), needed);
        if (below(2) == 0) {
          allocator.commit(id);
          const auto& [salt, text] = model.texts[id];
          for (int64_t end = page_size; end <= static_cast<int64_t>(text.size()); end += page_size)
            committed.insert({salt, Tokens(text.begin(), text.begin() + end)});
        }
      }
    }
    model.check();
    if (::testing::Test::HasFatalFailure()) return;
  }
  EXPECT_GT(found_tokens, 0);
  EXPECT_EQ(model.copies > 0, page_size > 1);
  EXPECT_EQ(refused > 0, !roomy);
}

TEST(BlockAllocator, AgreesWithPlainListsWhateverIsCalled) {
  const uint64_t seed = fresh_seed();
  run_randomly(seed, 24, 4, false, 6000);
  run_randomly(seed + 1, 40, 3, false, 6000);
  run_randomly(seed + 2, 20000, 4, true, 3000);
  run_randomly(seed + 3, 60, 1, false, 2000);
}

TEST(BlockAllocator, SameCallsSamePages) {
  const uint64_t seed = fresh_seed();
  std::vector<std::vector<int32_t>> all[2];
  for (auto& pages : all) {
    std::mt19937_64 random(seed);
    BlockAllocator allocator(30, 4);
    std::vector<int64_t> ids;
    for (int i = 0; i < 300; ++i) {
      const auto text = counting(static_cast<int32_t>(random() % 3), static_cast<int64_t>(random() % 40));
      const int64_t id = allocator.open(text, 0, false);
      const Tokens rest(text.begin() + allocator.length(id), text.end());
      if (allocator.pages_needed(id, static_cast<int64_t>(rest.size())) <= allocator.num_free_pages()) {
        allocator.extend(id, rest);
        allocator.commit(id);
      }
      pages.push_back(allocator.pages(id));
      ids.push_back(id);
      if (ids.size() > 3) {
        const auto at = ids.begin() + static_cast<int64_t>(random() % ids.size());
        allocator.close(*at);
        ids.erase(at);
      }
    }
  }
  EXPECT_EQ(all[0], all[1]);
}

TEST(BlockAllocator, PagesComeInOrderAndReturn) {
  BlockAllocator allocator(6);
  const int64_t a = allocator.open(), b = allocator.open();
  allocator.extend(a, counting(0, 17));
  allocator.extend(b, counting(0, 16));
  EXPECT_EQ(allocator.pages(a), (Tokens{0, 1}));
  EXPECT_EQ(allocator.pages(b), (Tokens{2}));
  EXPECT_EQ(allocator.pages_needed(a, 15), 0);
  EXPECT_EQ(allocator.pages_needed(a, 16), 1);
  EXPECT_EQ(allocator.first_of_run(a), 0);
  allocator.extend(a, counting(0, 15));
  allocator.extend(a, counting(0, 1));
  EXPECT_EQ(allocator.pages(a), (Tokens{0, 1, 3}));
  EXPECT_EQ(allocator.first_of_run(a), -1);
  allocator.close(a);
  EXPECT_EQ(allocator.num_free_pages(), 5);
  const int64_t c = allocator.open();
  allocator.extend(c, counting(0, 50));
  EXPECT_EQ(allocator.pages(c), (Tokens{0, 1, 3, 4}));  // as the closed one had them
  expect_error([&] { allocator.length(a); }, {"sequence 0"});
}

TEST(BlockAllocator, EvictsTheLeastRecentlyUsedFromItsEnd) {
  BlockAllocator allocator(6, 2);
  const Tokens one = counting(10, 6), two = counting(20, 4);
  for (const Tokens& text : {one, two}) {
    const int64_t id = allocator.open();
    allocator.extend(id, text);
    allocator.commit(id);
    allocator.close(id);
  }
  EXPECT_EQ(allocator.num_reusable_pages(), 5);
  allocator.close(allocator.open(counting(10, 7), 0, false));  // the first text is the latest used now
  const int64_t other = allocator.open();
  allocator.extend(other, counting(50, 4));  // the blank page, then the end of the second text
  EXPECT_EQ(allocator.match(counting(20, 5), 0, false), 2);
  EXPECT_EQ(allocator.match(counting(10, 7), 0, false), 6);
  allocator.extend(other, counting(50, 4));
  EXPECT_EQ(allocator.match(counting(20, 5), 0, false), 0);
  EXPECT_EQ(allocator.match(counting(10, 7), 0, false), 4);
  EXPECT_EQ(allocator.match(counting(10, 7), 1, false), 0);  // another salt
  EXPECT_EQ(allocator.match(counting(10, 4), 0, false), 2);  // the last token is left to compute
  allocator.check();
}

TEST(BlockAllocator, UncommittedPagesAreNobodyElses) {
  BlockAllocator allocator(8, 4);
  const int64_t a = allocator.open();
  allocator.extend(a, counting(0, 9));
  EXPECT_EQ(allocator.match(counting(0, 9), 0, false), 0);
  allocator.commit(a);
  EXPECT_EQ(allocator.match(counting(0, 9), 0, false), 8);
  EXPECT_EQ(allocator.match(counting(0, 9), 0, true), 0);
}

TEST(BlockAllocator, ForksCopyTheirLastPageWhenTheyWrite) {
  BlockAllocator allocator(5, 4);
  const int64_t a = allocator.open();
  allocator.extend(a, counting(0, 6));
  const int64_t b = allocator.fork(a), c = allocator.fork(a);
  EXPECT_EQ(allocator.num_free_pages(), 3);
  const std::vector<int64_t> all = {a, b, c}, one_each = {1, 1, 1};
  EXPECT_EQ(allocator.pages_needed(all, one_each), 2);  // the last of the three keeps the page
  EXPECT_EQ(allocator.extend(a, counting(7, 1)), (PageCopy{1, 2}));
  EXPECT_EQ(allocator.extend(b, counting(8, 1)), (PageCopy{1, 3}));
  EXPECT_FALSE(allocator.extend(c, counting(9, 1)));
  EXPECT_EQ(allocator.pages(c), (Tokens{0, 1}));
  EXPECT_EQ(allocator.reference_count(0), 3);
  allocator.check();
}

TEST(BlockAllocator, RefusesWithoutChange) {
  BlockAllocator allocator(5, 16);
  const int64_t a = allocator.open();
  expect_error([&] { allocator.extend(a, counting(0, 100)); },
               {"80 tokens is full", "7 pages", "5 are free"});
  EXPECT_EQ(allocator.length(a), 0);
  EXPECT_EQ(allocator.num_free_pages(), 5);
  expect_error([&] { allocator.pages_needed(a, -1); }, {"-1"});
  expect_error([&] { allocator.shrink(a, 1); }, {"cannot return to 1"});
  expect_error([&] { allocator.attach_snapshot(a, 0); }, {"commit it first"});
  expect_error([&] { BlockAllocator none(0); }, {"0 pages"});
  expect_error([&] { BlockAllocator none(INT32_MAX / 16 + 1); }, {"are possible"});
  expect_error([&] { BlockAllocator none(4, 0); }, {"0 tokens"});
}

}  // namespace
}  // namespace spot

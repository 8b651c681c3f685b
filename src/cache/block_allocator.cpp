#include "cache/block_allocator.h"

#include <algorithm>

#include "core/error.h"

namespace spot {
namespace {

// The finaliser of splitmix64: every bit of the input reaches every bit of the output.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

BlockAllocator::BlockAllocator(int64_t num_pages, int64_t page_size) : page_size_(page_size) {
  if (page_size < 1) fail("a cache with pages of {} tokens was asked for; a page has at least 1", page_size);
  if (num_pages < 1 || num_pages > INT32_MAX / page_size)
    fail("a cache of {} pages was asked for; 1 to {} are possible", num_pages, INT32_MAX / page_size);
  pages_.resize(static_cast<size_t>(num_pages));
  for (int64_t page = 0; page < num_pages; ++page) blank_.push_back(static_cast<int32_t>(page));
}

const BlockAllocator::Sequence& BlockAllocator::find(int64_t sequence) const {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) fail("sequence {} is not open in the cache", sequence);
  return found->second;
}

// Entries of the index.

uint64_t BlockAllocator::block_hash(int64_t parent, uint64_t salt, std::span<const int32_t> block) const {
  uint64_t hash = parent == kNone ? mix(salt) : entries_[parent].hash;
  for (const int32_t token : block) hash = mix(hash ^ static_cast<uint32_t>(token));
  return hash;
}

int64_t BlockAllocator::find_entry(int64_t parent, uint64_t salt, uint64_t hash,
                                   std::span<const int32_t> block) const {
  const auto [first, last] = by_hash_.equal_range(hash);
  for (auto at = first; at != last; ++at) {
    const Entry& entry = entries_[at->second];
    if (entry.parent == parent && (parent != kNone || entry.salt == salt) &&
        std::equal(block.begin(), block.end(), entry.tokens.begin(), entry.tokens.end()))
      return at->second;
  }
  return kNone;
}

int64_t BlockAllocator::add_entry(int64_t parent, uint64_t salt, std::span<const int32_t> block) {
  int64_t id;
  if (unused_entries_.empty()) {
    id = static_cast<int64_t>(entries_.size());
    entries_.emplace_back();
  } else {
    id = unused_entries_.back();
    unused_entries_.pop_back();
  }
  Entry& entry = entries_[id];
  entry = {.parent = parent, .salt = salt, .tokens = {block.begin(), block.end()}};
  entry.hash = block_hash(parent, salt, block);
  by_hash_.emplace(entry.hash, id);
  if (parent != kNone) ++entries_[parent].children;
  return id;
}

// Removes an entry that serves nobody, and its ancestors that then serve nobody either.
void BlockAllocator::prune(int64_t id) {
  while (id != kNone) {
    Entry& entry = entries_[id];
    if (entry.page >= 0 || entry.children > 0 || entry.holders > 0) return;
    const auto [first, last] = by_hash_.equal_range(entry.hash);
    by_hash_.erase(std::find_if(first, last, [&](const auto& item) { return item.second == id; }));
    const int64_t parent = entry.parent;
    entry = {};
    unused_entries_.push_back(id);
    if (parent != kNone) --entries_[parent].children;
    id = parent;
  }
}

void BlockAllocator::push_entry(Sequence& s, int64_t entry) {
  ++entries_[entry].holders;
  s.entries.push_back(entry);
}

// Keeps the first `count`.
void BlockAllocator::pop_entries(Sequence& s, size_t count) {
  while (s.entries.size() > count) {
    const int64_t entry = s.entries.back();
    s.entries.pop_back();
    --entries_[entry].holders;
    prune(entry);
  }
}

void BlockAllocator::take_from_index(int32_t page) {
  const int64_t id = pages_[page].entry;
  Entry& entry = entries_[id];
  pages_[page].entry = kNone;
  entry.page = -1;
  if (entry.snapshot != kNone) {
    const int64_t snapshot = entry.snapshot;
    snapshots_.erase(entry.snapshot_age);
    entry.snapshot = kNone;
    if (dropped_) dropped_(snapshot);
  }
  prune(id);
}

std::vector<int64_t> BlockAllocator::matching_entries(std::span<const int32_t> tokens, uint64_t salt,
                                                      bool needs_snapshot) const {
  std::vector<int64_t> found;
  size_t usable = 0;
  int64_t parent = kNone;
  const size_t blocks = tokens.empty() ? 0 : (tokens.size() - 1) / page_size_;
  for (size_t i = 0; i < blocks; ++i) {
    const auto block = tokens.subspan(i * page_size_, page_size_);
    parent = find_entry(parent, salt, block_hash(parent, salt, block), block);
    if (parent == kNone || entries_[parent].page < 0) break;
    found.push_back(parent);
    if (!needs_snapshot || entries_[parent].snapshot != kNone) usable = found.size();
  }
  found.resize(usable);
  return found;
}

// Pages.

int32_t BlockAllocator::take_page() {
  int32_t page;
  if (!blank_.empty()) {
    page = blank_.front();
    blank_.pop_front();
  } else {
    page = reusable_.front();
    reusable_.pop_front();
    take_from_index(page);
  }
  pages_[page].references = 1;
  return page;
}

void BlockAllocator::hold(int32_t page) {
  Page& p = pages_[page];
  if (p.references++ == 0) reusable_.erase(p.age);  // only indexed pages are found while nobody holds them
}

void BlockAllocator::release(int32_t page) {
  Page& p = pages_[page];
  if (--p.references > 0) return;
  if (p.entry == kNone)
    blank_.push_front(page);
  else
    p.age = reusable_.insert(reusable_.end(), page);
}

void BlockAllocator::push_page(Sequence& s, int32_t page) {
  if (s.run == s.pages.size() && (s.pages.empty() || page == s.pages.back() + 1)) ++s.run;
  s.pages.push_back(page);
}

// Sequences.

int64_t BlockAllocator::open(uint64_t salt) {
  sequences_[next_sequence_].salt = salt;
  return next_sequence_++;
}

int64_t BlockAllocator::open(std::span<const int32_t> tokens, uint64_t salt, bool needs_snapshot) {
  const std::vector<int64_t> found = matching_entries(tokens, salt, needs_snapshot);
  const int64_t id = open(salt);
  Sequence& s = sequences_[id];
  for (const int64_t entry : found) {
    hold(entries_[entry].page);
    push_page(s, entries_[entry].page);
    push_entry(s, entry);
  }
  s.tokens.assign(tokens.begin(), tokens.begin() + static_cast<int64_t>(found.size()) * page_size_);
  return id;
}

int64_t BlockAllocator::match(std::span<const int32_t> tokens, uint64_t salt, bool needs_snapshot) const {
  return static_cast<int64_t>(matching_entries(tokens, salt, needs_snapshot).size()) * page_size_;
}

int64_t BlockAllocator::fork(int64_t sequence) {
  const Sequence& source = find(sequence);
  const int64_t id = next_sequence_++;
  sequences_[id] = source;
  for (const int32_t page : source.pages) hold(page);
  for (const int64_t entry : source.entries) ++entries_[entry].holders;
  return id;
}

void BlockAllocator::close(int64_t sequence) {
  Sequence& s = find(sequence);
  for (; !s.pages.empty(); s.pages.pop_back()) release(s.pages.back());
  pop_entries(s, 0);
  sequences_.erase(sequence);
}

bool BlockAllocator::writes_into_shared_page(const Sequence& s) const {
  return s.length() % page_size_ != 0 && pages_[s.pages.back()].references > 1;
}

std::optional<PageCopy> BlockAllocator::extend(int64_t sequence, std::span<const int32_t> tokens) {
  Sequence& s = find(sequence);
  const auto count = static_cast<int64_t>(tokens.size());
  if (count == 0) return {};
  const int64_t needed = pages_needed(sequence, count);
  if (needed > num_free_pages()) {
    fail(
        "the KV cache of {} tokens is full: {} more tokens need {} pages of {} tokens, {} are free; make the cache "
        "larger or the requests shorter or fewer",
        num_pages() * page_size_, count, needed, page_size_, num_free_pages());
  }
  std::optional<PageCopy> copy;
  if (writes_into_shared_page(s)) {
    copy = PageCopy{s.pages.back(), take_page()};
    release(s.pages.back());
    s.pages.pop_back();
    s.run = std::min(s.run, s.pages.size());
    push_page(s, copy->to);
  } else if (s.length() % page_size_ != 0 && pages_[s.pages.back()].entry != kNone) {
    take_from_index(s.pages.back());  // after shrink(): its text is about to change
  }
  s.tokens.insert(s.tokens.end(), tokens.begin(), tokens.end());
  while (static_cast<int64_t>(s.pages.size()) < pages_for(s.length())) push_page(s, take_page());
  return copy;
}

void BlockAllocator::shrink(int64_t sequence, int64_t length) {
  Sequence& s = find(sequence);
  if (length < 0 || length > s.length())
    fail("sequence {} has {} tokens and cannot return to {}", sequence, s.length(), length);
  s.tokens.resize(static_cast<size_t>(length));
  for (; static_cast<int64_t>(s.pages.size()) > pages_for(length); s.pages.pop_back())
    release(s.pages.back());
  s.run = std::min(s.run, s.pages.size());
  pop_entries(s, std::min(s.entries.size(), static_cast<size_t>(length / page_size_)));
}

void BlockAllocator::commit(int64_t sequence) {
  Sequence& s = find(sequence);
  const auto blocks = static_cast<size_t>(s.length() / page_size_);
  for (size_t i = s.entries.size(); i < blocks; ++i) {
    const std::span<const int32_t> block(s.tokens.data() + i * page_size_, static_cast<size_t>(page_size_));
    const int64_t parent = s.entries.empty() ? kNone : s.entries.back();
    int64_t entry = find_entry(parent, s.salt, block_hash(parent, s.salt, block), block);
    if (entry == kNone) entry = add_entry(parent, s.salt, block);
    if (entries_[entry].page < 0) {
      entries_[entry].page = s.pages[i];
      pages_[s.pages[i]].entry = entry;
    }
    push_entry(s, entry);
  }
}

int64_t BlockAllocator::pages_needed(int64_t sequence, int64_t count) const {
  return pages_needed(std::span(&sequence, 1), std::span(&count, 1));
}

int64_t BlockAllocator::pages_needed(std::span<const int64_t> sequences,
                                     std::span<const int64_t> counts) const {
  int64_t needed = 0;
  std::map<int32_t, int64_t> left;  // references of shared last pages, as copies take them away
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& s = find(sequences[i]);
    if (counts[i] < 0) fail("sequence {} cannot be extended by {} tokens", sequences[i], counts[i]);
    if (counts[i] == 0) continue;
    needed += pages_for(s.length() + counts[i]) - static_cast<int64_t>(s.pages.size());
    if (!writes_into_shared_page(s)) continue;
    int64_t& references = left.try_emplace(s.pages.back(), pages_[s.pages.back()].references).first->second;
    if (references > 1) ++needed, --references;
  }
  return needed;
}

int64_t BlockAllocator::first_of_run(int64_t sequence) const {
  const Sequence& s = find(sequence);
  return !s.pages.empty() && s.run == s.pages.size() ? s.pages[0] : -1;
}

// Snapshots.

bool BlockAllocator::takes_snapshot(int64_t sequence) const {
  const Sequence& s = find(sequence);
  if (s.length() == 0 || s.length() % page_size_ != 0 ||
      static_cast<int64_t>(s.entries.size()) != s.length() / page_size_) {
    fail("sequence {} of {} tokens takes no snapshot here: commit it first, at a multiple of {} tokens",
         sequence, s.length(), page_size_);
  }
  const Entry& entry = entries_[s.entries.back()];
  return entry.snapshot == kNone && entry.page >= 0;
}

void BlockAllocator::attach_snapshot(int64_t sequence, int64_t snapshot) {
  if (!takes_snapshot(sequence)) fail("sequence {} has a snapshot already", sequence);
  const int64_t id = find(sequence).entries.back();
  entries_[id].snapshot = snapshot;
  entries_[id].snapshot_age = snapshots_.insert(snapshots_.end(), id);
}

std::optional<int64_t> BlockAllocator::use_snapshot(int64_t sequence) {
  const Sequence& s = find(sequence);
  if (s.entries.empty() || entries_[s.entries.back()].snapshot == kNone) return {};
  Entry& entry = entries_[s.entries.back()];
  snapshots_.splice(snapshots_.end(), snapshots_, entry.snapshot_age);
  return entry.snapshot;
}

std::optional<int64_t> BlockAllocator::drop_oldest_snapshot() {
  if (snapshots_.empty()) return {};
  Entry& entry = entries_[snapshots_.front()];
  snapshots_.pop_front();
  const int64_t snapshot = entry.snapshot;
  entry.snapshot = kNone;
  return snapshot;
}

void BlockAllocator::check() const {
  const auto require = [](bool holds, const char* what) {
    if (!holds) fail("block allocator: {}", what);
  };
  std::vector<int64_t> references(pages_.size(), 0), holders(entries_.size(), 0),
      children(entries_.size(), 0);
  for (const auto& [id, s] : sequences_) {
    require(static_cast<int64_t>(s.pages.size()) == pages_for(s.length()),
            "a sequence has too many or too few pages");
    require(static_cast<int64_t>(s.entries.size()) <= s.length() / page_size_,
            "a block without tokens is committed");
    for (const int32_t page : s.pages) ++references[page];
    for (size_t i = 0; i < s.entries.size(); ++i) {
      const Entry& entry = entries_[s.entries[i]];
      ++holders[s.entries[i]];
      require(entry.parent == (i ? s.entries[i - 1] : kNone) && (i || entry.salt == s.salt),
              "a chain is broken");
      require(std::equal(entry.tokens.begin(), entry.tokens.end(), s.tokens.begin() + i * page_size_),
              "a sequence's entry has other tokens");
    }
  }
  std::vector<bool> listed(pages_.size(), false);
  for (const int32_t page : blank_) {
    require(!listed[page] && pages_[page].entry == kNone, "a blank page is listed twice or indexed");
    listed[page] = true;
  }
  for (const int32_t page : reusable_) {
    require(!listed[page] && pages_[page].entry != kNone, "a reusable page is listed twice or not indexed");
    listed[page] = true;
  }
  for (size_t page = 0; page < pages_.size(); ++page) {
    require(pages_[page].references == references[page], "a page's references are miscounted");
    require(listed[page] == (references[page] == 0), "a page is lost, or free while it is held");
    if (pages_[page].entry != kNone)
      require(entries_[pages_[page].entry].page == static_cast<int32_t>(page),
              "a page and its entry disagree");
  }
  int64_t snapshots = 0;
  std::vector<bool> unused(entries_.size(), false);
  for (const int64_t id : unused_entries_) unused[id] = true;
  for (size_t id = 0; id < entries_.size(); ++id)
    if (!unused[id] && entries_[id].parent != kNone) ++children[entries_[id].parent];
  for (size_t id = 0; id < entries_.size(); ++id) {
    const Entry& entry = entries_[id];
    if (unused[id]) continue;
    require(entry.children == children[id] && entry.holders == holders[id], "an entry is miscounted");
    require(entry.page >= 0 || entry.children > 0 || entry.holders > 0, "an entry serves nobody");
    require(entry.page < 0 || pages_[entry.page].entry == static_cast<int64_t>(id),
            "an entry's page has another");
    require(entry.snapshot == kNone || entry.page >= 0, "a snapshot outlived its page");
    snapshots += entry.snapshot != kNone;
    require(find_entry(entry.parent, entry.salt, entry.hash, entry.tokens) == static_cast<int64_t>(id),
            "an entry is not found by its tokens");
  }
  require(by_hash_.size() == entries_.size() - unused_entries_.size(), "the index holds what is gone");
  require(static_cast<int64_t>(snapshots_.size()) == snapshots, "snapshots are miscounted");
}

}  // namespace spot

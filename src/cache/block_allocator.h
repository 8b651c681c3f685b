// Which page holds which tokens: sequences as lists of pages, pages shared by reference count, and an index
// of prefixes whose pages can be used again. Pages are ids; what they hold lies in PagePools.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

namespace spot {

// One page to be copied to another in every pool, before anything is written to `to`.
struct PageCopy {
  int32_t from = 0, to = 0;
  bool operator==(const PageCopy&) const = default;
};

// A prefix index over full blocks: block i of a text is known by its tokens and by the entry of block i - 1
// (the first one by a salt), compared token by token, so that a page never serves another text whatever
// hashes do. Entries are found by a hash chained over the blocks.
//
// A page is free when no sequence holds it. Free pages without an entry are handed out first, the latest
// freed first (so that a sequence after a closed one gets the same ascending run); then pages with one, the
// least recently used first, blocks of one text from its end. All choices depend on the calls alone.
class BlockAllocator {
 public:
  // page_size: tokens a page. Throws Error unless 1 <= num_pages, 1 <= page_size and their product fits 31
  // bits.
  explicit BlockAllocator(int64_t num_pages, int64_t page_size = 16);

  // A new sequence; its id, never used again. `salt` keeps texts apart that lead to other keys and values
  // (another adapter, another prefill rule): only sequences of one salt share pages.
  int64_t open(uint64_t salt = 0);
  // A new sequence of the longest indexed prefix of `tokens`, at most all but the last token (whose logits
  // somebody wants), or, with `needs_snapshot`, up to the last block end that has one. length() says how much
  // was found.
  int64_t open(std::span<const int32_t> tokens, uint64_t salt, bool needs_snapshot);
  // The tokens that open() would find.
  int64_t match(std::span<const int32_t> tokens, uint64_t salt, bool needs_snapshot) const;
  // A new sequence with the same tokens in the same pages.
  int64_t fork(int64_t sequence);
  void close(int64_t sequence);

  // Appends tokens. A last page that is partly filled and shared is left to the others: the copy to make is
  // returned. Throws Error when too few pages are free; then nothing has changed.
  std::optional<PageCopy> extend(int64_t sequence, std::span<const int32_t> tokens);
  // Drops the tokens from `length` on.
  void shrink(int64_t sequence, int64_t length);
  // Says that what the sequence holds has been computed: its full pages enter the index (unless another page
  // of the same text is there already).
  void commit(int64_t sequence);

  // Pages that extend() of each sequence by its count would take, one after another.
  int64_t pages_needed(std::span<const int64_t> sequences, std::span<const int64_t> counts) const;
  int64_t pages_needed(int64_t sequence, int64_t count) const;
  int64_t length(int64_t sequence) const { return find(sequence).length(); }
  const std::vector<int32_t>& pages(int64_t sequence) const { return find(sequence).pages; }
  const std::vector<int32_t>& tokens(int64_t sequence) const { return find(sequence).tokens; }
  // The first page where the sequence's pages are consecutive, so that a pool can be read as a view; else -1.
  int64_t first_of_run(int64_t sequence) const;

  // Snapshots of something that a page does not hold (recurrent states), by ids of the caller's. A snapshot
  // belongs to the entry of the sequence's last full block. Throws Error unless the sequence ends with that
  // block, and it is committed; false when the entry has a snapshot already, or lost its page.
  bool takes_snapshot(int64_t sequence) const;
  // Throws Error unless takes_snapshot().
  void attach_snapshot(int64_t sequence, int64_t snapshot);
  // The snapshot at the end of what open() found, which counts as used now.
  std::optional<int64_t> use_snapshot(int64_t sequence);
  // Takes the least recently used snapshot from its entry.
  std::optional<int64_t> drop_oldest_snapshot();
  // Called with a snapshot whose page leaves the index.
  void on_snapshot_dropped(std::function<void(int64_t)> callback) { dropped_ = std::move(callback); }

  int64_t num_pages() const { return static_cast<int64_t>(pages_.size()); }
  int64_t page_size() const { return page_size_; }
  // Pages that no sequence holds, indexed ones included: what extend() can take.
  int64_t num_free_pages() const { return static_cast<int64_t>(blank_.size() + reusable_.size()); }
  // Those among them that still serve the index.
  int64_t num_reusable_pages() const { return static_cast<int64_t>(reusable_.size()); }
  int64_t num_sequences() const { return static_cast<int64_t>(sequences_.size()); }
  int64_t reference_count(int32_t page) const { return pages_.at(static_cast<size_t>(page)).references; }
  // Throws Error at the first broken invariant: what the tests call after every operation.
  void check() const;

 private:
  static constexpr int64_t kNone = -1;
  struct Entry {  // a block of some text
    int64_t parent = kNone;
    uint64_t salt = 0;  // of first blocks
    uint64_t hash = 0;
    std::vector<int32_t> tokens;
    int32_t page = -1;     // none: kept for its children's sake
    int64_t children = 0;  // entries whose parent this is
    int64_t holders = 0;   // open sequences that have this block
    int64_t snapshot = kNone;
    std::list<int64_t>::iterator snapshot_age;
  };
  struct Page {
    int64_t references = 0;
    int64_t entry = kNone;
    std::list<int32_t>::iterator age;  // in reusable_
  };
  struct Sequence {
    uint64_t salt = 0;
    std::vector<int32_t> tokens, pages;
    std::vector<int64_t> entries;  // of the committed full blocks, in order
    size_t run = 0;                // leading pages that are consecutive
    int64_t length() const { return static_cast<int64_t>(tokens.size()); }
  };

  const Sequence& find(int64_t sequence) const;
  Sequence& find(int64_t sequence) {
    return const_cast<Sequence&>(static_cast<const BlockAllocator*>(this)->find(sequence));
  }
  int64_t pages_for(int64_t tokens) const { return (tokens + page_size_ - 1) / page_size_; }
  bool writes_into_shared_page(const Sequence& s) const;
  std::vector<int64_t> matching_entries(std::span<const int32_t> tokens, uint64_t salt,
                                        bool needs_snapshot) const;
  int64_t find_entry(int64_t parent, uint64_t salt, uint64_t hash, std::span<const int32_t> block) const;
  uint64_t block_hash(int64_t parent, uint64_t salt, std::span<const int32_t> block) const;
  int64_t add_entry(int64_t parent, uint64_t salt, std::span<const int32_t> block);
  void push_entry(Sequence& s, int64_t entry);
  void pop_entries(Sequence& s, size_t count);
  void push_page(Sequence& s, int32_t page);
  void take_from_index(int32_t page);
  void prune(int64_t entry);
  int32_t take_page();
  void hold(int32_t page);
  void release(int32_t page);

  int64_t page_size_;
  std::vector<Page> pages_;
  std::deque<int32_t> blank_;    // free, without an entry; the next at the front
  std::list<int32_t> reusable_;  // free, with an entry; least recently used at the front
  std::map<int64_t, Sequence> sequences_;
  int64_t next_sequence_ = 0;
  std::vector<Entry> entries_;
  std::vector<int64_t> unused_entries_;
  std::unordered_multimap<uint64_t, int64_t> by_hash_;
  std::list<int64_t> snapshots_;  // entries with one; least recently used at the front
  std::function<void(int64_t)> dropped_;
};

}  // namespace spot

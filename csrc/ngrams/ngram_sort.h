// A radix sort of the keys of ngram_windows.h, of any number of words.
//
// An entry of the sort has a fixed size, whatever the number of words W of a key:
//
//     W = 1    the key                                            8 bytes
//     W = 2    the key                                           16 bytes
//     W ≥ 3    a word of the key, and the row of its words       16 bytes, and 8 W bytes for the row
//
// Entries are sorted by their first word, byte by byte, least significant first. Then each group of equal first words
// is sorted by the second word, and so on: most groups are small, and the comparisons of a small group stay in the
// cache.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>

#include "ngrams/ngram_windows.h"

namespace charlm::ngrams {

// A group of at most this many entries is sorted by comparison: the counters of a radix sort would cost more.
inline constexpr size_t kSmallGroup = 128;

// Sorts by the bytes of word(entry) from `low_byte` on. A byte that all entries share is skipped. Returns the array
// with the sorted entries, which is one of the two.
template <class Entry, class Word>
Entry* radix_sort(Entry* entries, Entry* scratch, size_t size, int low_byte, Word word) {
  constexpr int kBytes = 8;
  size_t counts[kBytes][256] = {};
  for (size_t i = 0; i < size; ++i) {
    const uint64_t value = word(entries[i]);
    for (int byte = low_byte; byte < kBytes; ++byte) ++counts[byte][value >> 8 * byte & 255];
  }
  for (int byte = low_byte; byte < kBytes; ++byte) {
    size_t* place = counts[byte];
    const auto digit = [&](const Entry& entry) { return word(entry) >> 8 * byte & 255; };
    if (place[digit(entries[0])] == size) continue;
    std::exclusive_scan(place, place + 256, place, size_t{0});
    for (size_t i = 0; i < size; ++i) scratch[place[digit(entries[i])]++] = entries[i];
    std::swap(entries, scratch);
  }
  return entries;
}

// Collects the keys of windows in a buffer, and sorts them. kWords: layout.words, or 0 for any number from 3 on.
template <int kWords>
class KeySorter {
 public:
  // capacity: the largest number of keys.
  KeySorter(const Layout& layout, size_t capacity)
      : words_(layout.words),
        low_byte_(__builtin_ctzll(layout.full) / 8),
        last_low_byte_(__builtin_ctzll(layout.last) / 8),
        rows_(kWords == 0 ? new uint64_t[(capacity + 1) * words_] : nullptr),
        entries_(new Entry[capacity + 1]),
        scratch_(new Entry[capacity + 1]) {}

  static size_t bytes_per_key(const Layout& layout) { return 2 * sizeof(Entry) + (kWords == 0 ? 8 * layout.words : 0); }

  size_t size() const { return size_; }

  // Collects the windows of a part.
  template <class Id>
  void collect(const Part& part, const Sequence<Id>& sequence, const Layout& layout) {
    Entry* const entries = entries_.get();  // local copies, as in for_each_window
    uint64_t* const rows = rows_.get();
    const int64_t words = words_;
    size_t size = 0;
    // Writes the key in any case, but advances only past one of the part, which avoids mispredicted branches.
    for_each_window_near<kWords>(part, sequence, layout, [=, &size, &part](const uint64_t* key) {
      if constexpr (kWords == 0) std::copy_n(key, words, rows + size * words);
      entries[size] = entry(key, size);
      size += part.template holds<kWords>(key);
    });
    size_ = size;
  }

  void sort() {
    if (size_ == 0) return;
    const Entry* sorted = radix_sort(entries_.get(), scratch_.get(), size_, words_ == 1 ? last_low_byte_ : low_byte_,
                                     [](const Entry& entry) { return entry.word[0]; });
    if (sorted == scratch_.get()) std::swap(entries_, scratch_);
    if (words_ > 1) sort_groups(0, size_, 1);
  }

  // The key at a place of the sorted order.
  const uint64_t* operator[](size_t place) const {
    if constexpr (kWords == 0) return row(entries_[place]);
    return entries_[place].word;
  }

 private:
  struct Entry {
    uint64_t word[kWords == 0 ? 2 : kWords];  // W ≥ 3: the word that is sorted by, and the row
  };

  // Sorts each group of equal words in [begin, end), which is sorted by the word before `depth`, by word `depth` and
  // the words after it.
  void sort_groups(size_t begin, size_t end, int64_t depth) {
    for (size_t group = begin, next = begin; group < end; group = next) {
      const uint64_t shared = entries_[group].word[0];
      while (next < end && entries_[next].word[0] == shared) ++next;
      const size_t size = next - group;
      Entry* entries = entries_.get() + group;
      if (size <= kSmallGroup) {
        if (size > 1) compare_sort(entries, size, depth);
        continue;
      }
      constexpr int kPlace = kWords == 0 ? 0 : kWords - 1;  // of the next word in an entry
      if constexpr (kWords == 0) {
        for (size_t i = 0; i < size; ++i) entries[i].word[0] = row(entries[i])[depth];
      }
      Entry* scratch = scratch_.get() + group;
      const Entry* sorted = radix_sort(entries, scratch, size, depth + 1 == words_ ? last_low_byte_ : low_byte_,
                                       [](const Entry& entry) { return entry.word[kPlace]; });
      if (sorted == scratch) std::copy_n(scratch, size, entries);
      if (depth + 1 < words_) sort_groups(group, next, depth + 1);
    }
  }

  void compare_sort(Entry* entries, size_t size, int64_t depth) const {
    std::sort(entries, entries + size, [&](const Entry& a, const Entry& b) {
      if constexpr (kWords == 0) {
        return std::lexicographical_compare(row(a) + depth, row(a) + words_, row(b) + depth, row(b) + words_);
      } else {
        return a.word[kWords - 1] < b.word[kWords - 1];
      }
    });
  }

  static Entry entry(const uint64_t* key, size_t row) {
    if constexpr (kWords == 0) return {{key[0], row}};
    if constexpr (kWords == 1) return {{key[0]}};
    if constexpr (kWords == 2) return {{key[0], key[1]}};
  }

  const uint64_t* row(const Entry& entry) const { return rows_.get() + entry.word[1] * words_; }

  const int64_t words_;
  const int low_byte_, last_low_byte_;  // the lowest bytes in use, of a word and of the last word
  size_t size_ = 0;
  std::unique_ptr<uint64_t[]> rows_;
  std::unique_ptr<Entry[]> entries_, scratch_;
};

}  // namespace charlm::ngrams

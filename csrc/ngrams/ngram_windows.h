// The windows of ngrams.cpp as sorted keys: packing them, dividing the range of keys into parts that fit in a buffer,
// and collecting and sorting a part.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

namespace charlm::ngrams {

inline constexpr int kDigitBits = 16;  // of the histograms that divide the range of keys
inline constexpr uint64_t kAllOnes = ~uint64_t{0};

// ---- keys

// The packing of a window into `words` words: `per_word` ids of `bits` bits each, the first id in the highest bits, and
// 0 in the remaining bits. Ids start at 1. After the end of a window the ids are 0, which sorts a gram before the grams
// of which it is a prefix.
struct Layout {
  Layout(int64_t distinct, int64_t max_length)
      : length(max_length),
        bits(64 - __builtin_clzll(distinct)),
        per_word(64 / bits),
        words((length + per_word - 1) / per_word),
        full(kAllOnes << (64 - bits * per_word)),
        last(kAllOnes << (64 - bits * (length - (words - 1) * per_word))) {}

  uint64_t id(const uint64_t* key, int64_t place) const {
    const int64_t shift = 64 - bits * (place % per_word + 1);
    return key[place / per_word] >> shift & ((uint64_t{1} << bits) - 1);
  }

  int64_t window_length(const uint64_t* key) const {
    int64_t word = words - 1;
    while (key[word] == 0) --word;
    return word * per_word + (64 - __builtin_ctzll(key[word]) + bits - 1) / bits;
  }

  // The length of the common prefix of two keys that differ.
  int64_t shared(const uint64_t* a, const uint64_t* b) const {
    int64_t word = 0;
    while (a[word] == b[word]) ++word;
    return word * per_word + __builtin_clzll(a[word] ^ b[word]) / bits;
  }

  int64_t length, bits, per_word, words;
  uint64_t full, last;  // masks of the bits in use, of a word and of the last word
};

// The tokens as ids 1, 2, …, in the order of their values.
template <class Id>
struct Sequence {
  std::vector<Id> ids;
  size_t starts;
  Id boundary;  // 0, which is no id, if there is none
};

// Calls visit(key) for each window, from the last to the first, so that a key is the previous one shifted by one id.
// kOneWord: layout.words is 1.
template <bool kOneWord, class Id, class Visit>
void for_each_window(const Sequence<Id>& sequence, const Layout& layout, Visit visit) {
  // Local copies, so that the stores of visit() cannot alias them.
  const Id* const ids = sequence.ids.data();
  const Id boundary = sequence.boundary;
  const size_t starts = sequence.starts;
  const int64_t words = layout.words, bits = layout.bits, top = 64 - bits, bottom = 64 - bits * layout.per_word;
  const uint64_t mask = (uint64_t{1} << bits) - 1, full = layout.full, last = layout.last;
  if constexpr (kOneWord) {
    uint64_t next = 0;  // the window that starts at the next token, up to a boundary there
    for (size_t i = sequence.ids.size(); i-- > 0;) {
      const uint64_t first = uint64_t{ids[i]} << top;
      const uint64_t key = (next >> bits | first) & last;
      next = ids[i] == boundary ? first : key;
      if (i < starts) visit(&key);
    }
  } else {
    std::vector<uint64_t> key(words);
    for (size_t i = sequence.ids.size(); i-- > 0;) {
      const uint64_t first = uint64_t{ids[i]} << top;
      for (int64_t w = words - 1; w > 0; --w) {
        const uint64_t carried = key[w - 1] >> bottom & mask;
        key[w] = (key[w] >> bits | carried << top) & (w == words - 1 ? last : full);
      }
      key[0] = (key[0] >> bits | first) & full;
      if (i < starts) visit(key.data());
      if (ids[i] == boundary) {
        std::fill(key.begin(), key.end(), 0);
        key[0] = first;
      }
    }
  }
}

// ---- parts of the range of keys

// The keys whose first words are `prefix` and whose next word is in [low, high].
struct Part {
  std::vector<uint64_t> prefix;
  uint64_t low, high;
  uint64_t windows;  // number of windows with such a key

  bool holds(const uint64_t* key) const {
    for (const uint64_t word : prefix) {
      if (*key++ != word) return false;
    }
    return *key - low <= high - low;
  }
};

// Divides the range of keys into parts of at most `capacity` windows, or of one key.
template <bool kOneWord, class Id>
class Cutter {
 public:
  Cutter(const Sequence<Id>& sequence, const Layout& layout, uint64_t capacity)
      : sequence_(sequence), layout_(layout), capacity_(capacity) {}

  std::vector<Part> cut() {
    cut(Part{{}, 0, kAllOnes, sequence_.starts}, 0);
    return std::move(parts_);
  }

 private:
  // fixed: the high bits that all words of [part.low, part.high] share.
  void cut(const Part& part, int fixed) {
    if (part.windows <= capacity_) return parts_.push_back(part);
    if (fixed == 64) {
      if (static_cast<int64_t>(part.prefix.size()) + 1 == layout_.words) return parts_.push_back(part);
      Part next{part.prefix, 0, kAllOnes, part.windows};
      next.prefix.push_back(part.low);
      return cut(next, 0);
    }
    const int shift = 64 - kDigitBits - fixed;
    const std::vector<uint64_t> histogram = count_digits(part, shift);
    Part group{part.prefix, part.low, part.low, 0};  // adjacent digits whose windows fit in the buffer together
    for (uint64_t digit = 0; digit < histogram.size(); ++digit) {
      const uint64_t low = part.low + (digit << shift);
      const uint64_t high = low + ((uint64_t{1} << shift) - 1);
      if (group.windows + histogram[digit] > capacity_) {
        if (group.windows > 0) parts_.push_back(group);
        group = Part{part.prefix, low, high, 0};
      }
      if (histogram[digit] > capacity_) {
        cut(Part{part.prefix, low, high, histogram[digit]}, fixed + kDigitBits);
        group.low = high + 1;
        continue;
      }
      group.high = high;
      group.windows += histogram[digit];
    }
    if (group.windows > 0) parts_.push_back(group);
  }

  std::vector<uint64_t> count_digits(const Part& part, int shift) const {
    std::vector<uint64_t> histogram(size_t{1} << kDigitBits);
    const size_t word = part.prefix.size();
    for_each_window<kOneWord>(sequence_, layout_, [&](const uint64_t* key) {
      if (part.holds(key)) ++histogram[key[word] >> shift & (histogram.size() - 1)];
    });
    return histogram;
  }

  const Sequence<Id>& sequence_;
  const Layout& layout_;
  const uint64_t capacity_;
  std::vector<Part> parts_;
};

// ---- sorting

// Sorts by bytes, least significant first; a byte that all keys share is skipped. Returns the array with the sorted
// keys.
inline uint64_t* radix_sort(uint64_t* keys, uint64_t* scratch, size_t size) {
  constexpr int kBytes = 8;
  size_t counts[kBytes][256] = {};
  for (size_t i = 0; i < size; ++i) {
    for (int byte = 0; byte < kBytes; ++byte) ++counts[byte][keys[i] >> 8 * byte & 255];
  }
  for (int byte = 0; byte < kBytes; ++byte) {
    size_t* place = counts[byte];
    if (place[keys[0] >> 8 * byte & 255] == size) continue;
    std::exclusive_scan(place, place + 256, place, size_t{0});
    for (size_t i = 0; i < size; ++i) scratch[place[keys[i] >> 8 * byte & 255]++] = keys[i];
    std::swap(keys, scratch);
  }
  return keys;
}

// Collects and sorts the keys of one part, in a buffer that all parts share.
template <bool kOneWord, class Id>
class Sorter {
 public:
  Sorter(const Sequence<Id>& sequence, const Layout& layout, uint64_t capacity)
      : sequence_(sequence),
        layout_(layout),
        keys_(new uint64_t[capacity * layout.words + layout.words]),
        scratch_(new uint64_t[capacity]) {}

  static uint64_t bytes_per_key(const Layout& layout) { return 8 * layout.words + 8; }

  void sort(const Part& part) {
    collect(part);
    if constexpr (kOneWord) {
      sorted_ = radix_sort(keys_.get(), scratch_.get(), part.windows);
    } else {
      std::iota(scratch_.get(), scratch_.get() + part.windows, uint64_t{0});
      std::sort(scratch_.get(), scratch_.get() + part.windows, [this](uint64_t a, uint64_t b) {
        const uint64_t *x = row(a), *y = row(b);
        return std::lexicographical_compare(x, x + layout_.words, y, y + layout_.words);
      });
    }
  }

  const uint64_t* operator[](size_t place) const {
    if constexpr (kOneWord) return sorted_ + place;
    return row(scratch_[place]);
  }

 private:
  // For keys of one word: writes every key, but advances only past those of the part, which avoids mispredicted
  // branches.
  void collect(const Part& part) {
    uint64_t* out = keys_.get();
    if constexpr (kOneWord) {
      const uint64_t low = part.low, span = part.high - part.low;
      for_each_window<true>(sequence_, layout_, [&out, low, span](const uint64_t* key) {
        *out = *key;
        out += *key - low <= span;
      });
    } else {
      for_each_window<false>(sequence_, layout_, [&](const uint64_t* key) {
        if (part.holds(key)) out = std::copy_n(key, layout_.words, out);
      });
    }
  }

  const uint64_t* row(uint64_t place) const { return keys_.get() + place * layout_.words; }

  const Sequence<Id>& sequence_;
  const Layout& layout_;
  std::unique_ptr<uint64_t[]> keys_;  // capacity + 1: a key that is not kept may be written to the last one
  std::unique_ptr<uint64_t[]> scratch_;
  uint64_t* sorted_ = nullptr;
};

}  // namespace charlm::ngrams

// The windows of ngrams.h as sorted keys: how they are packed, how the range of keys is cut into parts that fit a
// buffer, and how a part is collected and sorted.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

namespace charlm::ngrams {

inline constexpr int kDigitBits = 16;  // of the histograms that cut the range of keys
inline constexpr uint64_t kAllOnes = ~uint64_t{0};

// ---- keys

// How a window becomes `words` words: `per_word` ids of `bits` bits each, the first one highest, the rest of the word
// 0. Ids begin at 1: where the window has ended stands 0, which sorts a gram before those that it is a prefix of.
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
  uint64_t full, last;  // the bits in use of a word, and of the last one
};

// The tokens as ids 1, 2, …, in the order of their values.
template <class Id>
struct Sequence {
  std::vector<Id> ids;
  size_t starts;
  Id boundary;  // 0, which is no id, where there is none
};

// Calls visit(key) for each window, from the last one to the first: so each is the one behind it, shifted by an id.
// kOneWord: layout.words is 1.
template <bool kOneWord, class Id, class Visit>
void for_each_window(const Sequence<Id>& sequence, const Layout& layout, Visit visit) {
  // Copies, so that no write of visit's can be taken for one to them.
  const Id* const ids = sequence.ids.data();
  const Id boundary = sequence.boundary;
  const size_t starts = sequence.starts;
  const int64_t words = layout.words, bits = layout.bits, top = 64 - bits, bottom = 64 - bits * layout.per_word;
  const uint64_t mask = (uint64_t{1} << bits) - 1, full = layout.full, last = layout.last;
  if constexpr (kOneWord) {
    uint64_t behind = 0;  // the window behind, as far as this one reaches into it
    for (size_t i = sequence.ids.size(); i-- > 0;) {
      const uint64_t first = uint64_t{ids[i]} << top;
      const uint64_t key = (behind >> bits | first) & last;
      behind = ids[i] == boundary ? first : key;
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

// The keys whose first words are `prefix` and whose next one lies in [low, high].
struct Part {
  std::vector<uint64_t> prefix;
  uint64_t low, high;
  uint64_t windows;  // how many have such a key

  bool holds(const uint64_t* key) const {
    for (const uint64_t word : prefix) {
      if (*key++ != word) return false;
    }
    return *key - low <= high - low;
  }
};

// Cuts keys into parts of at most `capacity` windows, or of one key.
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
    Part group{part.prefix, part.low, part.low, 0};  // neighbours that fit together
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

// Least significant digit first, by bytes; a byte that all keys share is skipped. Returns where the sorted keys are.
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

// Collects and sorts the keys of one part, in a buffer that is kept from part to part.
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
  // Writes every key and keeps those of the part: a branch would be mispredicted as often as it is taken.
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
  std::unique_ptr<uint64_t[]> keys_;  // one more than the capacity, where a key that is not kept is written
  std::unique_ptr<uint64_t[]> scratch_;
  uint64_t* sorted_ = nullptr;
};

}  // namespace charlm::ngrams

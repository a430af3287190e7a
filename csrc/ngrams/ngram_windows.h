// The windows of ngrams.cpp as keys: packing them, and dividing the range of keys into parts that fit in a buffer.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
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

// The tokens as ids 1, 2, …, in the order of their values. Windows start at the first `starts` of them.
template <class Id>
struct Sequence {
  const Id* ids;
  size_t size, starts;
  Id boundary;  // 0, which is no id, if there is none
};

// Calls visit(key) for each window, from the last to the first, so that a key is the previous one shifted by one id.
// kWords: layout.words, or 0 for any number of words.
template <int kWords, class Id, class Visit>
void for_each_window(const Sequence<Id>& sequence, const Layout& layout, Visit visit) {
  // Local copies, so that the stores of visit() cannot alias them.
  const Id* const ids = sequence.ids;
  const Id boundary = sequence.boundary;
  const size_t starts = sequence.starts;
  const int64_t words = kWords ? kWords : layout.words;
  const int64_t bits = layout.bits, top = 64 - bits, bottom = 64 - bits * layout.per_word;
  const uint64_t mask = (uint64_t{1} << bits) - 1, full = layout.full, last = layout.last;
  std::conditional_t<kWords == 0, std::vector<uint64_t>, std::array<uint64_t, kWords>> key{};
  if constexpr (kWords == 0) key.resize(words);
  for (size_t i = sequence.size; i-- > 0;) {
    const uint64_t first = uint64_t{ids[i]} << top;
    for (int64_t w = words - 1; w > 0; --w) {
      const uint64_t carried = key[w - 1] >> bottom & mask;
      key[w] = (key[w] >> bits | carried << top) & (w == words - 1 ? last : full);
    }
    key[0] = (key[0] >> bits | first) & (words == 1 ? last : full);
    if (i < starts) visit(key.data());
    const bool ends = ids[i] == boundary;  // the window before goes on only to this token
    key[0] = ends ? first : key[0];
    for (int64_t w = 1; w < words; ++w) key[w] = ends ? 0 : key[w];
  }
}

// Packs the window that starts at token i.
template <class Id>
void pack(const Sequence<Id>& sequence, const Layout& layout, size_t i, uint64_t* key) {
  const int64_t bits = layout.bits, per_word = layout.per_word, words = layout.words;
  int64_t length = std::min<int64_t>(layout.length, sequence.size - i);
  const Id* ids = sequence.ids + i;
  if (sequence.boundary != 0) {
    length = std::min<int64_t>(length, std::find(ids + 1, ids + length, sequence.boundary) - ids + 1);
  }
  for (int64_t w = 0; w < words; ++w) {
    const int64_t size = std::clamp<int64_t>(length - w * per_word, 0, per_word);
    uint64_t word = 0;
    for (int64_t place = 0; place < size; ++place) word = word << bits | *ids++;
    key[w] = size == 0 ? 0 : word << (64 - bits * size);
  }
}

// ---- parts of the range of keys

// The keys from low to high.
struct Part {
  std::vector<uint64_t> low, high;
  uint64_t windows;  // number of windows with such a key

  template <int kWords>
  bool holds(const uint64_t* key) const {
    const uint64_t *const from = low.data(), *const to = high.data();
    bool above = true, below = true;  // no branches, which would be mispredicted
    for (int64_t w = (kWords ? kWords : low.size()) - 1; w >= 0; --w) {
      above = (key[w] > from[w]) | ((key[w] == from[w]) & above);
      below = (key[w] < to[w]) | ((key[w] == to[w]) & below);
    }
    return above & below;
  }
};

// The part of all keys.
inline Part all_keys(const Layout& layout, uint64_t windows) {
  Part part{std::vector<uint64_t>(layout.words), std::vector<uint64_t>(layout.words, layout.full), windows};
  part.high.back() = layout.last;
  return part;
}

// Calls visit(key) for each window of a part, and for some others. Most of the others are recognized, many at a time,
// without packing them: by the ids that all keys of the part share, and the range of the id after these.
template <int kWords, class Id, class Visit>
void for_each_window_near(const Part& part, const Sequence<Id>& sequence, const Layout& layout, Visit visit) {
  if (part.windows == sequence.starts) return for_each_window<kWords>(sequence, layout, visit);
  constexpr size_t kBlock = 64;
  int64_t shared = part.low == part.high ? layout.length - 1 : layout.shared(part.low.data(), part.high.data());
  std::vector<Id> prefix(shared + 1);
  for (int64_t place = 0; place <= shared; ++place) {
    prefix[place] = static_cast<Id>(layout.id(part.low.data(), place));
    if (place > 0 && prefix[place] == sequence.boundary)
      shared = place;  // the ids after it are not those of the tokens
  }
  const Id low = prefix[shared], span = static_cast<Id>(layout.id(part.high.data(), shared)) - low;
  std::conditional_t<kWords == 0, std::vector<uint64_t>, std::array<uint64_t, kWords>> key{};
  if constexpr (kWords == 0) key.resize(layout.words);
  size_t begin = 0;
  const auto visit_at = [&](size_t i) {
    pack(sequence, layout, i, key.data());
    visit(key.data());
  };
  for (; begin + kBlock <= sequence.starts && begin + kBlock + shared <= sequence.size; begin += kBlock) {
    const Id* const ids = sequence.ids + begin;
    uint8_t near[kBlock];
    for (size_t j = 0; j < kBlock; ++j) near[j] = static_cast<Id>(ids[j + shared] - low) <= span;
    for (int64_t place = 0; place < shared; ++place) {
      for (size_t j = 0; j < kBlock; ++j) near[j] &= ids[j + place] == prefix[place];
    }
    for (size_t at = 0; at < kBlock; at += 8) {
      uint64_t eight;
      std::memcpy(&eight, near + at, 8);
      for (; eight != 0; eight &= eight - 1) visit_at(begin + at + __builtin_ctzll(eight) / 8);
    }
  }
  for (; begin < sequence.starts; ++begin) visit_at(begin);
}

// Divides the range of keys into parts of at most `capacity` windows, or of one key.
template <int kWords, class Id>
class Cutter {
 public:
  Cutter(const Sequence<Id>& sequence, const Layout& layout, uint64_t capacity)
      : sequence_(sequence), layout_(layout), capacity_(capacity) {}

  std::vector<Part> cut() {
    cut(all_keys(layout_, sequence_.starts), 0);
    return std::move(parts_);
  }

 private:
  // fixed: the number of high bits that part.low and part.high share, and 0s in the other bits of part.low.
  void cut(const Part& part, int64_t fixed) {
    if (part.windows <= capacity_ || part.low == part.high) return add(part);
    const int64_t word = fixed / 64, shift = 64 - kDigitBits - fixed % 64;
    const std::vector<uint64_t> histogram = count_digits(part, word, shift);
    for (uint64_t digit = 0; digit < histogram.size(); ++digit) {
      if (histogram[digit] == 0) continue;
      Part with_digit{part.low, part.high, histogram[digit]};
      with_digit.low[word] |= digit << shift;
      with_digit.high[word] &= with_digit.low[word] | ((uint64_t{1} << shift) - 1);
      cut(with_digit, fixed + kDigitBits);
    }
  }

  // Adds a part, or extends the last one by it if their windows fit in the buffer together.
  void add(const Part& part) {
    if (!parts_.empty() && parts_.back().windows + part.windows <= capacity_) {
      parts_.back().high = part.high;
      parts_.back().windows += part.windows;
    } else {
      parts_.push_back(part);
    }
  }

  std::vector<uint64_t> count_digits(const Part& part, int64_t word, int64_t shift) const {
    std::vector<uint64_t> histogram(size_t{1} << kDigitBits);
    for_each_window_near<kWords>(part, sequence_, layout_, [&](const uint64_t* key) {
      if (part.template holds<kWords>(key)) ++histogram[key[word] >> shift & (histogram.size() - 1)];
    });
    return histogram;
  }

  const Sequence<Id>& sequence_;
  const Layout& layout_;
  const uint64_t capacity_;
  std::vector<Part> parts_;
};

}  // namespace charlm::ngrams

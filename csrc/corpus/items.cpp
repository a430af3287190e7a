// The items of a corpus that may be larger than memory: the shuffle of Python's random module, the search for equal
// items, and their copies in a new order. The caller is charlm/lm/prepare.py, which checks the arguments.
//
// An item is a run of tokens other than 0, and the token 0 that ends it. Memory is read at random places; it is
// prefetched for kBatch items at once.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace charlm {
namespace {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

constexpr size_t kBatch = 64;

// ---- the shuffle of Python

// Matsumoto and Nishimura (1998), "Mersenne Twister", as in CPython's _randommodule.c.
class MersenneTwister {
 public:
  // state: random.Random(seed).getstate()[1], 624 words and the index of the next.
  explicit MersenneTwister(const std::vector<uint32_t>& state) {
    index_ = state.at(kWords);
    std::copy_n(state.begin(), kWords, words_.begin());
  }

  uint32_t next() {
    if (index_ >= kWords) twist();
    uint32_t y = words_[index_++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680U;
    y ^= (y << 15) & 0xefc60000U;
    return y ^ (y >> 18);
  }

  // Random.getrandbits for 1 ≤ bits ≤ 64: of two words the first is the lower.
  uint64_t bits(int bits) {
    if (bits <= 32) return next() >> (32 - bits);
    const uint64_t low = next();
    return low | static_cast<uint64_t>(next() >> (64 - bits)) << 32;
  }

  // Random._randbelow: uniform in [0, n), by rejection.
  uint64_t below(uint64_t n) {
    const int width = 64 - __builtin_clzll(n);
    uint64_t drawn;
    do drawn = bits(width);
    while (drawn >= n);
    return drawn;
  }

 private:
  static constexpr size_t kWords = 624, kMiddle = 397;

  void twist() {
    for (size_t i = 0; i < kWords; ++i) {
      const uint32_t y = (words_[i] & 0x80000000U) | (words_[(i + 1) % kWords] & 0x7fffffffU);
      words_[i] = words_[(i + kMiddle) % kWords] ^ (y >> 1) ^ (y & 1 ? 0x9908b0dfU : 0);
    }
    index_ = 0;
  }

  std::array<uint32_t, kWords> words_;
  size_t index_;
};

// random.shuffle of `order` in place.
template <class Index>
void shuffle(Array<Index> order, const std::vector<uint32_t>& state) {
  MersenneTwister random(state);
  Index* const x = order.mutable_data();
  const py::gil_scoped_release release;
  std::array<uint64_t, kBatch> other;
  for (uint64_t last = order.size(); last > 1;) {  // x[last] and all behind it have their final place
    const uint64_t first = last - std::min<uint64_t>(kBatch, last - 1);
    for (uint64_t i = last; i-- > first;) {
      other[i - first] = random.below(i + 1);
      __builtin_prefetch(x + other[i - first], 1);
    }
    for (uint64_t i = last; i-- > first;) std::swap(x[i], x[other[i - first]]);
    last = first;
  }
}

// ---- items

template <class Token>
constexpr size_t kLanes = sizeof(uint64_t) / sizeof(Token);

// The tokens at `at` in a word, the first in the low bits; behind `end` zeros.
template <class Token>
uint64_t load(const Token* at, const Token* end) {
  uint64_t word = 0;
  std::memcpy(&word, at, static_cast<size_t>(end - at) < kLanes<Token> ? (end - at) * sizeof(Token) : sizeof(word));
  return word;
}

// The index of the first token 0 in a word; kLanes if there is none.
template <class Token>
size_t first_zero(uint64_t word) {
  constexpr uint64_t kOnes = ~uint64_t{0} / std::numeric_limits<Token>::max();
  const uint64_t zeros = (word - kOnes) & ~word & kOnes << (8 * sizeof(Token) - 1);
  return zeros ? __builtin_ctzll(zeros) / (8 * sizeof(Token)) : kLanes<Token>;
}

struct Item {
  uint64_t begin, size, hash;  // its size counts the token 0
};

// The item at tokens[begin], whose token 0 is before `end`. The hash folds a product of 128 bits for each word.
template <class Token>
Item read_item(const Token* tokens, uint64_t begin, const Token* end) {
  uint64_t size = 0, hash = 0x9e3779b97f4a7c15U;
  for (;;) {
    uint64_t word = load(tokens + begin + size, end);
    const size_t zero = first_zero<Token>(word);
    const bool ends = zero < kLanes<Token>;
    if (ends) word &= (uint64_t{1} << (8 * sizeof(Token) * zero)) - 1;
    const auto product = static_cast<unsigned __int128>(hash ^ word) * 0xd6e8feb86659fd93U;
    hash = static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    if (ends) return {begin, size + zero + 1, hash};
    size += kLanes<Token>;
  }
}

// Calls f(items, count) with all items of tokens[0, size), kBatch at a time.
template <class Token, class F>
void for_items(const Token* tokens, uint64_t size, const F& f) {
  std::array<Item, kBatch> items;
  for (uint64_t at = 0; at < size;) {
    size_t count = 0;
    for (; count < kBatch && at < size; ++count) {
      items[count] = read_item(tokens, at, tokens + size);
      at += items[count].size;
    }
    f(items.data(), count);
  }
}

// The index behind the last token 0; 0 if there is none.
template <class Token>
int64_t whole_items(const Array<Token>& tokens) {
  const Token* const token = tokens.data();
  int64_t size = tokens.size();
  while (size > 0 && token[size - 1] != 0) --size;
  return size;
}

// ---- equal items

// A hash table of items, by open addressing. A slot holds where an item starts and the high bits of its hash, so that
// other items are rarely looked at. One bit of these is set, so that no slot in use is 0, and one is free for a mark.
template <class Token, int kStartBits>
class ItemTable {
 public:
  // items: how many the table takes without growing. tokens: (size,), of all items that are added
  ItemTable(const Token* tokens, uint64_t size, uint64_t items) : tokens_(tokens), size_(size) {
    if (size >> kStartBits) throw py::value_error("too many tokens for a table of items: " + std::to_string(size));
    size_t slots = 16;
    while (slots < items + items / 4) slots *= 2;
    slots_.resize(slots);
  }

  void prefetch_slot(const Item& item) const { __builtin_prefetch(&slots_[home(item.hash)]); }
  void prefetch_item(const Item& item) const {
    const uint64_t slot = load_slot(slots_[home(item.hash)]);
    if ((slot & kTag) == tag(item.hash)) __builtin_prefetch(tokens_ + (slot >> kTagBits));
  }

  // The slot of the item that equals `item` of `tokens`; an empty one if there is none.
  uint64_t& find(const Item& item, const Token* tokens) {
    for (size_t at = home(item.hash);; at = next(at)) {
      const uint64_t slot = load_slot(slots_[at]);
      if (!slot) return slots_[at];
      if ((slot & kTag) != tag(item.hash)) continue;
      const uint64_t begin = slot >> kTagBits;
      if (item.size > size_ - begin) continue;
      if (std::memcmp(tokens_ + begin, tokens + item.begin, item.size * sizeof(Token)) == 0) return slots_[at];
    }
  }

  // Adds an item of the table's tokens; false if it holds an equal one.
  bool add(const Item& item) {
    uint64_t& slot = find(item, tokens_);
    if (slot) return false;
    slot = item.begin << kTagBits | tag(item.hash);
    if (++filled_ > slots_.size() - slots_.size() / 8) grow();
    return true;
  }

  static constexpr uint64_t kMark = 1;

  // Threads that call `find` may set marks meanwhile.
  static uint64_t load_slot(const uint64_t& slot) { return __atomic_load_n(&slot, __ATOMIC_RELAXED); }

 private:
  static constexpr int kTagBits = 64 - kStartBits;
  static constexpr uint64_t kTag = (uint64_t{1} << kTagBits) - 2;

  static uint64_t tag(uint64_t hash) { return (hash >> kStartBits | 2) & kTag; }
  size_t home(uint64_t hash) const { return hash & (slots_.size() - 1); }
  size_t next(size_t at) const { return home(at + 1); }

  void grow() {
    std::vector<uint64_t> old(2 * slots_.size());
    old.swap(slots_);
    for (const uint64_t slot : old) {
      if (!slot) continue;
      size_t at = home(read_item(tokens_, slot >> kTagBits, tokens_ + size_).hash);
      while (slots_[at]) at = next(at);
      slots_[at] = slot;
    }
  }

  const Token* const tokens_;
  const uint64_t size_;
  std::vector<uint64_t> slots_;
  uint64_t filled_ = 0;
};

// Counts which of its items occur among others, which are read in pieces, by several threads at once.
template <class Token>
class WantedItems {
 public:
  // tokens: (fewer than 2³²,), whole items; items: their number
  WantedItems(Array<Token> tokens, uint64_t items)
      : tokens_(std::move(tokens)), table_(tokens_.data(), tokens_.size(), items) {
    const py::gil_scoped_release release;
    for_each(tokens_.data(), tokens_.size(), [&](const Item& item) { table_.add(item); });
  }

  // tokens: (n,), whole items
  void mark(const Array<Token>& tokens) {
    const Token* const token = tokens.data();
    const uint64_t size = tokens.size();
    const py::gil_scoped_release release;
    for_each(token, size, [&](const Item& item) {
      uint64_t& slot = table_.find(item, token);
      const uint64_t found = Table::load_slot(slot);
      if (found && !(found & Table::kMark)) __atomic_fetch_or(&slot, Table::kMark, __ATOMIC_RELAXED);
    });
  }

  // The number of items that were found, equal ones included.
  int64_t found() {
    const py::gil_scoped_release release;
    int64_t count = 0;
    for_each(tokens_.data(), tokens_.size(), [&](const Item& item) {
      count += static_cast<int64_t>(table_.find(item, tokens_.data()) & Table::kMark);
    });
    return count;
  }

 private:
  using Table = ItemTable<Token, 32>;

  template <class F>
  void for_each(const Token* tokens, uint64_t size, const F& f) {
    for_items(tokens, size, [&](const Item* items, size_t count) {
      for (size_t i = 0; i < count; ++i) table_.prefetch_slot(items[i]);
      for (size_t i = 0; i < count; ++i) table_.prefetch_item(items[i]);
      for (size_t i = 0; i < count; ++i) f(items[i]);
    });
  }

  const Array<Token> tokens_;
  Table table_;
};

// A bit for each item, the first in the low bit of the first byte: whether it equals an earlier one. A pass handles
// those items whose hash belongs to it, so that their table takes about `bytes`. tokens: (S,), `count` whole items
template <class Token>
Array<uint8_t> repeated_items(const Array<Token>& tokens, uint64_t count, uint64_t bytes) {
  Array<uint8_t> repeated((count + 7) / 8);
  const Token* const token = tokens.data();
  const uint64_t size = tokens.size();
  uint8_t* const bits = repeated.mutable_data();
  const py::gil_scoped_release release;
  std::fill_n(bits, (count + 7) / 8, uint8_t{0});
  uint64_t slots = 16;
  while (2 * slots * sizeof(uint64_t) <= bytes) slots *= 2;
  const uint64_t most = slots / 2 + slots / 8, passes = (count + most - 1) / most;
  for (uint64_t pass = 0; pass < passes; ++pass) {
    ItemTable<Token, 40> table(token, size, std::min(count, most));
    uint64_t number = 0;
    for_items(token, size, [&](Item* items, size_t n) {
      std::array<uint64_t, kBatch> numbers;
      size_t ours = 0;
      for (size_t i = 0; i < n; ++i, ++number) {
        if ((items[i].hash >> 24 & 0xffff) % passes != pass) continue;
        items[ours] = items[i];
        numbers[ours++] = number;
        table.prefetch_slot(items[i]);
      }
      for (size_t i = 0; i < ours; ++i) table.prefetch_item(items[i]);
      for (size_t i = 0; i < ours; ++i) {
        if (!table.add(items[i])) bits[numbers[i] / 8] |= 1 << numbers[i] % 8;
      }
    });
  }
  return repeated;
}

// ---- a new order

// Copies the items that begin at starts[0], starts[1], … of tokens to out, one behind another, as long as they fit, and
// the index behind each to ends, where the first begins at `at`. Returns the number of items and of tokens, and the
// size of the longest item. tokens: (S,), at least 8 bytes of them behind the last item; starts, ends: (n,); out:
// (size,)
template <class Token, class Index>
py::tuple take_items(const Array<Token>& tokens, const Array<Index>& starts, int64_t at, Array<Token> out,
                     Array<Index> ends) {
  const Token* const token = tokens.data();
  const Index* const start = starts.data();
  const int64_t count = starts.size(), room = out.size();
  Token* const to = out.mutable_data();
  Index* const end = ends.mutable_data();
  int64_t taken = 0, size = 0, longest = 0;
  {
    const py::gil_scoped_release release;
    for (; taken < count; ++taken) {
      if (taken + static_cast<int64_t>(kBatch) < count) __builtin_prefetch(token + start[taken + kBatch]);
      const Token* const from = token + start[taken];
      int64_t length = 0;
      size_t zero = kLanes<Token>;
      for (uint64_t word; zero == kLanes<Token> && size + length + static_cast<int64_t>(kLanes<Token>) <= room;) {
        std::memcpy(&word, from + length, sizeof(word));
        std::memcpy(to + size + length, &word, sizeof(word));
        zero = first_zero<Token>(word);
        length += static_cast<int64_t>(std::min(zero + 1, kLanes<Token>));
      }
      if (zero == kLanes<Token>) break;
      size += length;
      longest = std::max(longest, length);
      end[taken] = static_cast<Index>(at + size);
    }
  }
  return py::make_tuple(taken, size, longest);
}

template <class Token>
void bind_for(py::module_& m, const char* wanted_items) {
  using py::arg;
  m.def("whole_items", &whole_items<Token>, arg("tokens").noconvert());
  m.def("repeated_items", &repeated_items<Token>, arg("tokens").noconvert(), arg("count"), arg("bytes"));
  m.def("take_items", &take_items<Token, uint32_t>, arg("tokens").noconvert(), arg("starts").noconvert(), arg("at"),
        arg("out").noconvert(), arg("ends").noconvert());
  m.def("take_items", &take_items<Token, int64_t>, arg("tokens").noconvert(), arg("starts").noconvert(), arg("at"),
        arg("out").noconvert(), arg("ends").noconvert());
  py::class_<WantedItems<Token>>(m, wanted_items)
      .def(py::init<Array<Token>, uint64_t>(), arg("tokens").noconvert(), arg("items"))
      .def("mark", &WantedItems<Token>::mark, arg("tokens").noconvert())
      .def("found", &WantedItems<Token>::found);
}

}  // namespace

void bind_items(py::module_& m) {
  using py::arg;
  m.def("shuffle_indices", &shuffle<uint32_t>, arg("order").noconvert(), arg("state"));
  m.def("shuffle_indices", &shuffle<int64_t>, arg("order").noconvert(), arg("state"));
  bind_for<uint8_t>(m, "WantedItems8");
  bind_for<uint16_t>(m, "WantedItems16");
  bind_for<uint32_t>(m, "WantedItems32");
}

}  // namespace charlm

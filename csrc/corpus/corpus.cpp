// Native loops of charlm.lm over a corpus that may be larger than memory: characters to tokens, lines to items, the
// shuffle of Python's random module, windows of tokens, and files that are mapped one behind another. The callers are
// charlm/lm/stream.py, shards.py and prepare.py, which check the arguments.
#include <fcntl.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace charlm {
namespace corpus {
namespace {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Calls f(data, size) with the code points of a str, in the width in which Python keeps them: no copy is made.
template <class F>
auto with_code_points(const py::str& text, F&& f) {
  PyObject* const object = text.ptr();
  const size_t size = PyUnicode_GET_LENGTH(object);
  const void* const data = PyUnicode_DATA(object);
  switch (PyUnicode_KIND(object)) {
    case PyUnicode_1BYTE_KIND:
      return f(static_cast<const uint8_t*>(data), size);
    case PyUnicode_2BYTE_KIND:
      return f(static_cast<const uint16_t*>(data), size);
    default:
      return f(static_cast<const uint32_t*>(data), size);
  }
}

// ---- characters

// seen[c] = 1 for each character c of text. seen: (0x110000,)
void mark_characters(const py::str& text, Array<uint8_t> seen) {
  uint8_t* const mark = seen.mutable_data();
  with_code_points(text, [&](const auto* points, size_t size) {
    const py::gil_scoped_release release;
    for (size_t i = 0; i < size; ++i) mark[points[i]] = 1;
  });
}

// out[i] = table[text[i]]; returns the index of the first character that is beyond the table or has a -1 there, or -1.
// table: (largest code point + 1,), out: (len(text),)
template <class Token>
int64_t encode(const py::str& text, const Array<int32_t>& table, Array<Token> out) {
  const int32_t* const token_of = table.data();
  const size_t known = table.size();
  Token* const to = out.mutable_data();
  return with_code_points(text, [&](const auto* points, size_t size) -> int64_t {
    const py::gil_scoped_release release;
    for (size_t i = 0; i < size; ++i) {
      const int32_t token = points[i] < known ? token_of[points[i]] : -1;
      if (token < 0) return static_cast<int64_t>(i);
      to[i] = static_cast<Token>(token);
    }
    return -1;
  });
}

// ---- items

// Reads the items of a streamed text: its lines without the whitespace at both ends. Empty ones are dropped. Keeps the
// numbers by which `charlm.lm.data.guess_format` tells items from running text.
class Lines {
 public:
  // is_space: (n,) whether str.strip() removes a code point; later ones are no space.
  Lines(const Array<uint8_t>& is_space, int64_t short_characters)
      : is_space_(is_space.data(), is_space.data() + is_space.size()), short_characters_(short_characters) {}

  // Marks the characters of the items in seen, (0x110000,).
  void mark(const py::str& text, Array<uint8_t> seen) {
    uint8_t* const marks = seen.mutable_data();
    read(text, [=](uint32_t point) { marks[point] = 1; }, [] {});
  }

  // (tokens, lengths) of the items that end in this piece, and of the beginning of an item that does not: its tokens
  // are returned now, its length with its end. Each item is followed by token 0, which its length counts.
  template <class Token>
  py::tuple encode(const py::str& text, const Array<int32_t>& table) {
    const size_t most = PyUnicode_GET_LENGTH(text.ptr()) + pending_.size() + 1;
    std::vector<Token> tokens(most);
    std::vector<int64_t> lengths;
    const int32_t* const token_of = table.data();
    const int64_t known = table.size();
    Token* to = tokens.data();
    int32_t smallest = 0;  // below 0 if a character is not in the table
    const auto character = [&](uint32_t point) {
      const int32_t token = point < known ? token_of[point] : -1;
      smallest = std::min(smallest, token);
      *to++ = static_cast<Token>(token);
    };
    const auto end = [&] {
      *to++ = 0;
      lengths.push_back(characters_ + 1);
    };
    read(text, character, end);
    if (smallest < 0) throw py::value_error("a character is not in the table");
    return py::make_tuple(Array<Token>(to - tokens.data(), tokens.data()),
                          Array<int64_t>(lengths.size(), lengths.data()));
  }

  int64_t lines() const { return lines_; }  // without the newlines at both ends of the text
  int64_t items() const { return items_; }
  int64_t characters() const { return total_; }  // of all items that have ended
  int64_t short_items() const { return short_items_; }
  int64_t words() const { return words_; }

 private:
  template <class Character, class End>
  void read(const py::str& text, const Character& character, const End& end) {
    with_code_points(text, [&](const auto* points, size_t size) {
      const py::gil_scoped_release release;
      const uint8_t* const spaces = is_space_.data();
      const size_t known = is_space_.size();
      const auto is_space = [=](uint32_t point) { return point < known && spaces[point]; };  // newlines too
      for (size_t i = 0; i < size;) {
        if (points[i] == '\n') {
          ++newlines_;
          if (characters_ > 0) {
            end();
            ++items_;
            total_ += characters_;
            if (characters_ <= short_characters_) ++short_items_;
          }
          characters_ = 0;
          pending_.clear();
          ++i;
          continue;
        }
        if (newlines_ > 0) lines_ += lines_ > 0 ? newlines_ : 1;
        newlines_ = 0;
        if (is_space(points[i])) {
          if (characters_ > 0) pending_.push_back(points[i]);
          ++i;
          continue;
        }
        if (characters_ == 0 || !pending_.empty()) ++words_;
        for (const uint32_t space : pending_) character(space);
        characters_ += static_cast<int64_t>(pending_.size());
        pending_.clear();
        const size_t begin = i;
        do character(points[i]);
        while (++i < size && !is_space(points[i]));
        characters_ += static_cast<int64_t>(i - begin);
      }
    });
  }

  const std::vector<uint8_t> is_space_;
  const int64_t short_characters_;
  std::vector<uint32_t> pending_;  // spaces that belong to the item if another character follows
  int64_t characters_ = 0;         // of the item so far
  int64_t newlines_ = 1;           // since the last other character; a text begins as if behind a newline
  int64_t total_ = 0, lines_ = 0, items_ = 0, short_items_ = 0, words_ = 0;
};

// ---- the shuffle of Python

// Matsumoto and Nishimura (1998), "Mersenne Twister", as in CPython's _randommodule.c.
class MersenneTwister {
 public:
  // state: random.Random(seed).getstate()[1], 624 words and the index of the next.
  explicit MersenneTwister(const std::vector<uint32_t>& state) {
    std::copy_n(state.begin(), kWords, words_.begin());
    index_ = state.at(kWords);
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
  for (uint64_t i = order.size(); i-- > 1;) std::swap(x[i], x[random.below(i + 1)]);
}

// ---- equal items

constexpr uint64_t kHashes = uint64_t{1} << 63;

// FNV-1a over the bytes of the tokens, with a final mix (MurmurHash3). Smaller than 2⁶³.
uint64_t hash_bytes(const uint8_t* bytes, size_t size) {
  uint64_t h = 0xcbf29ce484222325U;
  for (size_t i = 0; i < size; ++i) h = (h ^ bytes[i]) * 0x100000001b3U;
  h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdU;
  h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53U;
  return (h ^ (h >> 33)) >> 1;
}

// A set of items, each followed by a separator that occurs nowhere else in it. Holds where an item starts and 24 bits
// of its hash, so that other items are rarely looked at.
template <class Token>
class ItemSet {
 public:
  explicit ItemSet(const Token* tokens) : tokens_(tokens), slots_(1 << 10) {}

  size_t bytes() const { return slots_.size() * sizeof(uint64_t); }
  bool is_full() const { return 2 * filled_ >= slots_.size(); }

  // Two steps that load what `contains` needs for an item, for several items at once.
  void prefetch_slot(uint64_t hash) const { __builtin_prefetch(&slots_[hash & (slots_.size() - 1)]); }
  void prefetch_item(uint64_t hash) const {
    const uint64_t slot = slots_[hash & (slots_.size() - 1)];
    if ((slot >> kStartBits) == tag(hash)) __builtin_prefetch(tokens_ + start(slot));
  }

  // Whether the set holds the item of `size` tokens at `begin`; if not, it is added where `adds`.
  bool contains(uint64_t begin, uint64_t size, uint64_t hash, bool adds) {
    uint64_t at = hash & (slots_.size() - 1);
    for (; slots_[at]; at = (at + 1) & (slots_.size() - 1)) {
      if ((slots_[at] >> kStartBits) != tag(hash)) continue;
      if (std::memcmp(tokens_ + start(slots_[at]), tokens_ + begin, size * sizeof(Token)) == 0) return true;
    }
    if (adds) {
      slots_[at] = tag(hash) << kStartBits | begin;
      ++filled_;
    }
    return false;
  }

  // Keeps the items whose hash is below `high`, in a table of `slots` entries.
  void rebuild(size_t slots, uint64_t high) {
    std::vector<uint64_t> old(slots);
    old.swap(slots_);
    filled_ = 0;
    for (const uint64_t slot : old) {
      if (!slot) continue;
      const uint64_t hash = hash_at(start(slot));
      if (hash >= high) continue;
      uint64_t at = hash & (slots_.size() - 1);
      while (slots_[at]) at = (at + 1) & (slots_.size() - 1);
      slots_[at] = slot;
      ++filled_;
    }
  }

  void grow(uint64_t high) { rebuild(2 * slots_.size(), high); }
  void shrink(uint64_t high) { rebuild(slots_.size(), high); }

 private:
  static constexpr int kStartBits = 40;

  static uint64_t start(uint64_t slot) { return slot & ((uint64_t{1} << kStartBits) - 1); }
  static uint64_t tag(uint64_t hash) { return (hash >> 20 & 0xffffff) | 1; }  // not 0, so that no slot in use is 0

  uint64_t hash_at(uint64_t begin) const {
    const Token* end = tokens_ + begin;
    while (*end++) {
    }
    return hash_bytes(reinterpret_cast<const uint8_t*>(tokens_ + begin), (end - tokens_ - begin) * sizeof(Token));
  }

  const Token* const tokens_;
  std::vector<uint64_t> slots_;
  size_t filled_ = 0;
};

// Marks each item that equals an earlier one of the first `kept` items: (n,) uint8. The items themselves are compared.
// A pass handles a range of hashes; the range is halved whenever their set would take more than `bytes`.
// ends: (n,) the index behind the separator, 0, of each item in tokens.
template <class Token, class End>
Array<uint8_t> repeated_items(const Array<Token>& tokens, const Array<End>& ends, uint64_t kept, uint64_t bytes) {
  constexpr uint64_t kBlock = 64;
  const uint64_t count = ends.size();
  Array<uint8_t> repeated(count);
  const Token* const token = tokens.data();
  const End* const end = ends.data();
  uint8_t* const mark = repeated.mutable_data();
  const py::gil_scoped_release release;
  std::fill_n(mark, count, uint8_t{0});
  std::array<uint64_t, kBlock> hash, begin, size;
  for (uint64_t low = 0, high = kHashes; low < high; low = high, high = kHashes) {
    ItemSet<Token> set(token);
    for (uint64_t first = 0; first < count; first += kBlock) {
      const uint64_t block = std::min(kBlock, count - first);
      for (uint64_t i = 0; i < block; ++i) {
        begin[i] = first + i ? end[first + i - 1] : 0;
        size[i] = end[first + i] - begin[i];
        hash[i] = hash_bytes(reinterpret_cast<const uint8_t*>(token + begin[i]), size[i] * sizeof(Token));
        set.prefetch_slot(hash[i]);
      }
      for (uint64_t i = 0; i < block; ++i) set.prefetch_item(hash[i]);
      for (uint64_t i = 0; i < block; ++i) {
        if (hash[i] < low || hash[i] >= high) continue;
        if (set.contains(begin[i], size[i], hash[i], first + i < kept)) mark[first + i] = 1;
        while (set.is_full()) {
          if (2 * set.bytes() <= bytes) {
            set.grow(high);
          } else {
            high = low + (high - low) / 2;
            set.shrink(high);
          }
        }
      }
    }
  }
  return repeated;
}

// The tokens of the items order[0], order[1], …, one behind another, and the length of each.
template <class Token, class End, class Index>
py::tuple take_items(const Array<Token>& tokens, const Array<End>& ends, const Array<Index>& order) {
  const Token* const token = tokens.data();
  const End* const end = ends.data();
  const Index* const item = order.data();
  const size_t count = order.size();
  Array<int64_t> lengths(count);
  int64_t* const length = lengths.mutable_data();
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    length[i] = static_cast<int64_t>(end[item[i]]) - (item[i] ? static_cast<int64_t>(end[item[i] - 1]) : 0);
    total += length[i];
  }
  Array<Token> taken(total);
  Token* to = taken.mutable_data();
  {
    const py::gil_scoped_release release;
    for (size_t i = 0; i < count; ++i) to = std::copy_n(token + (end[item[i]] - length[i]), length[i], to);
  }
  return py::make_tuple(taken, lengths);
}

// ---- windows

// out[i, j] = tokens[first[i] + j], or `pad` outside the tokens; with a separator, also up to the last one in a row.
// first: (B,), out: (B, width)
template <class Token, class Out>
void windows(const Array<Token>& tokens, const Array<int64_t>& first, int64_t pad, int64_t separator, Array<Out> out) {
  const Token* const token = tokens.data();
  const int64_t size = tokens.size(), rows = out.shape(0), width = out.shape(1);
  const int64_t* const begin = first.data();
  Out* row = out.mutable_data();
  for (int64_t i = 0; i < rows; ++i, row += width) {
    const int64_t at = begin[i];
    int64_t low = std::clamp<int64_t>(-at, 0, width);
    const int64_t high = std::clamp<int64_t>(size - at, low, width);
    for (int64_t j = low; j < high; ++j) row[j] = static_cast<Out>(token[at + j]);
    std::fill(row + high, row + width, static_cast<Out>(pad));
    if (separator >= 0) {
      for (int64_t j = high; j-- > low;) {
        if (row[j] != static_cast<Out>(separator)) continue;
        low = j + 1;
        break;
      }
    }
    std::fill(row, row + low, static_cast<Out>(pad));
  }
}

// ---- files

// Maps files one behind another: a (total bytes,) array, private to this process. Each file but the last must be a
// multiple of the page size. std::system_error where a file cannot be opened or is shorter than its size.
Array<uint8_t> map_files(const std::vector<std::pair<std::string, size_t>>& files) {
  size_t total = 0;
  for (const auto& [path, size] : files) total += size;
  if (total == 0) return Array<uint8_t>(0);
  const auto fail = [](const std::string& path) { throw std::system_error(errno, std::generic_category(), path); };
  void* const base = mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) fail("mmap");
  struct Mapping {
    void* base;
    size_t size;
  };
  const py::capsule owner(new Mapping{base, total}, [](void* mapping) {
    const auto* const owned = static_cast<Mapping*>(mapping);
    munmap(owned->base, owned->size);
    delete owned;
  });
  char* at = static_cast<char*>(base);
  for (const auto& [path, size] : files) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) fail(path);
    struct stat found{};
    if (fstat(file, &found) != 0 || static_cast<size_t>(found.st_size) < size) {  // else a read would be a SIGBUS
      close(file);
      errno = EIO;
      fail(path);
    }
    const void* const mapped = mmap(at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, file, 0);
    const int error = errno;
    close(file);
    errno = error;
    if (mapped == MAP_FAILED) fail(path);
    at += size;
  }
  return Array<uint8_t>(total, static_cast<uint8_t*>(base), owner);
}

template <class Token>
void bind_for(py::module_& m, py::class_<Lines>& lines, const char* encode_items) {
  using py::arg;
  m.def("encode_characters", &encode<Token>, arg("text"), arg("table"), arg("out").noconvert());
  m.def("repeated_items", &repeated_items<Token, uint32_t>, arg("tokens").noconvert(), arg("ends").noconvert(),
        arg("kept"), arg("bytes"));
  m.def("repeated_items", &repeated_items<Token, int64_t>, arg("tokens").noconvert(), arg("ends").noconvert(),
        arg("kept"), arg("bytes"));
  m.def("take_items", &take_items<Token, int64_t, uint32_t>, arg("tokens").noconvert(), arg("ends").noconvert(),
        arg("order").noconvert());
  m.def("take_items", &take_items<Token, int64_t, int64_t>, arg("tokens").noconvert(), arg("ends").noconvert(),
        arg("order").noconvert());
  lines.def(encode_items, &Lines::encode<Token>, arg("text"), arg("table"));
}

template <class Token, class Out>
void bind_windows(py::module_& m) {
  using py::arg;
  m.def("token_windows", &windows<Token, Out>, arg("tokens").noconvert(), arg("first").noconvert(), arg("pad"),
        arg("separator"), arg("out").noconvert());
}

}  // namespace
}  // namespace corpus

void bind_corpus(pybind11::module_& m) {
  using namespace corpus;
  using py::arg;
  m.def("mark_characters", &mark_characters, arg("text"), arg("seen").noconvert());
  m.def("shuffle_indices", &shuffle<uint32_t>, arg("order").noconvert(), arg("state"));
  m.def("shuffle_indices", &shuffle<int64_t>, arg("order").noconvert(), arg("state"));
  m.def("map_files", &map_files, arg("files"));
  py::class_<Lines> lines(m, "Lines");
  lines.def(py::init<const Array<uint8_t>&, int64_t>(), arg("is_space"), arg("short_characters"))
      .def("mark", &Lines::mark, arg("text"), arg("seen").noconvert())
      .def_property_readonly("lines", &Lines::lines)
      .def_property_readonly("items", &Lines::items)
      .def_property_readonly("characters", &Lines::characters)
      .def_property_readonly("short_items", &Lines::short_items)
      .def_property_readonly("words", &Lines::words);
  bind_for<uint8_t>(m, lines, "encode8");
  bind_for<uint16_t>(m, lines, "encode16");
  bind_for<uint32_t>(m, lines, "encode32");
  bind_windows<uint8_t, uint8_t>(m);
  bind_windows<uint16_t, int32_t>(m);
  bind_windows<int32_t, int32_t>(m);
}

}  // namespace charlm

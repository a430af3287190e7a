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
    std::vector<Token> tokens;
    std::vector<int64_t> lengths;
    const int32_t* const token_of = table.data();
    tokens.reserve(PyUnicode_GET_LENGTH(text.ptr()) + pending_.size() + 1);
    const int64_t known = table.size();
    bool has_unknown = false;
    const auto character = [&](uint32_t point) {
      const int32_t token = point < known ? token_of[point] : -1;
      has_unknown |= token < 0;
      tokens.push_back(static_cast<Token>(token));
    };
    const auto end = [&] {
      tokens.push_back(0);
      lengths.push_back(characters_ + 1);
    };
    read(text, character, end);
    if (has_unknown) throw py::value_error("a character is not in the table");
    return py::make_tuple(Array<Token>(tokens.size(), tokens.data()), Array<int64_t>(lengths.size(), lengths.data()));
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
      for (size_t i = 0; i < size; ++i) {
        const uint32_t point = points[i];
        if (point == '\n') {
          ++newlines_;
          if (characters_ > 0) {
            end();
            ++items_;
            total_ += characters_;
            if (characters_ <= short_characters_) ++short_items_;
          }
          characters_ = 0;
          pending_.clear();
          continue;
        }
        if (newlines_ > 0) lines_ += lines_ > 0 ? newlines_ : 1;
        newlines_ = 0;
        if (point < is_space_.size() && is_space_[point]) {
          if (characters_ > 0) pending_.push_back(point);
          continue;
        }
        if (characters_ == 0 || !pending_.empty()) ++words_;
        for (const uint32_t space : pending_) character(space);
        characters_ += static_cast<int64_t>(pending_.size()) + 1;
        pending_.clear();
        character(point);
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

// FNV-1a over the bytes of the tokens, with a final mix (MurmurHash3).
uint64_t hash_bytes(const uint8_t* bytes, size_t size) {
  uint64_t h = 0xcbf29ce484222325U;
  for (size_t i = 0; i < size; ++i) h = (h ^ bytes[i]) * 0x100000001b3U;
  h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdU;
  h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53U;
  return h ^ (h >> 33);
}

// Marks each item that equals an earlier one of the first `kept` items: (n,) uint8. Compares the items themselves, not
// only their hashes. Passes over the items until each has been in a table, which takes at most `bytes`.
// ends: (n,) the index behind each item in tokens.
template <class Token, class End>
Array<uint8_t> repeated_items(const Array<Token>& tokens, const Array<End>& ends, uint64_t kept, uint64_t bytes) {
  const uint64_t count = ends.size();
  Array<uint8_t> repeated(count);
  const Token* const token = tokens.data();
  const End* const end = ends.data();
  uint8_t* const mark = repeated.mutable_data();
  const py::gil_scoped_release release;
  std::fill_n(mark, count, uint8_t{0});
  const uint64_t passes = std::max<uint64_t>(1, (kept * 2 * sizeof(uint64_t) + bytes - 1) / bytes);
  uint64_t slots = 16;
  while (slots < 2 * (kept / passes + 1)) slots *= 2;
  const auto start_of = [&](uint64_t item) -> uint64_t { return item ? end[item - 1] : 0; };
  for (uint64_t pass = 0; pass < passes; ++pass) {
    std::vector<uint64_t> table(slots);  // item + 1, or 0
    uint64_t filled = 0;
    for (uint64_t item = 0; item < count; ++item) {
      const uint64_t start = start_of(item), size = (end[item] - start) * sizeof(Token);
      const auto* const key = reinterpret_cast<const uint8_t*>(token + start);
      const uint64_t hash = hash_bytes(key, size);
      if (passes > 1 && (hash >> 32) % passes != pass) continue;
      uint64_t slot = hash & (slots - 1);
      for (; table[slot]; slot = (slot + 1) & (slots - 1)) {
        const uint64_t other = table[slot] - 1, other_start = start_of(other);
        if ((end[other] - other_start) * sizeof(Token) == size && std::memcmp(token + other_start, key, size) == 0) {
          mark[item] = 1;
          break;
        }
      }
      if (mark[item] || item >= kept) continue;
      table[slot] = item + 1;
      if (2 * ++filled > slots) {  // more items fell into this pass than expected
        std::vector<uint64_t> larger(2 * slots);
        slots *= 2;
        for (const uint64_t old : table) {
          if (!old) continue;
          const uint64_t begin = start_of(old - 1);
          uint64_t place =
              hash_bytes(reinterpret_cast<const uint8_t*>(token + begin), (end[old - 1] - begin) * sizeof(Token)) &
              (slots - 1);
          while (larger[place]) place = (place + 1) & (slots - 1);
          larger[place] = old;
        }
        table = std::move(larger);
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

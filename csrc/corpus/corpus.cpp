// Native loops of charlm.lm over a corpus that may be larger than memory: characters to tokens and back, lines to
// items, windows of tokens, and files that are mapped one behind another. Items are shuffled and compared in items.cpp.
// The callers are charlm/lm/stream.py, shards.py, sources.py and prepare.py, which check the arguments.
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
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace charlm {

void bind_items(pybind11::module_& m);  // items.cpp

namespace corpus {
namespace {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// ---- UTF-8

const uint8_t* skip_ascii(const uint8_t* at, const uint8_t* end) {
  for (uint64_t word; end - at >= 8; at += 8) {
    std::memcpy(&word, at, 8);
    if (word & 0x8080808080808080U) break;
  }
  while (at < end && *at < 0x80) ++at;
  return at;
}

// The bytes of the character at `at`, 2 to 4, and 0 if it is ASCII, invalid or incomplete (Unicode 16, table 3-7).
size_t long_character(const uint8_t* at, const uint8_t* end) {
  const uint8_t lead = *at;
  if (lead < 0xc2 || lead > 0xf4) return 0;
  const ptrdiff_t size = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  if (end - at < size) return 0;
  const uint8_t low = lead == 0xe0   ? 0xa0
                      : lead == 0xf0 ? 0x90
                                     : 0x80,
                high = lead == 0xed   ? 0x9f
                       : lead == 0xf4 ? 0x8f
                                      : 0xbf;
  bool valid = at[1] >= low && at[1] <= high;
  for (ptrdiff_t i = 2; i < size; ++i) valid &= (at[i] & 0xc0) == 0x80;
  return valid ? size : 0;
}

// The number of bytes before the first that is no part of a whole, valid character.
size_t valid_utf8(const py::bytes& text) {
  const std::string_view bytes = text;
  const py::gil_scoped_release release;
  const auto* const begin = reinterpret_cast<const uint8_t*>(bytes.data());
  const uint8_t *at = begin, *const end = begin + bytes.size();
  for (;;) {
    at = skip_ascii(at, end);
    const size_t size = at < end ? long_character(at, end) : 0;
    if (size == 0) return at - begin;
    at += size;
  }
}

// Calls f(points, size) with the code points of valid UTF-8: as bytes where they are ASCII, and as uint32_t elsewhere.
template <class F>
void for_code_points(const py::bytes& text, const F& f) {
  const std::string_view bytes = text;
  const py::gil_scoped_release release;
  const auto* at = reinterpret_cast<const uint8_t*>(bytes.data());
  const uint8_t* const end = at + bytes.size();
  std::array<uint32_t, 256> points;
  while (at < end) {
    const uint8_t* const begin = at;
    at = skip_ascii(at, end);
    if (at > begin) f(begin, static_cast<size_t>(at - begin));
    size_t size = 0;
    for (; at < end && *at >= 0x80 && size < points.size(); ++size) {
      const size_t width = long_character(at, end);
      if (width == 0) throw py::value_error("the text is not valid UTF-8");
      uint32_t point = *at & (0x7f >> width);
      for (size_t i = 1; i < width; ++i) point = point << 6 | (at[i] & 0x3f);
      points[size] = point;
      at += width;
    }
    if (size > 0) f(points.data(), size);
  }
}

// ---- characters

// seen[c] = 1 for each character c of text; returns their number. seen: (0x110000,)
int64_t mark_characters(const py::bytes& text, Array<uint8_t> seen) {
  uint8_t* const mark = seen.mutable_data();
  int64_t characters = 0;
  for_code_points(text, [&](const auto* points, size_t size) {
    for (size_t i = 0; i < size; ++i) mark[points[i]] = 1;
    characters += static_cast<int64_t>(size);
  });
  return characters;
}

// The token of each character; -1 for one that has none.
class TokenTable {
 public:
  // table: (largest code point + 1,)
  explicit TokenTable(const Array<int32_t>& table) : tokens_(table.data()), size_(table.size()) {
    ascii_.fill(-1);
    std::copy_n(tokens_, std::min(size_, ascii_.size()), ascii_.begin());
  }

  // Writes the tokens of points to `to`. Returns a number below 0 if a character has none, and otherwise another.
  template <class Point, class Token>
  int32_t write(const Point* points, size_t size, Token* to) const {
    int32_t all = 0;  // has the sign bit of -1
    for (size_t i = 0; i < size; ++i) {
      const int32_t token = (*this)(points[i]);
      all |= token;
      to[i] = static_cast<Token>(token);
    }
    return all;
  }

 private:
  int32_t operator()(uint8_t ascii) const { return ascii_[ascii]; }
  int32_t operator()(uint32_t point) const { return point < size_ ? tokens_[point] : -1; }

  const int32_t* const tokens_;
  const size_t size_;
  std::array<int32_t, 128> ascii_;
};

// Writes the token of each character of text to out; returns their number, or -1 if a character has none.
// out: (at least the characters of text,)
template <class Token>
int64_t encode(const py::bytes& text, const Array<int32_t>& table, Array<Token> out) {
  const TokenTable tokens(table);
  Token* to = out.mutable_data();
  int32_t all = 0;
  for_code_points(text, [&](const auto* points, size_t size) {
    all |= tokens.write(points, size, to);
    to += size;
  });
  return all < 0 ? -1 : to - out.data();
}

// The number of bytes of the UTF-8 of tokens. sizes: (vocab_size,), the number of each token.
template <class Token>
int64_t utf8_size(const Array<Token>& tokens, const Array<uint8_t>& sizes) {
  const Token* const token = tokens.data();
  const uint8_t* const size_of = sizes.data();
  const int64_t count = tokens.size();
  const py::gil_scoped_release release;
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += size_of[token[i]];
  return total;
}

// Writes the UTF-8 of tokens to out, and returns its size. characters: (vocab_size,), the bytes of each token, the
// first in the low byte; sizes: (vocab_size,), their number; out: (4 · tokens,)
template <class Token>
int64_t decode_tokens(const Array<Token>& tokens, const Array<uint32_t>& characters, const Array<uint8_t>& sizes,
                      Array<uint8_t> out) {
  const Token* const token = tokens.data();
  const uint32_t* const bytes_of = characters.data();
  const uint8_t* const size_of = sizes.data();
  const int64_t count = tokens.size();
  uint8_t* to = out.mutable_data();
  const py::gil_scoped_release release;
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to, bytes_of + token[i], 4);
    to += size_of[token[i]];
  }
  return to - out.data();
}

// ---- items

// Reads the items of a streamed text: its lines without the whitespace at both ends. Empty ones are dropped. Keeps the
// numbers by which `charlm.lm.data.guess_format` tells items from running text.
class Lines {
 public:
  // is_space: (n,) whether str.strip() removes a code point; later ones are no space.
  Lines(const Array<uint8_t>& is_space, int64_t short_characters)
      : is_space_(is_space.data(), is_space.data() + is_space.size()), short_characters_(short_characters) {}

  // Marks the spaces within items in seen, (0x110000,). All other characters of a text are characters of items.
  void mark(const py::bytes& text, Array<uint8_t> seen) {
    uint8_t* const marks = seen.mutable_data();
    const auto mark_spaces = [=](const auto* points, size_t, uint64_t spaces) {
      for (; spaces != 0; spaces &= spaces - 1) marks[points[__builtin_ctzll(spaces)]] = 1;
    };
    read(text, mark_spaces, [] {});
  }

  // Writes the tokens of the items to out, and token 0 behind each; those of an item that does not end in this piece
  // too. Returns their number, and where in all tokens so far each item begins that ends in this piece.
  // out: (at least bytes of text + spaces + 1,), see `spaces`
  template <class Token>
  py::tuple encode(const py::bytes& text, const Array<int32_t>& table, Array<Token> out) {
    const TokenTable tokens(table);
    Token *const first = out.mutable_data(), *to = first;
    std::vector<int64_t> starts;
    int32_t all = 0;  // below 0 if a character is not in the table
    const auto write = [&](const auto* points, size_t size, uint64_t) {
      all |= tokens.write(points, size, to);
      to += size;
    };
    const auto end = [&] {
      starts.push_back(encoded_ + (to - first) - characters_);
      *to++ = 0;
    };
    read(text, write, end);
    if (all < 0) throw py::value_error("a character is not in the table");
    encoded_ += to - first;
    return py::make_tuple(to - first, Array<int64_t>(starts.size(), starts.data()));
  }

  size_t spaces() const { return pending_.size(); }  // that belong to the item if another character follows

  int64_t lines() const { return lines_; }  // without the newlines at both ends of the text
  int64_t items() const { return items_; }
  int64_t characters() const { return total_; }  // of all items that have ended
  int64_t short_items() const { return short_items_; }
  int64_t words() const { return words_; }

 private:
  // Calls part(points, size, spaces) for consecutive parts of items, with a bit for each space within, and end() behind
  // each item.
  template <class Part, class End>
  void read(const py::bytes& text, const Part& part, const End& end) {
    for_code_points(text, [&](const auto* points, size_t size) {
      for (size_t i = 0; i < size; i += 64) {
        const size_t count = std::min<size_t>(size - i, 64);
        read_block(points + i, count, find_spaces(points + i, count), part, end);
      }
    });
  }

  struct Spaces {
    uint64_t newlines, all;  // a bit for each code point
  };

  Spaces find_spaces(const uint32_t* points, size_t size) const {  // no ASCII
    uint64_t spaces = 0;
    for (size_t i = 0; i < size; ++i) spaces |= uint64_t{is_space(points[i])} << i;
    return {0, spaces};
  }

  // Of 8 bytes at a time: a carry into the high bit of a byte tells that it is at least a limit.
  static Spaces find_spaces(const uint8_t* ascii, size_t size) {
    Spaces found{};
    for (size_t i = 0; i < size; i += 8) {
      uint64_t word = 0;
      if (size - i >= 8) {
        std::memcpy(&word, ascii + i, 8);
      } else {
        std::memcpy(&word, ascii + i, size - i);
      }
      const auto at_least = [=](uint8_t limit) { return word + (0x80U - limit) * 0x0101010101010101U; };
      const uint64_t newlines = at_least('\n') & ~at_least('\n' + 1);
      const uint64_t spaces = (at_least(9) & ~at_least(14)) | (at_least(28) & ~at_least(33));
      found.newlines |= high_bits(newlines) << i;
      found.all |= high_bits(spaces) << i;
    }
    return found;
  }

  // The highest bit of each byte of word, as 8 bits.
  static uint64_t high_bits(uint64_t word) { return (word >> 7 & 0x0101010101010101U) * 0x0102040810204080U >> 56; }

  static uint64_t low_bits(size_t count) { return count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0}; }

  // points: (size,), 1 to 64
  template <class Point, class Part, class End>
  void read_block(const Point* points, size_t size, Spaces spaces, const Part& part, const End& end) {
    const uint64_t others = ~spaces.all & low_bits(size);
    const bool in_word = characters_ > 0 && pending_.empty();
    words_ += __builtin_popcountll(others & (spaces.all << 1 | uint64_t{!in_word}));
    for (size_t begin = 0; begin < size; ++begin) {
      const uint64_t ahead = ~uint64_t{0} << begin, newlines = spaces.newlines & ahead;
      const size_t stop = newlines != 0 ? __builtin_ctzll(newlines) : size;
      if (stop > begin && newlines_ > 0) {
        lines_ += lines_ > 0 ? newlines_ : 1;
        newlines_ = 0;
      }
      if (const uint64_t item = others & ahead & low_bits(stop); item != 0) {
        if (!pending_.empty()) {
          for (size_t i = 0; i < pending_.size(); ++i) part(&pending_[i], 1, 1);
          characters_ += static_cast<int64_t>(pending_.size());
          pending_.clear();
        }
        if (characters_ == 0) begin = __builtin_ctzll(item);
        const size_t count = 64 - __builtin_clzll(item) - begin;
        part(points + begin, count, spaces.all >> begin & low_bits(count));
        characters_ += static_cast<int64_t>(count);
        begin += count;
      }
      if (stop == size) {
        if (characters_ > 0) pending_.insert(pending_.end(), points + begin, points + stop);
        return;
      }
      ++newlines_;
      if (characters_ > 0) {
        end();
        ++items_;
        total_ += characters_;
        if (characters_ <= short_characters_) ++short_items_;
        characters_ = 0;
        pending_.clear();
      }
      begin = stop;
    }
  }

  bool is_space(uint32_t point) const { return point < is_space_.size() && is_space_[point]; }

  const std::vector<uint8_t> is_space_;
  const int64_t short_characters_;
  std::vector<uint32_t> pending_;  // spaces that belong to the item if another character follows
  int64_t characters_ = 0;         // of the item so far
  int64_t newlines_ = 1;           // since the last other character; a text begins as if behind a newline
  int64_t encoded_ = 0;            // tokens so far
  int64_t total_ = 0, lines_ = 0, items_ = 0, short_items_ = 0, words_ = 0;
};

// ---- windows

// out[i, j] = tokens[index[i] - before + j], or `pad` outside the tokens; with a separator, also up to the last one in
// a row. next[i] = tokens[index[i]], which must be within the tokens.
// index: (B,), out: (B, width), next: (B,), or empty
template <class Token, class Out>
void windows(const Array<Token>& tokens, const Array<int64_t>& index, int64_t before, int64_t pad, int64_t separator,
             Array<Out> out, Array<Out> next) {
  const Token* const token = tokens.data();
  const int64_t size = tokens.size(), rows = out.shape(0), width = out.shape(1);
  for (int64_t i = 0; i < next.size(); ++i) {
    const int64_t at = index.data()[i];
    if (at < 0 || at >= size) throw py::index_error("token " + std::to_string(at) + " of " + std::to_string(size));
    next.mutable_data()[i] = static_cast<Out>(token[at]);
  }
  Out* row = out.mutable_data();
  for (int64_t i = 0; i < rows; ++i, row += width) {
    const int64_t at = index.data()[i] - before;
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
  m.def("utf8_size", &utf8_size<Token>, arg("tokens").noconvert(), arg("sizes").noconvert());
  m.def("decode_tokens", &decode_tokens<Token>, arg("tokens").noconvert(), arg("characters").noconvert(),
        arg("sizes").noconvert(), arg("out").noconvert());
  lines.def(encode_items, &Lines::encode<Token>, arg("text"), arg("table"), arg("out").noconvert());
}

template <class Token, class Out>
void bind_windows(py::module_& m) {
  using py::arg;
  m.def("token_windows", &windows<Token, Out>, arg("tokens").noconvert(), arg("index").noconvert(), arg("before"),
        arg("pad"), arg("separator"), arg("out").noconvert(), arg("next").noconvert());
}

}  // namespace
}  // namespace corpus

void bind_corpus(pybind11::module_& m) {
  using namespace corpus;
  using py::arg;
  m.def("mark_characters", &mark_characters, arg("text"), arg("seen").noconvert());
  bind_items(m);
  m.def("valid_utf8", &valid_utf8, arg("text"));
  m.def("map_files", &map_files, arg("files"));
  py::class_<Lines> lines(m, "Lines");
  lines.def(py::init<const Array<uint8_t>&, int64_t>(), arg("is_space"), arg("short_characters"))
      .def("mark", &Lines::mark, arg("text"), arg("seen").noconvert())
      .def_property_readonly("lines", &Lines::lines)
      .def_property_readonly("items", &Lines::items)
      .def_property_readonly("characters", &Lines::characters)
      .def_property_readonly("short_items", &Lines::short_items)
      .def_property_readonly("words", &Lines::words)
      .def_property_readonly("spaces", &Lines::spaces);
  bind_for<uint8_t>(m, lines, "encode8");
  bind_for<uint16_t>(m, lines, "encode16");
  bind_for<uint32_t>(m, lines, "encode32");
  bind_windows<uint8_t, uint8_t>(m);
  bind_windows<uint16_t, int32_t>(m);
  bind_windows<int32_t, int32_t>(m);
}

}  // namespace charlm

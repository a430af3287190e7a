// The grams of all lengths, from windows in sorted order: as levels of a trie, in memory or in files, or as numbers of
// grams with each count.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "ngrams/ngram_runs.h"
#include "ngrams/ngram_windows.h"

namespace charlm::ngrams {

struct Options {
  int64_t max_length;   // of a gram, at least 1
  int64_t starts;       // windows start at tokens 0 … starts - 1; at most the number of tokens
  int64_t boundary;     // a token, or -1
  int64_t threads;      // at least 1
  size_t buffer_bytes;  // of all threads together

  // Counting on disk: open files for the runs, and for the columns of each level in turn. Empty: counting in memory.
  std::vector<int> run_files = {}, level_files = {};
  Checks checks = {};

  bool on_disk() const { return !run_files.empty(); }
  // On disk, a quarter of the buffer is for writing: of what is read and sorted, and of the levels.
  size_t write_bytes() const { return std::min<size_t>(buffer_bytes / 8, 1 << 20); }
  size_t sort_bytes() const { return on_disk() ? buffer_bytes / 4 * 3 : buffer_bytes; }
};

// Values in memory, or in a file behind a buffer.
template <class T>
class Column {
 public:
  Column() = default;
  Column(int file, size_t buffered) : file_(file), buffered_(buffered) { values_.reserve(buffered); }

  void push_back(T value) {
    values_.push_back(value);
    if (values_.size() == buffered_) flush();
  }

  void flush() {
    if (file_ < 0) return;
    write_all(file_, values_.data(), sizeof(T) * values_.size());
    values_.clear();
  }

  std::vector<T>& values() { return values_; }

 private:
  int file_ = -1;
  size_t buffered_ = ~size_t{0};
  std::vector<T> values_;
};

// The grams of one length, sorted. A gram is its prefix, given by the index in the previous level, and its last token.
struct Level {
  Column<int64_t> parent;  // 0 in the first level
  Column<int32_t> token;
  Column<int64_t> count;
};

// The number of grams with each count.
using Spectrum = std::map<int64_t, int64_t>;

struct Spectra {
  std::vector<Spectrum> grams;     // of length 1 … max_length
  std::vector<Spectrum> contexts;  // of length 0 … max_length - 1, counted if another token follows in the window
};

// ---- counting

// Receives keys in sorted order. Holds the prefixes of the current key, one gram of each length, and closes a gram at
// the first key that does not start with it.
class Grams {
 public:
  explicit Grams(const Layout& layout)
      : layout_(layout), previous_(layout.words), count_(layout.length + 1), followed_(layout.length + 1) {}
  virtual ~Grams() = default;

  // Adds `windows` windows with this key, which must be larger than the previous key.
  void add(const uint64_t* key, int64_t windows) {
    const int64_t shared = open_ ? layout_.shared(key, previous_.data()) : 0;
    close_to(shared);
    const int64_t length = layout_.window_length(key);
    for (int64_t place = shared; place < length; ++place) opened(place + 1, layout_.id(key, place));
    open_ = length;
    count_[length] += windows;
    std::copy_n(key, layout_.words, previous_.data());
  }

  void finish() {
    close_to(0);
    closed(0, count_[0], followed_[0]);
  }

 private:
  void close_to(int64_t length) {
    for (; open_ > length; --open_) {
      closed(open_, count_[open_], followed_[open_]);
      count_[open_ - 1] += count_[open_];
      followed_[open_ - 1] += count_[open_];
      count_[open_] = followed_[open_] = 0;
    }
  }

  virtual void opened(int64_t length, uint64_t id) = 0;
  // followed: how many of the counted windows are longer than the gram.
  virtual void closed(int64_t length, int64_t count, int64_t followed) = 0;

  const Layout& layout_;
  std::vector<uint64_t> previous_;
  int64_t open_ = 0;                       // the length of the longest gram that is open
  std::vector<int64_t> count_, followed_;  // by length
};

class LevelGrams final : public Grams {
 public:
  LevelGrams(const Layout& layout, const std::vector<int32_t>& tokens, const Options& options)
      : Grams(layout), tokens_(tokens), levels_(layout.length), current_(layout.length) {
    if (!options.on_disk()) return;
    const size_t buffered = std::clamp<size_t>(options.buffer_bytes / 8 / 20 / levels_.size(), 1, 1 << 16);
    const int* file = options.level_files.data();
    for (Level& level : levels_) {
      level.parent = {*file++, buffered};
      level.token = {*file++, buffered};
      level.count = {*file++, buffered};
    }
  }

  std::vector<Level> result() {
    for (Level& level : levels_) {
      level.parent.flush();
      level.token.flush();
      level.count.flush();
    }
    return std::move(levels_);
  }

 private:
  // The gram of a length that is open, or the last one that was.
  struct Current {
    int64_t index = -1;
    int32_t token;
  };

  void opened(int64_t length, uint64_t id) override {
    ++current_[length - 1].index;
    current_[length - 1].token = tokens_[id];
  }

  void closed(int64_t length, int64_t count, int64_t) override {
    if (length == 0) return;
    Level& level = levels_[length - 1];
    level.parent.push_back(length == 1 ? 0 : current_[length - 2].index);
    level.token.push_back(current_[length - 1].token);
    level.count.push_back(count);
  }

  const std::vector<int32_t>& tokens_;  // by id
  std::vector<Level> levels_;
  std::vector<Current> current_;  // by length - 1
};

class SpectraGrams final : public Grams {
 public:
  SpectraGrams(const Layout& layout, const std::vector<int32_t>&, const Options&)
      : Grams(layout), grams_(layout.length + 1), contexts_(layout.length + 1) {}

  Spectra result() const {
    Spectra spectra;
    for (size_t length = 1; length < grams_.size(); ++length) {
      spectra.grams.push_back(grams_[length].all());
      spectra.contexts.push_back(contexts_[length - 1].all());
    }
    return spectra;
  }

 private:
  class Counter {
   public:
    void add(int64_t count) { ++(count < kSmall ? small_[count] : large_[count]); }

    Spectrum all() const {
      Spectrum all = large_;
      for (int64_t count = 1; count < kSmall; ++count) {
        if (small_[count] > 0) all[count] = small_[count];
      }
      return all;
    }

   private:
    static constexpr int64_t kSmall = 1024;  // most counts are smaller
    std::vector<int64_t> small_ = std::vector<int64_t>(kSmall);
    Spectrum large_;
  };

  void opened(int64_t, uint64_t) override {}

  void closed(int64_t length, int64_t count, int64_t followed) override {
    grams_[length].add(count);
    if (followed > 0) contexts_[length].add(followed);
  }

  std::vector<Counter> grams_, contexts_;  // by length
};

}  // namespace charlm::ngrams

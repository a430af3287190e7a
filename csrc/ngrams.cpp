#include "ngrams.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>

namespace charlm::ngrams {
namespace {

constexpr int kDigitBits = 16;  // of the histograms that cut the range of keys
constexpr uint64_t kAllOnes = ~uint64_t{0};

// ---- keys

// How a window becomes `words` words: `per_word` ids of `bits` bits each, the first one highest, the rest of the word
// 0. Ids begin at 1: where the window has ended stands 0, which sorts a gram before those that it is a prefix of.
struct Layout {
  Layout(int64_t distinct, int64_t max_length)
      : length(max_length),
        bits(std::bit_width(static_cast<uint64_t>(distinct))),
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
    return word * per_word + (64 - std::countr_zero(key[word]) + bits - 1) / bits;
  }

  // The length of the common prefix of two keys that differ.
  int64_t shared(const uint64_t* a, const uint64_t* b) const {
    int64_t word = 0;
    while (a[word] == b[word]) ++word;
    return word * per_word + std::countl_zero(a[word] ^ b[word]) / bits;
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
uint64_t* radix_sort(uint64_t* keys, uint64_t* scratch, size_t size) {
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

// ---- counting

// Keeps the grams that the keys at hand are in, one of each length, and closes each when a key comes that is not.
class Grams {
 public:
  explicit Grams(const Layout& layout)
      : layout_(layout), previous_(layout.words), count_(layout.length + 1), followed_(layout.length + 1) {}
  virtual ~Grams() = default;

  // `windows` windows have this key, which is above the one before.
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
  // followed: how many of the windows that are counted go on.
  virtual void closed(int64_t length, int64_t count, int64_t followed) = 0;

  const Layout& layout_;
  std::vector<uint64_t> previous_;
  int64_t open_ = 0;                       // the length of the longest gram that is open
  std::vector<int64_t> count_, followed_;  // by length
};

class LevelGrams final : public Grams {
 public:
  LevelGrams(const Layout& layout, const std::vector<int32_t>& tokens)
      : Grams(layout), tokens_(tokens), levels_(layout.length) {}

  std::vector<Level> result() { return std::move(levels_); }

 private:
  void opened(int64_t length, uint64_t id) override {
    Level& level = levels_[length - 1];
    level.parent.push_back(length == 1 ? 0 : static_cast<int64_t>(levels_[length - 2].token.size()) - 1);
    level.token.push_back(tokens_[id]);
    level.count.push_back(0);
  }

  void closed(int64_t length, int64_t count, int64_t) override {
    if (length > 0) levels_[length - 1].count.back() = count;
  }

  const std::vector<int32_t>& tokens_;  // by id
  std::vector<Level> levels_;
};

class SpectraGrams final : public Grams {
 public:
  SpectraGrams(const Layout& layout, const std::vector<int32_t>&)
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
    static constexpr int64_t kSmall = 1024;  // nearly all counts
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

// ---- threads

// Runs prepare(thread, task) on many threads, and then consume(thread, task), one at a time in the order of tasks.
void run_in_order(int64_t threads, size_t tasks, const std::function<void(int64_t, size_t)>& prepare,
                  const std::function<void(int64_t, size_t)>& consume) {
  std::atomic<size_t> next = 0;
  size_t turn = 0;
  std::exception_ptr error;
  std::mutex mutex;
  std::condition_variable turned;
  const auto work = [&](int64_t thread) {
    for (size_t task; (task = next++) < tasks;) {
      std::exception_ptr own;
      try {
        prepare(thread, task);
      } catch (...) {
        own = std::current_exception();
      }
      std::unique_lock lock(mutex);
      turned.wait(lock, [&] { return turn == task; });
      if (!own && !error) {
        lock.unlock();  // nobody else's turn comes before this one ends
        try {
          consume(thread, task);
        } catch (...) {
          own = std::current_exception();
        }
        lock.lock();
      }
      if (own && !error) error = own;
      if (error) next = tasks;
      ++turn;
      turned.notify_all();
    }
  };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

template <bool kOneWord, class Id>
void count_sequence(const Sequence<Id>& sequence, const Layout& layout, const Options& options, Grams& grams) {
  using PartSorter = Sorter<kOneWord, Id>;
  const uint64_t share = options.buffer_bytes / options.threads / PartSorter::bytes_per_key(layout);
  const uint64_t capacity = std::clamp<uint64_t>(share, 1, std::max<uint64_t>(sequence.starts, 1));
  const std::vector<Part> parts = Cutter<kOneWord, Id>(sequence, layout, capacity).cut();
  const int64_t threads = std::min<int64_t>(options.threads, parts.size());
  std::vector<PartSorter> sorters;
  for (int64_t thread = 0; thread < threads; ++thread) sorters.emplace_back(sequence, layout, capacity);

  const auto prepare = [&](int64_t thread, size_t task) {
    if (parts[task].windows <= capacity) sorters[thread].sort(parts[task]);
  };
  const auto consume = [&](int64_t thread, size_t task) {
    const Part& part = parts[task];
    if (part.windows > capacity) {
      std::vector<uint64_t> key = part.prefix;
      key.push_back(part.low);
      return grams.add(key.data(), part.windows);
    }
    const PartSorter& keys = sorters[thread];
    for (uint64_t begin = 0, end = 1; begin < part.windows; begin = end++) {
      while (end < part.windows && std::equal(keys[begin], keys[begin] + layout.words, keys[end])) ++end;
      grams.add(keys[begin], end - begin);
    }
  };
  run_in_order(threads, parts.size(), prepare, consume);
  grams.finish();
}

// ---- tokens

// The token of each id; the token of 0, which is no id, is -1.
template <class Token>
std::vector<int32_t> distinct_tokens(const Token* tokens, size_t size) {
  std::vector<bool> seen(size ? size_t{*std::max_element(tokens, tokens + size)} + 1 : 0);
  for (size_t i = 0; i < size; ++i) seen[tokens[i]] = true;
  std::vector<int32_t> distinct = {-1};
  for (size_t token = 0; token < seen.size(); ++token) {
    if (seen[token]) distinct.push_back(static_cast<int32_t>(token));
  }
  return distinct;
}

template <class Id, class Token>
void count_as(const Token* tokens, size_t size, const std::vector<int32_t>& distinct, const Layout& layout,
              const Options& options, Grams& grams) {
  std::vector<Id> ids(distinct.back() + 1);  // by token
  for (size_t id = 1; id < distinct.size(); ++id) ids[distinct[id]] = static_cast<Id>(id);
  const bool bounded = options.boundary >= 0 && options.boundary < static_cast<int64_t>(ids.size());
  Sequence<Id> sequence{std::vector<Id>(size), static_cast<size_t>(options.starts),
                        bounded ? ids[options.boundary] : Id{0}};
  std::transform(tokens, tokens + size, sequence.ids.begin(), [&](Token token) { return ids[token]; });
  const auto count = layout.words == 1 ? count_sequence<true, Id> : count_sequence<false, Id>;
  count(sequence, layout, options, grams);
}

// The result of Kind, a class of Grams; the ids take the smallest type that holds them.
template <class Kind, class Token>
auto count_tokens(const Token* tokens, size_t size, const Options& options) {
  const std::vector<int32_t> distinct = distinct_tokens(tokens, size);
  const Layout layout(std::max<int64_t>(distinct.size() - 1, 1), options.max_length);
  Kind grams(layout, distinct);
  if (options.starts > 0) {
    const auto count = distinct.size() <= 256     ? count_as<uint8_t, Token>
                       : distinct.size() <= 65536 ? count_as<uint16_t, Token>
                                                  : count_as<uint32_t, Token>;
    count(tokens, size, distinct, layout, options, grams);
  }
  return grams.result();
}

}  // namespace

template <class Token>
std::vector<Level> count(const Token* tokens, size_t size, const Options& options) {
  return count_tokens<LevelGrams>(tokens, size, options);
}

template <class Token>
Spectra count_spectra(const Token* tokens, size_t size, const Options& options) {
  return count_tokens<SpectraGrams>(tokens, size, options);
}

template std::vector<Level> count(const uint8_t*, size_t, const Options&);
template std::vector<Level> count(const uint16_t*, size_t, const Options&);
template std::vector<Level> count(const uint32_t*, size_t, const Options&);
template Spectra count_spectra(const uint8_t*, size_t, const Options&);
template Spectra count_spectra(const uint16_t*, size_t, const Options&);
template Spectra count_spectra(const uint32_t*, size_t, const Options&);

}  // namespace charlm::ngrams

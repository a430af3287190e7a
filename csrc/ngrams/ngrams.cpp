// Counts the n-grams of a sequence of tokens, for every length up to max_length, in one pass over sorted windows.
//
// A window is a run of at most max_length tokens from a starting token on. It ends at the end of the sequence or, if
// there is a boundary token, after the first boundary that follows its first token. In sorted order, all windows that
// start with a gram are adjacent, for any length of the gram: the number of windows with a common prefix is the count
// of that gram. The grams of all lengths are the nodes of a trie, visited in order in one pass over the sorted windows.
//
// The windows are never all in memory. A window is packed into 64-bit words, with as many tokens in each as fit.
// Histograms of 16 bits at a time divide the range of these keys into parts whose windows fit in a buffer; each part is
// collected, sorted and counted. Threads process the parts, and their counts are consumed in the order of the keys, so
// that the result does not depend on the number of threads.
//
// Time: O(n) for each part and n tokens, and a radix sort.
// Memory: 1, 2 or 4 bytes per token for up to 255, 65,535 or more distinct tokens, 4 bytes for each value up to the
// largest token, buffer_bytes, and the result.
#include <pybind11/numpy.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "ngrams/ngram_sort.h"
#include "ngrams/ngram_windows.h"

namespace charlm {
namespace ngrams {
namespace {

// Tokens are smaller than this, since counting uses a table of all values.
constexpr int64_t kMaxTokens = int64_t{1} << 24;

struct Options {
  int64_t max_length;   // of a gram, at least 1
  int64_t starts;       // windows start at tokens 0 … starts - 1; at most the number of tokens
  int64_t boundary;     // a token, or -1
  int64_t threads;      // at least 1
  size_t buffer_bytes;  // of all threads together
};

// The grams of one length, sorted. A gram is its prefix, given by the index in the previous level, and its last token.
struct Level {
  std::vector<int64_t> parent;  // 0 in the first level
  std::vector<int32_t> token;
  std::vector<int64_t> count;
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

// ---- threads

// Runs prepare(thread, task) for the tasks in parallel, then consume(thread, task), one task at a time and in order.
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
        lock.unlock();  // no other thread takes a turn until this one ends
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

// Adds the sorted keys, each with the number of its windows.
template <int kWords>
void add_sorted(const KeySorter<kWords>& keys, int64_t words,
                const std::function<void(const uint64_t*, int64_t)>& add) {
  for (size_t begin = 0, end = 1; begin < keys.size(); begin = end++) {
    while (end < keys.size() && std::equal(keys[begin], keys[begin] + words, keys[end])) ++end;
    add(keys[begin], end - begin);
  }
}

template <int kWords, class Id>
void count_sequence(const Sequence<Id>& sequence, const Layout& layout, const Options& options, Grams& grams) {
  using Sorter = KeySorter<kWords>;
  const uint64_t share = options.buffer_bytes / options.threads / Sorter::bytes_per_key(layout);
  const uint64_t capacity = std::clamp<uint64_t>(share, 1, std::max<uint64_t>(sequence.starts, 1));
  const std::vector<Part> parts = Cutter<kWords, Id>(sequence, layout, capacity).cut();
  const int64_t threads = std::min<int64_t>(options.threads, parts.size());
  std::vector<Sorter> sorters;
  for (int64_t thread = 0; thread < threads; ++thread) sorters.emplace_back(layout, capacity);

  const auto prepare = [&](int64_t thread, size_t task) {
    if (parts[task].windows > capacity) return;
    sorters[thread].collect(parts[task], sequence, layout);
    sorters[thread].sort();
  };
  const auto consume = [&](int64_t thread, size_t task) {
    const Part& part = parts[task];
    if (part.windows > capacity) return grams.add(part.low.data(), part.windows);  // they have one key
    add_sorted(sorters[thread], layout.words, [&](const uint64_t* key, int64_t windows) { grams.add(key, windows); });
  };
  run_in_order(threads, parts.size(), prepare, consume);
  grams.finish();
}

// ---- tokens

// The token of each id. Entry 0 is -1, since ids start at 1.
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
  std::vector<Id> all(size);
  std::transform(tokens, tokens + size, all.begin(), [&](Token token) { return ids[token]; });
  const Sequence<Id> sequence{all.data(), size, static_cast<size_t>(options.starts),
                              bounded ? ids[options.boundary] : Id{0}};
  const auto count = layout.words == 1   ? count_sequence<1, Id>
                     : layout.words == 2 ? count_sequence<2, Id>
                                         : count_sequence<0, Id>;
  count(sequence, layout, options, grams);
}

// Counts into a Kind, a subclass of Grams, and returns its result. Ids have the smallest type that holds them.
template <class Kind, class Token>
auto count(const Token* tokens, size_t size, const Options& options) {
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

// ---- Python: functions of numpy arrays; charlm/ngrams.py checks the arguments

namespace py = pybind11;

// A one-dimensional array that takes ownership of the vector.
template <class T>
py::array_t<T> as_array(std::vector<T>&& values) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  const std::vector<T>& kept = *owned;
  const py::capsule owner(owned.get(), [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
  owned.release();
  return py::array_t<T>(kept.size(), kept.data(), owner);
}

// (counts, the number of grams with each count).
py::tuple as_arrays(const Spectrum& spectrum) {
  std::vector<int64_t> counts, grams;
  for (const auto& [count, number] : spectrum) {
    counts.push_back(count);
    grams.push_back(number);
  }
  return py::make_tuple(as_array(std::move(counts)), as_array(std::move(grams)));
}

py::list as_arrays(const std::vector<Spectrum>& spectra) {
  py::list list;
  for (const Spectrum& spectrum : spectra) list.append(as_arrays(spectrum));
  return list;
}

template <class Token>
using Tokens = py::array_t<Token, py::array::c_style>;

template <class Token>
py::list count_ngrams(const Tokens<Token>& tokens, int64_t max_length, int64_t starts, int64_t boundary,
                      int64_t threads, size_t buffer_bytes) {
  std::vector<Level> levels;
  {
    const py::gil_scoped_release release;
    levels = count<LevelGrams>(tokens.data(), tokens.size(), {max_length, starts, boundary, threads, buffer_bytes});
  }
  py::list list;
  for (Level& level : levels) {
    list.append(py::make_tuple(as_array(std::move(level.parent)), as_array(std::move(level.token)),
                               as_array(std::move(level.count))));
  }
  return list;
}

template <class Token>
py::tuple count_spectra(const Tokens<Token>& tokens, int64_t max_length, int64_t threads, size_t buffer_bytes) {
  Spectra spectra;
  {
    const py::gil_scoped_release release;
    spectra = count<SpectraGrams>(tokens.data(), tokens.size(),
                                  {max_length, tokens.size(), /*boundary=*/-1, threads, buffer_bytes});
  }
  return py::make_tuple(as_arrays(spectra.grams), as_arrays(spectra.contexts));
}

template <class Token>
void bind_for(py::module_& m) {
  using py::arg;
  m.def("count_ngrams", &count_ngrams<Token>, arg("tokens").noconvert(), arg("max_length"), arg("starts"),
        arg("boundary"), arg("threads"), arg("buffer_bytes"));
  m.def("count_spectra", &count_spectra<Token>, arg("tokens").noconvert(), arg("max_length"), arg("threads"),
        arg("buffer_bytes"));
}

}  // namespace
}  // namespace ngrams

void bind_ngrams(pybind11::module_& m) {
  using namespace ngrams;
  bind_for<uint8_t>(m);
  bind_for<uint16_t>(m);
  bind_for<uint32_t>(m);
  m.attr("max_ngram_tokens") = kMaxTokens;
}

}  // namespace charlm

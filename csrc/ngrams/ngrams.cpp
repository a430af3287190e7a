#include "ngrams/ngrams.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

#include "ngrams/ngram_windows.h"

namespace charlm::ngrams {
namespace {

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

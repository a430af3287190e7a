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
// Counting on disk keeps neither the tokens nor the result in memory. A run of windows that start one after the other
// is sorted in the buffer and written to a file with the number of windows of each key; then all runs are merged. The
// result goes to files.
//
// Time: O(n) for each part and n tokens, and a radix sort; on disk, O(n log runs).
// Memory: 1, 2 or 4 bytes per token for up to 255, 65,535 or more distinct tokens, 4 bytes for each value up to the
// largest token, buffer_bytes, and the result; on disk, buffer_bytes, which include the table of tokens.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "ngrams/ngram_grams.h"
#include "ngrams/ngram_runs.h"
#include "ngrams/ngram_sort.h"
#include "ngrams/ngram_windows.h"

namespace charlm {

void bind_byte_model(pybind11::module_& m);  // byte_model.cpp

namespace ngrams {
namespace {

// Tokens are smaller than this, since counting uses a table of all values.
constexpr int64_t kMaxTokens = int64_t{1} << 24;

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
void add_sorted(const KeySorter<kWords>& keys, int64_t words, const Add& add) {
  for (size_t begin = 0, end = 1; begin < keys.size(); begin = end++) {
    while (end < keys.size() && std::equal(keys[begin], keys[begin] + words, keys[end])) ++end;
    add(keys[begin], end - begin);
  }
}

template <int kWords, class Id>
void count_sequence(const Sequence<Id>& sequence, const Layout& layout, const Options& options, Grams& grams) {
  using Sorter = KeySorter<kWords>;
  const uint64_t share = options.sort_bytes() / options.threads / Sorter::bytes_per_key(layout);
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
}

// ---- tokens

// A strided array.
template <class Token>
struct Tokens {
  const Token* data;
  size_t size;
  ptrdiff_t step;

  Token operator[](size_t i) const { return data[static_cast<ptrdiff_t>(i) * step]; }
};

// The token of each id. Entry 0 is -1, since ids start at 1.
template <class Token>
std::vector<int32_t> distinct_tokens(const Tokens<Token>& tokens) {
  std::vector<bool> seen;
  for (size_t i = 0; i < tokens.size; ++i) {
    if (tokens[i] >= seen.size()) seen.resize(size_t{tokens[i]} + 1);
    seen[tokens[i]] = true;
  }
  std::vector<int32_t> distinct = {-1};
  for (size_t token = 0; token < seen.size(); ++token) {
    if (seen[token]) distinct.push_back(static_cast<int32_t>(token));
  }
  return distinct;
}

// Counts through sorted runs in a file. ids: by token.
template <int kWords, class Id, class Token>
void count_runs(const Tokens<Token>& tokens, const std::vector<Id>& ids, Id boundary, const Layout& layout,
                const Options& options, Grams& grams) {
  using Sorter = KeySorter<kWords>;
  const int files[] = {options.run_files[0], options.run_files[1]};
  const auto add_gram = [&](const uint64_t* key, int64_t windows) { grams.add(key, windows); };
  std::vector<Run> runs;
  {
    const size_t ahead = layout.length - 1;  // tokens behind the last start of a run
    const size_t share = options.sort_bytes() / options.threads, reserved = ahead * sizeof(Id);
    const size_t free = share > reserved ? share - reserved : 0, starts = options.starts;
    const size_t capacity = std::clamp<size_t>(free / (Sorter::bytes_per_key(layout) + sizeof(Id)), 1, starts);
    const size_t tasks = (starts + capacity - 1) / capacity;
    const int64_t threads = std::min<int64_t>(options.threads, tasks);
    std::vector<Sorter> sorters;
    for (int64_t thread = 0; thread < threads; ++thread) sorters.emplace_back(layout, capacity);
    std::vector<std::vector<Id>> chunks(threads, std::vector<Id>(capacity + ahead));
    RunWriter writer(files[0], layout.words, options.write_bytes());

    const auto prepare = [&](int64_t thread, size_t task) {
      if (thread == 0) options.checks.signals();
      const size_t begin = task * capacity, size = std::min(capacity, starts - begin);
      const size_t end = std::min(begin + size + ahead, tokens.size);
      std::vector<Id>& chunk = chunks[thread];
      for (size_t i = begin; i < end; ++i) chunk[i - begin] = ids[tokens[i]];
      const Sequence<Id> sequence{chunk.data(), end - begin, size, boundary};
      sorters[thread].collect(all_keys(layout, size), sequence, layout);
      sorters[thread].sort();
    };
    const auto consume = [&](int64_t thread, size_t task) {
      if (tasks == 1) return add_sorted(sorters[thread], layout.words, add_gram);
      add_sorted(sorters[thread], layout.words,
                 [&](const uint64_t* key, int64_t windows) { writer.add(key, windows); });
      writer.end();
      if (task == 0) options.checks.space(writer.runs()[0].end * (tasks - 1));  // the others are about as long
    };
    run_in_order(threads, tasks, prepare, consume);
    runs = writer.runs();
  }
  if (!runs.empty()) merge_all(files, runs, layout.words, options.sort_bytes(), add_gram, options.checks);
}

template <class Id, class Token>
void count_as(const Tokens<Token>& tokens, const std::vector<int32_t>& distinct, const Layout& layout, Options options,
              Grams& grams) {
  std::vector<Id> ids(distinct.back() + 1);  // by token
  for (size_t id = 1; id < distinct.size(); ++id) ids[distinct[id]] = static_cast<Id>(id);
  const bool bounded = options.boundary >= 0 && options.boundary < static_cast<int64_t>(ids.size());
  const Id boundary = bounded ? ids[options.boundary] : Id{0};
  if (options.on_disk()) {
    const size_t tables = ids.size() * sizeof(Id) + distinct.size() * sizeof(int32_t);
    options.buffer_bytes -= std::min(options.buffer_bytes, tables);
    const auto count = layout.words == 1   ? count_runs<1, Id, Token>
                       : layout.words == 2 ? count_runs<2, Id, Token>
                                           : count_runs<0, Id, Token>;
    return count(tokens, ids, boundary, layout, options, grams);
  }
  std::vector<Id> all(tokens.size);
  for (size_t i = 0; i < tokens.size; ++i) all[i] = ids[tokens[i]];
  const Sequence<Id> sequence{all.data(), all.size(), static_cast<size_t>(options.starts), boundary};
  const auto count = layout.words == 1   ? count_sequence<1, Id>
                     : layout.words == 2 ? count_sequence<2, Id>
                                         : count_sequence<0, Id>;
  count(sequence, layout, options, grams);
}

// Counts into a Kind, a subclass of Grams, and returns its result. Ids have the smallest type that holds them.
template <class Kind, class Token>
auto count(const Tokens<Token>& tokens, const Options& options) {
  const std::vector<int32_t> distinct = distinct_tokens(tokens);
  const Layout layout(std::max<int64_t>(distinct.size() - 1, 1), options.max_length);
  Kind grams(layout, distinct, options);
  if (options.starts > 0) {
    const auto count = distinct.size() <= 256     ? count_as<uint8_t, Token>
                       : distinct.size() <= 65536 ? count_as<uint16_t, Token>
                                                  : count_as<uint32_t, Token>;
    count(tokens, distinct, layout, options, grams);
    grams.finish();
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
Tokens<Token> view(const py::array_t<Token, 0>& tokens) {
  return {tokens.data(), static_cast<size_t>(tokens.size()),
          tokens.strides(0) / static_cast<py::ssize_t>(sizeof(Token))};
}

// Calls count() without the GIL. Raises OSError for a file, and what a signal raises.
template <class Count>
auto run(const Count& count) {
  try {
    const py::gil_scoped_release release;
    return count();
  } catch (const std::system_error& error) {
    const py::tuple arguments = py::make_tuple(error.code().value(), error.what());
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
    throw py::error_already_set();
  }
}

void check_signals() {
  const py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

template <class Token>
py::list count_ngrams(const py::array_t<Token, 0>& tokens, int64_t max_length, int64_t starts, int64_t boundary,
                      int64_t threads, size_t buffer_bytes, std::vector<int> run_files,
                      std::function<void(uint64_t)> check_space, std::vector<int> level_files) {
  Options options{max_length, starts, boundary, threads, buffer_bytes};
  options.run_files = std::move(run_files);
  options.level_files = std::move(level_files);
  options.checks = {check_signals, std::move(check_space)};
  std::vector<Level> levels = run([&] { return count<LevelGrams>(view(tokens), options); });
  py::list list;
  for (Level& level : levels) {
    list.append(py::make_tuple(as_array(std::move(level.parent.values())), as_array(std::move(level.token.values())),
                               as_array(std::move(level.count.values()))));
  }
  return list;
}

template <class Token>
py::tuple count_spectra(const py::array_t<Token, 0>& tokens, int64_t max_length, int64_t threads, size_t buffer_bytes,
                        std::vector<int> run_files, std::function<void(uint64_t)> check_space) {
  Options options{max_length, tokens.size(), /*boundary=*/-1, threads, buffer_bytes};
  options.run_files = std::move(run_files);
  options.checks = {check_signals, std::move(check_space)};
  const Spectra spectra = run([&] { return count<SpectraGrams>(view(tokens), options); });
  return py::make_tuple(as_arrays(spectra.grams), as_arrays(spectra.contexts));
}

template <class Token>
void bind_for(py::module_& m) {
  using py::arg;
  m.def("count_ngrams", &count_ngrams<Token>, arg("tokens").noconvert(), arg("max_length"), arg("starts"),
        arg("boundary"), arg("threads"), arg("buffer_bytes"), arg("run_files"), arg("check_space"), arg("level_files"));
  m.def("count_spectra", &count_spectra<Token>, arg("tokens").noconvert(), arg("max_length"), arg("threads"),
        arg("buffer_bytes"), arg("run_files"), arg("check_space"));
}

}  // namespace
}  // namespace ngrams

void bind_ngrams(pybind11::module_& m) {
  using namespace ngrams;
  bind_for<uint8_t>(m);
  bind_for<uint16_t>(m);
  bind_for<uint32_t>(m);
  m.attr("max_ngram_tokens") = kMaxTokens;
  bind_byte_model(m);
}

}  // namespace charlm

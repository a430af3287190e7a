// Sorted runs of keys in a file, and their merge.
//
// A run is a sequence of records in the order of their keys, which differ. A record is the words of a key and the
// number of its windows, 8 (W + 1) bytes. Runs lie one after the other in a file without a name, which the caller has
// opened.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <system_error>
#include <vector>

namespace charlm::ngrams {

// Called with a key and the number of its windows.
using Add = std::function<void(const uint64_t* key, int64_t windows)>;

// What the caller may stop; both functions may throw.
struct Checks {
  std::function<void()> signals;        // called now and then by the thread of the caller
  std::function<void(uint64_t)> space;  // called before that many bytes of runs are written
};

inline void write_all(int file, const void* data, size_t bytes) {
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(file, at, bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) throw std::system_error(errno, std::generic_category(), "writing a temporary file");
    at += written;
    bytes -= written;
  }
}

// The place of a run in its file, in bytes.
struct Run {
  uint64_t begin, end;
};

class RunWriter {
 public:
  RunWriter(int file, int64_t words, size_t buffer_bytes) : file_(file), words_(words) {
    buffer_.reserve(std::max<size_t>(buffer_bytes / 8, words + 1));
  }

  void add(const uint64_t* key, int64_t windows) {
    if (buffer_.size() + words_ + 1 > buffer_.capacity()) flush();
    buffer_.insert(buffer_.end(), key, key + words_);
    buffer_.push_back(windows);
  }

  // Ends a run.
  void end() {
    flush();
    runs_.push_back({runs_.empty() ? 0 : runs_.back().end, written_});
  }

  const std::vector<Run>& runs() const { return runs_; }

 private:
  void flush() {
    write_all(file_, buffer_.data(), 8 * buffer_.size());
    written_ += 8 * buffer_.size();
    buffer_.clear();
  }

  const int file_;
  const size_t words_;
  uint64_t written_ = 0;
  std::vector<uint64_t> buffer_;
  std::vector<Run> runs_;
};

class RunReader {
 public:
  RunReader(int file, Run run, size_t record, size_t buffer_bytes)
      : file_(file), run_(run), record_(record), buffer_(std::max<size_t>(buffer_bytes / 8 / record, 1) * record) {
    next();
  }

  bool done() const { return at_ == size_; }
  const uint64_t* key() const { return buffer_.data() + at_; }
  int64_t windows() const { return buffer_[at_ + record_ - 1]; }

  void next() {
    at_ += record_;
    if (at_ < size_) return;
    at_ = size_ = 0;
    const size_t bytes = std::min<uint64_t>(8 * buffer_.size(), run_.end - run_.begin);
    for (size_t read = 0; read < bytes;) {
      const ssize_t got =
          ::pread(file_, reinterpret_cast<char*>(buffer_.data()) + read, bytes - read, run_.begin + read);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) throw std::system_error(got < 0 ? errno : EIO, std::generic_category(), "reading a temporary file");
      read += got;
    }
    run_.begin += bytes;
    size_ = bytes / 8;
  }

 private:
  const int file_;
  Run run_;  // what is not yet in the buffer
  const size_t record_;
  size_t at_ = 0, size_ = 0;  // of the buffer, in words
  std::vector<uint64_t> buffer_;
};

// Merges the runs: add() receives each key once, in order, with the sum of its windows.
inline void merge_runs(int file, const Run* runs, size_t size, int64_t words, size_t buffer_bytes, const Add& add,
                       const Checks& checks) {
  constexpr uint64_t kCheckEvery = 1 << 16;
  std::vector<RunReader> readers;
  readers.reserve(size);
  for (size_t i = 0; i < size; ++i) readers.emplace_back(file, runs[i], words + 1, buffer_bytes / size);
  const auto after = [&](size_t a, size_t b) {
    const uint64_t *x = readers[a].key(), *y = readers[b].key();
    return std::lexicographical_compare(y, y + words, x, x + words);
  };
  std::vector<size_t> heap;  // the reader with the smallest key first
  for (size_t i = 0; i < size; ++i) {
    if (!readers[i].done()) heap.push_back(i);
  }
  std::make_heap(heap.begin(), heap.end(), after);
  std::vector<uint64_t> key(words);
  int64_t windows = 0;
  for (uint64_t step = 1; !heap.empty(); ++step) {
    if (step % kCheckEvery == 0) checks.signals();
    std::pop_heap(heap.begin(), heap.end(), after);
    RunReader& reader = readers[heap.back()];
    if (windows > 0 && !std::equal(key.begin(), key.end(), reader.key())) {
      add(key.data(), windows);
      windows = 0;
    }
    if (windows == 0) std::copy_n(reader.key(), words, key.begin());
    windows += reader.windows();
    reader.next();
    if (reader.done()) {
      heap.pop_back();
    } else {
      std::push_heap(heap.begin(), heap.end(), after);
    }
  }
  if (windows > 0) add(key.data(), windows);
}

// Merges all runs of files[0], in several passes where there are more than buffers of kReadBytes; a pass writes fewer
// and longer runs to the other file.
inline void merge_all(const int (&files)[2], std::vector<Run> runs, int64_t words, size_t buffer_bytes, const Add& add,
                      const Checks& checks) {
  constexpr size_t kReadBytes = 1 << 18;
  const size_t fan_in = std::max<size_t>(buffer_bytes / kReadBytes, 3) - 1;  // and one buffer to write
  int from = 0;
  for (; runs.size() > fan_in; from = 1 - from) {
    checks.space(runs.back().end);
    RunWriter writer(files[1 - from], words, buffer_bytes / (fan_in + 1));
    for (size_t i = 0; i < runs.size(); i += fan_in) {
      merge_runs(
          files[from], runs.data() + i, std::min(fan_in, runs.size() - i), words, buffer_bytes / (fan_in + 1) * fan_in,
          [&](const uint64_t* key, int64_t n) { writer.add(key, n); }, checks);
      writer.end();
    }
    runs = writer.runs();
    if (::ftruncate(files[from], 0) != 0 || ::lseek(files[from], 0, SEEK_SET) != 0) {
      throw std::system_error(errno, std::generic_category(), "emptying a temporary file");
    }
  }
  merge_runs(files[from], runs.data(), runs.size(), words, buffer_bytes, add, checks);
}

}  // namespace charlm::ngrams

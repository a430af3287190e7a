// Counts of the n-grams of a sequence of tokens, of every length up to max_length, in one pass over sorted windows.
//
// A window is what begins at one token: at most max_length tokens, cut short by the end of the sequence and, where
// there is a boundary, after the first boundary behind its first token. Sorted, the windows that begin with one gram
// stand together, whatever its length: a run of windows with a common prefix is a gram, its length the count. So the
// grams of all lengths are the nodes of a trie, met in order while one list of sorted windows goes by.
//
// No list of all windows exists at any time. A window is packed into 64-bit words, as many tokens in each as fit; the
// range of these keys is cut, by histograms of 16 bits at a time, until the windows of each part fit into a buffer,
// and each part is then collected, sorted and counted. Threads take the parts in turn and pass on what they counted in
// the order of the keys, so that the result does not depend on their number.
//
// Time: O(n) for each part, n tokens; a radix sort of every window that fits into one word, else O(n log n).
// Memory: 1, 2 or 4 bytes a token for up to 255, 65,535 and more distinct ones, 4 bytes for each value up to the
// largest token, buffer_bytes, and the result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace charlm::ngrams {

// Tokens are below this: one table of them all is kept while counting.
constexpr int64_t kMaxTokens = int64_t{1} << 24;

struct Options {
  int64_t max_length;   // of a gram, at least 1
  int64_t starts;       // windows begin at tokens 0 … starts - 1, at most the number of tokens
  int64_t boundary;     // a token, or -1
  int64_t threads;      // at least 1
  size_t buffer_bytes;  // of all threads together
};

// The grams of one length, sorted: each is a gram one token shorter, by its place in the level before, and a token.
struct Level {
  std::vector<int64_t> parent;  // 0 in the first level
  std::vector<int32_t> token;
  std::vector<int64_t> count;
};

// How many grams there are of each count.
using Spectrum = std::map<int64_t, int64_t>;

struct Spectra {
  std::vector<Spectrum> grams;     // of length 1 … max_length
  std::vector<Spectrum> contexts;  // of length 0 … max_length - 1, counted where another token follows in the window
};

// Token: uint8_t, uint16_t or uint32_t.
template <class Token>
std::vector<Level> count(const Token* tokens, size_t size, const Options& options);

template <class Token>
Spectra count_spectra(const Token* tokens, size_t size, const Options& options);

}  // namespace charlm::ngrams

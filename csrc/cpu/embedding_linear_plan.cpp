// What the folded and the gathered first layer cost, in nanoseconds on two threads of the machine of bench/NOTES.md,
// fitted to 419 measured choices of each pass. The choice depends on ratios of these times only, which vary far less
// between machines than the times do; `python -m bench plans` shows how much longer than the better one it takes.
#include "embedding_linear_plan.h"

#include <unistd.h>

#include <algorithm>

#include "gemm.h"

namespace charlm {
namespace {

double cache_size(int name, double otherwise) {
  const long bytes = name >= 0 ? sysconf(name) : 0;
  return bytes > 0 ? static_cast<double>(bytes) : otherwise;
}

#ifdef _SC_LEVEL3_CACHE_SIZE
constexpr int kSecondLevel = _SC_LEVEL2_CACHE_SIZE, kThirdLevel = _SC_LEVEL3_CACHE_SIZE;
#else
constexpr int kSecondLevel = -1, kThirdLevel = -1;
#endif

struct Work {
  explicit Work(const EmbeddingLinearSizes& s)
      : tokens(static_cast<double>(s.n_rows) * s.n_places * s.embedding_dim),
        outputs(static_cast<double>(s.n_rows) * s.hidden),
        sums(outputs * s.n_places),
        weight(static_cast<double>(s.hidden) * s.n_places * s.embedding_dim),
        table(static_cast<double>(s.vocabulary) * s.n_places * s.hidden),
        embedding(static_cast<double>(s.vocabulary) * s.embedding_dim),
        n_rows(static_cast<double>(s.n_rows)),
        inner(static_cast<double>(s.n_places) * s.embedding_dim),
        dim(static_cast<double>(s.embedding_dim)),
        bytes(table * s.element_size) {}

  bool table_fits_second_level() const {
    static const double size = cache_size(kSecondLevel, 512 << 10);
    return bytes <= size;
  }

  // Whether gather and GEMM is a product with a short side, which our own loops run (gemm.h).
  bool has_short_product() const { return n_rows >= 16 && (n_rows <= kShort || inner <= kShort); }

  // Of a number of a row, wherever the table lies.
  double per_sum(double second_level, double third_level, double memory) const {
    // Most of the last level belongs to others; and for an EPYC of eight parts of 32 MiB, sysconf says 256.
    static const double share = std::min(cache_size(kThirdLevel, 32 << 20) / 4, 8.0 * (1 << 20));
    return table_fits_second_level() ? second_level : bytes <= share ? third_level : memory;
  }

  double tokens;     // N T D
  double outputs;    // N H
  double sums;       // N T H
  double weight;     // T D H
  double table;      // V T H
  double embedding;  // V D
  double n_rows;     // N
  double inner;      // T D
  double dim;        // D
  double bytes;      // of the table
};

}  // namespace

Plan choose_forward_plan(const EmbeddingLinearSizes& sizes) {
  const Work w(sizes);
  const double written = w.table_fits_second_level() ? 0.25 : 0.14;
  const double folded = 9.3e3 + 0.54 * w.weight + (0.032 * w.dim + written) * w.table +
                        w.per_sum(0.022, 0.092, 0.12) * w.sums + 0.33 * w.outputs;
  const double product = w.has_short_product() ? 0.0091 : 0.013;
  const double gathered =
      13e3 + 0.39 * w.weight + product * w.sums * w.dim + 0.45 * w.tokens + 0.37 * w.outputs + 0.033 * w.embedding;
  return folded < gathered ? Plan::kFolded : Plan::kGathered;
}

Plan choose_backward_plan(const EmbeddingLinearSizes& sizes) {
  const Work w(sizes);
  const double written = w.table_fits_second_level() ? 1.1 : 1.3;
  const double folded = 66e3 + 0.23 * w.weight + (0.02 * w.dim + written) * w.table +
                        w.per_sum(0.018, 0.032, 0.68) * w.sums + 0.59 * w.outputs;
  const double gathered =
      55e3 + 0.57 * w.weight + 0.029 * w.sums * w.dim + 3.2 * w.tokens + 0.57 * w.outputs + 0.48 * w.embedding;
  return folded < gathered ? Plan::kFolded : Plan::kGathered;
}

}  // namespace charlm

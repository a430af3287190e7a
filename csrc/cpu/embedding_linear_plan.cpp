// What the folded and the gathered first layer cost, in nanoseconds on two threads of the machine of bench/NOTES.md,
// fitted to a grid of 136 sizes. The choice depends on ratios of these times only, which vary far less between machines
// than the times do; `python -m bench fold` shows it beside the measured break-even.
#include "embedding_linear_plan.h"

#include <unistd.h>

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
        dim(s.embedding_dim),
        bytes(table * s.element_size) {}

  bool table_fits_second_level() const {
    static const double size = cache_size(kSecondLevel, 512 << 10);
    return bytes <= size;
  }

  // Of a row's numbers, wherever the table lies: most of the last level belongs to others.
  double per_sum() const {
    static const double third_level = cache_size(kThirdLevel, 32 << 20);
    return table_fits_second_level() ? 0.03 : bytes <= third_level / 4 ? 0.06 : 0.25;
  }

  double tokens;     // N T D
  double outputs;    // N H
  double sums;       // N T H
  double weight;     // T D H
  double table;      // V T H
  double embedding;  // V D
  double dim;        // D
  double bytes;      // of the table
};

}  // namespace

Plan choose_forward_plan(const EmbeddingLinearSizes& sizes) {
  const Work w(sizes);
  const double written = w.table_fits_second_level() ? 0 : 0.1;
  const double folded =
      32e3 + 0.3 * w.weight + (0.03 * w.dim + written) * w.table + w.per_sum() * w.sums + 0.6 * w.outputs;
  const double gathered = 15e3 + 0.5 * w.weight + 0.015 * w.sums * w.dim + 0.7 * w.tokens + 0.5 * w.outputs;
  return folded < gathered ? Plan::kFolded : Plan::kGathered;
}

Plan choose_backward_plan(const EmbeddingLinearSizes& sizes) {
  const Work w(sizes);
  const double written = w.table_fits_second_level() ? 0.3 : 1.6;
  const double folded = 60e3 + w.weight + (0.03 * w.dim + written) * w.table + w.per_sum() * w.sums + 0.8 * w.outputs;
  const double gathered =
      16e3 + 0.7 * w.weight + 0.028 * w.sums * w.dim + 1.5 * w.tokens + 1.5 * w.outputs + 3 * w.embedding;
  return folded < gathered ? Plan::kFolded : Plan::kGathered;
}

}  // namespace charlm

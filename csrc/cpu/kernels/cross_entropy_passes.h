// The functions that the adapter calls: the choice of the row type or of tiles, and the loops over rows.
#pragma once

#include "cross_entropy_tiles.h"

namespace charlm::CHARLM_ISA {

template <class T>
bool is_transformed(const CrossEntropyRows<T>& rows) {
  return rows.logit_scale != 1 || rows.softcap > 0;
}

// Calls f.template operator()<Row>() with the row type that these options need.
template <Dense kDense, class T, class F>
auto with_row_type_of(const CrossEntropyRows<T>& rows, F f) {
  return is_transformed(rows) ? f.template operator()<CrossEntropyRow<T, true, kDense>>()
                              : f.template operator()<CrossEntropyRow<T, false, kDense>>();
}

template <class T, class F>
auto with_probability_row_type(const CrossEntropyRows<T>& rows, F f) {
  return rows.weight ? with_row_type_of<Dense::kWeightedProbability>(rows, f)
                     : with_row_type_of<Dense::kProbability>(rows, f);
}

template <class T, class F>
auto with_row_type(const CrossEntropyRows<T>& rows, F f) {
  if (!rows.target) return with_probability_row_type(rows, f);
  if (rows.label_smoothing == 0) return with_row_type_of<Dense::kNone>(rows, f);
  return rows.weight ? with_row_type_of<Dense::kWeight>(rows, f) : with_row_type_of<Dense::kUniform>(rows, f);
}

// Rows [begin, end) one by one; returns the sum of their losses.
template <class T, Pass kPass>
double walk_rows(const CrossEntropyRows<T>& rows, Compute<T>* scratch, int64_t begin, int64_t end) {
  return with_row_type(rows, [&]<class Row>() {
    double sum = 0;
    for (int64_t n = begin; n < end; n++) {
      const Row row(rows, n);
      if constexpr (kPass == Pass::kBackward) {
        row.backward();
      } else {
        const Compute<T> loss = kPass == Pass::kForward ? row.forward() : row.forward_backward(scratch);
        if (rows.loss) store_one(rows.loss + n, loss);
        if (rows.unrounded_loss) rows.unrounded_loss[n] = loss;
        sum += loss;
      }
    }
    return sum;
  });
}

// The same in tiles, where that is possible.
template <class T, Pass kPass>
double walk(const CrossEntropyRows<T>& rows, Compute<T>* scratch, int64_t begin, int64_t end) {
  double sum = 0;
  if (end - begin >= kTileRows && is_tiled(rows, kPass != Pass::kForward)) {
    CrossEntropyTile<T, kPass> tile(rows);
    for (; begin + kTileRows <= end; begin += kTileRows) {
      if (!tile(begin)) sum += walk_rows<T, kPass>(rows, scratch, begin, begin + kTileRows);
    }
    sum += tile.total();
  }
  return sum + walk_rows<T, kPass>(rows, scratch, begin, end);
}

template <class T>
double cross_entropy_forward(const CrossEntropyRows<T>& rows, int64_t begin, int64_t end) {
  return walk<T, Pass::kForward>(rows, nullptr, begin, end);
}

template <class T>
double cross_entropy_forward_backward(const CrossEntropyRows<T>& rows, Compute<T>* scratch, int64_t begin,
                                      int64_t end) {
  return walk<T, Pass::kForwardBackward>(rows, scratch, begin, end);
}

template <class T>
void cross_entropy_backward(const CrossEntropyRows<T>& rows, int64_t begin, int64_t end) {
  walk<T, Pass::kBackward>(rows, nullptr, begin, end);
}

template <class T>
void cross_entropy_target_backward(const CrossEntropyRows<T>& rows, int64_t begin, int64_t end) {
  with_probability_row_type(rows, [&]<class Row>() {
    for (int64_t n = begin; n < end; n++) Row(rows, n).target_backward();
  });
}

// Metrics do not look at the targets: any row type will do.
template <class T>
void cross_entropy_metrics(const CrossEntropyRows<T>& rows, const CrossEntropyMetrics<T>& out, int64_t begin,
                           int64_t end) {
  with_row_type_of<Dense::kProbability>(rows, [&]<class Row>() {
    for (int64_t n = begin; n < end; n++) Row(rows, n).metrics(out);
  });
}

// The number of targets in [begin, end) that are to be ignored, or -1 if one is neither that nor a class. Written
// without a branch per target, so that it becomes vector code.
inline int64_t count_ignored(const int64_t* target, int64_t begin, int64_t end, int64_t n_classes, bool may_ignore,
                             int64_t ignore_index) {
  int64_t ignored = 0, bad = 0;
  for (int64_t n = begin; n < end; n++) {
    const int64_t is_ignored = (target[n] == ignore_index) & may_ignore;
    ignored += is_ignored;
    bad |= ((target[n] < 0) | (target[n] >= n_classes)) & ~is_ignored;
  }
  return bad & 1 ? -1 : ignored;
}

}  // namespace charlm::CHARLM_ISA

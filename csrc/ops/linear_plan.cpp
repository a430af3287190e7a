// How linear_cross_entropy divides its logits on a GPU: the plan of the shortest estimated time within the budget.
//
//   whole      the budget holds the logits [N, V]                    3 products
//   rows       a block of rows at a time; dW is summed over blocks   3 products; half types: a float copy of dW
//   classes    a tile of classes at a time, twice; dX is summed      4 products; half types: a float copy of dX
//
// Each product of a block or tile reads or adds up a whole matrix, which costs the more the shorter its side is. On an
// H200, bf16, 8192 x 2304 -> 256000, three products took 1.36, 1.15 and 1.05 times that of whole logits with 1024, 2048
// and 4096 rows and a sum in float: about 1 + 330 / side. Without dW: 1.48, 1.09 and 1.02 with 128, 512 and 2048.
#include "ops/linear_plan.h"

#include <algorithm>
#include <limits>

namespace charlm {
namespace {

constexpr double kShortSideOfSums = 330, kShortSide = 60;
constexpr int64_t kMaxTileClasses = 16384;  // a wider tile makes a product no faster, and fewer are kept
constexpr int64_t kTileMultiple = 64, kRowMultiple = 128;

constexpr double kNever = std::numeric_limits<double>::infinity();

double products(const LinearSizes& s) { return 1 + s.wants_input + s.wants_weight; }

// The estimated time, in products of whole logits.
double choose_rows(const LinearSizes& s, int64_t row_bytes, LinearPlan& plan) {
  const int64_t copy = s.is_half && s.wants_weight ? s.n_classes * s.n_features * 4 : 0;
  const int64_t left = copy < s.budget ? s.budget - copy : s.budget;
  int64_t rows = std::clamp<int64_t>(left / row_bytes, 1, std::max<int64_t>(1, s.n_rows));
  if (rows > kRowMultiple) rows -= rows % kRowMultiple;
  plan.block_rows = rows;
  if (copy >= s.budget) return kNever;
  return products(s) * (1 + (s.wants_weight ? kShortSideOfSums : kShortSide) / static_cast<double>(rows));
}

// Tiles of `classes`: their number, and of these as many as can be kept.
LinearPlan tiles_of(const LinearSizes& s, int64_t classes, int64_t left) {
  const int64_t n_tiles = (s.n_classes + classes - 1) / classes;
  const int64_t logits = s.n_rows * (classes + class_multiple(s.element_size)), gradient = classes * s.n_features;
  LinearPlan plan{.tile_classes = classes, .kept = 1};
  if (!s.with_gradients) return plan;
  plan.kept = std::clamp<int64_t>(left / (logits * s.element_size), 1, n_tiles);
  if (!s.wants_weight || gradient == 0) return plan;
  // The tiles in the memory of dW lie at its end, in order. Tile k writes its rows of dW after the tiles before it were
  // read, but before its own logits may be overwritten:
  //   (kept + k + 1) * gradient <= V * D - (kept_in_weight - k) * logits     for k in [0, kept_in_weight)
  const int64_t all = s.n_classes * s.n_features;
  const int64_t room = logits >= gradient ? (all - (plan.kept + 1) * gradient) / logits
                                          : (all - logits - plan.kept * gradient) / gradient;
  plan.kept_in_weight = std::clamp<int64_t>(room, 0, n_tiles - plan.kept);
  return plan;
}

double choose_tiles(const LinearSizes& s, LinearPlan& best) {
  const int64_t class_bytes = s.n_rows * s.element_size;
  const int64_t left = s.budget - (s.is_half && s.wants_input ? s.n_rows * s.n_features * 4 : 0);
  const int64_t most = std::min(kMaxTileClasses, left / class_bytes - class_multiple(s.element_size));
  double best_time = kNever;
  if (!s.may_tile || left <= 0) return best_time;
  // The widths of this and of narrower tiles differ in how many are kept.
  for (int64_t classes = most / kTileMultiple * kTileMultiple, last = classes / 3; classes > last;
       classes -= kTileMultiple) {
    const LinearPlan plan = tiles_of(s, classes, left);
    const double kept = static_cast<double>((plan.kept + plan.kept_in_weight) * classes);
    const double again = s.with_gradients ? std::max(0.0, 1 - kept / static_cast<double>(s.n_classes)) : 0;
    const double side = s.wants_input ? kShortSideOfSums : kShortSide;
    const double time = (products(s) + again) * (1 + side / static_cast<double>(classes));
    if (time >= best_time) continue;
    best_time = time;
    best = plan;
  }
  return best_time;
}

}  // namespace

LinearPlan choose_linear_plan_on_gpu(const LinearSizes& s) {
  const int64_t row_bytes = padded_classes(s.n_classes, s.element_size) * s.element_size;
  if (row_bytes == 0 || s.n_rows <= s.budget / row_bytes) return {.block_rows = std::max<int64_t>(1, s.n_rows)};
  LinearPlan rows, tiles;
  const double rows_time = choose_rows(s, row_bytes, rows), tiles_time = choose_tiles(s, tiles);
  return tiles_time < rows_time ? tiles : rows;
}

}  // namespace charlm

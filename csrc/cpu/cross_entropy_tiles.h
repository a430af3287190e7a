// Cross-entropy of a small vocabulary, in tiles of 16 rows; and at the end the kernels, which choose between tiles and
// single rows. Row by row (cross_entropy_rows.h), 27 classes leave lanes of the last vector empty, and each row waits
// for its maximum before its first exponential. In a tile
//   - 16 rows of V contiguous classes are V * 16 / lanes whole vectors, so that no lane is wasted on exponentials;
//   - no maximum is subtracted: the exponentials of the logits themselves are summed. If the sum of a row or the
//     exponential of its target leaves the range in which this is as exact, the tile is computed row by row;
//   - the loss log(S / exp(z_y)), the factor g / S of the gradient, sums and targets are computed for a vector of rows
//     at once, without a branch for ignored rows;
//   - rows of up to kTileMaxFixed vectors are summed and written by loops of fixed length.
// Only for contiguous rows and class indices without smoothing, z-loss, softcap or logit_scale.
#pragma once

#include "cpu/cross_entropy_rows.h"

namespace charlm::CHARLM_ISA {

constexpr int kTileRows = 16;  // a multiple of every number of lanes
constexpr int kTileMaxClasses = 256;
constexpr int kTileMaxFixed = 9;  // vectors in a row; 65 classes take nine vectors of eight lanes

template <class T>
bool is_tiled(const CrossEntropyParams<T>& params, bool with_gradient) {
  return params.has_class_indices && params.n_classes <= kTileMaxClasses && params.logits_stride == params.n_classes &&
         (!with_gradient || params.grad_stride == params.n_classes) && params.label_smoothing == 0 &&
         params.lse_square_scale == 0 && params.logit_scale == 1 && params.softcap == 0 && !params.grad_lse &&
         !params.grad_entropy;
}

template <class T, CrossEntropyPass kPass>
class CrossEntropyTile {
  using C = Compute<T>;
  using V = Vec<C>;
  using PerRow = C[kTileRows];
  static constexpr bool kLoss = kPass != CrossEntropyPass::kBackward, kGradient = kPass != CrossEntropyPass::kForward;

 public:
  explicit CrossEntropyTile(const CrossEntropyParams<T>& params)
      : params_(params), v_(params.n_classes), common_grad_loss_(kGradient ? scaled(*params.grad_loss) : C(0)) {}

  // Rows [n, n + 16). Returns false and writes nothing if they must be computed row by row.
  bool operator()(int64_t n) {
    exponentials(params_.logits + n * v_, kGradient ? params_.grad + n * v_ : nullptr);
    PerRow sum, factor, difference, loss;
    with_row_vectors([&](auto count) { row_sums(count, sum); });
    targets(n);
    Mask<C> good = ~Mask<C>{};
    for (int r = 0; r < kTileRows; r += kLanes<C>) {
      const auto of_tile = [r](const PerRow& x) { return load(x + r, Whole{}); };
      const Mask<C> counted = of_tile(counted_) != 0;
      const V s = of_tile(sum), p = select<C>(counted, of_tile(at_target_) / s, broadcast<C>(1));
      const V w = is_weighted() ? of_tile(weight_) : of_tile(counted_);
      good &= (s > kSmallestSum) & (s < kLargestSum) & (p > kSmallestProbability);
      store(loss + r, V(w * (V{} - log<C>(p))), Whole{});  // +0 where p is 1
      if constexpr (kGradient) {
        const V outer = params_.grad_loss_stride == 0 ? broadcast<C>(common_grad_loss_) : of_tile(grad_loss_);
        const V g = select<C>(counted, outer * w, V{});
        store(factor + r, V(g / s), Whole{});
        store(difference + r, V(g * (p - 1)), Whole{});
      }
    }
    if (any<C>(~good)) return false;
    if constexpr (kLoss) {
      memset(params_.row_max + n, 0, sizeof sum);
      memcpy(params_.row_sum + n, sum, sizeof sum);
      for (int r = 0; r < kTileRows; r++) total_[r % kLanes<C>] += loss[r];
      for (int r = 0; params_.loss && r < kTileRows; r++) params_.loss[n + r] = loss[r];
    }
    if constexpr (kGradient) {
      T* const grad = params_.grad + n * v_;
      with_row_vectors([&](auto count) { gradients(count, grad, factor, difference); });
    }
    return true;
  }

  // The sum of the losses so far.
  double total() const {
    double sum = 0;
    for (const double part : total_) sum += part;
    return sum;
  }

 private:
  // The range of a tile. exp(80) and the sum of 256 of them are finite; a term below exp(-87), which exp may flush to
  // 0, is less than 2^-105 of the smallest sum; g / S is a normal number for any g above 1e-28. Outside these bounds
  // the maximum must be subtracted, as it must for a target whose probability is subnormal.
  static constexpr C kLargestLogit = 80, kSmallestSum = C(0x1p-20), kLargestSum = C(0x1p32),
                     kSmallestProbability = C(0x1p-100);

  // e_[r, c] = exp(z_rc), [16, V] as in memory
  void exponentials(const T* logits, const T* grad) {
    const int64_t size = kTileRows * v_;
    const auto step = [&]<int K>(int64_t i, Count<K>) {
      prefetch<K * kLanes<C> * sizeof(T)>(logits + size + i);
      if constexpr (kGradient) prefetch<K * kLanes<C> * sizeof(T)>(grad + i);
      V e[K];
      for (int k = 0; k < K; k++) {
        const V z = load(logits + i + k * kLanes<C>, Whole{});
        e[k] = min<C>(z, broadcast<C>(kLargestLogit));  // NaN becomes too large
      }
      exp<C, K>(e);
      for (int k = 0; k < K; k++) store(e_ + i + k * kLanes<C>, e[k], Whole{});
    };
    int64_t i = 0;
    for (; i + 4 * kLanes<C> <= size; i += 4 * kLanes<C>) {
      step(i, Count<2>{});
      step(i + 2 * kLanes<C>, Count<2>{});
    }
    for (; i < size; i += kLanes<C>) step(i, Count<1>{});
  }

  // Calls f(Count<K>) with the number of vectors of a row, for loops of fixed length, or f(Count<0>) if it exceeds
  // kTileMaxFixed.
  template <int K = 1, class F>
  void with_row_vectors(F&& f) const {
    if constexpr (K > kTileMaxFixed) {
      f(Count<0>{});
    } else if (v_ > K * kLanes<C>) {
      with_row_vectors<K + 1>(f);
    } else {
      f(Count<K>{});
    }
  }

  template <int K>
  void row_sums(Count<K>, PerRow& sum) const {
    const int64_t whole = K > 0 ? (K - 1) * kLanes<C> : (v_ - 1) / kLanes<C> * kLanes<C>;
    const Mask<C> last = first_lanes<C>(v_ - whole);
    for (int r = 0; r < kTileRows; r += kLanes<C>) {
      V s[kLanes<C>];
      for (int i = 0; i < kLanes<C>; i++) {
        const C* e = e_ + (r + i) * v_;
        // The lanes past the end of the row belong to the next row or to padding.
        V chain[4] = {select<C>(last, load(e + whole, Whole{}), V{})};
        // Four chains, since a shorter chain of additions rounds less.
        int64_t c = 0;
        for (; c + 4 * kLanes<C> <= whole; c += 4 * kLanes<C>) {
          for (int k = 0; k < 4; k++) chain[k] += load(e + c + k * kLanes<C>, Whole{});
        }
        for (; c < whole; c += kLanes<C>) chain[0] += load(e + c, Whole{});
        s[i] = (chain[0] + chain[1]) + (chain[2] + chain[3]);
      }
      store(sum + r, reduce_sums<C>(s), Whole{});
    }
  }

  C scaled(C grad_loss) const { return static_cast<C>(grad_loss * params_.grad_scale); }

  bool is_weighted() const { return params_.weight || params_.token_weight; }

  // An ignored row has weight 0, probability 1 in the logarithm, and gradient 0 even if the gradient of the loss is not
  // finite (1 / 0 if every row is ignored).
  void targets(int64_t n) {
    const int64_t* const target = params_.target.as_int64();
    for (int r = 0; r < kTileRows; r++) {  // vectorized by the compiler
      const int64_t y = target[n + r];
      target_[r] = static_cast<int>(y == params_.ignore_index ? 0 : y);
      counted_[r] = y == params_.ignore_index ? C(0) : C(1);
    }
    for (int64_t r = 0, row = 0; r < kTileRows; r++, row += v_) at_target_[r] = e_[row + target_[r]];
    for (int r = 0; is_weighted() && r < kTileRows; r++) {
      weight_[r] = counted_[r];
      if (params_.weight && counted_[r] != 0) weight_[r] = params_.weight[target[n + r]];
      if (params_.token_weight && counted_[r] != 0) weight_[r] *= params_.token_weight[n + r];
    }
    for (int r = 0; kGradient && params_.grad_loss_stride != 0 && r < kTileRows; r++) {
      grad_loss_[r] = scaled(params_.grad_loss[n + r]);
    }
  }

  // Writes whole vectors, which may reach into the next row, written later. The last vector of the tile begins earlier
  // instead, within its row if that is long enough.
  template <int K>
  void gradients(Count<K>, T* grad, const PerRow& factor, const PerRow& difference) const {
    const int64_t size = K > 0 ? K * kLanes<C> : (v_ + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
    const C* e = e_;
    T* row = grad;
    int r = 0;
    for (; (kTileRows - r) * v_ >= size; r++, e += v_, row += v_) {
      for (int64_t c = 0; c < size; c += kLanes<C>) store(row + c, V(load(e + c, Whole{}) * factor[r]), Whole{});
    }
    for (; r < kTileRows; r++, e += v_, row += v_) {
      const auto step = [&](int64_t c, auto width) { store(row + c, V(load(e + c, Whole{}) * factor[r]), width); };
      for (int64_t c = 0; c + kLanes<C> <= v_; c += kLanes<C>) step(c, Whole{});
      v_ < kLanes<C> ? step(0, Part{v_}) : step(v_ - kLanes<C>, Whole{});
    }
    row = grad;
    for (r = 0; r < kTileRows; r++, row += v_) store_one(row + target_[r], difference[r]);
  }

  const CrossEntropyParams<T>& params_;
  const int64_t v_;
  const C common_grad_loss_;  // for a reduced loss
  alignas(64) C e_[kTileRows * kTileMaxClasses + kLanes<C>];
  int target_[kTileRows];  // 0 where it is ignored
  PerRow counted_;         // 1, or 0 where the target is ignored
  PerRow at_target_, weight_, grad_loss_;
  double total_[kLanes<C>] = {};  // by row % kLanes: independent chains of additions
};

// -------------------------------------------------------------------------------------------------------- passes
// The choice of row type or tiles, and the loops over rows.

template <class T>
bool is_transformed(const CrossEntropyParams<T>& params) {
  return params.logit_scale != 1 || params.softcap > 0;
}

// Calls f.template operator()<Row>() with the row type for these options.
template <Dense kDense, class T, class F>
auto with_row_type_of(const CrossEntropyParams<T>& params, F f) {
  return is_transformed(params) ? f.template operator()<CrossEntropyRow<T, true, kDense>>()
                                : f.template operator()<CrossEntropyRow<T, false, kDense>>();
}

template <class T, class F>
auto with_probability_row_type(const CrossEntropyParams<T>& params, F f) {
  return params.weight ? with_row_type_of<Dense::kWeightedProbability>(params, f)
                       : with_row_type_of<Dense::kProbability>(params, f);
}

template <class T, class F>
auto with_row_type(const CrossEntropyParams<T>& params, F f) {
  if (!params.has_class_indices) return with_probability_row_type(params, f);
  if (params.label_smoothing == 0) return with_row_type_of<Dense::kNone>(params, f);
  return params.weight ? with_row_type_of<Dense::kWeight>(params, f) : with_row_type_of<Dense::kUniform>(params, f);
}

// Computes rows [begin, end) one by one; returns the sum of their losses.
template <class T, CrossEntropyPass kPass>
double pass_over_rows(const CrossEntropyParams<T>& params, Compute<T>* scratch, int64_t begin, int64_t end) {
  return with_row_type(params, [&]<class Row>() {
    double sum = 0;
    for (int64_t n = begin; n < end; n++) {
      const Row row(params, n);
      if constexpr (kPass == CrossEntropyPass::kBackward) {
        row.backward();
      } else {
        const Compute<T> loss = kPass == CrossEntropyPass::kForward ? row.forward() : row.forward_backward(scratch);
        if (params.loss) params.loss[n] = loss;
        sum += loss;
      }
    }
    return sum;
  });
}

// Computes rows [begin, end), in tiles where possible; returns the sum of their losses.
template <class T, CrossEntropyPass kPass>
double pass_over_tiles_and_rows(const CrossEntropyParams<T>& params, Compute<T>* scratch, int64_t begin, int64_t end) {
  double sum = 0;
  if (end - begin >= kTileRows && is_tiled(params, kPass != CrossEntropyPass::kForward)) {
    CrossEntropyTile<T, kPass> tile(params);
    for (; begin + kTileRows <= end; begin += kTileRows) {
      if (!tile(begin)) sum += pass_over_rows<T, kPass>(params, scratch, begin, begin + kTileRows);
    }
    sum += tile.total();
  }
  return sum + pass_over_rows<T, kPass>(params, scratch, begin, end);
}

template <class T>
int cross_entropy_forward(const CrossEntropyParams<T>& params, Launch& launch) {
  launch.sum = pass_over_tiles_and_rows<T, CrossEntropyPass::kForward>(params, nullptr, launch.begin, launch.end);
  return 0;
}

template <class T>
int cross_entropy_forward_backward(const CrossEntropyParams<T>& params, Launch& launch) {
  auto* const scratch = static_cast<Compute<T>*>(launch.scratch);
  launch.sum =
      pass_over_tiles_and_rows<T, CrossEntropyPass::kForwardBackward>(params, scratch, launch.begin, launch.end);
  return 0;
}

template <class T>
int cross_entropy_backward(const CrossEntropyParams<T>& params, Launch& launch) {
  pass_over_tiles_and_rows<T, CrossEntropyPass::kBackward>(params, nullptr, launch.begin, launch.end);
  return 0;
}

template <class T>
int cross_entropy_target_backward(const CrossEntropyParams<T>& params, Launch& launch) {
  with_probability_row_type(params, [&]<class Row>() {
    for (int64_t n = launch.begin; n < launch.end; n++) Row(params, n).target_backward();
  });
  return 0;
}

// The metrics do not depend on the targets, so the row type of probabilities serves for all.
template <class T>
int cross_entropy_metrics(const CrossEntropyParams<T>& params, Launch& launch) {
  with_row_type_of<Dense::kProbability>(params, [&]<class Row>() {
    for (int64_t n = launch.begin; n < launch.end; n++) Row(params, n).metrics();
  });
  return 0;
}

// The number of ignored targets in [begin, end), or -1 if one is neither ignored nor a class. Written without a branch
// per target, so that the compiler vectorizes it.
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

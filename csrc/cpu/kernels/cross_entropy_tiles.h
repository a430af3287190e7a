// Cross-entropy of a small vocabulary, a tile of 16 rows at a time. Row by row (cross_entropy_rows.h, the reference
// that this file is tested against), 27 classes leave lanes of their last vector empty, and each row waits for its
// maximum before its first exponential. Here
//   - 16 rows of V contiguous classes are V * 16 / lanes whole vectors: no lane is wasted on exponentials;
//   - no maximum is subtracted: the exponentials of the logits themselves are summed. Where a row's sum or its target's
//     exponential leaves the range in which that is as exact, the tile is done row by row after all;
//   - the loss is log(S / exp(z_y)), and a gradient's factor g / S, for 16 rows at once.
// Only for class indices without smoothing, z-loss, softcap or scale, of contiguous rows.
#pragma once

#include "cross_entropy_rows.h"

namespace charlm::CHARLM_ISA {

constexpr int kTileRows = 16;  // a multiple of every number of lanes
constexpr int kTileMaxClasses = 256;

template <class T>
bool is_tiled(const CrossEntropyRows<T>& rows, bool with_gradient) {
  return rows.target && rows.n_classes <= kTileMaxClasses && rows.logits_stride == rows.n_classes &&
         (!with_gradient || rows.grad_stride == rows.n_classes) && rows.label_smoothing == 0 &&
         rows.lse_square_scale == 0 && rows.logit_scale == 1 && rows.softcap == 0;
}

enum class Pass { kForward, kForwardBackward, kBackward };

template <class T, Pass kPass>
class CrossEntropyTile {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int kVectors = kTileRows / kLanes<C>;  // of one number per row
  static constexpr bool kLoss = kPass != Pass::kBackward, kGradient = kPass != Pass::kForward;

 public:
  explicit CrossEntropyTile(const CrossEntropyRows<T>& rows)
      : rows_(rows), v_(rows.n_classes), common_grad_loss_(kGradient ? scaled(*rows.grad_loss) : C(0)) {}

  // Rows [n, n + 16): adds their losses to `total`. False, and nothing is written, if they must go row by row.
  bool operator()(int64_t n, double& total) {
    exponentials(rows_.logits + n * v_, kGradient ? rows_.grad + n * v_ : nullptr);
    C sum[kTileRows], at_target[kTileRows], weight[kTileRows], grad_loss[kTileRows];
    row_sums(sum);
    targets(n, sum, at_target, weight, grad_loss);
    V loss[kVectors], factor[kVectors], difference[kVectors];
    Mask<C> good = ~Mask<C>{};
    for (int k = 0; k < kVectors; k++) {
      const V s = load(sum + k * kLanes<C>, Whole{}), e = load(at_target + k * kLanes<C>, Whole{});
      const V w = load(weight + k * kLanes<C>, Whole{}), p = e / s;
      good &= (s > kSmallestSum) & (s < kLargestSum) & (p > kSmallestProbability);
      loss[k] = w * (V{} - log<C>(p));  // +0 where p is 1
      if constexpr (kGradient) {
        const V g = load(grad_loss + k * kLanes<C>, Whole{});
        factor[k] = g / s;
        difference[k] = g * (p - 1);
      }
    }
    if (any<C>(~good)) return false;
    if constexpr (kLoss) {
      memset(rows_.row_max + n, 0, sizeof sum);
      memcpy(rows_.row_sum + n, sum, sizeof sum);
      C losses[kTileRows];
      memcpy(losses, loss, sizeof losses);
      for (int r = 0; r < kTileRows; r++) total += losses[r];
      for (int r = 0; rows_.loss && r < kTileRows; r++) store_one(rows_.loss + n + r, losses[r]);
    }
    if constexpr (kGradient) gradients(n, factor, difference);
    return true;
  }

 private:
  // exp(80) and the sum of 256 of them are finite; a term that is flushed to zero below exp(-87) is less than 2^-105 of
  // the smallest sum; g / S is a normal number for any g above 1e-28. Beyond these bounds the maximum is needed, and so
  // it is for a target so improbable that its logarithm would be one of a subnormal number.
  static constexpr C kLargestLogit = 80, kSmallestSum = C(0x1p-20), kLargestSum = C(0x1p32),
                     kSmallestProbability = C(0x1p-100);

  // e_[r, c] = exp(z_rc), [16, V] as in memory
  void exponentials(const T* logits, const T* grad) {
    const int64_t size = kTileRows * v_;
    for_each_vectors<C, 2>(size, [&]<int K>(int64_t i, auto width, Count<K>) {
      prefetch<K * kLanes<C> * sizeof(T)>(logits + size + i);
      if constexpr (kGradient) prefetch<K * kLanes<C> * sizeof(T)>(grad + i);
      V e[K];
      for (int k = 0; k < K; k++) {
        const V z = load(logits + i + k * kLanes<C>, width, C(0));
        e[k] = z < kLargestLogit ? z : broadcast<C>(kLargestLogit);  // NaN becomes too large as well
      }
      exp<C, K>(e);
      for (int k = 0; k < K; k++) store(e_ + i + k * kLanes<C>, e[k], Whole{});
    });
  }

  void row_sums(C* sum) const {
    const int64_t whole = v_ / kLanes<C> * kLanes<C>;
    const Mask<C> last = first_lanes<C>(v_ - whole);
    for (int r = 0; r < kTileRows; r++) {
      const C* e = e_ + r * v_;
      // What lies behind the row is another row, or padding.
      V s[4] = {select<C>(last, load(e + whole, Whole{}), V{})};
      int64_t c = 0;
      for (; c + 4 * kLanes<C> <= whole; c += 4 * kLanes<C>) {  // four chains: each addition to a long one rounds again
        for (int k = 0; k < 4; k++) s[k] += load(e + c + k * kLanes<C>, Whole{});
      }
      for (; c < whole; c += kLanes<C>) s[0] += load(e + c, Whole{});
      sum[r] = reduce_sum<C>((s[0] + s[1]) + (s[2] + s[3]));
    }
  }

  C scaled(C grad_loss) const { return static_cast<C>(grad_loss * rows_.grad_scale); }

  // An ignored row weighs nothing and, for the logarithm's sake, has probability 1. The gradient of a row's loss is
  // zero there too, whatever the others are multiplied by: 1 / 0, if every row is ignored.
  void targets(int64_t n, const C* sum, C* at_target, C* weight, C* grad_loss) const {
    for (int r = 0; r < kTileRows; r++) {
      const int64_t y = rows_.target[n + r];
      const bool ignored = y == rows_.ignore_index;
      at_target[r] = ignored ? sum[r] : e_[r * v_ + y];
      weight[r] = ignored ? C(0) : rows_.weight ? rows_.weight[y] : C(1);
      if (rows_.token_weight && !ignored) weight[r] *= rows_.token_weight[n + r];
      if constexpr (kGradient) {
        const C outer = rows_.grad_loss_stride == 0 ? common_grad_loss_ : scaled(rows_.grad_loss[n + r]);
        grad_loss[r] = ignored ? C(0) : outer * weight[r];
      }
    }
  }

  void gradients(int64_t n, const V* factors, const V* differences) const {
    C factor[kTileRows], difference[kTileRows];
    memcpy(factor, factors, sizeof factor);
    memcpy(difference, differences, sizeof difference);
    T* const grad = rows_.grad + n * v_;
    for (int r = 0; r < kTileRows; r++) {
      // Whole vectors that reach into the next rows, which are written after this one; parts at the end of the tile.
      const int64_t begin = r * v_, room = kTileRows * v_ - begin;
      int64_t c = 0;
      for (; c < v_ && c + kLanes<C> <= room; c += kLanes<C>) {
        store(grad + begin + c, V(load(e_ + begin + c, Whole{}) * factor[r]), Whole{});
      }
      if (c < v_) store(grad + begin + c, V(load(e_ + begin + c, Whole{}) * factor[r]), Part{v_ - c});
    }
    for (int r = 0; r < kTileRows; r++) {
      const int64_t y = rows_.target[n + r];
      if (y != rows_.ignore_index) store_one(grad + r * v_ + y, difference[r]);
    }
  }

  const CrossEntropyRows<T>& rows_;
  const int64_t v_;
  const C common_grad_loss_;  // for a reduced loss
  alignas(64) C e_[kTileRows * kTileMaxClasses + kLanes<C>];
};

}  // namespace charlm::CHARLM_ISA

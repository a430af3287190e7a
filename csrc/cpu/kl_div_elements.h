// kl_div on the CPU, element by element. The formulas stand in ops/kl_div.h.
#pragma once

#include "cpu/functions.h"
#include "ops/kl_div.h"

namespace charlm::CHARLM_ISA {

// log t and t of targets, given as such or as their logarithms.
template <class C, int K>
CHARLM_INLINE void read_targets(bool log_target, Vec<C> (&log_t)[K], Vec<C> (&t)[K]) {
  if (log_target) {
    for (int k = 0; k < K; k++) t[k] = log_t[k];
    exp_of_log_probabilities<C, K>(t);
    // exp is inexact where its result is subnormal, and then 0 for some that are not. Times an infinite difference of
    // logarithms that would be NaN, not infinity.
    constexpr bool kFloat = sizeof(C) == sizeof(float);
    constexpr C kSmallestLog = kFloat ? C(-103.27) : C(-744.44), kSmallest = kFloat ? C(0x1p-149f) : C(0x1p-1074);
    for (int k = 0; k < K; k++) {
      const Mask<C> is_lost = t[k] == 0, is_not_zero = log_t[k] > kSmallestLog;
      t[k] = select<C>(is_lost & is_not_zero, broadcast<C>(kSmallest), t[k]);
    }
  } else {
    for (int k = 0; k < K; k++) t[k] = log_t[k];
    for (int k = 0; k < K; k++) log_t[k] = log_of_probability<C>(t[k]);
  }
}

template <class T, class C = Compute<T>>
CHARLM_NOINLINE int kl_div_forward(const KlDivParams<T>& p, Launch& at) {
  const int64_t begin = at.begin, end = at.end;
  using V = Vec<C>;
  constexpr int64_t kChunk = 512;  // elements that are added up as C: the rounding of a sum grows with its length
  V largests{};
  double sum = 0;
  for (int64_t first = begin; first < end; first += kChunk) {
    V sums[2] = {};
    for_each_vectors<C, 2>(end - first < kChunk ? end - first : kChunk, [&]<int K>(int64_t i, auto width, Count<K>) {
      V x[K], log_t[K], t[K];
      // Past the end 0: exp(0) (0 - 0) and 0 log 0 - 0 * 0 are 0.
      for (int k = 0; k < K; k++) x[k] = load(p.input + first + i + k * kLanes<C>, width, C(0));
      for (int k = 0; k < K; k++) log_t[k] = load(p.target + first + i + k * kLanes<C>, width, C(0));
      read_targets<C, K>(p.log_target, log_t, t);
      for (int k = 0; k < K; k++) {
        largests = max<C>(x[k], largests);
        const V value =
            p.log_target ? V(t[k] * (log_t[k] - x[k])) : V(select<C>(t[k] == 0, V{}, t[k] * log_t[k]) - t[k] * x[k]);
        if (p.output) {
          store(p.output + first + i + k * kLanes<C>, value, width);
        } else {
          sums[k] += value;
        }
      }
    });
    sum += reduce_sum<C>(sums[0] + sums[1]);
  }
  at.largest = reduce_max<C>(largests);
  at.sum = sum;
  return 0;
}

template <class T, class C = Compute<T>>
CHARLM_NOINLINE int kl_div_backward(const KlDivParams<T>& p, Launch& at) {
  using V = Vec<C>;
  const int64_t begin = at.begin, end = at.end;
  for_each_vectors<C, 2>(end - begin, [&]<int K>(int64_t i, auto width, Count<K>) {
    const auto place = [&](int k) { return begin + i + k * kLanes<C>; };
    V g[K], log_t[K], t[K];
    for (int k = 0; k < K; k++) {
      g[k] = p.factor * (p.grad_stride ? load(p.grad_output + place(k), width, C(0)) : broadcast<C>(*p.grad_output));
    }
    for (int k = 0; k < K; k++) log_t[k] = load(p.target + place(k), width, C(0));
    read_targets<C, K>(p.log_target, log_t, t);
    for (int k = 0; p.grad_input && k < K; k++) store(p.grad_input + place(k), V(V{} - t[k] * g[k]), width);
    for (int k = 0; p.grad_target && k < K; k++) {
      // As torch's: t / t is NaN for 0 and infinity.
      const V difference = log_t[k] - load(p.input + place(k), width, C(0));
      const V value = p.log_target ? V((t[k] * difference + t[k]) * g[k]) : V((difference + t[k] / t[k]) * g[k]);
      store(p.grad_target + place(k), value, width);
    }
  });
  return 0;
}

}  // namespace charlm::CHARLM_ISA

// kl_div on the CPU, element by element. The formulas are in ops/kl_div.h.
#pragma once

#include "cpu/functions.h"
#include "ops/kl_div.h"

namespace charlm::CHARLM_ISA {

// Computes log t and t from a target in log_t, which is t or, with log_target, log t.
template <class C, int K>
CHARLM_INLINE void read_targets(bool log_target, Vec<C> (&log_t)[K], Vec<C> (&t)[K]) {
  if (log_target) {
    for (int k = 0; k < K; k++) t[k] = log_t[k];
    exp_of_log_probabilities<C, K>(t);
    // exp returns 0 for some inputs whose exponential is subnormal. Times an infinite difference of logarithms, 0 would
    // give NaN instead of infinity, so these results are set to the smallest number.
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
CHARLM_NOINLINE int kl_div_forward(const KlDivParams<T>& params, Launch& launch) {
  const int64_t begin = launch.begin, end = launch.end;
  using V = Vec<C>;
  constexpr int64_t kChunkElements = 512;  // elements summed in C; longer sums would round more
  V largests{};
  double sum = 0;
  for (int64_t first = begin; first < end; first += kChunkElements) {
    V sums[2] = {};
    for_each_vector_group<C, 2>(
        end - first < kChunkElements ? end - first : kChunkElements, [&]<int K>(int64_t i, auto width, Count<K>) {
          V x[K], log_t[K], t[K];
          // Lanes past the end are 0 and add nothing: exp(0) (0 - 0) and 0 log 0 - 0 * 0 are 0.
          for (int k = 0; k < K; k++) x[k] = load(params.input + first + i + k * kLanes<C>, width, C(0));
          for (int k = 0; k < K; k++) log_t[k] = load(params.target + first + i + k * kLanes<C>, width, C(0));
          read_targets<C, K>(params.log_target, log_t, t);
          for (int k = 0; k < K; k++) {
            largests = max<C>(x[k], largests);
            const V value = params.log_target ? V(t[k] * (log_t[k] - x[k]))
                                              : V(select<C>(t[k] == 0, V{}, t[k] * log_t[k]) - t[k] * x[k]);
            if (params.output) {
              store(params.output + first + i + k * kLanes<C>, value, width);
            } else {
              sums[k] += value;
            }
          }
        });
    sum += reduce_sum<C>(sums[0] + sums[1]);
  }
  launch.largest = reduce_max<C>(largests);
  launch.sum = sum;
  return 0;
}

template <class T, class C = Compute<T>>
CHARLM_NOINLINE int kl_div_backward(const KlDivParams<T>& params, Launch& launch) {
  using V = Vec<C>;
  const int64_t begin = launch.begin, end = launch.end;
  for_each_vector_group<C, 2>(end - begin, [&]<int K>(int64_t i, auto width, Count<K>) {
    const auto offset = [&](int k) { return begin + i + k * kLanes<C>; };
    V g[K], log_t[K], t[K];
    for (int k = 0; k < K; k++) {
      g[k] = params.factor * (params.grad_stride ? load(params.grad_output + offset(k), width, C(0))
                                                 : broadcast<C>(*params.grad_output));
    }
    for (int k = 0; k < K; k++) log_t[k] = load(params.target + offset(k), width, C(0));
    read_targets<C, K>(params.log_target, log_t, t);
    for (int k = 0; params.grad_input && k < K; k++) store(params.grad_input + offset(k), V(V{} - t[k] * g[k]), width);
    for (int k = 0; params.grad_target && k < K; k++) {
      // As in torch, t / t is NaN for 0 and infinity.
      const V difference = log_t[k] - load(params.input + offset(k), width, C(0));
      const V value = params.log_target ? V((t[k] * difference + t[k]) * g[k]) : V((difference + t[k] / t[k]) * g[k]);
      store(params.grad_target + offset(k), value, width);
    }
  });
  return 0;
}

}  // namespace charlm::CHARLM_ISA

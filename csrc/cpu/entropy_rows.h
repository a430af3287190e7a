// entropy on the CPU: rows with many classes one by one, rows with few classes a vector of rows at a time (cpu/rows.h).
// The formulas are in ops/entropy.h.
#pragma once

#include "cpu/rows.h"
#include "ops/entropy.h"

namespace charlm::CHARLM_ISA {

// m, S and sum_c exp(z_c - m) (m - z_c) of one row, in one pass over its chunks. If a chunk has a larger maximum, the
// sums so far are rescaled to it.
template <class T>
CHARLM_NOINLINE void entropy_sums_of_row(const EntropyParams<T>& params, int64_t n) {
  using C = Compute<T>;
  using V = Vec<C>;
  const T* const z = params.logits + n * params.logits_stride;
  C m = -INFINITY, sum = 0, distance = 0;
  for_each_chunk<C>(params.n_classes, [&](int64_t begin, int64_t size) {
    const C largest = max_of(z + begin, size);
    if (largest > m) {
      if (m != -INFINITY) {
        const C further = largest - m, scale = exp_of<C>(-further);
        distance = scale * (distance + further * sum);
        sum *= scale;
      }
      m = largest;
    }
    const C reference = m == -INFINITY ? C(0) : m;
    V sums[4] = {}, distances[4] = {};
    const auto step = [&]<int K>(int64_t c, auto width, Count<K>, int chain) {
      V t[K], e[K];
      for (int k = 0; k < K; k++) t[k] = load(z + c + k * kLanes<C>, width, C(-INFINITY)) - reference;
      for (int k = 0; k < K; k++) e[k] = t[k];
      exp<C, K>(e);
      for (int k = 0; k < K; k++) sums[chain + k] += e[k];
      for (int k = 0; k < K; k++) distances[chain + k] -= e[k] * max<C>(broadcast<C>(-kHuge<C>), t[k]);
    };
    for_each_vector_group<C, 4>(size, [&]<int K>(int64_t i, auto width, Count<K>) {
      if constexpr (K == 4) {  // two exponentials at a time
        step(begin + i, width, Count<2>{}, 0);
        step(begin + i + 2 * kLanes<C>, width, Count<2>{}, 2);
      } else {
        step(begin + i, width, Count<1>{}, 0);
      }
    });
    sum += reduce_sum<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    distance += reduce_sum<C>((distances[0] + distances[1]) + (distances[2] + distances[3]));
  });
  params.row_max[n] = m;
  params.row_sum[n] = sum;
  params.row_distance[n] = distance;
}

// The same for the kLanes rows from row n on.
template <class T>
CHARLM_NOINLINE void entropy_sums_of_columns(const EntropyParams<T>& params, int64_t n, Columns<T>& z) {
  using C = Compute<T>;
  using V = Vec<C>;
  z.read(params.logits + n * params.logits_stride, params.logits_stride);
  const V m = z.max(), reference = select<C>(m == -INFINITY, V{}, m);
  V sums[4] = {}, distances[4] = {};
  int chain = 0;
  for_each_classes<2>(params.n_classes, [&]<int K>(int64_t c, Count<K>) {
    V t[K], e[K];
    for (int k = 0; k < K; k++) e[k] = t[k] = z[c + k] - reference;
    exp<C, K>(e);
    for (int k = 0; k < K; k++) sums[chain + k] += e[k];
    for (int k = 0; k < K; k++) distances[chain + k] -= e[k] * max<C>(broadcast<C>(-kHuge<C>), t[k]);
    chain ^= 2;
  });
  store(params.row_max + n, m, Whole{});
  store(params.row_sum + n, V((sums[0] + sums[1]) + (sums[2] + sums[3])), Whole{});
  store(params.row_distance + n, V((distances[0] + distances[1]) + (distances[2] + distances[3])), Whole{});
}

template <class T>
int entropy_forward(const EntropyParams<T>& params, Launch& launch) {
  using C = Compute<T>;
  const int64_t begin = launch.begin, end = launch.end;
  Columns<T> z(params.n_classes);
  for_rows<C>(
      begin, end, params.n_classes, [&](int64_t n) { entropy_sums_of_columns(params, n, z); },
      [&](int64_t n) { entropy_sums_of_row(params, n); });
  // Logarithms for a vector of rows at once. A row without a softmax becomes NaN by 0 / 0.
  for_each_vector<C>(end - begin, [&](int64_t i, auto width) {
    const int64_t n = begin + i;
    const Vec<C> sum = load(params.row_sum + n, width, C(1));
    const Vec<C> distance = load(params.row_distance + n, width, C(0)) / sum;
    store(params.row_distance + n, distance, width);
    store(params.entropy + n, Vec<C>(log<C>(sum) + distance), width);
  });
  return 0;
}

// t[k] = dH / dz from t[k] = z - m, K vectors at once; factor = grad_output / S.
template <class C, int K>
CHARLM_INLINE void entropy_gradients(Vec<C> (&t)[K], Vec<C> distance, Vec<C> factor) {
  Vec<C> e[K];
  for (int k = 0; k < K; k++) e[k] = t[k];
  exp<C, K>(e);
  for (int k = 0; k < K; k++) {
    t[k] = (e[k] * factor) * (Vec<C>{} - max<C>(broadcast<C>(-kHuge<C>), t[k]) - distance);
  }
}

template <class T>
CHARLM_NOINLINE void entropy_backward_row(const EntropyParams<T>& params, int64_t n) {
  using C = Compute<T>;
  using V = Vec<C>;
  const T* const z = params.logits + n * params.logits_stride;
  T* const grad = params.grad + n * params.n_classes;
  const C m = params.row_max[n];
  const V distance = broadcast(params.row_distance[n]), factor = broadcast(params.grad_output[n] / params.row_sum[n]);
  for_each_vector_group<C, 2>(params.n_classes, [&]<int K>(int64_t c, auto width, Count<K>) {
    prefetch<K * kLanes<C> * sizeof(T)>(z + c + kPrefetchDistance<T>);
    V t[K];
    for (int k = 0; k < K; k++) t[k] = load(z + c + k * kLanes<C>, width, C(-INFINITY)) - m;
    entropy_gradients<C, K>(t, distance, factor);
    for (int k = 0; k < K; k++) store(grad + c + k * kLanes<C>, t[k], width);
  });
}

template <class T>
CHARLM_NOINLINE void entropy_backward_columns(const EntropyParams<T>& params, int64_t n, Columns<T>& z) {
  using C = Compute<T>;
  using V = Vec<C>;
  z.read(params.logits + n * params.logits_stride, params.logits_stride);
  const V m = load(params.row_max + n, Whole{}), distance = load(params.row_distance + n, Whole{});
  const V factor = load(params.grad_output + n, Whole{}) / load(params.row_sum + n, Whole{});
  for_each_classes<2>(params.n_classes, [&]<int K>(int64_t c, Count<K>) {
    V t[K];
    for (int k = 0; k < K; k++) t[k] = z[c + k] - m;
    entropy_gradients<C, K>(t, distance, factor);
    for (int k = 0; k < K; k++) z.set(c + k, t[k]);
  });
  z.write(params.grad + n * params.n_classes, params.n_classes);
}

template <class T>
int entropy_backward(const EntropyParams<T>& params, Launch& launch) {
  Columns<T> z(params.n_classes);
  for_rows<Compute<T>>(
      launch.begin, launch.end, params.n_classes, [&](int64_t n) { entropy_backward_columns(params, n, z); },
      [&](int64_t n) { entropy_backward_row(params, n); });
  return 0;
}

}  // namespace charlm::CHARLM_ISA

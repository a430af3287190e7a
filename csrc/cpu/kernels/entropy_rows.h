// Entropy, in nats, of the softmax of each row of logits z. With m = max_c z_c, S = sum_c exp(z_c - m), p_c =
// exp(z_c - m) / S and the mean distance d = sum_c p_c (m - z_c),
//   H = log S + d,    dH / dz_c = -p_c (log p_c + H) = p_c ((m - z_c) - d).
// Both terms of H are >= 0: nothing is cancelled, however far the logits are from zero. A class of z_c = -inf has p_c =
// 0 and adds nothing, 0 log 0 being 0; a row without any other has no softmax: NaN.
#pragma once

#include "columns.h"
#include "entropy.h"
#include "row_chunks.h"

namespace charlm::CHARLM_ISA {

// m, S and sum_c exp(z_c - m) (m - z_c) of one row, made in one walk over its chunks: sums that are relative to a
// smaller maximum are corrected when a larger comes.
template <class T>
CHARLM_NOINLINE void entropy_walk(const EntropyRows<T>& rows, int64_t n) {
  using C = Compute<T>;
  using V = Vec<C>;
  const T* const z = rows.logits + n * rows.logits_stride;
  C m = -INFINITY, sum = 0, distance = 0;
  for_each_chunk<C>(rows.n_classes, [&](int64_t begin, int64_t size) {
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
      for (int k = 0; k < K; k++) distances[chain + k] -= e[k] * max<C>(broadcast<C>(-kFar<C>), t[k]);
    };
    for_each_vectors<C, 4>(size, [&]<int K>(int64_t i, auto width, Count<K>) {
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
  rows.row_max[n] = m;
  rows.row_sum[n] = sum;
  rows.row_distance[n] = distance;
}

// The same of as many rows of few classes as a vector has lanes.
template <class T>
CHARLM_NOINLINE void entropy_walk_columns(const EntropyRows<T>& rows, int64_t n, Columns<T>& z) {
  using C = Compute<T>;
  using V = Vec<C>;
  z.read(rows.logits + n * rows.logits_stride, rows.logits_stride);
  const V m = z.max(), reference = select<C>(m == -INFINITY, V{}, m);
  V sums[4] = {}, distances[4] = {};
  int chain = 0;
  for_each_classes<2>(rows.n_classes, [&]<int K>(int64_t c, Count<K>) {
    V t[K], e[K];
    for (int k = 0; k < K; k++) e[k] = t[k] = z[c + k] - reference;
    exp<C, K>(e);
    for (int k = 0; k < K; k++) sums[chain + k] += e[k];
    for (int k = 0; k < K; k++) distances[chain + k] -= e[k] * max<C>(broadcast<C>(-kFar<C>), t[k]);
    chain ^= 2;
  });
  store(rows.row_max + n, m, Whole{});
  store(rows.row_sum + n, V((sums[0] + sums[1]) + (sums[2] + sums[3])), Whole{});
  store(rows.row_distance + n, V((distances[0] + distances[1]) + (distances[2] + distances[3])), Whole{});
}

template <class T>
void entropy_forward(const EntropyRows<T>& rows, int64_t begin, int64_t end) {
  using C = Compute<T>;
  Columns<T> z(rows.n_classes);
  for_rows<C>(
      begin, end, rows.n_classes, [&](int64_t n) { entropy_walk_columns(rows, n, z); },
      [&](int64_t n) { entropy_walk(rows, n); });
  // The logarithms of a vector of rows at once. 0 / 0 is the NaN of a row without a softmax.
  for_each_vector<C>(end - begin, [&](int64_t i, auto width) {
    const int64_t n = begin + i;
    const Vec<C> sum = load(rows.row_sum + n, width, C(1));
    const Vec<C> distance = load(rows.row_distance + n, width, C(0)) / sum;
    store(rows.row_distance + n, distance, width);
    store(rows.entropy + n, Vec<C>(log<C>(sum) + distance), width);
  });
}

// dH / dz of a vector of logits t = z - m.
template <class C, int K>
CHARLM_INLINE void entropy_gradients(Vec<C> (&t)[K], Vec<C> distance, Vec<C> factor) {
  Vec<C> e[K];
  for (int k = 0; k < K; k++) e[k] = t[k];
  exp<C, K>(e);
  for (int k = 0; k < K; k++) {
    t[k] = (e[k] * factor) * (Vec<C>{} - max<C>(broadcast<C>(-kFar<C>), t[k]) - distance);
  }
}

template <class T>
CHARLM_NOINLINE void entropy_backward_row(const EntropyRows<T>& rows, int64_t n) {
  using C = Compute<T>;
  using V = Vec<C>;
  const T* const z = rows.logits + n * rows.logits_stride;
  T* const grad = rows.grad + n * rows.n_classes;
  const C m = rows.row_max[n];
  const V distance = broadcast(rows.row_distance[n]), factor = broadcast(rows.grad_output[n] / rows.row_sum[n]);
  for_each_vectors<C, 2>(rows.n_classes, [&]<int K>(int64_t c, auto width, Count<K>) {
    prefetch<K * kLanes<C> * sizeof(T)>(z + c + kAhead<T>);
    V t[K];
    for (int k = 0; k < K; k++) t[k] = load(z + c + k * kLanes<C>, width, C(-INFINITY)) - m;
    entropy_gradients<C, K>(t, distance, factor);
    for (int k = 0; k < K; k++) store(grad + c + k * kLanes<C>, t[k], width);
  });
}

template <class T>
CHARLM_NOINLINE void entropy_backward_columns(const EntropyRows<T>& rows, int64_t n, Columns<T>& z) {
  using C = Compute<T>;
  using V = Vec<C>;
  z.read(rows.logits + n * rows.logits_stride, rows.logits_stride);
  const V m = load(rows.row_max + n, Whole{}), distance = load(rows.row_distance + n, Whole{});
  const V factor = load(rows.grad_output + n, Whole{}) / load(rows.row_sum + n, Whole{});
  for_each_classes<2>(rows.n_classes, [&]<int K>(int64_t c, Count<K>) {
    V t[K];
    for (int k = 0; k < K; k++) t[k] = z[c + k] - m;
    entropy_gradients<C, K>(t, distance, factor);
    for (int k = 0; k < K; k++) z.set(c + k, t[k]);
  });
  z.write(rows.grad + n * rows.n_classes, rows.n_classes);
}

template <class T>
void entropy_backward(const EntropyRows<T>& rows, int64_t begin, int64_t end) {
  Columns<T> z(rows.n_classes);
  for_rows<Compute<T>>(
      begin, end, rows.n_classes, [&](int64_t n) { entropy_backward_columns(rows, n, z); },
      [&](int64_t n) { entropy_backward_row(rows, n); });
}

}  // namespace charlm::CHARLM_ISA

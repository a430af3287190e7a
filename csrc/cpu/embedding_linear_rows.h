// embedding_linear on the CPU. Folded: rows of a table are summed in registers, and their gradients are added to that
// of the table.
#pragma once

#include "cpu/functions.h"
#include "ops/embedding_linear.h"

namespace charlm::CHARLM_ISA {

// --------------------------------------------------------------------------------------------------- activations
// Activations of vectors of numbers, and their derivatives.

// erf(x): an odd rational function, minimax on [-3.95, 3.95] with relative error 2.1e-8; outside, |erf| rounds to 1.
CHARLM_INLINE Vec<float> erf(Vec<float> x) {
  constexpr float kBound = 3.95f;
  x = x > kBound ? broadcast<float>(kBound) : x < -kBound ? broadcast<float>(-kBound) : x;
  const Vec<float> z = x * x;
  Vec<float> p = z * 2.0259202982e-6f + 2.84628550879e-4f;
  p = p * z + 3.80645201352e-3f;
  p = p * z + 5.28701051655e-2f;
  p = p * z + 1.91513357421e-1f;
  p = p * z + 1.12837914435f;
  Vec<float> q = z * 3.7828833884e-5f + 1.17027253924e-3f;
  q = q * z + 1.50516834901e-2f;
  q = q * z + 1.14543937044e-1f;
  q = q * z + 5.03056979773e-1f;
  q = q * z + 1;
  const Vec<float> result = p * x / q;
  return result > 1 ? broadcast<float>(1) : result < -1 ? broadcast<float>(-1) : result;
}

// double serves as a reference, so this calls the C library for each number.
CHARLM_INLINE Vec<double> erf(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = ::erf(x[i]);
  return x;
}

constexpr double kSqrtHalf = 0.70710678118654752440, kInverseSqrtTwoPi = 0.39894228040143267794;

// x = activation(x), of K vectors at once.
template <Activation kActivation, class C, int K>
CHARLM_INLINE void activate(Vec<C> (&x)[K]) {
  if constexpr (kActivation == Activation::kTanh) tanh<C, K>(x);
  for (int i = 0; i < K; i++) {
    if constexpr (kActivation == Activation::kRelu) x[i] = x[i] < 0 ? Vec<C>{} : x[i];  // NaN stays
    if constexpr (kActivation == Activation::kGelu) x[i] = x[i] * C(0.5) * (1 + erf(x[i] * C(kSqrtHalf)));
  }
}

// The derivative of the activation, from the value that forward kept: its output, or its input for gelu.
template <Activation kActivation, class C>
CHARLM_INLINE Vec<C> activation_derivative(Vec<C> kept) {
  if constexpr (kActivation == Activation::kTanh) return 1 - kept * kept;
  if constexpr (kActivation == Activation::kRelu) return kept <= 0 ? Vec<C>{} : broadcast<C>(1);
  if constexpr (kActivation == Activation::kGelu) {
    const Vec<C> cdf = C(0.5) * (1 + erf(kept * C(kSqrtHalf)));
    return cdf + kept * C(kInverseSqrtTwoPi) * exp(kept * kept * C(-0.5));
  }
  return broadcast<C>(1);
}

// Vectors of a slab. A row of a slab is summed in registers, and in backward its gradient and that of the bias share
// them. Narrow slabs read the offsets more often.
constexpr int kMaxSlabVectors = 6, kMinSlabVectors = 3;

// The width of the slabs that cover `hidden` with the least padding, and among those the widest.
template <class C>
int64_t folded_slab(int64_t hidden) {
  const int64_t vectors = (hidden + kLanes<C> - 1) / kLanes<C>;
  if (vectors <= kMaxSlabVectors) return (vectors > 0 ? vectors : 1) * kLanes<C>;
  int64_t best = kMaxSlabVectors;
  for (int64_t width = kMaxSlabVectors; width >= kMinSlabVectors; width--) {
    if ((vectors + width - 1) / width * width < (vectors + best - 1) / best * best) best = width;
  }
  return best * kLanes<C>;
}

// Calls f(Count<kVectors>) with the number of vectors in a slab.
template <class C, int kVectors = 1, class F>
CHARLM_INLINE void with_slab(int64_t slab, F&& f) {
  if constexpr (kVectors <= kMaxSlabVectors) {
    if (slab == kVectors * kLanes<C>) return f(Count<kVectors>{});
    with_slab<C, kVectors + 1>(slab, f);
  }
}

template <class F>
CHARLM_INLINE void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kNone:
      return f.template operator()<Activation::kNone>();
    case Activation::kTanh:
      return f.template operator()<Activation::kTanh>();
    case Activation::kRelu:
      return f.template operator()<Activation::kRelu>();
    case Activation::kGelu:
      return f.template operator()<Activation::kGelu>();
  }
}

// ------------------------------------------------------------------------------------------------------- weights

// The position of weight[h, t * D] in packed[n_slabs, T, slab, D].
CHARLM_INLINE int64_t packed_position(const FoldedLayout& layout, int64_t h, int64_t t) {
  return ((h / layout.slab * layout.n_places + t) * layout.slab + h % layout.slab) * layout.embedding_dim;
}

template <class T>
void folded_pack(const FoldedLayout& layout, const T* weight, Compute<T>* packed, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t places = layout.n_places, dim = layout.embedding_dim;
  for (int64_t h = begin; h < end; h++) {
    for (int64_t t = 0; t < places; t++) {
      const T* from = weight + (h * places + t) * dim;
      C* to = packed + packed_position(layout, h, t);
      for_each_vector<C>(dim, [&](int64_t d, auto width) { store(to + d, load(from + d, width, C(0)), width); });
    }
  }
}

template <class T>
void folded_unpack(const FoldedLayout& layout, const Compute<T>* packed, T* weight, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t places = layout.n_places, dim = layout.embedding_dim;
  for (int64_t h = begin; h < end; h++) {
    for (int64_t t = 0; t < places; t++) {
      const C* from = packed + packed_position(layout, h, t);
      T* to = weight + (h * places + t) * dim;
      for_each_vector<C>(dim, [&](int64_t d, auto width) { store(to + d, load(from + d, width, C(0)), width); });
    }
  }
}

template <class T>
void folded_pack_columns(const FoldedLayout& layout, const T* weight, Compute<T>* packed, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t row = layout.n_places * layout.embedding_dim, stride = layout.token_stride();
  for (; begin < end; begin++) {
    const int64_t slab = begin / layout.n_places, place = begin % layout.n_places;
    for (int64_t k = 0; k < layout.slab; k += kLanes<C>) {
      const int64_t h = slab * layout.slab + k, left = layout.hidden - h;
      const int64_t lanes = left < 0 ? 0 : left < kLanes<C> ? left : kLanes<C>;
      const T* const from = weight + h * row + place * layout.embedding_dim;
      C* const to = packed + begin * layout.slab + k;
      for (int64_t d = 0; d < layout.embedding_dim; d++) {
        C column[kLanes<C>] = {};
        for (int64_t i = 0; i < lanes; i++) column[i] = load_one(from + i * row + d);
        store(to + d * stride, load(column, Whole{}), Whole{});
      }
    }
  }
}

// -------------------------------------------------------------------------------------------------------- forward

// The columns of one slab that exist, in rows of H numbers. Passed by value, since stores may alias what a pointer
// refers to.
struct SlabColumns {
  int64_t first, count, slab, hidden;

  SlabColumns(const FoldedLayout& layout, int64_t s)
      : first(s * layout.slab),
        count(layout.hidden - first < layout.slab ? layout.hidden - first : layout.slab),
        slab(layout.slab),
        hidden(layout.hidden) {}
};

// One slab of the rows that are needed next. They are prefetched row by row while the current rows are summed, since
// the pieces of rows are too short for the hardware prefetcher.
struct NextRows {
  const char* data;
  int64_t stride;  // bytes

  template <class T>
  NextRows(const T* rows, const SlabColumns& columns)
      : data(reinterpret_cast<const char*>(rows + columns.first)), stride(columns.hidden * sizeof(T)) {}

  template <int kBytes>
  CHARLM_INLINE void prefetch_row(int64_t n) const {
    prefetch<kBytes>(data + n * stride);
  }
};

// sums[n, :] = bias + sum_t table[offsets[n, t]] for one slab of kVectors vectors and n_rows rows.
template <class C, int kVectors>
CHARLM_NOINLINE void folded_sum(C* sums, const C* table, const C* bias, const int32_t* offsets, int64_t n_places,
                                int64_t n_rows, NextRows out) {
  Vec<C> start[kVectors];
  for (int k = 0; k < kVectors; k++) start[k] = load(bias + k * kLanes<C>, Whole{});
  for (int64_t n = 0; n < n_rows; n++, offsets += n_places, sums += kVectors * kLanes<C>) {
    Vec<C> sum[kVectors];
    for (int k = 0; k < kVectors; k++) sum[k] = start[k];
    out.prefetch_row<kVectors * kVectorBytes>(n);
    for (int64_t t = 0; t < n_places; t++) {
      const C* row = table + offsets[t];
      for (int k = 0; k < kVectors; k++) sum[k] += load(row + k * kLanes<C>, Whole{});
    }
    for (int k = 0; k < kVectors; k++) store(sums + k * kLanes<C>, sum[k], Whole{});
  }
}

// x = activation(x) for n numbers, a multiple of the lanes of a vector.
template <Activation kActivation, class C>
CHARLM_NOINLINE void activate_all(C* x, int64_t n) {
  if constexpr (kActivation == Activation::kNone) return;
  int64_t i = 0;
  const auto next = [&]<int K>(Count<K>) {
    Vec<C> v[K];
    for (int k = 0; k < K; k++) v[k] = load(x + i + k * kLanes<C>, Whole{});
    activate<kActivation, C, K>(v);
    for (int k = 0; k < K; k++) store(x + i + k * kLanes<C>, v[k], Whole{});
    i += K * kLanes<C>;
  };
  while (i + 4 * kLanes<C> <= n) next(Count<4>{});
  while (i < n) next(Count<1>{});
}

// Calls f(n, c, width) for each row and each vector of the columns of a slab. If the slab is complete, the number of
// vectors is a constant: each load and store of the loop over rows then has a constant stride, which the hardware
// prefetches.
template <class C, class F>
CHARLM_INLINE void for_each_row(const SlabColumns columns, int64_t n_rows, F f) {
  if (columns.count == columns.slab) {
    with_slab<C>(columns.slab, [=]<int kVectors>(Count<kVectors>) {
      for (int64_t n = 0; n < n_rows; n++) {
#pragma GCC unroll 8
        for (int k = 0; k < kVectors; k++) f(n, k * kLanes<C>, Whole{});
      }
    });
  } else {
    for (int64_t n = 0; n < n_rows; n++) {
      for_each_vector<C>(columns.count, [=](int64_t c, auto width) { f(n, c, width); });
    }
  }
}

// out[n, first + c] = in[n, c].
template <class T, class C = Compute<T>>
CHARLM_NOINLINE void store_slab(const SlabColumns columns, const C* in, T* out, int64_t n_rows) {
  for_each_row<C>(columns, n_rows, [=](int64_t n, int64_t c, auto width) {
    store(out + n * columns.hidden + columns.first + c, load(in + n * columns.slab + c, Whole{}), width);
  });
}

template <class T>
void embedding_linear_forward(const FoldedParams<T>& params, Compute<T>* scratch, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const FoldedLayout& layout = params.layout;
  for (; begin < end; begin += kFoldedRows) {
    const int64_t n_rows = end - begin < kFoldedRows ? end - begin : kFoldedRows;
    for (int64_t s = 0; s < layout.n_slabs; s++) {
      const SlabColumns columns(layout, s);
      const int64_t first = columns.first;
      with_slab<C>(layout.slab, [&]<int kVectors>(Count<kVectors>) {
        folded_sum<C, kVectors>(scratch, params.table + first * layout.n_places, params.bias + first,
                                params.offsets + begin * layout.n_places, layout.n_places, n_rows,
                                NextRows(params.output + begin * layout.hidden, columns));
      });
      if (params.before) store_slab(columns, scratch, params.before + begin * layout.hidden, n_rows);
      with_activation(params.activation,
                      [&]<Activation kActivation>() { activate_all<kActivation>(scratch, n_rows * layout.slab); });
      store_slab(columns, scratch, params.output + begin * layout.hidden, n_rows);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- backward

// table[offsets[n, t]] += grads[n, :] for every place t, and bias += sum_n grads[n, :], for one slab of kVectors
// vectors. The sum for the bias starts from zero in each call: one long sum of N numbers would round worse than
// torch's.
template <class C, int kVectors>
CHARLM_NOINLINE void folded_scatter(C* table, C* bias, const C* grads, const int32_t* offsets, int64_t n_places,
                                    int64_t n_rows, NextRows next_grads, NextRows next_kept) {
  Vec<C> sum[kVectors];
  for (int k = 0; k < kVectors; k++) sum[k] = Vec<C>{};
  for (int64_t n = 0; n < n_rows; n++, offsets += n_places, grads += kVectors * kLanes<C>) {
    Vec<C> grad[kVectors];
    for (int k = 0; k < kVectors; k++) grad[k] = load(grads + k * kLanes<C>, Whole{});
    for (int k = 0; k < kVectors; k++) sum[k] += grad[k];
    next_grads.prefetch_row<kVectors * kVectorBytes>(n);
    next_kept.prefetch_row<kVectors * kVectorBytes>(n);
    for (int64_t t = 0; t < n_places; t++) {
      C* row = table + offsets[t];
      for (int k = 0; k < kVectors; k++) {
        store(row + k * kLanes<C>, Vec<C>(load(row + k * kLanes<C>, Whole{}) + grad[k]), Whole{});
      }
    }
  }
  for (int k = 0; k < kVectors; k++) {
    C* const to = bias + k * kLanes<C>;
    store(to, Vec<C>(load(to, Whole{}) + sum[k]), Whole{});
  }
}

// out[n, c] = grad_output[n, first + c] * activation'(kept[n, first + c]).
template <Activation kActivation, class T, class C = Compute<T>>
CHARLM_NOINLINE void slab_gradients(const SlabColumns columns, C* out, const T* grad_output, const T* kept,
                                    int64_t n_rows) {
  for_each_row<C>(columns, n_rows, [=](int64_t n, int64_t c, auto width) {
    const int64_t i = n * columns.hidden + columns.first + c;
    const Vec<C> derivative = activation_derivative<kActivation, C>(load(kept + i, width, C(0)));
    store(out + n * columns.slab + c, Vec<C>(load(grad_output + i, width, C(0)) * derivative), Whole{});
  });
}

template <class T>
void embedding_linear_backward(const FoldedParams<T>& params, Compute<T>* grad_table, Compute<T>* grad_bias,
                               Compute<T>* scratch, int64_t slab, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const FoldedLayout& layout = params.layout;
  const SlabColumns columns(layout, slab);
  if (columns.count < layout.slab) memset(scratch, 0, kFoldedRows * layout.slab * sizeof(C));
  for (; begin < end; begin += kFoldedRows) {
    const int64_t n_rows = end - begin < kFoldedRows ? end - begin : kFoldedRows;
    with_activation(params.activation, [&]<Activation kActivation>() {
      slab_gradients<kActivation>(columns, scratch, params.grad_output + begin * layout.hidden,
                                  params.kept + begin * layout.hidden, n_rows);
    });
    const int64_t next = (begin + kFoldedRows) * layout.hidden;
    with_slab<C>(layout.slab, [&]<int kVectors>(Count<kVectors>) {
      folded_scatter<C, kVectors>(grad_table + columns.first * layout.n_places, grad_bias, scratch,
                                  params.offsets + begin * layout.n_places, layout.n_places, n_rows,
                                  NextRows(params.grad_output + next, columns), NextRows(params.kept + next, columns));
    });
  }
}

// ----------------------------------------------------------------------------------------------------- not folded

template <class T>
void embedding_linear_activate(Activation activation, const Compute<T>* in, T* out, int64_t n) {
  using C = Compute<T>;
  with_activation(activation, [&]<Activation kActivation>() {
    for_each_vector_group<C, 4>(n, [&]<int K>(int64_t i, auto width, Count<K>) {
      Vec<C> v[K];
      for (int k = 0; k < K; k++) v[k] = load(in + i + k * kLanes<C>, width, C(0));
      activate<kActivation, C, K>(v);
      for (int k = 0; k < K; k++) store(out + i + k * kLanes<C>, v[k], width);
    });
  });
}

template <class T>
void embedding_linear_activation_backward(Activation activation, const T* grad_output, const T* kept, Compute<T>* grad,
                                          Compute<T>* sum, int64_t n_rows, int64_t hidden) {
  using C = Compute<T>;
  memset(sum, 0, hidden * sizeof(C));
  with_activation(activation, [=]<Activation kActivation>() {
    for (int64_t n = 0; n < n_rows; n++) {
      for_each_vector<C>(hidden, [=](int64_t c, auto width) {
        const int64_t i = n * hidden + c;
        const Vec<C> derivative = activation_derivative<kActivation, C>(load(kept + i, width, C(0)));
        const Vec<C> product = load(grad_output + i, width, C(0)) * derivative;
        store(grad + i, product, width);
        store(sum + c, Vec<C>(load(sum + c, width, C(0)) + product), width);
      });
    }
  });
}

}  // namespace charlm::CHARLM_ISA

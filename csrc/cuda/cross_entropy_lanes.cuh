// A row with class indices whose numbers are in the registers of some lanes of a warp: its loss and its gradient, in
// one pass over words of 4 bytes. See cross_entropy_packs.cuh and cross_entropy_words.cuh.
#pragma once

#include "cuda/cross_entropy_layout.cuh"
#include "cuda/cross_entropy_numbers.cuh"
#include "cuda/cross_entropy_reduction.cuh"
#include "cuda/cross_entropy_row.cuh"

namespace charlm::cuda {
namespace {

template <int L>
__device__ __forceinline__ float max_over(float x) {
#pragma unroll
  for (int step = L / 2; step > 0; step /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

template <int L>
__device__ __forceinline__ float sum_over(float x) {
#pragma unroll
  for (int step = L / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Whether the options change only factors of a row (ops/cross_entropy.h), so that all classes but the target have
// gradient a exp(z_c - m) - b.
template <class T>
bool has_row_factors(const CrossEntropyParams<T>& params) {
  return params.has_class_indices && params.softcap == 0 && !(params.weight && params.label_smoothing != 0) &&
         params.logit_scale > 0 && params.logit_scale < INFINITY && !params.row_dense_sum;
}

// An index as it was loaded, in two halves. Nothing waits for it before value().
struct LoadedIndex {
  uint32_t low = 0, high = 0;

  __device__ __forceinline__ void load(const Indices& indices, int64_t n) {
    with_index_type(indices, [&](const auto* data) {
      if constexpr (sizeof(*data) == 8) {
        const auto halves = *reinterpret_cast<const uint2*>(data + n);
        low = halves.x;
        high = halves.y;
      } else {
        low = static_cast<uint32_t>(static_cast<int>(data[n]));
      }
    });
  }

  __device__ __forceinline__ int64_t value(const Indices& indices) const {
    const IndexType type = indices.against.type;
    if (type == IndexType::kInt64 || type == IndexType::kUInt64)
      return static_cast<int64_t>(uint64_t{high} << 32 | low);
    return type == IndexType::kUInt32 ? int64_t{low} : static_cast<int>(low);
  }
};

// The factor of each row in the reduction. Loads of the first rows come before it: it may wait for another kernel. All
// lanes of a warp must call it.
template <class T>
__device__ __forceinline__ Compute<T> row_scale(const CrossEntropyParams<T>& params, CrossEntropyPass pass,
                                                const Reduction& reduction) {
  if (pass == CrossEntropyPass::kForward) return 1;
  return static_cast<Compute<T>>(reciprocal<T>(divisor(params, reduction)));
}

// What is the same for all rows, in shared memory, since registers are scarce.
struct SmallState {
  float scales[kSmallWarps];  // of the rows of each warp
  float dense[kSmallWarps];   // d_c, likewise
  double loss_sums[kSmallThreads];

  template <class T>
  __device__ __forceinline__ void begin(const CrossEntropyParams<T>& params, CrossEntropyPass pass,
                                        const Reduction& reduction) {
    loss_sum() = 0;
    const float scale = row_scale(params, pass, reduction);
    if (threadIdx.x % kWarp == 0) {
      scales[threadIdx.x / kWarp] = scale;
      dense[threadIdx.x / kWarp] = params.label_smoothing / static_cast<float>(params.n_classes);
    }
    __syncwarp();
  }

  __device__ __forceinline__ float scale() const { return scales[threadIdx.x / kWarp]; }
  __device__ __forceinline__ double& loss_sum() { return loss_sums[threadIdx.x]; }
};

// What is known of a row before its logits are: all its loads are issued when it is made.
template <class T>
struct SmallRow {
  static constexpr int kNone = -1, kIgnored = -2, kBad = -3;  // no row; not counted

  int chunk, chunk_rows, r;
  int target = kNone;      // or one of the above
  float factor = 1;        // of the gradient, beside the reduction's
  float max = 0, sum = 1;  // from forward

  // Row r of a chunk.
  __device__ __forceinline__ SmallRow(const CrossEntropyParams<T>& params, CrossEntropyPass pass, int chunk,
                                      int chunk_rows, int r, bool is_first, const LoadedIndex& index)
      : chunk(chunk), chunk_rows(chunk_rows), r(r) {
    const int64_t n = int64_t(chunk) * chunk_rows + r;
    if (n >= params.n_rows) return;
    if (params.token_weight) factor = params.token_weight[n];
    factor *= grad_loss_of(params, n);
    if (pass == CrossEntropyPass::kBackward) {
      max = params.row_max[n];
      sum = params.row_sum[n];
    }
    const int64_t y = index.value(params.target);
    const bool is_ignored = params.may_ignore && y == params.ignore_index, is_class = in_range(params.target, y);
    target = is_ignored ? kIgnored : is_class ? static_cast<int>(y) : kBad;
    if (target == kBad && is_first) record_index_error(params.target, n, y);
  }

  // Computed anew: registers are scarce.
  __device__ __forceinline__ int64_t n() const { return int64_t(opaque(chunk)) * chunk_rows + r; }
  __device__ __forceinline__ bool exists() const { return target != kNone; }
  __device__ __forceinline__ bool is_counted() const { return target >= 0; }
};

// Numbers of a row in the registers of this lane. `Row` reads and writes them where they are:
//   owns(c)                   whether class c is this lane's
//   spread(words, from, s)    the sum of from - s x over its numbers x
//   logit(c), put(c, y)       reads or writes one number
//   extra                     with kIsShared: one number more, apart from the words, or -inf
//   store(values, v, a, b)    writes a value - b for each, and a v - b for the extra number
//   store_zero()              writes 0 for each
// between() is called when the words are not needed any more.
template <bool kPlain, class T, int L, int kWords, class Row, class Between>
__device__ __forceinline__ void pass_over_row(const CrossEntropyParams<T>& params, CrossEntropyPass pass,
                                              const SmallRow<T>& row, const Row& numbers,
                                              const uint32_t (&words)[kWords], SmallState& state, Between between) {
  const bool is_forward = pass != CrossEntropyPass::kBackward;
  const float logit_scale = kPlain ? 1 : params.logit_scale;
  const float smoothing = kPlain ? 0 : params.label_smoothing;
  const float lse_square_scale = kPlain ? 0 : params.lse_square_scale;
  const bool is_first = threadIdx.x % L == 0, is_target = row.is_counted() && numbers.owns(row.target);
  // From global memory it is loaded before it is needed; from shared memory that would only take a register.
  const auto load_target = [&] { return is_target ? to_compute(numbers.logit(row.target)) * logit_scale : 0; };
  float target_logit = 0;
  if constexpr (!Row::kIsShared) target_logit = load_target();
  float max = row.max, sum = row.sum, spread = 0;
  if (is_forward) {
    max = fmax(max_of<T>(words), -INFINITY);
    if constexpr (Row::kIsShared) max = fmax(max, numbers.extra);
    max = max_over<L>(max) * logit_scale;
  }
  const Exponential<T> exponential(max);
  if (is_forward && smoothing != 0) {
    spread = sum_over<L>(numbers.spread(words, exponential.from(), logit_scale));
  }
  float values[kWords * kWordSize<T>];
  float part = exponentials<T>(words, exponential, logit_scale, values);
  float extra_value = 0;
  if constexpr (Row::kIsShared) {
    extra_value = exponential(numbers.extra * logit_scale);
    part += extra_value;
  }
  if constexpr (Row::kIsShared) target_logit = load_target();
  const float target_value = exponential.corrected(exponential(target_logit));
  if (is_forward) {
    sum = exponential.corrected(sum_over<L>(part));
    if (sum == 0) sum = 1;  // a row of -inf; the maximum is -inf for some rows with NaN too
  }

  const float target_weight = params.weight && row.is_counted() ? params.weight[row.target] : 1;
  const float sparse = (1 - smoothing) * target_weight;
  const float dense = kPlain ? 0 : state.dense[threadIdx.x / kWarp];
  if (is_forward) {
    if (is_target) {
      const float log_sum = log(sum);
      float loss = sparse * ((max - target_logit) + log_sum);
      if (smoothing != 0) loss += dense * spread + smoothing * log_sum;
      if (lse_square_scale != 0) {
        loss += lse_square_scale * target_weight * (max + log_sum) * (max + log_sum);
      }
      if (params.token_weight) loss *= params.token_weight[row.n()];
      state.loss_sum() += loss;
      store_loss(params, row.n(), loss);
    }
    if (row.exists() && is_first) {
      const int64_t n = row.n();
      params.row_max[n] = row.is_counted() ? max : 0;
      params.row_sum[n] = row.is_counted() ? sum : 1;
      if (!row.is_counted()) store_loss(params, n, 0.0f);
    }
  }
  // See CrossEntropyRow::gradient().
  const float g = row.factor * state.scale() * logit_scale;
  float dense_factor = smoothing;
  if (lse_square_scale != 0) {
    dense_factor += 2 * lse_square_scale * target_weight * (max + log(sum));
  }
  const float inverse = max == -INFINITY ? NAN : reciprocal(sum);
  const float a = exponential.corrected_factor((kPlain ? sparse : sparse + dense_factor) * inverse * g, max);
  const float p = target_value * inverse;
  float of_target = (p - 1) * sparse;
  if constexpr (!kPlain) of_target += p * dense_factor - dense;
  between();
  if (pass == CrossEntropyPass::kForward) return;
  if (row.is_counted()) {
    numbers.store(values, extra_value, a, kPlain ? 0 : dense * g);
  } else if (row.exists() && !(row.target == row.kBad && params.grad == params.logits)) {
    numbers.store_zero();
  }
  if (is_target) numbers.put(row.target, from_compute<T>(g * of_target));
}

template <class T>
__device__ __forceinline__ uint32_t gradient_of(const float* values, float a, float b) {
  float y[kWordSize<T>];
#pragma unroll
  for (int i = 0; i < kWordSize<T>; i++) y[i] = fmaf(values[i], a, -b);
  return pack<T>(y);
}

template <class T>
__device__ __forceinline__ float spread_of(uint32_t word, float from, float logit_scale) {
  float x[kWordSize<T>], sum = 0;
  unpack<T>(word, x);
#pragma unroll
  for (int i = 0; i < kWordSize<T>; i++) sum += from - x[i] * logit_scale;
  return sum;
}

}  // namespace
}  // namespace charlm::cuda

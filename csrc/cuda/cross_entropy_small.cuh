// Few classes: a warp works on a chunk of whole rows, without a barrier of the block. Several lanes share a row, and
// each keeps its numbers in registers, so that each byte of the logits is read once and each byte of the gradient is
// written once.
//
//   rows of whole packs of 16 bytes    straight between global memory and registers
//   other rows                         through a ring of chunks in shared memory, which belongs to the warp. Bulk
//   copies
//                                      fill and empty it; the lanes copy on older GPUs and for padded rows
//   other options, float64             through the ring too, by cross_entropy_row.cuh: any option, more instructions
#pragma once

#include "cuda/async.cuh"
#include "cuda/cross_entropy_row.cuh"

namespace charlm::cuda {
namespace {

constexpr int64_t kSmallMaxClasses = 256;
constexpr int kSmallWarps = 8;
constexpr int kSmallThreads = kSmallWarps * kWarp;
constexpr int kMaxStages = 3;  // of a ring

// Blocks of a multiprocessor, few enough that no registers are spilled.
template <class T, bool kPlain>
constexpr int kPacksBlocks = !kPlain                     ? 2
                             : sizeof(T) < sizeof(float) ? 3
                                                         : 4;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <bool kPlain>
constexpr int kWordsBlocks = 2;  // lanes that copy take registers
#else
template <bool kPlain>
constexpr int kWordsBlocks = kPlain ? 3 : 2;
#endif
template <class T>
constexpr int kOptionsBlocks = sizeof(Compute<T>) == sizeof(float) ? 2 : 1;

// How a chunk of rows moves between global and shared memory.
enum class ChunkCopy {
  kBulk,    // by bulk copies: contiguous rows, a multiple of 16 bytes from the start
  kPacks,   // by the lanes, in packs of 16 bytes: the same, on a GPU without bulk copies
  kSingles  // by the lanes, one number at a time: any rows
};

// The same for all rows of a launch.
struct SmallLayout {
  CrossEntropyPass pass;
  int lanes, stages;
  ChunkCopy load, store;
};

// ------------------------------------------------------------------------------------------------ words of 4 bytes

template <class T>
constexpr int kWordSize = 4 / static_cast<int>(sizeof(T));

template <class T>
constexpr uint32_t kWordOfMinusInfinity = 0xff800000;
template <>
constexpr uint32_t kWordOfMinusInfinity<BFloat16> = 0xff80ff80;
template <>
constexpr uint32_t kWordOfMinusInfinity<Float16> = 0xfc00fc00;

template <class T>
__device__ __forceinline__ void unpack(uint32_t word, float (&x)[kWordSize<T>]) {
  if constexpr (kWordSize<T> == 1) {
    x[0] = __uint_as_float(word);
  } else if constexpr (__is_same(T, BFloat16)) {
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xffff0000);
  } else {
    x[0] = to_compute(Float16{static_cast<uint16_t>(word)});
    x[1] = to_compute(Float16{static_cast<uint16_t>(word >> 16)});
  }
}

template <class T>
__device__ __forceinline__ uint32_t pack(const float (&x)[kWordSize<T>]) {
  if constexpr (kWordSize<T> == 1) {
    return __float_as_uint(x[0]);
  } else {
#ifdef __CUDA_ARCH__
    uint32_t word;
    if constexpr (__is_same(T, BFloat16)) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x[1]), "f"(x[0]));
    } else {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x[1]), "f"(x[0]));
    }
    return word;
#else
    return from_compute<T>(x[0]).bits | static_cast<uint32_t>(from_compute<T>(x[1]).bits) << 16;
#endif
  }
}

// The maximum of each number, before it is unpacked. NaN is ignored, unless both are NaN.
template <class T>
__device__ __forceinline__ uint32_t max_of_words(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  if constexpr (kWordSize<T> == 2) {
    uint32_t word;
    if constexpr (__is_same(T, BFloat16)) {
      asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    } else {
      asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    }
    return word;
  }
#endif
  float x[kWordSize<T>], y[kWordSize<T>];
  unpack<T>(a, x);
  unpack<T>(b, y);
#pragma unroll
  for (int i = 0; i < kWordSize<T>; i++) x[i] = fmax(x[i], y[i]);
  return pack<T>(x);
}

constexpr int kChains = 4;  // reductions of a lane that do not wait for each other

// NaN is ignored, unless there are only NaNs.
template <class T, int kWords>
__device__ __forceinline__ float max_of(const uint32_t (&words)[kWords]) {
  constexpr int kUsed = kWords < kChains ? kWords : kChains;
  uint32_t largest[kUsed];
#pragma unroll
  for (int k = 0; k < kWords; k++) {
    largest[k % kUsed] = k < kUsed ? words[k] : max_of_words<T>(largest[k % kUsed], words[k]);
  }
#pragma unroll
  for (int k = 1; k < kUsed; k++) largest[0] = max_of_words<T>(largest[0], largest[k]);
  float x[kWordSize<T>];
  unpack<T>(largest[0], x);
  return kWordSize<T> == 1 ? x[0] : fmax(x[0], x[kWordSize<T> - 1]);
}

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

// 1 / x for x >= 1, or NaN: 1 ulp.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(y, fmaf(-x, y, 1), y);
#else
  return 1 / x;
#endif
}

// a / b, where `inverse` is 1 / b: exactly 1 if a is b.
__device__ __forceinline__ float quotient(float a, float b, float inverse) {
  const float first = a * inverse;
  return fmaf(fmaf(-first, b, a), inverse, first);
}

// exp(z - max) for the numbers z of a row, times that of the maximum, which need not be 1. Half types: 2^(z log2(e) -
// max log2(e)), one fma. The second product is rounded, which changes all numbers of the row by the same factor. For a
// maximum so large that other numbers differ from it by 64 or more, log2(e) is left out: exact, and the other numbers
// give 0 as before.
template <class T>
class Exponential {
  static constexpr float kLog2e = 1.44269504f, kLarge = 0x1p18f;

 public:
  __device__ __forceinline__ explicit Exponential(float max) : from_(max == -INFINITY ? 0.0f : max) {
    factor_ = fabsf(from_) > kLarge ? 1 : kLog2e;
    offset_ = -from_ * factor_;
  }

  __device__ __forceinline__ float operator()(float z) const {
    if constexpr (sizeof(T) == sizeof(float)) return exp_of<T>(z - from_);
    return exp2_approximate(fmaf(z, factor_, offset_));
  }

  __device__ __forceinline__ float from() const { return from_; }

 private:
  const float from_;
  float factor_, offset_;
};

// Sets `values` to the exponentials of the words and returns their sum.
template <class T, int kWords>
__device__ __forceinline__ float exponentials(const uint32_t (&words)[kWords], const Exponential<T>& exponential,
                                              float logit_scale, float (&values)[kWords * kWordSize<T>]) {
  constexpr int P = kWordSize<T>, kUsed = kWords * P < kChains ? kWords * P : kChains;
  const auto compute = [&](auto scaled) {
#pragma unroll
    for (int k = 0; k < kWords; k++) {
      float z[P];
      unpack<T>(words[k], z);
#pragma unroll
      for (int i = 0; i < P; i++) values[k * P + i] = exponential(scaled(z[i]));
    }
  };
  if (logit_scale == 1) {
    compute([](float x) { return x; });
  } else {
    compute([&](float x) { return x * logit_scale; });
  }
  float sums[kUsed];
#pragma unroll
  for (int i = 0; i < kWords * P; i++) sums[i % kUsed] = i < kUsed ? values[i] : sums[i % kUsed] + values[i];
#pragma unroll
  for (int i = 1; i < kUsed; i++) sums[0] += sums[i];
  return sums[0];
}

// ------------------------------------------------------------------------------------- a row with class indices

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

// What is known of a row before its logits are: all its loads are issued when it is made.
template <class T>
struct SmallRow {
  static constexpr int kNone = -1, kIgnored = -2, kBad = -3;  // no row; not counted

  int64_t n;
  int target = kNone;      // or one of the above
  float factor = 1;        // of the loss in forward, of the gradient in backward
  float max = 0, sum = 1;  // from forward

  __device__ __forceinline__ SmallRow(const CrossEntropyParams<T>& params, CrossEntropyPass pass, int64_t n,
                                      bool is_first, const LoadedIndex& index)
      : n(n) {
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

  __device__ __forceinline__ bool exists() const { return target != kNone; }
  __device__ __forceinline__ bool is_counted() const { return target >= 0; }
};

// Numbers of a row in the registers of this lane. `Row` reads and writes them where they are:
//   owns(c)                   whether class c is this lane's
//   spread(words, from, s)    the sum of from - s x over its numbers x
//   logit(c), put(c, y)       reads or writes one number
//   extra                     with kIsShared: one number more, apart from the words, or -inf
//   store(values, v, a, b)    writes a value - b for each, and a v - b for the extra number
// between() is called when the words are not needed any more.
template <bool kPlain, class T, int L, int kWords, class Row, class Between>
__device__ __forceinline__ void pass_over_row(const CrossEntropyParams<T>& params, CrossEntropyPass pass,
                                              const SmallRow<T>& row, const Row& numbers,
                                              const uint32_t (&words)[kWords], float scale, double& loss_sum,
                                              Between between) {
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
  float target_value = exponential(target_logit), of_max = 1, correction = 1;
  if constexpr (sizeof(T) < sizeof(float)) {
    of_max = exponential(exponential.from());
    correction = reciprocal(of_max);
    target_value = quotient(target_value, of_max, correction);
  }
  if (is_forward) {
    sum = sum_over<L>(part);
    if constexpr (sizeof(T) < sizeof(float)) sum = quotient(sum, of_max, correction);
    if (sum == 0) sum = 1;  // a row of -inf; the maximum is -inf for some rows with NaN too
  }

  const float target_weight = params.weight && row.is_counted() ? params.weight[row.target] : 1;
  const float sparse = (1 - smoothing) * target_weight;
  const float dense = smoothing / static_cast<float>(params.n_classes);
  if (is_forward) {
    if (is_target) {
      const float log_sum = log(sum);
      float loss = sparse * ((max - target_logit) + log_sum);
      if (smoothing != 0) loss += dense * spread + smoothing * log_sum;
      if (lse_square_scale != 0) {
        loss += lse_square_scale * target_weight * (max + log_sum) * (max + log_sum);
      }
      loss *= row.factor;
      loss_sum += loss;
      store_loss(params, row.n, loss);
    }
    if (row.exists() && is_first) {
      params.row_max[row.n] = row.is_counted() ? max : 0;
      params.row_sum[row.n] = row.is_counted() ? sum : 1;
      if (!row.is_counted()) store_loss(params, row.n, 0.0f);
    }
  }
  // See CrossEntropyRow::gradient().
  const float g = row.factor * scale * logit_scale;
  float dense_factor = smoothing;
  if (lse_square_scale != 0) {
    dense_factor += 2 * lse_square_scale * target_weight * (max + log(sum));
  }
  const float inverse = max == -INFINITY ? NAN : reciprocal(sum);
  float a = (sparse + dense_factor) * inverse * correction * g, b = dense * g;
  const float p = target_value * inverse;
  const float target_gradient = g * ((p - 1) * sparse + (p * dense_factor - dense));
  between();
  if (pass == CrossEntropyPass::kForward) return;
  if (!row.is_counted()) {
    a = b = 0;
#pragma unroll
    for (float& value : values) value = 0;  // not a NaN
    extra_value = 0;
  }
  if (row.exists() && !(row.target == row.kBad && params.grad == params.logits))
    numbers.store(values, extra_value, a, b);
  if (is_target) {
    numbers.put(row.target, from_compute<T>(target_gradient));
  }
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

// ------------------------------------------------------------------------------------------ rows of whole packs

// Of a row, L lanes have up to K packs each: lane j has packs j, j + L, ...
template <class T, int L, int K>
struct RowInPacks {
  static constexpr int kWords = K * kPackBytes / 4;
  static constexpr bool kIsShared = false;

  const T* from;
  T* to;
  int j, n;  // this lane; packs from its first to the end of the row

  __device__ __forceinline__ RowInPacks(const CrossEntropyParams<T>& params, int64_t row)
      : from(params.logits + row * params.logits_stride),
        to(params.grad + row * params.grad_stride),
        j(threadIdx.x % L),
        n(static_cast<int>(params.n_classes) / kPackSize<T> - j) {}

  __device__ __forceinline__ void load(bool exists, uint32_t (&words)[kWords]) const {
#pragma unroll
    for (int k = 0; k < K; k++) {
      constexpr uint32_t kNone = kWordOfMinusInfinity<T>;
      uint4 pack = {kNone, kNone, kNone, kNone};
      if (exists && k * L < n) pack = *reinterpret_cast<const uint4*>(from + (k * L + j) * kPackSize<T>);
      words[4 * k] = pack.x;
      words[4 * k + 1] = pack.y;
      words[4 * k + 2] = pack.z;
      words[4 * k + 3] = pack.w;
    }
  }

  __device__ __forceinline__ bool owns(int c) const { return c / kPackSize<T> % L == j; }
  __device__ __forceinline__ T logit(int c) const { return from[c]; }
  __device__ __forceinline__ void put(int c, T y) const { to[c] = y; }

  __device__ __forceinline__ float spread(const uint32_t (&words)[kWords], float max, float logit_scale) const {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kWords; k++) {
      if (k / 4 * L < n) sum += spread_of<T>(words[k], max, logit_scale);
    }
    return sum;
  }

  __device__ __forceinline__ void store(const float (&values)[kWords * kWordSize<T>], float, float a, float b) const {
#pragma unroll
    for (int k = 0; k < K; k++) {
      if (k * L >= n) continue;
      uint4 pack;
      const float* const first = values + k * kPackSize<T>;
      pack.x = gradient_of<T>(first, a, b);
      pack.y = gradient_of<T>(first + kWordSize<T>, a, b);
      pack.z = gradient_of<T>(first + 2 * kWordSize<T>, a, b);
      pack.w = gradient_of<T>(first + 3 * kWordSize<T>, a, b);
      *reinterpret_cast<uint4*>(to + (k * L + j) * kPackSize<T>) = pack;
    }
  }
};

// kPrefetch: the next rows are loaded before the gradient of these is computed.
template <class T, int L, int K, bool kPlain, bool kPrefetch>
__global__ void __launch_bounds__(kSmallThreads, kPacksBlocks<T, kPlain>)
    cross_entropy_packs(const __grid_constant__ CrossEntropyParams<T> params, SmallLayout layout,
                        const __grid_constant__ Reduction reduction) {
  using Row = RowInPacks<T, L, K>;
  constexpr int kRows = kWarp / L;  // of a warp
  const CrossEntropyPass pass =
      kPrefetch && layout.pass != CrossEntropyPass::kForward ? CrossEntropyPass::kForwardBackward : layout.pass;
  const int row_in_chunk = threadIdx.x % kWarp / L, warp = threadIdx.x / kWarp;
  const int n_chunks = static_cast<int>((params.n_rows + kRows - 1) / kRows), step = gridDim.x * kSmallWarps;
  double loss_sum = 0;
  uint32_t words[Row::kWords];
  LoadedIndex next;
  const auto load = [&](int chunk) {
    const int64_t n = int64_t(chunk) * kRows + row_in_chunk;
    Row(params, n).load(n < params.n_rows, words);
    if (n < params.n_rows) next.load(params.target, n);
  };
  int chunk = kPrefetch ? warp * gridDim.x + blockIdx.x : blockIdx.x * kSmallWarps + warp;
  if (chunk < n_chunks) load(chunk);
  const float scale = row_scale(params, pass, reduction);
  for (; chunk < n_chunks; chunk += step) {
    const int64_t n = int64_t(chunk) * kRows + row_in_chunk;
    const SmallRow<T> row(params, pass, n, threadIdx.x % L == 0, next);
    pass_over_row<kPlain, T, L>(params, pass, row, Row(params, n), words, scale, loss_sum, [&] {
      if (kPrefetch && chunk + step < n_chunks) load(chunk + step);
    });
    if (!kPrefetch && chunk + step < n_chunks) load(chunk + step);
  }
  if (pass != CrossEntropyPass::kBackward) reduce_losses(params, reduction, loss_sum);
}

// -------------------------------------------------------------------------------------------- a warp's ring of chunks

constexpr int kCopiesInFlight = 4;  // loads of a lane

// Copies n packs by the lanes of a warp.
__device__ __forceinline__ void copy_packs(uint4* to, const uint4* from, int n) {
#pragma unroll 1
  for (int i = threadIdx.x % kWarp; i < n; i += kCopiesInFlight * kWarp) {
    uint4 packs[kCopiesInFlight];
#pragma unroll
    for (int k = 0; k < kCopiesInFlight; k++) {
      if (i + k * kWarp < n) packs[k] = from[i + k * kWarp];
    }
#pragma unroll
    for (int k = 0; k < kCopiesInFlight; k++) {
      if (i + k * kWarp < n) to[i + k * kWarp] = packs[k];
    }
  }
}

// Copies n numbers between shared memory and rows that start every `stride` numbers in global memory.
template <bool kToShared, class T>
__device__ __forceinline__ void copy_rows(T* shared, T* global, int64_t stride, int n_classes, int n) {
  const int first = threadIdx.x % kWarp;
  if (first >= n) return;
  const int rows_a_step = kWarp / n_classes, step = kWarp - rows_a_step * n_classes;
  const int row = first / n_classes;
  int c = first - row * n_classes;
  T* in_global = global + row * stride;
  const auto next = [&] {
    T* const element = in_global + c;
    in_global += rows_a_step * stride;
    c += step;
    if (c >= n_classes) {
      c -= n_classes;
      in_global += stride;
    }
    return element;
  };
#pragma unroll 1
  for (int i = first; i < n; i += kCopiesInFlight * kWarp) {
    T* elements[kCopiesInFlight];
#pragma unroll
    for (T*& element : elements) element = next();
    T values[kCopiesInFlight];
#pragma unroll
    for (int k = 0; k < kCopiesInFlight; k++) {
      if (i + k * kWarp < n) values[k] = kToShared ? *elements[k] : shared[i + k * kWarp];
    }
#pragma unroll
    for (int k = 0; k < kCopiesInFlight; k++) {
      if (i + k * kWarp < n) *(kToShared ? shared + i + k * kWarp : elements[k]) = values[k];
    }
  }
}

// Chunks of `chunk_rows` rows, a multiple of 16 bytes if rows are contiguous. All lanes of the warp call each function.
template <class T, bool kAnyRows>
class ChunkRing {
 public:
  __device__ __forceinline__ ChunkRing(const CrossEntropyParams<T>& params, const SmallLayout& layout, int chunk_rows,
                                       unsigned char* shared, TransferBarrier* barriers)
      : params_(params),
        layout_(layout),
        chunk_rows_(chunk_rows),
        stage_bytes_((chunk_rows * n_classes() * static_cast<int>(sizeof(T)) + 15) / 16 * 16),
        shared_(shared + threadIdx.x / kWarp * layout.stages * stage_bytes_),
        barriers_(barriers + threadIdx.x / kWarp * kMaxStages),
        chunk_(threadIdx.x / kWarp * gridDim.x + blockIdx.x) {
    if (loads_bulk() && lane() == 0) {
#pragma unroll
      for (int s = 0; s < kMaxStages; s++) init_barrier(barriers_ + s, 1);
      publish_barriers();
#pragma unroll 1
      for (int s = 0; s + 1 < layout_.stages; s++) fill(chunk_ + s * step(), s);
    }
    __syncwarp();
  }

  __device__ __forceinline__ bool has_chunk() const { return has(chunk_); }
  __device__ __forceinline__ int64_t first_row() const { return int64_t(chunk_) * chunk_rows_; }
  __device__ __forceinline__ int64_t next_first_row() const { return int64_t(chunk_ + step()) * chunk_rows_; }
  __device__ __forceinline__ int n_rows() const { return rows_of(chunk_); }

  // The logits of the chunk.
  __device__ __forceinline__ T* wait() {
    T* const x = stage(stage_);
    const T* const from = params_.logits + first_row() * params_.logits_stride;
    const int n = n_rows() * n_classes();
    if (loads_bulk()) {
      wait_barrier(barriers_ + stage_, parity_);
    } else {
      if (stores_bulk() && lane() == 0) wait_bulk_stores_read<0>();
      __syncwarp();
      if (kAnyRows && layout_.load == ChunkCopy::kSingles) {
        copy_rows<true>(x, const_cast<T*>(from), params_.logits_stride, n_classes(), n);
      } else {
        copy_packs(reinterpret_cast<uint4*>(x), reinterpret_cast<const uint4*>(from), n / kPackSize<T>);
      }
    }
    if (!kAnyRows || layout_.load != ChunkCopy::kSingles) {
      const int i = n / kPackSize<T> * kPackSize<T> + lane();  // of the last chunk
      if (i < n) x[i] = from[i];
    }
    __syncwarp();
    return x;
  }

  // Starts to load a later chunk into the stage of the one before this.
  __device__ __forceinline__ void refill() {
    if (!loads_bulk() || lane() != 0) return;
    if (stores_bulk()) wait_bulk_stores_read<0>();
    fill(chunk_ + (layout_.stages - 1) * step(), stage_ == 0 ? layout_.stages - 1 : stage_ - 1);
  }

  // Stores the gradient, which is where the logits were, and goes on to the next chunk.
  __device__ __forceinline__ void finish(bool has_gradient) {
    if (loads_bulk() || stores_bulk()) fence_shared_for_bulk();
    __syncwarp();
    if (has_gradient) {
      T* const y = stage(stage_);
      T* const to = params_.grad + first_row() * params_.grad_stride;
      const int n = n_rows() * n_classes();
      if (kAnyRows && layout_.store == ChunkCopy::kSingles) {
        copy_rows<false>(y, to, params_.grad_stride, n_classes(), n);
      } else {
        const int n_packs = n / kPackSize<T>;
        if (!stores_bulk()) {
          copy_packs(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4*>(y), n_packs);
        } else if (lane() == 0 && n_packs > 0) {
          store_bulk(to, y, n_packs * kPackBytes);
          commit_bulk_stores();
        }
        const int i = n_packs * kPackSize<T> + lane();
        if (i < n) to[i] = y[i];
      }
      if (loads_bulk() && !stores_bulk()) fence_shared_for_bulk();
      __syncwarp();  // before the stage is filled again
    }
    chunk_ += step();
    if (++stage_ < layout_.stages) return;
    stage_ = 0;
    parity_ ^= 1;
  }

  __device__ __forceinline__ void end() const {
    if (stores_bulk() && lane() == 0) wait_bulk_stores_read<0>();
  }

 private:
  // Without kAnyRows the architecture decides, so that a kernel has the instructions of one way alone.
  __device__ __forceinline__ bool loads_bulk() const { return is_bulk(layout_.load); }
  __device__ __forceinline__ bool stores_bulk() const { return is_bulk(layout_.store); }
  __device__ __forceinline__ static bool is_bulk(ChunkCopy how) {
#ifdef __CUDA_ARCH__
    if constexpr (!kAnyRows) return __CUDA_ARCH__ >= 900;
#endif
    return how == ChunkCopy::kBulk;
  }

  __device__ __forceinline__ static int step() { return gridDim.x * kSmallWarps; }  // to the next chunk of the warp
  __device__ __forceinline__ bool has(int chunk) const { return int64_t(chunk) * chunk_rows_ < params_.n_rows; }
  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarp; }
  __device__ __forceinline__ int n_classes() const { return static_cast<int>(params_.n_classes); }
  __device__ __forceinline__ T* stage(int s) const { return reinterpret_cast<T*>(shared_ + s * stage_bytes_); }

  __device__ __forceinline__ int rows_of(int chunk) const {
    const int64_t left = params_.n_rows - int64_t(chunk) * chunk_rows_;
    return left < chunk_rows_ ? static_cast<int>(left) : chunk_rows_;
  }

  __device__ __forceinline__ void fill(int chunk, int s) const {
    if (!has(chunk)) return;
    const unsigned bytes = rows_of(chunk) * n_classes() / kPackSize<T> * kPackBytes;
    expect_bytes(barriers_ + s, bytes);
    if (bytes == 0) return;
    load_bulk(stage(s), params_.logits + int64_t(chunk) * chunk_rows_ * n_classes(), bytes, barriers_ + s);
  }

  const CrossEntropyParams<T>& params_;
  const SmallLayout& layout_;
  const int chunk_rows_, stage_bytes_;
  unsigned char* const shared_;
  TransferBarrier* const barriers_;
  int chunk_, stage_ = 0;
  unsigned parity_ = 0;
};

// -------------------------------------------------------------------------------------------------------- other rows

// A row in shared memory, of which L lanes have up to N numbers each, in consecutive words; a row of odd length has one
// number more, before or after the words, which belongs to the first lane. kExact: all lanes have N numbers.
template <class T, int L, int N, bool kExact>
struct RowInWords {
  static constexpr int P = kWordSize<T>, kWords = N / P;
  static constexpr bool kIsShared = true;

  T* row;
  uint32_t* first;
  int begin, n, single;  // the class of the first word; number of words; the class of the number more, or -1
  float extra;           // the number more, or -inf

  __device__ __forceinline__ RowInWords(T* chunk, int r, int n_classes) {
    const int j = threadIdx.x % L, n_words = P == 2 ? n_classes / 2 : n_classes & ~1;
    const int each = kExact ? kWords : (n_words + L - 1) / L, left = n_words - j * each;
    const int odd = P == 2 ? r * n_classes & 1 : 0;
    row = chunk + r * n_classes;
    begin = odd + j * each * P;
    first = reinterpret_cast<uint32_t*>(row + begin);
    n = kExact ? kWords : left < each ? left : each;
    if (n < 0) n = 0;
    single = n_classes % 2 == 0 || j != 0 ? -1 : odd ? 0 : n_classes - 1;
    extra = single < 0 ? -INFINITY : to_compute(row[single]);
  }

  __device__ __forceinline__ bool has(int k) const { return kExact || k < n; }

  __device__ __forceinline__ void load(uint32_t (&words)[kWords]) const {
#pragma unroll
    for (int k = 0; k < kWords; k++) words[k] = has(k) ? first[k] : kWordOfMinusInfinity<T>;
  }

  __device__ __forceinline__ bool owns(int c) const {
    return c == single || static_cast<unsigned>(c - begin) < static_cast<unsigned>(n * P);
  }
  __device__ __forceinline__ T logit(int c) const { return row[c]; }
  __device__ __forceinline__ void put(int c, T y) const { row[c] = y; }

  __device__ __forceinline__ float spread(const uint32_t (&words)[kWords], float max, float logit_scale) const {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kWords; k++) {
      if (has(k)) sum += spread_of<T>(words[k], max, logit_scale);
    }
    return single < 0 ? sum : sum + (max - extra * logit_scale);
  }

  __device__ __forceinline__ void store(const float (&values)[kWords * P], float extra_value, float a, float b) const {
#pragma unroll
    for (int k = 0; k < kWords; k++) {
      if (has(k)) first[k] = gradient_of<T>(values + k * P, a, b);
    }
    if (single >= 0) row[single] = from_compute<T>(fmaf(extra_value, a, -b));
  }
};

// Rows of a chunk: as many as a warp works on at once, or more so that a chunk of contiguous rows has whole packs.
template <class T>
__host__ __device__ constexpr int chunk_rows_of(int lanes) {
  return kWarp / lanes > kPackSize<T> ? kWarp / lanes : kPackSize<T>;
}

template <class T, int L, int N, bool kPlain, bool kExact>
__global__ void __launch_bounds__(kSmallThreads, kWordsBlocks<kPlain>)
    cross_entropy_words(const __grid_constant__ CrossEntropyParams<T> params,
                        const __grid_constant__ SmallLayout layout, const __grid_constant__ Reduction reduction) {
  using Row = RowInWords<T, L, N, kExact>;
  constexpr int kRows = kWarp / L, kChunkRows = chunk_rows_of<T>(L), kPasses = kChunkRows / kRows;
  constexpr bool kLoadsAhead =
      kPasses == 1 && (kExact || N < 32 || sizeof(T) == 4);  // targets; the others lack the registers
  CHARLM_DYNAMIC_SHARED(unsigned char, shared);
  CHARLM_SHARED(TransferBarrier, barriers, kSmallWarps * kMaxStages);
  const CrossEntropyPass pass = layout.pass;
  ChunkRing<T, false> ring(params, layout, kChunkRows, shared, barriers);
  const int row_in_chunk = threadIdx.x % kWarp / L;
  double loss_sum = 0;
  LoadedIndex next[kPasses];
  const auto load_next = [&](int64_t first) {
#pragma unroll
    for (int p = 0; p < kPasses; p++) {
      const int64_t n = first + p * kRows + row_in_chunk;
      if (n < params.n_rows) next[p].load(params.target, n);
    }
  };
  if (kLoadsAhead) load_next(ring.first_row());
  const float scale = row_scale(params, pass, reduction);
#pragma unroll 1
  while (ring.has_chunk()) {
    if (!kLoadsAhead) load_next(ring.first_row());
    T* chunk = nullptr;
#pragma unroll
    for (int p = 0; p < kPasses; p++) {
      const int r = p * kRows + row_in_chunk;
      const SmallRow<T> row(params, pass, ring.first_row() + r, threadIdx.x % L == 0, next[p]);
      if (kLoadsAhead) load_next(ring.next_first_row());
      if (p == 0) chunk = ring.wait();
      const Row numbers(chunk, row.exists() ? r : 0, static_cast<int>(params.n_classes));
      uint32_t words[Row::kWords];
      numbers.load(words);
      pass_over_row<kPlain, T, L>(params, pass, row, numbers, words, scale, loss_sum, [&] {
        if (p == 0) ring.refill();
      });
    }
    ring.finish(pass != CrossEntropyPass::kForward);
  }
  ring.end();
  if (pass != CrossEntropyPass::kBackward) reduce_losses(params, reduction, loss_sum);
}

// ------------------------------------------------------------------------------------------------------ other options

constexpr int kLaneClasses = 8;  // classes of a row in each lane

// Any option and type. kForward is kForwardBackward without the gradient.
template <class T, CrossEntropyPass kPass>
__global__ void __launch_bounds__(kSmallThreads, kOptionsBlocks<T>)
    cross_entropy_options(const __grid_constant__ CrossEntropyParams<T> params,
                          const __grid_constant__ SmallLayout layout, const __grid_constant__ Reduction reduction) {
  using C = Compute<T>;
  constexpr bool kWritesLoss = kPass == CrossEntropyPass::kForwardBackward;
  CHARLM_DYNAMIC_SHARED(unsigned char, shared);
  CHARLM_SHARED(TransferBarrier, barriers, kSmallWarps * kMaxStages);
  const bool has_gradient = layout.pass != CrossEntropyPass::kForward;
  const int lanes = layout.lanes, lane = threadIdx.x % lanes, n_classes = static_cast<int>(params.n_classes);
  ChunkRing<T, true> ring(params, layout, chunk_rows_of<T>(lanes), shared, barriers);
  const C scale = row_scale(params, layout.pass, reduction);
  double loss_sum = 0;
  for (; ring.has_chunk(); ring.finish(has_gradient)) {
    T* const chunk = ring.wait();
    for (int first = 0; first < ring.n_rows(); first += kWarp / lanes) {
      // All lanes must take part in the reductions; lanes without a row add nothing.
      const int r = first + threadIdx.x % kWarp / lanes;
      const bool exists = r < ring.n_rows();
      CrossEntropyRow<T, false> row(params, ring.first_row() + (exists ? r : 0));
      T* const x = chunk + (exists ? r : 0) * n_classes;
      const int end = exists ? n_classes : 0;
      C z[kLaneClasses];
#pragma unroll
      for (int k = 0; k < kLaneClasses; k++) {
        const int c = k * lanes + lane;
        z[k] = c < end ? row.transformed(x[c]) : -INFINITY;
      }
      typename CrossEntropyRow<T, false>::RowSoftmax softmax;
      if constexpr (kWritesLoss) {
        const C target_logit = exists ? row.target_logit(x) : C(0);
#pragma unroll
        for (int k = 0; k < kLaneClasses; k++) softmax.max = fmax(softmax.max, z[k]);
        softmax.max = max_over_lanes(softmax.max, lanes);
        row.template add<kLaneClasses>(softmax, z, lane, lanes, end);
        softmax.sum = sum_over_lanes(softmax.sum, lanes);
        softmax.dense_loss = sum_over_lanes(softmax.dense_loss, lanes);
        softmax.dense_sum = sum_over_lanes(softmax.dense_sum, lanes);
        row.finish(softmax);
        if (exists && lane == 0) {
          const C loss = row.is_counted() ? row.loss(softmax, target_logit) : C(0);
          loss_sum += loss;
          if (row.is_counted()) row.store(softmax, loss);
          if (!row.is_counted()) row.store_uncounted();
        }
      } else if (row.template has_gradient<kPass>()) {
        softmax = row.stored();
      }
      if (exists && lane == 0 && row.is_bad()) row.record_bad();
      if (first == 0) ring.refill();
      if (!has_gradient) continue;
      __syncwarp();  // the other lanes of the row have read the logit of the target
      if (row.template has_gradient<kPass>()) row.set_softmax(softmax, scale);
#pragma unroll
      for (int k = 0; k < kLaneClasses; k++) {
        const int c = k * lanes + lane;
        if (c >= end) continue;
        if (row.template has_zero_gradient<kPass>()) x[c] = from_compute<T>(C(0));
        if (row.template has_gradient<kPass>()) {
          x[c] = from_compute<T>(kPass == CrossEntropyPass::kTargetBackward ? row.target_gradient(z[k], c)
                                                                            : row.template gradient<kPass>(z[k], c));
        }
      }
    }
  }
  ring.end();
  if (kWritesLoss) reduce_losses(params, reduction, loss_sum);
}

// ------------------------------------------------------------------------------------------------------------- launch

template <class T>
struct SmallPlan {
  using Kernel = void (*)(CrossEntropyParams<T>, SmallLayout, Reduction);

  Kernel kernel = nullptr;
  SmallLayout layout{};
  int blocks = 1;
  int64_t shared_bytes = 0;
};

// Numbers of blocks do not follow the GPU, since they decide the order of the sum of the losses. They suit 132
// multiprocessors.
constexpr int kSmallMultiprocessors = 132;
// Half types, fewer bytes: three resident blocks that load ahead (N = 65536, V = 256: 25 us, and 26.6 with four times
// as many blocks as are resident); more bytes: the latter (N = 262144: 76 us, and 78).
constexpr int64_t kPrefetchBelowBytes = 96 << 20;
constexpr int kSmallWaves = 4;

inline bool is_aligned(const void* p, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(p) % kPackBytes == 0 && row_bytes % kPackBytes == 0;
}

// How contiguous or other rows move.
template <class T>
ChunkCopy chunk_copy(const T* p, int64_t stride, int64_t n_classes, bool has_bulk_copies) {
  if (stride != n_classes || !is_aligned(p, 0)) return ChunkCopy::kSingles;
  return has_bulk_copies ? ChunkCopy::kBulk : ChunkCopy::kPacks;
}

// Lanes that share a row, each with at most `each` classes.
inline int small_lanes(int64_t n_classes, int each) {
  int lanes = 1;
  while (lanes * each < n_classes) lanes *= 2;
  return lanes;
}

template <class T, int L, int K>
typename SmallPlan<T>::Kernel packs_kernel_of(bool is_plain, bool prefetches) {
  if (!is_plain) return &cross_entropy_packs<T, L, K, false, false>;
  if constexpr (sizeof(T) < sizeof(float)) {
    if (prefetches) return &cross_entropy_packs<T, L, K, true, true>;
  }
  return &cross_entropy_packs<T, L, K, true, false>;
}

template <class T, int L>
typename SmallPlan<T>::Kernel packs_kernel(int lanes, bool is_plain, bool prefetches) {
  if constexpr (L * 4 * kPackSize<T> < kSmallMaxClasses) {
    if (lanes > L) return packs_kernel<T, 2 * L>(lanes, is_plain, prefetches);
  }
  return packs_kernel_of<T, L, 4>(is_plain, prefetches);
}

template <class T, int L>
typename SmallPlan<T>::Kernel words_kernel(int64_t n_classes, int lanes, bool is_plain) {
  constexpr int kMost = 32, kFewer = 26;  // numbers of a lane
  if constexpr (L * kMost < kSmallMaxClasses) {
    if (lanes > L) return words_kernel<T, 2 * L>(n_classes, lanes, is_plain);
  }
  if (!is_plain) return &cross_entropy_words<T, L, kMost, false, false>;
  const int64_t even = n_classes / 2 * 2;
  if constexpr (L == 1) {
    if (even == kFewer) return &cross_entropy_words<T, L, kFewer, true, true>;  // V = 27
  }
  if constexpr (L == 2) {
    if (even == L * kMost) return &cross_entropy_words<T, L, kMost, true, true>;  // V = 65
  }
  return even <= L * kFewer ? &cross_entropy_words<T, L, kFewer, true, false>
                            : &cross_entropy_words<T, L, kMost, true, false>;
}

template <class T>
typename SmallPlan<T>::Kernel options_kernel(CrossEntropyPass pass) {
  switch (pass) {
    case CrossEntropyPass::kBackward:
      return &cross_entropy_options<T, CrossEntropyPass::kBackward>;
    case CrossEntropyPass::kTargetBackward:
      return &cross_entropy_options<T, CrossEntropyPass::kTargetBackward>;
    case CrossEntropyPass::kBackwardWithMetrics:
      return &cross_entropy_options<T, CrossEntropyPass::kBackwardWithMetrics>;
    default:
      return &cross_entropy_options<T, CrossEntropyPass::kForwardBackward>;
  }
}

template <class T>
SmallPlan<T> small_plan(const CrossEntropyParams<T>& params, CrossEntropyPass pass, int compute_capability) {
  const int64_t n_rows = params.n_rows, n_classes = params.n_classes, size = sizeof(T);
  const bool has_gradient = pass != CrossEntropyPass::kForward, has_bulk_copies = compute_capability >= kSm90;
  const bool plain = is_plain(params);
  SmallPlan<T> plan;
  plan.layout.pass = pass;
  plan.layout.load = plan.layout.store = chunk_copy(params.logits, params.logits_stride, n_classes, has_bulk_copies);
  if (has_gradient) plan.layout.store = chunk_copy(params.grad, params.grad_stride, n_classes, has_bulk_copies);
  int resident = kOptionsBlocks<T>;
  if constexpr (sizeof(T) <= sizeof(float)) {
    if (has_row_factors(params) && n_classes > 0 &&
        (!has_gradient || pass == CrossEntropyPass::kForwardBackward || pass == CrossEntropyPass::kBackward)) {
      if (n_classes % kPackSize<T> == 0 && is_aligned(params.logits, params.logits_stride * size) &&
          (!has_gradient || is_aligned(params.grad, params.grad_stride * size))) {
        const bool prefetches = plain && size < 4 &&
                                (!has_gradient || (pass == CrossEntropyPass::kForwardBackward &&
                                                   n_rows * n_classes * size < kPrefetchBelowBytes));
        // At least two lanes a row: they store 32 bytes, the unit of the memory, together.
        const bool is_short = n_classes <= 4 * kPackSize<T>;
        const int lanes = is_short ? 2 : small_lanes(n_classes, 4 * kPackSize<T>);
        plan.kernel =
            is_short ? packs_kernel_of<T, 2, 2>(plain, prefetches) : packs_kernel<T, 2>(lanes, plain, prefetches);
        const int resident = plain ? kPacksBlocks<T, true> : kPacksBlocks<T, false>;
        const int most = kSmallMultiprocessors * resident * (prefetches ? 1 : kSmallWaves);
        plan.blocks = blocks_for(ceil_div(n_rows, kWarp / lanes * kSmallWarps), most);
        return plan;
      }
      if (plan.layout.load != ChunkCopy::kSingles && plan.layout.store != ChunkCopy::kSingles) {
        plan.layout.lanes = small_lanes(n_classes - n_classes % 2, 32);
        plan.kernel = words_kernel<T, 1>(n_classes, plan.layout.lanes, plain);
        resident = plain ? kWordsBlocks<true> : kWordsBlocks<false>;
      }
    }
  }
  if (!plan.kernel) {
    plan.layout.lanes = small_lanes(n_classes, kLaneClasses);
    plan.kernel = options_kernel<T>(pass);
  }
  const int chunk_rows = chunk_rows_of<T>(plan.layout.lanes);
  const int64_t stage_bytes = round_up(chunk_rows * n_classes * size, kPackBytes);
  // Bytes in flight: three small chunks or two larger ones. The lanes copy into one chunk.
  const bool is_ring = plan.layout.load == ChunkCopy::kBulk;
  plan.layout.stages = !is_ring ? 1 : stage_bytes * kMaxStages * kSmallWarps <= 56 << 10 ? kMaxStages : 2;
  plan.shared_bytes = kSmallWarps * plan.layout.stages * stage_bytes;
  const int64_t fit = (227 << 10) / (plan.shared_bytes + 2048);
  const int blocks = kSmallMultiprocessors * static_cast<int>(fit < resident ? fit : resident);
  plan.blocks = blocks_for(ceil_div(n_rows, chunk_rows * kSmallWarps), is_ring ? blocks : kSmallWaves * blocks);
  return plan;
}

}  // namespace
}  // namespace charlm::cuda

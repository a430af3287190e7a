// Rows of classes that are read once, in packs of 16 bytes: the kernels of entropy and kl_divergence, which differ in
// the operation `Op` that they compute.
//   short rows     A group of lanes holds a row in registers. All its packs are loaded before the first is used.
//   long rows      A block walks over a row once, and rescales its sums when it meets a larger maximum.
//   gradients      Each pack needs only itself and what forward has stored of its row.
// Rows that are not aligned have single elements before and after their packs. If the tensors differ in their
// alignment, or short rows are no multiple of 16 bytes, the same kernels run with packs of one element.
//
// An Op is made from `Op::Params` and has
//   T, kInputs                     the element type, the rows that it reads (1 or 2)
//   kResidentBlocks, kMaxThreads   bounds of the registers: blocks of kRowThreads, threads of a block of a long row
//   kManyShapes                    whether short rows have a kernel for each number of lanes, or for few of them
//   input(j, n), absent(j)         row n of input j, and the element that adds nothing to the result
//   Part                           what some threads know of a row, see EntropyPart
//   finish(part, n)                stores the result of row n
//   Gradient                       what is needed of row n to write the gradient of some of its elements
#pragma once

#include "cuda/rows.cuh"

namespace charlm::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------------ elements

template <class T>
constexpr bool kIsHalf = sizeof(T) == 2;

template <class T>
constexpr T kMinusInfinity = static_cast<T>(-INFINITY);
template <>
constexpr BFloat16 kMinusInfinity<BFloat16> = {0xff80};
template <>
constexpr Float16 kMinusInfinity<Float16> = {0xfc00};

// K neighbouring elements of a row, as they are in memory: a pack, or one.
template <class T, int K>
struct Elements {
  static_assert(K == kPackSize<T>);
  uint4 bits;

  __device__ __forceinline__ static Elements load(const T* p) { return {*reinterpret_cast<const uint4*>(p)}; }

  __device__ __forceinline__ static Elements filled(T value) {
    Pack<T> pack;
#pragma unroll
    for (int k = 0; k < K; k++) pack.values[k] = value;
    return {__builtin_bit_cast(uint4, pack)};
  }

  __device__ __forceinline__ void unpack(Compute<T> (&x)[K]) const {
    if constexpr (__is_same(T, BFloat16)) {  // nvcc would first cut the words into halves
      const uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int k = 0; k < K; k++) x[k] = __uint_as_float(k % 2 == 0 ? words[k / 2] << 16 : words[k / 2] & 0xffff0000);
    } else {
      const Pack<T> pack = __builtin_bit_cast(Pack<T>, bits);
#pragma unroll
      for (int k = 0; k < K; k++) x[k] = to_compute(pack.values[k]);
    }
  }
};

template <class T>
struct Elements<T, 1> {
  T value;

  __device__ __forceinline__ static Elements load(const T* p) { return {*p}; }
  __device__ __forceinline__ static Elements filled(T value) { return {value}; }
  __device__ __forceinline__ void unpack(Compute<T> (&x)[1]) const { x[0] = to_compute(value); }
};

#ifdef __CUDA_ARCH__
// The larger of each of two half numbers. NaN is ignored, or kept with kNaN.
template <class T, bool kNaN = false>
__device__ __forceinline__ uint32_t max_of_halves(uint32_t a, uint32_t b) {
  uint32_t larger;
  if constexpr (__is_same(T, BFloat16)) {
    if constexpr (kNaN) {
      asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    } else {
      asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    }
  } else {
    if constexpr (kNaN) {
      asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    } else {
      asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    }
  }
  return larger;
}
#endif

// The largest of these elements. NaN is ignored; if all are NaN, it is NaN or -inf.
template <class T, int K, int P>
__device__ __forceinline__ Compute<T> largest(const Elements<T, K> (&x)[P]) {
#ifdef __CUDA_ARCH__
  if constexpr (kIsHalf<T> && K > 1) {  // two at a time, before they are converted: float has the same order
    uint32_t two = max_of_halves<T>(x[0].bits.x, x[0].bits.y);
    two = max_of_halves<T>(two, max_of_halves<T>(x[0].bits.z, x[0].bits.w));
#pragma unroll
    for (int i = 1; i < P; i++) {
      two = max_of_halves<T>(two, max_of_halves<T>(max_of_halves<T>(x[i].bits.x, x[i].bits.y),
                                                   max_of_halves<T>(x[i].bits.z, x[i].bits.w)));
    }
    return fmax(to_compute(T{static_cast<uint16_t>(two)}), to_compute(T{static_cast<uint16_t>(two >> 16)}));
  }
#endif
  Compute<T> m = -INFINITY;
#pragma unroll
  for (int i = 0; i < P; i++) {
    Compute<T> values[K];
    x[i].unpack(values);
#pragma unroll
    for (int k = 0; k < K; k++) m = fmax(m, values[k]);
  }
  return m;
}

// Stores K numbers as T, each rounded once.
template <int K, class T>
__device__ __forceinline__ void store_elements(T* p, const Compute<T> (&x)[K]) {
#ifdef __CUDA_ARCH__
  if constexpr (kIsHalf<T> && K > 1) {  // one instruction converts two
    uint32_t words[K / 2];
#pragma unroll
    for (int k = 0; k < K / 2; k++) {
      if constexpr (__is_same(T, BFloat16)) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[k]) : "f"(x[2 * k + 1]), "f"(x[2 * k]));
      } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words[k]) : "f"(x[2 * k + 1]), "f"(x[2 * k]));
      }
    }
    return store_pack(p, __builtin_bit_cast(Pack<T>, make_uint4(words[0], words[1], words[2], words[3])));
  }
#endif
  store_numbers<K>(p, x);
}

// ---------------------------------------------------------------------------------------------------------------- rows

// Numbers the packs of a row. A row of more packs than an int counts is read in single elements.
template <int K>
struct PackIndex {
  using type = int;
};
template <>
struct PackIndex<1> {
  using type = int64_t;
};
constexpr int64_t kMaxPacks = 1 << 30;

// A row of n classes, divided into packs, and the single elements before the first and after the last. kWhole: there
// are packs only.
template <class T, int K, bool kWhole = K == 1, class Number = typename PackIndex<K>::type>
struct RowPacks {
  using Index = Number;

  int head = 0;  // single elements before the first pack
  Index n_packs;
  int n_singles;

  __device__ __forceinline__ RowPacks(const T* row, int64_t n) {
    if constexpr (kWhole) {
      n_packs = static_cast<Index>(static_cast<uint64_t>(n) / K);
      n_singles = 0;
    } else {
      head = elements_to_alignment(row);
      if (head > n) head = static_cast<int>(n);
      n_packs = static_cast<Index>((n - head) / K);
      n_singles = static_cast<int>(n - static_cast<int64_t>(n_packs) * K);
    }
  }

  __device__ __forceinline__ int64_t pack(Index p) const { return head + static_cast<int64_t>(p) * K; }
  __device__ __forceinline__ int64_t single(int i) const {
    return i < head ? i : static_cast<int64_t>(n_packs) * K + i;
  }
};

// Loads packs first, first + step, ... of the rows; from `end` on, with kFill, packs that add nothing.
template <bool kFill, class Op, int K, int P, class Index>
__device__ __forceinline__ void load_packs(const Op& op, const typename Op::T* const (&rows)[Op::kInputs], Index first,
                                           int step, Index end, Elements<typename Op::T, K> (&x)[Op::kInputs][P]) {
  using Loaded = Elements<typename Op::T, K>;
#pragma unroll
  for (int j = 0; j < Op::kInputs; j++) {
#pragma unroll
    for (int i = 0; i < P; i++) {
      const Index p = first + i * step;
      if (p < end) {
        x[j][i] = Loaded::load(rows[j] + static_cast<int64_t>(p) * K);
      } else if (kFill) {
        x[j][i] = Loaded::filled(op.absent(j));
      }
    }
  }
}

constexpr int kRowThreads = 256;   // of a block
constexpr int kPacksInFlight = 4;  // of each row that a thread reads

template <class Op, int K, int kLanes, int P>
__global__ void __launch_bounds__(kRowThreads, P > kPacksInFlight ? 2 : Op::kResidentBlocks)
    short_rows(const __grid_constant__ typename Op::Params params) {
  using T = typename Op::T;
  const Op op(params);
  const int lane = threadIdx.x % kLanes;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kLanes) + threadIdx.x / kLanes;
  const int n_packs = n < params.n_rows ? static_cast<int>(params.n_classes) / K : 0;  // all lanes must shuffle
  const T* rows[Op::kInputs];
#pragma unroll
  for (int j = 0; j < Op::kInputs; j++) rows[j] = op.input(j, n);
  Elements<T, K> x[Op::kInputs][P];
  load_packs<true>(op, rows, lane, kLanes, n_packs, x);
  typename Op::Part part;
  part.set_maxima(op, x);
  part.template join_maxima<kLanes>(op, x);
  part.add_to_sums(op, x);
  part.template join_sums<kLanes>();
  if (lane == 0 && n < params.n_rows) op.finish(part, n);
}

template <class Op, int K>
__global__ void __launch_bounds__(Op::kMaxThreads, 1) long_rows(const __grid_constant__ typename Op::Params params) {
  using T = typename Op::T;
  using Part = typename Op::Part;
  CHARLM_SHARED(Part, parts, kMaxWarps);
  const Op op(params);
  const int64_t n = blockIdx.x;
  const T* rows[Op::kInputs];
#pragma unroll
  for (int j = 0; j < Op::kInputs; j++) rows[j] = op.input(j, n);
  const RowPacks<T, K> packs(rows[0], params.n_classes);
  Part part;
  for (int i = threadIdx.x; i < packs.n_singles; i += blockDim.x) {
    Elements<T, 1> x[Op::kInputs][1];
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) x[j][0] = Elements<T, 1>::load(rows[j] + packs.single(i));
    part.raise_maxima(op, x);
    part.add_to_sums(op, x);
  }
#pragma unroll
  for (int j = 0; j < Op::kInputs; j++) rows[j] += packs.head;
  for (typename RowPacks<T, K>::Index p = threadIdx.x; p < packs.n_packs; p += kPacksInFlight * blockDim.x) {
    Elements<T, K> x[Op::kInputs][kPacksInFlight];
    load_packs<true>(op, rows, p, static_cast<int>(blockDim.x), packs.n_packs, x);
    part.raise_maxima(op, x);
    part.add_to_sums(op, x);
  }
  part.template join<kWarp>(op);
  const int lane = threadIdx.x % kWarp, n_warps = blockDim.x / kWarp;
  if (n_warps > 1) {
    if (lane == 0) parts[threadIdx.x / kWarp] = part;
    __syncthreads();
    if (threadIdx.x >= kWarp) return;
    part = lane < n_warps ? parts[lane] : Part{};
    part.template join<kWarp>(op);
  }
  if (threadIdx.x == 0) op.finish(part, n);
}

// 2^lanes_log2 lanes handle a row, or one of the `chunks` of a row.
template <class Op, int K, bool kWhole>
__global__ void __launch_bounds__(kRowThreads, Op::kResidentBlocks)
    gradient_rows(const __grid_constant__ typename Op::Params params, int lanes_log2, int chunks) {
  using T = typename Op::T;
  using Packs = RowPacks<T, K, kWhole>;
  using Index = typename Packs::Index;
  const Op op(params);
  const int lanes = 1 << lanes_log2, lane = threadIdx.x & (lanes - 1);
  int64_t n;
  int chunk = 0;
  if (chunks > 1) {
    const unsigned row = blockIdx.x / static_cast<unsigned>(chunks);
    n = row;
    chunk = static_cast<int>(blockIdx.x - row * chunks);
  } else {
    n = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) >> lanes_log2;
    if (n >= params.n_rows) return;
  }
  const T* rows[Op::kInputs];
#pragma unroll
  for (int j = 0; j < Op::kInputs; j++) rows[j] = op.input(j, n);
  const Packs packs(rows[0], params.n_classes);
  const Index first = static_cast<Index>(chunk) * (kPacksInFlight * kRowThreads) + lane;
  const T* first_pack[Op::kInputs];
#pragma unroll
  for (int j = 0; j < Op::kInputs; j++) first_pack[j] = rows[j] + packs.head;
  Elements<T, K> x[Op::kInputs][kPacksInFlight];
  load_packs<false>(op, first_pack, first, lanes, packs.n_packs, x);
  const typename Op::Gradient gradient(op, n);
#pragma unroll
  for (int i = 0; i < kPacksInFlight; i++) {
    const Index p = first + i * lanes;
    if (p >= packs.n_packs) break;
    Elements<T, K> of_pack[Op::kInputs];
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) of_pack[j] = x[j][i];
    gradient.write(of_pack, packs.pack(p));
  }
  if (chunk > 0) return;
  for (int i = lane; i < packs.n_singles; i += lanes) {
    Elements<T, 1> single[Op::kInputs];
#pragma unroll
    for (int j = 0; j < Op::kInputs; j++) single[j] = Elements<T, 1>::load(rows[j] + packs.single(i));
    gradient.write(single, packs.single(i));
  }
}

// -------------------------------------------------------------------------------------------------------------- launch

// The rows of a tensor, which may be absent.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
};

enum class Alignment {
  kWhole,  // all rows are whole packs
  kSame,   // the elements of a class lie equally far from multiples of 16 bytes in all tensors
  kNone
};

template <class T, int kCount>
Alignment alignment_of(const Rows<T> (&tensors)[kCount], int64_t n_rows, int64_t n_classes) {
  if (n_classes / kPackSize<T> > kMaxPacks) return Alignment::kNone;
  const Rows<T>& first = tensors[0];
  uint64_t offsets = reinterpret_cast<uintptr_t>(first.data) | static_cast<uint64_t>(n_classes * sizeof(T));
  if (n_rows > 1) offsets |= static_cast<uint64_t>(first.stride * sizeof(T));
  for (const Rows<T>& rows : tensors) {
    if (!rows.data) continue;
    uint64_t difference = reinterpret_cast<uintptr_t>(rows.data) - reinterpret_cast<uintptr_t>(first.data);
    if (n_rows > 1) difference |= static_cast<uint64_t>((rows.stride - first.stride) * sizeof(T));
    if (difference % kPackBytes != 0) return Alignment::kNone;
  }
  return offsets % kPackBytes == 0 ? Alignment::kWhole : Alignment::kSame;
}

// Rows of at most this many packs are held in the registers of a warp. Twice as many packs of two rows would spill.
template <class Op, int K>
constexpr int64_t kMaxShortPacks = (Op::kManyShapes && (Op::kInputs == 1 || K == 1) ? 2 : 1) * kPacksInFlight * kWarp;

template <class Op, int K, int kLanes, int P = kPacksInFlight>
int launch_short_rows(const typename Op::Params& params, const Launch& launch) {
  const int64_t n_blocks = ceil_div(params.n_rows, kRowThreads / kLanes);
  return launch_kernel(short_rows<Op, K, kLanes, P>, blocks_for(n_blocks, INT32_MAX), kRowThreads, 0, launch.stream,
                       params);
}

// The fewest lanes that hold a row in four packs each: on an H200 no other number of lanes or of rows a lane was
// faster, for 256 classes of float (16 lanes) and of bfloat16 (8).
template <class Op, int K>
int launch_short_rows(const typename Op::Params& params, const Launch& launch) {
  const int64_t n_packs = params.n_classes / K;
  if constexpr (Op::kManyShapes && K > 1) {
    if (n_packs <= 2 * kPacksInFlight) return launch_short_rows<Op, K, 2>(params, launch);
    if (n_packs <= 4 * kPacksInFlight) return launch_short_rows<Op, K, 4>(params, launch);
  }
  if (n_packs <= 8 * kPacksInFlight) return launch_short_rows<Op, K, 8>(params, launch);
  if constexpr (Op::kManyShapes && K > 1) {
    if (n_packs <= 16 * kPacksInFlight) return launch_short_rows<Op, K, 16>(params, launch);
  }
  if constexpr (kMaxShortPacks<Op, K> > 32 * kPacksInFlight) {
    if (n_packs > 32 * kPacksInFlight) return launch_short_rows<Op, K, 32, 2 * kPacksInFlight>(params, launch);
  }
  return launch_short_rows<Op, K, 32>(params, launch);
}

// A block a row, with a thread for each kPacksInFlight packs. Too few rows to occupy a GPU have larger blocks.
template <class Op, int K>
int launch_long_rows(const typename Op::Params& params, const Launch& launch) {
  constexpr int64_t kFewRows = 132;  // multiprocessors of an H100
  const int64_t threads = ceil_div(params.n_classes, K * kPacksInFlight);
  const int most = params.n_rows <= kFewRows ? Op::kMaxThreads : kRowThreads;
  return launch_kernel(long_rows<Op, K>, blocks_for(params.n_rows, INT32_MAX),
                       blocks_for(round_up(threads, kWarp), most), 0, launch.stream, params);
}

template <class Op, class T, int kCount>
int launch_forward(const typename Op::Params& params, const Rows<T> (&inputs)[kCount], const Launch& launch) {
  if (params.n_rows == 0) return 0;
  const Alignment alignment = alignment_of(inputs, params.n_rows, params.n_classes);
  if (alignment == Alignment::kWhole && params.n_classes <= kMaxShortPacks<Op, kPackSize<T>> * kPackSize<T>) {
    return launch_short_rows<Op, kPackSize<T>>(params, launch);
  }
  if (params.n_classes <= kMaxShortPacks<Op, 1>) return launch_short_rows<Op, 1>(params, launch);
  if (alignment == Alignment::kNone) return launch_long_rows<Op, 1>(params, launch);
  return launch_long_rows<Op, kPackSize<T>>(params, launch);
}

template <class Op, int K, bool kWhole>
int launch_gradients(const typename Op::Params& params, const Launch& launch) {
  const int64_t threads = ceil_div(params.n_classes, K * kPacksInFlight), chunks = ceil_div(threads, kRowThreads);
  int lanes_log2 = 0;
  while (1 << lanes_log2 < kRowThreads && 1 << lanes_log2 < threads) lanes_log2++;
  const int64_t n_blocks = chunks > 1 ? params.n_rows * chunks : ceil_div(params.n_rows, kRowThreads >> lanes_log2);
  return launch_kernel(gradient_rows<Op, K, kWhole>, blocks_for(n_blocks, INT32_MAX), kRowThreads, 0, launch.stream,
                       params, lanes_log2, static_cast<int>(chunks));
}

template <class Op, class T, int kCount>
int launch_backward(const typename Op::Params& params, const Rows<T> (&inputs_and_gradients)[kCount],
                    const Launch& launch) {
  if (params.n_rows == 0) return 0;
  const Alignment alignment = alignment_of(inputs_and_gradients, params.n_rows, params.n_classes);
  if (alignment == Alignment::kWhole) return launch_gradients<Op, kPackSize<T>, true>(params, launch);
  // Of a short row, most threads would handle single elements.
  if (alignment == Alignment::kSame && params.n_classes > kMaxShortPacks<Op, 1>) {
    return launch_gradients<Op, kPackSize<T>, false>(params, launch);
  }
  return launch_gradients<Op, 1, true>(params, launch);
}

}  // namespace
}  // namespace charlm::cuda

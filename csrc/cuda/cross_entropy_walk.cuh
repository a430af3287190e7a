// What the kernels for many classes share: the part of a row that a block handles, its softmax, and the join of the
// softmaxes of all threads of a row. A row is shared by a warp, by a block, or by the blocks of a cluster.
#pragma once

#include "cuda/cross_entropy_numbers.cuh"
#include "cuda/cross_entropy_row.cuh"

namespace charlm::cuda {
namespace {

// Which of the options a kernel knows.
//   kPlain     is_plain()
//   kUniform   also z-loss, a positive logit_scale, and smoothing without weight, whose d_c are all equal: little more
//              work for a class
//   kAll
enum class Terms { kPlain, kUniform, kAll };

template <class T>
Terms terms_of(const CrossEntropyParams<T>& params) {
  if (is_plain(params)) return Terms::kPlain;
  const bool is_uniform = params.has_class_indices && params.softcap == 0 && params.logit_scale > 0 &&
                          !(params.weight && params.label_smoothing > 0);
  return is_uniform ? Terms::kUniform : Terms::kAll;
}

template <class T, Terms kTerms>
using TermsRow = CrossEntropyRow<T, kTerms == Terms::kPlain>;

// ------------------------------------------------------------------------------------------------------ part of a row

// The part of the row x, y that this thread handles: packs that are aligned in y, and at most one of the elements
// before the first or after the last pack. The packs of the row are divided into parts of equal size, one for each
// block of a cluster, and neighbouring threads take neighbouring packs.
template <class T, class Index = int64_t>
struct RowPart {
  const T* x;       // of this thread's first pack
  T* y;             // of the same pack
  int left;         // pack i of this thread exists if i * n_threads < left
  Index class_;     // of the first element of this thread's first pack
  Index single;     // a class, or -1
  bool is_aligned;  // x as y

  // `thread` of part `rank` of 1 << log2_parts.
  __device__ __forceinline__ RowPart(const T* row_x, T* row_y, Index n_classes, int thread, int rank, int log2_parts) {
    const int aligned = elements_to_alignment(row_y),
              head = aligned < n_classes ? aligned : static_cast<int>(n_classes);
    const int n_packs = static_cast<int>((n_classes - head) / kPackSize<T>);
    const int of_part = (n_packs + (1 << log2_parts) - 1) >> log2_parts;
    const int first = rank * of_part + thread, end = (rank + 1) * of_part;
    is_aligned = elements_to_alignment(row_x) == aligned;
    left = (end < n_packs ? end : n_packs) - first;
    class_ = head + Index(first) * kPackSize<T>;
    x = row_x + class_;
    y = row_y + class_;
    const Index other = thread < head ? thread : thread + Index(n_packs) * kPackSize<T>;
    single = rank == 0 && other < n_classes ? other : -1;
  }

  // Whether class c is among the elements of this one of n_threads.
  __device__ __forceinline__ bool owns(Index c, int n_threads) const {
    const Index offset = c - class_;
    return c >= 0 && (c == single || (offset >= 0 && offset < Index(left) * kPackSize<T> &&
                                      offset % (Index(n_threads) * kPackSize<T>) < kPackSize<T>));
  }

  // Loads the packs first, first + 1, ... of this thread; those that do not exist become -inf.
  template <int kPacks>
  __device__ __forceinline__ void load(int first, int n_threads, uint4 (&packs)[kPacks]) const {
    const T* const from = x + int64_t(first) * n_threads * kPackSize<T>;
    if (is_aligned && (first + kPacks - 1) * n_threads < left) {  // nothing to fill in
#pragma unroll
      for (int i = 0; i < kPacks; i++) packs[i] = load_bits(from + i * n_threads * kPackSize<T>);
    } else if (is_aligned) {
#pragma unroll
      for (int i = 0; i < kPacks; i++) {
        packs[i] = (first + i) * n_threads < left ? load_bits(from + i * n_threads * kPackSize<T>)
                                                  : bits_of_minus_infinity<T>();
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPacks; i++) {
        packs[i] = (first + i) * n_threads < left ? load_any_bits(from + i * n_threads * kPackSize<T>)
                                                  : bits_of_minus_infinity<T>();
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------------------- softmax

// z from a logit.
template <Terms kTerms, class T>
__device__ __forceinline__ Compute<T> z_of(const CrossEntropyParams<T>& params, const TermsRow<T, kTerms>& row,
                                           Compute<T> x) {
  if constexpr (kTerms == Terms::kPlain) return x;
  if constexpr (kTerms == Terms::kUniform) return x * params.logit_scale;
  return row.transformed_compute(x);
}

// Adds the packs of a thread to its softmax: pack i holds the classes from c + i * step on, and exists if
// i * n_threads < left.
template <Terms kTerms, class T, int kPacks>
__device__ __forceinline__ void add_packs(const CrossEntropyParams<T>& params, const TermsRow<T, kTerms>& row,
                                          Softmax<T, kTerms != Terms::kPlain>& softmax, const uint4 (&packs)[kPacks],
                                          int left, int n_threads, int64_t c) {
  using C = Compute<T>;
  constexpr int K = kPackSize<T>;
  if constexpr (kTerms == Terms::kAll) {
    C z[K], d[K];
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      if (i * n_threads >= left) break;
      unpack<T>(packs[i], z);
      row.template transform<K>(z);
      softmax.template add<K>(z);
      if (!row.has_dense()) continue;
      row.template dense<K>(c + int64_t(i) * n_threads * K, d);
#pragma unroll
      for (int k = 0; k < K; k++) softmax.add_dense(z[k], d[k]);
    }
  } else {
    softmax.rescale_to(z_of<kTerms>(params, row, largest_of<T>(packs)));
    const Exponential<T> exponential(softmax.max);
    // The sum of the distances from the maximum. Half types: of the z, which takes one instruction less; the error is
    // small next to that of the logits.
    C sums[2] = {}, distance = 0;
    int n_added = 0;
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      C x[K];
      unpack<T>(packs[i], x);
      if (kTerms == Terms::kUniform && i * n_threads >= left) break;
      n_added += K;
#pragma unroll
      for (int k = 0; k < K; k++) {
        const C z = z_of<kTerms>(params, row, x[k]);
        sums[k & 1] += exponential(z);
        if constexpr (kTerms == Terms::kUniform) distance += Exponential<T>::kIsExact ? exponential.from() - z : z;
      }
    }
    if constexpr (!Exponential<T>::kIsExact) distance = static_cast<C>(n_added) * exponential.from() - distance;
    softmax.sum += exponential.corrected(sums[0] + sums[1]);
    if constexpr (kTerms == Terms::kUniform) {
      if (row.has_dense()) {
        softmax.dense_loss += row.uniform_dense() * distance;
        softmax.dense_sum += row.uniform_dense() * static_cast<C>(n_added);
      }
    }
  }
}

// The gradients of a row from its z, where they are on a line.
template <class T, bool kPlain>
class GradientLine {
 public:
  __device__ __forceinline__ explicit GradientLine(const CrossEntropyRow<T, kPlain>& row)
      : line_(row.line()), exponential_(row.max()) {
    line_.factor = exponential_.corrected_factor(line_.factor, row.max());
  }

  __device__ __forceinline__ Compute<T> at(Compute<T> z) const { return line_.at(exponential_(z)); }

 private:
  typename CrossEntropyRow<T, kPlain>::Line line_;
  const Exponential<T> exponential_;
};

// Adds one class.
template <Terms kTerms, class T>
__device__ __forceinline__ void add_single(const CrossEntropyParams<T>& params, const TermsRow<T, kTerms>& row,
                                           Softmax<T, kTerms != Terms::kPlain>& softmax, T x, int64_t c) {
  const Compute<T> z[] = {z_of<kTerms>(params, row, to_compute(x))};
  softmax.template add<1>(z);
  if constexpr (kTerms != Terms::kPlain) {
    if (row.has_dense()) softmax.add_dense(z[0], row.dense(c));
  }
}

// The softmax of each group of `lanes` neighbouring lanes, the same bits in each.
template <class T, bool kDense>
__device__ __forceinline__ Softmax<T, kDense> over_lanes(Softmax<T, kDense> s, int lanes = kWarp) {
  s.rescale_to(max_over_lanes(s.max, lanes));
  s.sum = sum_over_lanes(s.sum, lanes);
  if constexpr (kDense) {
    s.dense_loss = sum_over_lanes(s.dense_loss, lanes);
    s.dense_sum = sum_over_lanes(s.dense_sum, lanes);
  }
  return s;
}

constexpr int kMaxCluster = 8;  // blocks that share a row

// Joins the softmaxes of the threads of one row after another. In a cluster, each warp sends its part to all blocks.
// Two buffers, used in turn: a block may be one row ahead of another.
template <class T, bool kDense, int kWarps>
class Joiner {
  using Part = Softmax<T, kDense>;
  using C = Compute<T>;

 public:
  // `parts`: [2 * kWarps * kMaxCluster], `barriers`: [2], in shared memory.
  __device__ __forceinline__ Joiner(Part* parts, TransferBarrier* barriers, int n_blocks)
      : parts_(parts), barriers_(barriers), n_blocks_(n_blocks) {
    if (n_blocks == 1) return;
    if (threadIdx.x == 0) {
      init_barrier(barriers, 1);
      init_barrier(barriers + 1, 1);
      publish_barriers();
      expect(barriers);
      expect(barriers + 1);
    }
    __syncwarp();
    arrive_in_cluster();
  }

  __device__ __forceinline__ int rank() const { return blockIdx.x % n_blocks_; }

  // Call once before the first join().
  __device__ __forceinline__ void wait_for_blocks() const {
    if (n_blocks_ > 1) wait_for_cluster();
  }

  // All threads of the row must call it.
  __device__ __forceinline__ Part join(Part part) {
    part = over_lanes(part);
    if constexpr (kWarps == 1) return part;
    constexpr int kParts = kWarps * kMaxCluster;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, n_parts = kWarps * n_blocks_;
    Part* const parts = parts_ + turn_ % 2 * kParts;
    if (n_blocks_ == 1) {
      if (lane == 0) parts[warp] = part;
      __syncthreads();
      turn_++;
      return over_lanes(parts[lane % kWarps], kWarps);
    } else {
      TransferBarrier* const barrier = barriers_ + turn_ % 2;
      __syncwarp();  // all lanes have read the last row's parts, which these let others overwrite
      if (lane < n_blocks_) send(part, parts + rank() * kWarps + warp, lane, barrier);
      wait_barrier(barrier, turn_ / 2 % 2);
      if (threadIdx.x == 0) expect(barrier);  // for the row after the next one
    }
    turn_++;
    part = lane < n_parts ? parts[lane] : Part{};
    if constexpr (kParts > kWarp) {
      for (int i = lane + kWarp; i < n_parts; i += kWarp) part = Part::join(part, parts[i]);
    }
    return over_lanes(part);
  }

 private:
  __device__ __forceinline__ void expect(TransferBarrier* barrier) const {
    expect_bytes(barrier, static_cast<unsigned>(kWarps * n_blocks_ * (kDense ? 4 : 2) * sizeof(C)));
  }

  __device__ __forceinline__ static void send(const Part& part, Part* to, int rank, TransferBarrier* barrier) {
    // Without kDense the two sums over d_c are not sent.
    constexpr int kWords = static_cast<int>((kDense ? 4 : 2) * sizeof(C) / sizeof(uint64_t));
    struct Words {
      uint64_t words[sizeof(Part) / sizeof(uint64_t)];
    };
    static_assert(alignof(Part) >= sizeof(uint64_t));
    const Words from = __builtin_bit_cast(Words, part);
#pragma unroll
    for (int i = 0; i < kWords; i++) {
      store_in_cluster(reinterpret_cast<uint64_t*>(to) + i, from.words[i], rank, barrier);
    }
  }

  Part* const parts_;
  TransferBarrier* const barriers_;
  const int n_blocks_;
  unsigned turn_ = 0;
};

}  // namespace
}  // namespace charlm::cuda

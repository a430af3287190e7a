// The choice of a kernel in which a warp works on whole rows, without a barrier of the block. Several lanes share a
// row, and each keeps its numbers in registers, so that each byte of the logits is read once and each byte of the
// gradient is written once.
//
//   rows of whole packs of 16 bytes    straight between global memory and registers (cross_entropy_packs.cuh)
//   other rows                         through a ring of chunks in shared memory, which belongs to the warp. Bulk
//                                      copies fill and empty it; the lanes copy on older GPUs and for padded rows
//                                      (chunk_ring.cuh, cross_entropy_words.cuh)
//   other options, float64             through the ring too: any option, more instructions (cross_entropy_options.cuh)
#pragma once

#include "cuda/cross_entropy_options.cuh"
#include "cuda/cross_entropy_packs.cuh"
#include "cuda/cross_entropy_words.cuh"

namespace charlm::cuda {
namespace {

constexpr int64_t kSmallMaxClasses = 256;  // for any option
constexpr int64_t kWordsMaxClasses = 512;
template <class T>
constexpr int64_t kPacksMaxClasses = kWarp * kMaxPacks * kPackSize<T>;

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

// A kernel for rows of whole packs, and its blocks of a multiprocessor.
template <class T>
struct PacksKernel {
  typename SmallPlan<T>::Kernel kernel;
  int lanes, resident;

  template <int L, int K>
  static PacksKernel of(bool is_plain, bool prefetches) {
    if (!is_plain) return {&cross_entropy_packs<T, L, K, false, false>, L, kPacksBlocks<T, L, K, false>};
    if constexpr (sizeof(T) < sizeof(float) && L * K * kPackSize<T> <= kSmallMaxClasses) {
      if (prefetches) return {&cross_entropy_packs<T, L, K, true, true>, L, kPacksBlocks<T, L, K, true>};
    }
    return {&cross_entropy_packs<T, L, K, true, false>, L, kPacksBlocks<T, L, K, true>};
  }

  // As few lanes as have at most four packs each; more packs only for a whole warp. At least two lanes: they store 32
  // bytes, the unit of the memory, together. For half types instructions count, so that none are spent on many packs
  // that do not exist.
  static PacksKernel choose(int64_t n_packs, bool is_plain, bool prefetches) {
    if (n_packs <= 2 * 2) return of<2, 2>(is_plain, prefetches);
    if (n_packs <= 2 * 4) return of<2, 4>(is_plain, prefetches);
    if (n_packs <= 4 * 4) return of<4, 4>(is_plain, prefetches);
    if (n_packs <= 8 * 4) return of<8, 4>(is_plain, prefetches);
    if (n_packs <= 16 * 4) return of<16, 4>(is_plain, prefetches);
    if constexpr (sizeof(T) < sizeof(float)) {
      if (is_plain && n_packs <= 32 * 3) return of<32, 3>(is_plain, prefetches);
    }
    if (n_packs <= 32 * 4) return of<32, 4>(is_plain, prefetches);
    if constexpr (sizeof(T) < sizeof(float)) {
      if (is_plain && n_packs <= 32 * 6) return of<32, 6>(is_plain, prefetches);
    }
    return of<32, kMaxPacks>(is_plain, prefetches);
  }
};

template <class T, int L>
typename SmallPlan<T>::Kernel words_kernel(int64_t n_classes, int lanes, bool is_plain) {
  constexpr int kMost = 32, kFewer = 26;  // numbers of a lane
  if constexpr (L * kMost < kWordsMaxClasses) {
    if (lanes > L) return words_kernel<T, 2 * L>(n_classes, lanes, is_plain);
  }
  if (!is_plain) return &cross_entropy_words<T, L, kMost, false, false>;
  const int64_t even = n_classes / 2 * 2;
  if constexpr (L == 1) {
    if (even == kFewer) return &cross_entropy_words<T, L, kFewer, true, true>;  // V = 27
  }
  if constexpr (L == 2 || L == 8) {
    if (even == L * kMost) return &cross_entropy_words<T, L, kMost, true, true>;  // V = 65 and 257
  }
  if constexpr (L < 16) {
    if (even <= L * kFewer) return &cross_entropy_words<T, L, kFewer, true, false>;
  }
  return &cross_entropy_words<T, L, kMost, true, false>;
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

// Whether a warp that holds the row in registers (cross_entropy_registers.cuh) takes fewer instructions than
// cross_entropy_options: with any option, from a quarter of its lanes on.
template <class T>
bool is_for_registers(const CrossEntropyParams<T>& params, CrossEntropyPass pass) {
  const bool is_known = pass == CrossEntropyPass::kForward || pass == CrossEntropyPass::kForwardBackward ||
                        pass == CrossEntropyPass::kBackward;
  return sizeof(T) < sizeof(double) && is_known && !has_row_factors(params) &&
         params.n_classes > kWarp / 4 * kPackSize<T>;
}

// No kernel if a row is too long.
template <class T>
SmallPlan<T> small_plan(const CrossEntropyParams<T>& params, CrossEntropyPass pass, int compute_capability) {
  const int64_t n_rows = params.n_rows, n_classes = params.n_classes, size = sizeof(T);
  const bool has_gradient = pass != CrossEntropyPass::kForward, has_bulk_copies = compute_capability >= kSm90;
  const bool plain = is_plain(params);
  SmallPlan<T> plan;
  plan.layout.pass = pass;
  plan.layout.load = plan.layout.store = chunk_copy(params.logits, params.logits_stride, n_classes, has_bulk_copies);
  if (has_gradient) plan.layout.store = chunk_copy(params.grad, params.grad_stride, n_classes, has_bulk_copies);
  if (is_for_registers(params, pass)) return plan;
  int resident = kOptionsBlocks<T>;
  if constexpr (sizeof(T) <= sizeof(float)) {
    if (has_row_factors(params) && n_classes > 0 &&
        (!has_gradient || pass == CrossEntropyPass::kForwardBackward || pass == CrossEntropyPass::kBackward)) {
      if (n_classes % kPackSize<T> == 0 && n_classes <= kPacksMaxClasses<T> &&
          is_aligned(params.logits, params.logits_stride * size) &&
          (!has_gradient || is_aligned(params.grad, params.grad_stride * size))) {
        const bool prefetches = plain && size < 4 && n_classes <= kSmallMaxClasses &&
                                (!has_gradient || (pass == CrossEntropyPass::kForwardBackward &&
                                                   n_rows * n_classes * size < kPrefetchBelowBytes));
        const auto packs = PacksKernel<T>::choose(n_classes / kPackSize<T>, plain, prefetches);
        plan.kernel = packs.kernel;
        plan.blocks = blocks_for(ceil_div(n_rows, kWarp / packs.lanes * kSmallWarps),
                                 kSmallMultiprocessors * packs.resident * (prefetches ? 1 : kSmallWaves));
        return plan;
      }
      if (n_classes <= kWordsMaxClasses && plan.layout.load != ChunkCopy::kSingles &&
          plan.layout.store != ChunkCopy::kSingles) {
        plan.layout.lanes = small_lanes(n_classes - n_classes % 2, 32);
        plan.kernel = words_kernel<T, 1>(n_classes, plan.layout.lanes, plain);
        resident = kWordsBlocks;
      }
    }
  }
  if (!plan.kernel && n_classes > kSmallMaxClasses) return plan;
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

// Rows of any length, through a ring of chunks in shared memory. L lanes of a warp share a row.
#pragma once

#include "cuda/chunk_ring.cuh"
#include "cuda/cross_entropy_lanes.cuh"

namespace charlm::cuda {
namespace {

// Blocks of a multiprocessor, few enough that no registers are spilled.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kWordsBlocks = 2;  // lanes that copy take registers; ptxas needs more for sm_120
#else
constexpr int kWordsBlocks = 3;
#endif

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

  // Opaque: what follows from r and from the lane is computed anew for each row, not kept in registers.
  __device__ __forceinline__ RowInWords(T* chunk, int r, int n_classes) {
    const int j = opaque(threadIdx.x) % L, n_words = P == 2 ? n_classes / 2 : n_classes & ~1;
    const int each = kExact ? kWords : (n_words + L - 1) / L, left = n_words - j * each;
    r = opaque(r);
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

  __device__ __forceinline__ void store_zero() const {
#pragma unroll 1
    for (int k = 0; k < n; k++) first[k] = 0;
    if (single >= 0) row[single] = from_compute<T>(0.0f);
  }
};

template <class T, int L, int N, bool kPlain, bool kExact>
__global__ void __launch_bounds__(kSmallThreads, kWordsBlocks)
    cross_entropy_words(const __grid_constant__ CrossEntropyParams<T> params,
                        const __grid_constant__ SmallLayout layout, const __grid_constant__ Reduction reduction) {
  using Row = RowInWords<T, L, N, kExact>;
  constexpr int kRows = kWarp / L, kChunkRows = chunk_rows_of<T>(L);
  CHARLM_DYNAMIC_SHARED(unsigned char, shared);
  CHARLM_SHARED(TransferBarrier, barriers, kSmallWarps * kMaxStages);
  CHARLM_SHARED(SmallState, state, 1);
  const CrossEntropyPass pass = layout.pass;
  ChunkRing<T, false> ring(params, layout, kChunkRows, shared, barriers);
  const int row_in_pass = threadIdx.x % kWarp / L;
  LoadedIndex next;  // the target of this lane's next row
  const auto load_next = [&](int64_t n) {
    if (n < params.n_rows) next.load(params.target, n);
  };
  load_next(ring.first_row() + row_in_pass);
  state->begin(params, pass, reduction);
#pragma unroll 1
  while (ring.has_chunk()) {
    T* chunk = nullptr;
#pragma unroll 1
    for (int r = row_in_pass; r < kChunkRows; r += kRows) {
      const SmallRow<T> row(params, pass, ring.chunk(), kChunkRows, r, threadIdx.x % L == 0, next);
      load_next(r + kRows < kChunkRows ? ring.first_row() + r + kRows : ring.next_first_row() + row_in_pass);
      if (r == row_in_pass) chunk = ring.wait();
      // Any numbers if the row does not exist.
      const Row numbers(chunk, r, static_cast<int>(params.n_classes));
      uint32_t words[Row::kWords];
      numbers.load(words);
      pass_over_row<kPlain, T, L>(params, pass, row, numbers, words, *state, [&] {
        if (r == row_in_pass) ring.refill();
      });
    }
    ring.finish(pass != CrossEntropyPass::kForward);
  }
  ring.end();
  if (pass != CrossEntropyPass::kBackward) reduce_losses(params, reduction, state->loss_sum());
}

}  // namespace
}  // namespace charlm::cuda

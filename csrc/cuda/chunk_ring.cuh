// A warp's ring of chunks of rows in shared memory.
#pragma once

#include "cuda/async.cuh"
#include "cuda/cross_entropy_layout.cuh"

namespace charlm::cuda {
namespace {

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

// Rows of a chunk: as many as a warp works on at once, or more so that a chunk of contiguous rows has whole packs.
template <class T>
__host__ __device__ constexpr int chunk_rows_of(int lanes) {
  return kWarp / lanes > kPackSize<T> ? kWarp / lanes : kPackSize<T>;
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
  __device__ __forceinline__ int chunk() const { return chunk_; }
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

}  // namespace
}  // namespace charlm::cuda

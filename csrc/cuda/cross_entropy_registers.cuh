// Loss and gradient of rows that fit in the registers of their threads: of a warp, of a block, or of a cluster of
// blocks. Every byte is read once and written once, and while the threads of one row wait for each other, other blocks
// load and store.
#pragma once

#include "cuda/cross_entropy_dense.cuh"
#include "cuda/cross_entropy_reduction.cuh"

namespace charlm::cuda {
namespace {

// kThreads of a block share a row with the other blocks of its cluster; each has kPacks packs. A row of one warp is one
// of four of a block.
template <class T, Terms kTerms, int kThreads, int kPacks>
struct RegisterShape {
  static constexpr int kBlockThreads = kThreads == kWarp ? 128 : kThreads;
  static constexpr int kRows = kBlockThreads / kThreads;  // of a block
  // As many as 8 packs leave without spilling: 64 to 96 registers for each thread.
  static constexpr int kResidentThreads = kTerms == Terms::kAll && kPacks == 2             ? 896
                                          : kTerms == Terms::kAll && kThreads == kWarp     ? 640
                                          : kTerms == Terms::kAll                          ? 768
                                          : kTerms == Terms::kUniform || kThreads == kWarp ? 896
                                                                                           : 1024;
  static constexpr int kResidentBlocks = kResidentThreads / kBlockThreads < 1 ? 1 : kResidentThreads / kBlockThreads;
};

template <class T, Terms kTerms, int kThreads, int kPacks>
__global__ void __launch_bounds__(RegisterShape<T, kTerms, kThreads, kPacks>::kBlockThreads,
                                  RegisterShape<T, kTerms, kThreads, kPacks>::kResidentBlocks)
    cross_entropy_registers(const __grid_constant__ CrossEntropyParams<T> params, const int log2_cluster,
                            const __grid_constant__ Reduction reduction) {
  using Shape = RegisterShape<T, kTerms, kThreads, kPacks>;
  using Row = TermsRow<T, kTerms>;
  using C = Compute<T>;
  constexpr CrossEntropyPass kPass = CrossEntropyPass::kForwardBackward;
  constexpr bool kDense = kTerms != Terms::kPlain;
  constexpr int kWarps = kThreads / kWarp, K = kPackSize<T>;
  using RowSoftmax = Softmax<T, kDense>;
  CHARLM_SHARED(RowSoftmax, parts, 2 * kWarps * kMaxCluster);
  CHARLM_SHARED(TransferBarrier, barriers, 2);
  // What a warp needs for a row beside its packs, since registers are scarce.
  struct WarpState {
    double scale, loss_sum;
    typename Row::Saved row;
    C target_logit;  // written by the lane that has it
  };
  CHARLM_SHARED(WarpState, states, Shape::kBlockThreads / kWarp);
  CHARLM_SHARED(T, all_singles, Shape::kRows * kWarp);
  WarpState& state = states[threadIdx.x / kWarp];
  T* const singles = all_singles + threadIdx.x / kThreads * kWarp;  // of a row, each for its thread alone
  Joiner<T, kDense, kWarps> joiner(parts, barriers, 1 << log2_cluster);
  const int thread = threadIdx.x % kThreads;
  // Fewer than 2^31: a row has 128 bytes or more.
  const int step = (gridDim.x >> log2_cluster) * Shape::kRows, n_rows = static_cast<int>(params.n_rows);
  const bool is_first = joiner.rank() == 0 && thread == 0;
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) state.loss_sum = 0;

  for (int n = (blockIdx.x >> log2_cluster) * Shape::kRows + threadIdx.x / kThreads; n < n_rows; n += step) {
    __syncwarp();  // another lane may have added the loss of the previous row
    const auto row_logits = [&](int row_n) { return params.logits + row_n * params.logits_stride; };
    const auto row_gradient = [&](int row_n) { return params.grad + row_n * params.grad_stride; };
    const auto part_of = [&](int row_n) {
      return RowPart<T, int>(row_logits(row_n), row_gradient(row_n), static_cast<int>(params.n_classes), thread,
                             joiner.rank(), log2_cluster);
    };
    [[maybe_unused]] uint4 packs[kPacks];
    [[maybe_unused]] DenseNumbers<T, kPacks> numbers;  // kAll: in place of the packs
    RowSoftmax softmax;
    bool is_counted;
    {
      // The target's load comes first and is used last, since what follows it waits for it.
      const int64_t loaded_target = Row::load_target(params, n);
      const RowPart<T, int> part = part_of(n);
      if constexpr (kTerms == Terms::kAll) {
        numbers.load(params, n, part, kThreads);
      } else {
        part.load(0, kThreads, packs);
      }
      const T single = part.single >= 0 ? row_logits(n)[part.single] : from_compute<T>(-INFINITY);
      const Row row(params, n, loaded_target);
      is_counted = row.is_counted();
      if (is_counted) {
        // Before anything is written: the gradient may overwrite the logits.
        const bool owns_target = part.owns(static_cast<int>(row.target()), kThreads);
        const T target_logit = owns_target ? row_logits(n)[row.target()] : from_compute<T>(0);
        if (lane == 0) state.row = row.saved();
        if (part.single >= 0) singles[thread] = single;
        if constexpr (kTerms == Terms::kAll) {
          numbers.add(params, row, softmax, part.left, kThreads, part.class_);
        } else {
          add_packs<kTerms>(params, row, softmax, packs, part.left, kThreads, part.class_);
        }
        if (part.single >= 0) add_single<kTerms>(params, row, softmax, singles[thread], part.single);
        if (owns_target) state.target_logit = row.transformed(target_logit);
      }
    }
    if (n < step) joiner.wait_for_blocks();
    if (is_counted) {
      softmax = joiner.join(softmax);
      __syncwarp();
    }
    if (opaque(n) < step) {
      const double divided_by = divisor(params, reduction);
      if (lane == 0) state.scale = reciprocal<T>(divided_by);
      __syncwarp();
    }

    // Computed anew: until here its registers were needed for packs.
    const int again = opaque(n);
    const RowPart<T, int> part = part_of(again);
    if (!is_counted) {
      const Row uncounted(params, again);
      if (is_first) {
        uncounted.store_uncounted();
        if (uncounted.is_bad()) uncounted.record_bad();
      }
      if (!uncounted.template has_zero_gradient<kPass>()) continue;
#pragma unroll
      for (int i = 0; i < kPacks; i++) {
        if (i * kThreads < part.left) store_bits(part.y + i * kThreads * K, uint4{});
      }
      if (part.single >= 0) row_gradient(again)[part.single] = from_compute<T>(0);
      continue;
    }

    Row row(params, again, state.row);
    const int target = state.row.target;
    const bool owns_target = part.owns(target, kThreads);
    const C target_logit = owns_target ? state.target_logit : C(0);
    row.finish(softmax);
    if (params.has_class_indices ? owns_target : is_first) {
      const C loss = row.loss(softmax, target_logit);
      state.loss_sum += loss;
      row.store(softmax, loss);
    }
    row.set_softmax(softmax, state.scale);
    const T gradient_of_target =
        from_compute<T>(owns_target ? row.template gradient_of_target<kPass>(target_logit) : C(0));
    if constexpr (kTerms == Terms::kAll) {
      numbers.begin_gradients(params, row);
      if (part.single >= 0) {
        row_gradient(again)[part.single] =
            from_compute<T>(row.template gradient<kPass>(row.transformed(singles[thread]), part.single));
      }
#pragma unroll
      for (int i = 0; i < kPacks; i++) {
        if (i * kThreads >= part.left) break;
        store_bits(part.y + i * kThreads * K, numbers.gradient(params, row, i, part.class_ + i * kThreads * K));
      }
    } else {
      const GradientLine<T, kTerms == Terms::kPlain> line(row);
      if (part.single >= 0) {
        row_gradient(again)[part.single] =
            from_compute<T>(line.at(z_of<kTerms>(params, row, to_compute(singles[thread]))));
      }
#pragma unroll
      for (int i = 0; i < kPacks; i++) {
        if (i * kThreads >= part.left) break;
        C x[K];
        unpack_again<T>(packs[i], x);
#pragma unroll
        for (int k = 0; k < K; k++) x[k] = line.at(z_of<kTerms>(params, row, x[k]));
        store_bits(part.y + i * kThreads * K, packed<T>(x));
      }
    }
    if (owns_target) row_gradient(again)[target] = gradient_of_target;  // after the pack that holds it
  }
  __syncwarp();
  reduce_losses(params, reduction, lane == 0 ? state.loss_sum : 0);
}

}  // namespace
}  // namespace charlm::cuda

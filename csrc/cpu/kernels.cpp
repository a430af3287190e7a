// The table of CPU kernels (core/kernels.h) for one instruction set. setup.py compiles this file once for each set,
// with -DCHARLM_ISA=<name>. No torch or STL header may be included here: of an inline function that is not inlined
// and was compiled for several sets, the linker keeps one copy for all callers, which could be the AVX-512 one. The
// table is a constant, so that loading the module runs no code of an instruction set that the machine may lack.
#include "core/kernels.h"

#include "cpu/cross_entropy_tiles.h"
#include "cpu/embedding_linear_rows.h"
#include "cpu/embedding_rows.h"
#include "cpu/entropy_rows.h"
#include "cpu/gemm/gemm_tiles.h"
#include "cpu/kl_div_elements.h"
#include "cpu/kl_divergence_rows.h"

#define CHARLM_CONCAT_(a, b) a##b
#define CHARLM_CONCAT(a, b) CHARLM_CONCAT_(a, b)

namespace charlm {
namespace CHARLM_ISA {

// The kernels that only a GPU has are null.
template <class T>
constexpr TypedKernels<T> kTypedKernels = {
    .cross_entropy = {.forward = &cross_entropy_forward<T>,
                      .forward_backward = &cross_entropy_forward_backward<T>,
                      .backward = &cross_entropy_backward<T>,
                      .target_backward = &cross_entropy_target_backward<T>,
                      .metrics = &cross_entropy_metrics<T>},
    .embedding = {.accumulate = &embedding_accumulate<T>,
                  .sum_rows = &embedding_sum_rows<T>,
                  .sum_tables = &embedding_sum_tables<T>},
    .embedding_linear = {.slab = &folded_slab<Compute<T>>,
                         .pack = &folded_pack<T>,
                         .unpack = &folded_unpack<T>,
                         .pack_columns = &folded_pack_columns<T>,
                         .forward = &embedding_linear_forward<T>,
                         .backward = &embedding_linear_backward<T>,
                         .activate = &embedding_linear_activate<T>,
                         .activation_backward = &embedding_linear_activation_backward<T>},
    .entropy = {.forward = &entropy_forward<T>, .backward = &entropy_backward<T>},
    .kl_div = {.forward = &kl_div_forward<T>, .backward = &kl_div_backward<T>},
    .kl_divergence = {.forward = &kl_divergence_forward<T>, .backward = &kl_divergence_backward<T>},
    .gemm = &gemm<Compute<T>>,
};

}  // namespace CHARLM_ISA

extern const Kernels CHARLM_CONCAT(CHARLM_ISA, _kernels);
const Kernels CHARLM_CONCAT(CHARLM_ISA, _kernels) = {
    .float32 = CHARLM_ISA::kTypedKernels<float>,
    .float64 = CHARLM_ISA::kTypedKernels<double>,
    .bfloat16 = CHARLM_ISA::kTypedKernels<BFloat16>,
    .float16 = CHARLM_ISA::kTypedKernels<Float16>,
    .embedding_forward = &CHARLM_ISA::embedding_forward,
    .count_ignored = &CHARLM_ISA::count_ignored,
    .first_out_of_range = &CHARLM_ISA::first_out_of_range<int64_t>,
    .vector_bytes = CHARLM_ISA::kVectorBytes,
};

}  // namespace charlm

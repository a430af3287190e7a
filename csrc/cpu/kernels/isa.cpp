// Every kernel, for the one instruction set that this object is compiled for: setup.py compiles this file once per
// set, with -DCHARLM_ISA=<name>. No torch or STL header may be included here: an inline function of theirs, compiled
// for AVX-512, could be the copy that the linker keeps for everyone.
#include "cross_entropy_passes.h"
#include "embedding_linear_rows.h"
#include "embedding_rows.h"
#include "entropy_rows.h"
#include "gemm_tiles.h"
#include "kernels.h"
#include "kl_div_columns.h"
#include "pointwise_kl_div.h"

#define CHARLM_CONCAT_(a, b) a##b
#define CHARLM_CONCAT(a, b) CHARLM_CONCAT_(a, b)

namespace charlm {
namespace CHARLM_ISA {

template <class T>
constexpr TypedKernels<T> kTypedKernels = {
    {
        &cross_entropy_forward<T>,
        &cross_entropy_forward_backward<T>,
        &cross_entropy_backward<T>,
        &cross_entropy_target_backward<T>,
        &cross_entropy_metrics<T>,
    },
    {&embedding_accumulate<T>, &embedding_sum_rows<T>, &embedding_sum_tables<T>},
    {
        &folded_slab<Compute<T>>,
        &folded_pack<T>,
        &folded_unpack<T>,
        &folded_pack_columns<T>,
        &embedding_linear_forward<T>,
        &embedding_linear_backward<T>,
        &embedding_linear_activate<T>,
        &embedding_linear_activation_backward<T>,
    },
    &gemm<Compute<T>>,
    {&entropy_forward<T>, &entropy_backward<T>},
    {&kl_div_forward<T>, &kl_div_backward<T>},
    {&pointwise_kl_div_forward<T>, &pointwise_kl_div_backward<T>},
};

}  // namespace CHARLM_ISA

extern const Kernels CHARLM_CONCAT(CHARLM_ISA, _kernels);
const Kernels CHARLM_CONCAT(CHARLM_ISA, _kernels) = {
    CHARLM_ISA::kVectorBytes,
    &CHARLM_ISA::count_ignored,
    &CHARLM_ISA::first_out_of_range<int64_t>,
    {
        &CHARLM_ISA::embedding_forward<int8_t>,
        &CHARLM_ISA::embedding_forward<int16_t>,
        &CHARLM_ISA::embedding_forward<int32_t>,
        &CHARLM_ISA::embedding_forward<int64_t>,
        &CHARLM_ISA::embedding_forward<uint8_t>,
        &CHARLM_ISA::embedding_forward<uint16_t>,
        &CHARLM_ISA::embedding_forward<uint32_t>,
        &CHARLM_ISA::embedding_forward<uint64_t>,
    },
    CHARLM_ISA::kTypedKernels<float>,
    CHARLM_ISA::kTypedKernels<double>,
    CHARLM_ISA::kTypedKernels<BFloat16>,
    CHARLM_ISA::kTypedKernels<Float16>,
};

}  // namespace charlm

// embedding's kernels, for every dtype.
#include "embedding_forward.cuh"
#include "embedding_sorted.cuh"
#include "embedding_tables.cuh"

namespace charlm::cuda {

int embedding_forward(const EmbeddingTable& table, const Indices& indices, int64_t n_indices, void* output,
                      Stream stream) {
  return copy_table(table, indices, n_indices, output, stream);
}

#define CHARLM_INSTANTIATE(T)                                                                  \
  template bool embedding_backward_uses_tables<T>(int64_t);                                    \
  template int64_t embedding_backward_tables_size<T>(int64_t, int64_t, int64_t);               \
  template int embedding_backward_tables<T>(const EmbeddingGradient<T>&, Compute<T>*, Stream); \
  template int64_t embedding_backward_sorted_size<T>(int64_t, int64_t);                        \
  template int embedding_backward_sorted<T>(const EmbeddingGradient<T>&, const int64_t*, bool, Compute<T>*, Stream);

CHARLM_INSTANTIATE(float)
#ifndef CHARLM_CUDA_FLOAT_ONLY
CHARLM_INSTANTIATE(double)
CHARLM_INSTANTIATE(BFloat16)
CHARLM_INSTANTIATE(Float16)
#endif

}  // namespace charlm::cuda

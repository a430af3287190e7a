// g++ -O3 -march=native -fPIC -shared -Wno-psabi -fopenmp cpu6_pages.cpp -o cpu6_pages.so
// The new memory of the gradient comes in pages of 2 MB: 512 times fewer page faults than with pages of 4 KB.
#include <sys/mman.h>

#include "row.h"

extern "C" void cross_entropy(const float* logits,    // [N, V]
                              const int64_t* target,  // [N]
                              float* losses,          // [N]
                              float* grad,            // [N, V], never touched before
                              int64_t n_rows, int64_t n_classes) {
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(grad), end = begin + n_rows * n_classes * sizeof(float);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // only advice: may be refused
#pragma omp parallel for
  for (int64_t n = 0; n < n_rows; n++) {
    const int64_t row = n * n_classes;
    losses[n] = cross_entropy_row(logits + row, target[n], grad + row, n_classes, 1.0f / n_rows);
  }
}

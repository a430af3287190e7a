// at::parallel_for on libgomp, for Clang. Clang's -fopenmp calls libomp, a second OpenMP runtime beside torch's libgomp
// that torch.set_num_threads does not control, and its -fopenmp=libgomp ignores every pragma. setup.py therefore
// compiles without -fopenmp and includes this file first into every source (-include). It defines torch's parallel loop
// with a call of GOMP_parallel, to which GCC compiles the OpenMP pragma.
#pragma once

#include <ATen/Config.h>

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)

#define INTRA_OP_PARALLEL  // at::parallel_for calls invoke_parallel

#include <stdint.h>

namespace at::internal {
// Declared before ATen/Parallel.h, whose templates look it up at their definition.
template <class F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f);
}  // namespace at::internal

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <exception>

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
}

namespace at::internal {

// As in ATen/ParallelOpenMP.h: calls f(begin, end) on each thread for its part, and rethrows the first exception.
template <class F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  struct Loop {
    int64_t begin, end, grain_size;
    const F& f;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error = nullptr;
  } loop{begin, end, grain_size, f};
  const auto run_part = [](void* data) {
    Loop& loop = *static_cast<Loop*>(data);
    const int64_t size = loop.end - loop.begin;
    int64_t n_parts = omp_get_num_threads();
    if (loop.grain_size > 0) n_parts = std::min(n_parts, divup(size, loop.grain_size));
    const int64_t part = divup(size, n_parts), thread = omp_get_thread_num();
    const int64_t first = loop.begin + thread * part;
    if (first >= loop.end) return;
    try {
      ThreadIdGuard guard(thread);
      loop.f(first, std::min(loop.end, first + part));
    } catch (...) {
      if (!loop.failed.test_and_set()) loop.error = std::current_exception();
    }
  };
  GOMP_parallel(run_part, &loop, 0, 0);  // 0 threads: the number set by torch.set_num_threads
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace at::internal

#endif

// nvcc -O3 -arch=native -Xcompiler -fPIC -shared cuda1_thread.cu -o cuda1_thread.so
// A thread a row: the loops of cpu2_one_row.cpp, by as many threads as there are rows.
//
// Neighbouring threads read addresses that are V floats apart. A load of a warp is then 32 transfers of 32 bytes, of
// which 4 are used at a time.
#include <cmath>
#include <cstdint>

__global__ void a_thread_a_row(const float* logits, const int64_t* target, float* losses, float* grad, int64_t n_rows,
                               int64_t n_classes) {
  const int64_t n = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (n >= n_rows) return;
  const float* z = logits + n * n_classes;  // [V]
  float* g = grad + n * n_classes;          // [V]
  const int64_t y = target[n];
  float largest = z[0], sum = 0;
  for (int64_t c = 1; c < n_classes; c++) largest = fmaxf(largest, z[c]);
  for (int64_t c = 0; c < n_classes; c++) {
    g[c] = expf(z[c] - largest);
    sum += g[c];
  }
  losses[n] = logf(sum) + (largest - z[y]);
  const float at_target = (g[y] / sum - 1) / n_rows, factor = 1 / (sum * n_rows);
  for (int64_t c = 0; c < n_classes; c++) g[c] *= factor;
  g[y] = at_target;
}

extern "C" void cross_entropy(const float* logits,    // [N, V]
                              const int64_t* target,  // [N]
                              float* losses,          // [N]
                              float* grad,            // [N, V]
                              int64_t n_rows, int64_t n_classes) {
  constexpr int kThreads = 128;
  const int blocks = static_cast<int>((n_rows + kThreads - 1) / kThreads);
  a_thread_a_row<<<blocks, kThreads>>>(logits, target, losses, grad, n_rows, n_classes);
}

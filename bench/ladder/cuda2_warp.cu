// nvcc -O3 -arch=native -Xcompiler -fPIC -shared cuda2_warp.cu -o cuda2_warp.so
// A warp a row: 32 lanes read 32 neighbouring classes, one transfer of 128 bytes, and join their sums by shuffles.
//
// Each lane keeps the largest of its logits and the sum of its exponentials relative to that one, so that the row is
// read once for the loss (Milakov and Gimelshein 2018), and once more for the gradient, which is written once.
#include <cmath>
#include <cstdint>

constexpr int kWarp = 32, kThreads = 128;

__global__ void a_warp_a_row(const float* logits, const int64_t* target, float* losses, float* grad, int64_t n_rows,
                             int64_t n_classes) {
  const int64_t n = blockIdx.x * static_cast<int64_t>(kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (n >= n_rows) return;                  // all lanes of a warp, which has one row
  const float* z = logits + n * n_classes;  // [V]
  float* g = grad + n * n_classes;          // [V]
  const int64_t y = target[n];
  float m = -INFINITY, sum = 0;
  for (int64_t c = lane; c < n_classes; c += kWarp) {
    if (z[c] > m) {
      sum *= expf(m - z[c]);
      m = z[c];
    }
    sum += expf(z[c] - m);
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float other_m = __shfl_xor_sync(0xffffffff, m, step), other_sum = __shfl_xor_sync(0xffffffff, sum, step);
    const float larger = fmaxf(m, other_m);
    if (larger == -INFINITY) continue;  // two lanes without a class
    sum = sum * expf(m - larger) + other_sum * expf(other_m - larger);
    m = larger;
  }
  if (lane == 0) losses[n] = logf(sum) + (m - z[y]);
  const float factor = 1 / (sum * n_rows), share = 1.0f / n_rows;
  for (int64_t c = lane; c < n_classes; c += kWarp) g[c] = expf(z[c] - m) * factor - (c == y ? share : 0);
}

extern "C" void cross_entropy(const float* logits,    // [N, V]
                              const int64_t* target,  // [N]
                              float* losses,          // [N]
                              float* grad,            // [N, V]
                              int64_t n_rows, int64_t n_classes) {
  const int blocks = static_cast<int>((n_rows + kThreads / kWarp - 1) / (kThreads / kWarp));
  a_warp_a_row<<<blocks, kThreads>>>(logits, target, losses, grad, n_rows, n_classes);
}

// g++ -O3 -march=native -fPIC -shared cpu2_one_row.cpp -o cpu2_one_row.so
// One row at a time and one exponential a class: exp(z - m) is kept in the gradient's memory until the sum is known.
//
// With m the largest logit and S = sum_c exp(z_c - m), the loss is log S + m - z_y, which needs no softmax.
#include <cmath>
#include <cstdint>

extern "C" void cross_entropy(const float* logits,    // [N, V]
                              const int64_t* target,  // [N]
                              float* losses,          // [N]
                              float* grad,            // [N, V]
                              int64_t n_rows, int64_t n_classes) {
  const float share = 1.0f / n_rows;
  for (int64_t n = 0; n < n_rows; n++) {
    const float* z = logits + n * n_classes;  // [V]
    float* g = grad + n * n_classes;          // [V]
    const int64_t y = target[n];
    float largest = z[0];
    for (int64_t c = 1; c < n_classes; c++) largest = z[c] > largest ? z[c] : largest;
    double sum = 0;
    for (int64_t c = 0; c < n_classes; c++) {
      g[c] = std::exp(z[c] - largest);
      sum += g[c];
    }
    losses[n] = std::log(sum) + (largest - z[y]);
    const float at_target = (g[y] / sum - 1) * share;
    const float factor = share / sum;
    for (int64_t c = 0; c < n_classes; c++) g[c] *= factor;
    g[y] = at_target;
  }
}

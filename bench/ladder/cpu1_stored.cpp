// g++ -O3 -march=native -fPIC -shared cpu1_stored.cpp -o cpu1_stored.so
// The textbook: the softmax of all rows is stored, then read for the loss and once more for the gradient.
//
// Every rung has this signature. losses[n] is -log softmax(z_n)_y, and grad is that of their mean:
//   d mean / d z_nc = (softmax(z_n)_c - [c = y_n]) / N
#include <cmath>
#include <cstdint>
#include <vector>

extern "C" void cross_entropy(const float* logits,    // [N, V]
                              const int64_t* target,  // [N], each in [0, V)
                              float* losses,          // [N]
                              float* grad,            // [N, V]
                              int64_t n_rows, int64_t n_classes) {
  std::vector<float> softmax(n_rows * n_classes);  // [N, V]
  for (int64_t n = 0; n < n_rows; n++) {
    const float* z = logits + n * n_classes;  // [V]
    float* p = softmax.data() + n * n_classes;
    float largest = z[0];
    for (int64_t c = 1; c < n_classes; c++) largest = std::fmax(largest, z[c]);
    double sum = 0;  // in double: float would round away small terms of a long row
    for (int64_t c = 0; c < n_classes; c++) sum += std::exp(z[c] - largest);
    for (int64_t c = 0; c < n_classes; c++) p[c] = std::exp(z[c] - largest) / sum;
  }
  for (int64_t n = 0; n < n_rows; n++) losses[n] = -std::log(softmax[n * n_classes + target[n]]);
  for (int64_t n = 0; n < n_rows; n++) {
    for (int64_t c = 0; c < n_classes; c++) {
      const int64_t i = n * n_classes + c;
      grad[i] = (softmax[i] - (c == target[n])) / n_rows;
    }
  }
}

// One row of logits in tiles of 2048 classes: 8 KB, which stay in the first-level cache between their two passes.
//
// The maximum of a row would need a pass of its own over all tiles. Instead the exponentials of a tile are relative to
// the largest logit so far, m, and the sum so far is multiplied by exp(m_before - m) where m grows ("online softmax",
// Milakov and Gimelshein 2018). The pass that scales the gradient corrects each tile in the same way.
#pragma once

#include <vector>

#include "vectors.h"

constexpr int64_t kTile = 2048;

// z, g: [V]. The loss is returned, and its gradient times `share` is written to g.
inline float cross_entropy_row(const float* z, int64_t y, float* g, int64_t n_classes, float share) {
  std::vector<float> relative_to((n_classes + kTile - 1) / kTile);  // m of each tile
  float m = -INFINITY, sum = 0;
  for (int64_t tile = 0; tile < n_classes; tile += kTile) {
    const int64_t tile_size = n_classes - tile < kTile ? n_classes - tile : kTile;
    Vec maxima[4], sums[4] = {};
    for (Vec& v : maxima) v = Vec{} - INFINITY;
    for_each_vector(tile_size, [&](int64_t c, int64_t size) {
      __builtin_prefetch(z + tile + c + kTile);  // the next tile, or the next row
      Vec& largest = maxima[c / kLanes % 4];
      largest = max(largest, load(z + tile + c, size));
    });
    const float before = m, largest = max_of_lanes(max(max(maxima[0], maxima[1]), max(maxima[2], maxima[3])));
    m = largest > m ? largest : m;
    for_each_vector(tile_size, [&](int64_t c, int64_t size) {
      const Vec e = exp(load(z + tile + c, size) - m);
      sums[c / kLanes % 4] += e;
      store(g + tile + c, e, size);
    });
    sum = sum * std::exp(before - m) + sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    relative_to[tile / kTile] = m;
  }
  const float at_target = (std::exp(z[y] - m) / sum - 1) * share;
  for (int64_t tile = 0; tile < n_classes; tile += kTile) {
    const int64_t tile_size = n_classes - tile < kTile ? n_classes - tile : kTile;
    const float factor = std::exp(relative_to[tile / kTile] - m) * share / sum;
    float* e = g + tile;
    for_each_vector(tile_size, [&](int64_t c, int64_t size) { store(e + c, load(e + c, size) * factor, size); });
  }
  g[y] = at_target;
  return std::log(sum) + (m - z[y]);
}

// What the kernels of cross_entropy_small.cuh share.
#pragma once

#include "cuda/rows.cuh"
#include "ops/cross_entropy.h"

namespace charlm::cuda {
namespace {

constexpr int kSmallWarps = 8;
constexpr int kSmallThreads = kSmallWarps * kWarp;
constexpr int kMaxStages = 3;  // of a ring

// How a chunk of rows moves between global and shared memory.
enum class ChunkCopy {
  kBulk,    // by bulk copies: contiguous rows, a multiple of 16 bytes from the start
  kPacks,   // by the lanes, in packs of 16 bytes: the same, on a GPU without bulk copies
  kSingles  // by the lanes, one number at a time: any rows
};

// The same for all rows of a launch.
struct SmallLayout {
  CrossEntropyPass pass;
  int lanes, stages;
  ChunkCopy load, store;
};

}  // namespace
}  // namespace charlm::cuda

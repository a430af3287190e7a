// CUDA's stream type, for headers that are read without CUDA's own.
#pragma once

struct CUstream_st;

namespace charlm::cuda {

using Stream = CUstream_st*;  // cudaStream_t

}  // namespace charlm::cuda

// Runs the kernels of defects.h, for tests of the emulator itself: ../test_cuda_emulator.py lists which checker must
// report which kernel. `defects` prints their names; `defects NAME...` runs them and writes to standard error "begin
// NAME", the reports, and "end NAME STATUS". Python calls charlm_run_defect().

#include "defects.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace charlm::cuda {
namespace {

struct Kernel {
  const char* name;
  void (*run)(float* out);
  float (*expected)(int i);  // out[i]; NaN: any number
};

float ones(int i) { return i < 2 * kThreads ? 1 : NAN; }
float ones_of_one_block(int i) { return i < kThreads ? 1 : NAN; }

float numbers(int i) { return i < 2 * kThreads ? static_cast<float>(i) : NAN; }

// Launches a kernel that adds one to 2 * kThreads numbers.
void add_one(void (*kernel)(float*, const float*), float* out) {
  alignas(16) float in[2 * kThreads];
  for (int i = 0; i < 2 * kThreads; ++i) in[i] = static_cast<float>(i - 1);
  launch_kernel(kernel, 1, kThreads, 0, nullptr, out, in);
}

constexpr LaunchOptions kCluster = {4, false}, kDependent = {1, true};

const Kernel kKernels[] = {
    {"barrier_in_branch", [](float* out) { launch_kernel(barrier_in_branch, 1, kThreads, 0, nullptr, out); }, ones},
    {"different_barriers", [](float* out) { launch_kernel(different_barriers, 1, kThreads, 0, nullptr, out); }, ones},
    {"exit_before_barrier", [](float* out) { launch_kernel(exit_before_barrier, 1, kThreads, 0, nullptr, out, 50); },
     ones},
    {"barrier_in_loop_of_thread_length",
     [](float* out) { launch_kernel(barrier_in_loop_of_thread_length, 1, kThreads, 0, nullptr, out); }, ones},
    {"barriers_of_warp_and_block",
     [](float* out) { launch_kernel(barriers_of_warp_and_block, 1, kThreads, 0, nullptr, out); }, ones},
    {"shuffle_in_branch", [](float* out) { launch_kernel(shuffle_in_branch, 1, kThreads, 0, nullptr, out); }, ones},
    {"shuffle_from_lane_outside_mask",
     [](float* out) { launch_kernel(shuffle_from_lane_outside_mask, 1, kThreads, 0, nullptr, out); }, ones},
    {"shuffle_without_own_lane",
     [](float* out) { launch_kernel(shuffle_without_own_lane, 1, kThreads, 0, nullptr, out); }, ones},
    {"shuffle_in_partial_warp", [](float* out) { launch_kernel(shuffle_in_partial_warp, 1, 48, 0, nullptr, out); },
     ones},
    {"shuffle_past_its_width", [](float* out) { launch_kernel(shuffle_past_its_width, 1, kThreads, 0, nullptr, out); },
     ones},
    {"different_masks", [](float* out) { launch_kernel(different_masks, 1, kThreads, 0, nullptr, out); }, ones},
    {"too_much_static_shared", [](float* out) { launch_kernel(too_much_static_shared, 1, kThreads, 0, nullptr, out); },
     ones},
    {"too_much_dynamic_shared",
     [](float* out) { launch_kernel(fill, 1, kThreads, (227 << 10) + 1, nullptr, out, kNumbers); }, ones},
    {"static_beside_dynamic_shared",
     [](float* out) { launch_kernel(static_beside_dynamic_shared, 1, kThreads, 32 << 10, nullptr, out); }, ones},
    {"block_of_1025_threads", [](float* out) { launch_kernel(fill, 1, 1025, 0, nullptr, out, kNumbers); }, ones},
    {"grid_of_no_blocks", [](float* out) { launch_kernel(fill, 0, kThreads, 0, nullptr, out, kNumbers); }, ones},
    {"grid_of_65536_in_y", [](float* out) { launch_kernel(fill, dim3(1, 65536), kThreads, 0, nullptr, out, kNumbers); },
     ones},
    {"argument_of_64_bits", [](float* out) { launch_kernel(fill, 2, kThreads, 0, nullptr, out, int64_t{1} << 32); },
     ones},

    {"write_past_end", [](float* out) { launch_kernel(write_past_end, 3, kThreads, 0, nullptr, out, kNumbers); }, ones},
    {"vector_load_past_end",
     [](float* out) { launch_kernel(vector_load_past_end, 1, kThreads, 0, nullptr, out, kNumbers); }, ones},
    {"vector_store_past_end",
     [](float* out) { launch_kernel(vector_store_past_end, 1, kThreads, 0, nullptr, out, kNumbers); }, ones},
    {"vector_load_misaligned", [](float* out) { launch_kernel(vector_load_misaligned, 1, 32, 0, nullptr, out); }, ones},
    {"vector_store_misaligned", [](float* out) { launch_kernel(vector_store_misaligned, 1, 32, 0, nullptr, out); },
     ones},
    {"vector_load_from_scalar_shared",
     [](float* out) { launch_kernel(vector_load_from_scalar_shared, 1, kThreads, 0, nullptr, out); }, ones},
    {"shared_past_end", [](float* out) { launch_kernel(shared_past_end, 1, kThreads, 0, nullptr, out); }, ones},
    {"shared_past_end_by_pointer",
     [](float* out) { launch_kernel(shared_past_end_by_pointer, 1, kThreads, 0, nullptr, out); }, ones},
    {"dynamic_shared_past_end",
     [](float* out) { launch_kernel(dynamic_shared_past_end, 1, kThreads, kThreads * 4, nullptr, out); }, ones},
    {"local_array_past_end", [](float* out) { launch_kernel(local_array_past_end, 1, kThreads, 0, nullptr, out); },
     ones},
    {"offset_of_32_bits", [](float* out) { launch_kernel(offset_of_32_bits, 2, 1, 0, nullptr, out, 2000000000); },
     ones},

    {"missing_barrier", [](float* out) { launch_kernel(missing_barrier, 2, kThreads, 0, nullptr, out); }, ones},
    {"reduction_buffer_reused",
     [](float* out) { launch_kernel(reduction_buffer_reused, 2, kThreads, 0, nullptr, out); },
     [](int i) { return i < 2 * kThreads ? 6 : NAN; }},
    {"implicit_warp_synchrony",
     [](float* out) { launch_kernel(implicit_warp_synchrony, 2, kThreads, 0, nullptr, out); }, ones},
    {"warp_barrier_for_block", [](float* out) { launch_kernel(warp_barrier_for_block, 2, kThreads, 0, nullptr, out); },
     ones},
    {"warps_race_in_global_memory",
     [](float* out) { launch_kernel(warps_race_in_global_memory, 1, kThreads, 0, nullptr, out); }, ones},
    {"plain_add_in_block", [](float* out) { launch_kernel(plain_add_in_block, 1, kThreads, 0, nullptr, out); }, ones},
    {"plain_add_between_blocks",
     [](float* out) { launch_kernel(plain_add_between_blocks, 2, kThreads, 0, nullptr, out); }, ones},
    {"plain_store_beside_atomic",
     [](float* out) { launch_kernel(plain_store_beside_atomic, 1, kThreads, 0, nullptr, out); }, ones},
    {"overlapping_vector_stores",
     [](float* out) { launch_kernel(overlapping_vector_stores, 1, kThreads, 0, nullptr, out); }, ones},
    {"last_block_without_fence",
     [](float* out) {
       std::memset(out, 0, sizeof(float));
       launch_kernel(last_block_sums<false>, 5, 32, 0, nullptr, out);
     },
     ones},

    {"shared_never_written", [](float* out) { launch_kernel(shared_never_written, 2, kThreads, 0, nullptr, out); },
     ones},
    {"missing_tail", [](float* out) { launch_kernel(missing_tail, 1, kThreads, 0, nullptr, out, kNumbers); },
     [](int) { return 1.0f; }},

    {"correct_transfers", [](float* out) { add_one(correct_transfers, out); }, numbers},
    {"transfer_barrier_not_initialised", [](float* out) { add_one(transfer_barrier_not_initialised, out); }, numbers},
    {"transfer_barrier_not_published", [](float* out) { add_one(transfer_barrier_not_published, out); }, numbers},
    {"too_few_bytes_expected", [](float* out) { add_one(too_few_bytes_expected, out); }, numbers},
    {"too_many_bytes_expected", [](float* out) { add_one(too_many_bytes_expected, out); }, numbers},
    {"load_never_awaited", [](float* out) { add_one(load_never_awaited, out); }, numbers},
    {"load_awaited_by_some_threads", [](float* out) { add_one(load_awaited_by_some_threads, out); }, numbers},
    {"wrong_parity", [](float* out) { add_one(wrong_parity, out); }, numbers},
    {"stage_loaded_before_it_is_stored", [](float* out) { add_one(stage_loaded_before_it_is_stored, out); }, numbers},
    {"exit_before_stores_have_read", [](float* out) { add_one(exit_before_stores_have_read, out); }, numbers},
    {"stores_not_fenced", [](float* out) { add_one(stores_not_fenced, out); }, numbers},
    {"bulk_of_20_bytes", [](float* out) { add_one(bulk_of_20_bytes, out); }, numbers},
    {"arrival_too_many", [](float* out) { launch_kernel(arrival_too_many, 1, kThreads, 0, nullptr, out); }, ones},
    {"bulk_store_past_end", [](float* out) { launch_kernel(bulk_store_past_end, 1, kThreads, 0, nullptr, out); }, ones},
    {"bulk_load_past_end", [](float* out) { launch_kernel(bulk_load_past_end, 1, kThreads, 0, nullptr, out); }, ones},
    {"correct_cluster", [](float* out) { launch_kernel(kCluster, correct_cluster, 4, kThreads, 0, nullptr, out); },
     ones},
    {"message_before_meeting",
     [](float* out) { launch_kernel(kCluster, message_before_meeting, 4, kThreads, 0, nullptr, out); }, ones},
    {"exit_before_message",
     [](float* out) { launch_kernel(kCluster, exit_before_message, 4, kThreads, 0, nullptr, out); }, ones},
    {"grid_of_no_whole_clusters",
     [](float* out) { launch_kernel(kCluster, correct_cluster, 6, kThreads, 0, nullptr, out); }, ones},
    {"correct_dependent_kernel",
     [](float* out) { launch_kernel(kDependent, correct_dependent_kernel, 2, kThreads, 0, nullptr, out); }, ones},
    {"previous_kernel_not_awaited",
     [](float* out) { launch_kernel(kDependent, previous_kernel_not_awaited, 2, kThreads, 0, nullptr, out); }, ones},

    {"correct_atomics",
     [](float* out) {
       for (int i = 0; i < 8; ++i) out[i] = 0;
       launch_kernel(correct_atomics, 2, kThreads, 0, nullptr, out);
     },
     [](int i) { return i < 8 ? 2.0f * kThreads / 8 : NAN; }},
    {"correct_warp_exchange", [](float* out) { launch_kernel(correct_warp_exchange, 2, kThreads, 0, nullptr, out); },
     ones},
    {"correct_block_reduction",
     [](float* out) { launch_kernel(correct_block_reduction, 2, kThreads, 0, nullptr, out); }, ones},
    {"correct_vectors_with_head_and_tail",
     [](float* out) {
       launch_kernel(correct_vectors_with_head_and_tail, 2, kThreads, 0, nullptr, out, 3, kNumbers - 5);
     },
     [](int i) { return i >= 3 && i < kNumbers - 2 ? 1 : NAN; }},
    {"correct_dynamic_shared",
     [](float* out) { launch_kernel(correct_dynamic_shared, 2, kThreads, 227 << 10, nullptr, out, (227 << 10) / 16); },
     ones},
    {"correct_last_block_with_fences",
     [](float* out) {
       std::memset(out, 0, sizeof(float));
       launch_kernel(last_block_sums<true>, 5, 32, 0, nullptr, out);
     },
     [](int i) { return i == 1 ? 5 : NAN; }},
    {"correct_groups_of_lanes",
     [](float* out) { launch_kernel(correct_groups_of_lanes, 2, kThreads, 0, nullptr, out); }, ones},
    {"correct_positions",
     [](float* out) { launch_kernel(correct_positions, dim3(2, 2, 2), dim3(2, 4, 2), 0, nullptr, out); }, ones},
    {"correct_functions", [](float* out) { launch_kernel(correct_functions, 1, kThreads, 0, nullptr, out); },
     ones_of_one_block},
    {"correct_partial_warp", [](float* out) { launch_kernel(fill, 3, 49, 0, nullptr, out, kNumbers); }, ones},
};

}  // namespace
}  // namespace charlm::cuda

// `out` holds kNumbers numbers. Returns 0 if the result is correct, 1 if it is wrong, 2 if there is no such kernel, and
// 3 if the emulator reported an error.
extern "C" __attribute__((visibility("default"))) int charlm_run_defect(const char* name, float* out) {
  using namespace charlm::cuda;
  for (int i = 0; i < kNumbers; ++i) out[i] = NAN;
  for (const Kernel& kernel : kKernels) {
    if (std::strcmp(kernel.name, name) != 0) continue;
    try {
      kernel.run(out);
    } catch (const charlm::cuda_emulator::Error& error) {
      std::fprintf(stderr, "%s\n", error.what());
      return 3;
    }
    for (int i = 0; i < kNumbers; ++i) {
      const float expected = kernel.expected(i);
      if (std::isnan(expected) || out[i] == expected) continue;
      std::fprintf(stderr, "wrong result: out[%d] is %g, expected %g\n", i, out[i], expected);
      return 1;
    }
    return 0;
  }
  return 2;
}

int main(int argc, char** argv) {
  using namespace charlm::cuda;
  if (argc < 2) {
    for (const Kernel& kernel : kKernels) std::puts(kernel.name);
  }
  for (int i = 1; i < argc; ++i) {
    void* out = nullptr;
    if (posix_memalign(&out, 256, kNumbers * sizeof(float)) != 0) return 1;  // exact: accesses beyond it are checked
    std::fprintf(stderr, "begin %s\n", argv[i]);
    const int status = charlm_run_defect(argv[i], static_cast<float*>(out));
    std::fprintf(stderr, "end %s %d\n", argv[i], status);
    std::free(out);
  }
  return 0;
}

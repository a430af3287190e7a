"""Mutation tests of the CUDA kernels: the tests that pass on the kernels must catch each of these defects.

A mutant replaces `old`, which occurs once in a file of csrc/cuda, by `new`. It is compiled for float alone, in
one flavour, and run with the samples of its op (or other `tests`) under one schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .ops import copy_csrc

SAMPLES = {
    "cross_entropy": ("tests/test_cross_entropy.py", "-k", "as_close_to_float64 and float32"),
    "embedding": ("tests/test_embedding.py", "-k", "as_close_to_float64 and float32"),
    "embedding_linear": ("tests/test_embedding_linear.py", "-k", "as_close_to_float64 and float32"),
    "entropy": ("tests/test_entropy.py", "-k", "as_close_to_float64 and float32"),
    "kl_div": ("tests/test_kl_divergence.py", "-k", "as_close_to_float64 and float32"),
}
OFFSETS = ("tests/test_large_offsets.py",)


@dataclass(frozen=True)
class Mutant:
    name: str
    op: str
    file: str
    old: str
    new: str
    flavour: str = "plain"
    schedule: str = "forward"
    tests: tuple[str, ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.tests or SAMPLES[self.op]

    def write(self, folder: Path) -> Path:
        """A copy of csrc with the defect."""
        copy = copy_csrc(folder, float_only=True)
        path = copy / "cuda" / self.file
        text = path.read_text(encoding="utf-8")
        assert text.count(self.old) == 1, f"{self.file} holds {self.old!r} {text.count(self.old)} times, not once"
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return copy


MUTANTS = (
    Mutant(
        "missing_wait_for_a_chunk",
        "cross_entropy",
        "cross_entropy_small.cuh",
        "      wait_barrier(barriers_ + stage_, parity_);\n",
        "",
    ),
    Mutant(
        "gradient_not_published_to_the_bulk_copy",
        "cross_entropy",
        "cross_entropy_small.cuh",
        "    if (loads_bulk() || stores_bulk()) fence_shared_for_bulk();\n",
        "",
    ),
    Mutant(
        "dropped_warp_barrier_between_reading_and_writing_a_row",
        "cross_entropy",
        "cross_entropy_small.cuh",
        "      __syncwarp();  // the other lanes of the row have read the logit of the target\n",
        "",
        flavour="thread",
        tests=("tests/test_cross_entropy_inplace.py",),
    ),
    Mutant(
        "dropped_barrier_in_the_reduction_of_a_block",
        "cross_entropy",
        "rows.cuh",
        "  if (lane == 0) shared[threadIdx.x / kWarp] = value;\n  __syncthreads();",
        "  if (lane == 0) shared[threadIdx.x / kWarp] = value;",
    ),
    Mutant(
        "wrong_shuffle_width",
        "cross_entropy",
        "rows.cuh",
        "for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync",
        "for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync",
    ),
    Mutant(
        "missing_tail",
        "cross_entropy",
        "cross_entropy_block.cuh",
        "    for (int64_t i = pack(n_packs) + threadIdx.x; i < n; i += blockDim.x) use(i);\n",
        "",
    ),
    Mutant(
        "unaligned_vector_access",
        "cross_entropy",
        "cross_entropy_block.cuh",
        "head = first != elements_to_alignment(y) || first > n ? n : first;",
        "head = 0 * first;",
        flavour="address",
    ),
    Mutant(
        "one_element_too_many",
        "cross_entropy",
        "cross_entropy_block.cuh",
        "i = pack(n_packs) + threadIdx.x; i < n; i",
        "i = pack(n_packs) + threadIdx.x; i <= n; i",
        flavour="address",
    ),
    Mutant(
        "kept_pack_past_the_end",
        "cross_entropy",
        "cross_entropy.cu",
        "n_kept * kPackBytes, params_",
        "(n_kept - 1) * kPackBytes, params_",
        flavour="address",
        tests=("tests/test_cross_entropy_inplace.py", "tests/test_cross_entropy_precomputed.py"),
    ),
    Mutant(
        "offset_of_32_bits",
        "cross_entropy",
        "cross_entropy_row.cuh",
        "return params_.logits + n_ * params_.logits_stride;",
        "return params_.logits + static_cast<int>(n_ * params_.logits_stride);",
        tests=(*OFFSETS, "-k", "logits"),
    ),
    Mutant(
        "sum_not_rescaled_for_a_larger_maximum",
        "cross_entropy",
        "rows.cuh",
        "    sum *= exp_of<T>(max - larger);\n",
        "",
    ),
    Mutant(
        "only_the_first_block_counts_targets",
        "cross_entropy",
        "cross_entropy_row.cuh",
        "weight += i < n_totals ? totals[i].weight : 0;",
        "weight += i < 1 ? totals[i].weight : 0;",
    ),
    Mutant(
        "index_as_large_as_the_number_of_rows",
        "embedding",
        "load_store.cuh",
        "static_cast<uint64_t>(index) < static_cast<uint64_t>(indices.against.limit)",
        "static_cast<uint64_t>(index) <= static_cast<uint64_t>(indices.against.limit)",
        tests=("tests/test_embedding.py", "-k", "out_of_range"),
    ),
    Mutant(
        "sums_of_losses_added_without_an_atomic",
        "cross_entropy",
        "cross_entropy_block.cuh",
        "if (threadIdx.x == 0) losses[blockIdx.x] = loss_sum;\n}\n\ntemplate <class T>\nint block_blocks",
        "if (threadIdx.x == 0) losses[0] = (blockIdx.x == 0 ? 0 : losses[0]) + loss_sum;\n"
        "  if (threadIdx.x == 0 && blockIdx.x > 0) losses[blockIdx.x] = 0;\n}\n\ntemplate <class T>\nint block_blocks",
        flavour="thread",
    ),
    Mutant(
        "equal_indices_of_one_load_overwrite_each_other",
        "embedding",
        "embedding_tables.cuh",
        "      if (offset[earlier] == offset[k]) sum[k] = sum[earlier];\n",
        "",
    ),
    Mutant(
        "dropped_barrier_before_adding_tables",
        "embedding",
        "embedding_tables.cuh",
        "  __syncthreads();\n  if (column >= d) return;",
        "  if (column >= d) return;",
    ),
    Mutant(
        "a_segment_that_began_before_is_taken_for_whole",
        "embedding",
        "embedding_sorted.cuh",
        "const bool first_goes_on = begin > 0 && index_of[-1] == index_of[0];",
        "const bool first_goes_on = false;",
    ),
    Mutant(
        "weight_row_offset_of_32_bits",
        "embedding",
        "embedding.cu",
        "params.weight + index[k] * params.row_stride",
        "params.weight + static_cast<int>(index[k] * params.row_stride)",
        tests=(*OFFSETS, "-k", "weight"),
    ),
    Mutant(
        "a_place_past_the_last_adds_a_row_of_its_own",
        "embedding_linear",
        "embedding_linear.cu",
        "first + k < end && bad.check(",
        "bad.check(",
        flavour="address",
    ),
    Mutant(
        "columns_past_the_last_are_not_left_out",
        "embedding_linear",
        "embedding_linear.cu",
        "  if (column >= params.hidden) return;\n",
        "",
        flavour="address",
    ),
    Mutant(
        "the_activations_argument_is_stored_after_it",
        "embedding_linear",
        "embedding_linear.cu",
        "    if (params.before) store_numbers(params.before + n * params.hidden + column, sum);\n"
        "    activate(params.activation, sum);\n",
        "    activate(params.activation, sum);\n"
        "    if (params.before) store_numbers(params.before + n * params.hidden + column, sum);\n",
    ),
    Mutant(
        "half_of_the_lanes_left_out",
        "entropy",
        "rows.cuh",
        "for (int step = kWarp / 2; step > 0; step /= 2) value = Value::join",
        "for (int step = kWarp / 4; step > 0; step /= 2) value = Value::join",
    ),
    Mutant(
        "infinity_times_zero",
        "entropy",
        "entropy.cu",
        "of_row.distance -= e * finite(t);",
        "of_row.distance -= e * t;",
    ),
    Mutant("part_of_a_divergence_dropped", "kl_div", "kl_divergence.cu", "a.cross + b.cross", "a.cross"),
)

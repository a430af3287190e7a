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
FEW_ROWS = ("tests/test_cross_entropy_rows.py", "-k", "float32")
ROWS_OF_A_CLUSTER = ("tests/test_cross_entropy_rows.py", "-k", "(few_rows_and_many or without_a_gradient) and float32")


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
    few_blocks: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.tests or SAMPLES[self.op]

    def write(self, folder: Path) -> Path:
        """A copy of csrc with the defect."""
        copy = copy_csrc(folder, float_only=True, few_blocks=self.few_blocks)
        path = copy / "cuda" / self.file
        text = path.read_text(encoding="utf-8")
        assert text.count(self.old) == 1, f"{self.file} holds {self.old!r} {text.count(self.old)} times, not once"
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return copy


MUTANTS = (
    Mutant(
        "missing_wait_for_a_chunk",
        "cross_entropy",
        "chunk_ring.cuh",
        "      wait_barrier(barriers_ + stage_, parity_);\n",
        "",
    ),
    Mutant(
        "gradient_not_published_to_the_bulk_copy",
        "cross_entropy",
        "chunk_ring.cuh",
        "    if (loads_bulk() || stores_bulk()) fence_shared_for_bulk();\n",
        "",
        flavour="thread",
    ),
    Mutant(
        "dropped_warp_barrier_between_reading_and_writing_a_row",
        "cross_entropy",
        "cross_entropy_options.cuh",
        "      __syncwarp();  // the other lanes of the row have read the logit of the target\n",
        "",
        flavour="thread",
        tests=("tests/test_cross_entropy.py", "-k", "as_close_to_float64 and float32 and (softcap or sliced_columns)"),
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
        "cross_entropy_walk.cuh",
        "single = rank == 0 && other < n_classes ? other : -1;",
        "single = rank == 0 && other < head ? other : -1;",
    ),
    Mutant(
        "unaligned_vector_access",
        "cross_entropy",
        "cross_entropy_walk.cuh",
        "is_aligned = elements_to_alignment(row_x) == aligned;",
        "is_aligned = true;",
        flavour="address",
    ),
    Mutant(
        "one_element_too_many",
        "cross_entropy",
        "cross_entropy_walk.cuh",
        "single = rank == 0 && other < n_classes ? other : -1;",
        "single = rank == 0 && other <= n_classes ? other : -1;",
        flavour="address",
    ),
    Mutant(
        "pack_past_the_end",
        "cross_entropy",
        "cross_entropy_walk.cuh",
        "left = (end < n_packs ? end : n_packs) - first;",
        "left = end - first + 1;",
        flavour="address",
    ),
    Mutant(
        "offset_of_32_bits",
        "cross_entropy",
        "cross_entropy_registers.cuh",
        "params.logits + row_n * params.logits_stride;",
        "params.logits + static_cast<int>(row_n * params.logits_stride);",
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
        "cross_entropy_reduction.cuh",
        "if (first < reduction.n_totals) sum",
        "if (first < 1) sum",
        tests=("tests/test_many_rows.py", "-k", "losses_and_gradients"),
    ),
    Mutant(
        "divisor_read_before_the_targets_are_counted",
        "cross_entropy",
        "cross_entropy_reduction.cuh",
        "  if (reduction.is_dependent) wait_for_previous_kernel();\n  if (reduction.n_totals == 0)",
        "  if (reduction.n_totals == 0)",
    ),
    Mutant(
        "more_bytes_expected_than_are_loaded",
        "cross_entropy",
        "chunk_ring.cuh",
        "    expect_bytes(barriers_ + s, bytes);\n",
        "    expect_bytes(barriers_ + s, bytes + 16);\n",
    ),
    Mutant(
        "exit_before_the_gradient_is_stored",
        "cross_entropy",
        "chunk_ring.cuh",
        "    if (stores_bulk() && lane() == 0) wait_bulk_stores_read<0>();\n  }\n",
        "  }\n",
    ),
    Mutant(
        "parts_of_a_row_read_before_they_have_come",
        "cross_entropy",
        "cross_entropy_walk.cuh",
        "      wait_barrier(barrier, turn_ / 2 % 2);\n",
        "",
        tests=FEW_ROWS,
    ),
    Mutant(
        "fewer_bytes_expected_than_are_sent",
        "cross_entropy",
        "cross_entropy_walk.cuh",
        "kWarps * n_blocks_ * (kDense ? 4 : 2) * sizeof(C)",
        "kWarps * (n_blocks_ - 1) * (kDense ? 4 : 2) * sizeof(C)",
        tests=FEW_ROWS,
    ),
    Mutant(
        "parts_of_two_rows_in_one_buffer",
        "cross_entropy",
        "cross_entropy_walk.cuh",
        "parts_ + turn_ % 2 * kParts;",
        "parts_;",
        flavour="thread",
        tests=ROWS_OF_A_CLUSTER,
        few_blocks=True,
    ),
    Mutant(
        "parts_sent_before_every_lane_has_read_the_last",
        "cross_entropy",
        "cross_entropy_walk.cuh",
        "      __syncwarp();  // all lanes have read the last row's parts, which these let others overwrite\n",
        "",
        flavour="thread",
        tests=ROWS_OF_A_CLUSTER,
        few_blocks=True,
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
        "cross_entropy_reduction.cuh",
        "    reduction.losses[blockIdx.x] = loss;\n",
        "    reduction.losses[blockIdx.x] = 0;\n    reduction.losses[0] += loss;\n",
        flavour="thread",
    ),
    Mutant(
        "shares_of_a_segment_overwrite_each_other",
        "embedding",
        "embedding_tables.cuh",
        "bool began_before = share_begin > 0 && share_begin < n && keys[share_begin - 1] == keys[share_begin];",
        "bool began_before = false;",
        flavour="thread",
    ),
    Mutant(
        "dropped_barrier_before_adding_shares",
        "embedding",
        "embedding_tables.cuh",
        "    __syncthreads();\n    // The first group of a run",
        "    // The first group of a run",
    ),
    Mutant(
        "equal_digits_of_a_warp_at_one_place",
        "embedding",
        "embedding_sort.cuh",
        "__popc(equal & ((1u << lane) - 1))",
        "0",
    ),
    Mutant(
        "a_segment_that_goes_on_is_taken_for_whole",
        "embedding",
        "embedding_sorted.cuh",
        "if (began_before || goes_on) {",
        "if (began_before) {",
        tests=("tests/test_embedding.py", "-k", "hundreds_of_chunks"),
    ),
    Mutant(
        "weight_row_offset_of_32_bits",
        "embedding",
        "embedding.cu",
        "own = static_cast<Offset>(",
        "own = static_cast<int>(",
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
        "dropped_barrier_before_rows_of_the_table_are_added",
        "embedding_linear",
        "embedding_linear_layer.cuh",
        "      if (first + i < v_end) table[(t * v_end + first + i) * kTile + lane] = sum[i];\n    }\n  }\n"
        "  __syncthreads();\n",
        "      if (first + i < v_end) table[(t * v_end + first + i) * kTile + lane] = sum[i];\n    }\n  }\n",
    ),
    Mutant(
        "offsets_overwritten_before_all_have_read_them",
        "embedding_linear",
        "embedding_linear_layer.cuh",
        "    written = written == offsets ? offsets + chunk_rows : offsets;\n",
        "",
        flavour="thread",
        tests=("tests/test_embedding_linear.py", "-k", "more_contexts_than"),
    ),
    Mutant(
        "places_that_do_not_exist_add_to_the_first",
        "embedding_linear",
        "embedding_linear_layer.cuh",
        "      int entry = n_entries;\n",
        "      int entry = 0;\n",
    ),
    Mutant(
        "shares_joined_before_they_are_written",
        "embedding_linear",
        "embedding_linear_layer.cuh",
        "  if (is_dependent) wait_for_previous_kernel();\n",
        "",
    ),
    Mutant(
        "half_of_the_lanes_left_out",
        "entropy",
        "entropy.cu",
        "sum = sum_over_lanes(sum, kLanes);",
        "sum = sum_over_lanes(sum, kLanes / 2);",
    ),
    Mutant(
        "infinity_times_zero",
        "entropy",
        "entropy.cu",
        "cross += e * finite(t);",
        "cross += e * t;",
    ),
    Mutant(
        "absent_packs_add_to_the_sums",
        "entropy",
        "entropy.cu",
        "return kMinusInfinity<T>; }",
        "return T{}; }",
    ),
    Mutant(
        "pack_read_past_the_end_of_a_row",
        "entropy",
        "row_packs.cuh",
        "if (p < end) {",
        "if (p <= end) {",
        flavour="address",
    ),
    Mutant(
        "single_elements_left_out",
        "entropy",
        "row_packs.cuh",
        "n_singles = static_cast<int>(n - static_cast<int64_t>(n_packs) * K);",
        "n_singles = head;",
    ),
    Mutant(
        "part_of_a_divergence_dropped",
        "kl_div",
        "kl_divergence.cu",
        "cross = sum_over_lanes(cross, kLanes);",
        "",
    ),
    Mutant(
        "centre_not_moved_with_the_maximum",
        "kl_div",
        "kl_divergence.cu",
        "    cross += p_sum * shift;\n",
        "",
    ),
)

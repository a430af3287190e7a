"""docs/gpu/ROOFLINE.md is what scripts/cuda_roofline.py makes of the kernels' constants today; MEASURED.md what was
recorded."""

from __future__ import annotations

import pytest

from bench import report
from scripts import cuda_roofline


def test_the_committed_table_is_todays() -> None:
    assert cuda_roofline.OUTPUT.read_text(encoding="utf-8") == cuda_roofline.table(), (
        "run python scripts/cuda_roofline.py"
    )


def test_what_was_measured_is_what_the_record_says() -> None:
    assert report.MEASURED.read_text(encoding="utf-8") == report.document(), "run python -m bench.report gpu"


def test_no_call_moves_fewer_bytes_than_the_fewest() -> None:
    assert all(row.moved >= row.fewest for row in cuda_roofline.rows())


def test_a_loss_with_its_gradient_moves_the_fewest_bytes_while_a_row_fits_in_shared_memory() -> None:
    for row in cuda_roofline.rows():
        n, v = map(int, row.shape.split(" × ")) if row.call.startswith("cross_entropy") else (0, 0)
        if row.call.endswith("and gradient") and 1000 < v <= 50257 and n > 256:
            assert row.moved < 1.02 * row.fewest


def test_a_constant_that_is_gone_is_an_error() -> None:
    with pytest.raises(LookupError, match="no constant kGone"):
        cuda_roofline.constant("cross_entropy_small.cuh", "kGone")

"""A program exported by charlm 0.1 loads and gives the same result: the schemas that it records must not change.

data/exported_0_1.pt2 was saved by torch 2.13 from a module that calls every public op; the values below are what it
returned then.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import charlm  # noqa: F401, registers the ops

PROGRAM = Path(__file__).with_name("data") / "exported_0_1.pt2"
OPS = {
    *("cross_entropy", "cross_entropy_metrics", "embedding", "embedding_linear"),
    *("entropy", "kl_div", "linear_cross_entropy", "pointwise_kl_div"),
}
EXPECTED = {
    "loss": [3.3826385],
    "lse": [3.3461699, 3.374326, 3.283102, 3.3621161, 3.3330014],
    "entropy of the loss": [3.250021, 3.25051, 3.2788234, 3.2562978, 3.2652466],
    "sum of embedded rows": [-3.4402301],
    "linear_cross_entropy": [3.4302428, 3.5727794, 3.4698663, 3.0035608, 3.4026549],
    "entropy": [3.249718, 3.2501903, 3.2787881, 3.2561297, 3.2651076],
    "kl_divergence": [0.1207625, 0.1402272, 0.0205138, 0.072838, 0.0570472],
    "kl_div": [0.0822778],
    "surprisal": [3.4302428, 3.5727794, 3.4698663, 3.0035608, 3.4026549],
}


@pytest.mark.skipif(torch.__version__ < "2.13", reason="the program was saved by torch 2.13")
def test_a_program_exported_by_the_first_version_gives_the_same_result() -> None:
    program = torch.export.load(PROGRAM)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"charlm.{op}.default" for op in OPS} <= called
    results = program.module()(torch.arange(15).view(5, 3) * 7 % 27, torch.arange(5) * 5 % 27)
    for (name, expected), result in zip(EXPECTED.items(), results, strict=True):
        torch.testing.assert_close(
            result.flatten(), torch.tensor(expected), rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )

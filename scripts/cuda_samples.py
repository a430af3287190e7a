"""Runs every op on its sample inputs on a device, without pytest: forward, backward, and a bad index.

    compute-sanitizer --tool memcheck python scripts/cuda_samples.py --small
    python scripts/cuda_samples.py --compare

`make gpu` runs a few samples (--small) under each tool of compute-sanitizer, and all of them, compared with the
reference by the rule of charlm/testing (--compare), where pytest is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

import charlm
from charlm import functional, reference, testing
from charlm.testing import FLOAT_DTYPES, SampleInput, assert_matches_reference, evaluate

OPS = (
    "cross_entropy",
    "embedding",
    "embedding_linear",
    "entropy",
    "kl_divergence",
    "linear_cross_entropy",
    "surprisal",
)

# One sample for each path through the kernels: options, layouts, and sizes of vocabulary and table.
SMALL = {
    "one_class", "names_batch", "many_rows", "bytes", "uint8_targets", "thousand_classes", "odd_large_vocabulary",
    "empty_batch_mean", "sliced_columns", "transposed", "minus_infinity_logits", "class_weight", "all_extras",
    "probabilities_all_extras", "past_64k_classes",
    "names", "uint8_index", "large_table", "hot_row", "sliced_weight", "padding_idx", "scale_grad_by_freq_padding",
    "few_long_rows", "log_probs_probs", "probs_log_probs_zeros", "outer",
}  # fmt: skip
SMALL_DTYPES = (torch.float32, torch.bfloat16)

Op = Callable[..., Any]


def samples(device: str, small: bool) -> Iterator[tuple[Op, Op, SampleInput]]:
    """Each sample with its op and the reference op."""
    for dtype in SMALL_DTYPES if small else FLOAT_DTYPES:
        for name in OPS:
            made = list(getattr(testing, f"sample_inputs_{name}")(dtype, device))
            if name == "cross_entropy":
                made.append(past_64k_classes(dtype, device))
            op, of_reference = getattr(functional, name), getattr(reference, name)
            yield from ((op, of_reference, sample) for sample in made if not small or sample.name in SMALL)


def past_64k_classes(dtype: torch.dtype, device: str) -> SampleInput:
    """A sample with longer rows than any in the CPU tests."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn((3, 70_001), generator=generator, device=device).to(dtype)
    target = torch.randint(70_001, (3,), generator=generator, device=device)
    return SampleInput("past_64k_classes", {"input": logits, "target": target}, ("input",))


def run_inplace(device: str) -> None:
    """The in-place modes, which `evaluate` cannot test: they must not overwrite a leaf."""
    for dtype in SMALL_DTYPES:
        for mode in ("forward", "backward"):
            logits = torch.randn((33, 27), device=device).to(dtype).requires_grad_()
            target = torch.randint(27, (33,), device=device)
            functional.cross_entropy(logits * 2, target, inplace=mode).backward()


def run_bad_indices(device: str) -> None:
    """Bad indices: the ops report them, and write nothing out of bounds."""
    weight = torch.zeros((27, 10), device=device, requires_grad=True)
    bad = torch.tensor([0, 27, -1], device=device)
    for call in (
        lambda: functional.embedding(bad, weight).sum().backward(),
        lambda: functional.cross_entropy(weight[:3] * 2, bad).backward(),
    ):
        try:
            call()
            charlm.synchronize()
        except IndexError:
            continue
        raise AssertionError("a bad index was not reported")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="one sample of a kind, two dtypes")
    parser.add_argument("--compare", action="store_true", help="with the reference, by the rule of charlm/testing")
    arguments = parser.parse_args()
    n_samples = n_wrong = 0
    for op, of_reference, sample in samples(arguments.device, arguments.small):
        n_samples += 1
        try:
            if arguments.compare:
                assert_matches_reference(op, of_reference, sample)
            else:
                evaluate(op, sample)
        except AssertionError as failed:
            n_wrong += 1
            print(f"WRONG: {op.__name__}, {failed}")
    run_inplace(arguments.device)
    run_bad_indices(arguments.device)
    print(f"{n_samples} samples, {n_wrong} wrong")
    return 1 if n_wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

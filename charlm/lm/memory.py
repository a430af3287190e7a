"""Estimates the peak memory of a training run from its config, before anything is allocated, and reads the machine's.

The estimate is right within a factor of two for runs that take most of a machine's memory.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from charlm._errors import UserError
from charlm.lm.config import NETWORKS, Config
from charlm.lm.corpus import Corpus
from charlm.lm.evaluate import CHUNK
from charlm.lm.models import MODELS
from charlm.lm.models.recurrent import Recurrent
from charlm.lm.processes import Launch

FLOAT = 4  # bytes
CELLS = {type: model.cell for type, model in MODELS.items() if issubclass(model, Recurrent)}
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def count_parameters(config: Config, vocab_size: int) -> int:
    """The number of parameters of the network of `config`; 0 for a count model."""
    V, T, D, H = vocab_size, config.block_size, config.n_embd, config.n_hidden
    if config.type == "mlp":
        return V * D + T * D * H + (2 * H if config.batch_norm else H) + H * V + V
    if config.type == "wavenet":
        layers = T.bit_length() - 1
        return V * D + 2 * D * H + (layers - 1) * 2 * H * H + layers * 2 * H + H * V + V
    if config.type == "bow":
        return V * D + T * D + 2 * D * H + H + D + D * V + V
    if config.type in CELLS:
        cell, L = CELLS[config.type], config.n_layer
        layers = (D + (L - 1) * H + L * H + L) * cell.gates * H + L * cell.states * H
        return V * D + layers + H * V + V
    if config.type == "gpt":
        return V * D + T * D + config.n_layer * (12 * D * D + 2 * D) + D
    return 0


def estimate_bytes(config: Config, corpus: Corpus, launch: Launch | None = None, parallel: str = "ddp") -> int:
    """The peak memory of training in bytes, in addition to that of Python, torch and the text itself.

    It is the sum of weights, gradients, optimizer moments, the best weights so far and a checkpoint while it is
    written; of the activations of one batch, or of one chunk of an evaluation; of the batches of a step; and of the
    examples.

    On the CPU all processes of the machine of `launch` are counted, on a GPU this one; None is a run of one process.
    `parallel` is "ddp" or "fsdp".
    """
    if config.type not in NETWORKS:
        return 0
    launch = launch or Launch()
    local = 1 if config.device.startswith("cuda") else launch.local_size
    parameters = count_parameters(config, len(corpus.vocabulary))
    moments = 2 if config.optimizer == "adamw" else 0
    copies = 3 + moments  # weights, gradients, the best weights
    # The best weights; weights and moments, as tensors and twice as the bytes of a file, which safetensors copies.
    written = 1 + 3 * (1 + moments)
    if parallel == "fsdp":  # a process builds the whole model, and keeps and writes its part
        numbers = local * max(parameters, (copies + written) * parameters // launch.size)
    else:  # one process writes
        numbers = (local * copies + written) * parameters
    batch = -(-config.batch_size // launch.size)  # of one process
    rows = batch if MODELS[config.type].predicts_every_position else max(batch, CHUNK // 4)  # evaluation saves less
    activations = _activations(config, corpus) * rows
    token = 1 if len(corpus.vocabulary) <= 256 else 4
    batches = config.gradient_accumulation_steps * (batch * config.block_size * token + config.batch_size * 16)
    return FLOAT * numbers + local * (FLOAT * activations + batches + _examples(corpus))


def _activations(config: Config, corpus: Corpus) -> int:
    """The number of floats that the forward of one row of a batch saves for backward."""
    T, D, H = config.block_size, config.n_embd, config.n_hidden
    if config.type == "mlp":
        return T * D + 4 * H
    if config.type == "wavenet":
        return T * D + 7 * H * T  # T/2 + T/4 + … positions; product, norm, tanh, dropout, gradient
    T = min(T, corpus.longest_item("train") + 1)
    if config.type == "bow":
        return 6 * T * D + 3 * T * H
    if config.type in CELLS:
        return T * D + config.n_layer * T * 4 * (1 + CELLS[config.type].gates) * H
    scores = 3 * config.n_head * T * T if config.dropout else 0  # without dropout, attention saves none
    return config.n_layer * (24 * T * D + scores)


def _examples(corpus: Corpus) -> int:
    """The memory of the tokens of train and dev, and of the arrays that they are encoded with, in bytes."""
    if corpus.is_mapped:
        return 0
    token = 1 if len(corpus.vocabulary) <= 256 else 4
    items = 8 if corpus.format == "line" else 0  # the end of each
    return sum(4 * token * corpus.tokens(split) + items * corpus.sizes[split] for split in ("train", "dev"))


def machine_bytes(device: torch.device) -> int:
    """The memory of `device` in bytes; for the CPU the machine's, or the control group's limit if it is lower."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CGROUP_LIMITS:
        text = path.read_text().strip() if path.exists() else "max"
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def check_fits(
    config: Config, corpus: Corpus, device: torch.device, launch: Launch | None = None, parallel: str = "ddp"
) -> None:
    """Raises UserError if training needs more memory than `device` has; the message says how much and for what."""
    needed, found = estimate_bytes(config, corpus, launch, parallel), machine_bytes(device)
    if needed > found:
        parameters = count_parameters(config, len(corpus.vocabulary))
        is_shared = device.type == "cpu" and launch is not None and launch.local_size > 1
        here = f" in {launch.local_size} processes" if is_shared else ""
        raise UserError(
            f"this {config.type} has {parameters:,} parameters, and training it{here} takes about "
            f"{format_bytes(needed)} of memory, but {device} has {format_bytes(found)}: make --block-size, "
            "--batch-size, --gradient-accumulation-steps or the model smaller, or train anyway with --force"
        )


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """The number of bytes that `text` says: "2GB", "500 MB", "1.5GiB" or a number of bytes.

    Raises:
        UserError: It is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise UserError(f"memory is {text!r}, but must be a size such as 2GB, 500MB or 64MiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def format_bytes(count: int) -> str:
    """A number of bytes in words: "24 MB", "1.3 GB", "23 GB"."""
    if count < 1e9:
        return f"{max(1, round(count / 1e6))} MB"
    return f"{count / 1e9:.1f} GB" if count < 1e10 else f"{count / 1e9:,.0f} GB"

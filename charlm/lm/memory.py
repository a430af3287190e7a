"""What a training run needs, estimated from its config before any of it is allocated; what the machine has.

An estimate of the peak: right within a factor of two for a run that fills a machine, which is what it is for.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from charlm.lm.config import NETWORKS, Config
from charlm.lm.data import Corpus
from charlm.lm.errors import UserError
from charlm.lm.evaluate import CHUNK

FLOAT = 4  # bytes
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def count_parameters(config: Config, vocab_size: int) -> int:
    """How many parameters the network of `config` has; 0 for a model that counts."""
    V, T, D, H = vocab_size, config.block_size, config.n_embd, config.n_hidden
    if config.type == "mlp":
        return V * D + T * D * H + (2 * H if config.batch_norm else H) + H * V + V
    if config.type == "wavenet":
        layers = T.bit_length() - 1
        return V * D + 2 * D * H + (layers - 1) * 2 * H * H + layers * 2 * H + H * V + V
    if config.type == "gpt":
        return V * D + T * D + config.n_layer * (12 * D * D + 2 * D) + D
    return 0


def estimate_bytes(config: Config, corpus: Corpus) -> int:
    """The memory that training takes at its peak, beside that of Python, torch and the text itself.

    The sum of: weights, gradients, the optimizer's moments, the best weights so far, and a checkpoint as it is written;
    what the backward of one batch keeps, or the evaluation of a chunk; the batches of a step; the examples.
    """
    if config.type not in NETWORKS:
        return 0
    parameters = count_parameters(config, len(corpus.vocabulary))
    moments = 2 if config.optimizer == "adamw" else 0
    held = 3 + moments  # weights, gradients, the best weights
    written = 2 * (1 + moments)  # weights and moments, as tensors and as the bytes of a file
    rows = config.batch_size if config.type == "gpt" else max(config.batch_size, CHUNK // 4)  # evaluation keeps less
    kept = _activations(config, corpus) * rows
    token = 1 if len(corpus.vocabulary) <= 256 else 4
    drawn = config.batch_size * config.gradient_accumulation_steps * (config.block_size * token + 16)  # of one step
    return FLOAT * ((held + written) * parameters + kept) + drawn + _examples(config, corpus)


def _activations(config: Config, corpus: Corpus) -> int:
    """Numbers that the backward of one row of a batch keeps."""
    T, D, H = config.block_size, config.n_embd, config.n_hidden
    if config.type == "mlp":
        return T * D + 4 * H
    if config.type == "wavenet":
        return T * D + 7 * H * T  # T/2 + T/4 + … positions; product, norm, tanh, dropout, gradient
    T = min(T, max(map(len, corpus.parts["train"])) + 1)
    scores = 3 * config.n_head * T * T if config.dropout else 0  # without dropout attention keeps none
    return config.n_layer * (24 * T * D + scores)


def _examples(config: Config, corpus: Corpus) -> int:
    """Bytes of the examples of train and dev, and of what they are made from."""
    lengths = [len(item) + 1 for split in ("train", "dev") for item in corpus.parts[split]]
    token = 1 if len(corpus.vocabulary) <= 256 else 4
    if corpus.format == "text":
        return 16 * sum(lengths) * token  # examples are views of the text
    if config.type != "gpt":
        return sum(lengths) * (config.block_size * token + 16)
    T = config.block_size
    width = min(T, max(lengths))
    rows = sum(1 + max(0, length - T) for length in lengths)
    return rows * width * (2 * token + 24)  # 24: positions in int64, and a mask


def machine_bytes(device: torch.device) -> int:
    """The memory of `device`; of the CPU that of the machine, or of the control group if that is less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CGROUP_LIMITS:
        text = path.read_text().strip() if path.exists() else "max"
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def check_fits(config: Config, corpus: Corpus, device: torch.device) -> None:
    """Raises UserError where training needs more memory than there is, saying how much and for what."""
    needed, found = estimate_bytes(config, corpus), machine_bytes(device)
    if needed > found:
        parameters = count_parameters(config, len(corpus.vocabulary))
        raise UserError(
            f"this {config.type} has {parameters:,} parameters, and training it takes about {readable(needed)} of "
            f"memory, but {device} has {readable(found)}: make --block-size, --batch-size, "
            "--gradient-accumulation-steps or the model smaller, or try it with --force"
        )


def readable(count: int) -> str:
    """`count` bytes for a reader: "24 MB", "1.3 GB", "23 GB"."""
    if count < 1e9:
        return f"{max(1, round(count / 1e6))} MB"
    return f"{count / 1e9:.1f} GB" if count < 1e10 else f"{count / 1e9:,.0f} GB"

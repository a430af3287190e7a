"""A training run on disk: safetensors and JSON, no pickle, never half a checkpoint.

    DIR/checkpoint.json                  the manifest: version, step, config, model, vocabulary, split hash,
                                         and name, size and sha256 of the two files below
    DIR/model-<sha256>.safetensors       the weights to use: the best on dev so far
    DIR/training-<sha256>.safetensors    what resuming needs: current weights, optimizer and random state
    DIR/metrics.jsonl                    see `metrics`

The tensor files are named after their content, so a new one never overwrites the old one's. Both are on disk
before the manifest is renamed over the old one, which is the one atomic step: at every moment the manifest in
place names two complete files. Files that no manifest names are removed after that.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from charlm._version import __version__
from charlm.lm.config import Config
from charlm.lm.data import Vocabulary
from charlm.lm.errors import UserError
from charlm.lm.files import write_atomically
from charlm.lm.models import LanguageModel, build_model

MANIFEST = "checkpoint.json"
VERSION = 1
PARTS = ("model", "training")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training run after `step` steps.

    config:     what the run was started with.
    model:      the arguments of `build_model`.
    vocabulary: the tokens.
    digest:     `Corpus.digest` of the data and its split.
    best_step, best_nats: where and what the best evaluation on dev was; None before the first one.
    weights:    the model's state dict at best_step (at `step` before the first evaluation).
    training:   the trainer's tensors, by name.
    """

    step: int
    config: Config
    model: dict[str, Any]
    vocabulary: Vocabulary
    digest: str
    best_step: int | None
    best_nats: float | None
    weights: dict[str, Tensor]
    training: dict[str, Tensor]

    def build_model(self, device: torch.device | str = "cpu") -> LanguageModel:
        """The model with its weights, in evaluation mode."""
        model = build_model(**self.model)
        model.load_state_dict(self.weights)
        return model.to(device).eval()


def exists(directory: Path) -> bool:
    """Whether `directory` holds a checkpoint, readable or not."""
    return (directory / MANIFEST).exists()


def save(directory: Path, checkpoint: Checkpoint) -> None:
    """Writes `checkpoint` to `directory`, made if need be; the one in place stays until this one is whole."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "model": _write_tensors(directory, "model", checkpoint.weights),
        "training": _write_tensors(directory, "training", checkpoint.training),
    }
    manifest = {
        "format": "charlm checkpoint",
        "version": VERSION,
        "charlm": __version__,
        "step": checkpoint.step,
        "best_step": checkpoint.best_step,
        "best_nats": checkpoint.best_nats,
        "config": checkpoint.config.to_dict(),
        "model": checkpoint.model,
        "vocabulary": {"chars": checkpoint.vocabulary.chars, "separator": checkpoint.vocabulary.separator},
        "digest": checkpoint.digest,
        "files": files,
    }
    text = json.dumps(manifest, indent=1, allow_nan=False, ensure_ascii=True) + "\n"
    write_atomically(directory / MANIFEST, text.encode())
    _remove_unnamed(directory, {file["name"] for file in files.values()})


def load(directory: Path) -> Checkpoint:
    """The checkpoint in `directory`.

    Raises:
        UserError: there is none, a newer charlm wrote it, or a file of it is missing, truncated or altered.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["version"]
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint in {directory}: {path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged or no charlm checkpoint: it is not the JSON that charlm writes") from None
    if not isinstance(version, int) or version > VERSION:
        raise UserError(
            f"{directory} was written by a newer charlm (checkpoint version {version}; "
            f"this charlm reads up to version {VERSION})"
        )
    try:
        tensors = {part: _read_tensors(directory, manifest["files"][part]) for part in PARTS}
        return Checkpoint(
            step=manifest["step"],
            config=Config.from_dict(manifest["config"]),
            model=manifest["model"],
            vocabulary=Vocabulary(**manifest["vocabulary"]),
            digest=manifest["digest"],
            best_step=manifest["best_step"],
            best_nats=manifest["best_nats"],
            weights=tensors["model"],
            training=tensors["training"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _write_tensors(directory: Path, part: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes one tensor file, and returns its entry of the manifest."""
    data = tensors_to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    name = f"{part}-{digest[:16]}.safetensors"
    write_atomically(directory / name, data)
    return {"name": name, "bytes": len(data), "sha256": digest}


def _read_tensors(directory: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    path = directory / entry["name"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}, a part of the checkpoint: {error.strerror}") from error
    if len(data) != entry["bytes"]:
        raise UserError(f"{path} is truncated or altered: it has {len(data)} bytes instead of {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise UserError(f"{path} is altered: its sha256 is not the one in {MANIFEST}")
    return tensors_from_bytes(data)


def _remove_unnamed(directory: Path, names: set[str]) -> None:
    for part in PARTS:
        for path in [*directory.glob(f"{part}-*.safetensors"), *directory.glob(f".{part}-*.tmp")]:
            if path.name not in names:
                path.unlink(missing_ok=True)

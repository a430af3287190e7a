"""Checkpoints of a training run: safetensors and JSON without pickle, replaced atomically.

    DIR/checkpoint.json                  the manifest: version, step, config, model, vocabulary, split hash,
                                         commands, and name, size and sha256 of the files below
    DIR/model-<sha256>.safetensors       the weights to use: the best on dev so far
    DIR/training-<sha256>.safetensors    the state for resuming: current weights, optimizer and random state
    DIR/metrics.jsonl                    see `metrics`
    DIR/metrics.csv                      the same as a table
    DIR/diagnostics.jsonl                see `diagnostics`
    DIR/tensorboard/                     see `tensorboard`
    DIR/documents-<sha256>.txt           the text of a run by `charlm.train` on documents, unless it is large

The processes of a run that shards its model write a model file and a training file each. The manifest then has
version 2 and a list of files, in the order of the ranks, in place of one. Of a sharded tensor each file has some rows,
and all of them in this order are the tensor; every other tensor is in the files of rank 0 alone.

The name of a tensor file is derived from its content, so a new file never overwrites an old one. All files are on disk
before the new manifest is renamed over the old one. That rename is the only atomic step that is needed: at any time the
manifest names complete files. Afterwards the files of the old manifest are removed. Therefore only one run at a time
may write to a folder, which `files.locked` ensures, and a reader whose file has disappeared reads the manifest again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import load_file as map_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from charlm._errors import UserError
from charlm._version import __version__
from charlm.lm.config import Config
from charlm.lm.files import sha256_of, write_atomically
from charlm.lm.models import LanguageModel, build_model
from charlm.lm.processes import Processes
from charlm.lm.vocabulary import Vocabulary

MANIFEST = "checkpoint.json"
FORMAT = "charlm checkpoint"
VERSION = 2  # that of a checkpoint with one file of each part is 1
PARTS = ("model", "training")
# The names of the tensor files of a checkpoint, and of the temporary files while they are written.
PART = re.compile(r"(model|training)-[0-9a-f]{16}\.safetensors|\.(model|training)-[0-9a-f]{16}\.safetensors\.\d+\.tmp")
TEMPORARY = re.compile(r"\.(checkpoint\.json|metrics\.jsonl|metrics\.csv|diagnostics\.jsonl)\.\d+\.tmp")
DOCUMENTS = r"documents-[0-9a-f]{16}\.txt"
# The names of all files that a run may leave in its folder if it ends before its first checkpoint.
OWN_FILES = re.compile(
    rf"\.lock|{DOCUMENTS}|(metrics|diagnostics)\.jsonl|metrics\.csv|tensorboard|{PART.pattern}|\..+\.\d+\.tmp"
)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training run after `step` steps.

    Attributes:
        model: The arguments of `build_model`.
        vocabulary: The characters and their tokens.
        digest: `Corpus.digest` of the data and its split.
        best_step: The step of the best evaluation on dev; None before the first one.
        best_nats: The loss of the best evaluation on dev in nats per character; None before the first one.
        weights: The model's state dict at best_step, or at `step` before the first evaluation.
        training: The trainer's tensors by name.
        commands: What started the run, and what resumed it, see `charlm.lm.command`.
    """

    step: int
    config: Config
    model: dict[str, Any]
    vocabulary: Vocabulary
    digest: str
    best_step: int | None
    best_nats: float | None
    weights: Mapping[str, Tensor]
    training: Mapping[str, Tensor]
    commands: tuple[dict[str, str], ...] = ()

    def build_model(self, device: torch.device | str = "cpu") -> LanguageModel:
        """Builds the model with its weights in torch's default dtype, in evaluation mode on `device`.

        Raises:
            UserError: The weights do not fit the model.
        """
        try:
            model = build_model(**self.model)
            model.load_state_dict(self.weights)
        except UserError:  # a ValueError too
            raise
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the checkpoint's weights do not fit its model: {reason}") from error
        return model.to(device).eval()


def exists(directory: Path) -> bool:
    """Whether `directory` contains a checkpoint, valid or not."""
    return (directory / MANIFEST).exists()


def fingerprint(directory: Path) -> str:
    """A text that changes with every `save` to `directory`; it may be empty of a checkpoint."""
    path = directory / MANIFEST
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "none"


def foreign_files(directory: Path) -> list[str]:
    """The names of files in `directory` that no run of charlm wrote, which must not be written over.

    The list is empty if the folder does not exist, is empty, or contains a checkpoint, even a damaged one.
    """
    if not directory.is_dir():
        return []
    if not exists(directory):
        return sorted(path.name for path in directory.iterdir() if not OWN_FILES.fullmatch(path.name))
    try:
        manifest = json.loads(_read(directory / MANIFEST))
    except (ValueError, RecursionError):
        return []
    return [] if isinstance(manifest, dict) and manifest.get("format") == FORMAT else [MANIFEST]


def save(directory: Path, checkpoint: Checkpoint, processes: Processes | None = None) -> None:
    """Writes `checkpoint` to `directory`, creating it if needed; the old one stays until the new one is complete.

    All `processes` must call it, with a `directory` that they share; None is this process alone. The tensors of
    `checkpoint` are those of `parallel.parts_to_save`.

    Raises:
        OSError: A file cannot be written; the error names it.
        UserError: Another process cannot write a file, or wrote it to another folder.
    """
    processes = processes or Processes()
    written: dict[str, dict[str, Any]] = {}  # by this process

    def write() -> dict[str, dict[str, Any]]:
        tensors = {"model": checkpoint.weights, "training": checkpoint.training}
        wanted = {part: found for part, found in tensors.items() if found or processes.rank == 0}
        if wanted:
            directory.mkdir(parents=True, exist_ok=True)
        for part, found in wanted.items():
            written[part] = _write_tensors(directory, part, found, processes.rank)
        return written

    try:
        files = processes.results_of_all(write)
    except (UserError, OSError):  # all processes raise, so that none will name these files
        old = (directory / MANIFEST).read_text(encoding="utf-8") if exists(directory) else ""
        for entry in written.values():
            if entry["name"] not in old:
                (directory / entry["name"]).unlink(missing_ok=True)
        raise
    processes.results_of_all(lambda: _commit(directory, checkpoint, files) if processes.rank == 0 else None)


def _commit(directory: Path, checkpoint: Checkpoint, files: list[dict[str, dict[str, Any]]]) -> None:
    """Makes the tensor `files`, given by rank and part, the checkpoint of `directory`."""
    for rank, written in enumerate(files):
        for entry in written.values():
            if not (directory / entry["name"]).exists():
                raise UserError(
                    f"{directory / entry['name']} of rank {rank} is not here: the ranks must share the folder"
                )
    lists = {part: [written[part] for written in files if part in written] for part in PARTS}
    is_sharded = any(len(entries) > 1 for entries in lists.values())
    manifest = {
        "format": FORMAT,
        "version": VERSION if is_sharded else 1,
        "charlm": __version__,
        "commands": checkpoint.commands,
        "step": checkpoint.step,
        "best_step": checkpoint.best_step,
        "best_nats": checkpoint.best_nats,
        "config": checkpoint.config.to_dict(),
        "model": checkpoint.model,
        "vocabulary": {"chars": checkpoint.vocabulary.chars, "separator": checkpoint.vocabulary.separator},
        "digest": checkpoint.digest,
        "files": lists if is_sharded else {part: entries[0] for part, entries in lists.items()},
    }
    text = json.dumps(manifest, indent=1, allow_nan=False, ensure_ascii=True) + "\n"
    write_atomically(directory / MANIFEST, text.encode())
    _remove_unnamed(directory, {entry["name"] for entries in lists.values() for entry in entries})


def load(directory: Path, *, mapped: bool = False) -> Checkpoint:
    """Loads the checkpoint in `directory`.

    The manifest is not trusted: it may only name tensor files in its own folder, and safetensors files cannot contain
    code. With `mapped` the files are mapped into memory, so that a tensor takes none before it is read. This is for the
    run that has locked the folder; the disk keeps files that were removed until the checkpoint is freed.

    Raises:
        UserError: There is no checkpoint, a newer charlm wrote it, or one of its files is missing, truncated or
            altered.
    """
    path = directory / MANIFEST
    while True:
        data = _read(path)
        try:
            return _load(path, data, mapped)
        except UserError:
            # A running training may have replaced the files after the manifest was read: then read the new manifest.
            if _read(path) == data:
                raise


def _load(path: Path, data: bytes, mapped: bool) -> Checkpoint:
    directory = path.parent
    manifest = _parse(path, data)
    version = manifest["version"]
    if type(version) is not int or version < 1:
        raise UserError(f"{path} is damaged: its version is {version!r}")
    if version > VERSION:
        raise UserError(
            f"{directory} was written by a newer charlm (checkpoint version {version}; "
            f"this charlm reads up to version {VERSION})"
        )
    try:
        files = {part: _typed(manifest["files"], part, dict, list) for part in PARTS}
        tensors = {part: _read_tensors(directory, part, entries, mapped) for part, entries in files.items()}
        return Checkpoint(
            step=_typed(manifest, "step", int),
            config=Config.from_dict(manifest["config"]),
            model=_typed(manifest, "model", dict),
            vocabulary=_vocabulary(manifest),
            digest=_typed(manifest, "digest", str),
            best_step=_typed(manifest, "best_step", int, None),
            best_nats=_typed(manifest, "best_nats", int, float, None),
            weights=tensors["model"],
            training=tensors["training"],
            commands=tuple(_typed({"commands": [], **manifest}, "commands", list)),
        )
    except UserError:  # a ValueError too
        raise
    except KeyError as error:
        raise UserError(f"{path} is damaged: it has no {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint in {path.parent}: {path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or "version" not in manifest:
        raise UserError(f"{path} is damaged or not a charlm checkpoint: its JSON is not a manifest")
    return manifest


def _typed(manifest: dict[str, Any], key: str, *types: type | None) -> Any:
    """manifest[key]; TypeError unless it has exactly one of `types`, so that JSON's true is not an int."""
    value = manifest[key]
    if not any(value is None if wanted is None else type(value) is wanted for wanted in types):
        raise TypeError(f"{key} is {value!r}")
    return value


def _vocabulary(manifest: dict[str, Any]) -> Vocabulary:
    entry = _typed(manifest, "vocabulary", dict)
    chars, separator = _typed(entry, "chars", str), _typed(entry, "separator", bool)
    if list(chars) != sorted(set(chars)):
        raise ValueError("the characters of its vocabulary are not sorted and unique")
    vocabulary = Vocabulary(chars, separator)
    expected = _typed(manifest, "model", dict)["vocab_size"]
    if expected != len(vocabulary):
        raise ValueError(f"its vocabulary has {len(vocabulary)} tokens, its model {expected}")
    return vocabulary


def _write_tensors(directory: Path, part: str, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Any]:
    """Writes one tensor file and returns its entry in the manifest."""
    metadata = {"rank": str(rank)} if rank else None  # so that no two ranks write the same file
    data = tensors_to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    digest = hashlib.sha256(data).hexdigest()
    name = f"{part}-{digest[:16]}.safetensors"
    write_atomically(directory / name, data)
    return {"name": name, "bytes": len(data), "sha256": digest}


class _Joined(UserDict[str, Any]):
    """The tensors of several files by name; a lookup concatenates the rows of one that is divided among them."""

    def __getitem__(self, name: str) -> Tensor:
        rows = self.data[name]
        return torch.cat(rows) if len(rows) > 1 else rows[0]


def _read_tensors(
    directory: Path, part: str, entries: dict[str, Any] | list[dict[str, Any]], mapped: bool
) -> Mapping[str, Tensor]:
    """The tensors of the file or of the files that `entries` names."""
    rows: dict[str, list[Tensor]] = {}
    for rank, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        for name, tensor in _read_file(directory, part, entry, rank, mapped).items():
            rows.setdefault(name, []).append(tensor)
    return _Joined(rows) if mapped else dict(_Joined(rows))


def _read_file(directory: Path, part: str, entry: dict[str, Any], rank: int, mapped: bool) -> dict[str, Tensor]:
    name = _typed(entry, "name", str)
    if not re.fullmatch(rf"{part}-[0-9a-f]{{16}}\.safetensors", name):
        raise ValueError(f"{name!r} is not the name of a {part} file")
    path = directory / name
    try:
        found = path.stat().st_size
        if found != entry["bytes"]:  # checked before reading, because the file may have any size
            raise UserError(f"{path} is truncated or altered: it has {found} bytes instead of {entry['bytes']}")
        data = b"" if mapped else path.read_bytes()
        if (sha256_of(path) if mapped else hashlib.sha256(data).hexdigest()) != entry["sha256"]:
            raise UserError(f"{path} is altered: its sha256 is not the one in {MANIFEST}")
        with safe_open(path, "pt") as tensors:
            written_by = (tensors.metadata() or {}).get("rank", "0")
        if written_by != str(rank):
            raise UserError(f"{path} is the file of rank {written_by}, in the place of that of rank {rank}")
        return map_tensors(path) if mapped else tensors_from_bytes(data)
    except OSError as error:
        raise UserError(f"cannot read {path}, a part of the checkpoint: {error.strerror}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error


def _remove_unnamed(directory: Path, names: set[str]) -> None:
    """Removes the tensor files of other checkpoints, and temporary files that killed processes have left."""
    own = f".{os.getpid()}.tmp"  # another thread may be writing one
    for path in directory.iterdir():
        is_part = PART.fullmatch(path.name) and path.name not in names
        if (is_part or TEMPORARY.fullmatch(path.name)) and not path.name.endswith(own):
            path.unlink(missing_ok=True)

"""The models of a page: surprisals of a text, the next character, samples, and the files that change below them.

When the files in a model's folder change, the next request loads the model again. A checkpoint that cannot be loaded
leaves the old model in its place. Either way `notice` says what happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import charlm.functional as F
from charlm._errors import UserError
from charlm.lm import checkpoint
from charlm.lm.character_model import CharacterModel
from charlm.lm.display import ITEM_END, glyph
from charlm.lm.sample import SamplingOptions, stream
from charlm.lm.terminal import visible

PIECE = 250  # characters that one request scores: the page asks again for the rest, and other requests get their turn
MOST_SHOWN = 12  # of the next characters
ITEMS = 10  # that one request samples of a model of items


class Served:
    """The trained model in a folder; UserError as of `charlm.load`.

    `version` counts how often it was loaded, and `notice` is a sentence about files that changed, or empty.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        self.directory, self.device = directory, device
        self.version, self.notice = 0, ""
        self._stamp = self._files()
        self._load()

    def _files(self) -> list[tuple[str, int, int, int]]:
        """What changes when the checkpoint does: name, time, size and inode of its manifest and its weights."""
        found = []
        with suppress(OSError):  # a file that is being replaced
            for path in [self.directory / checkpoint.MANIFEST, *sorted(self.directory.glob("model-*.safetensors"))]:
                status = path.stat()
                found.append((path.name, status.st_mtime_ns, status.st_size, status.st_ino))
        return found

    def _load(self) -> None:
        saved = checkpoint.load(self.directory)
        self.model = CharacterModel(saved, self.device)
        self.step = saved.step if saved.best_step is None else saved.best_step
        self.version += 1

    def refresh(self) -> None:
        """Loads the model again if its files have changed."""
        stamp = self._files()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        name, now = visible(str(self.directory)), time.strftime("%H:%M:%S")
        try:
            self._load()
        except UserError as error:
            kept = f"so the page keeps the model of step {self.step:,}"
            self.notice = f"{name} changed at {now} and cannot be loaded, {kept}: {visible(str(error))}"
        else:
            self.notice = f"{name} changed: the page shows the model of step {self.step:,}, loaded at {now}."

    def describe(self) -> dict[str, Any]:
        """What the page says about the model."""
        self.refresh()
        model = self.model
        return {
            "name": visible(str(self.directory)),
            "label": model.config.label,
            "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
            "step": self.step,
            "bits": None if model.best_nats is None else model.best_nats / math.log(2),
            "format": model.format,
            "tokens": len(model.vocabulary),
            "version": self.version,
            "notice": self.notice,
        }

    def score(self, text: str, start: int) -> dict[str, Any]:
        """The surprisal of up to PIECE characters of `text` from `start` on.

        In line format each line is an item, and a newline is the end of one.

        Returns:
            "bits" and "names", the printed forms, of each of these characters; "unknown", the places of those outside
            the vocabulary; "basis", which two answers must share to be put together; and "next", the distribution of
            the character after the text, or None where the text goes on.

        Raises:
            UserError: `start` is outside the text.
        """
        if not 0 <= start <= len(text):
            raise UserError(f"start is {start}, but must be at least 0 and at most {len(text)}, the text's length")
        self.refresh()
        model, is_line = self.model, self.model.format == "line"
        chars = {*model.vocabulary.chars, *("\n" if is_line else "")}
        unknown = "error" if chars.issuperset(text) else "escape"
        stop = min(len(text), start + PIECE)
        first = text.rfind("\n", 0, start) + 1 if is_line else 0  # the beginning of the item
        line, *others = text[first:stop].split("\n") if is_line else [text[:stop]]
        cut = start - first
        found = [model.continued_surprisal(line[:cut], line[cut:], unit="bits", unknown=unknown)]
        found += model.surprisals(others, unit="bits", unknown=unknown)
        piece = text[start:stop]
        return {
            "bits": torch.cat(found).tolist()[: len(piece)],  # without the end of the last item
            "names": [glyph(char) for char in piece],
            "unknown": [at for at, char in enumerate(piece) if char not in chars],
            "basis": f"{self.version} {unknown}",
            "next": self._next(text[text.rfind("\n") + 1 :] if is_line else text) if stop == len(text) else None,
        }

    def _next(self, before: str) -> dict[str, Any]:
        """The most probable tokens after `before` with their p, the number of others, and the entropy in bits."""
        log_p = self.model.next_log_probs(before, unknown="escape")
        p, tokens = log_p.exp().topk(min(MOST_SHOWN, len(log_p)))
        stop, itos = self.model.vocabulary.stop_token, self.model.vocabulary.itos
        names = [ITEM_END if token == stop else glyph(itos[token]) for token in tokens.tolist()]
        entropy = F.entropy(log_p).item() / math.log(2)
        return {"top": list(zip(names, p.tolist(), strict=True)), "others": len(log_p) - len(p), "entropy": entropy}

    def sample(self, options: SamplingOptions) -> Iterator[tuple[int, str]]:
        """Samples ITEMS items, each with the next seed, or a passage: the number of each text and a piece of it.

        Raises:
            UserError: A character of the prompt is not in the vocabulary, or the predictions are not numbers.
        """
        self.refresh()
        model = self.model
        for number in range(ITEMS if model.format == "line" else 1):
            seeded = replace(options, seed=options.seed + number)
            pieces = stream(model.model, model.vocabulary, seeded, model.device)
            yield number, visible(options.prompt, keep="\n\t")
            for piece in pieces:
                yield number, visible(piece, keep="\n\t")

"""The network of a checkpoint with the weights of `networks_charlm`, and the logits that an export must have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from charlm._errors import UserError
from charlm.lm import checkpoint
from charlm.lm.config import NETWORKS
from charlm.lm.models import LanguageModel, Mixture
from charlm.lm.vocabulary import Vocabulary

TOLERANCE = 1e-4  # of the largest logit, if that is above 1: the sums of float32 are in another order
ROWS = 3  # texts that are compared
BEHIND = 4  # positions of them that are compared at the beginning, and on either side of block_size


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        model: The network, without an n-gram that it was mixed with, in evaluation mode.
        vocabulary: The characters and their tokens.
        arguments: Those of `networks_charlm.build_network`.
        weights: The state dict of the network that it builds.
        tokens: (ROWS, block_size + BEHIND) int64, random texts that begin with the start token.
        places: (n,) int64 some positions of `tokens`.
        logits: (ROWS, n, V) what charlm computes at these.
    """

    model: LanguageModel
    vocabulary: Vocabulary
    arguments: dict[str, Any]
    weights: Mapping[str, Tensor]
    tokens: Tensor
    places: Tensor
    logits: Tensor

    @classmethod
    def load(cls, directory: Path, network_only: bool = False) -> Source:
        """Loads the best weights of the run in `directory`.

        Raises:
            UserError: There is no valid checkpoint, it is of a count model, or of a mixture without `network_only`, or
                the network predicts no finite numbers.
        """
        saved = checkpoint.load(directory)
        model = saved.build_model()
        kind = saved.model["type"]
        if kind not in NETWORKS:
            raise UserError(
                f"the model in {directory} is of type {kind}, which has counts and no network: only models of type "
                f"{', '.join(NETWORKS)} can be exported"
            )
        if isinstance(model, Mixture):
            if not network_only:
                raise UserError(
                    f"the model in {directory} mixes its {kind} with an n-gram, which cannot be exported: add "
                    "--network-only to export the network alone, whose loss is higher, or train one with --no-mix"
                )
            model = model.network
        tokens, places, logits = _reference(model)
        if not logits.isfinite().all():
            raise UserError(f"the network in {directory} predicts no finite numbers: its training diverged")
        dropped = ("pad_token", "dropout", "mix_ngram")
        arguments = {name: value for name, value in saved.model.items() if name not in dropped}
        arguments["start_token"] = model.pad_token
        return cls(model, saved.vocabulary, arguments, _weights(kind, model.state_dict()), tokens, places, logits)

    def difference(self, logits: Tensor) -> float:
        """The largest difference between charlm's logits and those of an export, (ROWS, n, V) at `places`.

        Raises:
            UserError: It is above TOLERANCE.
        """
        largest = (logits - self.logits).abs().max().item()
        if not largest <= TOLERANCE * max(1.0, self.logits.abs().max().item()):  # nor is it NaN
            raise UserError(f"the export failed: its logits differ from charlm's by {largest:.1e}, so it was not kept")
        return largest


def check_output(path: Path, overwrite: bool) -> None:
    """Raises UserError if `path` exists, unless it may be overwritten."""
    if not overwrite and (path.exists() or path.is_symlink()):
        raise UserError(f"{path} already exists: choose another name, or add --overwrite to replace it")


def _weights(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a network of `networks_charlm` from that of charlm's model.

    torch's recurrent layers have a second bias, 0 here, and the gates of the LSTM in the order i, f, g, o instead of
    i, f, o, g.
    """
    if kind not in ("rnn", "gru", "lstm"):
        return {name.replace(".attention.", "."): tensor for name, tensor in state.items()}  # of the gpt
    weights = {name: tensor for name, tensor in state.items() if not name.startswith("layers.")}
    starts = [tensor for name, tensor in state.items() if name.endswith(".start")]
    weights["start"] = torch.stack(starts, dim=1)
    for layer in range(len(starts)):
        W, b, U = (state[f"layers.{layer}.{name}"] for name in ("input.weight", "input.bias", "recurrent.weight"))
        parts = {"weight_ih": W, "weight_hh": U, "bias_ih": b, "bias_hh": torch.zeros_like(b)}
        weights.update({f"layers.{name}_l{layer}": _gates(kind, part) for name, part in parts.items()})
    return weights


def _gates(kind: str, rows: Tensor) -> Tensor:
    """`rows` of the gates, (gates * H, …), in torch's order."""
    return torch.cat([rows.chunk(4)[gate] for gate in (0, 1, 3, 2)]) if kind == "lstm" else rows


@torch.no_grad()
def _reference(model: LanguageModel) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens, places and logits of `Source`."""
    T = model.block_size
    tokens = torch.randint(model.vocab_size, (ROWS, T + BEHIND), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = model.pad_token
    places = sorted({at for middle in (0, T) for at in range(middle - BEHIND, middle + BEHIND) if at >= 0})
    logits = torch.stack([model.next_logits(tokens[:, 1 : at + 1], {}) for at in places], dim=1)
    return tokens, torch.tensor(places), logits

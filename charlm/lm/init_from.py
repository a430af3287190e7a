"""`--init-from DIR`: a run that begins with the weights of the network of another one (fine-tuning).

The architecture is that of DIR. The vocabulary is that of the new data: the embedding and the logits of a character
that both have are those of DIR, those of a new character are freshly initialized, and those of a character that only
DIR has are left out. The optimizer, the step and the n-gram of a mixture begin anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from charlm._errors import UserError
from charlm.lm import checkpoint
from charlm.lm.checkpoint import Checkpoint
from charlm.lm.config import MODEL_OPTIONS, NETWORKS
from charlm.lm.inputs import flag
from charlm.lm.models import LanguageModel
from charlm.lm.vocabulary import MAX_NAMED_CHARACTERS, Vocabulary

OF_MIXTURE = "network."  # what the names of the network's weights in a mixture begin with
ROWS_ARE_TOKENS = ("embedding.", "head.")  # of every network, what the names of tensors of V rows begin with


def options_of(directory: Path, given: Mapping[str, Any]) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint in `directory`, and `given` with the options that a run which begins with it takes from it.

    These are the type, the architecture and, where it is not given, the dropout.

    Raises:
        UserError: There is no checkpoint, it is of a count model, or a given option contradicts it.
    """
    saved = checkpoint.load(directory, mapped=True)
    config = saved.config
    if config.type not in NETWORKS:
        raise UserError(f"the model in {directory} is of type {config.type}, which counts: only a network can go on")
    fixed = {name: getattr(config, name) for name in ("type", "block_size", *MODEL_OPTIONS[config.type])}
    dropout = fixed.pop("dropout")
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise UserError(
                f"{flag(name)} {given[name]} contradicts the {value} of the model in {directory}: leave the option out"
            )
    return saved, {"dropout": dropout, **given, **fixed}


@torch.no_grad()
def copy_weights(saved: Checkpoint, network: LanguageModel, vocabulary: Vocabulary) -> str:
    """Copies the weights of the network in `saved` to `network`, which has its architecture, and `vocabulary`.

    Returns:
        What a checkpoint says of it: the model, and the characters of the data.

    Raises:
        UserError: The two vocabularies have no character in common, or only one has ends of items.
    """
    old = saved.vocabulary
    if old.separator != vocabulary.separator:
        formats = ["line" if each.separator else "text" for each in (old, vocabulary)]
        raise UserError(
            f"--init-from: that model is of format {formats[0]}, but the data are read in format {formats[1]}: "
            f"choose --format {formats[0]}"
        )
    known = [char for char in vocabulary.chars if char in old.stoi]
    if not known:
        raise UserError("--init-from: no character of the data is in the vocabulary of that model")
    own = [0] * vocabulary.separator + [vocabulary.stoi[char] for char in known]
    theirs = [0] * vocabulary.separator + [old.stoi[char] for char in known]
    for name, tensor in network.state_dict().items():
        key = f"{OF_MIXTURE}{name}" if f"{OF_MIXTURE}{name}" in saved.weights else name
        weights = saved.weights[key].to(tensor.device)
        if name.startswith(ROWS_ARE_TOKENS):
            tensor[own] = weights[theirs]
        else:
            tensor.copy_(weights)
    new = [char for char in vocabulary.chars if char not in old.stoi]
    more = f" and {len(new) - MAX_NAMED_CHARACTERS} more" if len(new) > MAX_NAMED_CHARACTERS else ""
    named = f" ({', '.join(map(repr, new[:MAX_NAMED_CHARACTERS]))}{more})" if new else ""
    step = saved.step if saved.best_step is None else saved.best_step
    return (
        f"{saved.config.type} of step {step}, trained on data {saved.digest[:16]}; {len(known)} characters of the data "
        f"are known and {len(new)} are new{named}, and {len(old.chars) - len(known)} of that model do not occur"
    )

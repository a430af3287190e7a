"""`charlm.load`, which imports the language model only when it is called."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from charlm.lm.character_model import CharacterModel


def load(directory: str | PathLike[str], device: torch.device | str = "cpu") -> CharacterModel:
    """Loads a trained language model, which takes text and returns text.

    Args:
        directory: the folder that `charlm train -o` wrote.
        device: where the model runs: "cpu", "cuda", "cuda:1", ....

    Returns:
        A `charlm.lm.character_model.CharacterModel`.

    Raises:
        charlm.UserError: there is no checkpoint, a part of it is damaged, or the device cannot be used.
        ImportError: the extra `lm` is not installed.

    Example:
        After `charlm train -i names.txt -o out`:

        >>> import charlm
        >>> model = charlm.load("out")
        >>> model.surprisal("emma").shape  # four characters and the end of the name
        torch.Size([5])
        >>> len(model.generate("em", num_samples=3))
        3
    """
    from charlm.lm import checkpoint
    from charlm.lm.character_model import CharacterModel
    from charlm.lm.train import usable_device

    return CharacterModel(checkpoint.load(Path(directory)), usable_device(str(device)))

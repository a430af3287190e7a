"""A folder that transformers loads: config, weights, tokenizer, and the Python of the network.

What comes from the corpus, its characters, stands in tokenizer.json alone, as JSON in ASCII.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file

from charlm._errors import UserError
from charlm._extras import require_packages
from charlm.export.checkpoint import Source, check_output
from charlm.lm.files import naming, write_atomically
from charlm.lm.sample import MAX_NEW_TOKENS
from charlm.lm.vocabulary import Vocabulary

PACKAGES = ("transformers",)  # the extra `hf`
CODE = ("modeling_charlm.py", "networks_charlm.py")
FILES = {*CODE, "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
# Loads the folder as a user does who has no charlm, and generates; writes the logits of the tokens.
CHECK = """
import sys
from pathlib import Path
sys.modules["charlm"] = None  # an import fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

folder = Path(sys.argv[1])
work = folder.parent
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
text = (work / "text").read_bytes().decode()
ids = tokenizer(text)["input_ids"]
assert ids == load_file(work / "given")["ids"].tolist(), "the tokens of the tokenizer are others"
assert tokenizer.decode(ids[1:]) == text, "the text of the tokenizer is another"
for loader in (AutoModel, AutoModelForCausalLM):
    model = loader.from_pretrained(folder, trust_remote_code=True)
    model.generate(max_new_tokens=2)
    with torch.no_grad():
        logits = model(load_file(work / "given")["tokens"]).logits
save_file({"logits": logits}, work / "found")
"""


def export_hugging_face(source: Source, folder: Path, overwrite: bool = False) -> float:
    """Writes `folder`, which appears when it is complete and checked.

    Returns:
        The largest difference of a logit from charlm's.

    Raises:
        UserError: The extra `hf` is missing, the folder exists, or has other files, or the check fails.
        OSError: A file cannot be written.
    """
    require_packages("--hf", "hf", PACKAGES)
    folder = folder.absolute()
    _check_target(folder, overwrite)
    contents = _contents(source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with naming(folder), tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        new, old = Path(work) / "new", Path(work) / "old"
        new.mkdir()
        for name, data in contents.items():
            write_atomically(new / name, data)
        difference = _check(source, new)
        _check_target(folder, overwrite)  # seconds have passed
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
    return difference


def _check_target(folder: Path, overwrite: bool) -> None:
    """Raises UserError unless `folder` does not exist, or may be overwritten and has files of an export alone."""
    check_output(folder, overwrite)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is not a folder: choose another name")
    if folder.exists() and (foreign := {path.name for path in folder.iterdir()} - FILES):
        raise UserError(f"{folder} contains files that no export wrote ({min(foreign)!r}): choose another folder")


def _contents(source: Source) -> dict[str, bytes]:
    """The bytes of each of FILES."""
    vocabulary = source.vocabulary
    start, stop = vocabulary.pad_token, vocabulary.stop_token
    # In running text no token is padding: transformers would take it for absent where a text has it.
    special = {"bos_token_id": start, "eos_token_id": stop, "pad_token_id": stop}
    model = "modeling_charlm.CharlmForCausalLM"
    config = {
        "model_type": "charlm",
        "architectures": ["CharlmForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_charlm.CharlmConfig", "AutoModel": model, "AutoModelForCausalLM": model},
        "dtype": "float32",
        "network": source.arguments,
        **special,
    }
    generation = {
        "do_sample": True,
        "top_k": 0,
        "use_cache": False,
        "max_new_tokens": MAX_NEW_TOKENS["line" if vocabulary.separator else "text"],
        **special,
    }
    weights = {f"network.{name}": tensor.contiguous() for name, tensor in source.weights.items()}
    here = files("charlm.export")
    return {
        **{name: here.joinpath(name).read_bytes() for name in CODE},
        "config.json": _json(config),
        "generation_config.json": _json(generation),
        "model.safetensors": save(weights, {"format": "pt"}),
        **_tokenizer(vocabulary),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _tokenizer(vocabulary: Vocabulary) -> dict[str, bytes]:
    """The tokenizer: one token per character, the start token first. An unknown character is an error.

    The text of the separator is the newline, which is no character of an item.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    characters = ["\n", *vocabulary.chars] if vocabulary.separator else list(vocabulary.chars)
    try:
        vocabulary.chars.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the vocabulary contains {error.object[error.start]!r}, which no UTF-8 text has") from error
    tokens = {character: token for token, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="unknown"))  # is no character, and so an error
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    start = {"id": "start", "ids": [vocabulary.pad_token], "tokens": [characters[vocabulary.pad_token]]}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="start $A", pair="start $A start $B", special_tokens=[start]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if vocabulary.separator:
        tokenizer.add_special_tokens([AddedToken("\n", normalized=False)])
        config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), "\n")
    return {"tokenizer.json": _json(json.loads(tokenizer.to_str())), "tokenizer_config.json": _json(config)}


def _check(source: Source, folder: Path) -> float:
    """Loads `folder` in a process of its own, without charlm; the largest difference of a logit.

    What the process reads and writes is in the parent of `folder`.
    """
    vocabulary, work = source.vocabulary, folder.parent
    ids = [vocabulary.pad_token, *vocabulary.encode(vocabulary.chars).tolist()]
    (work / "text").write_bytes(vocabulary.chars.encode())
    save_file({"ids": torch.tensor(ids), "tokens": source.tokens}, work / "given")
    result = subprocess.run(
        [sys.executable, "-c", CHECK, str(folder)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        errors="replace",
        cwd=work,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")},
        check=False,
    )
    if result.returncode:
        reason = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
        raise UserError(f"transformers cannot use the export, so it was not kept: {reason}")
    return source.difference(load_file(work / "found")["logits"][:, source.places])

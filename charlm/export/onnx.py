"""A network as an ONNX file: input_ids (batch, length) int64 → logits (batch, length, V) float32.

torch's older exporter (`dynamo=False`) writes it. The newer one has no translation of torch.nn.RNN, fixes its length,
and takes 60 s where this takes one; it needs onnxscript too (torch 2.13, onnxscript 0.7.2).
"""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from charlm._errors import UserError
from charlm._extras import require_packages
from charlm.export.checkpoint import Source, check_output
from charlm.export.networks_charlm import Network, build_network, logits_of
from charlm.lm.files import write_atomically

PACKAGES = ("onnx", "onnxruntime")  # the extra `onnx`
OPSET = 18  # of ai.onnx


def export_onnx(source: Source, path: Path, overwrite: bool = False) -> float:
    """Writes `path`, which appears when it is complete and was run by onnxruntime.

    Its metadata `charlm` is JSON: the characters in the order of their tokens, the start token, the stop token and the
    block_size. The length is any for mlp and wavenet, and otherwise at most block_size.

    Returns:
        The largest difference of a logit from charlm's.

    Raises:
        UserError: The extra `onnx` is missing, the file exists, or the check fails.
        OSError: The file cannot be written.
    """
    require_packages("--onnx", "onnx", PACKAGES)
    check_output(path, overwrite)
    if path.is_dir():
        raise UserError(f"{path} is a folder: choose the name of a file")
    network = build_network(**source.arguments).eval()
    network.load_state_dict(source.weights)
    data = _model(network, source)
    difference = source.difference(_run(data, source, network))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    return difference


def _model(network: Network, source: Source) -> bytes:
    """The ONNX file."""
    import onnx

    file = io.BytesIO()
    names = {0: "batch", 1: "length"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's age, and what it traces
        torch.onnx.export(
            network,
            (source.tokens[:2, : network.block_size],),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_axes={"input_ids": names, "logits": names},
        )
    model = onnx.load_from_string(file.getvalue())
    vocabulary = source.vocabulary
    facts = {"chars": vocabulary.chars, "start_token": vocabulary.pad_token, "stop_token": vocabulary.stop_token}
    onnx.helper.set_model_props(model, {"charlm": json.dumps({**facts, "block_size": network.block_size})})
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _run(data: bytes, source: Source, network: Network) -> Tensor:
    """The logits at the places of `source` by onnxruntime in place of `network`, (ROWS, n, V)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(tokens: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"input_ids": tokens.numpy()})[0])

    return logits_of(network, source.tokens, run)[:, source.places]

"""`charlm export`: a trained network for Hugging Face's transformers, or as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from charlm._errors import UserError
from charlm.cli.common import Directory, new_console


def export(
    directory: Directory,
    hf: Annotated[
        Path | None, typer.Option(help="Folder to write, for AutoModel.from_pretrained with trust_remote_code.")
    ] = None,
    onnx: Annotated[Path | None, typer.Option(help="ONNX file to write.")] = None,
    network_only: Annotated[
        bool, typer.Option("--network-only", help="Of a mixture with an n-gram, export the network alone.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an export wrote.")] = False,
) -> None:
    """Export a trained network for programs without charlm.

    What is written is loaded and run first, and its logits are compared with charlm's.

    --hf needs the extra hf, --onnx the extra onnx.
    """
    if hf is None and onnx is None:
        raise UserError("nothing to export: add --hf FOLDER or --onnx FILE")
    from charlm.export import Source, export_hugging_face, export_onnx
    from charlm.export.checkpoint import check_output
    from charlm.export.onnx import OPSET

    for path in (hf, onnx):
        if path is not None:
            check_output(path, overwrite)
    source = Source.load(directory, network_only)
    console = new_console()
    exports = ((hf, "for transformers", export_hugging_face), (onnx, f"ONNX opset {OPSET}", export_onnx))
    for path, what, write in exports:
        if path is not None:
            difference = write(source, path, overwrite)
            console.print(f"wrote {path} ({what}; logits within {difference:.1e} of charlm's)", soft_wrap=True)

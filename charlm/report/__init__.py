"""`charlm report`: one HTML file that shows trained models; it needs the extra `report`.

data.py gathers the numbers, figures.py draws them, and page.py puts them into page.html.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path


def write(
    directories: Sequence[str | PathLike[str]],
    path: str | PathLike[str],
    *,
    input_file: Path | None = None,
    device: str = "cpu",
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Path:
    """Writes a report of the runs in `directories` to `path`, which keeps its content until the report is complete.

    Args:
        directories: The folders of trained models of the same data, one or several.
        path: The HTML file to write.
        input_file: The training data, if it is not where the runs found it.
        device: The device to measure the models on.
        on_progress: Called with what is measured and the number of predictions, done and all.

    Returns:
        `path`.

    Raises:
        UserError: A folder has no valid checkpoint, the runs are of different data or their data has changed, or the
            extra `report` is not installed.
        OSError: The file cannot be written.
    """
    from charlm._errors import UserError
    from charlm._extras import require_packages
    from charlm.lm.files import write_atomically
    from charlm.lm.inputs import trained_corpus
    from charlm.lm.train import usable_device
    from charlm.report.page import PACKAGES, render

    require_packages("a report", "report", PACKAGES)
    path = Path(path)
    if not path.name or path.is_dir():
        raise UserError(f"cannot write {path}: Is a directory")
    if not path.parent.is_dir():  # said before the models are measured
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if not directories:
        raise UserError("a report needs the folder of a trained model")
    from charlm.report.data import gather

    runs = [Path(directory) for directory in directories]
    found = gather(runs, lambda saved: trained_corpus(saved, input_file), usable_device(device), on_progress)
    write_atomically(path, render(found).encode())
    return path

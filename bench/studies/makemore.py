"""makemore.py's models against ours: the same names, sizes, steps and optimizer, and the loss of each on test.

    python -m bench.studies.makemore NAMES MAKEMORE     trains what bench/results/makemore.json lacks: minutes
    python -m bench.studies.makemore                    prints the table of docs/benchmarks.md from that file

NAMES is makemore's names.txt and MAKEMORE the makemore.py of github.com/karpathy/makemore, whose classes and functions
train and split. Both sides take makemore.py's defaults: widths of 64, batches of 32 names, AdamW with a constant rate
of 5e-4, no dropout; the 1,000 names that its seed holds out are the test split. The loss is in nats per character, ends
included, of all of test, after the last step.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from bench import record

RECORD = record.RESULTS / "makemore.json"
SEEDS = (3407, 1)
STEPS = 5000
WIDTH, BATCH, RATE, DECAY = 64, 32, 5e-4, 0.01
TYPES = ("bow", "rnn", "gru", "lstm")  # makemore.py has no LSTM


def measure(names: Path, source: Path) -> None:
    """Trains what the record lacks, and writes each result as soon as it is there."""
    import torch

    torch.set_num_threads(1)  # a step is small
    path = str(source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    found: dict[str, Any] = {"schema": record.SCHEMA, "makemore.py": digest, "steps": STEPS, "runs": []}
    if RECORD.exists():
        found = record.read(RECORD)
    done = {(run["type"], run["seed"]) for run in found["runs"]}
    makemore = _import(path)
    for seed in SEEDS:
        for type in TYPES:
            if (type, seed) in done:
                continue
            torch.manual_seed(seed)
            train, test = makemore.create_datasets(str(names))
            theirs = None if type == "lstm" else _theirs(makemore, type, train, test)
            run = {"type": type, "seed": seed, "makemore": theirs, "charlm": _ours(type, seed, train.words, test.words)}
            found["runs"].append(run)
            print(run, file=sys.stderr)
            record.write(RECORD, found)


def _import(path: str) -> Any:
    """makemore.py as a module, without TensorBoard, which only its main program uses."""
    board: Any = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = object
    sys.modules.setdefault("torch.utils.tensorboard", board)
    spec = importlib.util.spec_from_file_location("makemore", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["makemore"] = module  # its dataclass looks for it
    spec.loader.exec_module(module)
    return module


def _theirs(makemore: Any, type: str, train: Any, test: Any) -> dict[str, float]:
    """makemore.py's model after STEPS steps of its training loop."""
    import torch

    config = makemore.ModelConfig(
        vocab_size=train.get_vocab_size(), block_size=train.get_output_length(), n_embd=WIDTH, n_embd2=WIDTH
    )
    model = makemore.BoW(config) if type == "bow" else makemore.RNN(config, cell_type=type)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, betas=(0.9, 0.99), eps=1e-8)
    batches = makemore.InfiniteDataLoader(train, batch_size=BATCH, num_workers=0)
    for _ in range(STEPS):
        idx, targets = batches.next()
        loss = model(idx, targets)[1]
        model.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    idx, targets = map(torch.stack, zip(*test, strict=True))
    with torch.inference_mode():
        nats = model.eval()(idx, targets)[1].item()
    return {"parameters": sum(p.numel() for p in model.parameters()), "nats": nats}


def _ours(type: str, seed: int, train: list[str], test: list[str]) -> dict[str, float]:
    from charlm.lm.config import Config
    from charlm.lm.data import TextCorpus
    from charlm.lm.evaluate import evaluate, predictions
    from charlm.lm.train import Trainer
    from charlm.lm.vocabulary import Vocabulary

    parts = {"train": train, "dev": test, "test": test}
    corpus = TextCorpus("line", Vocabulary.of("".join(train + test), separator=True), f"makemore {seed}", 0, parts)
    layers = {} if type == "bow" else {"n_layer": 1}
    config = Config(
        type=type,
        format="line",
        block_size=max(map(len, train + test)) + 1,
        n_embd=WIDTH,
        n_hidden=WIDTH,
        **layers,
        dropout=0.0,
        max_steps=STEPS,
        batch_size=BATCH,
        learning_rate=RATE,
        weight_decay=DECAY,
        schedule="constant",
        warmup_steps=0,
        eval_interval=STEPS,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, corpus, Path(folder))
        trainer.run()
    result = evaluate(trainer.model, predictions(trainer.model, corpus, "test"), "test")
    return {"parameters": sum(p.numel() for p in trainer.model.parameters()), "nats": result.nats}


def table() -> str:
    """The table of docs/benchmarks.md, in Markdown, from the record: means over the seeds."""
    runs = record.read(RECORD)["runs"]
    lines = [
        "| `--type` | parameters: makemore.py | charlm | test nats: makemore.py | charlm | difference |",
        "|---|---|---|---|---|---|",
    ]
    for type in TYPES:
        own = [run for run in runs if run["type"] == type]
        theirs, ours = ([run[side] for run in own] for side in ("makemore", "charlm"))
        row = [f"`{type}`", "–", f"{ours[0]['parameters']:,}", "–", _nats([run["nats"] for run in ours]), "–"]
        if theirs[0] is not None:
            row[1] = f"{theirs[0]['parameters']:,}"
            row[3] = _nats([run["nats"] for run in theirs])
            row[5] = _nats([a["nats"] - b["nats"] for a, b in zip(ours, theirs, strict=True)], "+")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _nats(values: list[float], sign: str = "") -> str:
    """The mean, and the smallest and largest value where there are several."""
    mean, low, high = (f"{value:{sign}.3f}" for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="*", metavar="NAMES MAKEMORE")
    sources = parser.parse_args().sources
    if sources:
        measure(*sources)
    print(table())


if __name__ == "__main__":
    main()

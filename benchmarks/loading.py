"""Rows per second of reading shuffled batches: columns, images as bytes, and tokens; here and with other loaders.

    python -m benchmarks.loading [--rounds 9] [--out FILE]

Every arm reads the same number of batches of a shuffled epoch and adds up what it read, so that a view does not win
for nothing. Peers in the default way and in their fastest documented one. The limit is ``X[indices]`` with indices
that are there already.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from benchmarks.pairs import Arm, Rounds, aims, conditions, run_rounds
from scaletrain.loader import Loader
from scaletrain.order import Shuffled
from scaletrain.readers import make_reader
from scaletrain.share import Share
from scaletrain.sources.table import as_table
from scaletrain.sources.tokens import Windows

BATCH = 256
LENGTH = 256
BARE, AGAIN, OURS, TORCH = "bare X[indices]", "bare X[indices] again", "scaletrain", "DataLoader(TensorDataset)"
HF_ROWS = "datasets with_format('torch'), row by row (ds[i])"
BATCHED = "DataLoader, batches of indices (batch_size=None)"


def total(batch: Any) -> float:
    """Touch every byte of a batch."""
    leaves = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else [batch]
    return float(sum(leaf.sum() for leaf in leaves if isinstance(leaf, Tensor)))


def read(make: Callable[[], Iterable[Any]], batches: int) -> float:
    """Return the seconds that ``batches`` batches take, the first left out: it starts what is to be started."""
    iterator = chain.from_iterable(make() for _ in repeat(None))  # epoch after epoch
    total(next(iterator))
    started = time.perf_counter()
    for _ in range(batches):
        total(next(iterator))
    return time.perf_counter() - started


def scaletrain(examples: Any, workers: int = 0) -> Iterator[Any]:
    """Our loader's batches of a shuffled epoch."""
    reader = make_reader(examples, None, 0, double=False)
    loader = Loader(reader, Share(Shuffled(reader.n), BATCH), 1, workers=workers, device=torch.device("cpu"))
    return (step[0].batch for step in loader.steps(0))


def bare(columns: dict[str, Tensor]) -> Iterator[Any]:
    """The limit: gather rows by indices that were drawn before."""
    order = torch.randperm(len(next(iter(columns.values()))))
    at = 0
    while True:
        indices = order[at : at + BATCH]
        at = (at + BATCH) % (len(order) - BATCH)
        yield {name: column[indices] for name, column in columns.items()}


def batched(columns: dict[str, Tensor], workers: int = 0) -> Iterable[Any]:
    """Torch's fast way: whole batches of indices from the sampler."""
    dataset = TensorDataset(*columns.values())
    sampler = BatchSampler(RandomSampler(dataset), BATCH, drop_last=True)
    return DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=workers)


class OneByOne:
    """A data set that is asked for one row at a time."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


def table_arms() -> dict[str, Callable[[], Iterable[Any]]]:
    columns = {"x": torch.randn(1_000_000, 32), "label": torch.randint(0, 10, (1_000_000,))}
    import datasets

    rows = datasets.Dataset.from_dict({name: column.numpy() for name, column in columns.items()})
    torch_rows = rows.with_format("torch")
    return {
        BARE: partial(bare, columns),
        AGAIN: partial(bare, columns),
        OURS: partial(scaletrain, columns),
        "scaletrain, a datasets.Dataset": partial(scaletrain, as_table(rows, "rows")),
        TORCH: lambda: DataLoader(TensorDataset(*columns.values()), batch_size=BATCH, shuffle=True),
        BATCHED: partial(batched, columns),
        HF_ROWS: lambda: DataLoader(OneByOne(torch_rows), batch_size=BATCH, shuffle=True),
        "datasets with_format('torch'), DataLoader (ds.__getitems__)": lambda: DataLoader(
            torch_rows, batch_size=BATCH, shuffle=True
        ),
        "datasets with_format('torch'), .iter(256), not shuffled": lambda: torch_rows.iter(BATCH),
    }


def image_arms() -> dict[str, Callable[[], Iterable[Any]]]:
    columns = {"image": torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8), "label": torch.arange(50_000)}
    return {
        BARE: partial(bare, columns),
        OURS: partial(scaletrain, columns),
        TORCH: lambda: DataLoader(TensorDataset(*columns.values()), batch_size=BATCH, shuffle=True),
        BATCHED: partial(batched, columns),
    }


def token_arms(folder: Path) -> dict[str, Callable[[], Iterable[Any]]]:
    path = folder / "tokens.bin"
    np.random.default_rng(0).integers(0, 50_000, 20_000_000).astype(np.uint16).tofile(path)
    tokens = np.memmap(path, dtype=np.uint16, mode="r")

    def nanogpt() -> Iterator[Tensor]:
        while True:
            starts = torch.randint(len(tokens) - LENGTH, (BATCH,))
            x = torch.stack([torch.from_numpy(tokens[i : i + LENGTH].astype(np.int64)) for i in starts])
            y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + LENGTH].astype(np.int64)) for i in starts])
            yield (x, y)

    windows = Windows(tokens.view(np.ndarray), LENGTH)
    assert make_reader(windows, None, 0, double=False).at_once
    return {
        "nanoGPT's get_batch": nanogpt,
        OURS: partial(scaletrain, windows),
        "scaletrain, 1 worker": partial(scaletrain, windows, 1),
    }


BATCHES = {HF_ROWS: 2, TORCH: 40}
"""Fewer of what is slow."""


def table(title: str, rounds: Rounds, base: str, batches: dict[str, int]) -> list[str]:
    """Return the lines of one table: rows per second, and how many times slower than ``base``."""
    lines = [
        "",
        f"## {title}",
        "",
        f"| way | rows/s | CPU us a row | time / {base} (95 % interval) |",
        "|---|---|---|---|",
    ]
    for name, seconds in rounds.seconds.items():
        ratio, low, high = rounds.ratio(name, base)
        each = batches[name] * BATCH
        cpu = sorted(rounds.cpu_seconds[name])[len(seconds) // 2] / each * 1e6
        lines.append(
            f"| {name} | {each / sorted(seconds)[len(seconds) // 2]:,.0f} | {cpu:.2f} | "
            f"{ratio * batches[base] / batches[name]:.2f} "
            f"({low * batches[base] / batches[name]:.2f}-{high * batches[base] / batches[name]:.2f}) |"
        )
    return lines


def aims_of(rounds: Rounds, batches: dict[str, int]) -> list[str]:
    """Say of each aim for rows in memory whether it is met."""

    def faster(than: str) -> float:
        return rounds.ratio(than, OURS)[0] * batches[OURS] / batches[than]

    return aims(
        "Aims",
        (faster(TORCH) >= 10, f"{faster(TORCH):.0f} times the rows of DataLoader(TensorDataset), at least 10"),
        (faster(HF_ROWS) >= 100, f"{faster(HF_ROWS):.0f} times the rows of datasets row by row, at least 100"),
        (faster(BARE) >= 0.9, f"{faster(BARE):.2f} of bare X[indices], at least 0.9"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds")
    parser.add_argument("--batches", type=int, default=400, help="batches read in a round by the fast ways")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Reading shuffled batches",
        "",
        *conditions("python -m benchmarks.loading", ("torch", "datasets", "numpy")),
    ]
    lines += [
        f"* batches of {BATCH}, one thread, {args.rounds} rounds in random order, medians; no workers unless said"
    ]
    with tempfile.TemporaryDirectory() as folder:
        for title, make, base in (
            ("(a) a million rows of 32 float32 and a label", table_arms, BARE),
            ("(b) 50,000 images of 3x32x32 bytes and a label", image_arms, BARE),
            (f"(c) 20 million tokens in a memory map, {LENGTH} a row", partial(token_arms, Path(folder)), OURS),
        ):
            ways = make()
            batches = {name: max(1, BATCHES.get(name, args.batches) * args.batches // 400) for name in ways}
            arms: dict[str, Arm] = {name: partial(read, way, batches[name]) for name, way in ways.items()}
            rounds = run_rounds(arms, args.rounds)
            lines += table(title, rounds, base, batches)
            if HF_ROWS in ways:
                lines += ["", *aims_of(rounds, batches)]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""What text and lm share: the documents of a source, rows of tokens of one length, and writing token after token."""

import re
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from scaletrain import Config, InputError, load

WORD = re.compile(r"[^\W\d]\w*|\d+|[^\w\s]")
PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def check_least(cfg: Config, **least: int) -> None:
    """Raise InputError for an option that is smaller than its least value."""
    for name, smallest in least.items():
        value = getattr(cfg, name)
        if value is not None and value < smallest:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {smallest}")


def is_bytes(source: str) -> bool:
    """Whether the tokens of ``source`` are the bytes of a text, rather than ids in a file."""
    return Path(source).suffix.lower() not in (".bin", ".npy")


def documents(source: str) -> list[bytes]:
    """Return the documents of a text, those between blank lines, or a table's column ``text``."""
    if not is_bytes(source):
        raise InputError(f"{source} is one stream of ids without documents; use --layout packed")
    if source == "stdlib" or Path(source).suffix.lower() in (".jsonl", ".json", ".parquet", ".csv", ".tsv"):
        rows = load(source, columns=None if source == "stdlib" else {"text": "text"}, split_seed=None).train
        return [rows[i]["text"].encode() for i in range(len(rows))]
    try:
        return re.split(rb"\n\s*\n", Path(source).expanduser().read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from None


def cut(texts: Sequence[bytes], length: int) -> list[bytes]:
    """Cut each text into pieces of ``length`` + 1 bytes, each beginning with the last byte of the one before.

    So every byte of a text but its first is a target once; a piece has at least one target.
    """
    return [text[at : at + length + 1] for text in texts for at in range(0, len(text) - 1, length)]


def word_numbers(text: str) -> list[int]:
    """Return a number below 2**32 for each word, number and sign of a text, and for the parts of joined_words.

    It is the checksum of the word, the same in each process and run: no list of words has to be kept beside a model.
    """
    found = []
    for word in WORD.findall(text):
        parts = PART.findall(word)
        found += [word] if parts in ([], [word]) else [word, *(part.lower() for part in parts)]
    return [crc32(word.encode()) for word in found]


def padded(rows: Sequence[Sequence[int]], length: int, padding: int) -> np.ndarray:
    """Return (N, length) int64: the first ``length`` tokens of each row, then ``padding``."""
    columns = np.full((len(rows), length), padding, dtype=np.int64)
    for column, row in zip(columns, rows, strict=True):
        column[: len(row)] = list(row[:length])  # NumPy takes bytes for one text
    return columns


def written(
    model: nn.Module, tokens: Tensor, count: int, context: int, temperature: float, top_k: int, seed: int
) -> list[int]:
    """Draw ``count`` tokens, one after the other, among the ``top_k`` most likely ones after the last ``context``.

    ``tokens`` (1, T) int64 come first; ``model`` maps such tokens to logits (1, T, vocab_size). Nothing is kept
    between tokens, so each costs a whole forward pass.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    first = tokens.shape[1]
    for _ in range(count):
        logits = model(tokens[:, -context:].to(device))[0, -1].float().cpu()  # (vocab_size,); waits for the device
        likely, ids = logits.topk(min(top_k, len(logits)))
        drawn = torch.multinomial((likely / temperature).softmax(0), 1, generator=generator)
        tokens = torch.cat([tokens, ids[drawn][None]], dim=1)
    return tokens[0, first:].tolist()

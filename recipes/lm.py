"""A language model: a decoder in the style of GPT-2 learns to predict the next byte of a text, or the next token.

    accelerate launch recipes/lm.py
    accelerate launch recipes/lm.py --size base --epochs 1 --optimizer muon --lr 8e-3
    accelerate launch recipes/lm.py --data book.txt --epochs 10 --layout padded
    accelerate launch recipes/lm.py --data tokens.bin --vocab-size 50257 --size gpt2 --batch-size 512 --lr 6e-4

Expected: val_bits_per_byte 2.55 or lower on the last 2 % of the standard library's source (2.41-2.48 over 5 seeds, 80
seconds on one CPU core; an order-2 byte model reaches 2.70). The second command takes 10 minutes on two.
"""

from dataclasses import dataclass
from math import log
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from recipes.models import Transformer
from recipes.tokens import check_least, cut, documents, is_bytes, padded, written
from scaletrain import Config, Data, InputError, Recipe, Run, adamw, load, main, muon, train, warmup_cosine

IGNORED = -100  # a place that is no target: padding
SIZES = {  # blocks, heads, width, context
    "tiny": (2, 2, 64, 64),
    "small": (2, 4, 128, 128),
    "base": (4, 4, 128, 256),
    "medium": (6, 6, 384, 256),
    "gpt2": (12, 12, 768, 1024),  # 124,439,808 parameters with --vocab-size 50257
}


@dataclass(frozen=True, kw_only=True)
class LMConfig(Config):
    data: str = "stdlib"
    """Python's standard library, a text file, which is read as bytes, or token ids: .bin (uint16) or .npy."""
    layout: Literal["packed", "padded"] = "packed"
    """packed: windows of one stream. padded: each document by itself, or in several rows where it is longer than the
    context. Documents of a text lie between blank lines; those of JSON lines, CSV and Parquet are the column text."""
    size: Literal["tiny", "small", "base", "medium", "gpt2"] = "small"
    """Blocks-heads-width-context: tiny 2-2-64-64, small 2-4-128-128, base 4-4-128-256, medium 6-6-384-256,
    gpt2 12-12-768-1024."""
    context: int | None = None
    """Tokens that the model looks back at, and targets of an example. Default: the size's."""
    vocab_size: int | None = None
    """Number of different tokens. Default: 256 for bytes, else the largest id and 1."""
    val_share: float = 0.02
    """Share of the tokens, the last ones, or of the documents, that is held out."""
    epochs: float = 0.15
    batch_size: int = 8
    lr: float = 4e-3
    weight_decay: float = 0.1
    max_grad_norm: float | None = 1.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the blocks' matrices, AdamW for the rest; learns faster (--lr 8e-3), but rounds to bfloat16."""
    sample_bytes: int = 200
    """Length of the text, in tokens, that is written when training is done. 0: none."""
    temperature: float = 0.8
    """The sample's logits are divided by it: towards 0 the most likely token is written each time."""
    top_k: int = 40
    """The sample is drawn among this many most likely tokens at each place."""

    def check(self) -> None:
        super().check()
        check_least(self, context=1, vocab_size=1, sample_bytes=0, top_k=1)
        for name, value, most in (("val-share", self.val_share, 1), ("temperature", self.temperature, float("inf"))):
            if not 0 < value < most:
                raise InputError(f"--{name} is {value}; it must lie between 0 and {most}")

    @property
    def length(self) -> int:
        return self.context or SIZES[self.size][-1]


def load_data(cfg: LMConfig) -> Data:  # tokens (N, context + 1): inputs, and one place on the targets
    held_out = {"split_seed": cfg.split_seed, "val_share": cfg.val_share}
    if cfg.layout == "packed":
        return load(cfg.data, length=cfg.length, **held_out)
    texts = [text for text in documents(cfg.data) if len(text) > 1]
    if not texts:
        raise InputError(f"{cfg.data} has no document of at least two bytes; there is nothing to predict")
    found = load({"document": np.arange(len(texts))}, **held_out)
    return Data(train=rows(texts, found.train, cfg), val=found.val and rows(texts, found.val, cfg))


def rows(texts: list[bytes], part: dict[str, Tensor], cfg: LMConfig) -> dict[str, np.ndarray]:
    pieces = cut([texts[i] for i in part["document"].tolist()], cfg.length)
    return {"tokens": padded(pieces, cfg.length + 1, IGNORED)}


class LanguageModel(nn.Module):
    def __init__(self, vocab_size: int, depth: int, heads: int, width: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.transformer = Transformer(width, depth, heads, context, causal=True)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embedding.weight  # a token has one vector, read and written

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.transformer(self.embedding(tokens)))  # (B, T, vocab_size) logits


def build_model(cfg: LMConfig, data: Data) -> nn.Module:
    vocab_size = cfg.vocab_size or 256
    if cfg.vocab_size is None and not is_bytes(cfg.data):  # reads all there is
        ids = [part.tokens for part in (data.train, data.val) if part]
        if min(map(np.min, ids)) < 0:
            raise InputError(f"{cfg.data} has the token {min(map(np.min, ids))}; ids count from 0")
        vocab_size = int(max(map(np.max, ids))) + 1
    return LanguageModel(vocab_size, *SIZES[cfg.size][:-1], cfg.length)


def weight(batch: dict[str, Tensor]) -> Tensor:
    return (batch["tokens"][:, 1:] != IGNORED).sum()  # targets


def loss(model: nn.Module, batch: dict[str, Tensor], cfg: LMConfig) -> Tensor:
    tokens = batch["tokens"]  # (B, T + 1); padding comes last, where no target looks
    logits = model(tokens[:, :-1].clamp(min=0))  # (B, T, vocab_size)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=IGNORED)


def evaluate(model: nn.Module, batch: dict[str, Tensor], cfg: LMConfig) -> dict[str, Tensor]:
    nats = loss(model, batch, cfg)
    return {"loss": nats, "bits_per_byte" if is_bytes(cfg.data) else "bits_per_token": nats / log(2)}


def optimizer(model: nn.Module, cfg: LMConfig) -> optim.Optimizer:
    return muon(model, cfg) if cfg.optimizer == "muon" else adamw(model, cfg, betas=(0.9, 0.95))


def train_and_sample(run: Run) -> None:
    train(run)
    cfg, first = run.cfg, torch.tensor([[ord("\n") if is_bytes(run.cfg.data) else 0]])
    with run.evaluating():  # every rank writes: a sharded model needs all of them
        said = written(run.module, first, cfg.sample_bytes, cfg.length, cfg.temperature, cfg.top_k, cfg.seed)
    if said:
        run.tracking.say(bytes(said).decode(errors="replace") if is_bytes(cfg.data) else " ".join(map(str, said)))


recipe = Recipe(
    config=LMConfig, data=load_data, model=build_model, loss=loss, evaluate=evaluate, optimizer=optimizer,
    weight=weight, schedule=warmup_cosine, expect={"val_bits_per_byte": "<=2.55"},
)  # fmt: skip

if __name__ == "__main__":
    main(recipe, loop=train_and_sample)

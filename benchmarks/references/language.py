"""What the recipes of language are held against: byte counts, tf-idf, and the tutorial's loop by hand.

Each function takes a seed and returns metrics by the names of the recipe's ``expect``, on the recipe's own split.
"""

from collections.abc import Callable, Iterator
from math import ceil, cos, log, pi

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn, optim

from recipes import lm, text
from scaletrain import Data, load


def byte_models(train: NDArray[np.uint8], val: NDArray[np.uint8], most: int = 2, strength: float = 20) -> list[float]:
    """Return the bits per byte on ``val`` of byte models of order 0 to ``most``, counted on ``train``.

    Each order is smoothed towards the one below, which counts as ``strength`` observations; order 0 towards all bytes
    alike.
    """
    bits = []
    below = np.full((1, 256), 1 / 256)
    for order in range(most + 1):
        times = np.bincount(_contexts(train, order) * 256 + train[order:], minlength=256 ** (order + 1))
        times = times.reshape(-1, 256).astype(np.float64)
        below = np.tile(below, (len(times) // len(below), 1))  # the context's last bytes
        below = (times + strength * below) / (times.sum(1, keepdims=True) + strength)
        bits.append(float(-np.log2(below[_contexts(val, order), val[order:]]).mean()))
    return bits


def _contexts(tokens: NDArray[np.uint8], order: int) -> NDArray[np.int64]:
    """Return the ``order`` bytes before each byte, as one number."""
    n = len(tokens) - order
    numbers = np.zeros(n, dtype=np.int64)
    for i in range(order):
        numbers = numbers * 256 + tokens[i : i + n]
    return numbers


def counted_bytes(order: int) -> Callable[[int], dict[str, float]]:
    def measure(seed: int) -> dict[str, float]:
        data = lm.load_data(lm.LMConfig())
        return {"val_bits_per_byte": byte_models(data.train.tokens, data.val.tokens, order)[order]}

    return measure


def warmup_cosine(optimizer: optim.Optimizer, total: int, share: float = 0.05) -> optim.lr_scheduler.LambdaLR:
    rising = round(share * total)

    def factor(step: int) -> float:
        return (step + 1) / rising if step < rising else (1 + cos(pi * (step - rising) / max(1, total - rising))) / 2

    return optim.lr_scheduler.LambdaLR(optimizer, factor)


def shuffled(n: int, batch_size: int) -> Iterator[Tensor]:
    """Yield the numbers of each batch, epoch after epoch without end."""
    while True:
        yield from torch.randperm(n).split(batch_size)


def lm_optimizers(model: nn.Module, cfg: lm.LMConfig) -> list[optim.Optimizer]:
    """Return torch's Muon for the matrices of the blocks and AdamW for the rest, or AdamW alone."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
    rest = [p for name, p in model.named_parameters() if p.ndim < 2 or "blocks" not in name]
    options = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    if cfg.optimizer == "muon":
        first: optim.Optimizer = optim.Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw", **options)
        return [first, optim.AdamW(rest, lr=cfg.lr, weight_decay=0.0, fused=True)]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    return [optim.AdamW(groups, betas=(0.9, 0.95), fused=True, **options)]


def lm_loop(cfg: lm.LMConfig, data: Data | None = None) -> dict[str, float]:
    """Train the recipe's network in a plain loop, on windows in an order of its own, for as many steps."""
    data = data or lm.load_data(cfg)
    torch.manual_seed(cfg.seed)
    model = lm.build_model(cfg, data)
    optimizers = lm_optimizers(model, cfg)
    total = cfg.max_steps or ceil(cfg.epochs * len(data.train) / cfg.batch_size)
    schedules = [warmup_cosine(optimizer, total) for optimizer in optimizers]
    batches = shuffled(len(data.train), cfg.batch_size)
    for _ in range(total):
        tokens = data.train.__getitems__(next(batches).tolist())["tokens"]  # (B, T + 1)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        for one in (*optimizers, *schedules):
            one.step()
    model.eval()
    nats, targets = 0.0, 0
    with torch.inference_mode():
        for places in torch.arange(len(data.val)).split(32):
            tokens = data.val.__getitems__(places.tolist())["tokens"]
            logits = model(tokens[:, :-1])
            nats += F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
            targets += tokens[:, 1:].numel()
    return {"val_bits_per_byte": nats / targets / log(2)}


def tfidf(seed: int) -> dict[str, float]:
    """Fit a logistic regression to tf-idf of single words: ``sublinear_tf`` and C=30, the best of a few tried."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    data = load("stdlib", split_seed=0)
    train, val = (Data(train=part).sample(len(part)) for part in (data.train, data.val))
    words = TfidfVectorizer(sublinear_tf=True)
    model = LogisticRegression(C=30, max_iter=300).fit(words.fit_transform(train["text"]), train["label"].numpy())
    return {"val_accuracy": float(model.score(words.transform(val["text"]), val["label"].numpy()))}


def text_loop(seed: int) -> dict[str, float]:
    """Train the recipe's network in a plain loop; as the recipe does, take the best epoch."""
    cfg = text.TextConfig(seed=seed)
    data = text.load_data(cfg)
    torch.manual_seed(seed)
    model = text.build_model(cfg, data)
    decayed = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name and "position" not in name
    ]
    rest = [p for p in model.parameters() if all(p is not other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = optim.AdamW(groups, lr=cfg.lr, fused=True)
    n = len(data.train["label"])
    epochs = round(cfg.epochs)
    schedule = warmup_cosine(optimizer, epochs * ceil(n / cfg.batch_size))
    best = 0.0
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(n).split(cfg.batch_size):
            tokens = data.train["tokens"][rows]
            hidden = (torch.rand(tokens.shape) < cfg.mask_tokens) & (tokens != text.PAD)
            loss = F.cross_entropy(model(tokens.masked_fill(hidden, text.MASK)), data.train["label"][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            found = torch.cat([model(tokens).argmax(1) for tokens in data.val["tokens"].split(64)])
        best = max(best, (found == data.val["label"]).double().mean().item())
    return {"val_accuracy": best}


REFERENCES = {
    "text": [("tf-idf of words and LogisticRegression", tfidf), ("raw PyTorch loop", text_loop)],
    "lm": [
        ("order-1 byte model", counted_bytes(1)),
        ("order-2 byte model", counted_bytes(2)),
        ("raw PyTorch loop", lambda seed: lm_loop(lm.LMConfig(seed=seed))),
    ],
}

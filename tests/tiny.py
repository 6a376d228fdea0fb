"""Small recipes, and the plain loops that say what must come out of them."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from scaletrain import Config, Data, Recipe
from scaletrain.order import Shuffled


@dataclass(frozen=True, kw_only=True)
class TinyConfig(Config):
    batch_size: int = 16
    lr: float = 1e-2
    threads: int | None = 1
    double: bool = False
    """Compute in float64."""
    optimizer: str = "adamw"
    """adamw or sgd."""


def table(n=101, classes=3, seed=0):
    """A table that can be learned: (n, 5) float64 features, labels, a weight and each row's own number."""
    truth = np.random.default_rng(99).normal(size=(5, classes))
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 5))
    label = (features @ truth + 0.5 * rng.normal(size=(n, classes))).argmax(1)
    return {"x": features, "y": label, "w": rng.integers(0, 4, n), "row": np.arange(n)}


def data(cfg):
    return Data(train=table(), val=table(53, seed=1))


def model(cfg, data):
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    return net.double() if cfg.double else net


def loss(model, batch, cfg):
    return F.cross_entropy(model(batch["x"]), batch["y"])


def evaluate(model, batch, cfg):
    logits = model(batch["x"])
    return {
        "loss": F.cross_entropy(logits, batch["y"], reduction="none"),
        "accuracy": (logits.argmax(1) == batch["y"]).float(),
    }


def optimizer(model, cfg):
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=cfg.lr, momentum=0.9, weight_decay=cfg.weight_decay)
    return torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)


recipe = Recipe(config=TinyConfig, data=data, model=model, loss=loss, evaluate=evaluate, optimizer=optimizer)


def batches(recipe, cfg, dtype, steps):
    """Yield what each step reads, all of it at once, by the order's definition."""
    train = recipe.data(cfg).train
    n = len(next(iter(train.values())))
    for step in range(steps):
        positions = np.arange(step * cfg.batch_size, (step + 1) * cfg.batch_size)
        rows = torch.from_numpy(Shuffled(n, cfg.seed)(positions))
        yield {name: c[rows].to(dtype) if c.is_floating_point() else c[rows] for name, c in train.items()}


def plain_loop(recipe, cfg, steps):
    """The loop of the tutorial on the same examples: returns the model and the loss of each step."""
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(1)
    net = recipe.model(cfg, recipe.data(cfg))
    opt = recipe.optimizer(net, cfg)
    rates = [group["lr"] for group in opt.param_groups]
    losses = []
    for step, batch in enumerate(batches(recipe, cfg, next(net.parameters()).dtype, steps)):
        for group, rate in zip(opt.param_groups, rates, strict=True):
            group["lr"] = rate * recipe.schedule(step, steps, cfg)
        opt.zero_grad()
        step_loss = recipe.loss(net, batch, cfg)
        step_loss.backward()
        if cfg.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), cfg.max_grad_norm)
        if cfg.max_grad_value is not None:
            nn.utils.clip_grad_value_(net.parameters(), cfg.max_grad_value)
        opt.step()
        losses.append(step_loss.item())
    return net, losses

"""What scikit-learn and a hand-written PyTorch loop reach on the splits of the recipes that read images.

Each takes a seed and returns metrics named as in the recipe's ``expect``. The settings are the usual good ones, the
same for every seed. A loop trains the recipe's own network at the recipe's settings, and keeps the weights of the
epoch that is best by the metric that the recipe monitors, as a run does.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from recipes import cnn, finetune, vit
from scaletrain import Config, Data, Recipe

Metrics = dict[str, float]


def pixels(images: Tensor) -> Any:
    """Return the 8x8 pixels that the built-in digits were enlarged from, as scikit-learn has them."""
    return F.avg_pool2d(images[:, :1], 4).flatten(1).numpy()


def of_scikit_learn(make: Callable[[], Any], recipe: Recipe) -> Callable[[int], Metrics]:
    """Return a reference that fits ``make()`` to the pixels; it draws no random numbers, so all seeds are alike."""

    def fit(seed: int) -> Metrics:
        data = recipe.data(recipe.config(seed=seed))
        model = make().fit(pixels(data.train["image"]), data.train["label"])
        return {"val_accuracy": float(model.score(pixels(data.val["image"]), data.val["label"]))}

    return fit


def of_a_loop(recipe: Recipe) -> Callable[[int], Metrics]:
    """Return a reference that trains the recipe's network from random weights in a plain loop."""

    def run(seed: int) -> Metrics:
        cfg = recipe.config(seed=seed)
        data = recipe.data(cfg)
        torch.manual_seed(seed)
        model = cnn.SmallCNN(data.n_classes) if recipe is finetune.recipe else recipe.model(cfg, data)
        return {"val_accuracy": train(model, adamw([model], [cfg.lr], cfg), recipe, cfg, data)}

    return run


def finetuned(seed: int) -> Metrics:
    """Train the CNN on all digits, then its weights with a new last layer on the few, both in a plain loop."""
    cfg = cnn.CNNConfig(seed=seed)
    digits = cnn.load_data(cfg)
    torch.manual_seed(seed)
    model = cnn.build_model(cfg, digits)
    train(model, adamw([model], [cfg.lr], cfg), cnn.recipe, cfg, digits)
    few = finetune.FinetuneConfig(seed=seed)
    data = finetune.load_data(few)
    model.head[4] = nn.Linear(128, data.n_classes)
    parts, rates = [model.features, model.head[1], model.head[4]], [few.lr * few.body_lr, few.lr * few.body_lr, few.lr]
    return {"val_accuracy": train(model, adamw(parts, rates, few), finetune.recipe, few, data)}


def adamw(parts: list[nn.Module], rates: list[float], cfg: Config) -> optim.Optimizer:
    groups = []
    for part, lr in zip(parts, rates, strict=True):
        matrices = [p for p in part.parameters() if p.ndim >= 2]
        vectors = [p for p in part.parameters() if p.ndim < 2]
        groups += [{"params": matrices, "lr": lr}, {"params": vectors, "lr": lr, "weight_decay": 0.0}]
    return optim.AdamW(groups, weight_decay=cfg.weight_decay)


def train(model: nn.Module, optimizer: optim.Optimizer, recipe: Recipe, cfg: Config, data: Data) -> float:
    """Train as the tutorial does, leave the best weights in ``model``, and return their accuracy."""
    n, epochs = len(data.train["label"]), int(cfg.epochs)
    total = epochs * -(-n // cfg.batch_size)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.schedule(step, total, cfg))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema)) if cfg.ema else None
    best, accuracy, weights = float("-inf"), 0.0, model.state_dict()
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(n).split(cfg.batch_size):
            batch = {name: column[rows] for name, column in data.train.items()}
            batch = recipe.augment(batch, cfg) if recipe.augment else batch
            optimizer.zero_grad()
            recipe.loss(model, batch, cfg).backward()
            optimizer.step()
            schedule.step()
            if average:
                average.update_parameters(model)
        measured = average.module if average else model
        measured.eval()
        with torch.inference_mode():
            logits = measured(data.val["image"])
            right = (logits.argmax(1) == data.val["label"]).float().mean().item()
            score = right if cfg.higher_is_better else -F.cross_entropy(logits, data.val["label"]).item()
        if score > best:
            best, accuracy = score, right
            weights = {name: tensor.clone() for name, tensor in measured.state_dict().items()}
    model.load_state_dict(weights)
    return accuracy


REFERENCES: dict[str, list[tuple[str, Callable[[int], Metrics]]]] = {
    "cnn": [
        ("SVC(C=10)", of_scikit_learn(lambda: SVC(C=10), cnn.recipe)),
        ("raw PyTorch loop", of_a_loop(cnn.recipe)),
    ],
    "vit": [
        ("SVC(C=10)", of_scikit_learn(lambda: SVC(C=10), vit.recipe)),
        ("raw PyTorch loop", of_a_loop(vit.recipe)),
    ],
    "finetune": [
        ("LogisticRegression", of_scikit_learn(lambda: LogisticRegression(max_iter=1000), finetune.recipe)),
        ("SVC(C=10)", of_scikit_learn(lambda: SVC(C=10), finetune.recipe)),
        ("raw PyTorch loop, random weights", of_a_loop(finetune.recipe)),
        ("raw PyTorch loop, trained weights", finetuned),
    ],
}

"""What scikit-learn and a hand-written PyTorch loop reach on the splits of the recipes that read tables.

Each takes a seed and returns metrics named as in the recipe's ``expect``. The settings are the usual good ones, the
same for every seed.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.compose import TransformedTargetRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, f1_score, r2_score, roc_auc_score, roc_curve
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from recipes import binary, mlp, multilabel, regression
from scaletrain import Recipe

Metrics = dict[str, float]


def columns(recipe: Recipe, answer: str) -> tuple[Any, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return the recipe's data at default settings, and of each split the features and the answers as arrays."""
    data = recipe.data(recipe.config())
    splits = {"train": data.train, "val": data.val, "test": data.test}
    return data, {name: (s["features"].numpy(), s[answer].numpy()) for name, s in splits.items() if s is not None}


def raw_loop(recipe: Recipe, seed: int) -> tuple[torch.nn.Module, Any]:
    """Train the recipe's model as a tutorial does; return it with the weights of the epoch of the best val loss."""
    cfg = replace(recipe.config(), seed=seed)
    data = recipe.data(cfg)
    torch.manual_seed(seed)
    model = recipe.model(cfg, data)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr)
    n = len(data.train["features"])
    total = int(cfg.epochs) * -(-n // cfg.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.schedule(step, total, cfg))
    best, best_weights = float("inf"), model.state_dict()
    for _ in range(int(cfg.epochs)):
        model.train()
        for rows in torch.randperm(n).split(cfg.batch_size):
            optimizer.zero_grad()
            recipe.loss(model, {name: column[rows] for name, column in data.train.items()}, cfg).backward()
            optimizer.step()
            scheduler.step()
        model.eval()
        with torch.no_grad():
            val_loss = recipe.loss(model, data.val, cfg).item()
        if val_loss < best:
            best, best_weights = val_loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    return model, data


def of_classes(make: Callable[[int], Any]) -> Callable[[int], Metrics]:
    def measure(seed: int) -> Metrics:
        _, parts = columns(mlp.recipe, "label")
        model = make_pipeline(StandardScaler(), make(seed)).fit(*parts["train"])
        return {"val_accuracy": float(model.score(*parts["val"]))}

    return measure


def raw_classes(seed: int) -> Metrics:
    model, data = raw_loop(mlp.recipe, seed)
    with torch.no_grad():
        return {"val_accuracy": (model(data.val["features"]).argmax(1) == data.val["label"]).float().mean().item()}


def of_numbers(make: Callable[[int], Any]) -> Callable[[int], Metrics]:
    def measure(seed: int) -> Metrics:
        _, parts = columns(regression.recipe, "target")
        scaled = make_pipeline(StandardScaler(), make(seed))
        model = TransformedTargetRegressor(scaled, transformer=StandardScaler()).fit(*parts["train"])
        features, target = parts["val"]
        found = model.predict(features)
        return {"val_r2": float(r2_score(target, found)), "val_mae": float(np.abs(found - target).mean())}

    return measure


def raw_numbers(seed: int) -> Metrics:
    model, data = raw_loop(regression.recipe, seed)
    with torch.no_grad():
        found, target = model.predict(data.val["features"]), data.val["target"]
    return {"val_r2": float(r2_score(target, found)), "val_mae": (found - target).abs().mean().item()}


def yes_or_no(val: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> Metrics:
    """Measure probabilities and labels; the threshold is chosen on ``val`` by the recipe's rule."""
    among_no, among_yes, threshold = roc_curve(val[1], val[0], drop_intermediate=False)
    youden = among_yes - among_no
    good = threshold[youden >= youden.max() - binary.NEARLY]
    return {
        "val_auroc": float(roc_auc_score(val[1], val[0])),
        "test_auroc": float(roc_auc_score(test[1], test[0])),
        "test_accuracy": float(accuracy_score(test[1], test[0] >= (good.min() + good.max()) / 2)),
    }


def logistic_yes_or_no(seed: int) -> Metrics:
    _, parts = columns(binary.recipe, "label")
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    model.fit(*parts["train"])
    val, test = ((model.predict_proba(parts[name][0])[:, 1], parts[name][1]) for name in ("val", "test"))
    return yes_or_no(val, test)


def raw_yes_or_no(seed: int) -> Metrics:
    model, data = raw_loop(binary.recipe, seed)
    with torch.no_grad():
        val, test = (
            (model(part["features"])[0].sigmoid().numpy(), part["label"].numpy()) for part in (data.val, data.test)
        )
    return yes_or_no(val, test)


def f1(labels: np.ndarray, found: np.ndarray) -> Metrics:
    return {f"val_{average}_f1": float(f1_score(labels, found, average=average)) for average in ("macro", "micro")}


def of_labels(make: Callable[[int], Any]) -> Callable[[int], Metrics]:
    def measure(seed: int) -> Metrics:
        _, parts = columns(multilabel.recipe, "labels")
        model = make_pipeline(StandardScaler(), make(seed)).fit(*parts["train"])
        return f1(parts["val"][1], model.predict(parts["val"][0]))

    return measure


def raw_labels(seed: int) -> Metrics:
    model, data = raw_loop(multilabel.recipe, seed)
    with torch.no_grad():
        return f1(data.val["labels"].numpy(), (model(data.val["features"]) > 0).numpy())


REFERENCES: dict[str, list[tuple[str, Callable[[int], Metrics]]]] = {
    "mlp": [
        ("LogisticRegression", of_classes(lambda seed: LogisticRegression(max_iter=1000))),
        ("MLPClassifier", of_classes(lambda seed: MLPClassifier((64, 64), max_iter=500, random_state=seed))),
        ("raw PyTorch loop", raw_classes),
    ],
    "regression": [
        ("LinearRegression", of_numbers(lambda seed: LinearRegression())),
        ("Ridge", of_numbers(lambda seed: Ridge(alpha=10))),
        (
            "MLPRegressor",
            of_numbers(
                lambda seed: MLPRegressor(
                    hidden_layer_sizes=(48, 48), alpha=10, early_stopping=True, max_iter=1000, random_state=seed
                )
            ),
        ),
        ("raw PyTorch loop", raw_numbers),
    ],
    "binary": [
        ("LogisticRegression, balanced", logistic_yes_or_no),
        ("raw PyTorch loop", raw_yes_or_no),
    ],
    "multilabel": [
        (
            "OneVsRest LogisticRegression",
            of_labels(lambda seed: OneVsRestClassifier(LogisticRegression(max_iter=1000))),
        ),
        ("MLPClassifier", of_labels(lambda seed: MLPClassifier((128, 128), max_iter=500, random_state=seed))),
        ("raw PyTorch loop", raw_labels),
    ],
}
"""By recipe: a name, and a function from a seed to the metrics of its ``expect``."""

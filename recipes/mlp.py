"""The tutorial's multilayer perceptron on a table: three linear layers, sizes taken from the data.

    accelerate launch recipes/mlp.py
    accelerate launch recipes/mlp.py --data wine --epochs 50 --width 16

Expected: val_accuracy 0.96 or better on the built-in digits, read as a table of 64 pixels (0.972-0.983 over 5 seeds,
a second on 2 CPU cores).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from recipes.models import Standardize
from scaletrain import Config, Data, Recipe, load, main, warmup_cosine


@dataclass(frozen=True, kw_only=True)
class MLPConfig(Config):
    data: str = "digits"
    """Built-in table: digits, wine, iris or breast_cancer; or a file with numbers and a column of labels."""
    epochs: float = 20
    lr: float = 3e-3
    width: int = 64
    """Units in each of the two hidden layers. A smaller model overfits less."""


def load_data(cfg: MLPConfig) -> Data:
    return load(cfg.data, split_seed=cfg.split_seed)  # features (N, F) float, label (N,) int


def mlp(n_features: int, n_classes: int, width: int = 64) -> nn.Module:
    return nn.Sequential(
        nn.Linear(n_features, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, n_classes),
    )


def build_model(cfg: MLPConfig, data: Data) -> nn.Module:
    features = data.sample(10_000)["features"].float()  # all of a small table
    return nn.Sequential(Standardize(features), *mlp(features.shape[1], data.n_classes, cfg.width))


def loss(model: nn.Module, batch: dict[str, Tensor], cfg: MLPConfig) -> Tensor:
    return F.cross_entropy(model(batch["features"]), batch["label"])


def evaluate(model: nn.Module, batch: dict[str, Tensor], cfg: MLPConfig) -> dict[str, Tensor]:
    logits = model(batch["features"])  # (B, n_classes)
    return {
        "loss": F.cross_entropy(logits, batch["label"], reduction="none"),
        "accuracy": (logits.argmax(1) == batch["label"]).float(),
    }


def predict(model: nn.Module, batch: dict[str, Tensor], cfg: MLPConfig) -> dict[str, Tensor]:
    probability, label = model(batch["features"]).softmax(1).max(1)
    return {"label": label, "probability": probability}


recipe = Recipe(
    config=MLPConfig,
    data=load_data,
    model=build_model,
    loss=loss,
    evaluate=evaluate,
    predict=predict,
    schedule=warmup_cosine,
    expect={"val_accuracy": ">=0.96"},
)

if __name__ == "__main__":
    main(recipe)

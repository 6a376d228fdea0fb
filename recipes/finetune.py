"""Adapt a trained network to a new task of few examples: its weights, a new last layer, smaller steps below it.

    python recipes/cnn.py --out runs/cnn_digits
    accelerate launch recipes/finetune.py
    accelerate launch recipes/finetune.py --data photos/ --freeze --examples 500
    accelerate launch recipes/finetune.py --transformers google/vit-base-patch16-224 --data photos/ --lr 1e-3

The built-in task: is a handwritten digit even or odd? Learned from 200 images by a network that has learned to tell
the ten digits apart; with the same --split-seed, what is held out here was held out there too.

Expected: val_accuracy 0.96 or better on the built-in task (0.975-0.983 over 5 seeds of both runs, 10 seconds on one CPU
core). The same network from random weights reaches 0.925-0.950 there.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from recipes.cnn import SmallCNN, evaluate, predict
from scaletrain import Config, Data, InputError, Recipe, adamw, load, load_weights, main, warmup_cosine


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Config):
    data: str = "digits"
    """Built-in digits (the task is then even or odd), a folder of images, a Hub id, or a file."""
    weights: str = "runs/cnn_digits"
    """Run folder of recipes/cnn.py, or its model.safetensors."""
    width: int = 32
    """Channels of that network's first convolution, as its run had them."""
    norm: Literal["none", "batch", "group"] = "none"
    """Normalization of that network, as its run had it."""
    pool: Literal["max", "avg"] = "max"
    """Pooling of that network, as its run had it."""
    transformers: str | None = None
    """Image classifier of the transformers library, a Hub id or a folder, in place of weights."""
    examples: int = 200
    """Training images to learn from, evenly spaced over all there are. 0: all."""
    freeze: bool = False
    """Keep the body as it is: all convolutions, or the transformers model below its head."""
    body_lr: float = 0.1
    """Factor on lr for all layers but the new last one."""
    dropout: float = 0.3
    """Share of the CNN's hidden activations set to zero in training."""
    epochs: float = 30
    batch_size: int = 32
    lr: float = 3e-3

    def check(self) -> None:
        super().check()
        if self.examples < 0:
            raise InputError(f"--examples is {self.examples}; use at least 1, or 0 for all")
        if not 0 < self.body_lr <= 1:
            raise InputError(f"--body-lr is {self.body_lr}; use a factor above 0, up to 1 (--freeze stands for 0)")
        if not 0 <= self.dropout <= 1:
            raise InputError(f"--dropout is {self.dropout}; it must lie between 0 and 1")


def load_data(cfg: FinetuneConfig) -> Data:
    size = 32 if cfg.transformers is None else pretrained("AutoConfig", cfg.transformers).to_dict().get("image_size")
    data = load(cfg.data, image_size=size or 224, split_seed=cfg.split_seed)  # image (N, 3, S, S) float, label (N,)
    is_new = cfg.split_seed is None  # to predict all of it
    train = data.train if is_new or not cfg.examples else data.sample(cfg.examples)
    if cfg.data != "digits":
        return Data(train, data.val, data.test, data.classes)
    even_or_odd = [split and {**split, "label": split["label"] % 2} for split in (train, data.val)]
    return Data(*even_or_odd, classes=["even", "odd"])


class Pretrained(nn.Module):
    """An image classifier of the transformers library for images in [0, 1], with a new head where it must be new."""

    def __init__(self, name: str, n_classes: int) -> None:
        super().__init__()
        from transformers.utils import cached_file

        options: dict[str, Any] = {"num_labels": n_classes, "ignore_mismatched_sizes": True, "use_safetensors": True}
        self.net = pretrained("AutoModelForImageClassification", name, **options).train()
        file = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        scale = json.loads(Path(file).read_text()) if file else {}
        for key in ("image_mean", "image_std"):
            self.register_buffer(key, torch.tensor(scale.get(key, [0.5, 0.5, 0.5])).view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.net(pixel_values=(image - self.image_mean) / self.image_std).logits  # (B, n_classes)


def pretrained(kind: str, name: str, **options: Any) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()  # that the head is new is no warning here
    try:
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"--transformers {name}: {str(error).splitlines()[0]}") from None


def build_model(cfg: FinetuneConfig, data: Data) -> nn.Module:
    if cfg.transformers is not None:
        model = Pretrained(cfg.transformers, data.n_classes)
    else:
        if not Path(cfg.weights).exists():
            make = f"python recipes/cnn.py --out {cfg.weights}"
            raise InputError(f"--weights {cfg.weights}: no such folder or file; `{make}` trains and saves a network")
        model = SmallCNN(data.n_classes, cfg.width, cfg.dropout, cfg.norm, cfg.pool)
        load_weights(model, cfg.weights, skip=("head.4",))
    if cfg.freeze:
        model.get_submodule(body(model)[0]).requires_grad_(False).eval()  # its BatchNorm statistics stay too
    return model


def body(model: nn.Module) -> list[str]:
    """Return the parts that come with weights: all but the last layer, the one to freeze first."""
    return [f"net.{model.net.base_model_prefix}"] if isinstance(model, Pretrained) else ["features", "head.1"]


def optimizer(model: nn.Module, cfg: FinetuneConfig) -> optim.Optimizer:
    return adamw(model, cfg, lr_factors=dict.fromkeys(body(model), cfg.body_lr))


def loss(model: nn.Module, batch: dict[str, Tensor], cfg: FinetuneConfig) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"])


recipe = Recipe(
    config=FinetuneConfig,
    data=load_data,
    model=build_model,
    loss=loss,
    evaluate=evaluate,
    predict=predict,
    optimizer=optimizer,
    schedule=warmup_cosine,
    expect={"val_accuracy": ">=0.96"},
)

if __name__ == "__main__":
    main(recipe)

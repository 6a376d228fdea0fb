"""What the benchmarks on a GPU train: recipes on random data that lies on the device, at full and at toy size."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes import lm
from recipes.models import mlp
from scaletrain import Config, Data, Recipe, constant

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations per second by the maker's data sheet, by a part of the device's name."""


@dataclass(frozen=True)
class Workload:
    """A training to measure: ``units`` of an example are counted, as its tokens."""

    name: str
    recipe: Recipe
    cfg: Config
    unit: str = "examples"
    units: int = 1
    flops_per_unit: float = 0.0


def config(cfg: Config, **changes: object) -> Config:
    """Return ``cfg`` for a benchmark: bf16, one CPU thread, nothing saved on the way."""
    return replace(cfg, precision="bf16", threads=1, checkpoint_minutes=10_000, **changes)


def numbers(most: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(most, shape, generator=generator)


def language(size: str, vocab_size: int, batch_size: int, *, held_out: int = 0) -> Workload:
    """Return GPT-2's training on random tokens; ``held_out`` more windows are for validation."""
    depth, _, width, context = lm.SIZES[size]
    n = 16 * batch_size
    tokens = numbers(vocab_size, n + held_out, context + 1)
    data = Data({"tokens": tokens[:n]}, {"tokens": tokens[n:]} if held_out else None)
    recipe = replace(lm.recipe, data=lambda cfg: replace(data), schedule=constant)
    cfg = lm.LMConfig(data="random.bin", size=size, vocab_size=vocab_size, batch_size=batch_size, lr=6e-4)
    matrices = depth * (12 * width**2 + 13 * width) + 2 * width + vocab_size * width
    flops = 6 * matrices + 12 * depth * width * context
    return Workload(f"{size}, batch {batch_size} x {context} tokens", recipe, config(cfg), "tokens", context, flops)


def gpt2(toy: bool, batch_size: int | None = None, *, held_out: int = 0) -> Workload:
    if toy:
        return language("tiny", 256, batch_size or 4, held_out=held_out)
    return language("gpt2", 50304, batch_size or 32, held_out=held_out)


def small_transformer(toy: bool) -> Workload:
    return language("tiny" if toy else "small", 256, 8)


def small_mlp(toy: bool) -> Workload:
    x, y = torch.randn(4096, 20, generator=torch.Generator().manual_seed(0)), numbers(3, 4096)
    recipe = Recipe(
        config=Config,
        data=lambda cfg: Data({"x": x, "y": y}),
        model=lambda cfg, data: mlp(20, 3),
        loss=lambda model, batch, cfg: F.cross_entropy(model(batch["x"]), batch["y"]),
    )
    return Workload("MLP 20-64-64-3, batch 64", recipe, config(Config(), batch_size=64))


def resnet(toy: bool) -> Workload:
    side, batch_size = (32, 4) if toy else (224, 256)
    image, label = numbers(256, 4 * batch_size, 3, side, side).to(torch.uint8), numbers(1000, 4 * batch_size)

    def loss(model: nn.Module, batch: dict[str, Tensor], cfg: Config) -> Tensor:
        pixels = batch["image"].to(memory_format=torch.channels_last).float().div(255)  # (B, 3, S, S)
        return F.cross_entropy(model(pixels), batch["label"])

    recipe = Recipe(
        config=Config,
        data=lambda cfg: Data({"image": image, "label": label}),
        model=lambda cfg, data: ResNet((1, 1, 1, 1) if toy else (3, 4, 6, 3)).to(memory_format=torch.channels_last),
        loss=loss,
    )
    name = f"ResNet, {side} x {side} uint8, channels_last, batch {batch_size}"
    return Workload(name, recipe, config(Config(), batch_size=batch_size), "images")


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut (He et al., "Deep Residual Learning for Image Recognition", 2015)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.layers = nn.Sequential(
            *convolution(inputs, width, 1), nn.ReLU(),
            *convolution(width, width, 3, stride), nn.ReLU(),
            *convolution(width, outputs, 1),
        )  # fmt: skip
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-50 where ``depths`` is (3, 4, 6, 3): (B, 3, S, S) -> (B, 1000)."""

    def __init__(self, depths: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = [*convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        inputs = 64
        for i, depth in enumerate(depths):
            for k in range(depth):
                layers.append(Bottleneck(inputs, 64 << i, 2 if i and not k else 1))
                inputs = 4 * (64 << i)
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


Sized = Callable[[bool], Workload]
"""A workload at full size, or, told so, as a toy."""

"""``scaletrain new``, ``schedule``, ``lr-find`` and ``predict``: what one does with a recipe but train it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from scaletrain.config import is_first_process, parse
from scaletrain.errors import DONE

RECIPE = tyro.conf.Positional[str]


@dataclass(frozen=True)
class New:
    """Begin a recipe of your own: a file that trains at once."""

    name: RECIPE
    """Name or path of the file to write, as my_recipe or recipes/my_recipe.py."""
    like: str = "mlp"
    """Recipe to begin with a copy of; recipes/README.md says what each learns."""

    def action(self) -> int:
        """Write the file and say how to train it."""
        from scaletrain.new import write_new

        path = write_new(self.name, self.like)
        print(f"{path}: a copy of {self.like}; to train it: accelerate launch {path}")
        return DONE


@dataclass(frozen=True)
class Schedule:
    """Draw the learning rate of a run before it is started. The recipe's own options follow, as --epochs 5."""

    recipe: RECIPE
    """File of the recipe, as recipes/cnn.py."""
    to: Path | None = None
    """Also draw it in this file, as schedule.png."""

    def action(self, options: Sequence[str] = ()) -> int:
        """Draw in the terminal, and in a file where one is named."""
        from scaletrain.plots import draw
        from scaletrain.predict import recipe_at
        from scaletrain.rates import rates_of

        recipe = recipe_at(self.recipe)
        found = rates_of(recipe, parse(recipe.config, options))
        for line in found.words:
            print(line)
        draw(found.steps, found.curves, "step", Path(self.recipe).stem, self.to)
        return DONE


@dataclass(frozen=True)
class LrFind:
    """Raise the learning rate step by step, draw the loss, and suggest a rate. The recipe's own options follow.

    On several processes: torchrun --nproc-per-node 2 --no-python scaletrain lr-find ...
    """

    recipe: RECIPE
    """File of the recipe, as recipes/cnn.py."""
    low: float = 1e-6
    """Learning rate of the first step."""
    high: float = 10.0
    """Learning rate of the last step, if the loss does not diverge before."""
    steps: int = 100
    """Optimizer steps between the two, evenly spaced on a logarithmic scale."""
    to: Path | None = None
    """Also draw it in this file, as lr.png."""

    def action(self, options: Sequence[str] = ()) -> int:
        """Train those steps on nothing that is kept, draw and suggest."""
        from scaletrain.plots import draw
        from scaletrain.predict import recipe_at
        from scaletrain.rates import range_test

        recipe = recipe_at(self.recipe)
        cfg = parse(recipe.config, options)
        if cfg.out is not None and is_first_process():
            print(f"warning: --out {cfg.out} has no effect: nothing of this is kept")
        found = range_test(recipe, cfg, low=self.low, high=self.high, steps=self.steps)
        if is_first_process():
            curves = {"loss": found.losses, "smoothed": found.smoothed}
            draw(found.rates, curves, "learning rate", Path(self.recipe).stem, self.to, log=True)
            print(found.words)
        return DONE


@dataclass(frozen=True)
class Predict:
    """Write what a recipe's predict says of each example, in the order of the data set.

    On several processes: torchrun --nproc-per-node 2 --no-python scaletrain predict ...
    """

    recipe: RECIPE
    """File of the recipe, as recipes/cnn.py."""
    weights: Path
    """Folder of a run, a checkpoint, or a model.safetensors."""
    to: Path
    """File to write: .parquet or .npz."""
    data: str | None = None
    """What to read instead of the data of the run; nothing of it is held out."""
    split: Literal["train", "val", "test"] | None = None
    """Which split. Default: train with --data, else the first there is of test, val, train."""

    def action(self) -> int:
        """Predict, and say where the rows were written."""
        from scaletrain.predict import predict, recipe_at

        predict(recipe_at(self.recipe), self.weights, data=self.data, split=self.split, to=self.to)
        if is_first_process():
            print(f"predictions: {self.to}")
        return DONE

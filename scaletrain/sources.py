"""Built-in data that needs no network: scikit-learn's tables and handwritten digits."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from scaletrain.errors import InputError
from scaletrain.order import seed_for
from scaletrain.recipe import Data

BUILT_IN = ("digits", "iris", "wine", "breast_cancer")


def load(name: str, *, image_size: int | None = None, split_seed: int = 0, val_share: float = 0.2) -> Data:
    """Load a built-in classification set, ``val_share`` of each class held out by ``split_seed``.

    Tables: columns ``features`` (N, F) float32 as they come, unscaled, and ``label`` (N,) int64. With
    ``image_size``, digits are images: ``image`` (N, 3, S, S) float32 in [0, 1]. Raises InputError for an
    unknown name.
    """
    if name not in BUILT_IN:
        raise InputError(f"unknown data '{name}'; built in are {', '.join(BUILT_IN)}")
    from sklearn import datasets  # 1.8 s to import

    bunch = getattr(datasets, f"load_{name}")()
    label = torch.from_numpy(bunch.target).long()
    features = torch.from_numpy(bunch.data).float()
    if image_size is None:
        columns = {"features": features, "label": label}
    elif name == "digits":
        columns = {"image": _images(features, image_size), "label": label}
    else:
        raise InputError(f"'{name}' is a table, not images; the built-in images are digits")
    held_out = hold_out(label, val_share, split_seed)
    return Data(
        train={key: column[~held_out] for key, column in columns.items()},
        val={key: column[held_out] for key, column in columns.items()},
        classes=[str(cls) for cls in bunch.target_names],
    )


def hold_out(label: Tensor, share: float, seed: int) -> Tensor:
    """Choose ``share`` of each class: a (N,) bool mask that depends on (seed, index) alone, not on other draws."""
    rank = np.array([seed_for(seed, index) for index in range(len(label))], dtype=np.uint64)
    mask = torch.zeros(len(label), dtype=torch.bool)
    for cls in label.unique():  # type: ignore[no-untyped-call]
        members = (label == cls).nonzero()[:, 0]
        order = torch.from_numpy(np.argsort(rank[members.numpy()], kind="stable"))
        mask[members[order[: round(share * len(members))]]] = True
    return mask


def _images(features: Tensor, size: int) -> Tensor:
    """Scale the (N, 64) pixels 0..16 of the digits to (N, 3, size, size) in [0, 1]."""
    grey = features.view(-1, 1, 8, 8) / 16
    return interpolate(grey, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1).contiguous()

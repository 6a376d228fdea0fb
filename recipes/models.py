"""What several recipes share: the scaling of a table, the tutorial's MLP, and the Transformer of text, lm and vit."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain import InputError


class Standardize(nn.Module):
    """Scale by the training examples alone: nothing leaks from others, and the scale is saved with the weights."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        std = features.std(0)
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("std", torch.where(std == 0, 1, std))  # a pixel that is always empty

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


def mlp(
    n_features: int,
    n_outputs: int,
    width: int = 64,
    activation: str = "relu",
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return the tutorial's multilayer perceptron, (B, n_features) -> (B, n_outputs), with two hidden layers."""
    if width < 1:
        raise InputError(f"--width is {width}; a layer needs at least 1 unit")
    if not 0 <= dropout < 1:
        raise InputError(f"--dropout is {dropout}; it is a share of the activations, from 0 to below 1")
    layers: list[nn.Module] = []
    for n_inputs in (n_features, width):
        layers.append(nn.Linear(n_inputs, width))
        layers += [nn.BatchNorm1d(width)] if batch_norm else []
        layers.append(ACTIVATIONS[activation]())
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(width, n_outputs))


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., "Attention Is All You Need", 2017) through torch's fused kernel."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"width {width} is not divisible by {heads} heads")
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, T, W / H)
        mask = None if valid is None else valid[:, None, None, :]  # (B, 1, 1, T): nobody looks at padding
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, t, width))


class Block(nn.Module):
    """Attention, then two layers on each place by itself; the norms come first (as in GPT-2)."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, causal)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_attention(x), valid))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class Transformer(nn.Module):
    """Blocks over a sequence of vectors (B, T, width), with positions that are learned.

    ``valid`` (B, T) bool is False where a sequence is padding; each sequence has at least one valid place.
    """

    def __init__(
        self, width: int, depth: int, heads: int, context: int, dropout: float = 0.0, causal: bool = False
    ) -> None:
        super().__init__()
        self.context = context
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, causal) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.apply(_as_gpt2)
        for block in self.blocks:  # each adds to the sum, so that it does not grow with the depth
            for last in (block.attention.out, block.mlp[2]):
                nn.init.normal_(last.weight, std=0.02 / (2 * depth) ** 0.5)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        if x.shape[1] > self.context:
            raise InputError(
                f"a sequence of {x.shape[1]} is longer than the model's context of {self.context}; cut it, or raise "
                "--context"
            )
        x = self.dropout(x + self.position(torch.arange(x.shape[1], device=x.device)))
        for block in self.blocks:
            x = block(x, valid)
        return self.norm(x)


def _as_gpt2(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)

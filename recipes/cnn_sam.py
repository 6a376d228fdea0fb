"""The small CNN with sharpness-aware minimization: the same recipe, another optimizer step.

    accelerate launch recipes/cnn_sam.py

The gradient is taken where the loss near the weights is worst: one step of length rho uphill (Foret et al.,
"Sharpness-Aware Minimization for Efficiently Improving Generalization", 2021). Twice the work per step.

Expected: val_accuracy 0.97 or better on the built-in digits (0.989-0.994 over 5 seeds, a minute on one CPU core).
"""

from dataclasses import dataclass, replace

import torch

from recipes import cnn
from scaletrain import Run, StepInfo, forward_backward, main


@dataclass(frozen=True, kw_only=True)
class SAMConfig(cnn.CNNConfig):
    rho: float = 0.05
    """Length of the step uphill, an L2 norm over all weights."""


def sam_step(run: Run, micro_batches: list) -> StepInfo:
    forward_backward(run, micro_batches)
    weights = [p for p in run.gradients.parameters if p.grad is not None]
    gradients = [p.grad for p in weights]
    before = [p.detach().clone() for p in weights]
    with torch.no_grad():
        norm = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_add_(weights, torch._foreach_mul(gradients, run.cfg.rho / (norm + 1e-12)))
    loss = forward_backward(run, micro_batches)  # the gradient uphill ...
    with torch.no_grad():
        torch._foreach_copy_(weights, before)  # ... used at the weights themselves
    grad_norm = run.gradients.clip()
    return run.info(loss, grad_norm, run.gradients.update())


recipe = replace(cnn.recipe, config=SAMConfig)

if __name__ == "__main__":
    main(recipe, step=sam_step)

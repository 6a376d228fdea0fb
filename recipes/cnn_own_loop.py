"""The small CNN again, with the loop written out.

    accelerate launch recipes/cnn_own_loop.py

Expected: the same numbers as recipes/cnn.py, to the last bit. Write a loop like this one when something
between two steps should differ; ``main`` still parses, exports, and says how the run ended.
"""

from recipes.cnn import recipe
from scaletrain import Run, main, steps, validate


def own_loop(run: Run) -> None:
    for info in steps(run):  # each is one optimizer step on cfg.batch_size examples over all devices
        if info.step in (1, run.total_steps) or info.step % run.cfg.log_every == 0:
            run.log({"loss": run.mean(info.loss), "lr": info.lr})
        if run.validation_due(info):
            run.log(validate(run) | {"train_loss": run.mean_train_loss()})
        for hook in run.hooks:
            hook(run, info)
    if run.validation_missed():  # stopped between two of them
        run.log(validate(run) | {"train_loss": run.mean_train_loss()})


if __name__ == "__main__":
    main(recipe, loop=own_loop)

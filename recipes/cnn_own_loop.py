"""The small CNN again, with the loop written out instead of ``main``.

    accelerate launch recipes/cnn_own_loop.py

Expected: the same numbers as recipes/cnn.py, to the last bit. Write a loop of your own like this one when
something between two steps should differ.
"""

import sys

from recipes.cnn import CNNConfig, recipe
from scaletrain import Result, parse, start, steps, validate


def main(argv: list[str]) -> Result:
    cfg = parse(CNNConfig, argv)
    run = start(recipe, cfg, source=__file__)
    for info in steps(run):  # each is one optimizer step on cfg.batch_size examples over all devices
        if info.step % cfg.log_every == 0:
            run.log({"loss": run.mean(info.loss), "lr": info.lr})
        if run.validation_due(info):
            run.log({"train_loss": run.mean_train_loss(), **validate(run)})
        for hook in run.hooks:
            hook(run, info)
    return run.finish()


if __name__ == "__main__":
    main(sys.argv[1:])

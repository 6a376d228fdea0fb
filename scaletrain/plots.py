"""Curves, in the terminal and in files."""

from collections.abc import Mapping, Sequence
from math import floor, log10
from pathlib import Path

from scaletrain.errors import InputError

WIDTH, HEIGHT = 80, 14


def draw(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    x_label: str,
    title: str,
    to: Path | None = None,
    *,
    log: bool = False,
) -> None:
    """Print ``curves`` over ``x``, each named; a single one has a panel of its own. Also draw them in the file ``to``.

    ``log`` spaces ``x`` logarithmically. Raises InputError where the libraries are not installed, and for a file of a
    kind that is not drawn.
    """
    try:
        import matplotlib
        import plotext
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; curves need: pip install 'scaletrain[plot]'") from None
    figure = plotext
    figure.clear_figure()
    figure.theme("clear")
    figure.plot_size(WIDTH, HEIGHT)
    figure.title(title)
    figure.xlabel(x_label)
    for name, y in curves.items():
        figure.plot(list(x), list(y), label=name, marker="braille")
    if log:
        powers = [10.0**k for k in range(floor(log10(min(x))), floor(log10(max(x))) + 1)]
        figure.xscale("log")
        figure.xticks(powers, [f"{power:.0e}".replace("e-0", "e-").replace("e+0", "e+") for power in powers])
    print(figure.uncolorize(figure.build()))  # noqa: T201
    if to is None:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, y in curves.items():
        axes.plot(x, y, label=name)
    axes.set(title=title, xlabel=x_label, xscale="log" if log else "linear")
    axes.legend()
    try:
        fig.savefig(to, dpi=150)
    except ValueError as error:
        raise InputError(f"{to}: {str(error).partition(';')[0]}; name a .png, .svg or .pdf file") from None
    finally:
        pyplot.close(fig)
    print(f"drawn in {to}")  # noqa: T201

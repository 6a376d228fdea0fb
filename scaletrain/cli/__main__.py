"""``python -m scaletrain.cli``: the same as ``scaletrain``."""

from scaletrain.cli import main

main()

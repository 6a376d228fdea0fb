"""A recipe of one's own, begun as a copy of another."""

import ast
import importlib.util
import keyword
import sys
from pathlib import Path

from scaletrain.errors import InputError

ABOUT = '''"""{name}: say here what it learns, and from what.

    accelerate launch {path}
    python {path} --help

Begun as a copy of {like}. Write here what to expect of it: a metric, over how many seeds, on which machine.
"""'''


def write_new(name: str, like: str) -> Path:
    """Write the recipe ``name``, a name or path, as a copy of ``like``, and return its path. Raises InputError."""
    path = Path(name).with_suffix(".py")
    there = recipes()
    if like not in there:
        raise InputError(f"--like {like}: there is no such recipe; there are {', '.join(there)}")
    if not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        raise InputError(f"'{path.stem}' is no name for a recipe; use letters, digits and _, as my_recipe")
    if path.exists():
        raise InputError(f"{path} is there already; choose another name")
    if path.stem in sys.modules or importlib.util.find_spec(path.stem) is not None:
        raise InputError(f"{path} would hide the module {path.stem} that is installed; choose another name")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder; make it first")
    source = there[like].read_text()
    about = ast.parse(source).body[0]
    rest = source.splitlines(keepends=True)[about.end_lineno :]
    path.write_text(ABOUT.format(name=path.stem, path=path, like=like) + "\n" + "".join(rest))
    return path


def recipes() -> dict[str, Path]:
    """Return the files of the recipes that are installed, by name."""
    package = importlib.util.find_spec("recipes")
    folders = [] if package is None else package.submodule_search_locations or []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.py"))
    return {path.stem: path for path in files if "\nif __name__" in path.read_text()}

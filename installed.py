"""Imported first by every command: says in one line if Python or a package is not what is needed.

Imports nothing that has to be installed, so that no traceback comes before that line.
"""

import sys
from importlib.util import find_spec

NEEDED = {"torch": "torch", "numpy": "numpy", "sentencepiece": "sentencepiece", "PIL": "pillow",
          "safetensors": "safetensors", "tqdm": "tqdm"}  # module: package


def complaint(version: tuple[int, ...], missing: list[str]) -> str:
    """What the user has to do, or "".

    >>> complaint((3, 10, 4), [])
    'nanovilla needs Python 3.11 to 3.13, this is 3.10.4: make an environment of such a one'
    >>> complaint((3, 12, 0), ["torch", "tqdm"])
    'torch, tqdm: not installed; run: pip install -r requirements.txt'
    """
    if not (3, 11) <= version[:2] <= (3, 13):
        return ("nanovilla needs Python 3.11 to 3.13, this is " + ".".join(map(str, version[:3]))
                + ": make an environment of such a one")
    if missing:
        return ", ".join(missing) + ": not installed; run: pip install -r requirements.txt"
    return ""


if trouble := complaint(sys.version_info, [package for module, package in NEEDED.items()
                                           if not find_spec(module)]):
    sys.stderr.write(f"{trouble}\n")
    raise SystemExit(2)

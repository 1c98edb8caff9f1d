"""What every command line shares: one-line errors, text for a terminal, the device to run on.

A program's main is called by run_main. A mistake of the user's is a UserError wherever it is
found: one line on stderr, exit code 2, no traceback.
"""

import argparse
import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UserError(ValueError):
    """A mistake of the user's: shown as its one line, exit code 2, no traceback."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors: one line, without the usage block."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def run_main(main: Callable[[], None]) -> None:
    """Call a script's main; a UserError ends it with its one line and exit code 2.

    Ctrl-C ends it with 130, and a reader that goes away (`| head`) with 1, both without a word.
    """
    sys.stdout.reconfigure(errors="replace")  # not every terminal can write every character
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun, one process per machine
            complain(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        drop_output()
        raise SystemExit(1) from None
    except torch.OutOfMemoryError as error:
        complain(UserError(f"{one_line(error).split('. ')[0]}: take less at once (--micro-batch, "
                           f"--recompute), --dtype int8 to write, or more GPUs; train.py --plan "
                           f"says what fits"))
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename:
            raise
        drop_output()
        complain(UserError("no space is left where the output goes"))
        raise SystemExit(2) from None


def drop_output() -> None:
    """What is not written yet; Python would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(error: UserError) -> None:
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {one_line(error)}\n")


def printable(text: str) -> str:
    """Text without what could steer a terminal: control and direction marks, escapes.

    >>> printable("a\\x1b[31m cat\\u202e")
    'a[31m cat'
    """
    return "".join(c if c == "\n" or c.isprintable() else " " * c.isspace() for c in text)


def one_line(text: object) -> str:
    """Of a file's name, or of what is wrong with it."""
    return printable(str(text).replace("\n", " "))


@contextlib.contextmanager
def input_errors():
    """Within it, a ValueError is about the user's input: it becomes a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


@contextlib.contextmanager
def disk_errors(path: Path, run: Path | None = None):
    """Within it, what cannot be written (a full disk) is a UserError with the file's name.

    run: the folder by which it can be resumed; none: nothing has begun.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        then = f"go on by --resume {run}" if run else "start again"
        raise UserError(f"{path}: could not be written ({why}); mend that, then {then}") from None


def pick_device(name: str, local: int = 0) -> torch.device:
    """A --device flag -> the device of this machine's process number `local`; UserError if none.

    "auto" takes CUDA, else Apple's MPS, else the CPU.
    """
    n_cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if n_cuda else "mps" if mps else "cpu"
    if name == "cuda" and n_local > n_cuda:  # so that every process refuses
        fewer = f"each of {n_local} processes needs its own: start fewer, or " * (n_local > 1)
        raise UserError(f"--device cuda: torch sees {n_cuda} CUDA devices; {fewer}use --device cpu")
    if name == "mps" and not mps:
        raise UserError("--device mps: torch sees no Apple GPU; use --device cpu")
    if name == "cuda" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Ragged batches ask for ever new sizes, and fixed segments would leave gaps between them.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return torch.device(name, local) if name == "cuda" else torch.device(name)


def commit() -> str:
    """Of this code, for records; "unknown" where it is no git clone."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                              text=True, cwd=Path(__file__).parent)
    except OSError:  # there is no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def dtype_name(dtype: torch.dtype) -> str:
    """
    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return DTYPES[name]


def markdown(titles: Iterable[object], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a Markdown table, whose columns after the first are aligned to the right.

    >>> markdown(("a", "b"), [("x", 1)])
    ['| a | b |', '| --- | ---: |', '| x | 1 |']
    """
    titles = [*titles]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return ["|" + "".join(f" {cell} |" if cell != "" else " |" for cell in line) for line in lines]

"""C++ of ours, built against the torch that is installed when it is first needed, and kept for the next time."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

from minnow.errors import UserError

_FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math")
"""-fno-math-errno and -fno-trapping-math let rounding go through vector lanes; NaN and infinity stay what they are."""


def cpp_compiler() -> str | None:
    """The C++ compiler: what CXX names, else the first of g++, clang++ and c++ that is there."""
    wanted = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [wanted] if wanted else ["g++", "clang++", "c++"])), None)


@cache
def load_cpp(source: Path, *macros: str) -> ctypes.CDLL | None:
    """The library of `source` with `macros` defined; None where it cannot be built (without a compiler in silence, else
    with a warning).

    Built once for each machine, in ~/.cache/minnow (or $XDG_CACHE_HOME/minnow): the name has a hash of the source, the
    flags, torch's version and the processor's abilities.
    """
    compiler = cpp_compiler()
    if compiler is None or sys.platform != "linux":
        return None
    abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    flags = (*_FLAGS, *(f"-D{macro}" for macro in macros))
    told = (source.read_text(encoding="utf-8"), flags, torch.__version__, sorted(abilities.items()), compiler)
    name = f"{source.stem}-{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minnow"
        library = folder / name
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as building:
                built = Path(building) / name
                _build(compiler, flags, source, built)
                os.replace(built, library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, UserError) as error:  # RuntimeError: there is no home
        warnings.warn(f"{source.name} was not built and goes unused, which is slower: {error}", stacklevel=2)
        return None


def _build(compiler: str, flags: tuple[str, ...], source: Path, library: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-fopenmp", *flags, f"-I{torch_folder / 'include'}"]
    command += [str(source), "-o", str(library), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        raise UserError(f"{compiler} answered {built.stderr.strip()[-500:]}")

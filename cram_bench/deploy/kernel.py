"""The C kernel of sparse layers: compiled at first use by the gcc or clang of this machine, and kept in a cache.

`kernel.c` is compiled for the processor at hand, with flags that leave denormal numbers as they are: a library made
with ``-ffast-math`` would flush them to zero in the whole process as soon as it is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from ctypes import c_double, c_int32, c_int64, c_void_p
from importlib import resources
from pathlib import Path

from cram_bench.files import cache_root, locked, sha256, whole, write

FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
"""What `kernel.c` is compiled with; never ``-ffast-math``. Sums are written out as vectors in the order that is meant:
with ``-fassociative-math`` gcc reorders them again, and multiplies and adds one by one instead of both at once."""

COMPILERS = ("cc", "gcc", "clang")
"""What is looked for in ``PATH``, after ``$CC``."""


class Geometry(ctypes.Structure):
    """How the planes of one call lie in memory; the fields of the struct of that name in `kernel.c`, in its order."""

    _fields_ = [
        (name, c_int64)
        for name in (
            "linear", "batch", "rows", "planes", "height", "width", "out_height", "out_width", "stride_y", "stride_x",
            "top", "left", "line", "lines", "phases", "images", "plane", "vectors", "back_images", "lead", "back_plane",
            "back_vectors", "bundle", "back_bundle", "threads",
        )
    ]  # fmt: skip


class CompilerError(RuntimeError):
    """There is no compiler, or it could not compile the kernel."""


class Kernel:
    """The compiled functions of `kernel.c`. They compute without the interpreter's lock.

    Attributes:
        lanes: floats of a vector.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(os.fspath(path))
        pointer = c_void_p
        self.forward = _function(library, "forward", c_int32, [ctypes.POINTER(Geometry), *[pointer] * 8])
        self.backward = _function(library, "backward", c_int32, [ctypes.POINTER(Geometry), *[pointer] * 9])
        self.count_nonzeros = _function(library, "count_nonzeros", c_int64, [pointer, c_int64])
        self.find_nonzeros = _function(
            library, "find_nonzeros", None,
            [ctypes.POINTER(Geometry), pointer, c_int64, c_int64, c_int64, *[pointer] * 8],
        )  # fmt: skip
        self.read_values = _function(
            library, "read_values", c_int64, [pointer, c_int64, c_int64, *[pointer] * 5, ctypes.POINTER(c_int64)]
        )
        self.write_gradient = _function(library, "write_gradient", None, [pointer, c_int64, c_int64, *[pointer] * 4])
        sizes = [c_int64] * 3
        self.normalise = _function(library, "normalise", None, [*sizes, c_double, c_int64, *[pointer] * 7])
        self.differentiate = _function(library, "differentiate", None, [*sizes, c_int64, *[pointer] * 8])
        self.lanes: int = _function(library, "lanes_of_a_vector", c_int32, [])()


def _function(
    library: ctypes.CDLL, name: str, result: type | None, arguments: Sequence[type]
) -> ctypes._NamedFuncPointer:
    function = library[name]
    function.restype, function.argtypes = result, list(arguments)
    return function


@functools.cache
def compiled() -> Kernel | None:
    """Return the kernel, compiled if it was not yet; None, after one warning, where that is not possible."""
    try:
        return load()
    except (CompilerError, OSError) as error:
        warnings.warn(
            f"sparse layers compute without their kernel, slower: {error}; put gcc or clang in PATH", stacklevel=3
        )
        return None


def load(folder: Path | None = None) -> Kernel:
    """Compile `kernel.c` for this processor, unless `folder` has it, and load it.

    The name in the cache hashes source, flags, compiler and processor. One process compiles, and others wait for it;
    the file is written whole or not at all, and one that was damaged is made anew.

    Args:
        folder: where compiled kernels are kept; ``kernels`` in `cram_bench.files.cache_root` by default, and a folder
            of this process's own where that cannot be written.

    Raises:
        CompilerError: no compiler is in ``PATH``, or it failed; the message has its first line.
    """
    compiler = find_compiler()
    source = resources.files("cram_bench.deploy").joinpath("kernel.c").read_bytes()
    name = f"{fingerprint(source, compiler)}.so"
    try:
        return _kept(folder or cache_root() / "kernels", name, source, compiler)
    except OSError:
        with tempfile.TemporaryDirectory() as own:  # what is loaded stays when its file goes
            return _kept(Path(own), name, source, compiler)


def _kept(folder: Path, name: str, source: bytes, compiler: Sequence[str]) -> Kernel:
    folder.mkdir(parents=True, exist_ok=True)
    path, note = folder / name, folder / f"{name}.sha256"  # half a library may load, and fail later
    with locked(folder / f"{name}.lock"):
        if path.is_file() and path.stat().st_uid == os.geteuid() and note.is_file():
            if note.read_bytes() == sha256(path).encode():
                return Kernel(path)
            path.unlink()
        with whole(path) as part:
            _compile(source, part, compiler)
        write(note, sha256(path))
        return Kernel(path)


def _compile(source: bytes, path: Path, compiler: Sequence[str]) -> None:
    command = [*compiler, *FLAGS, "-x", "c", "-", "-o", os.fspath(path)]
    done = subprocess.run(command, input=source, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise CompilerError(f"{compiler[0]} failed: {next((x for x in said if 'error' in x), said[0]).strip()}")


def find_compiler() -> list[str]:
    """Return the command of a C compiler: ``$CC``, or the first of `COMPILERS` in ``PATH``.

    Raises:
        CompilerError: there is none.
    """
    for command in (shlex.split(os.environ.get("CC", "")), *([name] for name in COMPILERS)):
        if command and (found := shutil.which(command[0])):
            return [found, *command[1:]]
    raise CompilerError(f"no compiler was found, neither $CC nor {', '.join(COMPILERS)}")


def fingerprint(source: bytes, compiler: Sequence[str]) -> str:
    """Return the hash of all that decides what a compiled kernel is."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    parts = [source, " ".join(FLAGS).encode(), " ".join(compiler).encode(), version, _processor()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def _processor() -> bytes:
    """Return what tells processors apart for which ``-march=native`` compiles differently."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    except OSError:
        lines = []
    told = (b"vendor", b"cpu family", b"model", b"flags", b"Features", b"CPU ")
    return b"\n".join([platform.machine().encode(), *(line for line in lines if line.startswith(told))])

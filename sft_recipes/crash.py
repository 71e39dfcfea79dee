"""What is told of an error that this program did not foresee: one line, exit code 70, and never a traceback unasked.

Where the system or a disk said no, that is no fault of the program, and its own words say what to do.
"""

import contextlib
import errno
import os
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from sft_recipes.errors import InputError, Problem, SFTRecipesError

EXIT_CODE = 70
INTERRUPTED = 130
DEBUG = "SFT_RECIPES_DEBUG"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What the system says of a path that was given, and what helps.
_FIXES = {
    errno.EACCES: "give this user the right to it, or choose another folder",
    errno.EPERM: "give this user the right to it, or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOTDIR: "choose a path that leads through folders only",
    errno.EISDIR: "name a file",
    errno.EEXIST: "choose another name, or remove what stands there",
    errno.ELOOP: "choose a path without links that lead in a circle",
    errno.EMFILE: "allow more open files with `ulimit -n 4096`",
}
_NO_TEMPORARY = "No usable temporary directory"
# As safetensors, which keeps no number apart, says the numbers above.
_TEXT_OF_NO_SPACE = (
    "No space left on device",
    "(os error 27)",
    "(os error 28)",
    "(os error 122)",
)
_OFFLINE = "OfflineModeIsEnabled"
_NETWORK_ERRORS = frozenset({"TransportError", "ConnectionError", "TimeoutError"})
_PACKAGE = Path(__file__).resolve().parent


def explain(error: BaseException) -> SFTRecipesError | None:
    """The error as one of this project's where the system refused something; None for a fault of the program."""
    if isinstance(error, SFTRecipesError):
        return error
    for cause in chain(error):
        is_full = isinstance(cause, OSError) and cause.errno in _NO_SPACE
        if is_full or any(text in str(cause) for text in _TEXT_OF_NO_SPACE):
            return _no_space(cause)
        if _NO_TEMPORARY in str(cause):
            fix = "make room there, or set TMPDIR to a folder that can be written"
            what = "cannot be written: neither TMPDIR nor /tmp nor the working directory"
            return InputError(Problem("temporary folder", "", what, fix))
        if isinstance(cause, OSError) and cause.errno in _FIXES and _names_a_file(cause):
            what = str(cause.strerror)
            return InputError(Problem(str(cause.filename), "", what, _FIXES[cause.errno]))
    return None


def _names_a_file(error: OSError) -> bool:
    return isinstance(error.filename, str | bytes | Path)


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and what that was raised from."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def is_network_down(error: BaseException) -> bool:
    """Whether an error comes from a server that did not answer; a wish to stay offline is no such error.

    Told by names of classes: the Hub's client has changed its HTTP library, and brings its own copy.
    """
    names: set[str] = set()
    for link in chain(error):
        names.update(kind.__name__ for kind in type(link).__mro__)
        if _OFFLINE in str(link):  # all that `datasets` keeps of it
            return False
    return _OFFLINE not in names and not names.isdisjoint(_NETWORK_ERRORS)


def _no_space(error: BaseException) -> InputError:
    """Which disks are full: the one that was written to, the temporary folder's, the working directory's."""
    where = "disk"
    folders = [Path.cwd()]
    with contextlib.suppress(FileNotFoundError):  # nothing can be written to any of them
        folders.insert(0, Path(tempfile.gettempdir()))
    filename = getattr(error, "filename", None)
    if isinstance(filename, str):
        where = filename
        folders.insert(0, Path(filename).absolute().parent)
    states = []
    for folder in dict.fromkeys(folders):
        if folder.is_dir():
            states.append(f"{shutil.disk_usage(folder).free / 1e9:.2f} GB left at {folder}")
    what = f"no space left on device ({', '.join(states)})"
    fix = "make room, or set TMPDIR to a folder on another disk if it is the temporary one"
    return InputError(Problem(where, "", what, fix))


def tell(error: BaseException) -> int:
    """Print what is to be said of an error on stderr; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    known = explain(error)
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    if known is not None:
        print(known, file=sys.stderr)
        return known.exit_code
    print(describe(error), file=sys.stderr)
    return EXIT_CODE


def describe(error: BaseException) -> str:
    """One line: what happened, where, and how to report it."""
    words = " ".join(str(error).split())
    name = type(error).__name__
    what = f"{name}: {words}" if words else name
    if os.environ.get(DEBUG):
        fix = "report it with the lines above"
    else:
        fix = f"report it with what this prints: {_command_with_debug()}"
    return f"sft-recipes: internal error at {_place(error)}: {what[:500]}. Fix: {fix}"


def _place(error: BaseException) -> str:
    """The innermost line of this package, else of all code, that the error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "an unknown place"
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    frame = (own or frames)[-1]
    path = Path(frame.filename)
    shown = path.relative_to(_PACKAGE.parent) if own else path.name
    return f"{shown}:{frame.lineno}"


def _command_with_debug() -> str:
    """The command that runs, with its traceback shown."""
    program = Path(sys.argv[0])
    if program.name == "sft-recipes":
        return shlex.join(["sft-recipes", "--debug", *sys.argv[1:]])
    return f"{DEBUG}=1 {shlex.join(sys.argv)}"

"""Ways in which files get damaged, commands run under watch, and the table of what came of it."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from sft_recipes import cli, crash

LONGEST_SECONDS = 60
# What a command may end with on damaged input: done, a check, wrong input, a fault of training, nothing decided.
PROPER = (0, 1, 2, 3, 4)


def _joined(content: bytes) -> bytes:
    return content.replace(b"\n", b"")


def _replaced(text: bytes) -> Callable[[bytes], bytes]:
    return lambda _: text


DAMAGES: Mapping[str, Callable[[bytes], bytes]] = {
    "empty": _replaced(b""),
    "cut": lambda content: content[: len(content) // 2],
    "a byte short": lambda content: content[:-1],
    "zeros": lambda content: b"\0" * len(content),
    "a zero inside": lambda content: content[:10] + b"\0" + content[11:],
    "a list": _replaced(b"[1, 2, 3]\n"),
    "an empty object": _replaced(b"{}\n"),
    "null": _replaced(b"null\n"),
    "a number": _replaced(b"7\n"),
    "latin-1": lambda content: content[:5] + b"\xe9" + content[5:],
    "UTF-16": lambda content: content.decode("utf-8", "replace").encode("utf-16"),
    "joined lines": _joined,
    "twice": lambda content: content + content,
    "U+2028": lambda content: content.replace(b" ", "\u2028".encode(), 3),
    "other values": lambda content: content.replace(b'"', b"", 4).replace(b": ", b": -", 5),
    "text": _replaced(b"<html><body>404 Not Found</body></html>\n"),
    "binary": _replaced(bytes(range(256)) * 8),
    "deep": _replaced(b'{"a": ' * 5000),
}
PLACES = ("removed", "a folder")


def damage(path: Path, kind: str) -> None:
    """Damage one file."""
    if kind not in PLACES:
        path.write_bytes(DAMAGES[kind](path.read_bytes()))
        return
    path.unlink()
    if kind == "a folder":
        path.mkdir()


class TooLong(BaseException):
    """A command that took longer than it may."""


@dataclass
class Table:
    """How often each command ended in which way, and what must not have happened."""

    outcomes: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def run(self, what: str, arguments: Sequence[str], said: Callable[[], str]) -> int:
        """Run a command line in this process; `said` returns what it printed on stderr."""
        previous = signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(LONGEST_SECONDS)
        try:
            code = cli.run(list(arguments))
        except TooLong:
            code = -1
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
        text = said()
        self.outcomes[arguments[0], code] += 1
        if code not in PROPER or "Traceback" in text:
            self.faults.append(f"{what}: {arguments[0]} ended with {code}: {text[-400:]}")
        if code in (2, 3) and not text.strip():
            self.faults.append(f"{what}: {arguments[0]} ended with {code} and said nothing")
        return code

    def print(self, title: str) -> None:
        """The table."""
        print(f"\n{title}\n{'command':12} {'exit code':>9} {'times':>6}")
        for (command, code), count in sorted(self.outcomes.items()):
            print(f"{command:12} {code:>9} {count:>6}")
        print(f"{self.outcomes.total()} commands, {len(self.faults)} improper endings")
        print(*self.faults, sep="\n")


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong


def copy_of(folder: Path, target: Path) -> Path:
    """A fresh copy at the same place each time, so that paths in it stay right."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(folder, target)
    return target


assert crash.EXIT_CODE not in PROPER

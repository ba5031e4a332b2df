"""Damaged inputs by the thousand, read in a process with little memory and little time for each.

Damage is of three kinds: bytes changed at random, values of a JSON or YAML document replaced by hostile ones, and
things that are no plain file. All of it is drawn from a seed.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.checkpoint.reader import Reader
from pymerge.common.devices import Device
from pymerge.config.merge_config import load_config
from pymerge.errors import PymergeError
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import layout_shards
from pymerge.output.manifest import read_manifest
from pymerge.output.verify import verify
from pymerge.planner.budget import budget
from pymerge.planner.build import build_plan

MEMORY_BYTES = 512 << 20  # above what the process has at its start
SECONDS = 5  # of the processor for one case
WAITING = 60  # by the clock: the machine may be busy with something else

DEEP = 100_000
NUMBERS = [0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, 1e308, float("nan"), float("inf")]
TEXTS = [
    "",
    "\0",
    "\ud800",
    "\udcff",
    "..",
    "../x",
    "/etc/passwd",
    "C:\\x",
    "a" * 5000,
    "a" * 300 + ".safetensors",
    "__metadata__",
    "F32",
    "é",
]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [0, 0], [2**63, 2**63], {"": ""}]
TOKENS = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\ud800", b"NaN", b"-Infinity", b"1e999", b"\xff", b"\0", b"\n"]
TOKENS += [b"9" * 5000, b"<<: *a", b"&a", b"!!python/object:os.system", b"- ", b"  ", b"#", b"%", b"\t", b"null"]


# The output in folder/out for "state".
LAYOUTS = layout_shards([("a", "U8", (4,)), ("b", "F32", (2,)), ("c", "U8", (3,))], 5)
IDENTITY = {"config parameters.iterations": "3", "device": "cpu"}


class TookTooLong(BaseException):
    """A case ran out of its time; no Exception, so that nothing takes it for an error of the input."""


class Subject:
    """One kind of file in a folder of models, how to damage it, and how to read it."""

    def __init__(
        self,
        folder: Path,
        file: str,
        read: Callable[[Path], object],
        named: str | None = None,
        changed: str | None = None,
    ) -> None:
        self.folder = folder
        self.file = folder / file
        self.named = folder / (named or file)  # what a refusal must name
        # A recipe can name other models; it is then these that are refused.
        self._targets = [folder.as_posix() + "/", "/etc/passwd"] if self.file.suffix == ".yml" else []
        self.content = self.file.read_bytes()
        self._read = read
        self._changed = None if changed is None else folder / changed  # a folder that reading may change
        self._kept = folder / "kept"
        if self._changed is not None:
            shutil.copytree(self._changed, self._kept)

    def case(self, generator: random.Random) -> None:
        """Write one damaged file."""
        self.restore()
        data = self.content
        if generator.random() < 0.5:
            data = hostile_document(generator, data, self.file.suffix)
        if data == self.content or generator.random() < 0.3:
            for _ in range(generator.choice([1, 1, 2, 8])):
                data = hostile_bytes(generator, data)
        self.file.write_bytes(data)

    def special(self, kind: str) -> None:
        """Put something in place of the file that is none."""
        self.restore()
        self.file.unlink()
        if kind == "fifo":
            os.mkfifo(self.file)
        elif kind == "directory":
            self.file.mkdir()
        elif kind == "empty":
            self.file.touch()
        elif kind == "device":
            self.file.symlink_to("/dev/zero")
        elif kind == "loop":
            self.file.symlink_to(self.file.name)
        elif kind == "huge":
            with open(self.file, "wb") as stream:
                stream.truncate(1 << 40)
        elif kind == "deep":
            text = b"[" * DEEP
            safetensors = self.file.suffix == ".safetensors"
            self.file.write_bytes((len(text) + 5).to_bytes(8, "little") + b'{"a":' + text if safetensors else text)
        else:
            assert kind == "missing"

    def restore(self) -> None:
        """The undamaged file."""
        if self._changed is not None:
            shutil.rmtree(self._changed)
            shutil.copytree(self._kept, self._changed)
        if self.file.is_dir() and not self.file.is_symlink():
            shutil.rmtree(self.file)
        elif self.file.is_symlink() or self.file.is_fifo():
            self.file.unlink()
        self.file.write_bytes(self.content)

    def outcome(self) -> str:
        """ "accepted" or "refused", or what is wrong: another exception, a message without the file, too slow."""
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WAITING)
        try:
            self._read(self.folder)
        except PymergeError as error:
            names = [str(self.named) if os.path.exists(self.file) else str(self.named.parent), *self._targets]
            known = any(name in str(error) for name in names)
            return "refused" if known else f"does not name {names[0]}: {error!s:.300}"
        except TookTooLong:
            return f"took longer than {SECONDS} s, or waited {WAITING} s: {traceback.format_exc()}"
        except BaseException:  # the very thing to be found
            return traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        return "accepted"


SPECIAL = ("fifo", "directory", "empty", "device", "loop", "huge", "deep", "missing")


def hostile_bytes(generator: random.Random, data: bytes) -> bytes:
    """Change, insert, repeat or remove some bytes, or cut the rest off."""
    place = generator.randrange(len(data) + 1)
    if generator.random() < 0.4:  # where lengths and headers are
        place = min(place, generator.randrange(16))
    length = generator.choice([1, 1, 1, 2, 8, 64])
    before, after = data[:place], data[place:]
    ways = [
        before + bytes([generator.randrange(256)]) + after[1:],
        before + (bytes([after[0] ^ 1 << generator.randrange(8)]) if after else b"") + after[1:],
        before + generator.choice(TOKENS) + after,
        before + after[length:],
        before + after[:length] * 2 + after[length:],
        before + generator.randbytes(length) + after[length:],
        before,
    ]
    return generator.choice(ways)


def hostile_document(generator: random.Random, data: bytes, suffix: str) -> bytes:
    """Replace, remove, repeat or rename a value of the JSON in `data` (in a safetensors file: of its header)."""
    if suffix == ".yml":
        return hostile_yaml(generator, data)
    start, end = (8, 8 + int.from_bytes(data[:8], "little")) if suffix == ".safetensors" else (0, len(data))
    document = json.loads(data[start:end])
    places: list[tuple[Any, Any]] = []

    def gather(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            gather(node[key])

    gather(document)
    node, key = generator.choice(places)
    way = generator.randrange(4)
    if way == 0 or isinstance(node, list):
        node[key] = generator.choice(generator.choice([NUMBERS, TEXTS, OTHERS]))
    elif way == 1:
        del node[key]
    else:
        node[generator.choice(TEXTS)] = node[key] if way == 2 else node.pop(key)
    text = json.dumps(document).encode()
    if generator.random() < 0.1:
        text = text.replace(b'": ', b'": 1, "weight_map": ', 1)  # a name twice, or nonsense
    length = len(text) if generator.random() < 0.9 else generator.choice([0, 2**31, 2**63, 2**64 - 1])
    return length.to_bytes(8, "little") + text + data[end:] if suffix == ".safetensors" else text


def hostile_yaml(generator: random.Random, data: bytes) -> bytes:
    """Replace a scalar of the YAML in `data`."""
    scalars = list(re.finditer(rb"(?<=[:-] )\S+", data))
    chosen = generator.choice(scalars)
    value = generator.choice(generator.choice([NUMBERS, TEXTS, OTHERS]))
    return data[: chosen.start()] + json.dumps(value).encode() + data[chosen.end() :]


def read_model(folder: Path) -> None:
    """Open folder/base and read all of its tensors."""
    opened = open_checkpoint(folder / "base")
    with Reader(opened.stamps) as reader:
        for entry in opened.tensors.values():
            reader.read(entry)


def plan(folder: Path) -> None:
    """Plan folder/merge.yml."""
    planned = build_plan(load_config(folder / "merge.yml"), budget(Device("cpu")))
    json.dumps(planned.identity("x"))


def planner(folder: Path) -> Callable[[Path], object]:
    """As `plan`, with a recipe that is read once."""
    config = load_config(folder / "merge.yml")
    return lambda folder: build_plan(config, budget(Device("cpu")))


def check_output(folder: Path) -> None:
    """Verify folder/out, then open it for another merge that replaces it."""
    read_manifest(folder / "out")
    if problems := verify(folder / "out").problems:
        raise PymergeError("\n".join(problems))


def open_output(folder: Path) -> None:
    """Open the unfinished folder/out, to go on or to be refused."""
    OutputDirectory(folder / "out", LAYOUTS, identity=IDENTITY).open().abandon()


def subject(folder: Path, kind: str) -> Subject:
    """The files that are damaged, by name."""
    made: dict[str, Callable[[], Subject]] = {
        "header": lambda: Subject(folder, "base/model.safetensors", read_model),
        "index": lambda: Subject(folder, "base/model.safetensors.index.json", read_model),
        "config.json": lambda: Subject(folder, "base/config.json", planner(folder), named="base"),
        "recipe": lambda: Subject(folder, "merge.yml", plan),
        "manifest": lambda: Subject(folder, "out/pymerge_manifest.json", check_output, named="out"),
        "state": lambda: Subject(folder, "out/.pymerge/state.json", open_output, named="out", changed="out"),
    }
    return made[kind]()


def run(folder: Path, kind: str, cases: int) -> tuple[Counter[str], list[str]]:
    """Read `cases` damaged files and the special ones; returns counts of outcomes and what is wrong."""

    def alarm(number: int, frame: FrameType | None) -> None:
        raise TookTooLong

    signal.signal(signal.SIGALRM, alarm)
    signal.signal(signal.SIGPROF, alarm)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    damaged = subject(folder, kind)
    assert damaged.outcome() == "accepted", damaged.outcome()
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    generator = random.Random(kind)
    for number in range(cases + len(SPECIAL)):
        if number < cases:
            damaged.case(generator)
        else:
            damaged.special(SPECIAL[number - cases])
        outcome = damaged.outcome()
        counts[outcome if outcome in ("accepted", "refused") else "wrong"] += 1
        if outcome not in ("accepted", "refused"):
            what = f"case {number}" if number < cases else SPECIAL[number - cases]
            kept = damaged.file.read_bytes()[:300] if damaged.file.is_file() and number < cases else b""
            wrong.append(f"{kind}, {what}: {outcome}\n{kept!r}")
    return counts, wrong

"""Files that appear whole, their digests, JSON, and progress that is seen on every terminal."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

from tqdm import tqdm

from whence.plain import WhenceError
from whence.storage import leftovers
from whence.storage.jsons import (
    CHECKSUM,
    LARGEST,
    LARGEST_OF_OTHERS,
    Malformed,
    parsed,
    plain_text,
    refuse_unexpected,
    seal_of,
    sealed,
    whole,
)
from whence.storage.opening import regular
from whence.storage.processes import name_of

Item = TypeVar("Item")


def progress(
    items: Sequence[Item] | Iterable[Item],
    what: str,
    total: int | None = None,
    told: Callable[[Item], str] | None = None,
    within: bool = False,
) -> Iterator[Item]:
    """A tqdm bar on a terminal, a plain line about every ten seconds elsewhere; nothing with WHENCE_QUIET=1.

    Args:
        items: that are gone through.
        what: is done with them.
        total: number of items, where they have no length.
        told: what is said of the last one, behind the bar.
        within: whether it is a part of what another bar shows: then it appears after ten seconds, and goes when it is over.
    """
    terminal = sys.stderr.isatty()
    bar = tqdm(
        items,
        desc=what,
        total=total,
        file=None if terminal else _Lines(),
        disable=os.environ.get("WHENCE_QUIET") == "1",
        mininterval=0.1 if terminal else 10.0,
        ascii=not terminal,
        ncols=None if terminal else 100,
        leave=not within,
        delay=10.0 if within else 0.0,
    )
    for item in bar:
        if told is not None and not bar.disable:
            bar.set_postfix_str(told(item), refresh=False)
        yield item


class _Lines:
    """stderr for what is no terminal: a line of its own for each state of the bar, instead of one that is overwritten."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip("\r\n") + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


# What the disk refuses, in words; libraries that hide the number in a text of their own are understood, too.
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of this disk is used up",
    errno.EFBIG: "a file may not become that large here (see `ulimit -f`)",
}
HIDDEN = re.compile(r"(?:os error|Errno) (\d+)\b")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Write a file that appears whole or not at all: yields a temporary path, then fsync and rename."""
    with _written_beside(path) as temporary:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)


def write_once(path: Path, content: bytes) -> bytes:
    """What a file holds from now on: this content, or what was there before or another process was faster to write.

    So two processes that start in one folder at once agree on whose it is. The file appears whole.
    """
    if not path.exists():
        with _written_beside(path) as temporary:
            temporary.write_bytes(content)
            _to_disk(temporary)
            try:
                os.link(temporary, path)  # unlike a rename, it fails where a file is
            except FileExistsError:
                pass
            except OSError:  # a disk without links
                if not path.exists():
                    os.replace(temporary, path)
    return regular(path).read_bytes()


def made(folder: Path) -> Path:
    """A folder, made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # what file systems such as /proc say, which do not make folders
        raise WhenceError(f"{error.filename}: no folder can be made there", accepted="another folder") from error
    except (FileExistsError, NotADirectoryError) as error:
        told = f"{error.filename}: {error.strerror}; a folder is needed there"
        raise WhenceError(told, accepted="another one") from error
    return folder


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A folder beside `target` to be filled and then renamed; what is left of it at the end is removed."""
    folder = name_of(target, hidden=True)
    with leftovers.in_use(folder), _full_disk_told(target):
        shutil.rmtree(folder, ignore_errors=True)
        made(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _written_beside(path: Path) -> Iterator[Path]:
    """A temporary name beside a file, of this process alone; nothing is left under it."""
    made(path.parent)
    temporary = name_of(path)
    with leftovers.in_use(temporary), _full_disk_told(path):
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _full_disk_told(path: Path) -> Iterator[None]:
    try:
        yield
    except WhenceError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        hidden = HIDDEN.search(str(error))  # SafetensorError, shutil.Error
        why = FULL.get(int(hidden[1]) if number is None and hidden else number or 0)
        if why is None:
            raise
        raise WhenceError(f"{why}: could not write {path}; free some space and run again to go on") from error


FORMAT_VERSION = 1


def bytes_digest(content: bytes | memoryview) -> str:
    """sha256, hex."""
    return hashlib.sha256(content).hexdigest()


def pieces_digest(pieces: Iterable[bytes | memoryview]) -> str:
    """sha256 of pieces one after the other, hex."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def file_digest(file: Path | io.BytesIO) -> str:
    """sha256 of the bytes of a file, on disk or in memory, hex. Read once for as long as a file stays as it is."""
    if isinstance(file, io.BytesIO):
        return bytes_digest(file.getbuffer())
    try:
        at = regular(file).stat()
        state = (at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns)
        return _file_digest(file.resolve(), state)
    except OSError as error:
        raise WhenceError(f"{file}: cannot be read ({error.strerror}); make it readable or remove it") from error


@lru_cache(maxsize=100_000)
def _file_digest(file: Path, state: tuple[int, ...]) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def files_digest(paths: Iterable[Path], names: bool = False) -> str:
    """One digest of several files in this order.

    Args:
        paths: of the files.
        names: whether it also depends on what the files are called.
    """
    parts = ((path.name.encode() if names else b"") + bytes.fromhex(file_digest(path)) for path in paths)
    return bytes_digest(b"".join(parts))


def write_bytes(path: Path, content: bytes, anew: bool = False) -> None:
    """A file that appears whole, with this content; one that has it is left alone: a finished run may be read-only.

    anew: whether it is written all the same.
    """
    if not anew and path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    with writing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: object, ordered: bool = False) -> None:
    """A JSON file of ours, with the checksum of what it says (see `jsons`).

    Args:
        path: of the file.
        value: what it says.
        ordered: whether the order of its fields means something.
    """
    write_bytes(path, _json(path, value, ordered))


def note_once(path: Path, value: object) -> Any:
    """What a JSON file says from now on (see `write_once`)."""
    write_once(path, _json(path, value))
    return read_json(path)


def _json(path: Path, value: object, ordered: bool = False) -> bytes:
    text = plain_text(value, ordered)
    return sealed(text, _checksum(path, text))


def _checksum(path: Path, text: bytes) -> str:
    return pieces_digest([os.fsencode(path.name), b"\n", text])


def text_of(path: Path, accepted: str) -> str:
    """The text of a file that people write: UTF-8, also with the byte order mark that editors on Windows put first.

    Args:
        path: the file.
        accepted: what it should hold, for the refusal.
    """
    try:
        return regular(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise WhenceError("there is no such file", str(path), accepted) from None
    except (OSError, UnicodeDecodeError) as error:
        raise WhenceError(f"cannot be read as text ({error})", str(path), accepted) from None


AGAIN, ANOTHER = "remove it to compute it again", "save or download it again"


def read_json(path: Path, expected: Any = Any, otherwise: str = AGAIN) -> Any:
    """What a JSON file of ours holds, without its checksum; one that is not what was written is refused.

    Args:
        path: of the file.
        expected: the type of what it holds, such as a TypedDict (see `jsons.unexpected`).
        otherwise: what to do where it is refused.
    """
    value, content = _parsed(path, LARGEST, otherwise, strict=True)
    refuse_unexpected(_unsealed(value, content, path, otherwise), expected, str(path), otherwise)
    return value


def read_object(path: Path, expected: Any = dict) -> dict[str, Any]:
    """The object that a JSON file holds which others wrote: as `save_pretrained` does, for instance."""
    value, content = _parsed(path, LARGEST_OF_OTHERS, ANOTHER)
    if not isinstance(value, dict):
        raise WhenceError(f"{path}: holds a {type(value).__name__}, not a JSON object; {ANOTHER}")
    if seal_of(content) is not None:  # a file of ours that a model was given with
        _unsealed(value, content, path, ANOTHER)
    refuse_unexpected(value, expected, str(path), ANOTHER)
    return value


def _parsed(path: Path, largest: int, otherwise: str, strict: bool = False) -> tuple[Any, bytes]:
    """What a file says, and its text."""
    try:
        size = regular(path).stat().st_size
        if size > largest:
            raise WhenceError(f"{size:,} bytes are too many for a JSON file", str(path), f"at most {largest:,} bytes")
        content = path.read_bytes()
        return parsed(content, strict), content
    except (OSError, Malformed) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise WhenceError(f"{path}: cannot be read as JSON ({why}); {otherwise}") from None


def _unsealed(value: Any, content: bytes, path: Path, otherwise: str) -> object:
    """The value, in place, without its checksum, which is that of its name and its text."""
    if isinstance(value, dict) and CHECKSUM in value:
        seal = seal_of(content)
        # Earlier versions wrote the digest of the text alone.
        if seal is None or seal[1] not in (_checksum(path, seal[0]), bytes_digest(seal[0])):
            told = "its content does not match its checksum: it was changed, damaged or renamed"
            raise WhenceError(told, str(path), otherwise)
        del value[CHECKSUM]
    return value


@contextmanager
def telling(path: Path, otherwise: str = AGAIN) -> Iterator[None]:
    """Around what makes settings of what a file says: whatever it cannot be is told of the file.

    Args:
        path: of the file.
        otherwise: what to do with it.
    """
    try:
        yield
    except WhenceError as error:
        if str(path) in str(error):
            raise
        raise WhenceError(str(error), str(path), error.accepted or otherwise) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise WhenceError(f"it holds what whence does not write there ({why})", str(path), otherwise) from error


def differences(expected: Mapping[str, object], found: Mapping[str, object], path: str = "") -> list[str]:
    """The fields in which two descriptions differ, each as 'field: found x, expected y'.

    Args:
        expected: one description.
        found: the other.
        path: of the descriptions inside others, ending with a dot.
    """
    if expected.get("is") != found.get("is"):  # of two classes no field is compared
        return [f"{path.rstrip('.')}: found {found.get('is')}, expected {expected.get('is')}"]
    lines = []
    for name in sorted(expected.keys() | found.keys()):
        a, b = expected.get(name), found.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{path}{name}.")
        elif a != b:
            lines.append(f"{path}{name}: found {b!r}, expected {a!r}")
    return lines


def readable(path: Path, expected: Any = Any) -> dict[str, Any]:
    """A manifest of this format version or an older one.

    Args:
        path: of the file.
        expected: the type of what it holds, once its version is known.
    """
    found = read_json(path)
    number = found.get("format_version") if isinstance(found, dict) else None
    if not whole(number):
        raise WhenceError(f"{path}: not written by whence (no format_version); choose another output folder")
    if number > FORMAT_VERSION:
        raise WhenceError(f"{path}: written by a newer whence (format {number}); upgrade to read it")
    refuse_unexpected(found, expected, str(path), AGAIN)
    return cast("dict[str, Any]", found)


def is_beside(name: str) -> bool:
    """Whether a name in a file means something in the folder of that file, and leads nowhere else."""
    return Path(name).name == name and name not in ("", ".", "..") and "\\" not in name


def move_in(source: Path, target: Path) -> None:
    """Rename, or leave what is there: another process that does the same work was faster, and its bytes are the same."""
    try:
        if not target.exists():
            source.rename(target)
    except OSError:
        if not target.exists():
            raise
    if source.is_dir():
        shutil.rmtree(source)

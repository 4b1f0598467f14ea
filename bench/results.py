"""Rows of the benchmark: what one carries, how results are written and read, and their table.

A result is one JSON object: the conditions of the run (`bench.conditions`), "command",
"bandwidth_gb_s" and "peak_tflop_s" as measured in that run, "rows", and where there are any
"layers", "curves" and the "absent" contenders. A CSV file of the rows stands beside it. Result
files are append-only.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .conditions import stamp


class Row(TypedDict):
    """One contender on one subject; what does not apply, or was not measured, is None."""

    kind: str  # kernel, conv, block, model or train
    subject: str  # "resnet50", "256-64, 56x56"
    contender: str
    mode: str | None  # train or infer
    batch: int | None
    size: int | None  # pixels per side of the image or of the block's input
    dtype: str | None  # "float32"
    amp: bool | None
    layout: str | None  # nhwc or nchw
    backend: str | None
    memory: str | None
    level: str | None
    device: str | None  # cpu or cuda
    allocator: str | None  # "kept" where malloc was told to keep freed memory
    ms: float | None  # median of the rounds, per step
    low: float | None  # its quartiles
    high: float | None
    rounds: int | None
    images_per_s: float | None
    peak_bytes: int | None
    saved_bytes: int | None
    flops: int | None  # per step, as are the bytes that it cannot but move
    bytes: int | None
    bound_ms: float | None  # the roofline: what bytes and flops take at the measured peaks
    share: float | None  # bound_ms / ms
    speedup: float | None  # over eager, or the first contender
    parity: str | None  # "ok" or "failed: ..."
    note: str | None


COLUMNS = tuple(Row.__annotations__)
_NAMED = ("kind", "subject", "contender")
_SETTING = ("kind", "subject", "mode", "size", "dtype", "amp", "device", "allocator")


def row(kind: str, subject: str, contender: str, **values: Any) -> Row:
    """A row with every key; rate and share are worked out where ms, batch and bound_ms are given.

    Raises:
        TypeError: for a key that rows do not have.
    """
    if unknown := sorted(set(values) - set(COLUMNS)):
        raise TypeError(f"values must be among {', '.join(COLUMNS)}, got {', '.join(unknown)}")
    full = dict.fromkeys(COLUMNS) | {"kind": kind, "subject": subject, "contender": contender}
    full |= values
    if ms := full["ms"]:
        if full["images_per_s"] is None and full["batch"]:
            full["images_per_s"] = full["batch"] / ms * 1e3
        if full["share"] is None and full["bound_ms"]:
            full["share"] = full["bound_ms"] / ms
    return cast(Row, full)


def with_speedups(rows: Iterable[Row]) -> list[Row]:
    """The rows with their speedup over "eager", or over the first timed contender of a setting.

    Times per image are compared: where memory forced a smaller batch on one contender, its rate
    still stands beside that of eager at another batch.
    """
    kept = list(rows)
    timed = [one for one in kept if one["ms"]]
    eager = [one for one in timed if one["contender"] == "eager"]

    def speedup(one: Row) -> float | None:
        if not one["ms"]:
            return None
        baselines = [other for other in (*eager, *timed) if setting(other) == setting(one)]
        if baselines[0]["contender"] != "eager" or any(_alike(one, other) for other in eager):
            baselines = [other for other in baselines if _alike(one, other)]
        return _per_image(baselines[0]) / _per_image(one)

    return [cast(Row, {**one, "speedup": speedup(one)}) for one in kept]


def setting(one: Row) -> tuple[Any, ...]:
    """What contenders share that are compared with one another; the batch may differ."""
    fields: Mapping[str, object] = one
    return tuple(fields[key] for key in _SETTING)


def _alike(one: Row, other: Row) -> bool:
    return (setting(one), one["batch"]) == (setting(other), other["batch"])


def _per_image(one: Row) -> float:
    return cast(float, one["ms"]) / (one["batch"] or 1)


# ---------------------------------------------------------------- files


def slug(text: str) -> str:
    """A text as part of a file's name: small letters and digits between hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def name_of(found: Mapping[str, Any], kind: str, subject: str) -> str:
    """The name of a result, without an ending: <stamp>-<device>-<kind>-<subject>.

    Args:
        found: what `bench.conditions.conditions` gave.
        kind: the command, "model" for one.
        subject: the model's or the blocks' name.
    """
    parts = slug(str(found.get("gpu", found["cpu"]))), slug(kind), slug(subject)
    return "-".join([stamp(dict(found)), *filter(None, parts)])


def ready(folder: Path | str) -> Path:
    """The folder for results, made where it is missing; worth asking before hours of measuring.

    Raises:
        OSError: where it cannot be made or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise _refused("folder must be a folder that can be written to", folder, error) from error


def write(result: Mapping[str, Any], folder: Path | str, name: str) -> Path:
    """Write a result as JSON, and its rows as CSV beside it; both whole or not at all.

    Args:
        result: see this module; numbers that are not finite become null.
        folder: made where it is missing.
        name: of the files, without an ending; where another run has it, "-2", "-3" ... follows.

    Returns: the path of the JSON file.

    Raises:
        ValueError: for a name that is not a file's plain name.
        OSError: where the folder cannot be written to.
    """
    if Path(name).name != name or name.startswith(".") or not name:
        raise ValueError(f"name must be a file's name without a folder, got {name!r}")
    folder = ready(folder)
    text = json.dumps(_plain(result), indent=1, allow_nan=False) + "\n"
    table_text = as_csv(result.get("rows", []))
    free = (folder / f"{candidate}.json" for candidate in _names(name))
    return next(path for path in free if _place_both(text, table_text, path))


def write_csv(rows: Iterable[Row], path: Path | str) -> Path:
    """Write rows to a CSV file that the user named, over what was there; whole or not at all.

    Raises:
        OSError: where its folder cannot be written to, or the path is a folder.
    """
    path = Path(path)
    ready(path.parent)
    place(as_csv(rows), path, over=True)
    return path


def as_csv(rows: Iterable[Row]) -> str:
    """Rows as CSV with a header; None is an empty cell."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(cast(Any, _plain(list(rows))))
    return out.getvalue()


def read(path: Path | str) -> dict[str, Any]:
    """A result that `write` wrote; keys of a row that it lacks are None.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is not a result of this benchmark.
    """
    path = Path(path)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _refused("path must be a file that can be read", path, error) from error
    except ValueError as error:
        raise _foreign(path, f"it is not JSON: {error}") from error
    rows = result.get("rows") if isinstance(result, dict) else None
    if not isinstance(rows, list):
        raise _foreign(path, "it has no rows")
    for one in rows:
        if missing := [k for k in _NAMED if not isinstance(one, dict) or k not in one]:
            raise _foreign(path, f"a row has no {', '.join(missing)}")
    return {**result, "rows": [dict.fromkeys(COLUMNS) | one for one in rows]}


def _foreign(path: Path, why: str) -> ValueError:
    return ValueError(f"path must be a result of fastres bench, got {path}: {why}")


def _refused(rule: str, path: Path, error: OSError) -> OSError:
    return OSError(f"{rule}, got {path}: {error.strerror or error}")


def _names(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1


def _plain(value: Any) -> Any:
    """The value with null for what JSON cannot say: a loss that overflowed is still a result."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def place(content: str | bytes, path: Path, over: bool = False) -> bool:
    """Let a whole file appear at a path; False, and nothing changed, where there is one already.

    Args:
        content: text is written as UTF-8.
        path: in a folder that exists.
        over: replaces what is there.

    Raises:
        OSError: where it cannot be written.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        # mkstemp keeps others out; what remains is as open as any file that the user makes.
        os.chmod(temporary, 0o666 & ~_umask())
        if over:
            os.replace(temporary, path)
            return True
        return _claim(Path(temporary), path)
    except OSError as error:
        raise _refused("path must be a file that can be written", path, error) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _place_both(text: str, table_text: str, path: Path) -> bool:
    """JSON at a path and CSV beside it; False, and nothing changed, where one is there already."""
    # The ending is appended: a version's dot in the name is not the start of one.
    beside = path.with_name(path.name.removesuffix(".json") + ".csv")
    if not place(table_text, beside):
        return False
    placed = False
    try:
        placed = place(text, path)
    finally:
        if not placed:
            beside.unlink()
    return placed


def _claim(temporary: Path, path: Path) -> bool:
    """Give a finished file its name, which no other may have."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if path.exists():
            return False
        os.replace(temporary, path)  # a file system without links
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---------------------------------------------------------------- the table on the terminal


#: What `_figures` yields. "roofline" is the share of the bound that was reached.
HEADINGS = ("batch", "img/s", "ms ± spread", "peak", "saved", "roofline", "speedup", "parity")


def table(rows: Iterable[Row], title: str | None = None) -> Table:
    """The rows for the terminal: rate, time, memory, share of the roofline, speedup, parity.

    What failed parity shows no speed; a loss is marked as clearly as a win. Columns that no row
    fills are left out, and remarks stand below the table.
    """
    kept = list(rows)
    lines = [list(_figures(one)) for one in kept]
    filled = [i for i in range(len(HEADINGS)) if any(line[i].plain != "-" for line in lines)]
    out = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD,
                padding=(0, 1, 0, 0), show_edge=False)  # fmt: skip
    out.add_column("contender", overflow="fold", min_width=9)
    for i in filled:
        out.add_column(HEADINGS[i], justify="right", overflow="fold")
    last = None
    for one, line in zip(kept, lines, strict=True):
        if last != (last := setting(one)):
            out.add_row(Text(subject_of(one), style="bold"))
        out.add_row(Text(one["contender"]), *(line[i] for i in filled))
    out.caption = Text("\n".join(_remarks(kept))) or None
    return out


def _remarks(rows: Sequence[Row]) -> Iterator[str]:
    """Every note once, with the contenders that it is about."""
    about: dict[str, dict[str, None]] = {}
    for one in rows:
        if note := _note(one):
            about.setdefault(note, {})[one["contender"]] = None
    for note, names in about.items():
        everyone = len(names) == len({one["contender"] for one in rows}) > 1
        yield f"all: {note}" if everyone else f"{', '.join(names)}: {note}"


def subject_of(one: Row) -> str:
    """What a row is about: subject, mode, and where memory comes from."""
    return ", ".join(filter(None, (one["subject"], way_of(one))))


def way_of(one: Row) -> str:
    """Mode, and where memory comes from if not as it does by itself."""
    allocator = one["allocator"] and f"freed memory {one['allocator']}"
    return ", ".join(filter(None, (one["mode"], allocator)))


def _figures(one: Row) -> Iterator[Text]:
    yield Text(_number(one["batch"], "d"))
    yield Text(_number(one["images_per_s"], ",.1f"))
    yield Text(_time(one))
    yield Text(memory_text(one["peak_bytes"]))
    yield Text(memory_text(one["saved_bytes"]))
    yield Text(_number(one["share"], ".0%"))
    speedup = one["speedup"]
    style = "" if speedup is None else "green" if speedup > 1 else "red" if speedup < 1 else ""
    yield Text("-" if speedup is None else f"{speedup:.2f}x", style=style)
    if one["parity"] is None:
        yield Text("-")
    else:
        yield Text("✗", style="bold red") if failed(one) else Text("✓", style="green")


def failed(one: Row) -> bool:
    """Whether its numbers were not stock torch's."""
    return one["parity"] not in (None, "ok")


def _note(one: Row) -> str:
    parity = f"parity {one['parity']}" if failed(one) else None
    return "; ".join(filter(None, (parity, one["note"])))


def _time(one: Row) -> str:
    """The median and half the interquartile range, with digits that fit the size."""
    ms, low, high = one["ms"], one["low"], one["high"]
    if ms is None:
        return "-"
    digits = 2 if ms >= 1 else 4
    spread = "" if low is None or high is None else f" ± {(high - low) / 2:.{digits}f}"
    return f"{ms:,.{digits}f}{spread}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def memory_text(count: int | None) -> str:
    """Bytes as kB, MB or GB (powers of 1000), or "-"."""
    if count is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"

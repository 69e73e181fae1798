"""Rows from local JSON, JSON lines, CSV and Parquet files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from plora.data.mistakes import nearest

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
# The names under which `datasets.load_dataset` reads local files.
FORMATS = ("json", "csv", "parquet")
_READ_WHOLE_BYTES = 64 * 2**20
_LONGEST_FIELD = 2**31 - 1

Row = Mapping[str, Any]


def is_local(source: Any, data_files: Any) -> bool:
    """Whether ``source`` and ``data_files`` mean files of this machine rather than the hub."""
    if source is None or source in FORMATS:
        return data_files is not None
    text = str(source)
    return text.startswith(("/", "./", "../", "~")) or Path(text).suffix in SUFFIXES or Path(text).exists()


def find(source: Any, data_files: Any) -> dict[str, list[Path]]:
    """Files by split; the split ``""`` stands for every name.

    A folder's splits are its files' stems; a ``data_files`` mapping names them itself.

    Raises:
        ValueError: if a file is missing or of an unknown kind.
    """
    folder = Path()
    if source is not None and source not in FORMATS:
        folder = Path(str(source)).expanduser()
        if data_files is None:
            if folder.is_dir():
                found = {p.stem: [p] for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES}
                if not found:
                    raise ValueError(f"the folder {str(source)!r} holds no {', '.join(SUFFIXES)} file")
                return found
            return {"": _existing(Path(), [source])}
        if not folder.is_dir():
            raise ValueError(f"{str(source)!r} is not a folder, so it cannot hold data_files {data_files!r}")
    if isinstance(data_files, Mapping):
        return {str(k): _existing(folder, v if isinstance(v, list) else [v]) for k, v in data_files.items()}
    return {"": _existing(folder, data_files if isinstance(data_files, list) else [data_files])}


def choose(files: Mapping[str, list[Path]], split: str) -> list[Path]:
    """The files of ``split``.

    Raises:
        ValueError: if there is no such split; it names those that there are.
    """
    chosen = files.get(split, files.get(""))
    if chosen is None:
        raise ValueError(f"there is no split {split!r}; {nearest(split, files)}")
    return chosen


def read(path: Path) -> list[Row]:
    """All rows of a file. Callers share them and must not change them.

    Raises:
        ValueError: if the file cannot be read as what its name says; it names file and line.
    """
    stat = path.stat()
    return _read(path, stat.st_mtime_ns, stat.st_size)


def peek(path: Path) -> tuple[list[str], int | None]:
    """Columns and number of rows (None: not known) of a file, without reading all of a large one."""
    if path.suffix == ".parquet":
        metadata = _parquet(path)
        return list(metadata.schema_arrow.names), metadata.metadata.num_rows
    if path.suffix == ".json" or path.stat().st_size <= _READ_WHOLE_BYTES:
        rows = read(path)
        return list(rows[0]) if rows else [], len(rows)
    first = next(_rows(path), None)
    return (list(first), None) if first else ([], 0)


@lru_cache(maxsize=8)
def _read(path: Path, mtime_ns: int, size: int) -> list[Row]:
    return list(_rows(path))


def _existing(folder: Path, names: list[Any]) -> list[Path]:
    paths: list[Path] = []
    for name in names:
        path = folder / Path(str(name)).expanduser()
        matches = sorted(path.parent.glob(path.name)) if "*" in path.name else [path] if path.is_file() else []
        if not matches:
            siblings = [p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES] if path.parent.is_dir() else []
            hint = f"; {nearest(path.name, siblings)}" if siblings else f" (looked from {Path.cwd()})"
            raise ValueError(f"the file {str(path)!r} does not exist{hint}")
        paths += matches
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{str(path)!r} is none of {', '.join(SUFFIXES)}: convert it to one of them")
    return paths


def _rows(path: Path) -> Iterator[Row]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path).read().to_pylist()
        elif path.suffix in (".csv", ".tsv"):
            yield from _csv_rows(path)
        else:
            yield from _json_rows(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it") from error


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(4096).lstrip()[:1]
        file.seek(0)
        if path.suffix == ".json" and start == "[":
            yield from _json_list(path, file.read())
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not valid JSON ({error.msg} at column {error.colno}): "
                    f"{line.strip()[:80]!r}. Each line must hold one row as an object; a .json file may hold one list "
                    "of them instead"
                ) from error
            yield _row(path, f"line {number}", row)


def _json_list(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno} is not valid JSON: {error.msg} at column {error.colno}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield _row(path, f"item {number}", row)


def _row(path: Path, place: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{path}, {place} is {str(row)[:80]!r}, but a row is an object of columns")
    return row


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        # Python's own limit is 128 KiB, which a long document exceeds.
        csv.field_size_limit(_LONGEST_FIELD)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num} has another number of fields than the header "
                    f"({', '.join(reader.fieldnames or [])}): quote fields that hold the separator"
                )
            yield row


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error

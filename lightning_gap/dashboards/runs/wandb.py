"""Offline runs of W&B: ``run-*.wandb``, a log of records."""

import json
import math
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_gap.dashboards.runs.run import PICTURES, Format, Row, Run, RunError, clock, flat, series

__all__ = ["WANDB", "wandb_records"]


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of an offline run's file, ``wandb_internal_pb2.Record``; an unfinished one ends early.

    Args:
        path: The ``run-*.wandb`` file: a log of records in blocks of 32 KiB, each part with its checksum.

    Raises:
        RunError: wandb is not installed, or the file is not one of its own, or damaged.
    """
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError as error:
        raise RunError(f"reading {path} needs wandb: pip install 'lightning_gap[wandb]'") from error
    raw = path.read_bytes()
    if raw[:4] != b":W&B" or len(raw) < 7:
        raise RunError(f"{path} is not an offline run of W&B: it does not begin as one")
    at, parts = 7, b""
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        checksum, length, part = struct.unpack("<IHB", raw[at : at + 7])
        if part == 0:
            at += left
            continue
        data = raw[at + 7 : at + 7 + length]
        if len(data) < length:
            return  # still written, or cut off with its process
        if zlib.crc32(data, zlib.crc32(bytes([part]))) != checksum:
            raise RunError(f"{path} is damaged at byte {at}: copy it again, or leave this run out")
        at += 7 + length
        parts = data if part in (1, 2) else parts + data
        if part in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def _read(path: Path) -> Run:
    (file,) = sorted(path.glob("run-*.wandb"))[-1:]
    name, rows, times = "", list[Row](), list[tuple[float, float]]()
    config: dict[str, Any] = {}
    for record in wandb_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            name = record.run.display_name or record.run.run_id
            config |= _items(record.run.config.update)
        elif kind == "config":
            config |= _items(record.config.update)
        elif kind == "history":
            # Deeper keys are the parts of a table or an image.
            values = _items(item for item in record.history.item if len(item.nested_key) <= 1)
            numbers = {key: float(x) for key, x in values.items() if isinstance(x, int | float)}
            step = numbers.pop("trainer/global_step", numbers.get("_step", math.nan))
            if "_timestamp" in numbers:
                times.append((step, numbers["_timestamp"]))
            rows.append((step, {key: x for key, x in numbers.items() if not key.startswith("_")}))
    pictures = {}
    images = path / "files" / "media" / "images"
    found = [
        (match, picture)
        for pattern in PICTURES
        for picture in images.rglob(pattern)
        if (match := re.fullmatch(r"(.*)_(\d+)_[0-9a-f]+", picture.stem))
    ]
    for match, picture in sorted(found, key=lambda each: int(each[0][2])):
        key = (picture.parent.relative_to(images) / match[1]).as_posix()
        pictures[key] = picture.read_bytes()
    config = {key: value for key, value in flat(config).items() if not key.startswith("_wandb")}
    return Run(name or file.stem, WANDB.kind, path, config, series(rows), pictures, clock(times))


def _items(items: Iterable[Any]) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


WANDB = Format("W&B", r"run-.*\.wandb", _read, whole=True)

"""What goes online of a file that Weights & Biases kept: its whole records, and the rows that it lost.

A kill tears the end of the file off, and a fault of the disk takes a record out of its middle; ``metrics.jsonl`` has
all rows in any case. What W&B has a later step of, it takes no more, so missing rows stand where their steps belong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from paws_hpc.engine.tracking import Row
from paws_hpc.engine.wandb_file import parse
from paws_hpc.engine.wandb_rows import position, shown, summary
from paws_hpc.stages.catalogue import catalogue


def mended(contents: Sequence[bytes], rows: Sequence[Row], *, known: int, is_last: bool, is_done: bool) -> list[bytes]:
    """The records to upload; none if they do not say of which run they are, and W&B takes no such file.

    Args:
        contents: whole records of the file.
        rows: of the stage's ``metrics.jsonl``.
        known: W&B's step up to which everything is online.
        is_last: no later file can bring what this one lacks.
        is_done: the stage ended well, whether W&B could still write that down or not.
    """
    if not holds_run(contents):
        return []
    records = [parse(content) for content in contents]
    held = {record.history.step.num for record in records if record.HasField("history")}
    limit = max(map(position, rows), default=known) if is_last else max(held, default=known)
    missing = sorted(
        (row for row in rows if known < position(row) <= limit and position(row) not in held), key=position
    )
    uploaded: list[bytes] = []
    for content, record in zip(contents, records, strict=True):
        step = record.history.step.num if record.HasField("history") else None
        if step is not None and step <= known:
            continue
        while missing and (record.HasField("exit") or (step is not None and position(missing[0]) < step)):
            uploaded.append(_history(missing.pop(0)))
        uploaded.append(content)
    uploaded += map(_history, missing)
    if is_last and not any(record.HasField("exit") for record in records):
        uploaded += _end(rows, is_done=is_done)
    return uploaded


def holds_run(contents: Sequence[bytes]) -> bool:
    """Whether records say of which run they are; W&B takes no others."""
    return any(parse(content).HasField("run") for content in contents)


def _history(row: Row) -> bytes:
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415 - slow to import

    record: Any = wandb_internal_pb2.Record()
    record.history.step.num = position(row)
    for name, value in ({"_step": position(row)} | shown(row)).items():
        record.history.item.add(nested_key=[name], value_json=json.dumps(value))
    content: bytes = record.SerializeToString()
    return content


def _end(rows: Sequence[Row], *, is_done: bool) -> list[bytes]:
    """What the follower would have written: the summary of all rows, and that the stage ended well if it did."""
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415 - as above

    last: Any = wandb_internal_pb2.Record()
    for name, value in summary(list(rows), {known.pattern: known.best for known in catalogue().values()}).items():
        last.summary.update.add(nested_key=[name], value_json=json.dumps(value))
    ended: Any = wandb_internal_pb2.Record()
    ended.exit.exit_code = 0
    return [record.SerializeToString() for record in ([last, ended] if is_done else [last])]

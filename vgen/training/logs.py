"""Logs for TensorBoard, whose loss does not stop a run."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from diffusers.utils import logging
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from vgen.io.errors import describe

logger = logging.get_logger(__name__)


class Logs:
    """Writes scalars to a new event file.

    Entries that cannot be written, for example because the disk is full, are lost: there is one warning, and later
    entries are written again once that is possible. torch's `SummaryWriter` raises the error of its thread, and
    leaves an incomplete record, after which TensorBoard reads no more of the file.

    Args:
        folder: Folder of the event files.
        first_step: First step to be logged. TensorBoard does not show entries from this step on in older files.
    """

    def __init__(self, folder: Path, first_step: int):
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{now % 10**9:09d}"
        self.path = folder / name
        self._header = _records(
            [
                Event(step=first_step, file_version="brain.Event:2"),
                Event(step=first_step, session_log=SessionLog(status=SessionLog.START)),
            ]
        )
        self._size, self._failing = 0, False

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Writes values by name; they are in the file when this returns."""
        records = _records(Event(step=step, summary=scalar(name, value)) for name, value in values.items())
        if self._size == 0:
            records = self._header + records
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(records)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, self._size)
            if not self._failing:
                logger.warning(f"{self.path} cannot be written, training goes on without logs: {describe(error)}")
            self._failing = True
        else:
            self._size, self._failing = self._size + len(records), False


def _records(events: Iterable[Event]) -> bytes:
    """Events in the format of event files."""
    file = io.BytesIO()
    writer = RecordWriter(file)
    for event in events:
        event.wall_time = time.time()
        writer.write(event.SerializeToString())
    return file.getvalue()

"""Logs for TensorBoard, whose loss does not stop a run, and for the trackers of accelerate."""

from __future__ import annotations

import io
import os
import socket
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from diffusers.utils import logging
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from vgen.data.video_writer import write_video
from vgen.io.errors import describe

logger = logging.get_logger(__name__)


class Logs:
    """Writes scalars and videos to a new event file.

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
        self._write([scalar(name, value) for name, value in values.items()], step)

    def write_video(self, name: str, frames: np.ndarray, frame_rate: float, step: int) -> None:
        """Writes frames, uint8 `(f, h, w, 3)`, which TensorBoard plays as an image."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.gif"
            write_video(frames, path, frame_rate)
            height, width = frames.shape[1:3]
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        self._write([Summary(value=[Summary.Value(tag=name, image=image)])], step)

    def _write(self, summaries: Iterable[Summary], step: int) -> None:
        records = _records(Event(step=step, summary=summary) for summary in summaries)
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


def tracker_names(log_with: str | None) -> list[str]:
    """The trackers of a setting `log_with`, without TensorBoard, for which `Logs` writes.

    Raises:
        ValueError: One is unknown or not installed.
    """
    names = [name.strip() for name in (log_with or "").split(",") if name.strip() not in ("", "tensorboard")]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"log_with must have names of accelerate's trackers ({known}), got {name!r}")
        if name in LoggerType.list() and name not in map(str, get_available_trackers()):
            raise ValueError(f"log_with={name} needs the package {name.replace('_', '-')}: pip install it first")
    return names


def track_video(tracker: GeneralTracker, name: str, path: Path, frames: np.ndarray, step: int) -> None:
    """Gives a video to wandb, or up to eight of its frames to another tracker that takes images."""
    if tracker.name == "wandb":
        import wandb

        tracker.log({name: wandb.Video(str(path))}, step=step)
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: frames[:: -(-len(frames) // 8)]}, step=step)


def _records(events: Iterable[Event]) -> bytes:
    """Events in the format of event files."""
    file = io.BytesIO()
    writer = RecordWriter(file)
    for event in events:
        event.wall_time = time.time()
        writer.write(event.SerializeToString())
    return file.getvalue()

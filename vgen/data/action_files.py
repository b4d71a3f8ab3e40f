"""Files with the actions of a video: an array `(f, a)`, one row for each frame; that of frame 0 is not read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vgen.data.augment import Augmentation

ACTION_COLUMN = "actions"
"""Column of a metadata file that names the file with a video's actions."""
ACTION_SUFFIXES = (".npz", ".npy")


def read_actions_file(path: Path) -> np.ndarray:
    """Actions `(f, a)`, float32. NaN stands for unknown actions; `(f,)` is read as `(f, 1)`.

    Args:
        path: A `.npy` file, or a `.npz` file with an array named `actions`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has no actions.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix.lower() not in ACTION_SUFFIXES:
        raise ValueError(f"{path} must be one of {', '.join(ACTION_SUFFIXES)}")
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            actions = found if isinstance(found, np.ndarray) else found["actions"]
        actions = actions.astype(np.float32)
    except (ValueError, KeyError, OSError, EOFError, TypeError) as error:
        raise ValueError(f"{path} contains no numeric array of actions: {error}") from error
    actions = actions[:, None] if actions.ndim == 1 else actions
    if actions.ndim != 2 or not actions.shape[1]:
        raise ValueError(f"{path}: actions must have shape (frames, channels), got {actions.shape}")
    if np.isinf(actions).any():
        raise ValueError(f"{path}: actions must be finite, or NaN if they are unknown")
    return actions


def check_widths(paths: Iterable[Path]) -> int:
    """The number of channels of the actions in files, 0 without files.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file has no actions, or they have different numbers of channels.
    """
    widths = {read_actions_file(path).shape[1]: path for path in sorted(paths)}
    if len(widths) > 1:
        found = " and ".join(f"{width} in {path}" for width, path in list(widths.items())[:2])
        raise ValueError(f"all actions must have the same number of channels, got {found}")
    return next(iter(widths), 0)


def find_actions(parent: Path, stem: str, names: Iterable[str]) -> Path | None:
    """The file with the actions of a video of a folder, which has the same name with another suffix."""
    files = set(names)
    return next((parent / f"{stem}{suffix}" for suffix in ACTION_SUFFIXES if f"{stem}{suffix}" in files), None)


def cut_actions(
    path: Path, num_frames: int, own_rate: float | None, frame_rate: float, first: int, indices: list[int], real: int
) -> np.ndarray:
    """Actions of a clip `(f, a)`; those of padding are unknown.

    Args:
        path: Their file.
        num_frames: Number of frames of the whole video.
        own_rate: Frames per second of the video.
        frame_rate: Those of the clip's frames, before `indices` chose some.
        first: Number of the first frame in the video that `indices` count from.
        indices: Indices of the clip's frames.
        real: How many of them are real.

    Raises:
        ValueError: There is not one action for each frame, or the clip leaves out frames of the video.
    """
    actions = read_actions_file(path)
    if len(actions) != num_frames:
        raise ValueError(f"{path} has actions for {len(actions)} frames, and the video has {num_frames}")
    consecutive = all(after - before == 1 for before, after in zip(indices[: real - 1], indices[1:real], strict=True))
    if not consecutive or own_rate is None or not math.isclose(frame_rate, own_rate, rel_tol=1e-3):
        own = "its own" if own_rate is None else f"{own_rate:g}"
        raise ValueError(
            f"{path}: clips of a video with actions must have all of its frames, at {own} per second and with stride 1"
        )
    cut = np.full((len(indices), actions.shape[1]), np.nan, dtype=np.float32)
    cut[:real] = actions[first + indices[0] : first + indices[0] + real]
    return cut


def check_augmentation(augmentation: Augmentation, path: Path) -> None:
    """Checks that an augmentation leaves the meaning of actions as it is.

    Raises:
        ValueError: It flips, rotates or reverses clips.
    """
    changes = [name for name in ("flip", "rotate", "reverse") if getattr(augmentation, name)]
    if changes:
        raise ValueError(
            f"{path} has actions, which would not be changed with the pictures: set {changes[0]}=0 in the augmentation"
        )

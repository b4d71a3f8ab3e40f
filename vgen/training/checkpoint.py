"""Atomic checkpoints, and the exponential moving average (EMA) of the weights that is saved in them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import DistributedType, patch_environment
from accelerate.utils import load as load_weights_only
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as sharded_checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from vgen.io.atomic import atomic_directory, partial_path, remove_directory, writing
from vgen.io.errors import one_line, without_warnings
from vgen.io.records import check_seal, read_json, seal
from vgen.processes import from_main_process
from vgen.training.best import BestWeights

logger = logging.get_logger(__name__)

_RECORD = "record.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class EMAWeights:
    """The exponential moving average (EMA) of a network's weights: diffusers' `EMAModel`.

    Each process averages and saves its part of weights that `fully_shard` divided. The main process saves the average
    of whole weights.

    Args:
        network: The network whose parameters are averaged.
        decay: The largest decay. Early steps use less, `(1 + step) / (10 + step)`. With 0, the average equals the
            weights.
    """

    def __init__(self, network: nn.Module, decay: float):
        self._weights = dict(network.named_parameters())
        self._sharded = any(isinstance(weight, DTensor) for weight in self._weights.values())
        self._average = EMAModel(self._parts(), decay=decay, foreach=True)

    def _parts(self) -> list[Tensor]:
        """This process's parts of the weights, as views."""
        return [
            weight.to_local().detach().requires_grad_(weight.requires_grad) if isinstance(weight, DTensor) else weight
            for weight in self._weights.values()
        ]

    def step(self) -> None:
        """Updates the average after an optimizer step."""
        self._average.step(self._parts())

    def __enter__(self) -> None:
        """Puts the average into the network."""
        self._average.store(self._parts())
        self._average.copy_to(self._parts())

    def __exit__(self, *error: object) -> None:
        """Restores the network's own weights."""
        self._average.restore(self._parts())

    def _tensors(self) -> dict[str, Tensor]:
        """The average by name, in tensors that share its memory; divided like the weights."""
        tensors: dict[str, Tensor] = {}
        for (name, weight), average in zip(self._weights.items(), self._average.shadow_params, strict=True):
            tensors[name] = average.detach()
            if isinstance(weight, DTensor):
                tensors[name] = DTensor.from_local(
                    tensors[name], weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
                )
        return tensors

    def save(self, folder: Path, is_main_process: bool) -> None:
        """Writes the average to a folder; all processes must call it."""
        if self._sharded:
            _save_sharded(self._tensors(), folder / "ema")
        elif is_main_process:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}
            save_file(tensors, folder / "ema.safetensors")

    def load(self, folder: Path, step: int) -> None:
        """Reads the average of a run after `step` optimizer steps."""
        if self._sharded:
            _load_sharded(self._tensors(), folder / "ema")
        else:
            saved = load_file(folder / "ema.safetensors")
            for name, weight in self._tensors().items():
                weight.copy_(saved[name])
        self._average.optimization_step = step


class NoEMA:
    """Replaces `EMAWeights` where no average is kept: all methods do nothing, and the last weights are the result."""

    def step(self) -> None:
        """Does nothing."""

    def __enter__(self) -> None:
        """Does nothing: the network keeps its weights."""

    def __exit__(self, *error: object) -> None:
        """Does nothing."""

    def save(self, folder: Path, is_main_process: bool) -> None:
        """Does nothing: the checkpoint holds the weights."""

    def load(self, folder: Path, step: int) -> None:
        """Does nothing."""


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in a run's folder as (step, path), oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    average: EMAWeights | NoEMA,
    best: BestWeights,
    schedules: Sequence[LambdaLR],
    keep_last: int,
    settings: dict[str, Any],
) -> None:
    """Saves everything that is needed to resume a run after `step` optimizer steps.

    Nothing in a checkpoint can run code when it is loaded: weights are safetensors, the rest of vgen's own state is
    JSON, and `torch.load(weights_only=True)` reads what accelerate writes.

    Args:
        accelerator: Holds the networks, optimizers and random states.
        folder: The run's folder.
        step: Number of optimizer steps done.
        average: The EMA of the weights.
        best: The best weights so far.
        schedules: The learning rate schedules.
        keep_last: Number of checkpoints to keep; older ones are deleted.
        settings: The settings that must be equal for a run to be resumed exactly.
    """
    final = folder / f"checkpoint-{step}"
    if accelerator.is_main_process:
        for leftover in folder.glob("checkpoint-*.partial"):  # of a run that was killed
            shutil.rmtree(leftover)
    # all processes write into the folder; the main process creates it and moves it into place
    folder_of_main = atomic_directory(final) if accelerator.is_main_process else nullcontext(partial_path(final))
    with writing(final), folder_of_main as partial:
        accelerator.wait_for_everyone()
        _save_states(accelerator, partial)
        average.save(partial, accelerator.is_main_process)
        best.save(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            record = {
                "settings": settings | _environment(accelerator),
                "strategy": _strategy(accelerator),
                "schedule_steps": [schedule.last_epoch for schedule in schedules],
            }
            seal(partial, _RECORD, record)
    if accelerator.is_main_process:
        for _, old in checkpoints(folder)[:-keep_last]:
            remove_directory(old)
    accelerator.wait_for_everyone()


def resume(
    accelerator: Accelerator,
    folder: Path,
    average: EMAWeights | NoEMA,
    best: BestWeights,
    schedules: Sequence[LambdaLR],
    settings: dict[str, Any],
) -> int:
    """Restores the newest undamaged checkpoint of a run; returns the number of steps done, 0 for a new run.

    Damaged checkpoints are renamed to `*.damaged` with a warning. If settings, versions, or the numbers of threads and
    processes differ from those of the checkpoint, a warning names them: the resumed run then differs from an
    uninterrupted one.

    Raises:
        ValueError: There are checkpoints, but all of them are damaged. Or another strategy or an older version wrote
            the newest one, it does not fit the networks, or a file in it could run code.
    """
    newest, error = from_main_process(_newest(folder) if accelerator.is_main_process else None)
    if error:
        raise ValueError(error)
    if newest is None:
        return 0
    step, path = newest
    record = read_json(path / _RECORD)
    if record["strategy"] != _strategy(accelerator):
        raise ValueError(
            f"{path} was written with {record['strategy']} and is resumed with it only, got {_strategy(accelerator)}"
        )
    before = record["settings"]
    now = json.loads(json.dumps(settings | _environment(accelerator)))
    changed = [
        f"{key} {before.get(key)} -> {now.get(key)}" for key in {**before, **now} if before.get(key) != now.get(key)
    ]
    if changed:
        logger.warning(f"{path} is not resumed exactly: {', '.join(changed)}")
    try:
        _load_states(accelerator, path)
        average.load(path, step)
        best.load(path)
        for schedule, done in zip(schedules, record["schedule_steps"], strict=True):
            schedule.last_epoch, schedule._step_count = int(done), int(done) + 1
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, UnpicklingError, SafetensorError) as error:
        raise ValueError(f"{path} does not fit this run or is malformed: {one_line(str(error))}") from error
    accelerator.print(f"resumed from {path} after {step} steps")
    return step


def _newest(folder: Path) -> tuple[tuple[int, Path] | None, str | None]:
    """The newest undamaged checkpoint, if any, or why a run cannot start; moves damaged ones aside."""
    for step, path in reversed(checkpoints(folder)):
        if (path / "custom_checkpoint_0.pkl").exists():
            return None, (
                f"{path} was written by an older version, with a pickle, which can run code: finish the run with that "
                "version, or choose another output_dir"
            )
        try:
            check_seal(path, _RECORD)
            return (step, path), None
        except ValueError as error:
            reason = error
        logger.warning(f"{path} is damaged ({reason}): it is renamed to *.damaged, and the previous one is used")
        shutil.rmtree(path.with_name(path.name + ".damaged"), ignore_errors=True)
        path.rename(path.with_name(path.name + ".damaged"))
    if damaged := sorted(folder.glob("checkpoint-*.damaged")):
        return None, (
            f"every checkpoint in {folder} is damaged ({', '.join(path.name for path in damaged)}): delete them to "
            "start from step 0"
        )
    return None, None


def _save_states(accelerator: Accelerator, folder: Path) -> None:
    """Writes networks, optimizers and random states; all processes must call it."""
    if accelerator.distributed_type != DistributedType.FSDP:
        with without_warnings("accelerate.utils.other"):  # tied weights are saved once, in every checkpoint
            accelerator.save_state(str(folder))
        return
    _save_sharded(_sharded_states(accelerator), folder / "sharded")
    process = accelerator.process_index
    save_accelerator_state(str(folder), [], [], [], [], process, accelerator.step, accelerator.scaler)


def _load_states(accelerator: Accelerator, folder: Path) -> None:
    """Reads what `_save_states` wrote."""
    process = accelerator.process_index
    random_states = folder / f"random_states_{process}.pkl"
    if random_states.exists():  # accelerate ignores one that it cannot read
        load_weights_only(random_states)
    if accelerator.distributed_type != DistributedType.FSDP:
        with _weights_only(accelerator.distributed_type == DistributedType.DEEPSPEED):
            accelerator.load_state(str(folder))
        return
    _load_sharded(_sharded_states(accelerator), folder / "sharded")
    load_accelerator_state(str(folder), [], [], [], [], process, accelerator.scaler)


def _sharded_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """The weights and optimizer states that `fully_shard` divided, by name, in tensors that share their memory."""
    network, optimizers = accelerator._models[0], [one.optimizer for one in accelerator._optimizers]
    once = {id(one): (name, one) for name, one in network.state_dict(keep_vars=True).items()}  # tied ones share an id
    states = {f"model.{name}": one.detach() for name, one in once.values()}
    flat = get_optimizer_state_dict(network, optimizers, options=StateDictOptions(flatten_optimizer_state_dict=True))
    states |= {f"optimizer.{name}": one for name, one in flat.items()}
    return {name: one for name, one in states.items() if isinstance(one, Tensor)}


def _save_sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes this process's parts of tensors as safetensors; all processes must call it."""
    writer = sharded_checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    sharded_checkpoint.save(tensors, storage_writer=writer)


def _load_sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    """Reads what `_save_sharded` wrote into tensors, which may be divided differently."""
    sharded_checkpoint.load(tensors, storage_reader=sharded_checkpoint.HuggingFaceStorageReader(str(folder)))


@contextmanager
def _weights_only(deepspeed: bool) -> Iterator[None]:
    """Makes every `torch.load` reject code, also those of DeepSpeed, which asks for pickles of some of its classes."""
    classes: list[Any] = []
    if deepspeed:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    with patch_environment(torch_force_weights_only_load=1), torch.serialization.safe_globals(classes):
        yield


def _strategy(accelerator: Accelerator) -> str:
    """How a checkpoint divides the weights."""
    name = accelerator.distributed_type.name
    return name if name in ("FSDP", "DEEPSPEED") else "whole weights"


def _environment(accelerator: Accelerator) -> dict[str, Any]:
    """What the rounding of floating-point numbers depends on, in addition to the settings."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
    }

"""What all training scripts share: settings, accelerator, optimizers, and every part of a step except the loss."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import yaml
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
    set_seed,
)
from diffusers.utils import logging
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import get_scheduler

from vgen.checks import check_literals
from vgen.data.video_writer import write_video
from vgen.io.atomic import write_text
from vgen.io.errors import describe
from vgen.io.settings import parse_settings
from vgen.machine import fast_precision, warn_if_slow
from vgen.processes import (
    check_shared_folder,
    check_world_size,
    drain_gloo_threads,
    from_main_process,
    locked_output_dir,
    on_cpus,
    on_several_machines,
)
from vgen.training.best import BestWeights, Goal
from vgen.training.checkpoint import EMAWeights, NoEMA, checkpoints, resume, save_checkpoint
from vgen.training.logs import Logs, track_video, tracker_names
from vgen.training.muon import KernelMuon
from vgen.training.throughput import Throughput


@dataclass(kw_only=True)
class RunConfig:
    """Settings that all training scripts have."""

    output_dir: Path
    """Folder for checkpoints, logs, samples and the result. The same command resumes an interrupted run from it."""
    init: str | None = None
    """Folder or Hub id of weights to start from; `None` starts from random weights."""
    seed: int = 0
    """All random numbers are functions of the seed, the step and the index of a sample in the batch."""
    max_steps: int = 1000
    """Number of optimizer steps of the whole run."""
    batch_size: int = 8
    """Samples per optimizer step, in total over all processes and accumulation steps."""
    gradient_accumulation_steps: int = 1
    """Number of forward and backward passes per optimizer step in each process."""
    num_workers: int | None = None
    """Number of DataLoader workers of each process; 0 prepares batches in the training process. `None` means 0 on the
    CPU, and otherwise one worker for each spare core, up to 4. Results do not depend on it."""
    gradient_checkpointing: bool = False
    """Whether to recompute activations in the backward pass, to save memory."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass: `no` (float32), `bf16` or `fp16`. `auto` is the faster of `no` and `bf16` on this
    machine; a resumed run keeps its precision."""
    tf32: bool = True
    """Whether float32 matrix products use TF32 on GPUs that have it: faster, with 10 bits of mantissa."""
    compile: bool = False
    """Whether to compile the network's repeated blocks, which takes about a minute at the start."""
    learning_rate: float = 1e-3
    """Peak learning rate of the schedule."""
    lr_schedule: str = "cosine"
    """Any schedule of `transformers.get_scheduler`. A run with `warmup_stable_decay` can be extended before its decay
    begins."""
    decay_steps: int = 0
    """Number of last steps in which `warmup_stable_decay` lowers the learning rate to zero."""
    warmup_steps: int = 100
    """Number of optimizer steps in which the learning rate rises to its peak."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`adamw`; or `muon`, which trains the weight matrices of linear layers by Muon and all other weights by AdamW."""
    muon_kernels: bool = False
    """Whether `muon` also trains the kernels of convolutions, flattened to (output channels, all other dimensions)."""
    weight_decay: float = 0.0
    """Weight decay of matrices and kernels, for both optimizers; biases and gains have none."""
    adam_beta2: float = 0.99
    """Second beta of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which is the result; 0 saves the last weights."""
    log_every: int = 10
    """Steps between two entries in the logs."""
    save_every: int = 500
    """Steps between two checkpoints."""
    keep_last: int = 2
    """Number of checkpoints to keep."""
    sample_every: int = 500
    """Steps between two evaluations with scores and samples."""
    patience: int = 0
    """Number of evaluations in a row without a better score after which the run ends. The result then has the weights
    of the best evaluation, also if the run reaches `max_steps`. 0 turns this off, and the result has the last
    weights."""
    log_with: str | None = None
    """Trackers of accelerate that get the logs and samples too, such as `wandb`, separated by commas."""
    dry_run: bool = False
    """Whether to only print the resolved settings."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        check_literals(self)
        for name in (
            "max_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "save_every",
            "sample_every",
            "keep_last",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, or null for the default, got {self.num_workers}")
        if self.patience < 0:
            raise ValueError(f"patience must be at least 0, got {self.patience}")
        if self.patience and self.sample_every > self.max_steps:
            raise ValueError(
                f"patience={self.patience} needs sample_every of at most max_steps={self.max_steps}, got "
                f"{self.sample_every}"
            )
        if bool(self.decay_steps) != (self.lr_schedule == "warmup_stable_decay"):
            raise ValueError(
                "decay_steps must be positive with lr_schedule='warmup_stable_decay' and 0 with all other schedules, "
                f"got decay_steps={self.decay_steps} with lr_schedule={self.lr_schedule!r}"
            )
        if self.optimizer == "muon" and self.mixed_precision == "fp16":
            raise ValueError(
                "optimizer=muon does not support mixed_precision=fp16, whose loss scaling allows only one optimizer: "
                "use bf16"
            )
        if self.muon_kernels and self.optimizer != "muon":
            raise ValueError(f"muon_kernels needs optimizer=muon, got optimizer={self.optimizer}")
        tracker_names(self.log_with)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


logger = logging.get_logger(__name__)
PROCESS_TIMEOUT = timedelta(hours=1)
"""How long processes wait for one that scores more samples, hashes a checkpoint, or is gone, before the run fails."""

NOT_IN_RESULTS = (
    "output_dir", "log_every", "log_with", "save_every", "keep_last", "sample_every", "patience", "held_out_latents",
    "dry_run", "num_workers",
)  # fmt: skip
"""Settings that do not affect the weights after a step."""

_SLOW_STEPS = 5
"""Number of first steps, which may compile; the progress bar estimates the time left from those after them."""

_PLAIN = (bool, int, float, str, NoneType)
"""Types of settings that every tracker stores."""

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def parse_config(config_class: type[ConfigT], description: str, args: list[str] | None = None) -> ConfigT:
    """Reads `--config recipe.yaml` and `--name value` overrides into a checked `config_class`."""
    config = parse_settings(config_class, description, args)
    config.check()
    return config


def config_text(config: RunConfig) -> str:
    """The resolved settings as YAML."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}
    return yaml.safe_dump(values, sort_keys=False)


def start(config: RunConfig) -> Accelerator:
    """Creates the accelerator of a run.

    Raises:
        ValueError: The launch is not supported, the machines of the run do not share `output_dir`, or `auto` means
            different precisions on them.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    zero_on_cpus = _wants_zero_on_cpus()
    precision = resolve_precision(config)
    accelerator = Accelerator(
        cpu=on_cpus() and not zero_on_cpus,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo" if zero_on_cpus else None, timeout=PROCESS_TIMEOUT)],
        mixed_precision=precision,
        log_with=tracker_names(config.log_with) or None,
        project_config=ProjectConfiguration(project_dir=str(config.output_dir), logging_dir=str(config.output_dir)),
    )
    check_world_size(accelerator.num_processes)
    _shard_on_cpus(accelerator)
    _check_strategy(accelerator)
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "accelerate's own gradient accumulation is not supported, because it would scale the loss twice: set "
            "gradient_accumulation_steps in the recipe, not in accelerate's configuration"
        )
    set_seed(config.seed)
    if on_several_machines():
        check_shared_folder(config.output_dir)
    if precision != (first := from_main_process(precision)):
        raise ValueError(
            f"mixed_precision=auto means {first} on the first machine and {precision} on another: pass "
            "--mixed_precision no or bf16"
        )
    warn_if_slow(accelerator.device, precision, "--mixed_precision no")
    return accelerator


def resolve_precision(config: RunConfig) -> Literal["no", "bf16", "fp16"]:
    """The precision that `auto` stands for: that of the run's checkpoints, or else the faster one on this machine."""
    if config.mixed_precision != "auto":
        return config.mixed_precision
    device = torch.device("cpu") if on_cpus() else torch.accelerator.current_accelerator()
    assert device is not None
    fast = fast_precision(device)
    path = config.output_dir / "config.yaml"
    if not (checkpoints(config.output_dir) and path.exists()):
        return fast
    began = yaml.safe_load(path.read_text()).get("mixed_precision", fast)
    if began != fast:
        logger.warning(f"the run keeps mixed_precision={began}, with which it began; {fast} is faster on this machine")
    return began


def _wants_zero_on_cpus() -> bool:
    """Whether DeepSpeed was launched on CPUs, where it works over gloo if accelerate does not take them for CPUs."""
    launched = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and "LOCAL_RANK" in os.environ
    return launched and not parse_flag_from_env("ACCELERATE_USE_CPU") and not torch.accelerator.is_available()


def _shard_on_cpus(accelerator: Accelerator) -> None:
    """Turns FSDP2 on for several processes on CPUs, where accelerate ignores it although PyTorch supports it.

    PyTorch shards on an accelerator where there is one, so `ACCELERATE_USE_CPU` on such a machine does not shard.
    """
    several = accelerator.distributed_type == DistributedType.MULTI_CPU and not torch.accelerator.is_available()
    if several and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate does for GPUs


def _check_strategy(accelerator: Accelerator) -> None:
    """Checks that the requested distributed strategy is active, because accelerate may silently ignore it.

    Raises:
        ValueError: Another strategy is active, or the strategy is not supported.
    """
    names = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
    requested = [name for name in names if os.environ.get(f"ACCELERATE_USE_{name}") == "true"]
    active = accelerator.distributed_type.name
    if requested and active not in requested:
        raise ValueError(f"{requested[0]} was requested, but accelerate uses {active} on {accelerator.device.type}")
    if active == "MEGATRON_LM" or (active == "FSDP" and not accelerator.is_fsdp2):
        name = "FSDP1" if active == "FSDP" else active
        raise ValueError(f"{name} is not supported: train/accelerate has configurations for DDP, FSDP2 and DeepSpeed")
    if active == "FSDP" and (kind := accelerator.state.fsdp_plugin.state_dict_type.name) != "SHARDED_STATE_DICT":
        raise ValueError(f"fsdp_state_dict_type must be SHARDED_STATE_DICT, got {kind}")


def check_sharding(config: RunConfig, strategy: str) -> None:
    """Checks that the settings are supported for sharded networks, of which each process holds a part.

    Args:
        config: Settings of the run.
        strategy: `FSDP` or `DEEPSPEED`.

    Raises:
        ValueError: Some settings are not supported; the message names all of them.
    """
    fsdp, train_only = strategy == "FSDP", getattr(config, "train_only", "all")
    wrong = [
        f"{name}={getattr(config, name)} (must be {legal})"
        for name, legal, right in (
            ("ema_decay", 0, fsdp or config.ema_decay == 0),
            ("optimizer", "adamw", config.optimizer == "adamw"),
            ("train_text_encoder", "false", fsdp or not getattr(config, "train_text_encoder", False)),
            (
                "train_only",
                "all or temporal" if fsdp else "all",
                train_only == "all" or (fsdp and train_only == "temporal"),
            ),
            ("gan_weight", 0, not getattr(config, "gan_weight", 0)),
            ("patience", 0, not config.patience),
            ("gradient_accumulation_steps", 1, fsdp or config.gradient_accumulation_steps == 1),
        )
        if not right
    ]
    if wrong:
        raise ValueError(f"{strategy} does not support {', '.join(wrong)}")


def copy_of(network: Any, weights: dict[str, Tensor]) -> Any:
    """A new diffusers model with the config of `network` and the given weights."""
    copy = type(network).from_config(network.config)
    copy.load_state_dict(weights)
    return copy


def make_optimizers(config: RunConfig, network: nn.Module) -> tuple[list[torch.optim.Optimizer], list[LambdaLR]]:
    """The optimizers of all trainable weights, and their schedules. Weight decay applies to matrices only.

    With `optimizer="muon"`, Muon trains the matrices of linear layers (and, with `muon_kernels`, the kernels of
    convolutions), and AdamW trains all other weights. Both have the same learning rate, because Muon's updates are
    scaled to the RMS of AdamW's.

    Source: Muon is scalable for LLM training, arXiv 2502.16982.
    """
    kinds = (nn.Linear, *([nn.Conv1d, nn.Conv2d, nn.Conv3d] if config.muon_kernels else []))
    layers = network.modules() if config.optimizer == "muon" else ()
    orthogonal = {id(layer.weight) for layer in layers if isinstance(layer, kinds)}
    weights = [p for p in network.parameters() if p.requires_grad]
    rest = [p for p in weights if id(p) not in orthogonal]
    groups = [
        {"params": [p for p in rest if _is_matrix(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if not _is_matrix(p)], "weight_decay": 0.0},
    ]
    betas = (0.9, config.adam_beta2)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    ]
    matrices = [p for p in weights if id(p) in orthogonal]
    if matrices:
        muon = KernelMuon(
            matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    schedules = [
        get_scheduler(
            config.lr_schedule,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
            scheduler_specific_kwargs={"num_decay_steps": config.decay_steps} if config.decay_steps else None,
        )
        for optimizer in optimizers
    ]
    return optimizers, schedules


def fill_states(optimizer: torch.optim.Optimizer) -> None:
    """Gives all weights of an AdamW the states that it gives each weight at its first gradient.

    Sharded checkpoints cannot be loaded if some weights, which the loss has not depended on yet, have no states.
    """
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        optimizer.state[weight] = {
            "step": torch.zeros((), device=weight.device),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a parameter group, without `lr`, which follows from `initial_lr` and the schedule."""
    return {name: value for name, value in group.items() if name not in ("params", "lr")}


def _override_hyperparameters(schedule: LambdaLR, groups: list[dict[str, Any]]) -> None:
    """Replaces the hyperparameters that a checkpoint restored, in case the configuration has changed since."""
    restored = schedule.optimizer.param_groups
    for group, configured, factor in zip(restored, groups, schedule.lr_lambdas, strict=True):
        group.update(configured, lr=configured["initial_lr"] * factor(schedule.last_epoch))
    schedule.base_lrs = [configured["initial_lr"] for configured in groups]
    schedule._last_lr = [group["lr"] for group in restored]


def _is_matrix(weight: nn.Parameter) -> bool:
    """Whether a weight maps channels to channels, unlike gains, biases and modulation tables."""
    return weight.ndim >= 2 and weight.shape[0] > 1 and weight.numel() > max(weight.shape)


def micro_batches(config: RunConfig, accelerator: Accelerator, size: int) -> Iterator[slice]:
    """This process's parts of a batch of `size` samples, one for each backward pass.

    Raises:
        ValueError: The batch cannot be split evenly.
    """
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    if size % parts:
        raise ValueError(
            f"the batch size must be a multiple of {parts} ({accelerator.num_processes} processes times "
            f"{config.gradient_accumulation_steps} accumulation steps), got {size} (nearest: "
            f"{max(1, round(size / parts)) * parts})"
        )
    share = size // parts
    for micro in range(config.gradient_accumulation_steps):
        begin = (accelerator.process_index * config.gradient_accumulation_steps + micro) * share
        yield slice(begin, begin + share)


def _as_scalar(norm: Any, device: torch.device) -> Tensor:
    """A gradient norm as a tensor: DeepSpeed returns a number or `None`, and FSDP2 a `DTensor`."""
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else 0.0 if norm is None else norm
    return torch.as_tensor(norm, device=device)


def accumulate(accelerator: Accelerator, network: nn.Module, parts: Iterable[slice]) -> Iterator[slice]:
    """Yields the parts of a batch; processes synchronize gradients only in the backward pass of the last part."""
    parts = list(parts)
    for part in parts[:-1]:
        with accelerator.no_sync(network):
            yield part
    yield parts[-1]


def generators(seed: int, step: int, part: slice) -> list[torch.Generator]:
    """One CPU generator per sample, which depends only on the seed, the step and the sample's index in the batch."""
    keys = [((seed * 1_000_003 + step) * 65_537 + index) % 2**63 for index in range(part.start, part.stop)]
    return [torch.Generator().manual_seed(key) for key in keys]


class Run:
    """Trains a network, resuming from the newest checkpoint; does every part of a step except the loss.

    It saves the settings next to the checkpoints, and holds the lock of `output_dir` until its end.

    On SIGTERM or Ctrl-C, a run finishes its step, saves a checkpoint and stops. Several processes agree on this every
    `log_every` steps. A second Ctrl-C stops at once.

    Args:
        config: Settings of the run.
        accelerator: The accelerator that `start` returned.
        model: The network to train. Only its `forward` is called.
        name_batch: Describes the batch of a step; used in the error for a step whose gradient is not finite.
        data: Digest of the training data. If it differs when a run is resumed, there is a warning.
        has_unused_weights: Whether the loss of some steps does not depend on all trainable weights. Several processes
            then search for these weights in each step, which takes time.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        model: nn.Module,
        name_batch: Callable[[int], str] = "batch {}".format,
        data: str | None = None,
        has_unused_weights: bool = False,
    ):
        if config.mixed_precision == "auto":
            config = replace(config, mixed_precision=accelerator.mixed_precision)
        self.config, self.accelerator, self._name_batch = config, accelerator, name_batch
        self._lock = ExitStack()
        self._lock.enter_context(locked_output_dir(config.output_dir))
        if accelerator.is_main_process:
            write_text(config.output_dir / "config.yaml", config_text(config))
        strategy = accelerator.distributed_type.name
        self.sharded = strategy in ("FSDP", "DEEPSPEED")
        """Whether each process holds a part of the weights."""
        if self.sharded:
            check_sharding(config, strategy)
        if strategy == "DEEPSPEED":
            settings = accelerator.state.deepspeed_plugin.deepspeed_config
            settings["train_micro_batch_size_per_gpu"] = max(1, config.batch_size // accelerator.num_processes)
            settings["gradient_clipping"] = config.max_grad_norm
        model.to(accelerator.device)
        optimizers, self.schedules = make_optimizers(config, model)
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=has_unused_weights)
        self.network, *self.optimizers = accelerator.prepare(model, *optimizers)
        if strategy == "FSDP":
            fill_states(optimizers[0])
        self.average = EMAWeights(model, config.ema_decay) if config.ema_decay else NoEMA()
        self._best = BestWeights(model, config.output_dir, config.patience, accelerator.is_main_process)
        if accelerator.process_index > 0:  # all processes have made the same network; dropout is each one's own
            set_seed(config.seed, device_specific=True)
        self._settings = {
            name: value for name, value in yaml.safe_load(config_text(config)).items() if name not in NOT_IN_RESULTS
        }
        if data is not None:
            self._settings["data_sha256"] = data
        configured = [
            [_hyperparameters(group) for group in schedule.optimizer.param_groups] for schedule in self.schedules
        ]
        self.step = resume(accelerator, config.output_dir, self.average, self._best, self.schedules, self._settings)
        """Number of optimizer steps done."""
        for schedule, groups in zip(self.schedules, configured, strict=True):
            _override_hyperparameters(schedule, groups)
        # steps that an interrupted run logged after its last checkpoint are logged again
        self._logs = Logs(config.output_dir / "logs", self.step + 1)
        settings = {name: value if type(value) in _PLAIN else str(value) for name, value in vars(config).items()}
        accelerator.init_trackers("vgen", settings, {"wandb": {"name": config.output_dir.name}})
        self._throughput = Throughput(accelerator.device)
        self._saved, self.stopped = self.step, False
        self._asked_to_stop = self._interrupted = False
        self.network.train()
        self._settled_at = self.step + _SLOW_STEPS
        self._bar = self._make_bar(bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]", leave=False)
        self._norm = torch.zeros(())
        self._first_bad = torch.full((), -1, device=accelerator.device)
        self._finite = torch.ones((), dtype=torch.bool, device=accelerator.device)

    def _make_bar(self, **options: Any) -> Any:
        hidden = not self.accelerator.is_main_process
        total, initial = self.config.max_steps, self.step
        return tqdm(total=total, initial=initial, unit="step", disable=hidden, mininterval=5.0, **options)

    def steps(self) -> Iterator[int]:
        """The remaining steps: up to `max_steps`, or until `patience` is exhausted or on SIGTERM or Ctrl-C."""
        can_be_asked = threading.current_thread() is threading.main_thread()
        handled = (signal.SIGTERM, signal.SIGINT) if can_be_asked else ()
        before = {number: signal.signal(number, self._ask_to_stop) for number in handled}
        try:
            while not self.is_over:
                yield self.step
                if self._must_stop():
                    if self._saved != self.step:
                        self._save()
                    self.stopped = True
                    return
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def is_over(self) -> bool:
        """Whether all steps are done, or `patience` evaluations in a row had no better score."""
        return self.step >= self.config.max_steps or self._best.is_over

    def _ask_to_stop(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the end of the step
        if not self._asked_to_stop and self.accelerator.is_main_process:  # `print` is not safe in a signal handler
            os.write(2, b"\nstopping after this step, which may take a while; a second Ctrl-C stops at once\n")
        self._asked_to_stop, self._interrupted = True, self._interrupted or number == signal.SIGINT

    def _must_stop(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self._asked_to_stop
        if self._asked_to_stop:
            self.accelerator.set_trigger()
        return self.step % self.config.log_every == 0 and self.accelerator.check_trigger()

    def parts(self, size: int) -> Iterator[slice]:
        """This process's parts of a batch of `size` samples. Each part needs one call of `backward`."""
        return accumulate(self.accelerator, self.network, micro_batches(self.config, self.accelerator, size))

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of a part's contribution to the batch's mean loss."""
        self._finite = self._finite & loss.detach().isfinite()
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def update(self) -> None:
        """Takes an optimizer step with the accumulated gradients."""
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm)
        self._norm = _as_scalar(norm, self.accelerator.device)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        skipped = self.accelerator.optimizer_step_was_skipped
        if skipped or norm is None:  # fp16 gradients may overflow and skip a step, but losses must be finite
            bad = self.accelerator.reduce((~self._finite).float()) > 0
        else:
            bad = ~torch.isfinite(self._norm)
        if not skipped:
            for schedule in self.schedules:
                schedule.step()
            self.average.step()
        self._first_bad = torch.where(bad & (self._first_bad < 0), self.step, self._first_bad)
        self._finite = torch.ones_like(self._finite)
        self.step += 1
        self._bar.update()
        if self.step == self._settled_at:
            self._bar.close()
            self._bar = self._make_bar()

    def count(self, clips: int, tokens: int, shape: Hashable, forward: Callable[[nn.Module], Any]) -> None:
        """Counts a part of a batch for the throughput; see `Throughput.add`. `forward` is called with the network.

        All processes must call it with the same `shape` in the same step, so that none runs that forward pass alone:
        it gathers the weights of a sharded network, and the others would wait. So `shape` must not depend on the
        contents of a batch, such as the number of videos with a gap; the first part then stands for all.
        """
        self._throughput.add(clips, tokens, shape, lambda: forward(self.accelerator.unwrap_model(self.network)))

    def log(self, **losses: Tensor) -> None:
        """Every `log_every` steps, sums the losses of all processes and writes them to the logs."""
        if self.step % self.config.log_every:
            return
        self._check_finite()
        values = {name: self.accelerator.reduce(value).item() for name, value in losses.items()}
        rest = {"grad_norm": self._norm.item(), "lr": self.schedules[0].get_last_lr()[0]}
        processes = self.accelerator.num_processes
        for name, value in self._throughput.take().items():  # all processes do the same amount of work
            rest[f"throughput/{name}"] = value if name == "flops_utilization" else value * processes
        if self.accelerator.is_main_process:
            self._logs.write(values | rest, self.step)
            self.accelerator.log(values | rest, step=self.step)
        summary = {name: f"{value:.4f}" for name, value in values.items()}
        summary["clips/s"] = f"{rest['throughput/clips_per_second']:.1f}"
        summary["tokens/s"] = f"{rest['throughput/tokens_per_second']:.0f}"
        summary["MFU"] = f"{rest['throughput/flops_utilization']:.0%}"
        self._bar.set_postfix(summary)

    @property
    def scores_are_due(self) -> bool:
        """Whether scores should be computed after this step, that is, every `sample_every` steps.

        All processes then compute a part of the scores or the same scores, so that none waits for another for long.
        Always false for sharded networks, because no process holds all weights.
        """
        return not self.sharded and self.step % self.config.sample_every == 0

    def report(self, scores: dict[str, float], watched: str | None, goal: Goal = "max") -> None:
        """Writes scores to the logs and to the terminal, in the main process, and keeps the best weights.

        Args:
            scores: Scores by name.
            watched: Name of the score that `patience` applies to; `None` does not count this evaluation.
            goal: Whether it should be high or low.
        """
        self._throughput.restart()
        if self.accelerator.is_main_process:
            self._logs.write(scores, self.step)
            self.accelerator.log(scores, step=self.step)
            summary = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
            self._bar.write(f"step {self.step}: {summary}")
        if self.config.patience and watched is not None:
            with self.average:
                self._best.update(watched, from_main_process(scores[watched]), goal, self.step)
            if self._best.is_over and self.accelerator.is_main_process:
                self._bar.write(f"the run ends: no better {watched} in {self.config.patience} evaluations")

    def save_samples(self, frames: np.ndarray, frame_rate: float) -> None:
        """Writes frames, uint8 `(f, h, w, 3)`, to `samples.mp4` and to the logs. A run goes on if that fails."""
        path = self.config.output_dir / "samples.mp4"
        if self.accelerator.is_main_process:
            try:
                write_video(frames, path, frame_rate=frame_rate, overwrite=True)
                self._logs.write_video("samples", frames, frame_rate, self.step)
                for tracker in self.accelerator.trackers:
                    track_video(tracker, "samples", path, frames, self.step)
            except OSError as error:
                logger.warning(f"{describe(error)}; training goes on without samples")

    def save(self) -> None:
        """Writes a checkpoint, every `save_every` steps and after the last one."""
        if self.step % self.config.save_every == 0 or self.is_over:
            self._save()

    def _save(self) -> None:
        self._check_finite()
        save_checkpoint(
            self.accelerator,
            self.config.output_dir,
            self.step,
            self.average,
            self._best,
            self.schedules,
            self.config.keep_last,
            self._settings,
        )
        self._saved = self.step

    def end(
        self, save_result: Callable[[dict[str, Tensor] | None], None], result: str = "", next_command: str = ""
    ) -> None:
        """Saves the result in the main process, with the averaged or best weights, after all processes have finished.

        Args:
            save_result: Receives the gathered weights of a sharded network, and otherwise `None`.
            result: Name of the result in `output_dir`, for the last line.
            next_command: A command that uses the result; `{}` stands for its path.
        """
        self.accelerator.wait_for_everyone()
        best = self._best.best
        if self.stopped:
            self.accelerator.print(f"stopped after {self.step} steps; the same command resumes from there")
        else:
            with self.average:
                weights = self.accelerator.get_state_dict(self.network) if self.sharded else None
                if self.accelerator.is_main_process:
                    if best:
                        self._best.use()
                    save_result(weights)
            path = self.config.output_dir / result
            which = f" with the weights of step {best.step} ({best.name} {best.score:.3f})" if best else ""
            advice = f"; next: {next_command.format(shlex.quote(str(path)))}" if next_command else ""
            self.accelerator.print(f"wrote {path}{which}{advice}")
        if self.accelerator.num_processes > 1:
            drain_gloo_threads()
        self.accelerator.end_training()
        self._lock.close()

    def _check_finite(self) -> None:
        """Stops a run with a loss or gradient that is not finite."""
        bad = int(self._first_bad)
        if bad >= 0:
            raise FloatingPointError(
                f"the loss or gradient of step {bad + 1} is not finite; its batch: {self._name_batch(bad)}. The last "
                "checkpoint is kept"
            )

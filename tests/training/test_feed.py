"""Batches do not depend on how they are made."""

import os
import signal
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from vgen.data.latents import LatentSet, write_shard
from vgen.diffusion import make_scheduler
from vgen.models.prompts import make_word_tokenizer
from vgen.training.feed import Feed, num_workers, to_device
from vgen.training.objective import Objective, PromptedDenoiser, denoising_loss
from vgen.training.run import RunConfig, micro_batches
from vgen.training.sample import (
    DenoiserBatches,
    DenoiserSpec,
    SampleConfig,
    Source,
    conditioning,
    denoiser_temporal_loss,
)

pytestmark = pytest.mark.usefixtures("warm_workers")


@dataclass
class Process:
    """What a feed asks of accelerate."""

    process_index: int = 0
    num_processes: int = 1
    device: torch.device = torch.device("cpu")


def run_of(config, step=0, **process):
    return SimpleNamespace(config=config, step=step, accelerator=Process(**process))


@pytest.fixture
def make(tmp_path):
    """A config, and the batches of a mixture of all kinds of samples."""
    torch.manual_seed(0)
    for begin in (0, 4):
        write_shard(
            tmp_path / f"{begin}.safetensors",
            torch.randn(4, 3, 6, 4, 4),
            [["a red circle", "a circle"]] * 4,
            [4.0, 8.0] * 2,
            frames=torch.randn(4, 20, 3, 4, 4),
            motion=torch.randn(4, 3, 5, 4, 4),
        )
    tokenizer = make_word_tokenizer(["a", "circle", "red"], 8)

    def make(**options):
        config = SampleConfig(
            output_dir=tmp_path,
            latents_dir=tmp_path,
            batch_size=4,
            max_steps=5,
            windows={"start": 1.0, "anywhere": 1.0, "sink": 2.0},
            window_lengths=[3, 4],
            known={"none": 1.0, "leading": 1.0, "keyframes": 1.0, "both": 1.0},
            levels={"shared": 1.0, "group": 1.0, "independent": 1.0},
            warping_weight=0.1,
            max_sequence_length=8,
            **options,
        )
        spec = DenoiserSpec(patch_frames=1, chunk_size=2, sink=1, keyframe_slots=4, conv_history=2)
        return config, DenoiserBatches(config, [Source(LatentSet(tmp_path), config)], [1.0], spec, tokenizer)

    return make


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        for name, value in one.items()
    )


def test_batches_do_not_depend_on_the_workers(make):
    config, batches = make(num_workers=0)
    expected = list(Feed(run_of(config), batches))
    assert len(expected) == 5 and all(same(batch, batches[step, slice(0, 4)]) for step, batch in enumerate(expected))
    for count in (1, 2):
        config, batches = make(num_workers=count)
        before = torch.get_rng_state()
        batches_read = list(Feed(run_of(config), batches))
        assert torch.equal(torch.get_rng_state(), before)  # the network's dropout draws from it
        assert len(batches_read) == 5 and all(map(same, batches_read, expected))


def test_processes_and_accumulation_divide_one_batch(make):
    def rows(batches):
        return [row for batch in batches for row in batch["noise"].unbind()]

    config, batches = make()
    expected = [rows([batch]) for batch in Feed(run_of(config), batches)]
    for processes, parts in ((2, 1), (1, 2), (2, 2)):
        config, batches = make(gradient_accumulation_steps=parts)
        feeds = [
            Feed(run_of(config, process_index=rank, num_processes=processes), batches) for rank in range(processes)
        ]
        for step in range(config.max_steps):
            batches_read = rows(next(feed) for feed in feeds for _ in range(parts))
            assert all(map(torch.equal, batches_read, expected[step])) and len(batches_read) == 4
        assert all(next(feed, None) is None for feed in feeds)


@pytest.mark.parametrize("count", [0, 1])
def test_a_run_that_resumes_reads_only_what_is_left(make, count):
    config, batches = make(num_workers=count)
    expected = list(Feed(run_of(config), batches))[3:]
    asked = []

    class Counted(type(batches)):
        def __getitem__(self, key):
            asked.append(key)
            return super().__getitem__(key)

    if count == 0:
        batches.__class__ = Counted
    batches_read = list(Feed(run_of(config, step=3), batches))
    assert len(batches_read) == 2 and all(map(same, batches_read, expected))
    assert count or asked == [(3, slice(0, 4)), (4, slice(0, 4))]


class Numbers(torch.utils.data.Dataset):
    """Batches of which each tells its worker."""

    max_workers = None

    def __getitem__(self, key):
        step, part = key
        return {"step": step, "size": part.stop - part.start, "process": os.getpid(), "parent": os.getppid()}


def test_sizes_may_differ_from_step_to_step(tmp_path):
    config = RunConfig(output_dir=tmp_path, max_steps=4, gradient_accumulation_steps=2)
    feed = Feed(run_of(config), Numbers(), lambda step: 2 if step < 2 else 6)
    assert [(batch["step"], batch["size"]) for batch in feed] == [(0, 1)] * 2 + [(1, 1)] * 2 + [(2, 3)] * 2 + [
        (3, 3)
    ] * 2


@pytest.mark.slow
def test_a_step_needs_no_value_from_the_device(make, make_unet):
    """Fake tensors have none: whatever asks for one, and so waits for the device, raises."""
    config, batches = make()
    drawn = [batches[step, slice(0, 4)] for step in range(10)]
    kinds = {batch["num_gaps"]: batch for batch in drawn} | {type(batch["groups"]): batch for batch in drawn}
    steps = list({id(batch): batch for batch in kinds.values()}.values())
    assert {batch["num_gaps"] for batch in steps} > {1, 2, 3}
    assert {type(batch["groups"]) for batch in steps} == {list, torch.Tensor}
    mode, objective = FakeTensorMode(), Objective(make_scheduler("flow"))
    with mode:
        denoiser = make_unet(keyframe_slots=4, sink=1, group_modes=["full", "chunk", "causal"])
        model = PromptedDenoiser(denoiser, None)
    for num_gaps_matters in (True, False):
        for batch in steps if num_gaps_matters else steps[:1]:
            batch = {name: mode.from_tensor(x) if torch.is_tensor(x) else x for name, x in batch.items()}
            conditions = conditioning(batch) | ({} if num_gaps_matters else {"num_gaps": None})
            del conditions["input_ids"], conditions["prompt_mask"]
            with mode, torch.backends.mkldnn.flags(enabled=False):
                conditions["prompt_embeds"] = torch.zeros(4, 8, 5)
                sample = objective(batch["latents"], batch["noise"], batch["levels"])
                prediction = model(sample.latents, sample.timestep, **conditions)
                losses = denoising_loss(prediction, sample.target, sample.weight * batch["generated"])
                losses += denoiser_temporal_loss(config, None, batch, *objective.estimate(sample, prediction))
                losses.sum().backward()
            assert losses.shape == (4,)
        with mode, pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            (batch["gap_index"] < 3).nonzero()


@pytest.mark.slow
def test_a_signal_to_all_processes_does_not_end_the_workers(tmp_path):
    feed = Feed(run_of(RunConfig(output_dir=tmp_path, max_steps=20, num_workers=2)), Numbers())
    batches = [next(feed) for _ in range(2)]
    children = {batch[name] for batch in batches for name in ("process", "parent")}
    assert len(children) == 3 and os.getpid() not in children  # two workers and the server that they come from
    for process in children:
        os.kill(process, signal.SIGTERM)
        os.kill(process, signal.SIGINT)
    time.sleep(6)  # a worker looks every 5 seconds whether its parent is there
    assert [batch["step"] for batch in feed] == list(range(2, 20))


def test_workers_end_with_their_feed_or_the_program(tmp_path):
    feed = Feed(run_of(RunConfig(output_dir=tmp_path, max_steps=50, num_workers=1)), Numbers())
    worker = next(feed)["process"]
    assert feed.close.atexit  # and so before the program waits for its processes
    feed.close()
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(worker, 0)
            time.sleep(0.1)


def test_a_source_bounds_the_workers(tmp_path):
    batches = Numbers()
    batches.max_workers = 1
    feed = Feed(run_of(RunConfig(output_dir=tmp_path, max_steps=6, num_workers=3)), batches)
    assert len({batch["process"] for batch in feed} - {os.getpid()}) == 1


def test_workers_are_for_accelerators_unless_requested(tmp_path, monkeypatch):
    config = RunConfig(output_dir=tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    for processes, expected in ((1, 4), (4, 2), (12, 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert num_workers(config, torch.device("cuda")) == expected
        assert num_workers(config, torch.device("cpu")) == 0
    config.num_workers = 3
    assert num_workers(config, torch.device("cpu")) == 3
    with pytest.raises(ValueError, match="num_workers must be at least 0, .* got -1"):
        RunConfig(output_dir=tmp_path, num_workers=-1).check()


def test_an_error_of_a_worker_is_that_of_the_step(tmp_path):
    config = RunConfig(output_dir=tmp_path, max_steps=1, num_workers=1)
    with pytest.raises(ValueError, match="step 0 cannot be made"):
        next(Feed(run_of(config), Broken()))


class Broken(torch.utils.data.Dataset):
    """Has no batches."""

    def __getitem__(self, key):
        raise ValueError(f"step {key[0]} cannot be made")


def test_tensors_go_to_the_device_and_the_rest_stays():
    batch = {"a": torch.ones(2), "b": {"c": torch.zeros(1)}, "groups": [0, 1], "mode": "full"}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"].is_meta and moved["b"]["c"].is_meta
    assert (moved["groups"], moved["mode"]) == ([0, 1], "full")


def test_a_batch_that_does_not_divide_is_rejected(tmp_path):
    config = RunConfig(output_dir=tmp_path, batch_size=3, max_steps=1)
    with pytest.raises(ValueError, match="multiple of 2 .2 processes .*got 3 .nearest: 4"):
        next(Feed(run_of(config, num_processes=2), Numbers()))
    assert list(micro_batches(config, Process(), 3)) == [slice(0, 3)]

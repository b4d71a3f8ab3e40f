"""Early stopping."""

import random

import pytest
import torch
from torch import nn

from vgen.training.run import Run, RunConfig, check_sharding, start


class Crash(Exception):
    """Ends a run without a checkpoint."""


def expected(scores, patience):
    """The number of steps that are done and that of the best evaluation."""
    best = 0
    for index, score in enumerate(scores):
        if score > scores[best] or index == 0:
            best = index
        if index - best >= patience > 0:
            return index + 1, best + 1
    return len(scores), best + 1


def train(folder, scores, patience, crash_after=0, stop_after=0, goal="max", **settings):
    """Trains a small network; returns its result, the averaged weights at each evaluation, and the number of steps."""
    options = {"sample_every": 1, "save_every": 2, "log_every": 100, "max_steps": len(scores), "warmup_steps": 1}
    config = RunConfig(output_dir=folder, mixed_precision="no", patience=patience, **options | settings)
    config.check()
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    run = Run(config, start(config), network)
    evaluated, result = {}, {}
    try:
        for step in run.steps():
            run.backward(run.network(torch.full((1, 3), step + 1.0)).square().mean())
            run.update()
            with run.average:
                evaluated[run.step] = network.weight.detach().clone()
            run.report({"other": 0.0, "score": scores[step]}, "score", goal)
            if run.step == crash_after:
                raise Crash
            run.save()
            run._asked_to_stop = run.step == stop_after
        run.end(lambda _: result.update(weight=network.weight.detach().clone()))
    except Crash:
        run._lock.close()
    return result.get("weight"), evaluated, run.step


SCORES = [
    [3.0, 5.0, 4.0, 4.5, 6.0, 1.0, 1.0, 1.0],
    [5.0, 5.0, 5.0, 5.0],  # equal is not better
    [1.0, 2.0, 3.0],
    [9.0, 1.0, 8.0, 7.0, 6.0],
]


@pytest.mark.parametrize("ema_decay", [0.9, 0.0])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("patience", [1, 3])
def test_the_result_has_the_weights_of_the_best_evaluation(scores, patience, ema_decay, tmp_path, capsys):
    result, evaluated, steps = train(tmp_path / "max", scores, patience, ema_decay=ema_decay)
    done, best = expected(scores, patience)
    assert steps == done and torch.equal(result, evaluated[best])
    assert f"with the weights of step {best} (score {scores[best - 1]:.3f})" in capsys.readouterr().out
    lowest, evaluated, steps = train(
        tmp_path / "min", [-score for score in scores], patience, goal="min", ema_decay=ema_decay
    )
    assert steps == done and torch.equal(lowest, evaluated[best])


@pytest.mark.parametrize("seed", range(4))
def test_an_interrupted_run_stops_where_an_uninterrupted_one_does(seed, tmp_path):
    rng = random.Random(seed)
    scores, patience = [rng.random() for _ in range(12)], rng.choice([2, 3])
    result, _, steps = train(tmp_path / "whole", scores, patience)
    how = {"crash_after" if seed % 2 else "stop_after": rng.randint(1, steps - 1)}
    assert train(tmp_path / "parts", scores, patience, **how)[0] is None
    again, _, total = train(tmp_path / "parts", scores, patience)
    assert total == steps == expected(scores, patience)[0] and torch.equal(again, result)
    once_more, evaluated, _ = train(tmp_path / "parts", scores, patience)
    assert not evaluated and torch.equal(once_more, result)  # it was over


def test_scores_that_are_not_finite_are_never_the_best(tmp_path):
    result, evaluated, _ = train(tmp_path, [float("nan"), 1.0, float("inf"), float("nan")], 2)
    assert torch.equal(result, evaluated[2])


def test_without_patience_the_last_weights_are_the_result(tmp_path):
    result, evaluated, steps = train(tmp_path, [2.0, 1.0, 1.0], 0)
    assert steps == 3 and torch.equal(result, evaluated[3]) and not list(tmp_path.rglob("best.*"))


def test_settings_without_evaluations_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="patience must be at least 0, got -1"):
        RunConfig(output_dir=tmp_path, patience=-1).check()
    with pytest.raises(ValueError, match="patience=2 needs sample_every of at most max_steps=10, got 500"):
        RunConfig(output_dir=tmp_path, patience=2, max_steps=10).check()
    for strategy in ("FSDP", "DEEPSPEED"):
        with pytest.raises(ValueError, match=r"patience=2 \(must be 0\)"):
            check_sharding(RunConfig(output_dir=tmp_path, patience=2), strategy)

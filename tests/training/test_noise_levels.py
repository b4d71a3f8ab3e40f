import pytest
import torch

from vgen.training.noise_levels import draw_levels

GROUPS = torch.tensor([0, 1, 1, 2])


def draws(kind, number=4000, **options):
    return torch.stack([draw_levels(kind, GROUPS, torch.Generator().manual_seed(i), **options) for i in range(number)])


def test_each_kind_shares_levels_as_documented():
    assert draws("shared", 50).var(dim=1).max() == 0
    group = draws("group", 50)
    assert torch.equal(group[:, 1], group[:, 2]) and not torch.equal(group[:, 0], group[:, 1])
    independent = draws("independent", 50)
    assert all(not torch.equal(independent[:, i], independent[:, j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("kind", ["shared", "group", "independent"])
def test_levels_are_logit_normal(kind):
    logits = draws(kind, mean=0.5, std=2.0).logit()[:, 0]
    assert logits.mean() == pytest.approx(0.5, abs=0.1)
    assert logits.std() == pytest.approx(2.0, abs=0.1)


def test_shift_is_the_schedulers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    plain = draws("independent", 20)
    shifted = draws("independent", 20, shift=3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=plain.flatten().sort(descending=True).values.tolist())
    assert torch.allclose(scheduler.sigmas[:-1], shifted.flatten().sort(descending=True).values, atol=1e-6)


def test_uniform_levels_fall_equally_often_between_a_schedulers_steps():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    levels = draws("independent", distribution="uniform", shift=3.0).flatten()
    counts = torch.histogram(levels, scheduler.sigmas.flip(0)).hist
    assert (counts / len(levels) - 0.25).abs().max() < 0.02
    high = draws("shared", 500, distribution="uniform", shift=3.0, between=(0.9, 1.0))
    assert 0.9 <= high.min() < 0.91 and 0.99 < high.max() <= 1
    assert draws("shared", 50, distribution="uniform").max() <= 1


def test_an_unknown_kind_is_rejected():
    with pytest.raises(ValueError, match="'shared', 'group', 'independent'"):
        draw_levels("random", GROUPS, torch.Generator())
    with pytest.raises(ValueError, match="'logit_normal', 'uniform'"):
        draw_levels("shared", GROUPS, torch.Generator(), distribution="normal")

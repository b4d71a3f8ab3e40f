"""Consistency distillation against closed forms: a data set of one clip, whose velocity field is known."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from vgen.training.distillation import HUBER, ConsistencyObjective, guided

SHAPE = (2, 3, 4, 2, 2)
GENERATED = torch.tensor([[False, True], [True, True]])  # token frames of two latents


def draw(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def field(clip):
    """The exact velocity of noisy latents if `clip` is all data: `(x - clip) / level`."""

    def velocity(latents, timestep):
        levels = (timestep / 1000).repeat_interleave(2, dim=1)[:, None, :, None, None]
        return (latents - clip) / levels.clamp_min(1e-6)

    return velocity


@pytest.fixture
def objective():
    return ConsistencyObjective(FlowMatchEulerDiscreteScheduler(shift=3.0), num_levels=8)


def test_a_student_that_knows_the_data_has_no_loss(objective):
    clip, noise = draw(0), draw(1)
    levels = torch.tensor([[0.0, 0.5], [0.2, 0.9]])
    pair = objective.pair(clip, noise, levels, GENERATED, field(clip), field(clip))
    torch.testing.assert_close(pair.target, clip, atol=1e-4, rtol=1e-4)
    velocity = field(clip)(pair.latents, pair.timestep)
    assert objective.loss(pair, velocity, GENERATED).abs().max() < 1e-3
    other = objective.loss(pair, velocity + 1, GENERATED)
    distance = pair.levels.repeat_interleave(2, dim=1)[:, None, :, None, None].expand(SHAPE)
    counted = GENERATED.repeat_interleave(2, dim=1)[:, None, :, None, None].expand(SHAPE)
    number = counted.flatten(1).sum(1)
    squared = (distance.square() * counted).flatten(1).sum(1)
    constant = HUBER * number.sqrt()
    torch.testing.assert_close(other, (squared + constant**2).sqrt() - constant, atol=1e-3, rtol=1e-3)
    objective.loss_kind = "squared"
    torch.testing.assert_close(objective.loss(pair, velocity + 1, GENERATED), squared / number, atol=1e-3, rtol=1e-3)


def test_levels_are_those_of_the_scheduler_and_known_frames_keep_theirs(objective):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - index / 8 for index in range(8)])
    torch.testing.assert_close(objective.grid.flip(0)[:-1], scheduler.sigmas[:-1], atol=1e-6, rtol=1e-6)
    levels = torch.tensor([[0.1, 0.5], [1.0, 1e-4]])
    seen = []

    def average(latents, timestep):
        seen.append(timestep / 1000)
        return torch.zeros_like(latents)

    pair = objective.pair(draw(0), draw(1), levels, GENERATED, field(draw(0)), average)
    grid = objective.grid
    assert pair.levels[0, 0] == seen[0][0, 0] == 0.1
    assert pair.levels[0, 1] in grid and 0.5 <= pair.levels[0, 1] < 0.5 + 1 / 8
    for now, lower in zip(pair.levels[GENERATED], seen[0][GENERATED], strict=True):
        place = (grid - now).abs().argmin()
        torch.testing.assert_close(lower, grid[place - 1], atol=1e-6, rtol=1e-6)
    assert pair.levels[1, 1] == grid[1] and seen[0][1, 1] == 0


def test_at_the_lowest_level_the_target_is_the_step_of_the_teacher(objective):
    clip, noise = draw(0), draw(1)
    levels = torch.full((2, 2), 1e-4)
    all_generated = torch.ones(2, 2, dtype=torch.bool)
    garbage = lambda latents, _: 100 * torch.ones_like(latents)  # noqa: E731
    pair = objective.pair(clip, noise, levels, all_generated, field(clip), garbage)
    torch.testing.assert_close(pair.target, clip, atol=1e-4, rtol=1e-4)


def test_samples_without_a_prompt_are_not_guided():
    positive, negative = draw(0), draw(1)
    result = guided(positive, negative, 3.0, torch.tensor([True, False]))
    torch.testing.assert_close(result[0], negative[0] + 3 * (positive - negative)[0])
    torch.testing.assert_close(result[1], positive[1])


def test_what_cannot_be_distilled_is_named():
    with pytest.raises(ValueError, match="distillation needs a teacher of flow matching, got a DDIMScheduler"):
        ConsistencyObjective(DDIMScheduler())
    with pytest.raises(ValueError, match="num_levels must be"):
        ConsistencyObjective(FlowMatchEulerDiscreteScheduler(), num_levels=1)
    with pytest.raises(ValueError, match="loss must be"):
        ConsistencyObjective(FlowMatchEulerDiscreteScheduler(), loss="l3")

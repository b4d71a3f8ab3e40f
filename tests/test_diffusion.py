import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler

from vgen.diffusion import level_to_timestep, make_scheduler

LEVELS = torch.tensor([[0.0, 1e-9, 0.0005, 0.001, 0.0011], [0.25, 0.5, 0.999, 0.9991, 1.0]])


def test_flow_matching_has_fractional_timesteps():
    for scheduler in (
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ):
        assert torch.equal(level_to_timestep(scheduler, LEVELS), LEVELS * 1000)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
def test_diffusion_rounds_up_to_a_whole_timestep(name):
    """The oracle counts thresholds: level l is the last timestep t of which t / T is below l, or 0."""
    timesteps = level_to_timestep(make_scheduler("v_prediction", name), LEVELS)
    below = torch.arange(1000, dtype=torch.float32) < (LEVELS * 1000)[..., None]
    assert timesteps.dtype == torch.int64
    assert torch.equal(timesteps, (below.sum(-1) - 1).clamp_min(0))


def test_timesteps_exist_in_a_schedule_of_any_length():
    scheduler = DDIMScheduler(num_train_timesteps=20)
    assert level_to_timestep(scheduler, torch.tensor([0.0, 0.05, 0.051, 1.0])).tolist() == [0, 0, 1, 19]


def test_a_scheduler_that_cannot_be_trained_for_has_timesteps_too():
    assert level_to_timestep(HeunDiscreteScheduler(prediction_type="sample"), torch.tensor([0.5])).tolist() == [499]

"""Self forcing against the pipeline's own rollouts, and its loss against a closed form."""

import random
from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_flow_match_euler_discrete as euler

from vgen.sampling.options import RolloutOptions
from vgen.sampling.rollout import new_state
from vgen.training.objective import PromptedDenoiser
from vgen.training.self_forcing import Plan, SelfForcing, matching_loss

from ..test_pipeline import make_pipeline
from ..test_unet_pipeline import build as build_unet

PROMPTS = ["a red circle", "a blue square"]
FRAMES = 6
ROLLOUT = {"chunk_size": 1, "window": 2, "sink": 1}


def seeded():
    return [torch.Generator().manual_seed(seed) for seed in range(2)]


@pytest.fixture(params=["transformer", "residual", "unet"])
def pipe(request, randomize):
    if request.param == "unet":
        pipe = build_unet(randomize, residual=True)
    else:
        pipe = make_pipeline(tasks=["text", "leading"], num_layers=2, residual=request.param == "residual")
        randomize(pipe.denoiser)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0, stochastic_sampling=True)
    pipe.register_to_config(num_inference_steps=2, guidance_scale=1.0, sigmas=[1.0, 0.5])
    return pipe


@pytest.fixture
def forcing(pipe):
    options = RolloutOptions(**ROLLOUT).resolve(pipe.config, pipe.denoiser.config, prompted=True)
    state = partial(new_state, options)
    return SelfForcing(pipe.scheduler, pipe.config.sigmas, pipe.denoiser, (1, options.chunk_size), state)


def test_a_student_rolls_out_as_its_pipeline_does(pipe, forcing, monkeypatch):
    """For longer than window and sink, so that frames leave the cache."""
    draw, drawn = euler.randn_tensor, []

    def all_but_the_last(shape, **options):  # the scheduler also draws noise after the last step, times 0
        drawn.append(shape)
        return torch.zeros(shape) if len(drawn) % 2 == 0 else draw(shape, **options)

    monkeypatch.setattr(euler, "randn_tensor", all_but_the_last)
    rollout, latents = pipe.rollout(PROMPTS, generator=seeded(), **ROLLOUT), []
    for _ in range(FRAMES):
        next(rollout)
        latents.append(rollout.state.history[-1][0])
    expected = torch.cat(latents, dim=2).float()
    conditions = {"prompt_embeds": pipe.encode_prompt(PROMPTS)[0], "frame_rate": torch.full((2,), 8.0)}
    network = PromptedDenoiser(pipe.denoiser, None)
    made = forcing.roll_out(network, torch.zeros_like(expected), Plan(0, FRAMES, 1, FRAMES - 1), seeded(), conditions)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
    given = forcing.roll_out(network, made, Plan(2, FRAMES, 1, FRAMES - 1), seeded(), conditions)
    assert torch.equal(given[:, :, :2], made[:, :, :2]) and not torch.equal(given[:, :, 2:], made[:, :, 2:])


@pytest.mark.parametrize("exit_step", [0, 1])
def test_only_the_last_chunk_has_a_gradient(pipe, forcing, exit_step):
    network = PromptedDenoiser(pipe.denoiser, None)
    calls = []

    def trained(*args, **kwargs):
        calls.append(args[1])
        return network(*args, **kwargs)

    shape, conditions = torch.zeros(2, 4, 3, 4, 4), {"prompt_embeds": pipe.encode_prompt(PROMPTS)[0]}
    video = forcing.roll_out(network, shape, Plan(0, 3, exit_step, 2), seeded(), conditions, trained)
    assert len(calls) == 1 and (calls[0] == 1000 * forcing.levels[exit_step]).all()
    assert torch.autograd.grad(video[:, :, -1].sum(), pipe.denoiser.parameters(), retain_graph=True, allow_unused=True)
    assert not any(
        grad is not None and grad.any()
        for grad in torch.autograd.grad(video[:, :, :-1].sum(), pipe.denoiser.parameters(), allow_unused=True)
    )


def test_plans_have_whole_chunks_and_something_to_make(forcing):
    forcing.chunks = (1, 2)
    plans = [forcing.plan(6, 0.5, random.Random(seed)) for seed in range(300)]
    assert {plan.num_frames for plan in plans} == {1, 3, 5} and {plan.num_given for plan in plans} == {0, 1, 3}
    assert {(plan.last_begin, plan.num_frames) for plan in plans} == {(0, 1), (1, 3), (3, 5)}
    assert all(plan.num_given < plan.num_frames for plan in plans) and {plan.exit_step for plan in plans} == {0, 1}
    assert {forcing.plan(6, 0.0, random.Random(seed)).num_given for seed in range(20)} == {0}
    forcing.loss_kind = "regression"
    assert 0 not in {forcing.plan(6, 0.0, random.Random(seed)).num_given for seed in range(20)}


def test_the_loss_moves_a_distribution_to_that_of_the_teacher():
    """Both are Gaussians, whose clean estimates from noise are known."""
    generator = torch.Generator().manual_seed(0)
    mean, target, deviation = torch.tensor(3.0, requires_grad=True), -1.0, 0.5
    optimizer = torch.optim.Adam([mean], lr=0.05)

    def estimate(noisy, level, center):
        signal = (1 - level) * deviation**2 / ((1 - level) ** 2 * deviation**2 + level**2)
        return center + signal * (noisy - (1 - level) * center)

    counted = torch.ones(64, 1, dtype=torch.bool)
    for _ in range(300):
        noise, again = torch.randn(2, 64, 1, 1, 1, 1, generator=generator)
        level = torch.rand(64, 1, 1, 1, 1, generator=generator) * 0.9 + 0.05
        video = mean + deviation * noise
        noisy = (1 - level) * video.detach() + level * again
        fake, real = (estimate(noisy, level, center) for center in (mean.detach(), target))
        optimizer.zero_grad()
        matching_loss(video, fake, real, counted).mean().backward()
        optimizer.step()
    assert abs(mean.item() - target) < 0.1


def test_frames_that_do_not_count_have_no_gradient():
    video = torch.randn(2, 3, 4, 2, 2, requires_grad=True)
    counted = torch.tensor([[False, True], [True, True]])
    matching_loss(video, video.detach() + 1, video.detach() + 2, counted).sum().backward()
    assert not video.grad[0, :, :2].any() and video.grad[0, :, 2:].all() and video.grad[1].all()
    same = matching_loss(video, video.detach() + 1, video.detach() + 1, counted)
    assert same.abs().max() == 0

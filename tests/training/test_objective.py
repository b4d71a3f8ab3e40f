import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from vgen.diffusion import flow_sample, make_scheduler
from vgen.training.objective import Objective, PromptedDenoiser, denoising_loss

from ..models.test_unet import inputs, make

DIFFUSION = ("v_prediction", "epsilon")


def drawn(*shape):
    torch.manual_seed(0)
    return torch.randn(shape), torch.randn(shape)


def test_noisy_latents_equal_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler()
    latents, noise = (x.double() for x in drawn(2, 3, 4, 2, 2))
    timesteps = scheduler.timesteps[[100, 700]]
    levels = (timesteps / 1000).double()[:, None].expand(2, 4)
    noisy, _ = flow_sample(latents, noise, levels)
    assert torch.allclose(noisy, scheduler.scale_noise(latents, timesteps, noise), atol=1e-5)


def test_the_true_velocity_recovers_the_clean_latents_from_any_level():
    latents, noise = drawn(2, 3, 4, 2, 2)
    levels = torch.rand(2, 2)  # two latents a token frame
    noisy, velocity = flow_sample(latents, noise, levels)
    level = levels.repeat_interleave(2, dim=1)[:, None, :, None, None]
    assert torch.allclose(noisy - level * velocity, latents, atol=1e-6)


@pytest.mark.parametrize("prediction", DIFFUSION)
@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
def test_each_frame_of_a_diffusion_sample_is_diffusers_at_its_timestep(prediction, name):
    objective = Objective(make_scheduler(prediction, name))
    oracle = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction,
        clip_sample=False,
    )
    latents, noise = drawn(2, 3, 4, 2, 2)
    levels = torch.tensor([[0.25, 1.0], [0.0005, 0.0]])  # two latents a token frame
    sample = objective(latents, noise, levels)
    assert sample.timestep.tolist() == [[249, 999], [0, 0]]
    for row, frame, timestep in ((0, 0, 249), (0, 1, 249), (0, 2, 999), (0, 3, 999), (1, 0, 0), (1, 1, 0)):
        clean, added = latents[row : row + 1, :, frame], noise[row : row + 1, :, frame]
        expected = oracle.add_noise(clean, added, torch.tensor([timestep]))
        torch.testing.assert_close(sample.latents[row : row + 1, :, frame], expected)
        target = sample.target[row : row + 1, :, frame]
        actual = oracle.step(target, timestep, expected).pred_original_sample
        torch.testing.assert_close(actual, clean, atol=1e-3, rtol=0)  # divided by sqrt(alpha) = 0.07 at the end
    assert torch.equal(sample.latents[1, :, 2:], latents[1, :, 2:])  # level 0 is clean


@pytest.mark.parametrize("prediction", ["flow", *DIFFUSION])
def test_the_estimate_from_the_target_is_the_clean_clip(prediction):
    objective = Objective(make_scheduler(prediction))
    latents, noise = drawn(2, 3, 4, 2, 2)
    levels = torch.tensor([[0.2, 0.9], [0.5, 0.01]])  # two latents a token frame
    sample = objective(latents, noise, levels)
    clean, signal = objective.estimate(sample, sample.target)
    torch.testing.assert_close(clean, latents, atol=1e-4, rtol=0)
    if prediction == "flow":
        expected = (1 - levels).square()
    else:
        expected = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod[
            sample.timestep
        ]
    torch.testing.assert_close(signal, expected.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("prediction", DIFFUSION)
def test_min_snr_weights_are_those_of_the_paper(prediction):
    objective = Objective(make_scheduler(prediction), snr_gamma=5.0)
    latents, noise = drawn(1, 3, 3, 2, 2)
    levels = torch.tensor([[0.05, 0.4, 0.9]])
    weight = objective(latents, noise, levels).weight[0]
    snr = compute_snr(DDIMScheduler.from_config(objective.scheduler.config), torch.tensor([49, 399, 899]))
    assert snr[0] > 5 > snr[1]
    # in the error of the clean latents, both come to min(SNR, 5)
    scale = snr if prediction == "epsilon" else snr + 1
    torch.testing.assert_close(weight * scale, snr.clamp(max=5))


def test_a_schedule_of_zero_terminal_snr_ends_in_pure_noise():
    latents, noise = drawn(1, 3, 1, 2, 2)
    for name in ("ddim", "dpmsolver++", "unipc"):
        scheduler = make_scheduler("v_prediction", name, zero_terminal_snr=True)
        sample = Objective(scheduler)(latents, noise, torch.ones(1, 1))
        assert torch.equal(sample.latents, noise) and torch.allclose(sample.target, -latents)
        scheduler.set_timesteps(4)
        assert scheduler.timesteps[0] == 999
    for options in (
        {"prediction": "epsilon", "zero_terminal_snr": True},
        {"prediction": "flow", "zero_terminal_snr": True},
        {"prediction": "v_prediction", "shift": 3.0},
        {"prediction": "sample"},
        {"prediction": "epsilon", "name": "ddpm"},
    ):
        with pytest.raises(ValueError, match="zero_terminal_snr|level_shift|must be one of"):
            make_scheduler(**options)


def test_weights_that_do_not_apply_and_schedulers_without_targets_are_rejected():
    with pytest.raises(ValueError, match="snr_gamma=5"):
        Objective(FlowMatchEulerDiscreteScheduler(), snr_gamma=5.0)
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        Objective(DDIMScheduler(prediction_type="sample"))


def test_known_frames_carry_no_loss():
    prediction, target = drawn(2, 3, 4, 2, 2)
    weight = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    expected = [
        2 * (prediction[0, :, 2:] - target[0, :, 2:]).square().mean(),
        (prediction[1] - target[1]).square().mean(),
    ]
    assert torch.allclose(denoising_loss(prediction, target, weight), torch.stack(expected), atol=1e-6)
    changed = prediction.clone()
    changed[0, :, :2] += 100
    assert torch.equal(denoising_loss(changed, target, weight), denoising_loss(prediction, target, weight))


def test_only_clips_with_a_gap_are_computed_with_unseen_latents(randomize):
    network, calls = make(randomize), []
    network.register_forward_pre_hook(lambda _, __, conditions: calls.append(conditions), with_kwargs=True)
    model = PromptedDenoiser(network, None)
    latents, levels, prompt = inputs(4)
    conv_context = torch.randn(4, 3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    conditions = {"prompt_embeds": prompt, "conv_context": conv_context, "gap_index": torch.tensor([5, 2, 5, 1])}
    gaps = {"gap_order": torch.tensor([1, 3, 0, 2]), "num_gaps": 2}
    for groups in ("causal", [0, 0, 1, 1, 2], torch.arange(4)[:, None] // 2 + torch.tensor([0, 0, 1, 1, 2])):
        actual = model(latents, levels, groups=groups, **conditions, **gaps)
        expected = model(latents, levels, groups=groups, **conditions, **gaps | {"num_gaps": None})
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        assert [len(call["hidden_states"]) for call in calls] == [2, 2, 4]
        assert torch.equal(calls[0]["conv_context"], conv_context[[1, 3]]) and calls[1]["conv_context"] is None
        calls.clear()
    for gap_index, num_gaps in ((5, 0), (2, 4)):
        gaps = {"gap_order": torch.arange(4), "num_gaps": num_gaps}
        model(latents, levels, **conditions | {"gap_index": torch.full((4,), gap_index)}, **gaps)
        assert [len(call["hidden_states"]) for call in calls] == [4]
        calls.clear()

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vgen.training.objective import flow_sample, velocity_loss


def test_noisy_latents_equal_the_schedulers(seed=0):
    torch.manual_seed(seed)
    scheduler = FlowMatchEulerDiscreteScheduler()
    latents, noise = torch.randn(2, 3, 4, 2, 2).double(), torch.randn(2, 3, 4, 2, 2).double()
    timesteps = scheduler.timesteps[[100, 700]]
    levels = (timesteps / 1000).double()[:, None].expand(2, 4)
    noisy, _ = flow_sample(latents, noise, levels)
    assert torch.allclose(noisy, scheduler.scale_noise(latents, timesteps, noise), atol=1e-5)


def test_the_true_velocity_leads_from_any_level_to_the_clean_latents():
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    levels = torch.rand(2, 2)  # two latents a token frame
    noisy, velocity = flow_sample(latents, noise, levels)
    level = levels.repeat_interleave(2, dim=1)[:, None, :, None, None]
    assert torch.allclose(noisy - level * velocity, latents, atol=1e-6)


def test_known_frames_carry_no_loss():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    generated = torch.tensor([[False, True], [True, True]])
    expected = [(prediction[0, :, 2:] - target[0, :, 2:]).square().mean(), (prediction[1] - target[1]).square().mean()]
    assert torch.allclose(velocity_loss(prediction, target, generated), torch.stack(expected), atol=1e-6)
    changed = prediction.clone()
    changed[0, :, :2] += 100
    assert torch.equal(velocity_loss(changed, target, generated), velocity_loss(prediction, target, generated))

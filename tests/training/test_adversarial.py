import pytest
import torch
from torch import nn

from vgen.training.adversarial import (
    PatchDiscriminator,
    VAEWithDiscriminator,
    adaptive_weight,
    discriminator_loss,
)


@pytest.fixture
def gan_output(make_vae, randomize):
    model = VAEWithDiscriminator(make_vae(), randomize(PatchDiscriminator(dim=4)))
    clip = torch.rand(2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return model, clip, model(clip, generator=torch.Generator().manual_seed(1))


def gradients(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {
        part: any(weight.grad is not None and weight.grad.any() for weight in getattr(model, part).parameters())
        for part in ("vae", "discriminator")
    }


def test_each_logit_trains_its_own_network(gan_output):
    model, _, out = gan_output
    assert out.real.shape == out.fake.shape == out.generator_logits.shape == (2, 1, 5, 4, 4)
    assert torch.equal(out.fake, out.generator_logits)
    assert gradients(model, out.generator_logits.mean()) == {"vae": True, "discriminator": False}
    assert gradients(model, discriminator_loss(out.real, out.fake)) == {"vae": False, "discriminator": True}


def test_the_discriminator_is_unused_before_its_start(gan_output):
    model, clip, out = gan_output
    plain = model(clip, generator=torch.Generator().manual_seed(1), use_discriminator=False)
    assert torch.equal(plain.sample, out.sample) and plain.real is plain.fake is plain.generator_logits is None


def test_a_clip_is_judged_the_same_in_any_batch(gan_output):
    model, clip, out = gan_output
    torch.testing.assert_close(model.discriminator(clip[1:]), out.real[1:])


def test_the_hinge_loss_matches_the_paper():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    expected = 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 4) / 3)
    assert discriminator_loss(real, fake).item() == pytest.approx(expected)


def test_the_adaptive_weight_balances_the_pulls():
    layer = nn.Parameter(torch.ones(3))
    error, generator_loss = (layer * torch.tensor([3.0, 0.0, 4.0])).sum(), -0.5 * layer[1]
    weight = adaptive_weight(error, generator_loss, layer)
    assert weight.item() == pytest.approx(5 / (0.5 + 1e-4)) and not weight.requires_grad
    assert adaptive_weight(error, 0 * generator_loss, layer).item() == 1e4


def test_a_discriminator_learns_to_tell_real_from_fake():
    torch.manual_seed(0)
    critic = PatchDiscriminator(dim=8)
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3)
    for _ in range(30):
        smooth = torch.rand(4, 3, 3, 1, 1).expand(4, 3, 3, 32, 32)
        loss = discriminator_loss(critic(smooth), critic(torch.rand(4, 3, 3, 32, 32)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3  # 1 when it tells nothing

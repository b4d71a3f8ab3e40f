import pytest
import torch
from torch import nn

from vgen.training.run import RunConfig, config_text, make_optimizers, resolve_precision


def take_a_step(network, tmp_path, **settings):
    """The change of each weight by one step at full rate."""
    config = RunConfig(output_dir=tmp_path, lr_schedule="constant", learning_rate=0.1, **settings)
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    optimizers, _ = make_optimizers(config, network)
    for optimizer in optimizers:
        optimizer.step()
    return {name: weight.detach() - before[name] for name, weight in network.named_parameters()}


@pytest.mark.parametrize(("optimizer", "kernels"), [("adamw", False), ("muon", False), ("muon", True)])
def test_every_trainable_weight_is_updated_once(optimizer, kernels, tmp_path):
    torch.manual_seed(0)
    network = nn.ModuleDict({"embed": nn.Embedding(5, 6), "linear": nn.Linear(6, 4), "frozen": nn.Linear(3, 3)})
    network["conv"] = nn.Conv2d(2, 4, (1, 3))
    network["frozen"].requires_grad_(False)
    for weight in network.parameters():
        weight.grad = torch.randn(weight.shape) if weight.requires_grad else None
    orthogonal = ["linear.weight"] if optimizer == "muon" else []
    orthogonal += ["conv.weight"] if kernels else []
    gradients = {name: network.get_parameter(name).grad.flatten(1).clone() for name in orthogonal}
    change = take_a_step(network, tmp_path, optimizer=optimizer, muon_kernels=kernels)

    assert not any(change[name].any() for name in ("frozen.weight", "frozen.bias"))
    signs = {name: -weight.grad.sign() for name, weight in network.named_parameters() if weight.requires_grad}
    for name in signs.keys() - set(orthogonal):
        torch.testing.assert_close(change[name], 0.1 * signs[name])
    for name, gradient in gradients.items():
        # the nearest orthogonal matrix, at the root mean square 0.2 of AdamW's updates; five Newton-Schulz steps bring
        # the singular values near 1
        u, s, v = torch.linalg.svd(-change[name].flatten(1), full_matrices=False)
        expected_u, _, expected_v = torch.linalg.svd(gradient, full_matrices=False)
        assert ((u @ v) * (expected_u @ expected_v)).sum() > 0.98 * 4
        scaled = s / (0.1 * 0.2 * 6**0.5)
        assert scaled.min() > 0.6 and scaled.max() < 1.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer must be one of 'adamw', 'muon', got 'sgd'"),
        ({"optimizer": "muon", "mixed_precision": "fp16"}, "does not support mixed_precision=fp16"),
        ({"muon_kernels": True}, "muon_kernels needs optimizer=muon, got optimizer=adamw"),
    ],
)
def test_unsupported_optimizer_settings_are_rejected(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(output_dir=tmp_path, **settings).check()


@pytest.mark.parametrize(("began", "fast"), [("bf16", "no"), ("no", "bf16"), ("bf16", "bf16")])
def test_a_resumed_run_keeps_the_precision_with_which_it_began(tmp_path, monkeypatch, caplog, began, fast):
    monkeypatch.setattr("vgen.training.run.fast_precision", lambda device: fast)
    config = RunConfig(output_dir=tmp_path)
    (tmp_path / "config.yaml").write_text(config_text(RunConfig(output_dir=tmp_path, mixed_precision=began)))
    assert resolve_precision(config) == fast  # there is no checkpoint to resume
    (tmp_path / "checkpoint-3").mkdir()
    assert resolve_precision(config) == began
    expected = f"the run keeps mixed_precision={began}, with which it began; {fast} is faster on this machine"
    assert caplog.messages == ([] if began == fast else [expected])


def test_a_requested_precision_is_used_wherever_it_resumes(tmp_path):
    assert resolve_precision(RunConfig(output_dir=tmp_path, mixed_precision="fp16")) == "fp16"

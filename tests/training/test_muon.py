import copy

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vgen.training.muon import KernelMuon

SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


def train(optimizer, network, weights, data, steps):
    """Steps toward small outputs; `weights` are what the optimizer changes."""
    for step in range(steps):
        network(data[step]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(weight.grad is None for weight in weights)


class Products(TorchDispatchMode):
    """Records the data types of matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


class Flat(nn.Module):
    """A convolution over time, height and width whose parameter is the flattened kernel."""

    def __init__(self, conv):
        super().__init__()
        self.matrix = nn.Parameter(conv.weight.detach().flatten(1).clone())
        self.shape, self.bias = conv.weight.shape, conv.bias.detach()

    def forward(self, x):
        return nn.functional.conv3d(x, self.matrix.view(self.shape), self.bias)


def test_a_kernel_is_changed_as_the_flattened_matrix_is_by_torch(monkeypatch):
    monkeypatch.setattr("vgen.training.muon.has_bfloat16", lambda device: True)
    torch.manual_seed(0)
    conv, data = nn.Conv3d(3, 5, (1, 3, 3)), torch.randn(6, 2, 3, 2, 6, 6)
    flat, before = Flat(conv), conv.weight.detach().clone()
    conv.bias.requires_grad_(False)
    train(KernelMuon([conv.weight], **SETTINGS), conv, [conv.weight], data, 6)
    train(torch.optim.Muon([flat.matrix], **SETTINGS), flat, [flat.matrix], data, 6)
    assert not torch.equal(conv.weight, before)
    torch.testing.assert_close(conv.weight.flatten(1), flat.matrix, rtol=0, atol=0)


def test_it_resumes_from_its_state_and_follows_replaced_weights():
    torch.manual_seed(0)
    data = torch.randn(6, 2, 3, 2, 6, 6)
    whole = nn.Conv3d(3, 5, (2, 3, 3), bias=False)
    first = copy.deepcopy(whole)
    train(KernelMuon([whole.weight], **SETTINGS), whole, [whole.weight], data, 6)

    optimizer = KernelMuon([first.weight], **SETTINGS)
    train(optimizer, first, [first.weight], data, 3)
    second = nn.Conv3d(3, 5, (2, 3, 3), bias=False)
    continued = KernelMuon([second.weight], **SETTINGS)
    continued.load_state_dict(optimizer.state_dict())
    second.weight.data = first.weight.detach().clone()
    train(continued, second, [second.weight], data[3:], 3)
    assert torch.equal(second.weight, whole.weight)


def test_where_bfloat16_is_emulated_updates_are_orthogonalized_in_float32(monkeypatch):
    torch.manual_seed(0)
    gradient = torch.randn(48, 16)
    updates = {}
    for supported in (True, False):
        monkeypatch.setattr("vgen.training.muon.has_bfloat16", lambda device, supported=supported: supported)
        weight = nn.Parameter(torch.zeros(48, 16))
        weight.grad = gradient.clone()
        with Products() as products:
            KernelMuon([weight], lr=1.0, weight_decay=0.0, momentum=0.0).step()
        assert products.dtypes == {torch.bfloat16 if supported else torch.float32}
        assert torch.equal(weight.grad, gradient)
        updates[supported] = weight.detach()
    assert 0 < (updates[True] - updates[False]).norm() < 0.02 * updates[True].norm()

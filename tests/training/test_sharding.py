"""FSDP2's `fully_shard` on two CPU processes: the networks give the same losses and gradients as whole."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.warm import warm_python
from vgen.training.run import RunConfig, check_sharding

SCRIPT = """
import os
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.unet import UNet3D
from vgen.models.vae import CausalVideoVAE
from vgen.training.run import copy_of

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))


def make(name):
    torch.manual_seed(0)
    if name == "vae":
        return CausalVideoVAE(
            base_dim=4, z_dim=3, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True]
        ), [torch.rand(1, 3, 5, 16, 16)]
    inputs = [torch.randn(1, 3, 3, 8, 8), torch.full((1, 3), 500.0), torch.randn(1, 4, 5)]
    if name == "transformer":
        return SpacetimeTransformer(
            num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=5, freq_dim=8,
            ffn_dim=16, num_layers=2,
        ), inputs
    return UNet3D(
        in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=5, attention_head_dim=2,
        temporal_head_dim=8,
    ), inputs


def loss(network, inputs):
    options = {"sample_posterior": False} if isinstance(network, CausalVideoVAE) else {}
    return network(*inputs, **options).sample.square().mean()


def check(name):
    (whole, inputs), (sharded, _) = make(name), make(name)
    parts = [module for module in sharded.modules() if type(module).__name__ in sharded._repeated_blocks]
    assert parts
    for module in [*reversed(parts), sharded]:
        fully_shard(module, mesh=mesh)
    expected, actual = loss(whole, inputs), loss(sharded, inputs)
    expected.backward()
    actual.backward()
    torch.testing.assert_close(actual, expected)
    largest = max(weight.grad.abs().max() for weight in whole.parameters() if weight.grad is not None)
    assert largest > 0
    for (key, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            assert b.to_local().numel() <= a.numel()
            assert (b.grad.full_tensor() - a.grad).abs().max() < 1e-5 * largest, key
    weights = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:  # what is saved at the end of a run
        copy = copy_of(sharded, weights).state_dict()
        assert all(torch.equal(copy[key], weight) for key, weight in whole.state_dict().items())
    assert any(weight.to_local().numel() < weight.numel() for weight in sharded.parameters())


check("vae")
check("transformer")
check("unet")
dist.destroy_process_group()
os._exit(0)  # gloo's threads may still free tensors of the last gathering, which aborts an interpreter that is ending
"""


@pytest.mark.slow
def test_sharded_networks_give_the_same_losses_and_gradients(tmp_path: Path):
    (tmp_path / "shard.py").write_text(SCRIPT)
    command = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "shard.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_does_not_go_with_sharding_is_named(tmp_path: Path):
    config = RunConfig(output_dir=tmp_path, optimizer="muon", gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"^FSDP does not support optimizer=muon \(must be adamw\)$"):
        check_sharding(config, "FSDP")
    wrong = r"ema_decay=0.999 \(must be 0\), .*, gradient_accumulation_steps=2 \(must be 1\)$"
    with pytest.raises(ValueError, match=wrong):
        check_sharding(config, "DEEPSPEED")
    check_sharding(RunConfig(output_dir=tmp_path, gradient_accumulation_steps=2), "FSDP")
    check_sharding(RunConfig(output_dir=tmp_path, ema_decay=0.0), "DEEPSPEED")

"""The model of scaling in benchmarks/scaling.py."""

import runpy

import pytest
import torch
from torch.distributed import init_process_group
from torch.nn.parallel import DistributedDataParallel

from tests.train.scripts import ROOT, VAE
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.vae import CausalVideoVAE


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return runpy.run_path(str(ROOT / "benchmarks/scaling.py"))


def test_the_messages_of_ddp_are_the_bytes_that_it_sends(scaling, tmp_path):
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    sent = []

    def hook(_, bucket):
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    try:
        vae = CausalVideoVAE(**VAE)
        network = DistributedDataParallel(vae)
        network.register_comm_hook(None, hook)
        network(torch.rand(1, 3, 5, 16, 16)).sample.mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    (message,) = scaling["messages"](vae, "DDP")
    assert message.kind == "all-reduce" and message.size == sum(sent)


def test_sharded_strategies_send_what_their_papers_say(scaling):
    network = SpacetimeTransformer(
        num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=5, freq_dim=8,
        ffn_dim=16, num_layers=20,
    )  # fmt: skip
    weights = 2 * sum(weight.numel() for weight in network.parameters())  # bytes in bf16
    assert sum(message.size for message in scaling["messages"](network, "ZeRO-2")) == 2 * weights
    size = sum(message.size for message in scaling["messages"](network, "FSDP2"))
    assert 2.8 * weights < size < 3 * weights  # the weights outside of blocks are gathered once


def test_the_time_of_an_all_reduce_is_that_of_rings(scaling):
    links = scaling["Links"](intra_latency=0, inter_latency=0)
    seconds = scaling["Message"]("all-reduce", 8e9, 1).seconds
    assert seconds(1, links) == 0
    assert seconds(8, links) == pytest.approx(2 * 7 / 8 * 8e9 / 450e9)
    assert seconds(512, links) == pytest.approx(2 * 7 / 8 * 8e9 / 450e9 + 2 * 63 / 64 * 1e9 / 50e9)
    assert scaling["Message"]("all-gather", 8e9, 1).seconds(8, links) == pytest.approx(seconds(8, links) / 2)
    slow = scaling["Links"](intra_latency=1.0, inter_latency=10.0)
    waiting = scaling["Message"]("all-gather", 0, 3).seconds(16, slow)
    assert waiting == pytest.approx(3 * (7 * 1.0 + 1 * 10.0))

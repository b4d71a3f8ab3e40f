import pytest
import torch

from vgen.data.latents import LatentSet, epoch_order, write_shard


def test_what_was_written_is_read_in_the_order_of_names(tmp_path):
    torch.manual_seed(0)
    parts = [torch.randn(3, 4, 2, 2, 2), torch.randn(2, 4, 2, 2, 2)]
    frames = torch.randn(5, 4, 4, 2, 2)
    motion = torch.randn(5, 3, 1, 2, 2)
    write_shard(tmp_path / "1.safetensors", parts[1], [["d"], ["e", "é"]], [4.0, 5.0], frames[3:], motion[3:])
    write_shard(tmp_path / "0.safetensors", parts[0], [["a"], ["b"], ["c"]], [1.0, 2.0, 3.0], frames[:3], motion[:3])
    data = LatentSet(tmp_path)
    assert len(data) == 5
    assert torch.equal(data.latents, torch.cat(parts).half())
    assert [data[i].captions for i in range(5)] == [["a"], ["b"], ["c"], ["d"], ["e", "é"]]
    assert [data[i].frame_rate for i in range(5)] == [1, 2, 3, 4, 5]
    assert torch.equal(torch.stack([data[i].frames for i in range(5)]), frames.half())
    assert torch.equal(torch.stack([data[i].motion for i in range(5)]), motion.half())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no latents"):
        LatentSet(tmp_path)


def test_captions_must_match_latents(tmp_path):
    with pytest.raises(ValueError, match="2 latents with 1"):
        write_shard(tmp_path / "0.safetensors", torch.zeros(2, 1, 1, 1, 1), [["a"]], [8.0, 8.0])
    assert not list(tmp_path.iterdir())


def test_every_epoch_visits_every_clip_in_another_order():
    orders = [epoch_order(50, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert all(order.sort().values.tolist() == list(range(50)) for order in orders)
    assert torch.equal(orders[0], orders[3])
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])

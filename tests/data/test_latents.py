import hashlib
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vgen.data.latents import LatentSet, epoch_order, shard_length, write_shard


def test_what_was_written_is_read_in_the_order_of_names(tmp_path):
    torch.manual_seed(0)
    parts = [torch.randn(3, 4, 2, 2, 2), torch.randn(2, 4, 2, 2, 2)]
    frames = torch.randn(5, 4, 4, 2, 2)
    motion = torch.randn(5, 3, 1, 2, 2)
    write_shard(tmp_path / "1.safetensors", parts[1], [["d"], ["e", "é"]], [4.0, 5.0], frames[3:], motion[3:])
    write_shard(tmp_path / "0.safetensors", parts[0], [["a"], ["b"], ["c"]], [1.0, 2.0, 3.0], frames[:3], motion[:3])
    data = LatentSet(tmp_path)
    assert len(data) == 5
    assert torch.equal(torch.stack([clip.latents for clip in data]), torch.cat(parts).half())
    assert data.shape == (4, 2, 2, 2) and data.num_latents == 2 and data.has_frames and data.has_motion
    assert [data[i].captions for i in range(5)] == [["a"], ["b"], ["c"], ["d"], ["e", "é"]]
    assert [data[i].frame_rate for i in range(5)] == [1, 2, 3, 4, 5]
    assert torch.equal(torch.stack([data[i].frames for i in range(5)]), frames.half())
    assert torch.equal(torch.stack([data[i].motion for i in range(5)]), motion.half())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


@pytest.fixture
def folder(tmp_path):
    """Shards of 3, 1 and 4 clips with all that can be stored; in the second one nothing is padded."""
    torch.manual_seed(0)
    begin = 0
    for count in (3, 1, 4):
        captions = [
            [f"{index} {wording}" for wording in range(1 + index % 2)] for index in range(begin, begin + count)
        ]
        write_shard(
            tmp_path / f"{begin}.safetensors",
            torch.randn(count, 2, 3, 2, 2),
            captions,
            [1.0 + index for index in range(begin, begin + count)],
            frames=torch.randn(count, 8, 2, 2, 2),
            motion=torch.randn(count, 3, 2, 2, 2),
            embeddings=torch.randn(sum(map(len, captions)), 5, 6),
            no_prompt=torch.ones(5, 6),
            real=None if count == 1 else (torch.rand(count, 3) < 0.5).float(),
        )
        begin += count
    return tmp_path


def test_a_clip_is_what_whole_shards_have(folder):
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in ("latents", "frames", "motion")}
    real = torch.cat([shard.get("real", torch.ones(1, 3)).bool() for shard in shards])
    embeddings = iter(torch.cat([shard["embeddings"] for shard in shards]))
    data = LatentSet(folder)
    for copy in (data, pickle.loads(pickle.dumps(data))):
        for index, clip in enumerate(copy):
            for name, expected in whole.items():
                assert torch.equal(getattr(clip, name), expected[index])
            assert torch.equal(clip.real, real[index])
    for index in range(8):
        for caption in range(len(data[index].captions)):
            assert torch.equal(data.embedding(index, caption), next(embeddings))
        assert torch.equal(data.embedding(index, None), torch.ones(5, 6).half())


def test_the_digest_is_that_of_runs_before(folder):
    """A checkpoint records it: captions, rates and shape as JSON, then the bytes of up to 64 clips."""
    data = LatentSet(folder)
    latents = torch.cat([load_file(path)["latents"] for path in sorted(folder.glob("*.safetensors"))])
    metadata = json.dumps([data.captions, data.frame_rates.tolist(), list(latents.shape)]).encode()
    assert data.digest == hashlib.sha256(metadata + latents.numpy().tobytes()).hexdigest()


def memory(kind):
    """Bytes of this process, as Linux counts them."""
    return 1024 * int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted by Linux")
def test_memory_does_not_hold_the_set(tmp_path):
    latents = torch.zeros(64, 16, 8, 64, 64)  # 64 MiB a shard in half precision
    for number in range(2):
        write_shard(tmp_path / f"{number}.safetensors", latents, [["a"]] * 64, [8.0] * 64)
    size = 2 * latents.numel() * 2
    del latents
    before = memory("RssAnon")
    data = LatentSet(tmp_path)
    read = sum(data[index].latents.float().sum().item() for index in range(0, 128, 2))
    assert read == 0 and memory("RssAnon") - before < size / 4


def test_shards_that_differ_are_rejected(tmp_path):
    write_shard(tmp_path / "0.safetensors", torch.zeros(1, 1, 2, 1, 1), [["a"]], [8.0])
    write_shard(
        tmp_path / "1.safetensors", torch.zeros(1, 1, 2, 1, 1), [["a"]], [8.0], motion=torch.zeros(1, 3, 1, 1, 1)
    )
    with pytest.raises(ValueError, match="some shards of .* have motion and some do not"):
        LatentSet(tmp_path)
    write_shard(tmp_path / "1.safetensors", torch.zeros(1, 1, 3, 1, 1), [["a"]], [8.0])
    with pytest.raises(ValueError, match="different shapes"):
        LatentSet(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="contains no latents"):
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


def test_files_of_systems_are_no_shards(folder):
    (folder / "._0.safetensors").write_bytes(b"x")
    assert len(LatentSet(folder)) == 8


GOOD = {
    "latents": torch.zeros(2, 1, 2, 1, 1),
    "frame_rates": torch.tensor([8.0, 8.0]),
    "embeddings": torch.zeros(3, 4, 5),
    "no_prompt": torch.zeros(4, 5),
}
CAPTIONS = '[["a", "b"], ["c"]]'
DAMAGED_METADATA = {
    "no captions": None,
    "no JSON": {"captions": "[["},
    "deep JSON": {"captions": "[" * 100_000},
    "a number": {"captions": "5"},
    "numbers": {"captions": "[[1], [2]]"},
    "strings": {"captions": '["a", "b"]'},
    "too few": {"captions": '[["a"]]'},
}
DAMAGED_TENSORS = {
    "latents of another length": {"latents": torch.zeros(3, 1, 2, 1, 1)},
    "latents with other axes": {"latents": torch.zeros(2, 1)},
    "no latents": {"latents": None},
    "no rates": {"frame_rates": None},
    "rates of another length": {"frame_rates": torch.tensor([8.0])},
    "rates that are no numbers": {"frame_rates": torch.tensor([8.0, float("nan")])},
    "embeddings of another length": {"embeddings": torch.zeros(2, 4, 5)},
    "no empty prompt": {"no_prompt": None},
    "masks of another length": {"real": torch.ones(1, 2)},
}


@pytest.mark.parametrize("kind", [*DAMAGED_METADATA, *DAMAGED_TENSORS])
def test_a_damaged_shard_is_named(tmp_path, kind):
    path = tmp_path / "0.safetensors"
    tensors = {name: value for name, value in (GOOD | DAMAGED_TENSORS.get(kind, {})).items() if value is not None}
    save_file(GOOD, path, metadata={"captions": CAPTIONS})
    assert len(LatentSet(tmp_path)) == shard_length(path) == 2
    save_file(tensors, path, metadata=DAMAGED_METADATA.get(kind, {"captions": CAPTIONS}))
    for read in (lambda: LatentSet(tmp_path), lambda: shard_length(path)):
        with pytest.raises(ValueError, match=r"0\.safetensors is damaged"):
            read()


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_shard_is_named(folder, length):
    path = folder / "3.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"3\.safetensors is damaged"):
        LatentSet(folder)

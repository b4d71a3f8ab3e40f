"""What users of diffusers do with a model: files of every kind, offloading, casting, compilation, backends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.hooks import apply_group_offloading

from vgen.temporal.state import TemporalState


class VAE:
    """A tiny VAE, what it maps, and the same piece by piece."""

    def __init__(self, make):
        self.network = make()
        self.input = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def whole(self, network):
        mean = network.encode(self.input.to(network.dtype)).latent_dist.mode()
        return network.decode(mean).sample.float()

    def streamed(self, network):
        state, pieces = TemporalState(), []
        clip = self.input.to(network.dtype)
        for piece in (clip[:, :, :5], clip[:, :, 5:6], clip[:, :, 6:]):
            mean = network.encode(piece, state=state).latent_dist.mode()
            if mean.shape[2]:
                pieces.append(network.decode(mean, state=state).sample.float())
        return torch.cat(pieces, dim=2)


class Transformer:
    """A tiny denoiser, what it maps, and the same piece by piece."""

    def __init__(self, make):
        self.network = make(group_modes=["full", "causal"])
        generator = torch.Generator().manual_seed(0)
        self.input = torch.randn(1, 3, 4, 4, 4, generator=generator)
        self.prompt = torch.randn(1, 6, 5, generator=generator)

    def _call(self, network, clip, **options):
        dtype = network.dtype
        level = torch.tensor([300.0])
        return network(clip.to(dtype), level, self.prompt.to(dtype), **options).sample.float()

    def whole(self, network):
        return self._call(network, self.input, groups="causal")

    def streamed(self, network):
        state = TemporalState(window=4)
        pieces = [self._call(network, piece, state=state) for piece in self.input.split(1, dim=2)]
        return torch.cat(pieces, dim=2)


@pytest.fixture(params=["vae", "transformer"])
def case(request, make_vae, make_transformer):
    return VAE(make_vae) if request.param == "vae" else Transformer(make_transformer)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def load(case, folder, **options):
    return type(case.network).from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("parallel", [False, True])
def test_sharded_files_load_exactly(case, tmp_path, monkeypatch, parallel):
    case.network.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    if parallel:
        monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    assert torch.equal(case.whole(load(case, tmp_path)), case.whole(case.network))


def test_a_variant_loads_by_its_name_and_a_missing_one_is_told(case, tmp_path):
    case.network.save_pretrained(tmp_path, variant="fp16")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert torch.equal(case.whole(load(case, tmp_path, variant="fp16")), case.whole(case.network))
    with pytest.raises(OSError, match="bf16"):
        load(case, tmp_path, variant="bf16")
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors"):
        load(case, tmp_path)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_a_device_map_places_the_network(case, tmp_path, device_map):
    case.network.save_pretrained(tmp_path)
    network = load(case, tmp_path, device_map=device_map)
    assert network.device.type == "cpu"
    close(case.whole(network), case.whole(case.network))


def test_what_stays_in_float32_does_so_when_loaded_in_half_precision(case, tmp_path):
    case.network.save_pretrained(tmp_path)
    network = load(case, tmp_path, dtype=torch.bfloat16)
    kept = getattr(network, "_keep_in_fp32_modules", None) or []
    for name, weight in network.named_parameters():
        parts = name.split(".")
        expected = torch.float32 if any(part in kept for part in parts) else torch.bfloat16
        assert weight.dtype == expected, name


def test_a_fresh_process_loads_it(case, tmp_path):
    case.network.save_pretrained(tmp_path)
    name, module = type(case.network).__name__, type(case.network).__module__
    code = f"from {module} import {name} as N; print(sum(p.numel() for p in N.from_pretrained({str(tmp_path)!r}).parameters()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == sum(weight.numel() for weight in case.network.parameters())


def test_pushing_uploads_config_and_weights(case, monkeypatch):
    uploaded = {}

    def upload(self, folder, repo_id, **options):
        uploaded[repo_id] = {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    monkeypatch.setattr("diffusers.utils.hub_utils.PushToHubMixin._upload_folder", upload)
    monkeypatch.setattr(
        "diffusers.utils.hub_utils.create_repo", lambda repo_id, **_: type("", (), {"repo_id": repo_id})
    )
    case.network.push_to_hub("someone/something")
    files = uploaded["someone/something"]
    assert json.loads(files["config.json"])["_class_name"] == type(case.network).__name__
    assert "diffusion_pytorch_model.safetensors" in files


def test_layerwise_casting_keeps_streams_equal(case):
    exact = case.whole(case.network)
    case.network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {weight.dtype for weight in case.network.parameters()}
    assert torch.float8_e4m3fn in stored
    whole = case.whole(case.network)
    assert torch.isfinite(whole).all() and not torch.equal(whole, exact)
    close(case.streamed(case.network), whole)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading_keeps_streams_equal(case, kind):
    exact = case.whole(case.network)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    cpu = torch.device("cpu")
    apply_group_offloading(case.network, onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    close(case.whole(case.network), exact)
    close(case.streamed(case.network), exact)


def test_weights_on_disk_keep_streams_equal(case, tmp_path):
    from accelerate import disk_offload

    exact = case.whole(case.network)
    disk_offload(case.network, tmp_path, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in case.network.parameters())
    assert list(tmp_path.iterdir())
    close(case.whole(case.network), exact)
    close(case.streamed(case.network), exact)


def test_sequential_offloading_keeps_streams_equal(case):
    from accelerate import cpu_offload

    exact = case.whole(case.network)
    cpu_offload(case.network, execution_device=torch.device("cpu"), offload_buffers=True)
    close(case.whole(case.network), exact)
    close(case.streamed(case.network), exact)


def test_the_whole_network_compiles_without_a_graph_break(case):
    torch.compiler.reset()
    network = torch.compile(case.network, fullgraph=True, backend="aot_eager")
    close(case.whole(network), case.whole(case.network))


def test_repeated_blocks_compile_without_a_graph_break_and_streams_stay_equal(case):
    exact = case.whole(case.network)
    torch.compiler.reset()
    case.network.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=64):  # one compilation for each shape of a block
        close(case.whole(case.network), exact)
        close(case.streamed(case.network), exact)


def test_no_recompilation_from_chunk_to_chunk_once_the_window_is_full(make_transformer):
    case = Transformer(make_transformer)
    case.network.compile_repeated_blocks(fullgraph=True, backend="aot_eager", dynamic=False)
    state = TemporalState(window=2, sink=1)
    chunks = torch.randn(1, 3, 12, 4, 4).split(1, dim=2)

    def step(chunk):
        case._call(case.network, chunk, state=state.frozen())
        case._call(case.network, chunk, state=state)

    torch.compiler.reset()
    for chunk in chunks[:4]:
        step(chunk)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for chunk in chunks[4:]:
            step(chunk)

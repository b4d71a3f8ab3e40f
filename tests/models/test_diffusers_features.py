"""What users of diffusers do with a model: files of every kind, offloading, casting, compilation, backends."""

import inspect
import json
import shutil
import subprocess
from functools import partial

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from tests.warm import warm_python
from vgen.io.fingerprint import weights_digest
from vgen.temporal.state import TemporalState

ONE_LEVEL = {
    "block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}  # fmt: skip


class VAE:
    """A tiny VAE, what it maps, and the same slice by slice."""

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
    """A tiny denoiser, what it maps, and the same slice by slice."""

    def __init__(self, make):
        self.network = make(group_modes=["full", "causal"], keyframe_slots=1, frame_rate_embedding=True)
        generator = torch.Generator().manual_seed(0)
        self.input = torch.randn(1, 3, 4, 4, 4, generator=generator)
        self.prompt = torch.randn(1, 6, 5, generator=generator)
        self.keyframes = torch.randn(1, 4, 4, 4, 4, generator=generator)

    def _call(self, network, clip, keyframes=None, **options):
        like = {"device": clip.device, "dtype": network.dtype}
        level = torch.tensor([300.0], device=clip.device)
        keyframes = None if keyframes is None else keyframes.to(**like)
        options |= {"frame_rate": 8.0, "keyframes": keyframes}
        return network(clip.to(**like), level, self.prompt.to(**like), **options).sample.float()

    def whole(self, network):
        return self._call(network, self.input, self.keyframes, groups="causal")

    def streamed(self, network):
        state = TemporalState(window=4)
        pieces = zip(self.input.split(1, dim=2), self.keyframes.split(1, dim=2), strict=True)
        return torch.cat([self._call(network, *piece, state=state) for piece in pieces], dim=2)


class UNet(Transformer):
    """The same of the other denoiser."""


@pytest.fixture(params=["vae", "transformer", "unet"])
def case(request, make_vae, make_transformer, make_unet):
    if request.param == "vae":
        return VAE(make_vae)
    return Transformer(make_transformer) if request.param == "transformer" else UNet(make_unet)


@pytest.fixture(params=["transformer", "unet"])
def make_denoiser(request, make_transformer, make_unet):
    return make_transformer if request.param == "transformer" else make_unet


@pytest.fixture(params=["transformer", "unet"])
def make_small_denoiser(request, make_transformer, make_unet):
    if request.param == "transformer":
        return partial(make_transformer, num_layers=1)
    return partial(make_unet, **ONE_LEVEL)


@pytest.fixture(autouse=True)
def own_backend(monkeypatch):
    """Setting a network's backend also sets that of all others."""
    active = _AttentionBackendRegistry._active_backend
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", active)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def close(a, b, atol=1e-4, rtol=0.0):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def close_in_half_precision(a, b):
    """Up to two units in the last place of bfloat16."""
    close(a, b, atol=3e-2, rtol=2**-6)


def assert_same(case, network):
    """Weights are bit-identical; outputs are equal up to rounding, which depends on the alignment of weights."""
    weights = network.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in case.network.state_dict().items())
    close(case.whole(network), case.whole(case.network), atol=1e-5)


def load(case, folder, **options):
    return type(case.network).from_pretrained(folder, **options).eval()


def test_outputs_are_tuples_if_requested(case):
    network = case.network
    if isinstance(case, VAE):
        posterior, *rest = network.encode(case.input, return_dict=False)
        mean = posterior.mode()
        assert not rest and torch.equal(mean, network.encode(case.input).latent_dist.mode())
        (clip,) = network.decode(mean, return_dict=False)
        assert torch.equal(clip, network.decode(mean).sample)
        (clip,) = network(case.input, sample_posterior=False, return_dict=False)
        assert torch.equal(clip, network(case.input, sample_posterior=False).sample)
    else:
        inputs = case.input, torch.tensor([300.0]), case.prompt
        (prediction,) = network(*inputs, return_dict=False)
        assert torch.equal(prediction, network(*inputs).sample)


@pytest.mark.parametrize("parallel", [False, True])
def test_sharded_files_load_exactly(case, tmp_path, monkeypatch, parallel):
    case.network.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    if parallel:
        monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    assert_same(case, load(case, tmp_path))


def test_a_variant_loads_by_its_name_and_a_missing_one_is_named(case, tmp_path):
    case.network.save_pretrained(tmp_path, variant="fp16")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert_same(case, load(case, tmp_path, variant="fp16"))
    with pytest.raises(OSError, match="bf16"):
        load(case, tmp_path, variant="bf16")
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors"):
        load(case, tmp_path)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_a_device_map_places_the_network(case, tmp_path, device_map):
    case.network.save_pretrained(tmp_path)
    network = load(case, tmp_path, device_map=device_map)
    assert list(map(str, network.hf_device_map.values())) == ["cpu"]
    close(case.whole(network), case.whole(case.network))


def test_a_device_map_over_memory_and_disk_keeps_streams_equal(case, tmp_path):
    parts = [name for name, part in case.network.named_children() if list(part.parameters())]
    heavy = {VAE: "decoder", Transformer: "blocks", UNet: "up_blocks"}[type(case)]
    device_map = {name: "disk" if name == heavy else "cpu" for name in parts}
    if type(case) is Transformer:
        device_map["scale_shift_table"] = "cpu"
    case.network.save_pretrained(tmp_path / "weights")
    network = load(case, tmp_path / "weights", device_map=device_map, offload_folder=tmp_path / "offload")
    assert any(weight.is_meta for weight in network.parameters())
    close(case.whole(network), case.whole(case.network))
    close(case.streamed(network), case.whole(case.network))


def test_what_stays_in_float32_does_so_when_loaded_in_half_precision(case, tmp_path):
    case.network.save_pretrained(tmp_path)
    network = load(case, tmp_path, dtype=torch.bfloat16)
    full = {name for name, weight in network.named_parameters() if weight.dtype == torch.float32}
    kept = ("time_embedder", "scale_shift_table", "norm2")  # the other norms have no weights
    named = {name for name, _ in network.named_parameters() if any(part in name.split(".") for part in kept)}
    assert full == (named if type(case) is Transformer else set())


def test_a_fresh_process_loads_it(case, tmp_path):
    case.network.save_pretrained(tmp_path)
    name, module = type(case.network).__name__, type(case.network).__module__
    loaded = f"__import__({module!r}, fromlist=['x']).{name}.from_pretrained({str(tmp_path)!r})"
    code = f"from vgen.io.fingerprint import weights_digest; print(weights_digest({loaded}))"
    done = subprocess.run([warm_python(), "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [weights_digest(case.network)]


def test_pushing_uploads_config_and_weights(case, hub):
    case.network.push_to_hub("someone/something")
    files = hub["someone/something"]
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
def test_group_offloading_keeps_streams_equal(case, kind, tmp_path, nothing_is_left):
    exact = case.whole(case.network)
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    options |= {"onload_device": torch.device("cpu"), "offload_to_disk_path": str(tmp_path)}
    apply_group_offloading(case.network, offload_type=kind, **options)
    close(case.whole(case.network), exact)
    close(case.streamed(case.network), exact)
    assert all(weight.isnan().all() for weight in case.network.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("use_stream", [False, True])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading_from_cuda_keeps_streams_equal(case, kind, use_stream):
    exact = case.whole(case.network)
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    options |= {"onload_device": torch.device("cuda"), "use_stream": use_stream}
    apply_group_offloading(case.network, offload_type=kind, **options)
    case.input = case.input.cuda()
    close(case.whole(case.network).cpu(), exact, atol=1e-3)
    close(case.streamed(case.network).cpu(), exact, atol=1e-3)


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


@pytest.fixture
def small_case(case, make_vae, make_transformer, make_unet):
    """The smallest networks with every kind of layer: inductor starts a C++ compiler for each fused kernel."""
    if isinstance(case, VAE):
        return VAE(partial(make_vae, dim_mult=[1, 1], temperal_downsample=[True]))
    if type(case) is Transformer:
        return Transformer(partial(make_transformer, num_layers=1))
    return UNet(partial(make_unet, **ONE_LEVEL))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_whole_network_compiles_without_a_graph_break(case, small_case, monkeypatch, backend):
    if backend == "inductor":
        if type(case) is not Transformer:
            backend = "aot_eager"  # compilation takes a minute; that of their blocks is tested below
        elif shutil.which("g++") is None:
            pytest.skip("inductor needs a C++ compiler")
        case = small_case
    exact = case.whole(case.network)
    torch.compiler.reset()
    # the methods rather than the module, whose other methods would stay as they are
    for method in ("encode", "decode") if isinstance(case, VAE) else ("forward",):
        compiled = torch.compile(getattr(case.network, method), fullgraph=True, backend=backend)
        monkeypatch.setattr(case.network, method, compiled)
    close(case.whole(case.network), exact)


@pytest.mark.slow
def test_repeated_blocks_compile_without_a_graph_break_and_streams_stay_equal(small_case):
    case = small_case
    exact = case.whole(case.network)
    torch.compiler.reset()
    case.network.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=64):  # one compilation for each shape of a block
        close(case.whole(case.network), exact)
        close(case.streamed(case.network), exact)


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["whole", "blocks"])
def test_a_stream_is_compiled_in_its_first_two_chunks_only(make_small_denoiser, parts):
    case = Transformer(make_small_denoiser)
    network = case.network
    state, same = TemporalState(window=2, sink=1), TemporalState(window=2, sink=1)
    chunks = torch.randn(1, 3, 7, 4, 4).split(1, dim=2)
    exact = [
        (case._call(network, chunk, state=same.frozen()), case._call(network, chunk, state=same)) for chunk in chunks
    ]
    torch.compiler.reset()
    if parts == "whole":
        call = torch.compile(network.forward, fullgraph=True, backend="eager", dynamic=False)
    else:
        network.compile_repeated_blocks(fullgraph=True, backend="eager", dynamic=False)
        call = network
    for index, (chunk, expected) in enumerate(zip(chunks, exact, strict=True)):
        with torch._dynamo.config.patch(error_on_recompile=index > 1):
            for one, result in zip((state.frozen(), state), expected, strict=True):
                out = call(chunk, torch.tensor([300.0]), case.prompt, frame_rate=8.0, state=one)
                close(out.sample, result)
    assert state.num_frames == same.num_frames == 3


@pytest.mark.parametrize(
    "options", [{"mode": "reduce-overhead"}, {"mode": "max-autotune"}, {"options": {"triton.cudagraphs": True}}]
)
@pytest.mark.parametrize("method", ["compile", "compile_repeated_blocks"])
def test_a_state_rejects_networks_compiled_with_cuda_graphs(small_case, method, options):
    case = small_case
    getattr(case.network, method)(**options)
    with pytest.raises(ValueError, match="compiled with mode='reduce-overhead' or 'max-autotune' overwrites"):
        case.streamed(case.network)
    getattr(case.network, method)(backend="eager", mode="default")
    assert not case.network.uses_cuda_graphs


@pytest.mark.slow
def test_a_stream_through_the_compiled_vae_is_compiled_once_for_its_first_and_once_for_later_slices(make_vae):
    case = VAE(make_vae)
    clip = torch.cat([case.input, case.input[:, :, 1:]], dim=2)
    latents = case.network.encode(clip).latent_dist.mode()
    exact = case.network.decode(latents).sample
    torch.compiler.reset()
    encode, decode = (
        torch.compile(method, fullgraph=True, backend="eager", dynamic=False)
        for method in (case.network.encode, case.network.decode)
    )
    state, means, frames = TemporalState(), [], []
    for index, piece in enumerate([clip[:, :, :1], *clip[:, :, 1:].split(4, dim=2)]):
        with torch._dynamo.config.patch(error_on_recompile=index > 2):
            means.append(encode(piece, state=state).latent_dist.mode())
            frames.append(decode(means[-1], state=state).sample)
    close(torch.cat(means, dim=2), latents)
    close(torch.cat(frames, dim=2), exact)


BACKENDS = ["native", "_native_math", "_native_flash", "flex"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_attention_backend_gives_the_native_result_and_stays_causal(make_denoiser, backend, monkeypatch):
    case = Transformer(make_denoiser)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]])
    inputs = {"groups": "causal"} | ({} if backend == "_native_flash" else {"encoder_attention_mask": mask})
    exact = case._call(case.network, case.input, **inputs)
    case.network.set_attention_backend(backend)
    used, function = [], _AttentionBackendRegistry._backends[backend]
    counted = lambda *args, **kwargs: used.append(backend) or function(*args, **kwargs)  # noqa: E731
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName(backend), counted)
    close(case._call(case.network, case.input, **inputs), exact)
    assert used
    assert_causal(case, **inputs)


def assert_causal(case, **inputs):
    """Early frames do not depend on later ones."""
    changed = case.input.clone()
    changed[:, :, 2:] = 0
    before, after = (case._call(case.network, clip, **inputs) for clip in (case.input, changed))
    assert torch.equal(before[:, :, :2], after[:, :, :2]) and not torch.equal(before[:, :, 2:], after[:, :, 2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [{}, {"attention": "divided"}, {"non_local": True}])
def test_xformers_gets_masks_with_aligned_rows(make_denoiser, parts, dtype, monkeypatch):
    if parts.keys() - inspect.signature(type(make_denoiser()).__init__).parameters.keys():
        pytest.skip("the other denoiser has this")
    case = Transformer(partial(make_denoiser, **parts))
    network, masks = case.network.to(dtype), []
    inputs = {"groups": "causal", "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0]])}
    exact = case._call(network, case.input, **inputs)
    native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]

    def attend(query, key, value, attn_mask=None, **options):
        if attn_mask is not None:  # what diffusers makes of it, and what xformers' `_check_bias_alignment` looks at
            attn_mask = attn_mask.expand(len(query), query.shape[2], query.shape[1], key.shape[1])
            assert attn_mask.dtype == query.dtype and all(stride % 8 == 0 for stride in attn_mask.stride()[:-1])
            masks.append(attn_mask.shape)
        return native(query, key, value, attn_mask, **options)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.XFORMERS, attend)
    accepted = _AttentionBackendRegistry._supported_arg_names
    monkeypatch.setitem(accepted, AttentionBackendName.XFORMERS, accepted[AttentionBackendName.NATIVE])
    for module in network.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = AttentionBackendName.XFORMERS
    close(case._call(network, case.input, **inputs), exact)
    assert {6} < {shape[-1] for shape in masks}  # of prompts, and of frames or tokens


def test_a_backend_without_masks_names_the_alternative(make_denoiser):
    case = Transformer(make_denoiser)
    case.network.set_attention_backend("_native_flash")
    with pytest.raises(ValueError, match=r'does not support attention masks.*set_attention_backend\("native"\)'):
        case._call(case.network, case.input, encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0, 0]]))


@pytest.mark.parametrize("installed", [False, True])
def test_xformers_without_cuda_is_one_clear_error(make_denoiser, monkeypatch, installed):
    monkeypatch.setattr("vgen.models.denoiser.is_xformers_available", lambda: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    network = make_denoiser()
    message = r"CUDA.*pip install vgen\[xformers\]"
    with pytest.raises(RuntimeError, match=message):
        network.set_attention_backend("xformers")
    with pytest.raises(RuntimeError, match=message):
        network.enable_xformers_memory_efficient_attention()


def test_disabling_xformers_restores_the_network(make_denoiser):
    case = Transformer(make_denoiser)
    exact = case.whole(case.network)
    case.network.disable_xformers_memory_efficient_attention()
    assert torch.equal(case.whole(case.network), exact)
    with pytest.raises(ValueError, match="attention_op"):
        case.network.enable_xformers_memory_efficient_attention(attention_op=object())


@pytest.mark.gpu
@pytest.mark.parametrize("enable", ["set_attention_backend", "enable_xformers_memory_efficient_attention"])
def test_xformers_gives_the_native_result_with_cuda(make_denoiser, enable):
    pytest.importorskip("xformers")
    case = with_cuda(make_denoiser)
    inputs = {"groups": "causal", "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0]], device="cuda")}
    exact = case._call(case.network, case.input, **inputs)
    getattr(case.network, enable)(*(["xformers"] if enable == "set_attention_backend" else []))
    close_in_half_precision(case._call(case.network, case.input, **inputs), exact)
    assert_causal(case, **inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [*BACKENDS, "_native_cudnn", "_native_efficient"])
def test_every_attention_backend_gives_the_native_result_with_cuda(make_denoiser, backend):
    case = with_cuda(make_denoiser)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]], device="cuda")
    inputs = {"groups": "causal"} | ({} if backend == "_native_flash" else {"encoder_attention_mask": mask})
    exact = case._call(case.network, case.input, **inputs)
    case.network.set_attention_backend(backend)
    close_in_half_precision(case._call(case.network, case.input, **inputs), exact)
    assert_causal(case, **inputs)


def with_cuda(make_denoiser):
    """In half precision there, with heads that kernels take."""
    of_transformer = "num_layers" in make_denoiser().config
    size = 16 if of_transformer else 1  # of a U-Net, this is the number of heads
    case = Transformer(lambda **config: make_denoiser(attention_head_dim=size, **config))
    case.network.to("cuda", torch.bfloat16)
    case.input, case.prompt = case.input.cuda(), case.prompt.cuda()
    return case


def test_parallelism_is_rejected_with_a_reason(case, tmp_path):
    from diffusers import ContextParallelConfig, TensorParallelConfig

    case.network.save_pretrained(tmp_path)
    for config in (ContextParallelConfig(ring_degree=2), TensorParallelConfig(tp_degree=2)):
        with pytest.raises(ValueError, match="frames"):
            case.network.enable_parallelism(config=config)
        with pytest.raises(ValueError, match="frames"):
            load(case, tmp_path, parallel_config=config)


@pytest.mark.parametrize("kind", ["transformer", "unet"])
def test_fused_projections_are_an_error(kind, request):
    with pytest.raises(ValueError, match="fused projections .* are not supported"):
        request.getfixturevalue(f"make_{kind}")().fuse_qkv_projections()

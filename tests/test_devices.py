"""Networks, losses, the data feed and the pipeline on a GPU: no device is mixed, and no step waits for the device."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from tests.fake_cuda import FakeCuda, LiveMemory, cuda_device_guard
from tests.test_pipeline import PROMPT, make_pipeline, seeded
from tests.test_unet_pipeline import build
from tests.training.test_feed import make, run_of  # noqa: F401, a fixture
from vgen import load_rollout
from vgen.data.shapes import ShapesWorld, render
from vgen.diffusion import make_scheduler
from vgen.metrics.reference import psnr, ssim
from vgen.metrics.temporal import border_differences, drift_slopes, statistics, warping_error
from vgen.models.convlstm import ConvLSTMPredictor
from vgen.models.image_vae import PerFrameVAE
from vgen.models.vae import CausalVideoVAE
from vgen.temporal.flow import Motion, visible
from vgen.temporal.state import TemporalState
from vgen.training.adversarial import PatchDiscriminator, VAEWithDiscriminator, adaptive_weight, discriminator_loss
from vgen.training.checkpoint import EMAWeights
from vgen.training.feed import Feed, to_device
from vgen.training.objective import Objective, PromptedDenoiser, denoising_loss
from vgen.training.run import RunConfig, make_optimizers
from vgen.training.sample import conditioning, denoiser_temporal_loss
from vgen.training.temporal_loss import TemporalLossConfig, temporal_loss

DEVICE = torch.device("cuda:0")

ALLOWED = {
    "prompts.encode_texts": "token ids and masks are made on the host, once per prompt",
    "pipeline.prepare_latents": "noise is drawn on the host, so that a seed gives the same video on every device",
    "rollout._denoise": "the noise of a chunk",
    "rollout._redraw": "which videos have a new prompt, once per change",
    "sampler.remember": "the noise of the weak history, once per chunk",
    "sampler._denoise": "the timesteps; the interpolator's noise",
    "vae._statistics": "mean and deviation of the latents are in the config, once per encoded or decoded slice",
    "pipeline._encode_given": "given frames come from the host",
    "rollout.take": "given frames come from the host",
    "interpolation.take": "given frames come from the host",
    "pipeline._postprocess": "the result is an array",
    "pixels.to_frames": "the result is an array",
    "pipeline.predict": "finished chunks wait for the others on the host",
    "pipeline.interpolate": "finished windows wait for the others on the host",
}
"""Host synchronizations of a pipeline outside denoising steps, by function, with their reasons."""


@pytest.fixture(scope="module")
def mode():
    with cuda_device_guard():
        yield FakeCuda()


@pytest.fixture
def cuda(mode):
    """The mode in which the device exists."""
    with mode:
        mode.syncs.clear()
        yield mode


def on_cuda(module):
    return module.to(DEVICE)


def randn(*shape):
    return torch.randn(shape, device=DEVICE)


def waits(cuda):
    """The places where the host waited."""
    return set(cuda.syncs)


@pytest.mark.parametrize("kind", ["encode", "decode"])
def test_the_vae_needs_at_most_the_memory_of_diffusers(cuda, kind):
    """Wan's layout at 480x832, with a sixth of its channels."""
    clip, latents = randn(1, 3, 17, 480, 832), randn(1, 4, 5, 60, 104)
    peaks = {}
    for network_class in (CausalVideoVAE, AutoencoderKLWan):
        config = {"base_dim": 16, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
        vae = on_cuda(network_class(**config))
        with torch.no_grad(), LiveMemory() as memory:
            vae.encode(clip) if kind == "encode" else vae.decode(latents)
        peaks[network_class] = memory.peak
    assert 2**20 < peaks[CausalVideoVAE] <= peaks[AutoencoderKLWan]


def test_a_tensor_on_the_cpu_does_not_mix_with_one_on_the_device(cuda):
    with pytest.raises(RuntimeError, match="devices,? cuda:0"):
        randn(2) + torch.ones(2)
    with pytest.raises(RuntimeError, match="devices"):
        torch.nn.Linear(2, 2)(randn(1, 2))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu().numpy(),
        lambda x: torch.ones(2).to(x),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.copy_(torch.ones(2)),
        lambda x: x[torch.tensor([0])],
    ],
    ids=["item", "bool", "tolist", "to the host", "to the device", "new tensor", "copy", "index"],
)
def test_waiting_for_the_device_is_counted(cuda, wait):
    x = randn(2)
    (x * 2).add_(1)
    torch.ones(2).to(DEVICE, non_blocking=True)
    assert not cuda.syncs
    wait(x)
    assert cuda.syncs


def test_a_size_that_depends_on_values_raises(cuda):
    with pytest.raises(DynamicOutputShapeException):
        randn(2).nonzero()


INPUTS = {
    "full": lambda: {},
    "causal, with all conditions": lambda: {
        "groups": "causal",
        "timestep": torch.rand(1, 3, device=DEVICE),
        "keyframes": randn(1, 16, 3, 4, 4),
        "encoder_attention_mask": torch.ones(1, 4, device=DEVICE),
        "frame_rate": 8.0,
    },
    "chunks": lambda: {"groups": "chunk", "frame_rate": torch.full((1,), 8.0, device=DEVICE)},
    "list of groups": lambda: {"groups": [0, 1, 1], "encoder_hidden_states": None},
    "tensor of groups": lambda: {"groups": torch.tensor([[0, 1, 1]])},
}
GAP = {"conv_context": lambda: randn(1, 3, 2, 4, 4), "gap_index": lambda: torch.ones(1, dtype=int, device=DEVICE)}
NETWORK = {"window": 2, "sink": 1, "keyframe_slots": 4, "frame_rate_embedding": True}


def predict(network, frames=3, **inputs):
    defaults = {"timestep": torch.ones(1, device=DEVICE), "encoder_hidden_states": randn(1, 4, 5)}
    with torch.no_grad():
        return network(randn(1, 3, frames, 4, 4), **defaults | inputs).sample


@pytest.fixture(params=["joint", "divided", "unet"])
def denoiser(request, cuda, make_transformer, make_unet):
    if request.param == "unet":
        network = make_unet(**NETWORK, non_local=True)
    else:
        network = make_transformer(**NETWORK, attention=request.param, num_layers=1)
    on_cuda(network)
    cuda.syncs.clear()
    return network


def test_denoisers(cuda, denoiser):
    for name, inputs in INPUTS.items():
        assert predict(denoiser, **inputs()).device == DEVICE, name
        assert not waits(cuda), name


def test_a_clip_with_a_gap(cuda, make_unet):
    network = on_cuda(make_unet())
    cuda.syncs.clear()
    assert predict(network, **{name: draw() for name, draw in GAP.items()}).device == DEVICE
    assert not cuda.syncs


def test_streams_of_denoisers(cuda, denoiser):
    state = TemporalState()
    for _ in range(4):
        predict(denoiser, 1, state=state, frame_rate=8.0)
    assert predict(denoiser, 1, state=state.frozen(), frame_rate=8.0).device == DEVICE
    assert all(value.device == DEVICE for value in state._tensors.values())
    assert not cuda.syncs


@pytest.mark.parametrize("groups", ["full", "causal", [1, 0, 2]])
def test_a_backend_without_masks(cuda, make_transformer, groups, monkeypatch):
    active = _AttentionBackendRegistry._active_backend  # diffusers makes the last choice global
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", active)
    network = on_cuda(make_transformer(num_layers=1))
    network.set_attention_backend("_native_flash")
    cuda.syncs.clear()
    assert predict(network, groups=groups).device == DEVICE
    assert not waits(cuda)


@pytest.mark.parametrize("setting", ["whole", "tiled", "sliced", "normalized"])
def test_video_vae(cuda, make_vae, setting):
    vae = on_cuda(make_vae())
    if setting == "tiled":
        vae.enable_tiling(8, 8, 4, 4)
    if setting == "sliced":
        vae.enable_slicing()
    cuda.syncs.clear()
    with torch.no_grad():
        latents = vae.encode(randn(2, 3, 5, 8, 12)).latent_dist.mode()
        if setting == "normalized":
            latents = vae.denormalize(vae.normalize(latents))
        assert vae.decode(latents).sample.device == DEVICE
    assert waits(cuda) == ({"vae._statistics"} if setting == "normalized" else set())


def test_a_stream_of_a_video_vae(cuda, make_vae):
    vae, states = on_cuda(make_vae()), (TemporalState(), TemporalState())
    cuda.syncs.clear()
    with torch.no_grad():
        for part in randn(1, 3, 9, 8, 8).split(2, dim=2):
            latents = vae.encode(part, state=states[0]).latent_dist.mode()
            assert vae.decode(latents, state=states[1]).sample.device == DEVICE
    assert not cuda.syncs


def test_an_image_vae_and_a_convlstm(cuda):
    image_vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    vae, recurrent = PerFrameVAE(on_cuda(image_vae)), on_cuda(ConvLSTMPredictor(4, (4,)))
    cuda.syncs.clear()
    with torch.no_grad():
        latents = vae.normalize(vae.encode(randn(1, 3, 2, 8, 8)).latent_dist.mode())
        assert vae.decode(vae.denormalize(latents)).sample.device == DEVICE
        assert recurrent.predict(randn(1, 3, 2, 8, 8), 2).device == DEVICE
    assert not cuda.syncs


@pytest.mark.parametrize("prediction", ["flow", "v_prediction", "epsilon"])
def test_objectives(cuda, prediction):
    """Diffusion copies its noise schedule to the device in the first step."""
    objective = Objective(make_scheduler(prediction), 0.0 if prediction == "flow" else 5.0)
    for _ in range(2):
        cuda.syncs.clear()
        sample = objective(randn(2, 3, 3, 4, 4), randn(2, 3, 3, 4, 4), torch.rand(2, 3, device=DEVICE))
        clean, signal = objective.estimate(sample, sample.target)
        assert denoising_loss(clean, sample.target, sample.weight * signal).device == DEVICE
    assert not cuda.syncs


def backward(loss, weights):
    """The gradients of a loss; zeros on builds without CUDA, whose autograd engine asks for a stream of the device."""
    if torch.backends.cuda.is_built():
        loss.backward()
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad


def test_temporal_losses(cuda):
    weights = TemporalLossConfig(difference_weight=1, warping_weight=1, matched_weight=1)
    video, flow = randn(1, 3, 4, 8, 8).requires_grad_(), randn(1, 2, 3, 8, 8)
    loss = temporal_loss(weights, video, randn(1, 3, 4, 8, 8), Motion(flow, torch.ones_like(flow[:, :1])))
    backward(loss.sum(), [video])
    assert visible(flow[:, :, 0], flow[:, :, 1]).device == video.grad.device == DEVICE
    assert not cuda.syncs


def optimize(network, **settings):
    """An optimizer step with the gradients, as `Run.update` takes it."""
    optimizers, schedules = make_optimizers(RunConfig(output_dir=None, **settings), network)
    average = EMAWeights(network, 0.9)

    def update():
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        average.step()

    return update


def test_a_training_step_of_a_denoiser(cuda, make, make_unet):  # noqa: F811
    config, batches = make(num_workers=0)
    feed = Feed(run_of(config, device=DEVICE), batches)
    assert feed._loader.pin_memory
    feed._loader.pin_memory = False  # needs a GPU
    model = PromptedDenoiser(on_cuda(make_unet(keyframe_slots=4, sink=1, frame_rate_embedding=True)), None)
    objective, update = Objective(make_scheduler("flow")), optimize(model, optimizer="muon")  # with AdamW for vectors
    cuda.syncs.clear()
    batch = next(feed)
    conditions = conditioning(batch) | {"input_ids": None, "prompt_mask": None, "prompt_embeds": randn(4, 8, 5)}
    sample = objective(batch["latents"], batch["noise"], batch["levels"])
    prediction = model(sample.latents, sample.timestep, **conditions)
    losses = denoising_loss(prediction, sample.target, sample.weight * (batch["generated"] & batch["real"]))
    losses = losses + denoiser_temporal_loss(config, None, batch, *objective.estimate(sample, prediction))
    backward(losses.sum(), model.parameters())
    update()
    assert losses.device == DEVICE and not waits(cuda)


def test_a_training_step_of_a_vae(cuda, make_vae):
    model = on_cuda(VAEWithDiscriminator(make_vae(), PatchDiscriminator(8)))
    update, weights = optimize(model), TemporalLossConfig(matched_weight=1)
    cuda.syncs.clear()
    clip = randn(1, 3, 5, 32, 32)
    out = model(clip, generator=None)
    error = (out.sample - clip).abs().mean() + temporal_loss(weights, out.sample, clip).mean()
    generator_loss = -out.generator_logits.mean()
    weight = 1.0
    if torch.backends.cuda.is_built():  # see `backward`
        weight = adaptive_weight(error, generator_loss, model.vae.decoder.conv_out.weight)
    loss = error + weight * generator_loss + discriminator_loss(out.real, out.fake) + out.latent_dist.kl().sum()
    backward(loss, model.parameters())
    update()
    assert loss.device == DEVICE and not cuda.syncs


def test_a_batch_is_copied_without_blocking(cuda):
    moved = to_device({"latents": torch.ones(2), "groups": [0, 1], "nested": {"real": torch.ones(1)}}, DEVICE)
    assert moved["latents"].device == moved["nested"]["real"].device == DEVICE and moved["groups"] == [0, 1]
    assert not cuda.syncs


@pytest.mark.parametrize(
    "measure",
    [
        lambda clip: psnr(clip, clip),
        lambda clip: ssim(clip, clip),
        lambda clip: statistics(clip)["sharpness"],
        lambda clip: drift_slopes(clip)["contrast"],
        lambda clip: border_differences(clip, 1)[0],
        lambda clip: warping_error(clip, motion=Motion(clip[:, :2, 1:], clip[:, 2:, 1:])),
        lambda clip: render([ShapesWorld().scene(0)], device=DEVICE, height=8, width=8, num_frames=2),
    ],
    ids=["psnr", "ssim", "statistics", "drift", "borders", "warping", "render"],
)
def test_metrics_and_rendering_stay_on_the_device(cuda, measure):
    assert measure(randn(1, 3, 9, 8, 8)).device == DEVICE


SETTINGS = {"tasks": ["text", "leading", "keyframes"], "window": 2, "sink": 1, "trained_token_frames": 5}
VIDEO = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(params=["transformer", "unet"])
def pipe(request, cuda, randomize):
    pipe = build(randomize) if request.param == "unet" else make_pipeline(**SETTINGS)
    pipe.to(DEVICE)
    cuda.syncs.clear()
    return pipe


@pytest.fixture(scope="module")
def small(mode):
    with mode:
        return make_pipeline(**SETTINGS).to(DEVICE)


def generate(pipe, **options):
    return pipe(PROMPT, **{"generator": seeded(), "num_frames": 5, "output_type": "latent"} | options).frames


def test_no_denoising_step_waits(cuda, pipe):
    counts = []
    for steps in (1, 2):
        cuda.syncs.clear()
        assert generate(pipe, num_inference_steps=steps).device == DEVICE
        counts.append(dict(cuda.syncs))
    names = {"prompts.encode_texts": 4, "pipeline.prepare_latents": 1, "sampler._denoise": 1}
    assert counts == [names, names]


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "heun": (FlowMatchHeunDiscreteScheduler(), 0),
    "ddim": (DDIMScheduler(), 0),
    "dpmsolver++": (DPMSolverMultistepScheduler(**FLOW), 0),
    "unipc": (UniPCMultistepScheduler(**FLOW), None),
    "ancestral": (EulerAncestralDiscreteScheduler(), 1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_do_not_wait(cuda, small, name, monkeypatch):
    """Exceptions: the noise of a stochastic scheduler is drawn on the host, and UniPC copies its coefficients."""
    scheduler, per_step = SCHEDULERS[name]
    monkeypatch.setattr(small, "scheduler", scheduler)
    counts = []
    for steps in (2, 3):
        cuda.syncs.clear()
        generate(small, num_inference_steps=steps, guidance_scale=1.0)
        counts.append(cuda.syncs["sampler._step"])
        assert set(cuda.syncs) <= set(ALLOWED) | {"sampler._step"}
    assert counts[0] > 0 if per_step is None else counts == [2 * per_step, 3 * per_step]


COMMON = {"prompts.encode_texts", "sampler._denoise"}
CHUNKS = COMMON | {"rollout._denoise", "vae._statistics", "pixels.to_frames"}
SAMPLES = {"pipeline.prepare_latents"}
RESULT = {"vae._statistics", "pipeline._postprocess"}
STREAM = {"num_frames": 5, "num_inference_steps": 1}
PATHS = {
    "causal": (lambda pipe: generate(pipe, groups="causal"), COMMON | SAMPLES),
    "guider": (lambda pipe: generate(pipe, guider=ClassifierFreeGuidance()), COMMON | SAMPLES),
    "prompts": (
        lambda pipe: pipe([PROMPT, "a"], generator=[seeded(), seeded()], num_frames=1, output_type="pt"),
        COMMON | SAMPLES | {"vae._statistics"},
    ),
    "array": (lambda pipe: generate(pipe, output_type="np"), COMMON | SAMPLES | RESULT),
    "images": (lambda pipe: generate(pipe, output_type="pil"), COMMON | SAMPLES | RESULT),
    "image": (
        lambda pipe: generate(pipe, image=VIDEO[0]),
        COMMON | SAMPLES | {"pipeline._encode_given", "vae._statistics"},
    ),
    "frames": (
        lambda pipe: generate(pipe, frames={0: VIDEO[0], 3: VIDEO[1]}),
        COMMON | SAMPLES | {"pipeline._encode_given", "vae._statistics"},
    ),
    "rollout": (lambda pipe: list(pipe.rollout(PROMPT, generator=seeded(), **STREAM)), CHUNKS),
    "continuation": (
        lambda pipe: list(pipe.rollout(PROMPT, VIDEO[:3], generator=seeded(), **STREAM)),
        CHUNKS | {"rollout.take"},
    ),
    "iterator": (
        lambda pipe: list(pipe.rollout(PROMPT, iter(VIDEO[:1]), generator=seeded(), **STREAM)),
        CHUNKS | {"rollout.take"},
    ),
    "history": (
        lambda pipe: list(
            pipe.rollout(PROMPT, generator=seeded(), history_noise=0.1, history_guidance_scale=1.5, **STREAM)
        ),
        CHUNKS | {"sampler.remember"},
    ),
    "schedule": (
        lambda pipe: list(pipe.rollout({0: PROMPT, 1: "a blue square"}, generator=seeded(), **STREAM)),
        CHUNKS | {"rollout._redraw"},
    ),
    "coarse to fine": (
        lambda pipe: list(pipe.rollout(PROMPT, generator=seeded(), keyframe_interval=2, **STREAM)),
        CHUNKS,
    ),
    "predict": (
        lambda pipe: pipe.predict(VIDEO[:1], 4, PROMPT, generator=seeded(), num_inference_steps=1),
        COMMON | {"rollout._denoise", "rollout.take", "vae._statistics", "pipeline.predict"},
    ),
    "interpolate": (
        lambda pipe: pipe.interpolate(VIDEO[:2], 2, PROMPT, generator=seeded(), num_inference_steps=1),
        COMMON | {"interpolation.take", "vae._statistics", "pipeline.interpolate"},
    ),
    "decode_stream": (
        lambda pipe: list(pipe.decode_stream(randn(1, 4, 2, 4, 4))),
        {"vae._statistics", "pixels.to_frames"},
    ),
}


@pytest.mark.parametrize("path", PATHS)
def test_every_path_waits_only_where_listed(cuda, small, path):
    run, places = PATHS[path]
    with torch.no_grad():
        run(small)
    assert waits(cuda) == places


def test_every_allowed_wait_occurs():
    assert set().union(*(places for _, places in PATHS.values())) == set(ALLOWED)


def test_forks_and_saved_rollouts_stay_on_the_device(cuda, small, tmp_path):
    rollout = small.rollout(PROMPT, generator=seeded(), num_inference_steps=1, guidance_scale=1.0)
    rollout.step()
    assert rollout.fork().step().device == rollout.step(prompt="a blue square").device == DEVICE
    rollout.save(tmp_path / "saved")
    assert load_rollout(tmp_path / "saved", small).step().device == DEVICE

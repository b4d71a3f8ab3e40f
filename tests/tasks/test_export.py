"""Exported networks in ONNX Runtime against PyTorch."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.recognition.test_networks import make
from vgen import VideoGenPipeline
from vgen.cli import app
from vgen.tasks.export import IN, OUT, Function, denoiser_graph, recognizer_graph, vae_graphs, write_onnx

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
FAST = ("tsn", "cnn_gru", "frame_difference")
SLOW = ("causal_cnn", "cnn_lstm", "recurrent_cnn", "joint_attention", "videomae")
TINY_VAE = {"dim_mult": [1, 1], "temperal_downsample": [True], "num_res_blocks": 0}
STATISTICS = {"latents_mean": [0.1, 0.2, 0.3], "latents_std": [0.5, 1.0, 2.0]}


class Session:
    """A file in ONNX Runtime, and the memory of its stream."""

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path)
        self.inputs = {one.name: one.shape for one in self.session.get_inputs()}
        self.outputs = [one.name for one in self.session.get_outputs()]

    def __call__(self, **inputs):
        values = {name: np.asarray(value) for name, value in inputs.items()}
        return dict(zip(self.outputs, self.session.run(None, values), strict=True))


def write(graph, path):
    write_onnx(graph, path)
    return Session(path)


def after(outputs):
    """The memory of a call as inputs of the next one."""
    return {name.removesuffix(OUT) + IN: value for name, value in outputs.items() if name.endswith(OUT)}


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, abs(expected).max().item()), rtol=0.0)


def randomized(name):
    """A network whose scores differ between clips, also behind batch norms."""
    model = make(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_var.fill_(0.05)
    return model


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)])
@torch.no_grad()
def test_a_recognizer_in_onnx_runtime_gives_the_scores_of_pytorch(name, tmp_path):
    model = randomized(name)
    session = write(recognizer_graph(model), tmp_path / "a.onnx")
    lengths = (16, 16) if model.network.fixed_length else (16, 24)
    for batch_size, length in zip((1, 3), lengths, strict=True):
        clip = torch.randn(batch_size, 3, length, 32, 32)
        expected = model(clip)
        if not model.network.is_streamed:
            found = session(clip=clip)
        else:
            past = {name: shape for name, shape in session.inputs.items() if name != "frame"}
            lengths = {name: [one if isinstance(one, int) else batch_size for one in past[name]] for name in past}
            memory = {name: np.zeros(shape, np.float32) for name, shape in lengths.items()}
            for index, frame in enumerate(clip.split(1, dim=2)):
                found = session(frame=frame, **memory)
                close(found["frame_logits"], expected.frame_logits[:, index])
                memory = after(found)
        close(found["logits"], expected.logits)
        close(found["features"], expected.features)


class Plain:
    """A graph without its conversion to ONNX, with the interface of `Session`."""

    def __init__(self, graph):
        self.graph, self.function = graph, Function(graph)
        self.names = [*graph.run(graph.network, *graph.inputs.values(), *graph.history(graph.given))]

    def __call__(self, **inputs):
        values = [
            torch.as_tensor(inputs[name]) for name in (*self.graph.inputs, *(key + IN for key in self.graph.given))
        ]
        names = [*self.names, *(key + OUT for key in self.graph.states)]
        return {name: value.numpy() for name, value in zip(names, self.function(*values), strict=True)}


def check_vae(vae, part, open_graph, *, stream):
    """Compares graphs with the VAE, for two batch sizes and shapes."""
    opened = {name: open_graph(graph) for name, graph in vae_graphs(vae, part, stream=stream).items()}
    for batch_size, height, width in ((1, 6, 4), (3, 4, 8)):
        if part == "encoder":
            name, output, slices = "clip", "latents", [1, 2, 4]
            x = torch.rand(batch_size, 3, 7, 2 * height, 2 * width) * 2 - 1
            expected = vae.normalize(vae.encode(x).latent_dist.mode())
        else:
            name, output, slices = "latents", "clip", [1, 1, 2]
            x = torch.randn(batch_size, 3, 4, height, width)
            expected = vae.decode(vae.denormalize(x)).sample
        parts, memory = [], {}
        for index, part_of_x in enumerate(x.split(slices if stream else x.shape[2], dim=2)):
            outputs = opened[("next" if index else "first") if stream else ""](**{name: part_of_x}, **memory)
            parts.append(outputs[output])
            memory = after(outputs)
        close(np.concatenate(parts, axis=2), expected)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("stream", [False, True])
@torch.no_grad()
def test_the_graphs_of_a_vae_give_its_latents_and_clips(part, stream, make_vae):
    check_vae(make_vae(**TINY_VAE, **STATISTICS), part, Plain, stream=stream)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "stream"), [("encoder", False), ("decoder", True)])
@torch.no_grad()
def test_a_vae_in_onnx_runtime_gives_the_latents_and_clips_of_pytorch(part, stream, make_vae, tmp_path):
    check_vae(make_vae(**TINY_VAE, **STATISTICS), part, lambda graph: write(graph, tmp_path / "a.onnx"), stream=stream)


@pytest.mark.parametrize("kind", ["joint", pytest.param("unet", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_denoising_step_in_onnx_runtime_gives_the_prediction_of_pytorch(kind, make_transformer, make_unet, tmp_path):
    small = {"block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",),
             "up_block_types": ("CrossAttnUpBlock2D",)}  # fmt: skip
    options = {"num_layers": 1} if kind == "joint" else small
    options |= {"action_dim": 2, "action_frames": 4}
    denoiser = (make_unet if kind == "unet" else make_transformer)(frame_rate_embedding=True, **options)
    session = write(denoiser_graph(SimpleNamespace(denoiser=denoiser)), tmp_path / "a.onnx")
    for batch_size, frames, height, width, words in ((1, 4, 4, 8, 3), (3, 2, 8, 6, 7)):
        latents, prompt = torch.randn(batch_size, 3, frames, height, width), torch.randn(batch_size, words, 5)
        timestep, frame_rate = 900 * torch.rand(batch_size), 2.0 + torch.arange(batch_size)
        actions = torch.randn(batch_size, frames, 8)
        actions[0, 0] = torch.nan
        expected = denoiser(latents, timestep, prompt, frame_rate=frame_rate, actions=actions).sample
        given = {"latents": latents, "timestep": timestep, "prompt_embeds": prompt, "frame_rate": frame_rate}
        given["actions"] = actions
        close(session(**given)["prediction"], expected)


def run(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)])


def test_the_command_writes_a_file_with_the_labels(tmp_path):
    make("single_frame", labels=["a", "b", "c"]).save_pretrained(tmp_path / "model")
    done = run(tmp_path / "model", tmp_path / "a.onnx")
    assert done.exit_code == 0 and "clip (" in done.output and ", 32, 32)" in done.output
    metadata = Session(tmp_path / "a.onnx").session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["labels"]) == ["a", "b", "c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "model"]  # nothing temporary is left
    again = run(tmp_path / "model", tmp_path / "a.onnx")
    assert again.exit_code == 2 and "exists already" in again.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model", "a.txt"], "must be an .onnx file"),
        (["model", "nowhere/a.onnx"], "does not exist"),
        (["no/folder/here", "a.onnx"], "no such folder"),
        (["model", "a.onnx", "--part", "encoder"], "contains no pipeline"),
        (["model", "a.onnx", "--stream"], "for encoders and decoders"),
        (["flow", "a.onnx"], "computes optical flow"),
        (["vgen/shapes-64", "a.onnx"], "choose --part encoder, decoder, denoiser"),
        (["vgen/shapes-64", "a.onnx", "--part", "denoiser", "--stream"], "exported for whole clips"),
        (["vgen/shapes-64", "a.onnx", "--part", "text"], "text"),
    ],
)
def test_what_cannot_be_exported_is_one_clear_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make("single_frame").save_pretrained(tmp_path / "model")
    make("two_stream").save_pretrained(tmp_path / "flow")
    done = run(*words)
    assert done.exit_code == 2 and message in done.output
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_vae_of_another_class_is_an_error(stable_diffusion, make_transformer, tmp_path):
    VideoGenPipeline.from_stable_diffusion(stable_diffusion).save_pretrained(tmp_path / "pipeline")
    done = run(tmp_path / "pipeline", tmp_path / "a.onnx", "--part", "decoder")
    assert done.exit_code == 2 and "only a CausalVideoVAE can be exported" in done.output

"""Export of networks to ONNX: recognizers, the encoder and the decoder of a VAE, and the step of a denoiser.

A stream is exported with its memory as inputs and outputs: the output `NAME.out` of a call is the input `NAME.in` of
the next one.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim

from vgen.checks import check_choice
from vgen.hub import find_checkpoint, locate
from vgen.io.errors import without_warnings
from vgen.models.vae import CausalVideoVAE
from vgen.pipeline import VideoGenPipeline
from vgen.recognition.recognizer import Recognizer, load_recognizer
from vgen.temporal.state import History

Part = Literal["encoder", "decoder", "denoiser"]
"""What is exported of a pipeline."""
Run = Callable[..., dict[str, Tensor]]
Shape = tuple[int, ...]
IN, OUT = ".in", ".out"
"""Ends of the names of the memory of a stream."""
_BATCH, _UNITS = 2, 3
"""Clips of the example inputs, and multiples of the least size per side; axes of length 1 would not be dynamic."""
_PROMPT_LENGTH = 4


@dataclass(frozen=True)
class Graph:
    """What one ONNX file computes."""

    network: nn.Module | None
    run: Run
    """Takes the network, the inputs and, in a stream, a `History`; returns the outputs by name."""
    inputs: Mapping[str, Tensor]
    """Example inputs by name."""
    dynamic: Mapping[str, Shape]
    """Axes of the inputs that may have other lengths."""
    states: Mapping[str, Tensor] = field(default_factory=dict)
    """Example memory of a stream by key."""
    state_axes: Mapping[str, Shape] = field(default_factory=dict)
    """Axes of the memory that may have other lengths."""
    is_first: bool = False
    """Whether this is the first call of a stream, which has no memory as input."""
    marks: Mapping[str, Tensor] = field(default_factory=dict)
    """Memory that is the same after every call."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """JSON values for the metadata of the file."""

    @property
    def given(self) -> Mapping[str, Tensor]:
        """The memory that is an input."""
        return {} if self.is_first else self.states

    def history(self, given: Mapping[str, Tensor]) -> list[History]:
        """The last argument of `run`, if this is a stream, from the memory that is an input."""
        return [History({**given, **({} if self.is_first else self.marks)})] if self.states else []


def export(
    source: str, path: Path, part: Part | None = None, *, stream: bool = False
) -> dict[Path, dict[str, list[Any]]]:
    """Writes a network as ONNX files, in float32.

    Args:
        source: A recognizer or, with `part`, a pipeline: folder, packaged checkpoint or Hub id.
        path: File to write. In the names of the two files of a stream, `-first` and `-next` follow its stem.
        part: What is exported of a pipeline; `None` exports a recognizer.
        stream: Whether the encoder or decoder is exported for streams: a file for the first call, one for all others.

    Returns:
        The shapes of the inputs of each file without the memory; lengths that may differ have names.

    Raises:
        ValueError: There is no such network, it cannot be exported, or has no streams.
        ImportError: The packages that `torch.onnx` needs are not installed.
    """
    check_installed()
    graphs = {
        path.with_stem(f"{path.stem}-{name}") if name else path: graph
        for name, graph in open_graphs(source, part, stream=stream).items()
    }
    return {file: write_onnx(graph, file) for file, graph in graphs.items()}


def check_installed() -> None:
    """Checks that the packages that `torch.onnx` needs are installed.

    Raises:
        ImportError: They are not.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(f"export needs {' and '.join(missing)}: pip install vgen[onnx]")


def open_graphs(source: str, part: Part | None, *, stream: bool) -> dict[str, Graph]:
    """Loads what is exported; the graphs have names where there are several.

    Raises:
        ValueError: As in `export`.
    """
    if part is None:
        place = locate(source)
        if isinstance(place, Path) and (place / "model_index.json").is_file():
            raise ValueError(f"{source} is a pipeline: choose --part {', '.join(get_args(Part))}")
        if stream:
            raise ValueError("--stream is for encoders and decoders: recognizers that can run frame by frame do")
        return {"": recognizer_graph(load_recognizer(source))}
    check_choice("part", part, Part)
    pipe = VideoGenPipeline.from_pretrained(find_checkpoint(source))
    if part == "denoiser":
        if stream:
            raise ValueError("--stream is for encoders and decoders: a denoiser is exported for whole clips")
        return {"": denoiser_graph(pipe)}
    if not isinstance(pipe.vae, CausalVideoVAE):
        raise ValueError(f"only a CausalVideoVAE can be exported, and {source} has {type(pipe.vae).__name__}")
    return vae_graphs(pipe.vae, part, stream=stream)


def recognizer_graph(model: Recognizer) -> Graph:
    """Whole clips; for networks that stream, one frame, so that any length is possible.

    Raises:
        ValueError: The network computes optical flow, which ONNX cannot.
    """
    config, network = model.config, model.network
    if not network.is_exported:
        raise ValueError(f"{config.name} cannot be exported: it computes optical flow with OpenCV")
    side = config.image_size
    about = {name: config[name] for name in ("labels", "frame_rate", "multi_label")}
    if not network.is_streamed:

        def whole(model: Any, clip: Tensor) -> dict[str, Tensor]:
            output = model.network(clip)
            return {"logits": output.logits, "features": output.features}

        clip = torch.zeros(_BATCH, 3, config.num_frames, side, side)
        axes = (0,) if network.fixed_length else (0, 2)
        return Graph(model, whole, {"clip": clip}, {"clip": axes}, about=about)

    def step(model: Any, frame: Tensor, history: History) -> dict[str, Tensor]:
        output = model.network(frame, history)
        return {"logits": output.logits, "frame_logits": output.frame_logits[:, 0], "features": output.features}

    frames = [torch.zeros(batch, 3, 1, side, side) for batch in (_BATCH, _BATCH + 1)]
    states, state_axes = memory_of(model, step, *([frame] for frame in frames))
    return Graph(model, step, {"frame": frames[0]}, {"frame": (0,)}, states, state_axes, about=about)


def vae_graphs(vae: CausalVideoVAE, part: Part, *, stream: bool) -> dict[str, Graph]:
    """Whole clips, or the first and every later call of a stream. Latents are normalized, as denoisers expect them."""
    s, ratio = vae.temporal_compression_ratio, vae.spatial_compression_ratio

    def encode(vae: Any, clip: Tensor, history: History | None = None) -> dict[str, Tensor]:
        mean, _ = vae._encode(clip, history).chunk(2, dim=1)
        return {"latents": vae.normalize(mean)}

    def decode(vae: Any, latents: Tensor, history: History | None = None) -> dict[str, Tensor]:
        return {"clip": vae._decode(vae.denormalize(latents), history).clamp(-1, 1)}

    run: Run
    if part == "encoder":
        run, name, unit, lengths = encode, "clip", ratio, (1 + 2 * s, 1, 2 * s)
        channels = vae.config.in_channels // (vae.config.patch_size or 1) ** 2
    else:
        run, name, unit, lengths = decode, "latents", 1, (3, 1, 2)
        channels = vae.config.z_dim
    sizes = [(_BATCH, _UNITS * unit), (_BATCH + 1, (_UNITS + 1) * unit)]
    whole, first, later = (
        [torch.zeros(batch, channels, frames, side, side) for batch, side in sizes] for frames in lengths
    )
    every, but_time = {name: (0, 2, 3, 4)}, {name: (0, 3, 4)}
    if not stream:
        return {"": Graph(vae, run, {name: whole[0]}, every)}
    memory, axes = memory_of(vae, run, *zip(first, later, strict=True))
    common: Any = {
        "states": {key: value for key, value in memory.items() if axes[key]},
        "state_axes": axes,
        "marks": {key: value for key, value in memory.items() if not axes[key]},
    }
    return {
        "first": Graph(vae, run, {name: first[0]}, but_time, is_first=True, **common),
        "next": Graph(vae, run, {name: later[0]}, every, **common),
    }


def denoiser_graph(pipe: VideoGenPipeline) -> Graph:
    """A denoising step on whole clips."""
    denoiser: Any = pipe.denoiser
    config = denoiser.config
    frames, height, width = config.get("patch_size", (1, 1, 1))
    channels = config.get("text_dim") or config.cross_attention_dim
    inputs = {
        "latents": torch.zeros(
            _BATCH, config.in_channels, _UNITS * frames, 2 * _UNITS * height, 2 * _UNITS * width
        ),
        "timestep": torch.full((_BATCH,), 500.0),
        "prompt_embeds": torch.zeros(_BATCH, _PROMPT_LENGTH, channels),
    }  # fmt: skip
    axes: dict[str, Shape] = {"latents": (0, 2, 3, 4), "timestep": (0,), "prompt_embeds": (0, 1)}
    if config.get("frame_rate_embedding"):
        inputs["frame_rate"], axes["frame_rate"] = torch.full((_BATCH,), 8.0), (0,)
    if config.get("action_dim"):
        size = config.action_dim * config.action_frames
        inputs["actions"], axes["actions"] = torch.zeros(_BATCH, _UNITS, size), (0, 1)
    names = list(inputs)[3:]

    def step(denoiser: Any, latents: Tensor, timestep: Tensor, prompt: Tensor, *others: Tensor) -> dict[str, Tensor]:
        options = dict(zip(names, others, strict=True))
        return {"prediction": denoiser(latents, timestep, prompt, **options).sample}

    return Graph(denoiser, step, inputs, axes)


@torch.no_grad()
def memory_of(network: nn.Module, run: Run, *examples: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Shape]]:
    """The memory after the first calls of a stream, and the axes in which it differs between two examples of them."""
    found: list[dict[str, Tensor]] = []
    for calls in examples:
        memory: dict[str, Tensor] = {}
        for part in calls:
            run(network, part, history := History(memory))
            memory = memory | history.new
        found.append(memory)
    one, other = found
    axes = {
        key: tuple(axis for axis, (a, b) in enumerate(zip(one[key].shape, other[key].shape, strict=True)) if a != b)
        for key in one
    }
    return one, axes


class Function(nn.Module):
    """A graph with tensors as inputs and outputs, in order: first those of the graph, then the memory.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.network, self.graph = graph.network, replace(graph, network=None)
        side = next(iter(graph.inputs.values())).shape[-1]
        shapes = {key: state.shape for key, state in graph.states.items() if graph.is_first}
        self.zeros = {key: (shape[1], shape[2], shape[4] // side) for key, shape in shapes.items()}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Computes the outputs and the memory after the call."""
        graph, count = self.graph, len(self.graph.inputs)
        histories = graph.history(dict(zip(graph.given, tensors[count:], strict=True)))
        outputs = graph.run(self.network, *tensors[:count], *histories)
        after = [self._after(histories[0], key, tensors[0]) for key in graph.states]
        return (*outputs.values(), *after)

    def _after(self, history: History, key: str, first: Tensor) -> Tensor:
        """The memory after the call; zeros for what the call has not written."""
        value = history.new.get(key, history.get(key))
        if value is not None:
            return value
        channels, frames, factor = self.zeros[key]
        return first.new_zeros(first.shape[0], channels, frames, factor * first.shape[3], factor * first.shape[4])


@torch.no_grad()
def write_onnx(graph: Graph, path: Path) -> dict[str, list[Any]]:
    """Writes a graph as an ONNX file; weights of more than 2 GiB go to a file next to it.

    Returns:
        The shapes of the inputs without the memory; lengths that may differ have names.

    Raises:
        ValueError: The network cannot be exported.
    """
    assert graph.network is not None
    network = graph.network.eval()
    outputs = graph.run(network, *graph.inputs.values(), *graph.history(graph.given))
    # a length on which a network's layout depends in ways that cannot be exported stays fixed
    shapes: list[Any] = [
        {axis: Dim.AUTO if axis == 2 else Dim.DYNAMIC for axis in graph.dynamic[name]} for name in graph.inputs
    ]
    shapes += [{axis: Dim.DYNAMIC for axis in graph.state_axes[key]} for key in graph.given]
    with warnings.catch_warnings(), without_warnings("torch.onnx"):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                Function(graph).eval(),
                (*graph.inputs.values(), *graph.given.values()),
                dynamo=True,
                verbose=False,
                dynamic_shapes=(tuple(shapes),),
                input_names=[*graph.inputs, *(key + IN for key in graph.given)],
                output_names=[*outputs, *(key + OUT for key in graph.states)],
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ValueError(f"{type(network).__name__} cannot be exported: {reason}") from error
    assert program is not None
    program.model.metadata_props.update({name: json.dumps(value) for name, value in graph.about.items()})
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        program.save(Path(folder) / path.name)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):  # the graph last
            os.replace(file, path.with_name(file.name))
    inputs = zip(graph.inputs, program.model.graph.inputs, strict=False)
    return {name: _lengths(list(one.shape or ())) for name, one in inputs}


def _lengths(shape: list[Any]) -> list[Any]:
    """Lengths, and instead of the exporter's symbols the names of what those count that may differ."""
    names = ("batch", "channels", "frames", "height", "width") if len(shape) == 5 else ("batch", "tokens", "width")
    return [side if isinstance(side, int) else names[axis] for axis, side in enumerate(shape)]

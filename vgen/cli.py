"""The command `vgen`. Heavy imports wait until a command runs, so that `--help` is quick."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vgen.sampling.options import InterpolationOptions, RolloutOptions, SamplingOptions, help_of, parameters_of

DEFAULT_MODEL = "vgen/shapes-64"

app = typer.Typer(
    help="Video diffusion that is causal in time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Videos to train on.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Model = Annotated[str, typer.Option(help="A packaged checkpoint, a folder, or a Hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help=".mp4, .gif, .webp, or a folder of frames.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="Weight of the prompt; 1 is unguided.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same video.")]
Fps = Annotated[float | None, typer.Option(help="Frames per second of the file.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is by default.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]


FLAGS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "history_guidance_scale": "--history-guidance",
}
"""Short names of options; the long ones are those of the fields."""


def _with_options(options: type[SamplingOptions]) -> Callable[[Callable], Callable]:
    """Gives a command with `**options` one option for each field of a dataclass."""

    def decorate(command: Callable) -> Callable:
        own = inspect.signature(command, eval_str=True)
        kept = [one for one in own.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        texts, added = help_of(options), []
        for one in parameters_of(options):
            flags = [*([FLAGS[one.name]] if one.name in FLAGS else []), f"--{one.name.replace('_', '-')}"]
            option = typer.Option(*flags, help=texts[one.name])
            added.append(one.replace(annotation=Annotated[one.annotation, option]))
        kept = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in kept]
        command.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        return command

    return decorate


@app.callback()
def version_callback(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    """Video diffusion that is causal in time."""
    if version:
        from vgen import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    output: Output,
    model: Model = DEFAULT_MODEL,
    num_frames: Annotated[int | None, typer.Option(help="All frames.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    groups: Annotated[Literal["full", "causal", "chunk"], typer.Option(help="Which frames attend to which.")] = "full",
    seed: Seed = 0,
    fps: Fps = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a sentence into a video."""
    with _writing(output, overwrite) as done:
        from vgen.tasks.video_files import generate_file

        done |= generate_file(
            _load(model, device), prompt, output, seed=seed, fps=fps, overwrite=overwrite,
            negative_prompt=negative_prompt, height=height, width=width, num_frames=num_frames, groups=groups,
            num_inference_steps=steps, guidance_scale=guidance,
        )  # fmt: skip


@app.command()
def animate(
    image: Annotated[Path, typer.Argument(help="The first frame.")],
    prompt: Annotated[str, typer.Argument(help="What happens.")],
    output: Output,
    model: Model = DEFAULT_MODEL,
    num_frames: Annotated[int | None, typer.Option(help="All frames.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    fps: Fps = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn an image and a sentence into a video."""
    with _writing(output, overwrite) as done:
        from vgen.tasks.video_files import generate_file

        done |= generate_file(
            _load(model, device), prompt, output, seed=seed, fps=fps, overwrite=overwrite, image=image,
            num_frames=num_frames, num_inference_steps=steps, guidance_scale=guidance,
        )  # fmt: skip


@app.command()
@_with_options(RolloutOptions)
def predict(
    clip: Annotated[Path, typer.Argument(help="The video to continue: a file or a folder of frames.")],
    output: Output,
    num_frames: Annotated[int, typer.Option(help="New frames.")] = 16,
    prompt: Annotated[str | None, typer.Option(help="What happens; may be left out.")] = None,
    with_input: Annotated[bool, typer.Option("--with-input", help="Write the given frames too.")] = False,
    model: Model = DEFAULT_MODEL,
    seed: Seed = 0,
    fps: Fps = None,
    device: Device = None,
    overwrite: Overwrite = False,
    **options: Any,
) -> None:
    """Continue a video."""
    with _writing(output, overwrite) as done:
        from vgen.tasks.video_files import predict_file

        done |= predict_file(
            _load(model, device), clip, output, prompt, seed=seed, fps=fps, overwrite=overwrite,
            with_input=with_input, num_frames=num_frames, **options,
        )  # fmt: skip


@app.command()
@_with_options(InterpolationOptions)
def interpolate(
    clip: Annotated[Path, typer.Argument(help="The video: a file or a folder of frames.")],
    output: Output,
    prompt: Annotated[str | None, typer.Option(help="What happens; may be omitted.")] = None,
    model: Model = DEFAULT_MODEL,
    seed: Seed = 0,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the file; the input's by default.")] = None,
    device: Device = None,
    overwrite: Overwrite = False,
    **options: Any,
) -> None:
    """Make the frames between those of a video: slow motion at its own frame rate, or smoother with --fps."""
    with _writing(output, overwrite) as done:
        from vgen.tasks.video_files import interpolate_file

        done |= interpolate_file(
            _load(model, device), clip, output, prompt=prompt, seed=seed, fps=fps, overwrite=overwrite, **options
        )  # fmt: skip


@app.command()
@_with_options(RolloutOptions)
def rollout(
    prompt: Annotated[str, typer.Argument(help="Describes the video.")],
    output: Output,
    num_frames: Annotated[int, typer.Option(help="New frames, any number.")] = 64,
    at: Annotated[list[str] | None, typer.Option(help="FRAME=PROMPT: another prompt from this new frame on.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video to continue.")] = None,
    with_input: Annotated[bool, typer.Option("--with-input", help="Write the given frames too.")] = False,
    model: Model = DEFAULT_MODEL,
    seed: Seed = 0,
    fps: Fps = None,
    device: Device = None,
    overwrite: Overwrite = False,
    **options: Any,
) -> None:
    """Make a video of any length, chunk after chunk."""
    with _writing(output, overwrite) as done:
        from vgen.tasks.video_files import predict_file, rollout_file

        schedule = {0: prompt}
        for word in at or ():
            frame, _, text = word.partition("=")
            if not frame.strip().isdigit() or not text:
                raise ValueError(f"--at must be FRAME=PROMPT, such as '64=a blue square moves up', got {word!r}")
            schedule[int(frame)] = text
        if with_input and video is None:
            raise ValueError("--with-input needs --video")
        pipe = _load(model, device)
        settings = {"seed": seed, "fps": fps, "overwrite": overwrite, "num_frames": num_frames} | options
        if video is None:
            done |= rollout_file(pipe, schedule, output, **settings)
        else:
            done |= predict_file(pipe, video, output, schedule, with_input=with_input, **settings)


@app.command()
def info(model: Annotated[str, typer.Argument(help="A packaged checkpoint, a folder, or a Hub id.")]) -> None:
    """Tell what a checkpoint is and can do."""
    with _one_line_errors():
        from rich.console import Console
        from rich.table import Table

        pipe = _load(model, "cpu")
        table = Table(show_header=False, title=model)
        defaults = ("height", "width", "num_frames", "frame_rate", "num_inference_steps", "guidance_scale")
        table.add_row("defaults", ", ".join(f"{name} {pipe.config[name]}" for name in defaults))
        own = pipe.config.rollout_defaults
        if own:
            table.add_row("defaults of rollouts", ", ".join(f"{name} {value}" for name, value in own.items()))
        abilities = ("tasks", "group_modes", "trained_token_frames", "chunk_size", "window", "sink")
        for name in abilities:
            value = pipe.denoiser.config[name]
            table.add_row(name, ", ".join(value) if isinstance(value, (list, tuple)) else str(value))
        for name, component in pipe.components.items():
            if component is None:
                continue
            size = ""
            if hasattr(component, "parameters"):
                size = f", {sum(p.numel() for p in component.parameters()) / 1e6:.2f}M parameters"
            table.add_row(name, f"{type(component).__name__}{size}")
        Console().print(table)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A packaged checkpoint, a folder, or a Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of results.json and report.html.")],
    suite: Annotated[Literal["shapes", "folder", "moving-mnist"], typer.Option(help="Clips to use.")] = "shapes",
    data: Annotated[str | None, typer.Option(help="A folder of videos, or an IDX file of digits.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Of the tasks; may be repeated.")] = None,
    num_clips: Annotated[int, typer.Option(help="That are measured.", min=1)] = 100,
    num_frames: Annotated[int, typer.Option(help="Of a clip; the checkpoint's default if 0.")] = 0,
    given: Annotated[int, typer.Option(help="Frames that a prediction starts from.")] = 5,
    factor: Annotated[int, typer.Option(help="Every so many'th frame is given to an interpolation.")] = 4,
    prompted: Annotated[bool, typer.Option("--prompted", help="Predictions and interpolations get captions.")] = False,
    num_samples: Annotated[int, typer.Option(help="Predictions of each clip.", min=1)] = 1,
    features: Annotated[
        str | None, typer.Option(help="A video model of transformers, for distances between distributions.")
    ] = None,
    convlstm: Annotated[str | None, typer.Option(help="A ConvLSTM that predicts beside the model, or none.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
) -> None:
    """Measure a checkpoint beside simple ways; pipelines/evaluate.py has all settings and several processes."""
    with _one_line_errors():
        from vgen.tasks.evaluation import EvaluationConfig
        from vgen.tasks.evaluation import evaluate as run

        config = EvaluationConfig(
            output_dir=output, model=model, suite=suite, data=data, tasks=task or None, num_clips=num_clips,
            num_frames=num_frames, given=given, factor=factor, prompted=prompted, num_samples=num_samples,
            features=features, convlstm=convlstm,
            num_inference_steps=steps, guidance_scale=guidance, seed=seed,
        )  # fmt: skip
        results = run(config)
        assert results is not None
        _print_tables(results)
    typer.echo(f"wrote {output / 'results.json'} and {output / 'report.html'}")
    if results["missing"]:
        typer.echo(
            f"{results['missing']} clips could not be measured: {output / 'clips' / 'manifest.jsonl'}", err=True
        )
        raise typer.Exit(1)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A results.json.")],
    second: Annotated[Path, typer.Argument(help="Another one, on the same clips.")],
) -> None:
    """Tell how the second results differ from the first, clip by clip, with 95% confidence intervals."""
    import json

    with _one_line_errors():
        from vgen.metrics.report import column_title, compare_distances, display_scale, format_summary
        from vgen.metrics.report import compare as differences

        told = [json.loads(path.read_text()) for path in (first, second)]
        table = _table("task", "method", "metric", "first", "second", "difference [95% interval]", "")
        for one in differences(*told):
            sign, scale = "differs" if one.is_significant else "", display_scale(one.metric)
            cells = (
                f"{scale * one.first:.4g}",
                f"{scale * one.second:.4g}",
                format_summary(one.metric, one.summary),
                sign,
            )
            table.add_row(one.task, one.method, column_title(one.metric), *cells)
        for task, way, a, b in compare_distances(*told):
            value, low, high = b.minus(a)
            interval, sign = f"{value:.3f} [{low:.3f}, {high:.3f}]", "differs" if low > 0 or high < 0 else ""
            table.add_row(task, way, a.name, f"{a.value:.3f}", f"{b.value:.3f}", interval, sign)
        _console().print(table)


@app.command()
def anomaly(
    video: Annotated[Path, typer.Argument(help="A file or a folder of frames.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plot: .png, .svg or .pdf.")],
    model: Model = DEFAULT_MODEL,
    given: Annotated[int, typer.Option(help="Frames that each prediction starts from.", min=1)] = 5,
    ahead: Annotated[int, typer.Option(help="Frames that are predicted at once; an event marks the rest.")] = 4,
    threshold: Annotated[float, typer.Option(help="Robust deviations above what is usual that stand out.")] = 6.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the score of every frame.")] = False,
    steps: Steps = None,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Plot how well each frame of a video could be predicted, and name those that stand out."""
    import json

    with _one_line_errors():
        _check_output(output, overwrite)
        from vgen.metrics.report import check_installed, plot_scores
        from vgen.tasks.anomaly import find_anomalies
        from vgen.tasks.video_files import read_given

        check_installed()
        if output.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"{output}: a plot is a .png, .svg or .pdf file")
        pipe = _load(model, device)
        pipe.set_progress_bar_config(disable=True)
        frames, rate = read_given(pipe, video)
        found = find_anomalies(
            pipe, frames, given=given, ahead=ahead, threshold=threshold, seed=seed, num_inference_steps=steps,
            frame_rate=rate,
        )  # fmt: skip
        plot_scores(found.scores.tolist(), found.jumps, "mean squared error of prediction").savefig(output, dpi=150)
    if as_json:
        scores = [None if score != score else score for score in found.scores.tolist()]
        typer.echo(json.dumps({"scores": scores, "jumps": found.jumps}))
    else:
        typer.echo(f"frames that stand out: {', '.join(map(str, found.jumps)) or 'none'}")
        typer.echo(f"wrote {output}")


@data_app.command()
def validate(
    folder: Annotated[Path, typer.Argument(help="Videos with captions, as for training.")],
    bucket: Annotated[list[str] | None, typer.Option(help="FRAMESxHEIGHTxWIDTH of clips; may be repeated.")] = None,
    frame_rate: Annotated[float | None, typer.Option(help="Frames per second to resample to.")] = None,
    compression: Annotated[int, typer.Option(help="Frames of a latent.", min=1)] = 4,
    batch_size: Annotated[int, typer.Option(help="Clips of a step.", min=1)] = 8,
    stride: Annotated[int, typer.Option(help="From one frame of a clip to the next.")] = 1,
    hop: Annotated[int | None, typer.Option(help="From one clip of a video to the next.")] = None,
    short: Annotated[str, typer.Option(help="What becomes of videos with too few frames: skip or pad.")] = "skip",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Decode a folder of videos and say which can be trained on, and why the others cannot."""
    import json

    from vgen.data.clips import Bucket
    from vgen.data.validate import validate_folder

    with _one_line_errors():
        buckets = []
        for text in bucket or ["17x64x64"]:
            buckets.append(Bucket.parse(text))
            if (buckets[-1].num_frames - 1) % compression:
                raise ValueError(f"--bucket {text}: clips have 1 + {compression} * k frames")
        report = validate_folder(folder, buckets, frame_rate, compression, batch_size, stride, hop, short)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        for clip in report["clips"]:
            if clip["accepted"]:
                size = f"{clip['num_frames']} frames of {clip['width']}x{clip['height']}"
                told = f"{size}, legal length {clip['nearest_length']}, {clip['num_clips']} clips of {clip['bucket']}"
            typer.echo(f"{clip['path']}: " + (told if clip["accepted"] else f"left out: {clip['reason']}"))
        for name, one in report["buckets"].items():
            batches = f"{one['batches']} batches of {batch_size}, {one['batch_mib']:g} MiB of pixels each"
            typer.echo(f"{name}: {one['clips']} clips, {batches}")
        typer.echo(
            f"{report['accepted']} videos can be used, {report['refused']} cannot, "
            f"{report['without_caption']} have no caption"
        )
    if not report["accepted"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the command."""
    app()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """A user's mistake prints one line and exits with 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"vgen: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def _writing(output: Path, overwrite: bool) -> Iterator[dict[str, Any]]:
    """Tells what was written, by the facts that come into the dictionary; or one line of what is wrong."""
    facts: dict[str, Any] = {}
    with _one_line_errors():
        _check_output(output, overwrite)
        yield facts
    if "fit" in facts:
        typer.echo(facts["fit"], err=True)
    typer.echo(f"wrote {output}: {facts['num_frames']} frames")


def _check_output(output: Path, overwrite: bool) -> None:
    """Finds out about a wrong output before a model is loaded."""
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists already: choose another output, or pass --overwrite")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"the folder {output.absolute().parent} of the output does not exist")


def _console() -> Any:
    """Of rich, which draws tables as wide as they are where no terminal sets a width."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


def _table(*columns: str, title: str | None = None) -> Any:
    from rich.table import Table

    return Table(*columns, title=title)


def _print_tables(results: dict[str, Any]) -> None:
    from vgen.metrics.frechet import Distance
    from vgen.metrics.report import table as rows_of

    for task, ways in results["tasks"].items():
        columns, rows = rows_of(ways)
        table = _table("", *columns, title=f"{task}: means, whose intervals are in the report")
        for way, cells in rows.items():
            table.add_row(way, *(cell.partition(" ")[0] for cell in cells))
        _console().print(table)
    for task, ways in results["distances"].items():
        for way, measured in ways.items():
            for one in map(Distance.from_dict, measured.values()):
                typer.echo(f"{task}, {way}: {one}")


def _load(model: str, device: str | None) -> Any:
    """The pipeline, on a device."""
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from vgen.pipeline import VideoGenPipeline

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} is not there: {str(error).splitlines()[0]}") from error
    return VideoGenPipeline.from_pretrained(model).to(device)


if __name__ == "__main__":
    main()

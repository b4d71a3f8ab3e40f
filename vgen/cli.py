"""The `vgen` command. Heavy modules are imported when a command runs, so that `--help` is fast."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from vgen.checks import check_choice, check_integer
from vgen.data.formats import OutputOptions, check_output_options, check_video_input, check_video_output, is_video
from vgen.hub import find_checkpoint, locate
from vgen.io.allocator import bound_memory
from vgen.io.errors import one_line_errors, printable
from vgen.io.flags import FLAGS
from vgen.io.spinning import stop_spinning
from vgen.sampling.options import InterpolationOptions, RolloutOptions, SamplingOptions, help_of, parameters_of
from vgen.sampling.prompts import check_prompts
from vgen.tasks.loading import LoadOptions, check_loading, load_checkpoint, metadata_of
from vgen.tasks.train_options import STAGES, TrainOptions, check_packages

DEFAULT_MODEL = "vgen/shapes-64"
OptionsT = TypeVar("OptionsT")

app = typer.Typer(
    help="Video diffusion that is causal in time.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Commands for training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Model = Annotated[str, typer.Option(help="A packaged checkpoint, a folder, or a Hub id.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Video to write: .mp4, .gif, .webp, or a folder of frames.")
]
Steps = Annotated[int | None, typer.Option(help="Number of denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="Weight of classifier-free guidance; 1 turns it off.")]
Negative = Annotated[
    str | None, typer.Option("--negative", "--negative-prompt", help="Prompt to steer away from; requires guidance.")
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise; the same seed gives the same video.")
]
Device = Annotated[str | None, typer.Option(help="Device: cpu, cuda or mps; by default the fastest one available.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Preview = Annotated[
    bool | None, typer.Option(help="Show some frames of the video in the terminal; by default if there is one.")
]
PREVIEW_FRAMES = 4


class EvaluationTask(str, Enum):
    """The tasks of `vgen evaluate`."""  # typer does not support lists of a `Literal`

    RECONSTRUCTION = "reconstruction"
    PREDICTION = "prediction"
    INTERPOLATION = "interpolation"
    GENERATION = "generation"
    ROLLOUT = "rollout"


def _with_options(*kinds: type) -> Callable[[Callable], Callable]:
    """Adds an option for each field of these dataclasses to a command with `**options`, except those that it has.

    The metadata of a field may name another `flag`.
    """

    def decorate(command: Callable) -> Callable:
        own = inspect.signature(command, eval_str=True)
        kept = [one for one in own.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        added = []
        for kind in kinds:
            texts = help_of(kind)
            named = {field.name: field.metadata.get("flag", field.name) for field in fields(kind)}
            for one in parameters_of(kind):
                if one.name in own.parameters:
                    continue
                short = [f"--{flag}" for flag, name in FLAGS.items() if name == one.name]
                flags = [*short, f"--{named[one.name].replace('_', '-')}"]
                option = typer.Option(*flags, help=texts[one.name])
                added.append(one.replace(annotation=Annotated[one.annotation, option]))
        kept = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in kept]
        command.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        return command

    return decorate


def _take(kind: type[OptionsT], options: dict[str, Any]) -> OptionsT:
    """Takes options of one kind out of those of a command."""
    return kind(**{field.name: options.pop(field.name) for field in fields(kind)})  # type: ignore[arg-type]


@app.callback()
def version_callback(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Video diffusion that is causal in time."""
    if version:
        from vgen import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
@_with_options(LoadOptions, OutputOptions)
def generate(
    prompt: Annotated[str, typer.Argument(help="Prompt that describes the video.")],
    output: Output,
    model: Model = DEFAULT_MODEL,
    num_frames: Annotated[int | None, typer.Option(help="Number of frames.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative_prompt: Negative = None,
    groups: Annotated[
        Literal["full", "causal", "chunk"] | None,
        typer.Option(help="Attention between frames: full, causal, or causal between chunks; by default full."),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
    preview: Preview = None,
    **options: Any,
) -> None:
    """Generate a video from a prompt."""
    loading, written = _take(LoadOptions, options), _take(OutputOptions, options)
    counts = {"num_frames": num_frames, "height": height, "width": width, "num_inference_steps": steps}
    with _writing(output, overwrite, preview, model, loading, written, prompt=prompt, counts=counts) as done:
        from vgen.tasks.video_files import generate_file

        done |= generate_file(
            _load(model, device, loading), prompt, output, seed=seed, written=written, overwrite=overwrite,
            metadata=metadata_of(model, loading),
            negative_prompt=negative_prompt, height=height, width=width, num_frames=num_frames, groups=groups,
            num_inference_steps=steps, guidance_scale=guidance,
        )  # fmt: skip


@app.command()
@_with_options(LoadOptions, OutputOptions)
def animate(
    image: Annotated[Path, typer.Argument(help="Image file with the first frame.")],
    prompt: Annotated[str, typer.Argument(help="Prompt that describes the video.")],
    output: Output,
    last_image: Annotated[Path | None, typer.Option(help="Image file with the last frame.")] = None,
    model: Model = DEFAULT_MODEL,
    num_frames: Annotated[int | None, typer.Option(help="Number of frames.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative_prompt: Negative = None,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
    preview: Preview = None,
    **options: Any,
) -> None:
    """Generate a video from a first frame, or a first and a last one, and a prompt."""
    loading, written = _take(LoadOptions, options), _take(OutputOptions, options)
    counts = {"num_frames": num_frames, "num_inference_steps": steps}
    with _writing(output, overwrite, preview, model, loading, written, prompt=prompt, counts=counts) as done:
        for path in (image, last_image):
            if path is not None and not path.is_file():
                raise FileNotFoundError(f"no such file: {path}")
        from vgen.tasks.video_files import generate_file

        done |= generate_file(
            _load(model, device, loading), prompt, output, seed=seed, written=written, overwrite=overwrite,
            metadata=metadata_of(model, loading),
            image=image, last_image=last_image, negative_prompt=negative_prompt, num_frames=num_frames,
            num_inference_steps=steps, guidance_scale=guidance,
        )  # fmt: skip


@app.command()
@_with_options(LoadOptions, OutputOptions, RolloutOptions)
def predict(
    clip: Annotated[Path, typer.Argument(help="Video to continue: a file or a folder of frames.")],
    output: Output,
    num_frames: Annotated[int, typer.Option(help="Number of new frames.")] = 16,
    prompt: Annotated[str | None, typer.Option(help="Prompt for the new frames; unconditional if omitted.")] = None,
    with_input: Annotated[
        bool, typer.Option("--with-input", help="Write the input frames before the new ones.")
    ] = False,
    model: Model = DEFAULT_MODEL,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
    preview: Preview = None,
    **options: Any,
) -> None:
    """Continue a video."""
    loading, written = _take(LoadOptions, options), _take(OutputOptions, options)
    checked = RolloutOptions(**options)
    with _writing(
        output,
        overwrite,
        preview,
        model,
        loading,
        written,
        video=clip,
        prompt=prompt,
        options=checked,
        counts={"num_frames": num_frames},
    ) as done:
        from vgen.tasks.video_files import predict_file

        done |= predict_file(
            _load(model, device, loading, streams=True), clip, output, prompt, seed=seed, written=written,
            overwrite=overwrite, metadata=metadata_of(model, loading), with_input=with_input,
            num_frames=num_frames, **options,
        )  # fmt: skip


@app.command()
@_with_options(LoadOptions, OutputOptions, InterpolationOptions)
def interpolate(
    clip: Annotated[Path, typer.Argument(help="Video to interpolate: a file or a folder of frames.")],
    output: Output,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt that describes the video; unconditional if omitted.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
    preview: Preview = None,
    **options: Any,
) -> None:
    """Generate the frames between those of a video: slow motion at its frame rate, or smoother motion with --fps."""
    loading, written = _take(LoadOptions, options), _take(OutputOptions, options)
    checked = InterpolationOptions(**options)
    with _writing(
        output, overwrite, preview, model, loading, written, video=clip, prompt=prompt, options=checked
    ) as done:
        from vgen.tasks.video_files import interpolate_file

        done |= interpolate_file(
            _load(model, device, loading), clip, output, prompt=prompt, seed=seed, written=written,
            overwrite=overwrite, metadata=metadata_of(model, loading), **options,
        )  # fmt: skip


@app.command()
@_with_options(LoadOptions, OutputOptions, RolloutOptions)
def rollout(
    prompt: Annotated[str, typer.Argument(help="Prompt that describes the video.")],
    output: Output,
    num_frames: Annotated[int, typer.Option(help="Number of new frames; there is no maximum.")] = 64,
    at: Annotated[
        list[str] | None, typer.Option(help="FRAME=PROMPT: change the prompt at this new frame; can be repeated.")
    ] = None,
    video: Annotated[Path | None, typer.Option(help="Video to continue: a file or a folder of frames.")] = None,
    with_input: Annotated[
        bool, typer.Option("--with-input", help="Write the input frames before the new ones.")
    ] = False,
    decoder: Annotated[
        str | None,
        typer.Option(
            help="Tiny decoder: a file such as taew2_1.safetensors, a folder, or a checkpoint that has one, such as "
            "vgen/shapes-64. Faster and less exact than the VAE."
        ),
    ] = None,
    model: Model = DEFAULT_MODEL,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
    preview: Preview = None,
    **options: Any,
) -> None:
    """Generate a video of any length, chunk by chunk."""
    loading, written = _take(LoadOptions, options), _take(OutputOptions, options)
    checked = RolloutOptions(**options)
    with _writing(
        output,
        overwrite,
        preview,
        model,
        loading,
        written,
        video=video,
        prompt=prompt,
        options=checked,
        counts={"num_frames": num_frames},
    ) as done:
        schedule = {0: prompt}
        for word in at or ():
            frame, _, text = word.partition("=")
            if not frame.strip().isdigit() or not text:
                raise ValueError(f"--at must be FRAME=PROMPT, such as '64=a blue square moves up', got {word!r}")
            schedule[int(frame)] = text
        if with_input and video is None:
            raise ValueError("--with-input needs --video")
        from torch import nn

        from vgen.models.tiny_vae import load_tiny_vae
        from vgen.tasks.video_files import predict_file, rollout_file

        tiny = None if decoder is None else load_tiny_vae(decoder)
        pipe = _load(model, device, loading, streams=True)
        settings: dict[str, Any] = {
            "seed": seed,
            "written": written,
            "overwrite": overwrite,
            "metadata": metadata_of(model, loading) | ({} if decoder is None else {"decoder": Path(decoder).name}),
            "num_frames": num_frames,
        } | options
        if tiny is not None:
            settings["decoder"] = nn.Module.to(tiny, pipe.device, pipe.denoiser.dtype)  # that of diffusers warns
        if video is None:
            done |= rollout_file(pipe, schedule, output, **settings)
        else:
            done |= predict_file(pipe, video, output, schedule, with_input=with_input, **settings)


@app.command()
@_with_options(TrainOptions)
def train(
    folder: Annotated[str | None, typer.Argument(help="Folder of videos, or another source as for --data.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Source of videos, instead of FOLDER: all that the scripts accept.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run; by default runs/ and the folder's name.")
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option(metavar="|".join(STAGES), help="Run only this stage; can be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its commands, and stop.")] = False,
    **options: Any,
) -> None:
    """Train a model on one's own videos: VAE, latents, text encoder, denoiser, evaluation, report. Can be resumed."""
    with one_line_errors():
        if (folder is None) == (data is None):
            raise ValueError("pass either a folder of videos or another source as --data")
        source = folder or data
        assert source is not None
        output = output or Path("runs", Path(source).resolve().name)
        asked = TrainOptions(data=source, output=output, **options)
        asked.check()
        for one in stage or ():
            check_choice("stage", one, STAGES)
        if not dry_run:
            check_packages()
        typer.echo(f"reading the videos of {source} and measuring this machine, which takes about a minute")
        from vgen.tasks.project import train as run

        finished = run(asked, stage or (), dry_run=dry_run, show=_print_rows)
    if not finished:
        raise typer.Exit(1)


@app.command()
def models() -> None:
    """List the checkpoints that ship with the package, and public ones that it can download and use."""
    with one_line_errors():
        from vgen.tasks.information import describe_packaged, describe_public

        packaged = _table("name", "tasks", "trained on", "files", "videos", "frames", title="in the package")
        for row in describe_packaged():
            packaged.add_row(*row)
        public = _table("Hub id", "tasks", "weights in bfloat16", "videos", "frames", title="public weights")
        for row in describe_public():
            public.add_row(*row)
        _console().print(packaged, public)
    typer.echo(
        "--model also takes a folder or a Hub id of a vgen pipeline, or of Wan 2.1 or 2.2 in diffusers' layout."
    )
    typer.echo(
        "vgen/shapes-64-recognizer and vgen/shapes-64-convlstm serve vgen evaluate, and the first vgen classify."
    )
    typer.echo("vgen presets lists public weights in other formats, which vgen convert makes pipelines of.")
    typer.echo("vgen info NAME shows the defaults of a checkpoint and what they mean.")


@app.command()
def info(
    source: Annotated[
        str, typer.Argument(metavar="MODEL|VIDEO", help="A packaged checkpoint, a folder, a Hub id, or a video.")
    ],
    num_frames: Annotated[int | None, typer.Option(help="Show the memory for a video of this length.")] = None,
    size: Annotated[str | None, typer.Option(help="Show the memory for this size, HEIGHTxWIDTH.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Show the memory in this data type, such as bfloat16.")] = None,
) -> None:
    """Show what a checkpoint consists of and can do, the memory that it needs, or what a video was made from."""
    with one_line_errors():
        if num_frames is not None or size is not None or dtype is not None:
            from vgen.models.loading import parse_dtype
            from vgen.tasks.memory import describe_memory, report_memory

            sides = None if size is None else _sides(size)
            report = report_memory(source, num_frames, sides, parse_dtype(dtype or "float32"))
            table = _table("memory", "weights", "activations", title=source)
            for row in describe_memory(report):
                table.add_row(*row)
            _console().print(table)
            return
        path = Path(source)
        if is_video(path) and not (path / "model_index.json").is_file():
            from vgen.tasks.information import describe_video

            _print_rows(describe_video(path), source)
            return
        if Path(locate(source), "config.json").is_file():
            from vgen.recognition.recognizer import is_recognizer, load_recognizer
            from vgen.tasks.information import describe_recognizer

            if is_recognizer(source):
                _print_rows(describe_recognizer(load_recognizer(source)), source)
                return
        find_checkpoint(source)
        from vgen.tasks.information import describe_pipeline

        _print_rows(describe_pipeline(_load(source, "cpu")), source)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A packaged checkpoint, a folder, or a Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results.json and report.html.")],
    suite: Annotated[
        Literal["shapes", "folder", "moving-mnist"], typer.Option(help="Suite of clips to evaluate on.")
    ] = "shapes",
    data: Annotated[str | None, typer.Option(help="Folder of videos, or IDX file of digits.")] = None,
    task: Annotated[
        list[EvaluationTask] | None,
        typer.Option(help="Task to evaluate; can be repeated. By default all supported ones except rollout."),
    ] = None,
    num_clips: Annotated[int, typer.Option(help="Number of clips.", min=1)] = 100,
    num_frames: Annotated[int, typer.Option(help="Frames per clip; 0 uses the checkpoint's default.")] = 0,
    hop: Annotated[
        int | None,
        typer.Option(
            help="Frames from the start of a clip to that of the next. By default clips do not overlap.", min=1
        ),
    ] = None,
    given: Annotated[int, typer.Option(help="Number of leading frames that a prediction is given.")] = 5,
    factor: Annotated[
        int, typer.Option(help="Interpolation factor N: an interpolation is given every N-th frame.")
    ] = 4,
    prompted: Annotated[
        bool, typer.Option("--prompted", help="Condition predictions and interpolations on the captions.")
    ] = False,
    num_samples: Annotated[int, typer.Option(help="Number of predictions per clip.", min=1)] = 1,
    features: Annotated[
        str | None,
        typer.Option(help="Recognizer or video model of transformers for distances between distributions."),
    ] = None,
    recognizer: Annotated[
        str | None,
        typer.Option(help="Recognizer that says whether videos show what was asked for; none turns it off."),
    ] = None,
    convlstm: Annotated[str | None, typer.Option(help="ConvLSTM baseline for prediction; none turns it off.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
) -> None:
    """Evaluate a checkpoint against baselines. pipelines/evaluate.py has more settings and supports many processes."""
    with one_line_errors():
        from vgen.tasks.evaluation import EvaluationConfig
        from vgen.tasks.evaluation import evaluate as run

        tasks: Any = [one.value for one in task] if task else None
        config = EvaluationConfig(
            output_dir=output, model=model, suite=suite, data=data, tasks=tasks, num_clips=num_clips,
            num_frames=num_frames, hop=hop, given=given, factor=factor, prompted=prompted, num_samples=num_samples,
            features=features, recognizer=recognizer, convlstm=convlstm,
            num_inference_steps=steps, guidance_scale=guidance, seed=seed,
        )  # fmt: skip
        results = run(config)
        assert results is not None
        _print_tables(results)
    typer.echo(f"wrote {output / 'results.json'} and {output / 'report.html'}")
    if results["missing"]:
        typer.echo(f"{results['missing']} clips failed, see {output / 'clips' / 'manifest.jsonl'}", err=True)
        raise typer.Exit(1)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A results.json from `vgen evaluate`.")],
    second: Annotated[Path, typer.Argument(help="Another results.json, for the same clips.")],
) -> None:
    """Compare the results of two evaluations clip by clip, with 95% confidence intervals."""
    with one_line_errors():
        from vgen.io.records import read_json
        from vgen.metrics.report import column_title, compare_distances, display_scale, format_summary
        from vgen.metrics.report import compare as differences

        results = [read_json(path) for path in (first, second)]
        try:
            compared, distances = differences(*results), compare_distances(*results)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{first} or {second} is not a result of `vgen evaluate`: {error!r}") from error
        table = _table("task", "method", "metric", "first", "second", "difference [95% interval]", "")
        for one in compared:
            sign, scale = "differs" if one.is_significant else "", display_scale(one.metric)
            cells = (
                f"{scale * one.first:.4g}",
                f"{scale * one.second:.4g}",
                format_summary(one.metric, one.summary),
                sign,
            )
            table.add_row(one.task, one.method, column_title(one.metric), *cells)
        for task, method, a, b in distances:
            value, low, high = b.minus(a)
            interval, sign = f"{value:.3f} [{low:.3f}, {high:.3f}]", "differs" if low > 0 or high < 0 else ""
            table.add_row(task, method, a.name, f"{a.value:.3f}", f"{b.value:.3f}", interval, sign)
        _console().print(table)


@app.command()
def anomaly(
    video: Annotated[Path, typer.Argument(help="Video to check: a file or a folder of frames.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Plot to write: .png, .svg or .pdf.")],
    model: Model = DEFAULT_MODEL,
    given: Annotated[int, typer.Option(help="Number of true frames that each prediction starts from.", min=1)] = 5,
    ahead: Annotated[
        int,
        typer.Option(help="Frames per prediction. An event also marks the frames after it in the same prediction."),
    ] = 4,
    threshold: Annotated[
        float,
        typer.Option(
            help="A frame is anomalous if its log error exceeds the median by more than this many robust standard "
            "deviations. Both statistics are computed over the lower half of the log errors."
        ),
    ] = 6.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the error of every frame and the anomalous frames as JSON.")
    ] = False,
    steps: Steps = None,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Find video frames with unusually large prediction errors, and plot the errors."""
    import json

    with one_line_errors():
        _check_output(output, overwrite)
        if output.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--output must be a .png, .svg or .pdf file, got {output}")
        check_video_input(video)
        find_checkpoint(model)
        from vgen.metrics.report import check_installed, plot_scores
        from vgen.tasks.anomaly import find_anomalies
        from vgen.tasks.video_files import read_fitted

        check_installed()
        pipe = _load(model, device, streams=True)
        pipe.set_progress_bar_config(disable=True)
        frames, rate = read_fitted(pipe, video)
        result = find_anomalies(
            pipe, frames, given=given, ahead=ahead, threshold=threshold, seed=seed, num_inference_steps=steps,
            frame_rate=rate,
        )  # fmt: skip
        plot_scores(result.scores.tolist(), result.anomalous_frames, "mean squared error of prediction").savefig(
            output, dpi=150
        )
    if as_json:
        scores = [None if score != score else score for score in result.scores.tolist()]
        typer.echo(json.dumps({"scores": scores, "anomalous_frames": result.anomalous_frames}))
    else:
        typer.echo(f"anomalous frames: {', '.join(map(str, result.anomalous_frames)) or 'none'}")
        typer.echo(f"wrote {output}")


@app.command()
def classify(
    videos: Annotated[list[Path], typer.Argument(help="Videos to label.")],
    model: Annotated[str, typer.Option(help="A recognizer of train_recognizer.py or transformers: folder or Hub id.")],
    top: Annotated[
        int | None,
        typer.Option(help="Number of labels to show; by default 3, or all with a probability of at least 0.5.", min=1),
    ] = None,
    clips: Annotated[int, typer.Option(help="Most clips per video over which probabilities are averaged.", min=1)] = 4,
    crops: Annotated[int, typer.Option(help="Crops of each clip over which they are averaged.", min=1)] = 1,
    timeline: Annotated[bool, typer.Option("--timeline", help="Show what happens when.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to write, .png, .svg or .pdf: probabilities over time.")
    ] = None,
    attention: Annotated[
        Path | None, typer.Option(help="Picture to write, .png: where a network with attention looks, over time.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all probabilities as JSON.")] = False,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Label videos, as a whole or over time."""
    import json

    with one_line_errors():
        if attention is not None:
            _check_output(attention, overwrite)
            if attention.suffix != ".png" or len(videos) > 1:
                raise ValueError("--attention must be a .png file, and needs a single video")
        if plot is not None:
            _check_output(plot, overwrite)
            if plot.suffix not in (".png", ".svg", ".pdf") or not timeline or len(videos) > 1:
                raise ValueError("--plot must be a .png, .svg or .pdf file, and needs --timeline and a single video")
        for video in videos:
            check_video_input(video)
        locate(model)
        from vgen.recognition import load_recognizer
        from vgen.tasks.classification import classify as classify_file
        from vgen.tasks.classification import draw_attention, draw_timeline, events_of
        from vgen.tasks.classification import timeline as over_time

        network = load_recognizer(model).to(_device(device))
        if attention is not None:
            draw_attention(network, videos[0]).save(attention)
        found: dict[str, Any] = {}
        table = _table("video", *(["start", "end"] if timeline else []), "label", "probability")
        for video in videos:
            if timeline:
                moments = over_time(network, video)
                if plot is not None:
                    draw_timeline(moments, network).savefig(plot)
                found[str(video)] = [
                    {
                        "start": one.start,
                        "end": one.end,
                        "probabilities": dict(zip(network.labels, one.probabilities, strict=True)),
                    }
                    for one in moments
                ]
                rows: list[tuple[str, ...]] = [
                    (f"{one.start:.2f}", f"{one.end:.2f}", one.label, f"{one.score:.3f}")
                    for one in events_of(moments, network)
                ]
            else:
                found[str(video)] = labels = classify_file(network, video, clips, crops)
                count = top or max(3, len(network.seen([labels[label] for label in network.labels])))
                rows = [(name, f"{probability:.3f}") for name, probability in list(labels.items())[:count]]
            for row in rows:
                table.add_row(printable(str(video)), *map(printable, row))
    if as_json:
        typer.echo(json.dumps(found))
        return
    _console().print(table)
    for written in (attention, plot):
        if written is not None:
            typer.echo(printable(f"wrote {written}"))


@app.command()
def watch(
    source: Annotated[str, typer.Argument(help="Number of a camera, such as 0, URL of a stream, or video file.")],
    model: Annotated[str, typer.Option(help="A recognizer of train_recognizer.py that streams: folder or Hub id.")],
    device: Device = None,
) -> None:
    """Label what a camera or a stream shows, as it comes. Ctrl-C stops."""
    with one_line_errors():
        locate(model)
        from vgen.recognition import load_recognizer
        from vgen.tasks.classification import watch as frames_of

        network = load_recognizer(model).to(_device(device))
        before: set[str] | None = None
        for moment in frames_of(network, source):
            seen = network.seen(moment.probabilities)
            if set(seen) != before:
                before = set(seen)
                text = ", ".join(f"{label} ({probability:.2f})" for label, probability in seen.items()) or "nothing"
                typer.echo(printable(f"{moment.start:.1f} s: {text}"))


@app.command()
def label(
    folder: Annotated[Path, typer.Argument(help="Folder of videos to label.")],
    model: Annotated[str, typer.Option(help="A recognizer of train_recognizer.py or transformers: folder or Hub id.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; by default metadata.jsonl in the folder.")
    ] = None,
    clips: Annotated[int, typer.Option(help="Most clips per video over which probabilities are averaged.", min=1)] = 4,
    threshold: Annotated[
        float, typer.Option(help="Least probability of a label, for recognizers of several labels.", min=0, max=1)
    ] = 0.5,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Label the videos of a folder, in a metadata.jsonl that training reads."""
    with one_line_errors():
        output = output or folder / "metadata.jsonl"
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        _check_output(output, overwrite)
        if output.suffix != ".jsonl" or not folder.resolve().is_relative_to(output.resolve().parent):
            raise ValueError(f"--output must be a .jsonl file in {folder} or above it, got {output}")
        locate(model)
        from vgen.recognition import load_recognizer
        from vgen.tasks.classification import label_folder

        count, failed = label_folder(load_recognizer(model).to(_device(device)), folder, output, clips, threshold)
    for path, reason in failed.items():
        typer.echo(printable(f"not labeled: {path}: {reason}"), err=True)
    typer.echo(printable(f"wrote {output}: {count} videos"))


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A recognizer, or with --part a pipeline: folder, packaged, or Hub id.")
    ],
    output: Annotated[Path, typer.Argument(help="File to write, .onnx.")],
    part: Annotated[
        Literal["encoder", "decoder", "denoiser"] | None, typer.Option(help="What to export of a pipeline.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Export an encoder or decoder for streams: two files, -first and -next.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Export a network to ONNX."""
    with one_line_errors():
        if output.suffix != ".onnx":
            raise ValueError(f"the output must be an .onnx file, got {output}")
        names = [output.with_stem(f"{output.stem}-{name}") for name in ("first", "next")] if stream else [output]
        for name in names:
            _check_output(name, overwrite)
        locate(model)
        typer.echo("exporting, which takes up to a minute per file", err=True)
        from vgen.tasks.export import export as write

        for path, shapes in write(model, output, part, stream=stream).items():
            inputs = (f"{name} ({', '.join(map(str, shape))})" for name, shape in shapes.items())
            typer.echo(printable(f"wrote {path}: takes {', '.join(inputs)}"))


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Public weights: .pt, .pth, .safetensors, or the index of several. With --to, the model, or the file "
            "of a LoRA, to convert."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    base: Annotated[
        str | None,
        typer.Option(help="Pipeline that has everything else: folder or Hub id; see vgen presets."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="How the weights are sampled: see vgen presets, or a YAML file. By default as the base."),
    ] = None,
    component: Annotated[
        Literal["transformer", "transformer_2", "vae", "text_encoder"] | None,
        typer.Option(help="What the weights replace; by default what they are for."),
    ] = None,
    container: Annotated[
        str | None, typer.Option(help="Entry of the file that has the weights; by default generator_ema or another.")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA to add to the weights of a Transformer.")] = None,
    to: Annotated[
        Literal["vgen", "diffusers", "original"],
        typer.Option(help="What to write: a pipeline of public weights, or a pipeline for other programs."),
    ] = "vgen",
    dtype: Annotated[str | None, typer.Option(help="Data type to write, such as bfloat16.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a pipeline of public weights, or public weights of a pipeline."""
    with one_line_errors():
        from vgen.models.convert.presets import find_preset

        only = {"--base": base, "--preset": preset, "--component": component, "--container": container, "--lora": lora}
        if to != "vgen" and (wrong := [name for name, value in only.items() if value is not None]):
            raise ValueError(f"{wrong[0]} is for making a pipeline, not for --to {to}")
        chosen = None if preset is None else find_preset(preset)
        _check_output(output, overwrite)
        if to == "original" and Path(source).is_file():
            from vgen.models.convert.folder import convert_lora

            convert_lora(Path(source), output)
            typer.echo(f"wrote {shlex.quote(printable(str(output)))}")
            return
        locate(source if to != "vgen" else _base_of(source, base))
        from vgen.models.convert.folder import convert_back, convert_file
        from vgen.models.loading import parse_dtype

        wanted = None if dtype is None else parse_dtype(dtype)
        name = shlex.quote(printable(str(output)))
        if to != "vgen":
            from vgen.pipeline import VideoGenPipeline

            convert_back(VideoGenPipeline.from_pretrained(source, dtype="auto"), output, to, wanted)
            typer.echo(f"wrote {name}")
            return
        convert_file(Path(source), base or "", output, chosen, component, container, wanted, lora)
        typer.echo(f"wrote {name}; next: vgen info {name}")


def _base_of(source: str, base: str | None) -> str:
    if not Path(source).is_file():
        raise ValueError(f"there is no file {source}")
    if base is None:
        raise ValueError("--base is missing: the pipeline that has everything else, see vgen presets")
    return base


@app.command()
def presets() -> None:
    """List public weights that vgen convert reads."""
    with one_line_errors():
        from vgen.models.convert.presets import read_presets

        table = _table("preset", "what it is", "videos", "weights", "GPU memory", "file on the Hub", "base", "license")
        for name, one in read_presets().items():
            size = "{width}x{height}, {num_frames} frames, {frame_rate:g} fps".format(**one.pipeline)
            weights, memory = "{weights:.1f} GiB".format(**one.needs), "{memory:.1f} GiB, {offloaded:.1f} offloaded"
            table.add_row(
                name, one.about, size, weights, memory.format(**one.needs), one.source, one.base, one.license
            )
        _console().print(table)
    typer.echo("Weights and memory are those of all networks in bfloat16, for such a video; vgen info shows others.")
    typer.echo("vgen convert FILE --base BASE --preset PRESET -o FOLDER makes a pipeline of them.")


@app.command()
def doctor(
    benchmark: Annotated[
        bool, typer.Option(help="Measure how fast vgen/shapes-64 generates, in a few seconds.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what this machine computes fast, what is free, and which packages are missing for which extra."""
    import json

    with one_line_errors():
        from rich.markup import escape
        from rich.table import Table

        from vgen.tasks.doctor import as_rows, examine

        found = examine(benchmark=benchmark)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    table = Table(show_header=False, title="vgen doctor")
    for row in as_rows(found):
        table.add_row(*map(escape, row))
    _console().print(table)


@data_app.command()
def validate(
    folder: Annotated[Path, typer.Argument(help="Folder of videos with captions, as for training.")],
    bucket: Annotated[
        list[str] | None, typer.Option(help="Shape of clips, FRAMESxHEIGHTxWIDTH; can be repeated.")
    ] = None,
    frame_rate: Annotated[float | None, typer.Option(help="Frames per second to resample to.")] = None,
    compression: Annotated[int, typer.Option(help="Temporal compression of the VAE.", min=1)] = 4,
    batch_size: Annotated[int, typer.Option(help="Clips per training step.", min=1)] = 8,
    stride: Annotated[int, typer.Option(help="Step between the frames of a clip, in video frames.")] = 1,
    hop: Annotated[
        int | None, typer.Option(help="Step between the starts of clips, in video frames; end to end by default.")
    ] = None,
    short: Annotated[
        Literal["skip", "pad"], typer.Option(help="What to do with videos that have too few frames.")
    ] = "skip",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Decode all videos of a folder and list which ones are usable for training, and why the others are not."""
    import json

    from vgen.data.clips import Bucket
    from vgen.data.validate import validate_folder
    from vgen.temporal.grid import LatentGrid

    with one_line_errors():
        buckets = []
        for text in bucket or ["17x64x64"]:
            buckets.append(Bucket.parse(text))
            nearest = LatentGrid(compression).nearest(buckets[-1].num_frames)
            if nearest != buckets[-1].num_frames:
                raise ValueError(f"--bucket must have {compression}*k + 1 frames, got {text} (nearest: {nearest})")
        report = validate_folder(folder, buckets, frame_rate, compression, batch_size, stride, hop, short)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        for clip in report["clips"]:
            if clip["accepted"]:
                size = f"{clip['num_frames']} frames of {clip['width']}x{clip['height']}"
                description = (
                    f"{size}, valid length {clip['nearest_length']}, {clip['num_clips']} clips of {clip['bucket']}"
                )
            line = f"{clip['path']}: " + (description if clip["accepted"] else f"skipped: {clip['reason']}")
            typer.echo(printable(line))
        acted = [clip["actions"] for clip in report["clips"] if clip["actions"] is not None]
        if acted:
            widths = ", ".join(map(str, sorted({one["channels"] for one in acted})))
            constant = sum(one["constant"] for one in acted)
            typer.echo(
                f"actions: {len(acted)} videos have some, with {widths} channels; in {constant} all are constant"
            )
        for name, one in report["buckets"].items():
            batches = f"{one['batches']} batches of {batch_size}, {one['batch_mib']:g} MiB of pixels each"
            typer.echo(f"{name}: {one['clips']} clips, {batches}")
        files = {clip["path"] for clip in report["clips"]}  # of which several segments may be listed
        usable = {clip["path"] for clip in report["clips"] if clip["accepted"]}
        uncaptioned = {clip["path"] for clip in report["clips"] if not any(clip["captions"])}
        typer.echo(
            f"{len(usable)} videos are usable, {len(files - usable)} are not, {len(uncaptioned)} have no caption"
        )
    if not report["accepted"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the command."""
    bound_memory()
    stop_spinning()
    app()


@contextmanager
def _writing(
    output: Path,
    overwrite: bool,
    preview: bool | None,
    model: str,
    loading: LoadOptions,
    written: OutputOptions,
    *,
    video: Path | None = None,
    prompt: str | None = None,
    options: SamplingOptions | None = None,
    counts: Mapping[str, int | None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Checks what can be checked without a network, runs a command, and shows what it wrote.

    The command imports torch inside this context, so invalid arguments are reported before the import. It adds its
    entries to the dictionary.
    """
    entries: dict[str, Any] = {}
    with one_line_errors():
        _check_output(output, overwrite)
        check_video_output(output, overwrite)
        if video is not None:
            check_video_input(video)
        if prompt is not None:
            check_prompts(prompt)
            if not prompt.strip():
                raise ValueError(f"the prompt must be non-empty text, got {prompt!r}")
        check_output_options(written, output.suffix)
        for name, count in (counts or {}).items():
            if count is not None:
                check_integer(name, count, minimum=1)
        if options is not None:
            options.check(resolved=False)
        check_loading(loading)
        find_checkpoint(model)
        yield entries
    if "fit" in entries:
        typer.echo(entries["fit"], err=True)
    if sys.stdout.isatty() if preview is None else preview:
        from vgen.data.video_io import spread_frames
        from vgen.io.preview import print_images

        print_images(spread_frames(output, PREVIEW_FRAMES), _console())
    done = f"wrote {output}: {entries['num_frames']} frames"
    if "scale" in entries:
        done += f", enlarged {entries['scale']} times (--scale 1 keeps {entries['content_size']})"
    typer.echo(printable(done))


def _check_output(output: Path, overwrite: bool) -> None:
    """Checks an output path before a model is loaded."""
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists already: choose another output, or pass --overwrite")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"the folder {output.absolute().parent} of the output does not exist")


def _console() -> Any:
    """A rich console, 200 columns wide if the output is not a terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


def _sides(size: str) -> tuple[int, int]:
    """Height and width of a size such as `480x832`."""
    sides = size.split("x")
    if len(sides) != 2 or not all(side.isdigit() for side in sides):
        raise ValueError(f"--size must have the form HEIGHTxWIDTH, such as 480x832, got {size}")
    return int(sides[0]), int(sides[1])


def _table(*columns: str, title: str | None = None) -> Any:
    from rich.table import Column, Table

    return Table(*(Column(name, overflow="fold") for name in columns), title=title)  # no text is cut off


def _print_rows(rows: Sequence[tuple[str, ...]], title: str) -> None:
    """Prints a table without a header."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, title=escape(printable(title)))
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    _console().print(table)


def _print_tables(results: dict[str, Any]) -> None:
    from vgen.metrics.frechet import Distance
    from vgen.metrics.report import table as rows_of

    for task, methods in results["tasks"].items():
        columns, rows = rows_of(methods)
        table = _table("", *columns, title=f"{task}: means over clips (intervals are in the report)")
        for method, cells in rows.items():
            table.add_row(method, *(cell.partition(" ")[0] for cell in cells))
        _console().print(table)
        for method, share in results["agreement"][task].items():
            typer.echo(f"{task}, {method}: recognizer and checker agree on {share:.1%} of the videos")
    for task, methods in results["distances"].items():
        for method, measured in methods.items():
            for one in map(Distance.from_dict, measured.values()):
                typer.echo(f"{task}, {method}: {one}")


def _load(model: str, device: str | None, options: LoadOptions | None = None, *, streams: bool = False) -> Any:
    """Loads a pipeline onto a device, for videos that are made chunk by chunk if it `streams`."""
    return load_checkpoint(model, options or LoadOptions(), _device(device), streams=streams)


def _device(device: str | None) -> str:
    """The device that was asked for, or the fastest one.

    Raises:
        ValueError: It is not available.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} is not available: {str(error).splitlines()[0]}") from error
    return device


if __name__ == "__main__":
    main()

"""The command `vgen`. Heavy imports wait until a command runs, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vgen.pipeline import VideoGenPipeline

DEFAULT_MODEL = "vgen/shapes-64"

app = typer.Typer(
    help="Video diffusion that is causal in time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="A packaged checkpoint, a folder, or a Hub id.")]


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
    output: Annotated[Path, typer.Option("--output", "-o", help=".mp4, .gif, .webp, or a folder of frames.")],
    model: Model = DEFAULT_MODEL,
    num_frames: Annotated[int | None, typer.Option(help="All frames.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Weight of the prompt; 1 is unguided.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    groups: Annotated[str, typer.Option(help="Which frames see which: full, causal or chunk.")] = "full",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same video.")] = 0,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the file.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Turn a sentence into a video."""
    with _one_line_errors():
        import torch

        from vgen.data.video_io import VideoWriter

        _check_output(output, overwrite)
        pipe = _load(model, device)
        rate = pipe.config.frame_rate if fps is None else fps
        with VideoWriter(output, rate, overwrite=overwrite) as writer:
            latents = pipe(
                prompt,
                negative_prompt,
                height=height,
                width=width,
                num_frames=num_frames,
                num_inference_steps=steps,
                guidance_scale=guidance,
                groups=groups,
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
            ).frames
            for piece in pipe.decode_stream(latents):
                writer.append(piece[0])
    typer.echo(f"wrote {output}")


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


def main() -> None:
    """Entry point of the command."""
    app()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """A user's mistake prints one line and exits with 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"vgen: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def _check_output(output: Path, overwrite: bool) -> None:
    """Finds out about a wrong output before a model is loaded."""
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists already: choose another output, or pass --overwrite")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"the folder {output.absolute().parent} of the output does not exist")


def _load(model: str, device: str | None) -> VideoGenPipeline:
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

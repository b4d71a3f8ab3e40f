"""A live rollout: the prompt changes during generation, and a fork continues without the change.

python examples/interactive.py --output live.mp4
python examples/interactive.py --ask --output live.mp4
"""

import argparse
from collections.abc import Iterator

from vgen import VideoGenPipeline
from vgen.data.video_io import VideoWriter
from vgen.io.pixels import to_frames

SCRIPT = {0: "a red circle bounces", 8: "a blue square moves up", 16: "a green triangle spins"}


def script(num_chunks: int) -> Iterator[str | None]:
    """A prompt for the chunks at which it changes, and `None` for the others."""
    yield from (SCRIPT.get(chunk) for chunk in range(num_chunks))


def keyboard(num_chunks: int) -> Iterator[str | None]:
    """What the user types before each chunk; an empty line keeps the prompt."""
    for _ in range(num_chunks):
        yield input("prompt> ").strip() or None


def main(ask: bool, num_chunks: int, num_inference_steps: int, output: str) -> None:
    """Writes the video; a fork continues it without the last change."""
    pipe = VideoGenPipeline.from_pretrained("vgen/shapes-64")
    rollout = pipe.rollout(SCRIPT[0], num_inference_steps=num_inference_steps)
    fork = None
    with VideoWriter(output, pipe.config.frame_rate, overwrite=True) as writer:
        for prompt in (keyboard if ask else script)(num_chunks):
            if prompt is not None and rollout.frames_done:
                fork = rollout.fork()
            frames = rollout.step(prompt)  # (1, 3, n, h, w) in [-1, 1], on the device
            writer.append(to_frames(frames)[0])
    print(f"wrote {output}: {rollout.frames_done} frames")
    if fork is not None:
        first = fork.frames_done
        fork.step()
        print(f"a fork at frame {first} continued to frame {fork.frames_done} without the last prompt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ask", action="store_true", help="type prompts instead of following a script")
    parser.add_argument("--num_chunks", type=int, default=24)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--output", default="live.mp4")
    main(**vars(parser.parse_args()))

"""Copy videos at a small size and split them into training and held-out videos; the same command resumes.

python pipelines/prepare_videos.py --data my-videos --output_dir runs/my-data
"""

from vgen.io.spinning import stop_spinning

stop_spinning()  # before torch is imported

import shlex
from pathlib import Path

from vgen.data.prepare import PrepareConfig, describe, prepare
from vgen.io.errors import one_line_errors
from vgen.io.settings import parse_settings


def main(config: PrepareConfig) -> None:
    """Writes the folders `train` and `held_out`, `summary.json` and `pictures.png`."""
    print("\n".join(describe(prepare(config))))
    train, held_out = (shlex.quote(str(Path(config.output_dir, side))) for side in ("train", "held_out"))
    words = f"--data {train} --score_data {held_out} --height {config.height} --width {config.width}"
    print(f"wrote {config.output_dir}; next: accelerate launch train/train_vae.py {words} --output_dir ...")


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        main(parse_settings(PrepareConfig, __doc__))

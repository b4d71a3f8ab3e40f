"""From one video file to a model that continues it: cut, validate, encode, fine-tune, predict. Some minutes on a CPU.

    python examples/train_your_own.py cockatoo.mp4 runs/own --caption "a cockatoo"

The last fifth of the video is held out; its continuation is predicted before and after training.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vgen
from vgen import VideoGenPipeline
from vgen.data.resize import Fit
from vgen.data.video_io import iter_video, video_info, write_video
from vgen.io.pixels import to_clip, to_frames

RATE, SIZE = 8.0, (64, 64)
NUM_GIVEN, NUM_NEW = 9, 8

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("video", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--caption", default="")
parser.add_argument("--vae-steps", type=int, default=300)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--hop", type=int, default=2, help="frames between the starts of clips")
parser.add_argument("--repeats", type=int, default=8, help="augmented copies of each clip")
parser.add_argument(
    "--batch-size", type=int, default=8, help="clips per step of the VAE; the denoiser takes 4 times as many"
)
parser.add_argument("--calibration-clips", type=int, default=64, help="clips for the statistics of the latents")
parser.add_argument("--score-clips", type=int, default=16, help="clips that the VAE's reconstructions are scored on")
parser.add_argument("--num-inference-steps", type=int, default=20, help="denoising steps of predictions")
args = parser.parse_args()


def run(*command: object) -> None:
    """Runs a command as a user types it."""
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True, cwd=Path(__file__).parents[1])


def psnr(generated: np.ndarray, real: np.ndarray) -> float:
    """PSNR in dB of uint8 frames."""
    return float(-10 * np.log10(np.square(generated / 255.0 - real / 255.0).mean()))


# 1. cut: segments of four seconds, each with a caption; the rest is held out for testing
clips, output = (args.output / "clips").resolve(), args.output.resolve()
clips.mkdir(parents=True, exist_ok=True)
duration = video_info(args.video).duration
assert duration, "the length of the video is unknown"
held_out = 0.8 * duration
if (duration - held_out) * RATE < NUM_GIVEN + NUM_NEW:
    raise SystemExit(f"the video must be at least {5 * (NUM_GIVEN + NUM_NEW) / RATE:.1f} s long, got {duration:.1f} s")
rows = []
for number, start in enumerate(np.arange(0, held_out - 2, 4)):
    end = min(start + 4, held_out)
    name = f"{number:03d}.mp4"
    frames = np.stack(list(iter_video(args.video, start=start, end=end)))
    small = Fit(frames.shape[1:3], (128, 128)).to_target(frames)
    write_video(small, clips / name, video_info(args.video).frame_rate or RATE, overwrite=True)
    rows.append({"file_name": name, "text": args.caption})
(clips / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

# 2. validate, 3. the VAE, 4. latents, 5. the denoiser
shipped = Path(vgen.__file__).parent / "checkpoints/shapes-64"
launch = ("accelerate.commands.launch", "--num_processes=1", "--mixed_precision=no")  # the scripts choose their own
fine = ("--warmup_steps=20", "--save_every=200", "--sample_every=100000", "--lr_schedule=cosine")
flips = '{"flip": 0.5, "crop": 0.7}'
run("vgen.cli", "data", "validate", clips, "--bucket", "17x64x64", "--frame-rate", RATE, "--hop", args.hop)
run(
    *launch, "train/train_vae.py", "--init", shipped / "vae", "--data", clips, "--frame_rates", f"[{RATE}]",
    "--augment", flips, "--output_dir", output / "vae", "--max_steps", args.vae_steps, "--learning_rate", 5e-4,
    "--batch_size", args.batch_size, "--num_score_clips", args.score_clips,
    "--num_calibration_clips", args.calibration_clips, *fine,
)  # fmt: skip
run(
    *launch, "pipelines/encode_latents.py", "--vae", output / "vae/vae", "--data", clips, "--hop", args.hop,
    "--augment", flips, "--repeats", args.repeats, "--output_dir", output / "latents",
)  # fmt: skip
run(
    *launch, "train/train_vdm.py", "--init", shipped, "--vae", output / "vae/vae", "--latents_dir", output / "latents",
    "--output_dir", output / "model", "--max_steps", args.steps, "--batch_size", 4 * args.batch_size,
    "--learning_rate", 1e-3, "--known", '{"leading": 0.9, "none": 0.1}', "--level_shift", 1.5,
    "--sample_prompts", json.dumps([args.caption]), *fine,
)  # fmt: skip

# 6. predict held-out frames
frames = np.stack(list(iter_video(args.video, start=held_out, frame_rate=RATE)))[: NUM_GIVEN + NUM_NEW]
frames = Fit(frames.shape[1:3], SIZE).to_target(frames)
given, true = frames[:NUM_GIVEN], frames[NUM_GIVEN:]
rows = [frames]
for name, model in (("before", "vgen/shapes-64"), ("after", output / "model/pipeline")):
    pipe = VideoGenPipeline.from_pretrained(model, num_inference_steps=args.num_inference_steps)
    new = pipe.predict(given, NUM_NEW, generator=torch.Generator().manual_seed(0)).frames[0]
    new = (new * 255).round().astype(np.uint8)
    with torch.no_grad():  # the upper bound for predictions
        latents = pipe.vae.encode(to_clip(frames)[None]).latent_dist.mode()
        decoded = to_frames(pipe.vae.decode(latents).sample)[0]
    rows += [decoded, np.concatenate([given, new])]
    alone = psnr(decoded[NUM_GIVEN:], true)
    print(f"{name}: {psnr(new, true):.2f} dB on {NUM_NEW} frames; the VAE alone: {alone:.2f} dB")
print(f"the last frame repeated: {psnr(np.repeat(given[-1:], NUM_NEW, axis=0), true):.2f} dB")
Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows])).save(output / "strip.png")
print(f"rows: true frames; VAE only and prediction, before training; the same after: {output / 'strip.png'}")

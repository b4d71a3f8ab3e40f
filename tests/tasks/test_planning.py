import itertools
import json
import shutil
import struct
import tarfile
import time
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForTextEncoding, T5Config

from vgen.data.video_io import write_video
from vgen.machine import GIB
from vgen.models.prompts import load_text_encoder
from vgen.models.vae import CausalVideoVAE
from vgen.tasks.planning import LOGGED, make_plan, save_record
from vgen.tasks.project import describe_videos, plan_rows, warnings_of
from vgen.tasks.train_commands import scripts_folder
from vgen.tasks.train_costs import Costs
from vgen.tasks.train_machine import Machine, check_memory, choose_preset, read_preset
from vgen.tasks.train_options import TrainOptions, parse_change
from vgen.tasks.train_setup import Setup, check_fine_tuning, choose_codec
from vgen.tasks.train_stages import fine_tuning
from vgen.tasks.train_videos import Videos, choose_rate, inspect_videos
from vgen.training.logs import Logs
from vgen.training.needs import ClipShape, Step, denoiser_step, encoding_memory, vae_step

LAPTOP = Machine("cpu", 1, 8 * GIB, 100 * GIB, "no", "a laptop")
CLIP = ClipShape(height=64, width=64, num_frames=17)
ALL = ("laptop", "gpu-8gb", "gpu-24gb", "gpu-80gb", "gpu-8x80gb")


def videos(seconds, rates=None, captions=()):
    rates = rates or [20.0] * len(seconds)
    paths = [f"{number}.mp4" for number in range(len(seconds))]
    return Videos(paths, seconds, rates, [(96, 96)] * len(seconds), list(captions), len(captions), {}, 100.0, [])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six videos of two seconds, and steps that seem to take a second and half a GiB."""
    monkeypatch.setattr(Step, "seconds", lambda self, device, precision: 1.0)
    monkeypatch.setattr(Step, "needs", lambda self, precision: {"weights": GIB / 100, "memory": GIB / 2})
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(6):
        write_video(rng.integers(0, 255, (40, 32, 32, 3), dtype=np.uint8), tmp_path / "in" / f"{number}.mp4", 20.0)
    return tmp_path / "in"


def plan_of(folder, machine=LAPTOP, **options):
    return make_plan(TrainOptions(data=str(folder), output=folder.parent / "run", **options), machine)


@pytest.mark.parametrize("name", ALL)
def test_presets_fit_into_the_memory_that_they_are_for(name):
    preset = read_preset(name)
    memory = preset.get("memory_gib", 4) * GIB
    machine = Machine(preset["device"], preset["processes"], memory, 1e15, "bf16", name)
    options = TrainOptions(data="x", output="x")
    clip = ClipShape(**{key: preset["clip"][key] for key in ("height", "width", "num_frames")})
    setup = Setup(
        options=options, preset_name=name, preset=preset, machine=machine, changes={}, pipe=None, clip=clip,
        codec=choose_codec(options, preset, {}), frame_rate=8.0, videos=videos([60.0]), record={},
    )  # fmt: skip
    memory = Costs(setup).memory
    assert memory.keys() == {"vae", "denoiser", "latents"}
    check_memory(name, memory, machine)
    text = (scripts_folder() / "train" / "presets" / f"{name}.yaml").read_text()
    assert text.startswith(f"# vgen train FOLDER --preset {name}\n# Hardware: ")


def kept_bytes(step):
    """Bytes that a real step keeps for its backward pass."""
    network, inputs = step.make(), step.inputs()
    own = {one.untyped_storage().data_ptr() for one in network.parameters()}
    kept = []

    def pack(tensor):
        kept.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(**inputs)
    sizes = {storage.data_ptr(): storage.nbytes() for storage in kept}
    return sum(size for place, size in sizes.items() if place not in own)


@pytest.mark.parametrize("kind", ["vae", "denoiser"])
def test_the_calculated_memory_is_that_of_a_real_step(kind):
    model = {"base_dim": 8, "dim_mult": [1, 1], "z_dim": 4, "temperal_downsample": [True], "patch_size": 2,
             "in_channels": 12, "out_channels": 12, "num_res_blocks": 1}  # fmt: skip
    transformer = {"patch_size": [1, 2, 2], "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
                   "out_channels": 4, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}  # fmt: skip
    clip = ClipShape(height=16, width=16, num_frames=5)
    text = (2, 4), 2, (8, 16)
    step = vae_step(model, clip, 2) if kind == "vae" else denoiser_step("transformer", transformer, clip, *text)
    needs = step.needs()
    assert needs["weights"] == 4 * sum(one.numel() for one in step.make().parameters())
    assert needs["memory"] / 1.2 - 5 * needs["weights"] == pytest.approx(kept_bytes(step), rel=0.3)


def test_the_calculated_memory_of_encoding_is_that_of_a_profile():
    model = {"base_dim": 8, "dim_mult": [1, 1], "z_dim": 4, "temperal_downsample": [True], "patch_size": 2,
             "in_channels": 12, "out_channels": 12, "num_res_blocks": 1}  # fmt: skip
    vae = CausalVideoVAE(**model).eval()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        vae.encode(torch.zeros(4, 3, 9, 32, 32))
    changes = [one for one in profiled.profiler.kineto_results.events() if one.name() == "[memory]"]
    peak = max(itertools.accumulate(one.nbytes() for one in sorted(changes, key=lambda one: one.start_ns())))
    weights = 4 * sum(one.numel() for one in vae.parameters())
    clip = ClipShape(height=32, width=32, num_frames=9)
    assert encoding_memory(model, clip, 4) / 1.2 == pytest.approx(weights + peak, rel=0.05)
    config = T5Config(num_layers=1, d_model=16, d_ff=32, num_heads=2, d_kv=8, vocab_size=100_000)
    text = partial(AutoModelForTextEncoding.from_config, config)
    added = encoding_memory(model, clip, 4, "no", text, 2) - encoding_memory(model, clip, 4)
    assert added / 1.2 == pytest.approx(4 * sum(one.numel() for one in text().parameters()), rel=0.01)


@pytest.mark.parametrize(
    ("machine", "preset"),
    [
        (LAPTOP, "laptop"),
        (Machine("cuda", 1, 8 * GIB, GIB, "bf16", ""), "gpu-8gb"),
        (Machine("cuda", 2, 24 * GIB, GIB, "bf16", ""), "gpu-24gb"),
        (Machine("cuda", 1, 79 * GIB, GIB, "bf16", ""), "gpu-80gb"),
        (Machine("cuda", 8, 79 * GIB, GIB, "bf16", ""), "gpu-8x80gb"),
    ],
)
def test_the_largest_preset_for_a_machine_is_chosen(machine, preset):
    assert choose_preset(machine) == preset


def test_the_frame_rate_follows_the_videos():
    assert choose_rate(videos([60.0] * 5), 10.0, 17) == 10.0
    assert choose_rate(videos([60.0] * 5, [6.0] * 5), 10.0, 17) == 6.0  # not above that of the videos
    assert choose_rate(videos([1.0] * 5), 10.0, 17) == 17.0  # so that a clip fits into a second
    assert choose_rate(videos([1.0] + [60.0] * 5), 10.0, 17) == 10.0  # a few short videos do not matter


def test_the_number_of_steps_follows_from_the_time(folder):
    short, long = (plan_of(folder, minutes=minutes) for minutes in (30, 60))
    steps = [
        sum(
            commands[0].settings["max_steps"]
            for stage, commands in plan.commands.items()
            if stage in ("vae", "denoiser")
        )
        for plan in (short, long)
    ]
    assert steps[1] > 2 * steps[0] > 100
    assert short.remaining == pytest.approx(30 * 60, rel=0.02) and long.remaining == pytest.approx(3600, rel=0.02)
    with pytest.raises(ValueError, match="2 minutes are not enough.*pass --minutes"):
        plan_of(folder, minutes=2)


def test_what_is_advised_is_enough(folder):
    with pytest.raises(ValueError, match="--minutes") as error:
        plan_of(folder, minutes=2)
    advised = float(str(error.value).split("--minutes ")[1].split()[0])
    plan_of(folder, minutes=advised)


def test_overrides_reach_the_commands(folder):
    model = "{num_layers: 2, num_attention_heads: 2, attention_head_dim: 12, ffn_dim: 32, patch_size: [1, 2, 2]}"
    changes = [
        "vae.learning_rate=0.5",
        "clip.num_frames=9",
        "denoiser.denoiser=transformer",
        f"denoiser.model={model}",
    ]
    plan = plan_of(folder, minutes=60, changes=changes)
    assert plan.commands["vae"][0].settings["learning_rate"] == 0.5
    assert plan.commands["data"][0].settings["num_frames"] == 9
    assert plan.commands["denoiser"][0].settings["model"]["num_layers"] == 2
    words = plan.commands["vae"][0].words()
    assert words[:2] == ["python", "train/train_vae.py"] and "--learning_rate" in words


@pytest.mark.parametrize("text", ["learning_rate=1", "vae.learning_rate", "oven.heat=1", "vae.model={"])
def test_malformed_overrides_are_named(text):
    with pytest.raises(ValueError, match="--set"):
        parse_change(text)


def test_captions_with_directions_exclude_flips(folder):
    for number in range(6):
        (folder / f"{number}.txt").write_text("a bird flies to the left" if number == 3 else "a bird")
    assert "flip" not in plan_of(folder, minutes=60).commands["vae"][0].settings["augment"]
    (folder / "3.txt").write_text("a bird")
    assert "flip" in plan_of(folder, minutes=60).commands["vae"][0].settings["augment"]


def test_a_text_encoder_is_trained_only_where_there_are_captions(folder):
    assert "text" not in plan_of(folder, minutes=60).commands
    (folder / "0.txt").write_text("a bird")
    commands = plan_of(folder, minutes=60).commands
    assert "text" in commands and commands["denoiser"][0].settings["train_text_encoder"] is True


def test_fine_tuning_takes_the_clips_and_the_vae_of_its_model(folder):
    plan = plan_of(folder, minutes=60, init="vgen/shapes-64", train_only="lora")
    assert list(plan.commands) == ["data", "latents", "denoiser", "evaluation", "report"]
    settings = plan.commands["denoiser"][0].settings
    assert settings["init"] == "vgen/shapes-64" and settings["ema_decay"] == 0.0 and "model" not in settings
    assert plan.frame_rate == 8.5  # two seconds are too short for 17 frames at 8
    assert plan.memory["denoiser"] < plan_of(folder, minutes=60, init="vgen/shapes-64").memory["denoiser"]


@pytest.mark.parametrize(
    ("options", "machine", "message"),
    [
        ({"preset": "gpu-8gb"}, LAPTOP, "gpu-8gb needs a GPU"),
        ({"preset": "gpu-8x80gb"}, Machine("cuda", 1, 80 * GIB, GIB, "bf16", ""), "needs 8 GPUs.*has 1"),
        ({}, replace(LAPTOP, memory=GIB / 10), "GiB of memory, and a laptop has 0.1"),
        ({}, replace(LAPTOP, disk=1000.0), "GiB on disk"),
        ({"train_only": "lora"}, LAPTOP, "--from"),
        ({"init": "vgen/shapes-64", "vae": "vgen/shapes-64"}, LAPTOP, "leave out --vae"),
        ({"changes": ["clip.num_frames=65"]}, LAPTOP, "too little video"),
        ({"changes": ["clip.num_frames=3"]}, LAPTOP, "clip.num_frames must be"),
        ({"changes": ["clip.hight=3"]}, LAPTOP, "hight"),
        ({"changes": ["denoiser.learning_rato=1"]}, LAPTOP, "denoiser .*did you mean learning_rate"),
        ({"changes": ["data.margin=0.5"]}, LAPTOP, "margin must be"),
        ({"changes": ["vae.max_steps=1e3"]}, LAPTOP, "vae.max_steps must be an integer"),
        ({"held_out": "nowhere"}, LAPTOP, "nowhere"),
        ({"init": "vgen/shapes-64", "train_only": "temporal"}, LAPTOP, "no temporal layers"),
    ],
)
def test_what_cannot_work_is_said_before_anything_begins(folder, options, machine, message):
    with pytest.raises((ValueError, OSError), match=message):
        plan_of(folder, machine, minutes=60, **options)
    assert not (folder.parent / "run").exists()


def test_other_options_do_not_continue_a_run(folder):
    plan = plan_of(folder, minutes=60)
    plan.folder.mkdir()
    save_record(plan)
    plan_of(folder, minutes=90)  # the time limit may change
    with pytest.raises(ValueError, match="was begun with.*text_encoder"):
        plan_of(folder, minutes=60, text_encoder="vgen/shapes-64")


def test_a_setting_that_no_script_has_is_named_before_anything_is_measured(folder, monkeypatch):
    monkeypatch.setattr("vgen.tasks.planning.inspect_videos", None)  # the videos are not read
    with pytest.raises(ValueError, match="vae .*has no setting max_stepz: did you mean max_steps?"):
        plan_of(folder, changes=["vae.max_stepz=5"])


def test_a_plan_with_few_steps_says_so(folder):
    assert not warnings_of(plan_of(folder, minutes=60))
    plan = plan_of(folder, minutes=60, changes=["vae.max_steps=21"])
    (line,) = warnings_of(plan)
    assert line.startswith("21 steps of the vae are too few to learn much: give it more --minutes")


def write_logs(stage, times, monkeypatch):
    """Logs entries of a stage at these steps and times in seconds."""
    logs = Logs(stage / "logs", 1)
    with monkeypatch.context() as patched:
        for step, seconds in times.items():
            patched.setattr(time, "time", lambda now=seconds: now)
            logs.write({LOGGED: 8.0}, step)
    del logs


def test_the_rest_of_a_stage_is_estimated_from_its_rate_so_far(folder, monkeypatch):
    plan = plan_of(folder, minutes=60, changes=["vae.max_steps=100"])
    begin(plan, data=(1.0, True), vae=(50.0, False))
    for name in ("checkpoint-8", "checkpoint-20", "checkpoint-30.partial"):
        (plan.folder / "vae" / name).mkdir(parents=True)
    write_logs(plan.folder / "vae", {10: 40, 20: 50}, monkeypatch)  # compilation took most of the first steps
    assert plan_of(folder, minutes=60, changes=["vae.max_steps=100"]).seconds["vae"] == 80


@pytest.mark.parametrize(
    ("defaults", "model", "reason"),
    [
        ({}, {"in_channels": 36, "out_channels": 16}, "makes videos from images"),
        ({"expand_timesteps": True}, {"in_channels": 48, "out_channels": 48}, "makes videos from images"),
        ({"boundary_ratio": 0.9}, {"in_channels": 16, "out_channels": 16}, "has two Transformers"),
        ({"boundary_ratio": None}, {"in_channels": 16, "out_channels": None}, None),
    ],
)
def test_pipelines_that_need_the_scripts_are_named(tmp_path, defaults, model, reason):
    options = TrainOptions(data="videos", output=tmp_path, init="wan")
    pipe = {"denoiser": "transformer", "model": model} | defaults
    if reason is None:
        check_fine_tuning(options, pipe, videos([2.0]))
        return
    with pytest.raises(ValueError, match=f"wan {reason}, which vgen train does not plan: use .*train/train_vdm.py"):
        check_fine_tuning(options, pipe, videos([2.0]))


def begin(plan, **stages):
    """Records stages as begun; `seconds` is the time that each has taken, and whole ones are finished."""
    plan.folder.mkdir(exist_ok=True)
    for stage, (seconds, done) in stages.items():
        commands = [asdict(one) for one in plan.commands[stage]]
        plan.record[stage] = {"planned": plan.seconds[stage], "seconds": seconds, "done": done, "commands": commands}
    save_record(plan)
    data = plan.folder / "data"
    data.mkdir(exist_ok=True)
    (data / "summary.json").write_text('{"held_out": {"captioned": 0}}')
    if not (data / "train").exists():
        shutil.copytree(plan.options.data, data / "train")


def test_what_has_begun_keeps_its_settings_and_what_is_left_gets_the_time(folder):
    plan = plan_of(folder, minutes=60)
    begin(plan, data=(50, True), vae=(1800, False))
    later = plan_of(folder, minutes=60)
    assert later.commands["vae"] == plan.commands["vae"]
    assert later.commands["denoiser"][0].settings["max_steps"] < plan.commands["denoiser"][0].settings["max_steps"]
    changed = plan_of(folder, minutes=60, changes=["vae.batch_size=2"])  # as after an error of memory
    assert changed.commands["vae"][0].settings == plan.commands["vae"][0].settings | {"batch_size": 2}


def test_the_time_that_early_stopping_saves_goes_to_the_denoiser(folder):
    plan = plan_of(folder, minutes=60)
    begin(plan, data=(50, True), vae=(100, True))
    later = plan_of(folder, minutes=60)
    assert (
        later.commands["denoiser"][0].settings["max_steps"] > 1.5 * plan.commands["denoiser"][0].settings["max_steps"]
    )
    assert later.remaining + 150 == pytest.approx(3600, rel=0.02)


def test_the_clips_of_a_run_do_not_change(folder):
    begin(plan_of(folder, minutes=60), data=(50, True))
    shutil.rmtree(folder.parent / "run" / "data" / "train")
    (folder.parent / "run" / "data" / "train").mkdir()
    shutil.copy(folder / "0.mp4", folder.parent / "run" / "data" / "train")  # one copy is enough now
    assert plan_of(folder, minutes=60).frame_rate == 10.0
    with pytest.raises(ValueError, match="was begun with height=64"):
        plan_of(folder, minutes=60, changes=["clip.height=32"])


def test_a_folder_may_be_typed_differently(folder):
    plan = plan_of(folder, minutes=60)
    begin(plan, data=(50, True))
    make_plan(replace(plan.options, data=f"{folder}/"), LAPTOP)


def test_another_optimizer_needs_no_other_setting(folder):
    settings = plan_of(folder, minutes=60, changes=["vae.optimizer=adamw"]).commands["vae"][0].settings
    assert settings["optimizer"] == "adamw" and "muon_kernels" not in settings


def test_a_number_of_steps_that_is_set_counts_in_the_time(folder):
    plan = plan_of(folder, minutes=60, changes=["vae.max_steps=1000"])
    assert plan.commands["vae"][0].settings["max_steps"] == 1000
    assert plan.seconds["vae"] > 1000 and plan.remaining == pytest.approx(3600, rel=0.02)
    assert plan_of(folder, minutes=60, changes=["vae.max_steps=3"]).commands["vae"][0].settings["max_steps"] == 3


def test_short_clips_shorten_everything_that_depends_on_them(folder):
    plan = plan_of(folder, minutes=60, changes=["clip.num_frames=5"])
    assert plan.commands["vae"][0].settings["num_frames"] == 5
    evaluation = plan.commands["evaluation"][0].settings
    assert evaluation["given"] < 5 and evaluation["factor"] <= 4


def test_the_evaluation_is_repeated_with_one_denoising_step(folder):
    held_out, _, one = plan_of(folder).commands["evaluation"]
    assert "num_inference_steps" not in held_out.settings and one.settings["num_inference_steps"] == 1
    assert one.settings["output_dir"] != held_out.settings["output_dir"]
    assert one.settings["data"] == held_out.settings["data"]
    assert len(plan_of(folder, changes=["denoiser.num_inference_steps=1"]).commands["evaluation"]) == 2
    for command in plan_of(folder, changes=["evaluation.num_inference_steps=3"]).commands["evaluation"]:
        assert command.settings["num_inference_steps"] == 3


def damage(path):
    """Overwrites the data in the middle of a video; its header remains."""
    content = path.read_bytes()
    middle = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 3
    path.write_bytes(content[:middle] + bytes(4000) + content[middle + 4000 :])


def test_a_damaged_video_is_refused_and_another_one_is_shown(folder):
    shown = inspect_videos(str(folder), 17).pictures
    damage(folder / "0.mp4")  # which is the first one that is shown
    found = inspect_videos(str(folder), 17)
    assert list(found.refused) == [str(folder / "0.mp4")] and len(found.seconds) == 5
    assert len(found.pictures) == len(shown)
    for number in range(1, 6):
        damage(folder / f"{number}.mp4")
    with pytest.raises(ValueError, match="none of the videos of .* can be used: .*0.mp4: "):
        inspect_videos(str(folder), 17)


def test_videos_that_are_too_short_for_a_clip_are_named(folder):
    write_video(np.zeros((4, 32, 32, 3), np.uint8), folder / "short.mp4", 20.0)
    rows = describe_videos(plan_of(folder, minutes=60))
    assert rows[0][1].startswith("6 usable, 12 s")
    assert dict(rows)["too short"] == f"1, with fewer than 17 frames at 10 per second: {folder / 'short.mp4'}"


def test_a_text_encoder_without_captions_is_an_error(folder):
    with pytest.raises(ValueError, match="--text-encoder vgen/shapes-64 has no effect.*no video has a caption"):
        plan_of(folder, minutes=60, text_encoder="vgen/shapes-64")
    (folder / "0.txt").write_text("a circle")
    assert "text" not in plan_of(folder, minutes=60, text_encoder="vgen/shapes-64").commands


@pytest.mark.parametrize(("option", "name"), [("vae", "--vae"), ("init", "--from")])
def test_a_vae_that_is_not_supported_says_what_to_do(tmp_path, option, name):
    config = {"_class_name": "AutoencoderKL", "block_out_channels": [8], "latent_channels": 4}
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    options = TrainOptions(data="x", output=tmp_path, **{option: str(tmp_path)})
    with pytest.raises(ValueError, match=f"AutoencoderKL, which .*: pass {name} with"):
        choose_codec(options, {}, {})


@pytest.mark.parametrize("option", ["data", "held_out"])
def test_moving_mnist_needs_a_number_of_videos(folder, option):
    pytest.importorskip("idx2numpy")
    digits = np.random.default_rng(0).integers(0, 255, (10, 28, 28), dtype=np.uint8)
    path = folder.parent / "train-images-idx3-ubyte"
    path.write_bytes(struct.pack(">4i", 2051, *digits.shape) + digits.tobytes())
    options = TrainOptions(data=str(folder), output=folder.parent / "run", minutes=60)
    options = replace(options, **{option: str(path)})
    with pytest.raises(ValueError, match=r"--set data.max_videos=1000"):
        make_plan(options, LAPTOP)
    plan = make_plan(replace(options, changes=["data.max_videos=6"]), LAPTOP)
    assert plan.commands["data"][0].settings["max_videos"] == 6


def test_the_plan_of_a_stream_says_what_is_unknown(folder):
    with tarfile.open(folder.parent / "train-000.tar", "w") as file:
        for path in sorted(folder.glob("*.mp4")):
            file.add(path, path.name)
    data = f"shards:{folder.parent}/train-000.tar"
    plan = make_plan(TrainOptions(data=data, output=folder.parent / "run", minutes=60), LAPTOP)
    text = " ".join(describe_videos(plan)[0])
    assert "unknown until they are copied" in text and "--set data.max_videos=N" in text
    rows = {stage: (seconds, what) for stage, seconds, what in plan_rows(plan)}
    assert rows["data"][0] == rows["latents"][0] == "unknown"
    assert rows["vae"][0].startswith("about")
    assert "captions, if there are any" in rows["text"][1]
    assert rows["all"][0].endswith(" without data and latents")
    assert rows["all"][1].endswith(" on disk without data and latents")


def test_the_memory_for_latents_is_that_of_the_networks_that_encode(folder):
    plan = plan_of(folder, minutes=60)
    (folder / "0.txt").write_text("a circle")
    text = "vgen/shapes-64"
    encoder = load_text_encoder(text)
    with_text = plan_of(folder, minutes=60, text_encoder=text)
    added = with_text.memory["latents"] - plan.memory["latents"]
    assert added >= 4 * sum(one.numel() for one in encoder.parameters())
    with pytest.raises(ValueError, match="the stage latents needs .* GiB of memory.*latents.batch_size"):
        plan_of(folder, minutes=60, changes=["latents.batch_size=10000"])


@pytest.mark.parametrize("slots", [0, 4])
def test_fine_tuning_leaves_out_known_frames_that_the_network_does_not_take(slots):
    known = {"none": 0.25, "leading": 0.25, "keyframes": 0.25, "both": 0.25}
    setup = SimpleNamespace(denoiser_model={"keyframe_slots": slots}, options=TrainOptions(data="x", output="y"))
    kept = fine_tuning(setup, {"groups": {"full": 1.0}, "known": known})["known"]
    assert set(kept) == ({"none", "leading", "keyframes", "both"} if slots else {"none", "leading"})


def test_the_first_steps_do_not_say_how_long_the_rest_takes(folder):
    options = {"minutes": 60, "changes": ["vae.max_steps=100"]}
    plan = plan_of(folder, **options)
    begin(plan, data=(1.0, True), vae=(500.0, False))  # compilation took most of them
    (plan.folder / "vae" / "checkpoint-5").mkdir(parents=True)
    assert plan_of(folder, **options).seconds["vae"] == plan.seconds["vae"] * 95 / 100


def test_a_run_that_takes_longer_than_its_limit_says_so(folder, monkeypatch):
    options = {"minutes": 60, "changes": ["vae.max_steps=100"]}
    plan = plan_of(folder, **options)
    begin(plan, data=(1.0, True), vae=(3000.0, False))
    (plan.folder / "vae" / "checkpoint-20").mkdir(parents=True)
    write_logs(plan.folder / "vae", {10: 1500, 20: 3000}, monkeypatch)
    (line,) = [line for line in warnings_of(plan_of(folder, **options)) if "in all" in line]
    assert line.startswith("this takes 4 h ") and ", not 1 h 00 min, because stages that have begun" in line


def test_what_set_says_about_latents_and_the_evaluation_counts_in_the_time(folder):
    plan = plan_of(folder, minutes=60)
    changes = ["latents.hop=40", "latents.repeats=1", "evaluation.num_clips=3", "evaluation.num_samples=2"]
    less = plan_of(folder, minutes=60, changes=changes)
    assert (
        less.seconds["latents"] < plan.seconds["latents"] and less.seconds["evaluation"] < plan.seconds["evaluation"]
    )
    assert less.commands["latents"][0].settings["hop"] == 40

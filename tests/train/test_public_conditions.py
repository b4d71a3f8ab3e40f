"""Training of public models that make videos from images, or that have two Transformers.

The oracle is diffusers: what its pipelines pass to their networks, and these networks on the batches of training.
"""

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from typer.testing import CliRunner

from tests.test_wan_images import LAYOUTS, PROMPT, picture, seeds
from vgen import VideoGenPipeline
from vgen.cli import app
from vgen.data.latents import LatentSet
from vgen.data.video_io import read_video, write_video
from vgen.training.objective import Objective, PromptedDenoiser, denoising_loss
from vgen.training.sample import DenoiserSpec, SampleConfig, Source, check_conditions, conditioning, make_batch

from .scripts import TINY, encode, launch

SIZE = {"--height": 32, "--width": 32, "--num_frames": 9}
SETTINGS = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
TRAINING = {"--batch_size": 4, "--max_steps": 2, "--sample_every": 9, "--optimizer": "adamw", "--learning_rate": 0.01}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with two videos of nine frames."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(2):
        frames = np.stack([np.asarray(picture(100 * number + frame)) for frame in range(9)])
        write_video(frames, folder / f"{number}.mp4", 8.0)
        (folder / f"{number}.txt").write_text(PROMPT)
    return folder


def encode_clips(clips, source, output, **options):
    settings = SIZE | {"--data": clips, "--num_clips": None, "--frame_rates": "[8.0]", "--vae": source}
    return encode(source, output, **settings | options)


@pytest.fixture(scope="module")
def encoded(image_folders, clips, tmp_path_factory):
    """The latents of these videos for each layout."""
    made = {}
    for layout, folder in image_folders.items():
        made[layout] = tmp_path_factory.mktemp("encoded") / "latents"
        options = {"--condition": "[0, -1]" if "last" in layout else "[0]"}
        if layout == "2.2":
            options |= {"--text_encoder": folder, "--max_sequence_length": 512}
        else:
            options["--image_encoder"] = folder
        encode_clips(clips, folder, made[layout], **options)
    return made


def settings_of(folder, **settings):
    return SampleConfig(
        latents_dir=folder, output_dir=folder / "run", batch_size=2, window_lengths=[3], level_shift=3.0,
        text_dropout=0.0, max_sequence_length=512, groups={"full": 1.0}, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_condition_of_a_clip_is_that_of_diffusers(image_folders, clips, encoded, layout):
    pipe = WanImageToVideoPipeline.from_pretrained(image_folders[layout])
    pipe.set_progress_bar_config(disable=True)
    data, seen = LatentSet(encoded[layout]), {}

    def keep(_, args, kwargs):
        seen["condition"] = kwargs["hidden_states"][0, 4:]
        seen["image_embeds"] = kwargs["encoder_hidden_states_image"]

    pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    found = set()
    for path in sorted(clips.glob("*.mp4")):
        frames = [Image.fromarray(frame) for frame in read_video(path)[0]]
        last = {"last_image": frames[-1]} if "last" in layout else {}
        pipe(frames[0], PROMPT, **last, **SETTINGS, generator=seeds(0)[0])
        for index in range(len(data)):
            if (data[index].condition - seen["condition"]).abs().max() > 2e-3:  # latents are in half precision
                continue
            found.add(index)
            if layout != "2.2":
                tokens = seen["image_embeds"].reshape(-1, 8)[: 10 if last else 5]
                torch.testing.assert_close(data[index].image_embeds.float(), tokens, atol=2e-3, rtol=2e-3)
    assert found == {0, 1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_has_the_loss_of_the_network_of_diffusers(image_folders, encoded, layout):
    theirs = WanImageToVideoPipeline.from_pretrained(image_folders[layout]).transformer
    pipe = VideoGenPipeline.from_pretrained(image_folders[layout])
    source = Source(LatentSet(encoded[layout]), settings_of(encoded[layout]))
    check_conditions(pipe.transformer, [source])
    batch = make_batch(source, DenoiserSpec.of(pipe.transformer), 0, slice(0, 2), "full", 3, pipe.tokenizer)
    sample = Objective(pipe.scheduler)(batch["latents"], batch["noise"], batch["levels"])
    images = batch.get("image_embeds")
    with torch.no_grad():
        model = PromptedDenoiser(pipe.transformer, pipe.text_encoder)
        prediction = model(sample.latents, sample.timestep, **conditioning(batch))
        embeds = pipe.text_encoder(batch["input_ids"], attention_mask=batch["prompt_mask"]).last_hidden_state
        level = batch["levels"][:, 0]
        noisy = torch.lerp(batch["latents"], batch["noise"], level[:, None, None, None, None])
        expected = theirs(
            torch.cat([noisy, batch["condition"]], dim=1), level * 1000, embeds * batch["prompt_mask"][..., None],
            None if images is None else images.reshape(-1, 5, 8), return_dict=False,
        )[0]  # fmt: skip
    torch.testing.assert_close(prediction, expected, atol=1e-4, rtol=1e-4)
    wanted = (expected - (batch["noise"] - batch["latents"])).square().flatten(1).mean(1)
    torch.testing.assert_close(denoising_loss(prediction, sample.target, sample.weight), wanted, atol=1e-4, rtol=1e-4)


def test_a_shorter_window_has_the_condition_of_a_shorter_video(image_folders, clips, encoded, tmp_path):
    encode_clips(clips, image_folders["2.2"], tmp_path, **{"--condition": "[0]", "--num_frames": 5})
    pipe = VideoGenPipeline.from_pretrained(image_folders["2.2"])
    source = Source(LatentSet(encoded["2.2"]), settings_of(encoded["2.2"]))
    batch = make_batch(source, DenoiserSpec.of(pipe.transformer), 0, slice(0, 2), "full", 2, pipe.tokenizer)
    short = LatentSet(tmp_path)
    wanted = torch.stack([short[index].condition for index in range(len(short))]).float()
    for one in batch["condition"]:
        assert min((one - other).abs().max() for other in wanted) < 2e-3


def latents_of(pipe, layout):
    """Latents of a video, from images where the model needs them."""
    pipe.set_progress_bar_config(disable=True)
    given = {"image": picture(0)} if layout in ("2.1", "2.2") else {}
    given = {"frames": {0: picture(0), -1: picture(1)}} if "last" in layout else given
    return pipe(PROMPT, **given, **SETTINGS, generator=seeds(0)[0]).frames


@pytest.mark.parametrize("layout", ["2.1", "2.1-first-last"])
def test_a_model_that_makes_videos_from_images_is_trained(image_folders, encoded, tmp_path, layout):
    folder = image_folders[layout]
    options = {"--init": folder, "--latents_dir": encoded[layout], "--output_dir": tmp_path}
    options |= {"--held_out_latents": encoded[layout], "--sample_every": 2}
    done = launch("train/train_vdm.py", **TINY | TRAINING | options)
    assert "next: vgen animate IMAGE PROMPT --model" in done.stdout
    frames, _ = read_video(tmp_path / "samples.mp4")  # the captions of both clips are the same
    assert frames.shape == (9, 32, 32, 3)
    before, after = (VideoGenPipeline.from_pretrained(path) for path in (folder, tmp_path / "pipeline"))
    old, new = before.transformer.state_dict(), after.transformer.state_dict()
    assert (old["patch_embedding.weight"][:, 4:] != new["patch_embedding.weight"][:, 4:]).all(), "the condition"
    assert any((old[name] != new[name]).any() for name in old if "image_embedder" in name)
    back = WanImageToVideoPipeline.from_pretrained(
        after.to_diffusers().save_pretrained(tmp_path / "d") or tmp_path / "d"
    )
    again = VideoGenPipeline.from_pipe(back)
    torch.testing.assert_close(latents_of(again, layout), latents_of(after, layout), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
@pytest.mark.parametrize("layout", ["2.2", "experts"])
def test_one_of_two_transformers_is_trained_on_its_noise_levels(
    image_folders, experts_folder, clips, encoded, tmp_path, layout, expert
):
    folder = experts_folder if layout == "experts" else image_folders[layout]
    latents = encoded["2.2"]
    if layout == "experts":
        latents = tmp_path / "latents"
        encode_clips(clips, folder, latents)
    options = {"--init": folder, "--latents_dir": latents, "--output_dir": tmp_path / "run", "--expert": expert}
    whole = layout == "experts"
    if not whole:
        options |= {"--train_only": "lora", "--lora_rank": 2, "--ema_decay": 0.0, "--gradient_checkpointing": "true"}
    done = launch("train/train_vdm.py", **TINY | TRAINING | options)
    before = VideoGenPipeline.from_pretrained(folder)
    names = {"high_noise": "transformer", "low_noise": "transformer_2"}
    if whole:
        after = VideoGenPipeline.from_pretrained(tmp_path / "run/pipeline")
        for name in names.values():
            pairs = zip(getattr(before, name).parameters(), getattr(after, name).half().parameters(), strict=True)
            assert any((old.half() != new).any() for old, new in pairs) == (name == names[expert])
        assert type(after.to_diffusers()) is WanPipeline
        return
    option = "--lora" if expert == "high_noise" else "--lora-low-noise"
    assert f" {option} {tmp_path}/run/lora " in done.stdout
    theirs = WanImageToVideoPipeline.from_pretrained(folder)
    plain = latents_of(before, layout)
    for pipe in (theirs, before):
        pipe.load_lora_weights(tmp_path / "run/lora", load_into_transformer_2=expert == "low_noise")
    adapted = latents_of(before, layout)
    assert (adapted - plain).abs().max() > 1e-4
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(picture(0), PROMPT, **SETTINGS, generator=seeds(0)[0]).frames
    torch.testing.assert_close(adapted, expected, atol=1e-4, rtol=1e-4)


def test_the_levels_of_an_expert_are_on_its_side_of_the_boundary(experts_folder, clips, tmp_path):
    encode_clips(clips, experts_folder, tmp_path)
    pipe = VideoGenPipeline.from_pretrained(experts_folder)
    spec, data = DenoiserSpec.of(pipe.transformer), LatentSet(tmp_path)
    for low, high in ((0.8, 1.0), (0.0, 0.8)):
        source = Source(data, settings_of(tmp_path, level_range=[low, high]))
        levels = [
            make_batch(source, spec, step, slice(0, 2), "full", 3, pipe.tokenizer)["levels"] for step in range(100)
        ]
        assert low <= torch.stack(levels).min() < low + 0.2 and high - 0.1 < torch.stack(levels).max() <= high


def test_the_small_model_is_trained_with_a_first_frame(first_frame_folder, clips, tmp_path):
    encode_clips(clips, first_frame_folder, tmp_path / "latents")
    options = {
        "--init": first_frame_folder, "--latents_dir": tmp_path / "latents", "--output_dir": tmp_path / "run",
        "--known": '{"none": 1, "leading": 1}', "--num_leading": "[1]", "--corrupted": 0.0,
    }  # fmt: skip
    launch("train/train_vdm.py", **TINY | TRAINING | options)
    after = VideoGenPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert "leading" not in after.denoiser.config.tasks and after.config.expand_timesteps
    frames = after(PROMPT, image=picture(0), **SETTINGS | {"output_type": "np"}).frames
    assert np.isfinite(frames).all()
    rejected = launch("train/train_vdm.py", check=False, **TINY | TRAINING | options | {"--corrupted": 0.5})
    assert "this model is given a first frame without noise: set num_leading=[1], corrupted=0" in rejected.stderr


def test_a_first_frame_is_in_the_same_group_as_all_others(first_frame_folder, clips, tmp_path):
    """The input equals that of diffusers' pipeline: the first latent clean at timestep 0, all tokens in one group."""
    encode_clips(clips, first_frame_folder, tmp_path)
    pipe = VideoGenPipeline.from_pretrained(first_frame_folder)
    settings = settings_of(tmp_path, known={"leading": 1.0}, num_leading=[1], corrupted=0.0)
    source = Source(LatentSet(tmp_path), settings)
    check_conditions(pipe.transformer, [source], expand_timesteps=True)
    spec = DenoiserSpec.of(pipe.transformer, expand_timesteps=True)
    batch = make_batch(source, spec, 0, slice(0, 2), "full", 3, pipe.tokenizer)
    assert len(set(batch["groups"])) == 1
    assert (batch["levels"][:, 0] == 0).all() and (batch["levels"][:, 1:] > 0).all()
    sample = Objective(pipe.scheduler)(batch["latents"], batch["noise"], batch["levels"])
    theirs = WanPipeline.from_pretrained(first_frame_folder).transformer
    tokens = sample.timestep.repeat_interleave(sample.latents.shape[3] * sample.latents.shape[4] // 4, dim=1)
    with torch.no_grad():
        model = PromptedDenoiser(pipe.transformer, pipe.text_encoder)
        prediction = model(sample.latents, sample.timestep, **conditioning(batch))
        embeds = pipe.text_encoder(batch["input_ids"], attention_mask=batch["prompt_mask"]).last_hidden_state
        expected = theirs(sample.latents, tokens, embeds * batch["prompt_mask"][..., None], return_dict=False)[0]
    torch.testing.assert_close(prediction, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("layout", "latents", "options", "message"),
    [
        ("2.1", "2.2", {}, "needs image tokens of 8 channels, but the latents in {} have 0 channels: pass --image"),
        ("2.1-first-last", "2.1", {}, "needs 10 image tokens, but the latents in {} have 5: pass --condition [0,-1]"),
        ("2.1", "plain", {}, "needs a condition of 8 channels, but the latents in {} have 0 channels: pass --cond"),
        ("2.1", "2.1", {"--known": '{"leading": 1}'}, "makes videos from images: set known={none: 1}"),
        ("2.1-first-last", "2.1-first-last", {"--window_lengths": "[2]"}, "window_lengths=[] if the last frame"),
        ("2.1", "2.1", {"--expert": "low_noise"}, "the pipeline to train has one denoiser, got expert=low_noise"),
        ("2.2", "2.2", {}, "has two Transformers: set expert to high_noise or low_noise, got expert=None"),
        ("2.2", "2.2", {"--expert": "low_noise", "--level_range": "[0.95,1.0]"}, "lower end of level_range must be"),
        ("2.2", "2.2", {"--level_range": "[0.5]"}, "level_range must be two noise levels, got [0.5]"),
    ],
)
def test_what_does_not_fit_is_named(image_folders, encoded, clips, tmp_path, layout, latents, options, message):
    folder = encoded.get(latents, tmp_path / "latents")
    if latents == "plain":
        encode_clips(clips, image_folders["2.1"], folder)
    given = {"--init": image_folders[layout], "--latents_dir": folder, "--output_dir": tmp_path / "run"}
    rejected = launch("train/train_vdm.py", check=False, **TINY | TRAINING | given | options)
    assert rejected.returncode != 0 and message.replace("{}", str(folder)) in rejected.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--condition": "[1]"}, "condition must be [], [0] or [0, -1], got [1]"),
        (
            {"--image_encoder": "folder"},
            "image_encoder embeds the frames of condition: pass --condition [0], or [0,-1]",
        ),
        (
            {"--condition": "[0, -1]", "--short": "pad"},
            "condition=[0, -1] needs clips with a last frame: set short=skip",
        ),
        ({"--condition": "[0]", "--image_encoder": "wan"}, "has no image_encoder: pass a pipeline of Wan 2.1"),
    ],
)
def test_encodings_that_contradict_themselves_are_named(image_folders, wan_folder, clips, tmp_path, options, message):
    options = {name: str(wan_folder) if value == "wan" else value for name, value in options.items()}
    rejected = encode_clips(clips, image_folders["2.1"], tmp_path, check=False, **options)
    assert rejected.returncode != 0 and message in rejected.stderr and len(rejected.stderr.splitlines()) == 1


def test_an_adapter_for_low_noise_levels_is_an_option(image_folders, tmp_path):
    words = ["animate", tmp_path / "a.png", PROMPT, "--model", image_folders["2.2"], "--steps", 2, "--num-frames", 9]
    picture(0).save(tmp_path / "a.png")
    missing = CliRunner().invoke(
        app, [str(one) for one in [*words, "--lora-low-noise", "none.safetensors", "-o", "x.mp4"]]
    )
    assert missing.exit_code != 0 and "no such LoRA adapter: none.safetensors" in missing.output

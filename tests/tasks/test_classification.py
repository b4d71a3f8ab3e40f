import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForVideoClassification
from typer.testing import CliRunner

from tests.data.test_clips import write_clip
from tests.recognition.test_networks import TINY
from vgen.cli import app
from vgen.data.clips import Listed, Sampling, list_videos, stack_clips
from vgen.data.labels import list_labeled
from vgen.data.views import views_of
from vgen.recognition import Recognizer, create_recognizer, load_recognizer
from vgen.recognition.detection import Segment
from vgen.tasks.classification import Moment, classify, draw_timeline, events_of, timeline, watch

LABELS = ["a", "b", "c"]


def make(name="cnn_gru", num_frames=8, **sizes):
    torch.manual_seed(0)
    return create_recognizer(name, 3, num_frames, 16, labels=LABELS, frame_rate=10.0, **sizes).eval()


@pytest.fixture
def video(tmp_path):
    write_clip(tmp_path / "a.mp4")
    return tmp_path / "a.mp4"


def test_the_probabilities_of_a_video_are_the_mean_over_its_clips(video):
    model = make("pooled", channels=[8])
    found = classify(model, video, num_clips=3)
    clips = views_of(Listed(path=video), Sampling(num_frames=8, frame_rate=10.0), 16, num_clips=3)
    with torch.no_grad():
        expected = model(stack_clips(clips, torch.device("cpu"))[0]).logits.softmax(-1).mean(0)
    assert sum(found.values()) == pytest.approx(1) and list(found.values()) == sorted(found.values(), reverse=True)
    assert [found[label] for label in LABELS] == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_timeline_of_a_streamed_network_has_each_frame(video):
    model = make("cnn_gru", channels=[8])
    moments = timeline(model, video)
    clips = views_of(Listed(path=video), Sampling(num_frames=20, frame_rate=10.0), 16)
    with torch.no_grad():
        expected = model(stack_clips(clips, torch.device("cpu"))[0]).frame_logits[0].softmax(-1)
    assert [moment.start for moment in moments] == pytest.approx([frame / 10 for frame in range(20)])
    assert [moment.end for moment in moments] == pytest.approx([(frame + 1) / 10 for frame in range(20)])
    torch.testing.assert_close(torch.tensor([moment.probabilities for moment in moments]), expected)


def test_the_timeline_of_other_networks_has_overlapping_windows(video):
    moments = timeline(make("pooled", channels=[8]), video)
    edges = [0.0, *(0.5 + 0.2 * index for index in range(6)), 2.0]  # windows of 0.8 s, 0.2 s apart
    assert [one.start for one in moments] == pytest.approx(edges[:-1])
    assert [one.end for one in moments] == pytest.approx(edges[1:])
    model = create_recognizer("pooled", 2, 20, 16, channels=[8], frame_rate=10.0, multi_label=True).eval()
    [only] = timeline(model, video)
    assert (only.start, only.end) == pytest.approx((0.0, 2.0))
    assert all((one.start, one.end) == (only.start, only.end) for one in events_of([only], model))


def test_events_are_spans_with_one_most_probable_label():
    rows = [[0.7, 0.3], [0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]
    moments = [Moment(index / 2, (index + 1) / 2, row) for index, row in enumerate(rows)]
    model = create_recognizer("pooled", 2, 8, 16, labels=["a", "b"])
    assert events_of(moments, model) == [
        Segment("a", 0.0, 1.0, pytest.approx(0.8)), Segment("b", 1.0, 1.5, 0.8), Segment("a", 1.5, 2.0, 0.6),
    ]  # fmt: skip
    several = create_recognizer("pooled", 2, 8, 16, labels=["a", "b"], multi_label=True)
    found = events_of(moments, several)
    assert [one[:3] for one in found] == [("a", 0.0, 1.0), ("b", 1.0, 1.5), ("a", 1.5, 2.0)]
    assert all(one.score >= 0.5 for one in found)


@pytest.mark.parametrize("model_type", ["timesformer", "vivit", "videomae", "vjepa2"])
def test_classifiers_of_transformers_load_with_weights_labels_and_normalization(model_type, tmp_path):
    torch.manual_seed(0)
    own = {"vjepa2": {"crop_size": 16, "frames_per_clip": 8, "pred_hidden_size": 16, "pred_num_attention_heads": 2,
                      "pred_num_hidden_layers": 1, "num_pooler_layers": 1}}  # fmt: skip
    sizes = own.get(model_type, {"image_size": 16, "num_frames": 8}) | {"id2label": dict(enumerate(LABELS))}
    patch = {"tubelet_size": [2, 8, 8]} if model_type == "vivit" else {"patch_size": 8}
    public = AutoModelForVideoClassification.from_config(AutoConfig.for_model(model_type, **TINY, **patch, **sizes))
    public.eval().save_pretrained(tmp_path)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    processor = {"image_mean": mean, "image_std": std, "rescale_factor": 1 / 127.5, "offset": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = load_recognizer(str(tmp_path))
    clip = torch.rand(2, 3, 8, 16, 16) * 2 - 1
    pixels = (clip - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(3, 1, 1, 1)
    name = "pixel_values_videos" if model_type == "vjepa2" else "pixel_values"
    with torch.no_grad():
        torch.testing.assert_close(model(clip).logits, public(**{name: pixels.transpose(1, 2)}).logits)
    assert model.labels == LABELS
    model.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(load_recognizer(str(tmp_path / "ours"))(clip).logits, model(clip).logits)


def run(*words):
    return CliRunner().invoke(app, ["classify", *map(str, words)])


def test_the_command_prints_labels_times_or_json(video, tmp_path):
    model = make("cnn_gru", channels=[8])
    model.save_pretrained(tmp_path / "model")
    shown = run(video, "--model", tmp_path / "model", "--top", 1)
    best = next(iter(classify(model, video)))
    assert shown.exit_code == 0 and best in shown.output and str(video) in shown.output
    found = json.loads(run(video, "--model", tmp_path / "model", "--json").output)
    assert found == {str(video): pytest.approx(classify(model, video))}
    moments = json.loads(run(video, "--model", tmp_path / "model", "--json", "--timeline").output)[str(video)]
    assert len(moments) == 20 and set(moments[0]) == {"start", "end", "probabilities"}
    assert "start" in run(video, "--model", tmp_path / "model", "--timeline").output


def test_a_plot_shows_the_probabilities_over_time(video, tmp_path):
    make("cnn_gru", channels=[8]).save_pretrained(tmp_path / "model")
    done = run(video, "--model", tmp_path / "model", "--timeline", "--plot", tmp_path / "a.svg")
    assert done.exit_code == 0 and f"wrote {tmp_path / 'a.svg'}" in done.output
    moments = [Moment(0.0, 0.5, [0.1, 0.6, 0.3]), Moment(0.5, 1.5, [0.2, 0.7, 0.1])]
    steps = {one.get_label(): one.get_data() for one in draw_timeline(moments, make("pooled"), most=2).axes[0].patches}
    assert set(steps) == {"b", "c"}
    assert list(steps["b"].values) == [0.6, 0.7] and list(steps["b"].edges) == [0.0, 0.5, 1.5]
    for words in ((), ("--timeline", video)):
        wrong = run(video, *words, "--model", tmp_path / "model", "--plot", tmp_path / "b.svg")
        assert wrong.exit_code == 2 and "--plot must be" in wrong.output


def test_a_watched_file_has_the_timeline_of_the_file(video):
    model = make("cnn_gru", channels=[8])
    expected, found = timeline(model, video), list(watch(model, str(video)))
    assert [one.start for one in found] == pytest.approx([one.start for one in expected], abs=0.01)
    probabilities = [torch.tensor([moment.probabilities for moment in moments]) for moments in (found, expected)]
    torch.testing.assert_close(*probabilities, atol=0.02, rtol=0.0)  # OpenCV decodes in its own way
    model.register_to_config(frame_rate=5.0)
    slower = list(watch(model, str(video)))
    assert [one.start for one in slower] == pytest.approx([index / 5 for index in range(10)], abs=0.01)


def test_a_camera_has_the_times_at_which_its_frames_come(monkeypatch):
    clock = iter(np.arange(100) / 30)
    frames = [np.full((12, 20, 3), 8 * index, np.uint8) for index in range(24)]

    class Camera:
        def __init__(self, number):
            assert number == 0
            self.left = iter(frames)

        def isOpened(self):  # noqa: N802
            return True

        def grab(self):
            self.frame = next(self.left, None)
            return self.frame is not None

        def retrieve(self):
            return True, self.frame

        def release(self):
            self.left = None

    monkeypatch.setattr("cv2.VideoCapture", Camera)
    monkeypatch.setattr("vgen.tasks.classification.time.monotonic", lambda: next(clock))
    times = [one.start for one in watch(make("cnn_gru", channels=[8]), "0")]
    assert 8 <= len(times) <= 9 and np.diff(times) == pytest.approx(0.1, abs=0.04)  # 10 of 30 frames per second


def test_the_watch_command_prints_changes_of_the_label_and_one_line_for_mistakes(video, tmp_path):
    make("cnn_gru", channels=[8]).save_pretrained(tmp_path / "model")
    make("pooled", channels=[8]).save_pretrained(tmp_path / "whole")
    done = CliRunner().invoke(app, ["watch", str(video), "--model", str(tmp_path / "model")])
    lines = done.output.splitlines()
    labels = [line.split(": ")[1].split(" (")[0] for line in lines if " s: " in line]
    events = events_of(timeline(make("cnn_gru", channels=[8]), video), make("cnn_gru", channels=[8]))
    assert done.exit_code == 0 and labels == [event.label for event in events]
    for source, model, message in (
        (video, "whole", "pooled sees whole clips"),
        (tmp_path / "nothing.mp4", "model", "cannot open"),
    ):
        done = CliRunner().invoke(app, ["watch", str(source), "--model", str(tmp_path / model)])
        assert done.exit_code == 2 and message in done.output


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("st_lstm", {"channels": [8], "grid": 2}),
        ("joint_attention", {"dim": 8, "depth": 1, "heads": 2, "patch_frames": 2}),
        ("factorized_attention", {"dim": 8, "depth": 1, "temporal_depth": 1, "heads": 2}),
    ],
)
def test_a_picture_of_attention_has_frames_and_below_them_what_is_attended_to(name, sizes, video, tmp_path):
    model = make(name, **sizes)
    model.save_pretrained(tmp_path / "model")
    done = run(video, "--model", tmp_path / "model", "--attention", tmp_path / "a.png")
    assert done.exit_code == 0 and "wrote" in done.output
    picture = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    assert picture.shape == (32, 8 * 16, 3)
    above, below = picture[:16], picture[16:]
    shown = [round(above[:, 16 * index : 16 * index + 16].mean() / 10) for index in range(8)]
    assert shown == list(range(6, 14))  # the middle clip
    assert (below <= above + 1).all() and (below < above - 5).any()
    brightest = (below / above.clip(1)).max()
    assert brightest > 0.85


def test_networks_without_attention_draw_none(video, tmp_path):
    make(channels=[8]).save_pretrained(tmp_path / "model")
    done = run(video, "--model", tmp_path / "model", "--attention", tmp_path / "a.png")
    assert done.exit_code == 2 and "cnn_gru has no attention" in done.output and not (tmp_path / "a.png").exists()
    done = run(video, "--model", tmp_path / "model", "--attention", tmp_path / "a.gif")
    assert done.exit_code == 2 and "--attention must be a .png file" in done.output


@pytest.mark.parametrize("several", [False, True])
def test_labels_are_written_where_training_reads_them(several, tmp_path):
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.mp4", "deep/b.mp4"):
        write_clip(folder / name)
    write_clip(folder / "short.mp4", num_frames=3)
    (folder / "a.txt").write_text("a caption")
    model = make("cnn_gru", channels=[8], multi_label=several)
    model.save_pretrained(tmp_path / "model")
    words = ["label", str(folder), "--model", str(tmp_path / "model"), "--threshold", "0"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "2 videos" in done.output, done.output
    assert "not labeled:" in done.output and "short.mp4: 3 frames" in done.output
    found = {one.video.path.name: one.labels for one in list_labeled(folder)}
    expected = {name: tuple(classify(model, folder / name)) for name in ("a.mp4", "deep/b.mp4")}
    count = 3 if several else 1
    assert found == {name.split("/")[-1]: labels[:count] for name, labels in expected.items()}
    captions = {one.path.name: one.captions for one in list_videos(folder)}
    assert captions == {"a.mp4": ("a caption",), "b.mp4": expected["deep/b.mp4"][:count]}
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "exists already" in done.output
    for output, message in [("elsewhere.jsonl", None), ("videos/deep/x.jsonl", "must be a .jsonl file in")]:
        done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / output)])
        assert (done.exit_code == 0) == (message is None) and (message or "wrote") in done.output


def test_mistakes_are_named(video, tmp_path):
    make(channels=[8], num_frames=30).save_pretrained(tmp_path / "long")
    (tmp_path / "empty").mkdir()
    for words, message in [
        ((tmp_path / "no.mp4", "--model", tmp_path / "long"), "no such file"),
        ((video, "--model", tmp_path / "nowhere"), "nowhere"),
        ((video, "--model", tmp_path / "empty"), "is not a recognizer: it has no config.json"),
        ((video, "--model", "vgen/shapes-64"), "is not a recognizer"),
        ((video, "--model", tmp_path / "long"), "20 frames at 10 per second; a clip needs 30"),
        ((video, "--model", tmp_path / "long", "--device", "cuda:9"), "--device cuda:9 is not available"),
    ]:
        done = run(*words)
        assert done.exit_code in (1, 2) and message in done.output, done.output
        assert "Traceback" not in done.output
    assert isinstance(load_recognizer(str(tmp_path / "long")), Recognizer)

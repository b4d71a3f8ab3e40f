import copy

import numpy as np
import pytest

from vgen.metrics.report import FORMAT, compare, compare_distances, format_summary, make_report, summarize, table

PROTOCOL = {
    "num_clips": 3, "num_frames": 9, "stride": 1, "height": 64, "width": 64, "known_frames_counted": False,
    "resize": "bilinear", "values": "as they are", "feature_network": "abc",
}  # fmt: skip
DISTANCE = {"name": "FVD", "value": 5.0, "low": 4.0, "high": 6.0, "protocol": PROTOCOL}


@pytest.fixture
def results():
    methods = {
        "the model": {"psnr": [20.0, 22.0, 27.0], "mse": [0.01, 0.02, 0.03]},
        "copy": {"psnr": [10.0, 11.0, 12.0]},
    }
    return {
        "format": FORMAT, "missing": 0, "model": "vgen/<b>", "versions": {"torch": "2"},
        "suite": {"suite": "shapes", "num_clips": 3},
        "settings": {"prompted": False, "num_samples": 1, "rollout_frames": 8}, "numbers": [0, 1, 2],
        "tasks": {"prediction": methods},
        "frames": {"prediction": [1, 2]},
        "curves": {"prediction": {"the model": {"psnr": [20.0, 19.0], "ssim": [0.9, 0.8]}}},
        "distances": {"prediction": {"the model": {"FVD": DISTANCE}}},
    }  # fmt: skip


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    actual = summarize(list(values))
    half = 1.96 * values.std(ddof=1) / 20  # of a normal distribution's mean
    assert actual.mean == pytest.approx(values.mean())
    assert actual.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert actual.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert summarize([4.0, 4.0]) == (4.0, 4.0, 4.0)
    single = summarize([4.0])
    assert single.mean == 4 and np.isnan([single.low, single.high]).all()  # a single clip has no interval


def first_clip_of(results):
    """The first clip of results."""
    methods = results["tasks"]["prediction"]
    cut = {name: {metric: values[:1] for metric, values in scores.items()} for name, scores in methods.items()}
    return results | {"tasks": {"prediction": cut}, "numbers": [0]}


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_values_without_a_mean_raise(values):
    with pytest.raises(ValueError, match="not finite"):
        summarize(values)


def test_numbers_have_the_digits_that_their_interval_supports():
    assert format_summary("psnr", summarize([27.123456])) == "27.1"
    assert format_summary("", (27.123, 26.9, 27.4)) == "27.12 [26.90, 27.40]"
    assert format_summary("", (270.123, 240.0, 300.0)) == "270 [240, 300]"
    assert format_summary("mse", (0.0123, 0.0121, 0.0126)) == "12.30 [12.10, 12.60]"  # multiplied by 1000
    assert format_summary("", (0.00035, 0.0003, 0.0004)) == "0.00035 [0.00030, 0.00040]"


def test_a_result_does_not_differ_from_itself_and_a_better_one_does(results):
    same = {(one.method, one.metric): one for one in compare(results, results)}
    assert set(same) == {("the model", "psnr"), ("the model", "mse"), ("copy", "psnr")}
    assert not any(one.is_significant for one in same.values())
    better = copy.deepcopy(results)
    better["tasks"]["prediction"]["the model"]["psnr"] = [21.0, 23.5, 28.0]
    del better["tasks"]["prediction"]["copy"]
    actual = {(one.method, one.metric): one for one in compare(results, better)}
    one = actual["the model", "psnr"]
    assert one.is_significant and not compare(first_clip_of(results), first_clip_of(better))[0].is_significant
    assert one.summary.mean == pytest.approx(3.5 / 3) and ("copy", "psnr") not in actual


def test_results_without_a_setting_that_is_new_are_comparable(results):
    newer = copy.deepcopy(results)
    newer["suite"]["hop"] = None
    assert compare(results, newer) and compare(newer, results)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (None, "format", "other"),
        ("suite", "num_clips", 4),
        ("suite", "hop", 2),
        ("settings", "prompted", True),
        (None, "numbers", [0, 1, 3]),
    ],
)
def test_results_of_other_protocols_raise(results, part, name, value):
    other = copy.deepcopy(results)
    (other if part is None else other[part])[name] = value
    with pytest.raises(ValueError, match="cannot be compared|expected two results"):
        compare(results, other)


def test_clips_may_be_stored_elsewhere_but_must_be_the_same(results):
    here, there = copy.deepcopy(results), copy.deepcopy(results)
    for one, folder in ((here, "clips"), (there, "./clips")):
        one["suite"]["data"], one["settings"]["clips_sha256"] = folder, "a"
    assert compare(here, there)
    there["settings"]["clips_sha256"] = "b"
    with pytest.raises(ValueError, match="clips_sha256 a and b"):
        compare(here, there)


def test_other_json_raises(results):
    with pytest.raises(ValueError, match="expected two results"):
        compare(results, [])


def test_distances_are_compared_where_both_have_them_and_their_protocol_agrees(results):
    other = copy.deepcopy(results)
    other["distances"]["prediction"]["another"] = other["distances"]["prediction"]["the model"]
    ((task, method, mine, theirs),) = compare_distances(results, other)
    assert (task, method) == ("prediction", "the model") and mine == theirs
    other["distances"]["prediction"]["the model"]["FVD"] = copy.deepcopy(DISTANCE)
    other["distances"]["prediction"]["the model"]["FVD"]["protocol"]["num_frames"] += 1
    ((_, _, mine, theirs),) = compare_distances(results, other)
    with pytest.raises(ValueError, match="num_frames"):
        theirs.minus(mine)


def test_the_report_is_one_page_with_everything_in_it(results):
    page = make_report(results, {"prediction, clip 0": {"the model": "QUJD"}})
    assert page.count("<svg") == 2 and "data:image/png;base64,QUJD" in page and "feature_network" in page
    assert "vgen/&lt;b&gt;" in page and "width=device-width" in page  # escaped; made for phones
    assert 'src="http' not in page and "<script" not in page and "<link" not in page
    columns, rows = table(results["tasks"]["prediction"])
    assert columns == ["psnr, dB", "mse, ×10⁻³"] and rows["copy"][1] == "" and rows["the model"][0] in page

import pytest

from vgen.tasks.train_report import judge


def results(prediction, copied, mean=None, motion=1.0, vae=30.0, interpolation=25.0, blend=20.0):
    """Results with these medians."""

    def around(value):
        return [value - 5.0, value, value + 7.0]  # the median is not the mean

    methods = {"the model": {"psnr": around(prediction), "motion": around(motion)}}
    methods["copy of the last frame"] = {"psnr": around(copied)}
    methods["true clips"] = {"motion": around(1.0)}
    if mean is not None:
        methods["the model, mean of 8"] = {"psnr": around(mean)}
    between = {"the model": {"psnr": around(interpolation)}, "linear blend": {"psnr": around(blend)}}
    reconstruction = {"VAE only": {"psnr": around(vae)}}
    return {"tasks": {"prediction": methods, "interpolation": between, "reconstruction": reconstruction}}


def texts(*arguments):
    return {verdict.text: verdict.good for verdict in judge(*arguments)}


def test_a_good_model_gets_good_verdicts():
    found = texts(results(20.0, 18.0, mean=21.5), results(20.5, 18.0))
    assert all(found.values())
    for part in ("with 30.0 dB.", "20.0 dB for one sample, above", "mean of 8 predictions has 21.5 dB, +3.5 dB",
                 "25.0 dB, above linear blending (20.0 dB)"):  # fmt: skip
        assert any(part in text for text in found), (part, found)


@pytest.mark.parametrize(
    ("held_out", "training", "part"),
    [
        (results(20.0, 18.0, vae=22.0), results(20.0, 18.0), "below 27 dB details are lost"),
        (results(17.0, 18.0), results(17.0, 18.0), "not above repeating the last frame (18.0 dB)"),
        (results(20.0, 18.0, interpolation=19.0), results(20.0, 18.0), "not above linear blending"),
        (results(18.0, 18.0, motion=0.1), results(18.0, 18.0), "mostly repeats the last frame"),
        (results(16.0, 18.0), results(26.0, 18.0), "memorized its training videos"),
        (results(17.0, 18.0, mean=17.5), results(17.0, 18.0), "17.5 dB, -0.5 dB compared with repeating it"),
    ],
)
def test_what_is_wrong_is_said(held_out, training, part):
    bad = [text for text, good in texts(held_out, training).items() if not good]
    assert any(part in text for text in bad), bad


def test_a_model_is_only_judged_by_what_was_measured():
    assert judge({"tasks": {}}, {"tasks": {}}) == []


def test_one_step_has_a_sentence_of_its_own():
    found = texts(results(16.0, 17.0), results(16.0, 17.0), results(18.3, 17.1, interpolation=22.5, blend=22.3))
    (text,) = (text for text in found if "one denoising step" in text)
    assert found[text] and "prediction 18.3 dB (repeating the last frame: 17.1 dB)" in text
    assert "interpolation 22.5 dB (linear blending: 22.3 dB)" in text
    worse = texts(results(16.0, 17.0), results(16.0, 17.0), results(18.3, 17.1, interpolation=22.0, blend=22.3))
    assert not next(good for text, good in worse.items() if "one denoising step" in text)
    assert judge({"tasks": {}}, {"tasks": {}}, {"tasks": {}}) == []

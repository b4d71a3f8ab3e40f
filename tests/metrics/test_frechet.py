import json
import logging
from dataclasses import replace

import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import (
    TimesformerConfig,
    TimesformerModel,
    VideoMAEConfig,
    VideoMAEModel,
    VivitConfig,
    VivitModel,
    VJEPA2Config,
    VJEPA2Model,
)

from vgen.metrics.frechet import (
    FeatureNetwork,
    Protocol,
    ScriptedFeatures,
    distances,
    frechet_distance,
    kernel_distance,
)

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
MODELS = {
    "videomae": lambda: VideoMAEModel(VideoMAEConfig(**SMALL, image_size=32, patch_size=16, num_frames=4)),
    "timesformer": lambda: TimesformerModel(TimesformerConfig(**SMALL, image_size=32, patch_size=16, num_frames=4)),
    "vivit": lambda: VivitModel(VivitConfig(**SMALL, image_size=32, num_frames=4, tubelet_size=[2, 16, 16])),
    "vjepa2": lambda: VJEPA2Model(
        VJEPA2Config(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, crop_size=32, frames_per_clip=4, patch_size=16,
            pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1,
        )
    ),
}  # fmt: skip


def gaussian(n, mean, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, len(mean), generator=generator, dtype=torch.double) * torch.tensor(scale) + torch.tensor(
        mean
    )


def whitened(n, d, seed=0):
    """Points whose mean is 0 and whose covariance is the identity, exactly."""
    x = gaussian(n, [0.0] * d, [1.0] * d, seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_the_frechet_distance_of_gaussians_is_its_closed_form():
    x, y = whitened(50, 3), whitened(60, 3, seed=1)
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 3.0])
    shift = torch.tensor([1.0, -2.0, 0.5])
    expected = shift.square().sum() + (a - b).square().sum()
    assert frechet_distance(x * a, y * b + shift) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_depends_on_covariances():
    mix = torch.tensor([[2.0, 0.3, 0.0], [0.5, 1.0, -0.7], [0.0, 0.2, 1.5]], dtype=torch.double)
    x, y = whitened(50, 3), whitened(60, 3, seed=1) @ mix
    root = scipy.linalg.sqrtm((mix.T @ mix).numpy())  # of the product with the identity
    expected = 3 + (mix.T @ mix).trace().item() - 2 * root.trace()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_the_kernel_distance_is_the_mean_over_pairs():
    x, y = gaussian(7, [0.0] * 3, [1.0] * 3), gaussian(7, [0.5] * 3, [2.0] * 3, seed=1)

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7)]
    others = [kernel(z[i], z[j]) for z in (x, y) for i, j in pairs if i != j]
    between = [kernel(x[i], y[j]) for i, j in pairs]
    expected = sum(others) / 42 - 2 * sum(between) / 49
    assert kernel_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)


def test_distances_are_those_of_torchmetrics_with_the_same_features():
    class Pixels(torch.nn.Module):
        num_features = 6

        def forward(self, x):
            return x.flatten(1).double()

    real, generated = gaussian(40, [0.0] * 6, [1.0] * 6), gaussian(40, [0.3] * 6, [1.5] * 6, seed=1)
    metric = FrechetInceptionDistance(feature=Pixels()).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=40).set_dtype(torch.float64)
    for one in (metric, kernel):
        one.update(real.view(40, 6, 1, 1), real=True)
        one.update(generated.view(40, 6, 1, 1), real=False)
    assert frechet_distance(real, generated) == pytest.approx(metric.compute().item(), rel=1e-9)
    assert kernel_distance(real, generated) == pytest.approx(kernel.compute()[0].item(), rel=1e-9)


def test_the_kernel_distance_is_unbiased():
    zero, one = [0.0, 0.0], [1.0, 1.0]
    values = [kernel_distance(gaussian(20, zero, one, i), gaussian(20, zero, one, 1000 + i)) for i in range(200)]
    assert abs(sum(values) / 200) < 4 * torch.tensor(values).std() / 200**0.5
    assert min(values) < 0
    assert kernel_distance(whitened(50, 2), whitened(50, 2, 1) + 1) > 0.5


@pytest.mark.parametrize("kind", MODELS)
def test_video_models_of_transformers_give_features(tmp_path, kind):
    torch.manual_seed(0)
    MODELS[kind]().eval().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))
    network = FeatureNetwork(tmp_path)
    clips = torch.rand(3, 3, 4, 20, 24) * 2 - 1
    features = torch.cat([network(batch).double() for batch in clips.split(2)])
    assert features.shape[0] == 3 and features.dtype == torch.double
    torch.testing.assert_close(features[1:2], network(clips[1:2]).double(), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(features[0], features[1], atol=1e-6)
    assert network.mean == pytest.approx([0.4] * 3) and network.std == pytest.approx([0.2] * 3)
    assert network.digest == FeatureNetwork(tmp_path).digest
    with pytest.raises(ValueError, match="needs clips of 4 frames, got 3"):
        network(clips[:, :, :3])


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.4, 0.5]}, [1.0, 0.25, 0.0]),
        ("video_preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.6], "image_std": 0.1}, [2.0, 1.0, 0.0]),
        ("preprocessor_config.json", {"rescale_factor": 2 / 255, "offset": True, "do_normalize": False}, [0.2] * 3),
        (None, {}, [0.2] * 3),
    ],
)
def test_a_network_gets_the_same_values_as_from_its_processor(tmp_path, name, config, expected, monkeypatch, caplog):
    logging.getLogger("diffusers").propagate = True
    MODELS["videomae"]().save_pretrained(tmp_path)
    if name is not None:
        (tmp_path / name).write_text(json.dumps(config))
    network, seen = FeatureNetwork(tmp_path), []
    whole = network.network.forward
    monkeypatch.setattr(network.network, "forward", lambda **options: seen.append(options) or whole(**options))
    network(torch.full((1, 3, 4, 20, 24), 0.2))  # 0.6 of what is white
    pixels = seen[0]["pixel_values"]
    assert pixels.shape == (1, 4, 3, 32, 32)
    torch.testing.assert_close(pixels, torch.tensor(expected)[None, None, :, None, None].expand_as(pixels))
    assert ("no processor config" in caplog.text) == (name is None)


def test_torchscript_must_be_trusted(tmp_path):
    class I3D(torch.nn.Module):
        def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
            assert rescale and resize and return_features
            return x.mean(dim=[2, 3, 4])

    torch.jit.script(I3D()).save(tmp_path / "i3d.pt")
    with pytest.raises(ValueError, match="is a program: confirm that you trust it"):
        ScriptedFeatures(tmp_path / "i3d.pt")
    network = ScriptedFeatures(tmp_path / "i3d.pt", trusted=True)
    clip = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 4, 4)
    assert network(clip).tolist() == [[0.0, 127.5, 255.0]] and len(network.digest) == 64


PROTOCOL = Protocol(
    num_clips=50, num_frames=4, stride=1, height=64, width=64, known_frames_counted=False, resize="none",
    values="as they are", feature_network="a",
)  # fmt: skip


def test_distances_of_different_protocols_cannot_be_compared():
    real = whitened(50, 3)
    one = distances(real, whitened(50, 3, 1), PROTOCOL, num_resamples=20)["FVD"]
    other = distances(real, whitened(50, 3, 2) + 1, PROTOCOL, num_resamples=20)["FVD"]
    value, low, high = other.minus(one)
    assert value == pytest.approx(other.value - one.value) and 0 < low < value < high  # a mean that is off by 1
    value, low, high = one.minus(one)
    assert low < value == 0 < high
    assert "num_frames 4" in str(one) and "known_frames_counted False" in str(one)
    changed = Protocol(**{**vars(PROTOCOL), "stride": 2, "feature_network": "b"})
    far = distances(real, whitened(50, 3, 2), changed, num_resamples=20)
    with pytest.raises(ValueError, match="stride 1 and 2, feature_network a and b"):
        one.minus(far["FVD"])
    with pytest.raises(ValueError, match="FVD and KVD"):
        one.minus(far["KVD"])


def test_intervals_contain_the_value_and_shrink_with_more_clips():
    real = gaussian(2000, [0.0, 0.0], [1.0, 1.0])
    widths = []
    for count in (50, 800):
        generated, protocol = gaussian(count, [1.0, 0.0], [1.0, 1.0], seed=1), replace(PROTOCOL, num_clips=count)
        results = distances(real, generated, protocol, num_resamples=100)
        widths.append(results["FVD"].high - results["FVD"].low)
    assert widths[1] < 0.5 * widths[0]
    assert distances(real, generated, protocol, num_resamples=100) == results


def test_most_intervals_contain_the_mean_measurement():
    real = gaussian(400, [0.0, 0.0], [1.0, 1.0])
    results = [
        distances(real, gaussian(50, [1.0, 0.0], [1.0, 1.0], seed), PROTOCOL, num_resamples=30)["FVD"]
        for seed in range(1, 41)
    ]
    usual = sum(one.value for one in results) / len(results)
    assert 33 <= sum(one.low <= usual <= one.high for one in results) < 40  # 38 would be 95%


def test_too_few_clips_warn_with_the_rank(caplog):
    logging.getLogger("diffusers").propagate = True
    few, many = whitened(10, 4)[:4], whitened(10, 4)
    warning = "4 clips are few for features of 4 dimensions: their covariance has rank 3"
    for real, generated in ((many, few), (few, many)):
        caplog.clear()
        distances(real, generated, replace(PROTOCOL, num_clips=len(generated)), num_resamples=2)
        assert warning in caplog.text
    with pytest.raises(ValueError, match="expected num_clips=50 generated clips, got 10"):
        distances(many, many, PROTOCOL)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_mismatched_features_raise(distance):
    with pytest.raises(ValueError, match="equal d"):
        distance(torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="at least 2"):
        distance(torch.zeros(4, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="generated clips are not finite"):
        distance(torch.zeros(4, 2), torch.full((4, 2), float("nan")))

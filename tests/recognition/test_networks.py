"""The networks against published sizes, other implementations, and their own definitions."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vgen.recognition import NETWORKS, create_recognizer
from vgen.recognition.convolution import InceptionNetwork, NonLocalBlock
from vgen.recognition.pretrained import TRANSFORMERS

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES = {
    "slow_fusion": {"channels": [8, 8, 8]},
    "c3d": {"widths": [8] * 5, "dim": 16},
    "i3d": {"width": 0.1},
    "s3d": {"width": 0.1},
    "s3d_channels": {"width": 0.1},
    "r2plus1d": {"widths": [8] * 4, "blocks": [1] * 4},
    "convlstm": {"channels": [8, 16]},
    "divided_attention": {"dim": 16, "depth": 2, "heads": 2},
    "joint_attention": {"dim": 16, "depth": 2, "heads": 2},
    "factorized_attention": {"dim": 16, "depth": 1, "temporal_depth": 1, "heads": 2},
    "swin3d": {"dim": 12, "depths": [2, 2], "heads": [2, 2], "window": [4, 3, 3]},
    "slowfast": {"width": 16, "blocks": [1] * 4},
    "timesformer": {"config": TINY | {"patch_size": 8}},
    "vivit": {"config": TINY | {"tubelet_size": [2, 8, 8]}},
    "videomae": {"config": TINY | {"patch_size": 8}},
    "vjepa2": {"config": TINY | {"patch_size": 8, "pred_hidden_size": 16, "pred_num_attention_heads": 2,
                                 "pred_num_hidden_layers": 1, "num_pooler_layers": 1}},
}  # fmt: skip
NAMES = [name for name in NETWORKS if name != "torchvision"]
ORDERLESS = ("single_frame", "pooled", "tsn")  # they cannot tell a clip from its reverse


def make(name, num_classes=3, num_frames=16, image_size=32, **sizes):
    torch.manual_seed(0)
    return create_recognizer(name, num_classes, num_frames, image_size, **SIZES.get(name, {}) | sizes)


def random_clip(batch_size=2, num_frames=16, size=32, seed=0):
    return torch.rand(batch_size, 3, num_frames, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def fill(network):
    """Weights that do not depend on random numbers."""
    for index, (name, weight) in enumerate(sorted(network.state_dict().items())):
        if weight.is_floating_point():
            wave = (torch.arange(weight.numel(), dtype=torch.float64) * 12.9898 + index).sin().float().view_as(weight)
            if name.endswith("running_var"):
                wave = 1 + wave / 2
            elif weight.ndim > 1:
                wave = wave * math.sqrt(2 / weight[0].numel())
            else:
                wave = wave / 10 + float(name.endswith("weight"))
            weight.copy_(wave)


def wave_clip(num_frames, size):
    return (torch.arange(3 * num_frames * size**2, dtype=torch.float64) ** 1.5 / 100).sin().float().view(
        1, 3, num_frames, size, size
    )  # fmt: skip


# Logits of torchvision 0.29 (R(2+1)D, S3D, Swin) and pytorchvideo 0.1.5 (SlowFast) with the weights of `fill`.
REFERENCES = {
    "r2plus1d": ({"blocks": [1] * 4, "widths": [64, 128, 256, 512]}, 8, 32, [-6.30339, 6.26757, -6.07045, 6.15565]),
    "s3d": ({"width": 1.0}, 14, 224, [-4.36373, -4.20201, -4.03613, -3.8724]),
    "swin3d": (SIZES["swin3d"], 16, 56, [1.61382, -0.55743, -0.65293, 1.77145]),
    "slowfast": (SIZES["slowfast"], 16, 64, [-6.88888, -7.10248, 1.15471, 8.10001]),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_networks_have_the_outputs_of_other_implementations(name):
    sizes, num_frames, image_size, expected = REFERENCES[name]
    model = make(name, 4, num_frames, image_size, **sizes).eval()
    fill(model.network)
    with torch.no_grad():
        logits = model(wave_clip(num_frames, image_size)).logits[0]
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "num_classes", "num_frames", "image_size", "millions"),
    [
        ("c3d", 101, 16, 112, 78.41),
        ("i3d", 400, 64, 224, 25 / 2),  # the paper has those of both streams, rounded
        ("s3d", 400, 64, 224, 8.320),  # torchvision's; the paper has 8.77
        ("r2plus1d", 400, 16, 112, 31.505),  # torchvision's
        ("slowfast", 400, 32, 224, 34.48),
        ("swin3d", 400, 32, 224, 28.158),
        ("timesformer", 400, 8, 224, 121.4),
    ],
)
def test_networks_have_the_published_numbers_of_parameters(name, num_classes, num_frames, image_size, millions):
    with torch.device("meta"):
        model = create_recognizer(name, num_classes, num_frames, image_size)
    count = sum(weight.numel() for weight in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.02 if name == "i3d" else 0.01)


def test_the_stages_of_c3d_have_the_shapes_of_the_paper():
    with torch.device("meta"):
        network = create_recognizer("c3d", 101, 16, 112).network.eval()
        x, shapes = torch.zeros(1, 3, 16, 112, 112), []
        for stage in network.stages:
            x = stage(x)
            shapes.append(tuple(x.shape[1:]))
    expected = [(64, 16, 56, 56), (128, 8, 28, 28), (256, 4, 14, 14), (512, 2, 7, 7), (512, 1, 4, 4)]
    assert shapes == expected
    assert network.fc6.in_features == 8192 and network.fc6.out_features == network.fc7.out_features == 4096


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TRANSFORMERS])
def test_only_networks_that_model_time_distinguish_a_clip_from_its_reverse(name):
    num_frames = 15 if name == "tsn" else 17  # whose segments have a middle frame
    model, clip = make(name, num_frames=num_frames).eval(), random_clip(num_frames=num_frames)
    fill(model.network)  # weights of the default initialization let signals vanish
    with torch.no_grad():
        forward, backward = (model.double()(one.double()).logits for one in (clip, clip.flip(2)))
    assert torch.allclose(forward, backward, rtol=0, atol=1e-9) == (name in ORDERLESS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "tsn"])  # which sees random frames in training
def test_networks_that_model_time_learn_to_tell_clips_from_their_reverses(name):
    clip = torch.full((4, 3, 17, 32, 32), -1.0)
    for index in range(4):  # a square that moves right
        for frame in range(17):
            clip[index, :, frame, 6 * index : 6 * index + 8, frame : frame + 8] = 1.0
    clips, labels = torch.cat([clip, clip.flip(2)]), torch.arange(2).repeat_interleave(4)
    model = make(name, 2, num_frames=17).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    least, steps = math.inf, 30 if name in ORDERLESS else 400
    while least > 0.4 and steps:
        loss = nn.functional.cross_entropy(model(clips).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        least, steps = min(least, loss.item()), steps - 1
    if name in ORDERLESS:  # scores that are the same for both labels have a cross entropy of at least log 2
        assert least > math.log(2) - 1e-5
    else:
        assert least < 0.4


@pytest.mark.parametrize("kernels", ["full", "space_time", "channels"])
def test_an_inflated_network_on_a_still_clip_equals_the_image_network(kernels):
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "num_frames": 17, "image_size": 32, "width": 0.1, "kernels": kernels}
    flat = InceptionNetwork(length=1, **sizes).eval()
    fill(flat)
    network = InceptionNetwork(time_padding="replicate", **sizes).eval()
    network.inflate(flat.state_dict())
    clip = random_clip(num_frames=1)
    with torch.no_grad():
        expected, got = flat(clip).logits, network(clip.expand(-1, -1, 17, -1, -1)).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "stages"), [("c3d", [1, 3]), ("i3d", [2, 3]), ("r2plus1d", [1, 2])])
def test_non_local_blocks_do_not_change_a_network_at_first(name, stages):
    plain, extended = make(name).eval(), make(name, non_local=stages).eval()
    weights, own = plain.network.state_dict(), extended.network.state_dict()
    names = [key for key in own if not any(f"stages.{stage}.1.to_" in key for stage in stages)]
    for key, old in zip(names, weights, strict=True):
        own[key].copy_(weights[old])
    clip = random_clip()
    with torch.no_grad():
        assert torch.equal(plain(clip).logits, extended(clip).logits)
        for module in extended.modules():
            if isinstance(module, NonLocalBlock):
                nn.init.normal_(module.to_out.weight)
        assert not torch.equal(plain(clip).logits, extended(clip).logits)


def test_a_non_local_block_is_the_softmax_of_embedded_products():
    torch.manual_seed(0)
    block, x = NonLocalBlock(4), torch.randn(1, 4, 2, 3, 2)
    nn.init.normal_(block.to_out.weight)
    with torch.no_grad():
        theta, phi, g = (layer(x).flatten(2)[0] for layer in (block.to_query, block.to_key, block.to_value))
        mixed = g @ (theta.T @ phi).softmax(-1).T
        torch.testing.assert_close(block(x), x + block.to_out(mixed.view(1, 2, 2, 3, 2)))


def test_the_spatial_attention_of_a_frame_is_a_distribution_over_positions():
    output = make("st_lstm")(random_clip())
    assert output.attention.shape == (2, 16, 8, 8)
    torch.testing.assert_close(output.attention.sum((-2, -1)), torch.ones(2, 16))


@pytest.mark.parametrize("name", ["divided_attention", "joint_attention", "factorized_attention"])
def test_the_attention_of_a_clip_is_a_distribution_over_its_real_patches(name):
    mask = torch.arange(16) < torch.tensor([[16], [9]])
    attention = make(name)(random_clip(), mask=mask).attention
    assert attention.shape == ((2, 16, 1, 1) if name == "factorized_attention" else (2, 16, 4, 4))
    torch.testing.assert_close(attention.sum((1, 2, 3)), torch.ones(2))
    assert (attention[1, 9:] == 0).all() and (attention[1, :9] > 0).all()


def test_the_receptive_field_of_slow_fusion_grows_from_layer_to_layer():
    network = make("slow_fusion", num_frames=10).network
    clip = random_clip(1, 10).requires_grad_()
    fields, x = [], clip
    for conv, _, _ in network.layers:  # norms would mix all frames
        x = conv(x)
        (gradient,) = torch.autograd.grad(x[:, :, 0].sum(), clip, retain_graph=True)
        fields.append(int((gradient.abs().sum((0, 1, 3, 4)) > 0).sum()))
    assert fields == [4, 6, 10]


def test_a_divided_block_attends_over_time_and_then_over_space():
    """A patch in another frame and at another place reaches a token only by way of both."""
    network = make("divided_attention", dim=16, depth=1).network.eval()
    tokens = torch.randn(1, 3, 4, 16).requires_grad_()
    block = network.blocks[0]
    assert block.kinds == ("time", "space")
    over_time = block.attend[0](tokens[0].transpose(0, 1)).transpose(0, 1)
    (gradient,) = torch.autograd.grad(over_time[0, 0].sum(), tokens)
    reached = gradient[0].abs().sum(-1) > 0
    assert reached[:, 0].all() and not reached[:, 1:].any()
    (gradient,) = torch.autograd.grad(block(tokens, None)[0, 0, 0].sum(), tokens)
    assert (gradient[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_probabilities_of_two_streams_are_a_weighted_mean(alpha):
    model, clip = make("two_stream", alpha=alpha).eval(), random_clip()
    network = model.network
    with torch.no_grad():
        spatial = network.heads[0](network.of_frame(clip[:, :, 8])).softmax(-1)
        temporal = network.heads[1](network.of_flow(network.stacked_flow(clip))).softmax(-1)
        got = model.probabilities(model(clip).logits)
    torch.testing.assert_close(got, alpha * spatial + (1 - alpha) * temporal)


def test_the_stacked_flow_is_that_of_a_moving_pattern():
    pattern = torch.nn.functional.interpolate(random_clip(1, 1, 16)[:, :, 0], 64, mode="bicubic").clamp(-1, 1)
    clip = torch.stack([pattern.roll(2 * frame, -1) for frame in range(11)], dim=2)
    network = make("two_stream", num_frames=11, image_size=64).network
    flow = network.stacked_flow(clip).unflatten(1, (10, 2))[..., 16:-16, 16:-16]
    assert flow[:, :, 0].median().item() == pytest.approx(2 * 10 / 64, rel=0.1)
    assert abs(flow[:, :, 1].median().item()) < 0.02


def test_segments_give_one_frame_each_random_only_in_training():
    model, clip = make("tsn", num_segments=4), torch.zeros(1, 3, 17, 32, 32)
    seen = []
    model.network.cnn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 0, 0, 0].tolist()))
    clip += torch.arange(17)[:, None, None] / 17
    for training in (False, False, True, True, True):
        model.train(training)
        model(clip)
    frames = [[round(17 * one) for one in row] for row in seen]
    assert frames[0] == frames[1] == [1, 5, 9, 14]
    assert len({tuple(row) for row in frames[2:]}) > 1
    for row in frames:
        assert [begin <= one < end for one, begin, end in zip(row, (0, 4, 8, 12), (4, 8, 12, 17), strict=True)]


def test_the_slow_path_sees_every_eighth_frame_and_the_fast_path_all():
    model, clip = make("slowfast").eval(), random_clip()
    seen = []
    for stem in model.network.stems:
        stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(clip)
    assert torch.equal(seen[0], clip[:, :, [0, 8]]) and torch.equal(seen[1], clip)


def test_frame_differences_of_a_still_clip_are_zero():
    model = make("frame_difference").eval()
    seen = []
    model.network.cnn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(random_clip(1, 1).expand(-1, -1, 4, -1, -1))
    assert (seen[0][:, 3:] == 0).all() and (seen[0][:, :3] != 0).any()


class LinearHead(nn.Module):
    """A video model whose head comes after the mean, as most of torchvision's."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv3d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, clip):
        return self.fc(self.stem(clip).mean((2, 3, 4)))


class ConvolutionalHead(nn.Module):
    """A video model whose head comes before the mean, as that of torchvision's S3D."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv3d(3, 4, 3, padding=1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Conv3d(4, num_classes, 1))

    def forward(self, clip):
        return self.classifier(self.stem(clip)).mean((2, 3, 4))


@pytest.mark.parametrize("kind", [LinearHead, ConvolutionalHead])
def test_a_model_of_torchvision_gives_its_logits_and_the_features_before_them(monkeypatch, kind):
    made = []

    def get_model(name, weights, num_classes):
        made.append((name, weights))
        torch.manual_seed(0)
        return kind(num_classes)

    models = SimpleNamespace(get_model=get_model, list_models=lambda module: ["r3d_18", "s3d"], video=None)
    for module in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, module, models)
    network = create_recognizer("torchvision", 5, 8, 16, model="s3d", weights="DEFAULT").eval()
    assert made == [("s3d", "DEFAULT")]
    torch.manual_seed(0)
    expected, clip = kind(5).eval(), random_clip(num_frames=8, size=16)
    mean, std = torch.tensor([0.43216, 0.394666, 0.37645]), torch.tensor([0.22803, 0.22145, 0.216989])
    normalized = ((clip + 1) / 2 - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1)
    with torch.no_grad():
        found = network(clip)
        torch.testing.assert_close(found.logits, expected(normalized), atol=1e-5, rtol=1e-5)
        features = expected.stem(normalized).mean((2, 3, 4))
        torch.testing.assert_close(found.features, features, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="torchvision has no video model 'r4d'; it has r3d_18, s3d"):
        create_recognizer("torchvision", 5, 8, 16, model="r4d")
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="torchvision models need a torchvision that matches"):
        create_recognizer("torchvision", 5, 8, 16)

import pytest
import torch
from torch.nn import functional as F

from tests.recognition.test_networks import make, random_clip
from vgen.recognition.features import RecognizerFeatures
from vgen.recognition.recognizer import is_recognizer


@pytest.mark.parametrize(("name", "num_frames"), [("cnn_gru", None), ("c3d", 16)])
def test_features_are_what_the_recognizer_classifies_of_resized_frames(name, num_frames, tmp_path):
    model = make(name).eval()
    model.save_pretrained(tmp_path)
    features, clip = RecognizerFeatures(str(tmp_path)), random_clip(1)
    assert features.num_frames == num_frames
    with torch.no_grad():
        torch.testing.assert_close(features(clip), model(clip).features)
        large = random_clip(1, size=48)
        frames = F.interpolate(large[0].transpose(0, 1), size=(32, 32), mode="bilinear", antialias=True)
        torch.testing.assert_close(features(large), model(frames.transpose(0, 1)[None]).features)


def test_the_digest_is_that_of_the_weights(tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        make("pooled").save_pretrained(tmp_path / str(seed))
    assert RecognizerFeatures(str(tmp_path / "0")).digest == RecognizerFeatures(str(tmp_path / "1")).digest
    make("pooled", dim=8).save_pretrained(tmp_path / "2")
    assert RecognizerFeatures(str(tmp_path / "0")).digest != RecognizerFeatures(str(tmp_path / "2")).digest
    assert is_recognizer(str(tmp_path / "0")) and not is_recognizer("vgen/shapes-64")

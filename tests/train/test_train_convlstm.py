"""Training of the ConvLSTM."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vgen.models.convlstm import ConvLSTMPredictor

from .scripts import TINY, launch, train_vdm


@pytest.mark.slow
def test_a_convlstm_trains_and_a_model_is_evaluated_by_two_processes(runs, tmp_path):
    settings = {
        "--output_dir": tmp_path / "run", "--model": '{"channels": [4]}', "--height": 16, "--width": 16,
        "--num_frames": 5, "--given": 1, "--batch_size": 4, "--max_steps": 4, "--sample_every": 4,
        "--num_score_clips": 4,
    }  # fmt: skip
    launch("train/train_convlstm.py", **settings | TINY)
    assert EventAccumulator(str(tmp_path / "run/logs")).Reload().Scalars("psnr")[-1].value > 0
    train_vdm(runs, tmp_path / "vdm")
    settings = {
        "--model": tmp_path / "vdm/pipeline", "--output_dir": tmp_path / "out", "--tasks": '["reconstruction"]',
        "--num_clips": 3, "--batch_size": 1, "--given": 1, "--factor": 2,
    }  # fmt: skip
    launch("pipelines/evaluate.py", processes=2, **settings)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["numbers"] == [0, 1, 2] and results["missing"] == 0
    given = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    network = ConvLSTMPredictor.from_pretrained(tmp_path / "run/convlstm")  # from half precision
    assert network.dtype == torch.float32 and network.predict(given, 2).shape == (1, 3, 2, 16, 16)

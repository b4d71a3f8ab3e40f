"""The denoising loss on fixed samples, which makes evaluations during training comparable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from vgen.training.feed import to_device
from vgen.training.objective import Objective, denoising_loss
from vgen.training.sample import DenoiserBatches, DenoiserSpec, Source, conditioning

_BATCH_SIZE = 8


class FixedSamples:
    """Samples of encoded clips, drawn as for training but the same at every call: clips, windows, noise and captions.

    Args:
        source: The clips; if there are fewer than samples, they are used again, with other noise.
        num_samples: Number of samples.
        spec: Properties of the denoiser.
        tokenizer: Tokenizer of the text encoder; see `make_batch`.
    """

    def __init__(self, source: Source, num_samples: int, spec: DenoiserSpec, tokenizer: Any | None):
        config = replace(source.config, batch_size=_BATCH_SIZE, seed=source.config.seed + 1)  # not training's noise
        self.batches = DenoiserBatches(config, [Source(source.data, config)], [1.0], spec, tokenizer)
        self.num_samples = num_samples

    @torch.no_grad()
    def loss(self, model: nn.Module, objective: Objective, accelerator: Accelerator) -> float:
        """The mean denoising loss of a `PromptedDenoiser`. The processes divide the batches among them."""
        found: list[tuple[int, Tensor]] = []
        firsts = range(0, self.num_samples, _BATCH_SIZE)
        for first in firsts[accelerator.process_index :: accelerator.num_processes]:
            part = slice(0, min(_BATCH_SIZE, self.num_samples - first))
            batch = to_device(self.batches[first // _BATCH_SIZE, part], accelerator.device)
            sample = objective(batch["latents"], batch["noise"], batch["levels"])
            with accelerator.autocast():
                prediction = model(sample.latents, sample.timestep, **conditioning(batch))
            counted = sample.weight * (batch["generated"] & batch["real"])
            found.append((first, denoising_loss(prediction, sample.target, counted).cpu()))
        losses = dict(gather_object(found))
        return torch.cat([losses[first] for first in firsts]).mean().item()

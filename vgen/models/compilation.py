"""Compilation of networks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils import logging

from vgen.processes import rank_and_world_size

logger = logging.get_logger(__name__)


def compile_blocks(network: Any) -> None:
    """Compiles the repeated blocks of a diffusers model, separately for each input shape, and says so."""
    if rank_and_world_size()[0] == 0:
        logger.warning(
            f"{type(network).__name__} is compiled in its first steps, which takes one or two minutes for each input "
            "shape"
        )
    torch._dynamo.config.recompile_limit = 64
    network.compile_repeated_blocks(dynamic=False)


class RecordsCompilation:
    """Records whether a network was compiled with CUDA graphs. A mixin that must precede diffusers' `ModelMixin`."""

    uses_cuda_graphs = False
    """Whether `compile` or `compile_repeated_blocks` was called with a mode that records CUDA graphs."""

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the forward pass, with the arguments of `torch.compile`."""
        self._record(kwargs)
        super().compile(*args, **kwargs)  # type: ignore[misc]

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the repeated blocks, with the arguments of `torch.compile`."""
        self._record(kwargs)
        super().compile_repeated_blocks(*args, **kwargs)  # type: ignore[misc]

    def _record(self, kwargs: dict[str, Any]) -> None:
        options = kwargs.get("options") or {}
        self.uses_cuda_graphs = kwargs.get("mode") in ("reduce-overhead", "max-autotune") or bool(
            options.get("triton.cudagraphs")
        )

"""Compilation of networks."""

from __future__ import annotations

import os
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


def separate_compiled_code() -> None:
    """Stores compiled code separately for each set of instructions, unless the user has chosen PyTorch's cache folder.

    PyTorch finds some of the code in its cache without regard to them: loops for AVX2 in code for AVX512 crash.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    default = default_cache_dir()
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default) == default:  # PyTorch sets the variable itself
        instructions = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "_")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{default}_{instructions}"


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
        separate_compiled_code()
        options = kwargs.get("options") or {}
        self.uses_cuda_graphs = kwargs.get("mode") in ("reduce-overhead", "max-autotune") or bool(
            options.get("triton.cudagraphs")
        )

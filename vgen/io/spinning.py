"""How the threads of PyTorch wait for each other in the programs of this package."""

from __future__ import annotations

import os

_OF_USER = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


def stop_spinning() -> None:
    """Makes idle threads of OpenMP sleep, in this process and those it starts; to be called before torch is imported.

    By default, they spin between two operations. If another program uses the same cores, spinning threads keep the one
    waiting that they wait for. Settings in the environment take precedence.
    """
    if not _OF_USER & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

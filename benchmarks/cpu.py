"""All comparisons with diffusers on a CPU and the memory of streams, in one table.

    python benchmarks/cpu.py --output docs/results/cpu.json

It runs the other benchmarks with few pairs. It took 8.4 minutes on the machine of docs/results.md. bfloat16 is
measured where matrix products are at least as fast in it as in float32; elsewhere they are emulated, and their time
hides everything else.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from pairs import machine
from scripts import launch

COMPARISONS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("benchmarks/transformer.py", {"num-pairs": 4}),
    "vae": ("benchmarks/vae.py", {"num-pairs": 2, "frames": 33}),
    "unet": ("benchmarks/unet_step.py", {"num-pairs": 4, "libraries": "diffusers"}),
    "frame groups": ("benchmarks/frame_groups.py", {"num-pairs": 2}),
}
"""Scripts that compare two implementations, with their settings."""


def main() -> None:
    """Runs the benchmarks and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    begin, results = time.time(), {"machine": machine()}
    speed = results["machine"]["matrix products in TFLOPS"]
    dtypes = ["float32", *(["bfloat16"] if speed["bfloat16"] >= speed["float32"] else [])]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        for name, (script, settings) in COMPARISONS.items():
            launch(script, settings | {"output": output}, "--dtypes", *dtypes)
            results[name] = json.loads(output.read_text())
        launch("benchmarks/streaming_decode.py", {"output": output})
        results["streamed decoding"] = json.loads(output.read_text())
    results["minutes"] = (time.time() - begin) / 60
    print(json.dumps(results["machine"], indent=1))
    print(f"{'ratio to diffusers or to a mask':<56}{'time':>8}{'memory':>8}")
    for name in COMPARISONS:
        for case, row in results[name].items():
            print(f"{f'{name}: {case}':<56}{row['time']:8.2f}{row['memory']:8.2f}")
    short, *_, long = results["streamed decoding"].values()
    print(f"{'streamed decoding: memory of 257 frames relative to 17':<56}{long / short:16.2f}")
    print(f"{results['minutes']:.1f} minutes")
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

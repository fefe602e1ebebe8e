"""What the machine can do at most: the rate of matrix products, and the bandwidth of its memory.

    python -m benchmarks.limits                          # seconds

The product is one of square matrices, written into a matrix that is there already. The bandwidth
is that of STREAM's copy (McCalpin 1995): each byte of a tensor far larger than the caches is read
once and written once, and both are counted; what a processor reads only because it writes there
is not counted. Medians over the repeats.
"""

import sys
from statistics import median

import torch

from benchmarks.table import keep, versions
from benchmarks.timing import PRODUCTS, hardware, product, product_flop, seconds
from lab.core import constants, runtime

REPEATS: int = 10  # the median over so many is reported, after one that is not
COPY_MB: int | None = None  # of the tensor that is copied; none: 512 on a CPU, 4096 on a GPU
OUT: str = "benchmarks/local/limits-{device}.md"  # where the table goes; empty: nowhere


def rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the matrix product."""
    work = product(device, dtype)
    work()
    return product_flop(device) / median(seconds(work, device) for _ in range(REPEATS))


def bandwidth(device: str, megabytes: int) -> float:
    """Bytes per second, read and written, of copying a tensor to another."""
    source = torch.ones(megabytes * 10**6 // 4, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)  # pages of new memory are made at the first touch
    spent = median(seconds(lambda: target.copy_(source), device) for _ in range(REPEATS))
    return 2 * source.nbytes / spent


def main() -> None:
    constants.override(sys.modules[__name__])
    device = runtime.process_state().device.type
    n, _ = PRODUCTS.get(device, PRODUCTS["cpu"])
    dtypes = {"fp32": torch.float32}
    if runtime.has_bf16(torch.device(device)):  # emulated products would take minutes
        dtypes["bf16"] = torch.bfloat16
    found = [
        f"Product of {n} x {n} matrices, {name}: {rate(device, dtype) / 1e12:,.3g} TFLOP/s"
        for name, dtype in dtypes.items()
    ]
    megabytes = COPY_MB or (4096 if device == "cuda" else 512)
    copied = bandwidth(device, megabytes) / 1e9
    found.append(f"Memory, a copy of {megabytes} MB, read and written: {copied:,.1f} GB/s")
    lines = [f"{hardware(device)}. {versions([])}. Medians of {REPEATS}.", ""]
    lines += [f"- {sentence}" for sentence in found]
    keep("limits", lines, OUT.format(device=device), rows=[], notes=[], limits=found)


if __name__ == "__main__":
    main()

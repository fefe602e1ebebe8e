"""The limits of this machine: the rate of matrix products, and the bandwidth of its memory.

    python -m benchmarks.limits                          # seconds

Matrix products are square and written into an existing matrix. Bandwidth is measured like STREAM's
copy (McCalpin 1995): a tensor far larger than the caches is copied, and each byte counts twice
because it is read and written. Values are medians over the repeats.
"""

import sys
from statistics import median

import torch

from benchmarks import table
from benchmarks.timing import PRODUCT_SIZES, matrix_product, seconds
from lab.core import constants, machine, runtime

REPEATS: int = 10  # measurements, after one that does not count
COPY_MB: int | None = None  # size of the tensor that is copied; None: 512 on a CPU, 4096 on a GPU
PRODUCT_SIDE: int | None = None  # of the matrices; None: 2048 on a CPU, 8192 on a GPU
OUT: str = "benchmarks/local/limits-{device}.md"  # where the table goes; empty: nowhere


def main() -> None:
    constants.override(sys.modules[__name__])
    device = runtime.process_state().device
    n = PRODUCT_SIDE or PRODUCT_SIZES.get(device.type, PRODUCT_SIZES["cpu"])[0]
    dtypes = {"fp32": torch.float32}
    if machine.has_bf16(device):  # emulated products would take minutes
        dtypes["bf16"] = torch.bfloat16
    notes = []
    for name, dtype in dtypes.items():
        workload, flop = matrix_product(device.type, dtype, n)
        workload()
        rate = flop / median(seconds(workload, device.type) for _ in range(REPEATS)) / 1e12
        notes.append(f"Products of {n} x {n} matrices in {name}: {rate:,.3g} TFLOP/s.")
    megabytes = COPY_MB or (4096 if device.type == "cuda" else 512)
    source = torch.ones(megabytes * 10**6 // 4, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)  # the first write allocates the pages
    spent = median(seconds(lambda: target.copy_(source), device.type) for _ in range(REPEATS))
    bandwidth = 2 * source.nbytes / spent / 1e9
    notes.append(f"Copying {megabytes} MB, counting reads and writes: {bandwidth:,.1f} GB/s.")
    table.save(OUT, f"Limits of this machine, medians of {REPEATS} repeats.", notes=notes)


if __name__ == "__main__":
    runtime.run_script(main)

"""Everything that needs a GPU, in one command: `make gpu`, or `python -m benchmarks.gpu`.

    python -m benchmarks.gpu --estimate       # only print how long each part will take
    python -m benchmarks.gpu                  # estimated: an hour on an H100, at most six on a T4
    python -m benchmarks.gpu --quick          # toy sizes on a CPU, to check that all parts run

The parts run in order, each in its own process. The same command resumes: a finished part is
repeated only if its code or the card has changed, and then it keeps finished training runs of the
same code; a stopped training run continues. If a dataset or weights cannot be downloaded, a part
uses the embedded ones, and its records say so. On cards below
SMALL_CARD TFLOP/s or SMALL_MEMORY GB, some parts run a documented subset (`small`). Records go to
results/official/ and benchmarks/results/; afterwards, `python report.py --official` updates the
tables. No part has been run on a GPU yet.
"""

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import matrix_product, seconds
from lab.core import UserError, checkpoints, child, constants, machine, runtime
from lab.data import load_data
from lab.models import load_pretrained

PARTS: str | None = None  # names of parts, separated by commas; None: all
ESTIMATE: bool = False  # print the estimate and stop
QUICK: bool = False  # toy sizes, bundled data and weights, any device
DATA_DIR: str = "data"  # folder for downloads
RESULTS: str | None = None  # folder for runs; None: results/official, or with QUICK a local one
BENCHMARKS: str | None = None  # folder for speed; None: benchmarks/results, or with QUICK local

ROOT = Path(__file__).resolve().parents[1]
SMALL_CARD = 100.0  # TFLOP/s of matrix products: a T4 reaches about 25, an A100 250, an H100 650
SMALL_MEMORY = 40  # GB: three libraries hold a ViT-B/16 at a batch size of 128 at the same time
UTILIZATION = 0.3  # assumed fraction of the matrix-product rate that training reaches
SECONDS_PER_STEP = 4e-3  # assumed time in which Python launches the kernels of a step
TOY_VIT = "--embed-dim 32 --depth 1 --num-heads 2 --batch-size 64 --epochs 1 --precision fp32"


@dataclass(frozen=True)
class Part:
    """One command, and what its duration depends on."""

    command: str  # behind the interpreter; names in braces are filled in
    quick: str  # flags for toy sizes
    minutes: float = 0.0  # that do not depend on the card
    pflop: float = 0.0  # operations of all training steps, in 10^15
    steps: int = 0  # optimizer steps
    small: str = ""  # flags for a smaller card
    small_fraction: float = 1.0  # of the operations and steps that remain with them


ALL = {
    "tests": Part(  # every test file whose code runs on a GPU if there is one
        "-m pytest -q tests/training tests/finetuning tests/attention tests/sweep tests/data "
        "tests/test_model.py tests/test_model_tools.py tests/test_predict.py",
        "-k test_auto_selects", minutes=5,
    ),
    "speed": Part(
        "-m benchmarks.model_speed --rounds 1 --out {benchmarks}/model_speed-{device}.md",
        "--repeats 1 --steps 1 --embed-dim 64 --depth 1 --batch-size 4 --libraries ours,timm "
        "--workloads 'training, fp32'", minutes=5,
    ),
    "utilization": Part(  # of full fine-tuning of ViT-B/16, data included
        "-m benchmarks.model_speed --rounds 1 --workloads 'training with data, auto' "
        "--img-size 224 --patch-size 16 --embed-dim 768 --depth 12 --steps 40 "
        "--out {benchmarks}/utilization-{device}.md",
        "--repeats 1 --steps 1 --img-size 32 --embed-dim 64 --depth 1 --batch-size 2 --workers 0 "
        "--libraries ours,timm", minutes=3, small="--batch-size 32 --steps 10",
    ),
    "race": Part(  # 90, 93 and 95 %; two more seeds take 19 minutes more
        "-m benchmarks.speedrun --num-seeds 1 --dataset {race} "
        "--data-dir {data} --out {benchmarks}/speedrun-{device}",
        "--seconds 1 --embed-dim 24 --depth 1 --num-heads 2 --batch-size 10 --checks 1 "
        "--precision fp32 --no-compile", minutes=11,
    ),
    "cifar10": Part(
        "train.py --dataset {cifar10} --data-dir {data} --results-dir {results}/train", TOY_VIT,
        minutes=2, pflop=21, steps=105_000,
    ),
    "pets": Part(
        "train.py --dataset {pets} --data-dir {data} --results-dir {results}/train",
        TOY_VIT, minutes=3, pflop=5, steps=5_200,
    ),
    "vit-b-cifar10": Part(
        "finetune.py --mode all --dataset {cifar10} --data-dir {data} --pretrained {vit_b} "
        "--epochs 3 --batch-size 128 --results-dir {results}/finetune",
        "--dataset digits --epochs 1 --train-fraction 0.1 --precision fp32",
        minutes=3, pflop=92, steps=9_500,
        small="--epochs 1 --accumulation-steps 4", small_fraction=1 / 3,
    ),
    "vit-b-pets": Part(
        "finetune.py --mode all --dataset {pets} --data-dir {data} --pretrained {vit_b} "
        "--results-dir {results}/finetune",
        "--epochs 1 --train-fraction 0.1 --precision fp32", minutes=3, pflop=43, steps=8_300,
        small="--accumulation-steps 2",
    ),
    "swin-pets": Part(
        "finetune_swin.py --dataset {pets} --data-dir {data} --model {swin} --drop-path-rate 0.2 "
        "--epochs 30 --learning-rate 2e-5 --results-dir {results}/finetune_swin",
        "--epochs 1 --precision fp32", minutes=2, pflop=12, steps=1_600,
        small="--accumulation-steps 4",
    ),
    "attention": Part(
        "attention_viz.py --model {finetuned} --images {scored} --data-dir {data} "
        "--results-dir {results}/attention_viz", "", minutes=3,
    ),
}  # fmt: skip
INPUTS = {  # names in the commands: what is wanted, and what is embedded instead
    "cifar10": ("cifar10", "mnist-5k"),
    "race": ("cifar10", "mnist-5k --patch-size 7"),  # half of 28 pixels has to be whole patches
    "pets": ("pets", "digits"),
    "vit_b": ("vit_base_patch16_224.augreg_in21k", "weights/vit_128x6_cifar10.safetensors"),
    "swin": (
        "swinv2_base_window12to16_192to256.ms_in22k_ft_in1k",
        "weights/swin_48x222_cifar10.safetensors",
    ),
}


def find_inputs(names: set[str]) -> dict[str, str]:
    """The datasets and weights to use: those wanted, or the embedded ones if they are missing."""
    found = {}
    for name in sorted(names & INPUTS.keys()):
        wanted, embedded = INPUTS[name]
        found[name] = embedded
        if QUICK:
            continue
        try:
            if name in ("cifar10", "race", "pets"):
                load_data(wanted, DATA_DIR)
            else:
                load_pretrained(wanted)
            found[name] = wanted
        except UserError as error:
            print(f"{wanted} is not available, {embedded} is used instead: {error}")
    return found


def estimate(part: Part, tflops: float, is_small: bool) -> float:
    """Minutes that a part takes on a card with this rate of matrix products, in TFLOP/s."""
    fraction = part.small_fraction if part.small and is_small else 1.0
    computing = 1e3 * part.pflop / (UTILIZATION * tflops)
    launching = part.steps * SECONDS_PER_STEP
    return part.minutes + fraction * max(computing, launching) / 60


def matrix_product_rate(device: torch.device) -> float:
    """TFLOP/s of large matrix products in the precision that training uses."""
    if device.type != "cuda":
        dtype = torch.float32
    else:
        dtype = torch.bfloat16 if machine.has_bf16(device) else torch.float16
    workload, flop = matrix_product(device.type, dtype)
    workload()
    return flop / seconds(workload, device.type) / 1e12


def is_small_card(device: torch.device, tflops: float) -> bool:
    """Whether parts run their subset: the card is slow, or has little memory."""
    if tflops < SMALL_CARD:
        return True
    return device.type == "cuda" and torch.cuda.mem_get_info(device)[1] < SMALL_MEMORY * 1e9


def code_of(words: list[str]) -> dict[str, str]:
    """The hashes of the code that a part's command runs: a script, or all files for pytest."""
    script = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
    path = ROOT / script
    files = [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")]
    return runtime.code_hashes(*([path] if path.is_file() else sorted(files)))


def command_of(part: Part, values: dict[str, str], is_small: bool) -> list[str]:
    """A part's command, without the interpreter; the last of two equal flags counts."""
    extra = part.quick if QUICK else part.small if is_small else ""
    return shlex.split(f"{part.command} {extra}".format(**values))


def finetuned_run(results: str, dataset: str) -> str:
    """The newest run that fine-tuned a model on a dataset, all of its layers if there is one.

    If there is no run, the folder that the part will not find and name in its error.
    """
    runs = [path.parent for path in Path(results, "finetune").glob("*/best.safetensors")]
    runs = [run for run in runs if run.name.startswith(dataset)] or runs
    if not runs:
        return f"{results}/finetune/{dataset}"
    full = [run for run in runs if "-full" in run.name] or runs
    return str(max(full, key=lambda run: (run / "best.safetensors").stat().st_mtime))


def main() -> None:
    constants.override(sys.modules[__name__])
    device = runtime.process_state().device
    if device.type != "cuda" and not (QUICK or ESTIMATE):
        raise UserError("these parts need a CUDA GPU; --quick runs all of them at toy size")
    names = PARTS.split(",") if PARTS else list(ALL)
    if unknown := [name for name in names if name not in ALL]:
        raise UserError(f"PARTS: {unknown[0]!r} is none of {', '.join(ALL)}")
    tflops = matrix_product_rate(device)
    print(f"{device.type}: matrix products at {tflops:,.1f} TFLOP/s")
    local = "benchmarks/local/gpu-quick"
    results = RESULTS or (local if QUICK else "results/official")
    benchmarks = BENCHMARKS or (local if QUICK else "benchmarks/results")
    state_file, log_file = Path(results, "gpu.json"), Path(results, "gpu.log")
    state = checkpoints.read_json(state_file) if state_file.exists() else {}
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if state.get("card") != card:  # the decision is kept, because the measured rate varies
        state = {"card": card, "is_small": is_small_card(device, tflops), "finished": {}}
    is_small = state["is_small"]
    if not QUICK:
        minutes = {name: estimate(ALL[name], tflops, is_small) for name in names}
        for name, value in minutes.items():
            subset = f"  subset: {ALL[name].small}" * bool(ALL[name].small and is_small)
            print(f"  {name:<14} {value:6.0f} minutes{subset}")
        print(f"  {'total':<14} {sum(minutes.values()):6.0f} minutes (estimated)")
    if ESTIMATE:
        return

    needed = {key for key in INPUTS for n in names if f"{{{key}}}" in ALL[n].command}
    inputs = find_inputs(needed | ({"pets"} if "attention" in names else set()))
    values = {**inputs, "results": results, "benchmarks": benchmarks, "data": DATA_DIR,
              "device": device.type}  # fmt: skip
    state_file.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(state_file, state)
    failed = []
    for number, name in enumerate(names, 1):
        if name == "attention":
            is_pets = values["pets"] == "pets"
            values["scored"] = "pets --score" if is_pets else "digits"
            values["finetuned"] = finetuned_run(results, "pets" if is_pets else "digits")
        words = command_of(ALL[name], values, is_small)
        print(f"{number}/{len(names)}  {name:<14} python {shlex.join(words)}", flush=True)
        finished = {"command": words, "code": code_of(words)}
        if state["finished"].get(name) == finished:
            print("  already finished")
            continue
        started = time.monotonic()
        with open(log_file, "a", encoding="utf-8") as log:
            log.write(f"\n=== {name}: python {shlex.join(words)}\n")
            log.flush()
            try:
                status = child.run_child(
                    [sys.executable, *words], name, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
                )
            except runtime.Stopped as stopped:
                print(f"  stopped in {name}; the same command resumes")
                raise SystemExit(128 + stopped.number) from None
        minutes_taken = (time.monotonic() - started) / 60
        if status:
            failed.append(name)
            last = [s for s in log_file.read_text(encoding="utf-8").splitlines() if s.strip()][-3:]
            print("\n".join(f"    {line}" for line in last))
        else:
            state["finished"][name] = finished
            checkpoints.write_json(state_file, state)
        print(f"  {'failed' if status else 'done'}, {minutes_taken:.1f} minutes")
    print(f"failed: {', '.join(failed)}; see {log_file}" if failed else str(log_file))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    runtime.run_script(main)

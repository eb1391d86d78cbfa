"""What a GPU would be told to do, without a GPU: PyTorch's CUDA build on a CUDA runtime whose kernels do nothing.

    python scripts/hollow_gpu.py train DATA-BIN --arch ... --max-update 60 [flags of fairseq-train]
    python scripts/hollow_gpu.py run FILE ARGUMENTS

Needs a PyTorch with CUDA, a CUDA toolkit of its major version (its headers: --include), g++ and nm. PyTorch's own
code runs: its allocator (peaks are a real GPU's, but for what kernels and libraries take by themselves), autocast,
autograd, fused optimisers, CUDA graphs (what CUDA forbids while one is recorded fails here too), torch.compile down to
machine code. Numbers that come out mean nothing, and nothing is said about a GPU's speed; the host's is real.

``train`` prints medians of an update, over the last 40% of them: milliseconds of the host, kernels and graphs
launched, matrix products, NCCL's calls, waits for the device, copies; and the most memory that tensors took and that
PyTorch kept. --kernels FILE counts kernels by name. In the environment, HOLLOW_GB (80) is the GPU's memory, HOLLOW_COPY
(67108864) the bytes of the largest copy that is made: few, for a model that does not fit into the host's memory twice.

Several processes are started one by one, each with RANK, WORLD_SIZE, LOCAL_RANK=0, MASTER_ADDR and MASTER_PORT as
torchrun sets them, and one empty directory of all in HOLLOW_MEETING.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COUNTS = (
    "kernels",
    "graphs",
    "products",
    "collectives",
    "cudaMallocs",
    "waits",
    "copies to the GPU",
    "copies to the host",
)
SOURCES = Path(__file__).with_name("hollow_gpu")
LIBRARY = "HOLLOW_LIBRARY"  # in the environment of the process that runs on it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--include", default="/usr/local/cuda/include", help="directory of cuda_runtime_api.h")
    parser.add_argument("--kernels", help="write there how often each kernel was launched")
    parser.add_argument("what", choices=["train", "run"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if LIBRARY in os.environ:
        _run(args)
        return
    with tempfile.TemporaryDirectory(prefix="hollow_gpu-") as directory:
        library = build(Path(directory), args.include)
        found = {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": directory, "TRITON_LIBCUDA_PATH": directory}
        environment = os.environ | found | {LIBRARY: str(library)}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)


def build(directory: Path, include: str) -> Path:
    """Compile the runtime, which is to be preloaded, and the driver libcuda.so.1."""
    import torch

    libraries = Path(torch.__file__).parent / "lib"
    wanted = _symbols(*(libraries / f"lib{name}.so" for name in ("c10_cuda", "torch_cuda", "torch_python")))
    sources = [SOURCES / "runtime.cpp", SOURCES / "collectives.cpp"]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    ours = set(re.findall(r"\b((?:__)?cu\w+|nccl\w+)\([^;{}]*\) \{", text))
    wanted = {name for name in wanted if re.match(r"(__)?cuda|cublas|nccl", name)} - ours
    lines = ["int hollow_product();"]
    for name in sorted(wanted):
        product = re.search(r"gemm|Gemm|LtMatmul$", name)
        lines.append(f"int {name}() {{ return {'hollow_product()' if product else '0'}; }}")
    (directory / "rest.c").write_text("\n".join(lines))
    _compile("gcc", "-c", directory / "rest.c", "-o", directory / "rest.o")
    library = directory / "libhollow.so"
    _compile("g++", "-std=c++17", f"-I{include}", "-shared", *sources, directory / "rest.o", "-o", library)
    driver = (SOURCES / "driver.c").read_text(encoding="utf-8")
    wanted = {*_symbols(libraries / "libcaffe2_nvrtc.so"), "cuInit", "cuFuncSetAttribute", "cuCtxSetLimit"}
    wanted = {name for name in wanted if re.match(r"cu[A-Z]", name) and f" {name}(" not in driver}
    source = directory / "driver.c"
    source.write_text(driver + "".join(f"int {name}() {{ return 0; }}\n" for name in sorted(wanted)))
    _compile("gcc", "-shared", source, "-o", directory / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")
    (directory / "libcuda.so").symlink_to("libcuda.so.1")
    return library


def _symbols(*libraries: Path) -> set[str]:
    """What these libraries need of others."""
    command = ["nm", "-D", "--undefined-only", *map(str, libraries)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return set(re.findall(r" U (\w+)", listing))


def _compile(compiler: str, *arguments: object) -> None:
    subprocess.run([compiler, "-O1", "-fPIC", "-w", *map(str, arguments)], check=True)


def _run(args: argparse.Namespace) -> None:
    library = ctypes.CDLL(os.environ[LIBRARY])
    if args.kernels:
        atexit.register(library.hollow_write_kernels, args.kernels.encode())
    if args.what == "run":
        sys.argv = args.arguments
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    from fairseq.cli.train import main as train
    from fairseq.training.trainer import Trainer

    updates: list[list[float]] = []
    step = Trainer.train_step

    def measured(trainer: Trainer, micro_batches: Any) -> bool:
        before, start = counts(library), time.perf_counter()
        result = step(trainer, micro_batches)
        milliseconds = 1000 * (time.perf_counter() - start)
        updates.append([milliseconds, *(b - a for a, b in zip(before, counts(library), strict=True))])
        return result

    setattr(Trainer, step.__name__, measured)
    atexit.register(_report, updates)
    train(args.arguments)


def counts(library: ctypes.CDLL) -> list[int]:
    """So far, in the order of COUNTS."""
    found = (ctypes.c_long * len(COUNTS))()
    library.hollow_counts(found)
    return list(found)


def _report(updates: list[list[float]]) -> None:
    import numpy as np
    import torch

    if not updates:
        return
    medians = np.median(updates[int(0.6 * len(updates)) :], axis=0)
    found = ", ".join(f"{name} {value:g}" for name, value in zip(COUNTS, medians[1:], strict=True))
    peaks = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
    first = updates[0][0] / 1000
    print(f"{len(updates)} updates, the first {first:.1f} s; an update: host {medians[0]:.2f} ms, {found}")
    print(f"memory: {peaks[0]:.2f} GB in tensors, {peaks[1]:.2f} GB kept")


if __name__ == "__main__":
    main()

"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastnn
from benchmarks import conv2d, cross_entropy, machine, max_pool2d, optim, overhead, relu, report, train
from benchmarks.harness import Row, Settings, measure, tuned_cudnn

SUITES: dict[str, Any] = {
    "conv2d": conv2d,
    "relu": relu,
    "max_pool2d": max_pool2d,
    "cross_entropy": cross_entropy,
    "optim": optim,
    "overhead": overhead,
    "train": train,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
THP = "THP_MEM_ALLOC_ENABLE"  # PyTorch reads it when it starts: a process of its own


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="fastnn beside every native PyTorch configuration, measured in turn in one process. "
        "How, and what the figures mean: docs/benchmarks.md.",
    )
    parser.add_argument("--suite", action="append", choices=SUITES, help="only this one (may be repeated)")
    parser.add_argument("--dtype", action="append", choices=DTYPES,
                        help="default float32, on a GPU bfloat16 too (may be repeated)")  # fmt: skip
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default cpu")
    parser.add_argument("--threads", type=int, help="threads of both sides (default: PyTorch's)")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rows, fewer rounds: two minutes")
    parser.add_argument("--compile", action="store_true", help="torch.compile as a baseline of every row, not only of "
                        "train, conv+relu+pool and, on a GPU, relu and cross_entropy (tens of seconds a row; a GPU's "
                        "are tuned too, minutes)")  # fmt: skip
    parser.add_argument("--winograd", choices=["off", "default", "fast"], default="default",
                        help="fastnn.backends.cpu.winograd, of every row")  # fmt: skip
    parser.add_argument("--thp", action="store_true", help=f"measure everything again under {THP}=1 and show both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write ratios.png and roofline.png into DIR")
    parser.add_argument("--readme", action="store_true", help="rewrite the README's table: the CPU's or the GPU's")
    parser.add_argument("--from", dest="sources", type=Path, metavar="FILE", action="append",
                        help="measure nothing: plots and README from an earlier --json (may be repeated)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads {options.threads}: expected 1 or more")
    for source in options.sources or []:
        if not source.is_file():
            parser.error(f"--from {source}: there is no such file")
    return options


def run_suite(
    name: str, dtypes: Sequence[torch.dtype], settings: Settings, peaks: dict[str, Any]
) -> Iterator[list[Row]]:
    """Measures a suite and gives each layer's rows, printing each row as it is done."""
    suite = SUITES[name]
    work = [(dtype, layer) for dtype in dtypes for layer in suite.layers(settings)]
    with tqdm(work, desc=name, unit="layer", dynamic_ncols=True) as progress:
        for dtype, layer in progress:
            progress.set_postfix_str(layer.name)
            rows: list[Row] = []
            for case in suite.cases(layer, dtype, settings):
                with tuned_cudnn(settings):  # which the case's float64 reference is not worth
                    measured = measure(case, settings)
                for row in measured:
                    progress.write(report.line(row, peaks))
                rows += measured
            yield rows


def under_thp(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Runs the same suites in a process with huge pages switched on and adds its figures to the rows."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "thp.json"
        command = [sys.executable, "-m", "benchmarks", "--json", str(result), "--device", str(options.device)]
        command += [word for suite in options.suite for word in ("--suite", suite)]
        command += [word for dtype in options.dtype for word in ("--dtype", dtype)]
        command += ["--threads", str(torch.get_num_threads())]
        command += ["--winograd", options.winograd]
        command += ["--quick"] * options.quick + ["--compile"] * options.compile
        print(f"\nThe same again under {THP}=1:", flush=True)
        status = subprocess.run(command, env={**os.environ, THP: "1"}, cwd=machine.ROOT, check=False).returncode
        if status not in (0, 1):  # 1: a wrong result, shown where it was measured
            print(f"under {THP}=1 it ended with status {status}: these figures are missing", file=sys.stderr)
            return
        fields = {report.row_from_json(f).key: f for f in json.loads(result.read_text())["rows"]}
    for row in rows:
        if row.key in fields:
            row.thp = {name: fields[row.key][name] for name in ("ratio", "ours", "native", "best_native")}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    failures = {}
    if options.sources:
        run, rows = report.load_all(options.sources)
    else:
        options.suite = options.suite or list(SUITES)
        options.dtype = options.dtype or ["float32"] + ["bfloat16"] * (options.device.type == "cuda")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        fastnn.backends.cpu.winograd = options.winograd
        settings = Settings(options.device, quick=options.quick, compile_all=options.compile)
        dtypes = [DTYPES[name] for name in options.dtype]
        run = machine.facts(options.device)
        stated = ("suite", "dtype", "quick", "compile", "winograd", "thp")
        run["settings"] = {name: getattr(options, name) for name in stated}
        run["peaks"] = machine.peaks(dtypes, options.device)
        print(report.where(run))
        load, cores = run["machine"]["load_before"], run["machine"]["cores"]
        if load is not None and load > 0.5 * cores:
            print(
                f"the machine is busy (load {load:.1f} on {cores} cores): times and peaks will be off", file=sys.stderr
            )
        rows = []
        for name in options.suite:
            try:
                for of_layer in run_suite(name, dtypes, settings, run["peaks"]):
                    rows += of_layer
                    if options.json:  # a run that is cut has what it measured
                        report.save(options.json, run, rows)
            except NotImplementedError as missing:
                failures[name] = str(missing)
        if options.thp:
            under_thp(options, rows)

    for entry in report.summary(rows):
        print(
            f"{entry['suite']:<13} {entry['dtype']:<8} geometric mean {entry['geometric_mean']:.2f}x over "
            f"{entry['rows']} rows, {entry['lowest']:.2f}x to {entry['highest']:.2f}x; {entry['slower']} slower than "
            f"native, {entry['wrong']} wrong"
            + (f"; under THP {entry['thp_geometric_mean']:.2f}x" if entry["thp_geometric_mean"] else "")
        )
    if options.json:
        report.save(options.json, run, rows)
        print(f"wrote {options.json}")
    if options.plot:
        print("wrote", *report.plot(options.plot, run, rows))
    if options.readme:
        report.rewrite_readme(machine.ROOT / "README.md", run, rows)
        print("rewrote README.md")
    for name, reason in failures.items():
        print(f"suite {name} did not run: {reason}", file=sys.stderr)
    return 1 if failures or any(row.ours.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

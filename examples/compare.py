"""Runs image_classification.py three ways, from the same initial weights and in the same batch order.

native: its two fastnn imports replaced by torch's. fastnn: as it is. converted: as it is, with --convert. Each runs in
a process of its own; options this program does not know go to image_classification.py.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

PROGRAM = Path(__file__).with_name("image_classification.py")
VARIANTS = ("native", "fastnn", "converted")

Result = dict[str, Any]


def load_program(native: bool) -> ModuleType:
    """image_classification.py as a module; with ``native``, with `import torch.` in place of `import fastnn.`"""
    source = PROGRAM.read_text()
    if native:
        for name in ("nn", "optim"):
            ours = f"import fastnn.{name} as {name}\n"
            if source.count(ours) != 1:
                raise RuntimeError(f"{PROGRAM} does not say {ours.strip()!r} once")
            source = source.replace(ours, f"import torch.{name} as {name}\n")
    module = ModuleType(PROGRAM.stem)
    module.__file__ = str(PROGRAM)
    sys.modules[module.__name__] = module
    exec(compile(source, PROGRAM, "exec"), module.__dict__)
    return module


def peak_memory() -> int:
    """The most bytes of memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_variant(variant: str, arguments: list[str]) -> Result:
    """Runs the program in this process. Its memory is what the first training step starts with, subtracted."""
    program = load_program(native=variant == "native")
    train = program.train
    before: list[int] = []

    def measured_train(*args: Any) -> Any:
        before.append(peak_memory())
        return train(*args)

    program.train = measured_train  # type: ignore[attr-defined]
    history = program.main([*arguments, "--convert"] if variant == "converted" else arguments)
    return {**vars(history), "peak_memory": peak_memory() - before[0] if before else 0}


def run_in_process(variant: str, arguments: list[str]) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--run-variant", variant, str(result), *arguments]
        status = subprocess.run(command).returncode
        if status != 0:
            sys.exit(status)
        return json.loads(result.read_text())


def table(results: dict[str, Result], batch_size: int) -> str:
    titles = ["", "time a step", "images/s", "peak memory", "final loss", "test accuracy", "speed", "memory"]
    rows = [titles]
    base = results["native"]
    for variant, result in results.items():
        step, base_step = (statistics.median(r["step_times"]) for r in (result, base))
        rows.append(
            [
                variant,
                f"{step * 1e3:.0f} ms",
                f"{batch_size / step:.1f}",
                f"{result['peak_memory'] / 2**20:.0f} MiB",
                f"{result['losses'][-1]:.4f}",
                f"{result['accuracy']:.1%}",
                f"{base_step / step:.2f}x",
                f"{result['peak_memory'] / base['peak_memory']:.2f}x",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines.append(
        "A step is forward, backward and update (median); memory is the peak above what the first step starts with."
    )
    return "\n".join(lines)


def plot(results: dict[str, Result], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, times) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    # The loss curves lie on one another: each is thinner than the one below it.
    looks = {"native": ("#868e96", 5.0, "-"), "fastnn": ("#1c7ed6", 2.2, "-"), "converted": ("#d9480f", 1.6, "--")}
    for variant, result in results.items():
        color, width, style = looks[variant]
        steps = range(1, len(result["losses"]) + 1)
        label = f"{variant}, test accuracy {result['accuracy']:.1%}"
        losses.plot(steps, result["losses"], label=label, color=color, linewidth=width, linestyle=style)
        label = f"{variant}, median {statistics.median(result['step_times']):.2f} s"
        times.plot(steps, result["step_times"], label=label, color=color, marker=".")
    losses.set(title="Training loss", xlabel="step", ylabel="cross-entropy", ylim=(0, None))
    times.set(
        title="Time of a step", xlabel="step (an epoch's last batch is smaller)", ylabel="seconds", ylim=(0, None)
    )
    for axes in (losses, times):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-results"), help="folder for the plot and the numbers")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--run-variant", nargs=2, metavar=("VARIANT", "FILE"), help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    arguments = [f"--batch-size={args.batch_size}", *rest]
    if args.run_variant:
        variant, file = args.run_variant
        Path(file).write_text(json.dumps(run_variant(variant, arguments)))
        return

    results = {}
    for number, variant in enumerate(VARIANTS, start=1):
        print(f"\n[{number}/{len(VARIANTS)}] {variant}", flush=True)
        results[variant] = run_in_process(variant, arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(results))
    file = args.output / "comparison.png"
    plot(results, file)
    print(f"\n{table(results, args.batch_size)}\nLoss curves and step times: {file.resolve()}")


if __name__ == "__main__":
    main()

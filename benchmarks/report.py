"""What is shown of the rows: lines on the terminal, the JSON file, the README's table and the plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, Timing, geometric_mean

BROADEST = ("step", "forward+backward", "backward", "forward")  # the pass that stands for a layer in the README


def is_loss(ratio: float) -> bool:
    """Slower than the best native configuration, as it would be printed."""
    return round(ratio, 2) < 1


def unit(row: Row) -> str:
    return "GFLOP/s" if row.bound == "flops" else "GB/s"


def peak(row: Row, peaks: dict[str, Any]) -> float:
    return peaks["gflops"][row.dtype] if row.bound == "flops" else peaks["copy_gbs"]


def line(row: Row, peaks: dict[str, Any]) -> str:
    """One row for the terminal; native configurations that were left out are named below it."""
    ours, best, ratio = row.ours, row.best, row.ratio
    text = f"{row.suite:<13} {row.layer:<29} {row.pass_name:<16} {row.dtype:<8} {ours.name:<21}"
    if ours.wrong:
        text += f" WRONG: error {ours.error:.1e}"
    else:
        rate = row.rate(ours)
        text += (
            f" {ours.median_ms:9.3f} ms [{ours.q1_ms:.3f}, {ours.q3_ms:.3f}]  {rate:6.1f} {unit(row)}"
            f" {rate / peak(row, peaks):4.0%}  error {ours.error:.1e}"
        )
    if best is not None:
        text += f" | {best.name} {best.median_ms:.3f} ms [{best.q1_ms:.3f}, {best.q3_ms:.3f}] error {best.error:.1e}"
    if ratio is not None:
        text += f" | {ratio:.2f}x" + (" SLOWER" if is_loss(ratio) else "")
    notes = [f"fastnn: {ours.note}"] if ours.note else []
    notes += [f"{t.name} left out: {t.note or f'wrong, error {t.error:.1e}'}" for t in row.native if t.wrong]
    return text + "".join(f"\n{'':14}{note}" for note in notes)


def groups(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by suite and dtype."""
    result: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        result.setdefault((row.suite, row.dtype), []).append(row)
    return result


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Geometric mean and extremes of the ratios, one entry a suite and dtype."""
    result = []
    for (suite, dtype), members in groups(rows).items():
        ratios = [r.ratio for r in members if r.ratio is not None]
        thp = [r.thp["ratio"] for r in members if r.thp and r.thp["ratio"] is not None]
        result.append(
            {
                "suite": suite,
                "dtype": dtype,
                "rows": len(members),
                "wrong": sum(r.ours.wrong for r in members),
                "slower": sum(is_loss(r) for r in ratios),
                "geometric_mean": geometric_mean(ratios),
                "lowest": min(ratios, default=math.nan),
                "highest": max(ratios, default=math.nan),
                "thp_geometric_mean": geometric_mean(thp) if thp else None,
            }
        )
    return result


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for a number that was not measured."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def row_to_json(row: Row, peaks: dict[str, Any]) -> dict[str, Any]:
    rate, best = row.rate(row.ours), row.best
    return {
        "suite": row.suite,
        "layer": row.layer,
        "pass_name": row.pass_name,
        "dtype": row.dtype,
        "bound": row.bound,
        "flops": row.flops,
        "bytes": row.bytes,
        "ours": vars(row.ours),
        "native": [vars(t) for t in row.native],
        "best_native": best and best.name,
        "ratio": row.ratio,
        "rate": rate,
        "rate_unit": unit(row),
        "fraction_of_peak": rate / peak(row, peaks),
        "thp": row.thp,
    }


def _timing(fields: dict[str, Any]) -> Timing:
    measured = ("error", "median_ms", "q1_ms", "q3_ms")
    numbers: dict[str, Any] = {name: math.nan for name in measured if fields[name] is None}
    return Timing(**{**fields, **numbers})


def row_from_json(fields: dict[str, Any]) -> Row:
    names = ("suite", "layer", "pass_name", "dtype", "bound", "flops", "bytes", "thp")
    native = [_timing(t) for t in fields["native"]]
    return Row(**{n: fields[n] for n in names}, ours=_timing(fields["ours"]), native=native)


def save(path: Path, run: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes the machine's facts in ``run`` and every row as JSON, all of it or nothing."""
    content = {**run, "summary": summary(rows), "rows": [row_to_json(row, run["peaks"]) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(_without_nan(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    new.replace(path)


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    run = json.loads(path.read_text())
    del run["summary"]
    return run, [row_from_json(fields) for fields in run.pop("rows")]


def load_all(paths: Sequence[Path]) -> tuple[dict[str, Any], list[Row]]:
    """Several runs on one machine, of different suites or dtypes, as one: the facts are the last one's."""
    runs = [load(path) for path in paths]
    run = runs[-1][0]
    run["peaks"]["gflops"] = {dtype: v for each, _ in runs for dtype, v in each["peaks"]["gflops"].items()}
    return run, [row for _, rows in runs for row in rows]


# README


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "n/a"  # ours is wrong, or no native configuration is right
    return f"**{ratio:.2f} ▼**" if is_loss(ratio) else f"{ratio:.2f}"


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in body)


def where(run: dict[str, Any]) -> str:
    machine, software = run["machine"], run["software"]
    gflops = ", ".join(f"{v:.0f} GFLOP/s {k}" for k, v in run["peaks"]["gflops"].items())
    return (
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {machine['isa']} kernels; measured peak "
        f"{gflops}, copy {run['peaks']['copy_gbs']:.0f} GB/s; "
        f"torch {software['torch']}, compiler {software['compiler']}; "
        f"commit {run['commit'] or 'unknown'}, {run['date'][:10]}"
    )


def readme_tables(run: dict[str, Any], rows: Sequence[Row]) -> str:
    """The summary, and one line a layer: the ratios of its passes, and times, rate and error of its broadest one."""
    has_thp = any(row.thp for row in rows)
    means = table(
        ["suite", "dtype", "rows", "geometric mean", "lowest", "highest", "slower rows"]
        + ["geometric mean, THP"] * has_thp,
        [
            [s["suite"], s["dtype"], str(s["rows"])]
            + [f"{s['geometric_mean']:.2f}", _times(s["lowest"]), f"{s['highest']:.2f}", str(s["slower"])]
            + ["" if s["thp_geometric_mean"] is None else f"{s['thp_geometric_mean']:.2f}"] * has_thp
            for s in summary(rows)
        ],
    )
    layers: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        layers.setdefault((row.suite, row.layer, row.dtype, row.ours.name), {})[row.pass_name] = row
    lines = []
    for (suite, layer, dtype, name), passes in layers.items():
        row = passes[next(p for p in BROADEST if p in passes)]
        best = row.best
        lines.append(
            [suite, layer, dtype, name.removeprefix("fastnn").lstrip(" ,")]
            + [_times(passes[p].ratio) if p in passes else "" for p in ("forward", "backward")]
            + [_times(row.ratio) if row.pass_name in BROADEST[:2] else ""]
            + ([_times(row.thp["ratio"]) if row.thp else ""] if has_thp else [])
            + ["wrong" if row.ours.wrong else _milliseconds(row.ours.median_ms)]
            + ["none right" if best is None else f"{_milliseconds(best.median_ms)} ({best.name})"]
            + ["" if row.ours.wrong else f"{row.rate(row.ours):.3g} {unit(row)}"]
            + ["" if row.ours.wrong else f"{row.rate(row.ours) / peak(row, run['peaks']):.0%}"]
            + [f"{row.ours.error:.0e} / {best.error:.0e}" if best else f"{row.ours.error:.0e}"]
        )
    header = ["suite", "layer", "dtype", "fastnn", "forward x", "backward x", "both or step x"]
    header += ["the same, THP x"] * has_thp
    header += ["fastnn ms", "best native ms", "rate", "of peak", "error: fastnn / native"]
    quick = "This was a `--quick` run: few rounds, small shapes.\n\n" if run["settings"]["quick"] else ""
    return (
        f"{where(run)}.\n\n{quick}x is the best native configuration's time over fastnn's: above 1, fastnn is faster; "
        f"▼ marks where it is slower.\n\n{means}\n\n<details><summary>Every layer</summary>\n\n"
        f"Times, rate and error are of the last x column's pass.\n\n{table(header, lines)}\n\n</details>"
    )


def headline(run: dict[str, Any], rows: Sequence[Row]) -> str | None:
    """One sentence on the example program's training step; None where it was not measured."""
    steps = [r for r in rows if r.suite == "train" and r.dtype == "float32" and r.ratio is not None]
    steps = [r for r in steps if "imports changed" in r.ours.name]
    if not steps:
        return None
    row = min(steps, key=lambda r: r.ours.median_ms)
    ratio, best, machine = row.ratio, row.best, run["machine"]
    assert ratio is not None
    assert best is not None
    return (
        f"A training step of the {row.layer}, takes {_milliseconds(row.ours.median_ms)} ms where it imports fastnn, "
        f"and {_milliseconds(best.median_ms)} ms in the best of {len(row.native)} native configurations ({best.name}): "
        f"**{ratio:.2f}x** ({machine['cpu']}, {machine['threads']} threads, "
        f"torch {run['software']['torch']})."
    )


def replace_between(text: str, marker: str, content: str) -> str:
    """``text`` with what stands between ``<!-- marker -->`` and ``<!-- /marker -->`` replaced.

    Raises:
        ValueError: the markers are not there, once each and in this order.
    """
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one {begin} and after it one {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def rewrite_readme(path: Path, run: dict[str, Any], rows: Sequence[Row]) -> None:
    """Puts the rows into the table of the CPU, and its training step into the headline, or into the GPU's table."""
    if run["machine"]["gpu"]:
        path.write_text(replace_between(path.read_text(), "gpu benchmarks", readme_tables(run, rows)))
        return
    text = replace_between(path.read_text(), "benchmarks", readme_tables(run, rows))
    sentence = headline(run, rows)
    path.write_text(text if sentence is None else replace_between(text, "headline", sentence))


# Plots


def plot(folder: Path, run: dict[str, Any], rows: Sequence[Row]) -> list[Path]:
    """Writes ratios.png and roofline.png into ``folder`` and returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "ratios.png", folder / "roofline.png"]
    _plot_ratios(paths[0], run, rows)
    _plot_roofline(paths[1], run, rows)
    return paths


def _plot_ratios(path: Path, run: dict[str, Any], rows: Sequence[Row]) -> None:
    from matplotlib import pyplot as plt

    labels = list(dict.fromkeys(f"{r.suite}  {r.layer}  {r.dtype}  {r.ours.name}" for r in rows))
    figure, axes = plt.subplots(figsize=(11, 1.5 + 0.22 * len(labels)))
    for index, pass_name in enumerate(dict.fromkeys(r.pass_name for r in rows)):
        points = [(r.ratio, r) for r in rows if r.pass_name == pass_name and r.ratio is not None]
        y = [labels.index(f"{r.suite}  {r.layer}  {r.dtype}  {r.ours.name}") for _, r in points]
        axes.scatter([ratio for ratio, _ in points], y, s=22, marker="osD^vP"[index % 6], label=pass_name, zorder=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.axvspan(axes.get_xlim()[0] if labels else 0.5, 1, color="tab:red", alpha=0.08)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}x")
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="both", alpha=0.3)
    axes.set_xlabel("best native time / fastnn time (left of the line: fastnn is slower)")
    axes.set_title(where(run), fontsize=7)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _plot_roofline(path: Path, run: dict[str, Any], rows: Sequence[Row]) -> None:
    from matplotlib import pyplot as plt

    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    figure, grid = plt.subplots(1, len(dtypes), figsize=(7.5 * len(dtypes), 5.5), squeeze=False)
    for axes, dtype in zip(grid[0], dtypes, strict=True):
        members = [r for r in rows if r.dtype == dtype and not r.ours.wrong and r.best is not None]
        intensity = [r.flops / r.bytes for r in members]
        for who, marker, color in (("native, best", "x", "tab:gray"), ("fastnn", "o", "tab:blue")):
            timings = [r.ours if who == "fastnn" else r.best for r in members]
            attained = [r.flops / t.median_ms / 1e6 for r, t in zip(members, timings, strict=True) if t is not None]
            axes.scatter(intensity, attained, marker=marker, s=18, color=color, label=who, alpha=0.7)
        top, slope = run["peaks"]["gflops"][dtype], run["peaks"]["copy_gbs"]
        ends = [min([*intensity, 0.1]), top / slope, max([*intensity, 10 * top / slope])]
        axes.plot(ends, [min(top, slope * x) for x in ends], color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{dtype}: peak {top:.0f} GFLOP/s, copy {slope:.0f} GB/s", fontsize=9)
        axes.set_xlabel("floating-point operations a byte that must move")
        axes.set_ylabel("GFLOP/s")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(where(run), fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)

"""The benchmark harness: who is timed, in which order, against what, and what is written down."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastnn.nn.functional
import fastnn.optim
from benchmarks import __main__ as command
from benchmarks import conv2d, cross_entropy, harness, machine, max_pool2d, optim, overhead, relu, report, train
from benchmarks.harness import (
    Case,
    Row,
    Settings,
    Timing,
    Variant,
    error,
    functional,
    geometric_mean,
    interleave,
    measure,
    own,
    pass_function,
)

CPU = torch.device("cpu")
QUICK = Settings(CPU, quick=True)
PEAKS = {"gflops": {"float32": 100.0}, "copy_gbs": 20.0}


def case_of(variants, reference):
    return Case("suite", "layer", "forward", torch.float32, "bytes", 1e3, 1e3, variants, reference)


def row(ratio=2.0, pass_name="forward", **overrides):
    ours = Timing("fastnn NCHW", 1e-7, False, None, 10.0, 9.0, 11.0, 7)
    native = [
        Timing("eager NCHW", 1e-7, False, None, 10 * ratio, 9 * ratio, 11 * ratio, 7),
        Timing("compiled NCHW", 1.0, wrong=True),
    ]
    fields = {"suite": "conv2d", "layer": "3x3", "dtype": "float32", "bound": "flops", "flops": 1e9, "bytes": 1e6}
    return Row(**{**fields, "pass_name": pass_name, "ours": ours, "native": native, **overrides})


def run_facts():
    facts = machine.facts(CPU)
    return {**facts, "settings": {"quick": False}, "peaks": PEAKS}


@pytest.fixture
def fixed_peaks(monkeypatch):
    monkeypatch.setattr(machine, "peaks", lambda dtypes, device: PEAKS)


# Is it right


def test_error_is_relative_and_the_worst_tensor_counts():
    want = [torch.full((3, 4), 2.0, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    assert error([w.float() for w in want], want) == 0
    assert error([want[0].float(), want[1].float() * 1.25], want) == pytest.approx(0.25)
    assert error([torch.zeros(3, 4), want[1]], want) == 1
    assert error([torch.ones(4, 3), want[1]], want) == math.inf
    assert math.isnan(error([want[0] * math.nan, want[1]], want))
    assert error([torch.tensor(1.5)], [torch.tensor(1.0, dtype=torch.float64)]) == 0.5


def test_error_in_blocks_of_rows_equals_error_at_once(monkeypatch):
    monkeypatch.setattr(harness, "BLOCK", 32)
    want = torch.randn(5, 9, dtype=torch.float64)
    got = (want + 1e-3 * torch.randn_like(want)).float()
    assert error([got], [want]) == pytest.approx(((got.double() - want).norm() / want.norm()).item())


def test_wrong_results_are_neither_timed_nor_compared_with():
    right = torch.ones(8, dtype=torch.float64)
    calls = {"zero": 0}

    def zero():
        calls["zero"] += 1
        return [torch.zeros(8)]

    def fails():
        raise RuntimeError("no compiler\nat all")

    variants = [
        Variant("eager", lambda: [torch.ones(8)]),
        Variant("compiled", zero),
        Variant("nan", lambda: [torch.full((8,), math.nan)]),
        Variant("fails", fails),
        Variant("fastnn", lambda: [torch.ones(8)], ours=True),
        Variant("fastnn broken", zero, ours=True),
    ]
    good, broken = measure(case_of(variants, [right]), QUICK)
    assert calls["zero"] == 2  # once each, to look at the result
    assert [t.name for t in good.native if t.wrong] == ["compiled", "nan", "fails"]
    assert good.native[-1].note == "RuntimeError: no compiler"
    assert good.best.name == "eager"
    assert good.ratio > 0
    assert broken.ours.wrong
    assert broken.ratio is None
    assert "WRONG" in report.line(broken, PEAKS)
    assert "compiled left out: wrong, error 1.0e+00" in report.line(good, PEAKS)


def test_a_call_is_compared_with_calls_and_a_graph_with_everything():
    def variant(name, **kind):
        return Variant(name, lambda: [torch.ones(8)], **kind)

    variants = [variant("eager"), variant("graph of eager", graph=True), variant("fastnn", ours=True)]
    variants.append(variant("graph of fastnn", ours=True, graph=True))
    call, graph = measure(case_of(variants, [torch.ones(8, dtype=torch.float64)]), QUICK)
    assert (call.ours.name, [t.name for t in call.native]) == ("fastnn", ["eager"])
    assert (graph.ours.name, [t.name for t in graph.native]) == ("graph of fastnn", ["eager", "graph of eager"])


def test_a_case_without_fastnn_is_not_run():
    def never():
        raise AssertionError

    assert measure(case_of([Variant("eager", never)], []), QUICK) == []


@pytest.mark.parametrize(("size", "dtype", "reason"), [(1 << 15, torch.int32, "int32"), (4, torch.float32, "small")])
def test_a_call_that_went_native_is_noted(size, dtype, reason):
    def ours():
        return [fastnn.nn.functional.relu(torch.ones(size, dtype=dtype)).float()]

    variants = [Variant("eager", lambda: [torch.ones(size)]), Variant("fastnn", ours, ours=True)]
    for _ in range(2):  # though the logger names a reason only once
        (result,) = measure(case_of(variants, [torch.ones(size, dtype=torch.float64)]), QUICK)
        assert reason in result.ours.note


def test_a_function_that_is_native_pytorch_s_is_refused():
    with pytest.raises(NotImplementedError, match="has no gelu of its own"):
        functional("gelu")
    with pytest.raises(NotImplementedError, match="has no nothing of its own"):
        own("nothing", fastnn.nn.functional, torch.nn.functional)


# Is it timed as said


def test_variants_take_turns():
    order = []
    samples = interleave([lambda n=n: (order.append(n), torch.rand(1 << 16).sort()) for n in "ABC"], QUICK)
    rounds = len(samples[0])
    fewest, most = QUICK.rounds
    assert fewest <= rounds <= most
    assert [len(s) for s in samples] == [rounds] * 3
    turns = "".join(order)[6:]  # two of each first, to see how long they take
    assert turns.replace("A", " A").split() == [turns[: len(turns) // rounds]] * rounds


def test_short_calls_are_repeated_within_a_sample():
    calls = [0]

    def short():
        calls[0] += 1

    (samples,) = interleave([short], QUICK)
    assert calls[0] > 100 * len(samples)
    assert max(samples) < 1e-3


@pytest.mark.parametrize("pass_name", ["forward", "grad_input", "grad_weight", "backward", "forward+backward"])
def test_passes_compute_what_they_are_named_for(pass_name):
    x, w = torch.randn(3), torch.randn(3)
    results = pass_function(pass_name, lambda: x * w, [x], [w], torch.ones(3))()
    want = {"forward": [x * w], "grad_input": [w], "grad_weight": [x], "backward": [w, x]}
    want["forward+backward"] = [x * w, w, x]
    assert len(results) == len(want[pass_name])
    assert all(torch.equal(got, w) for got, w in zip(results, want[pass_name], strict=True))
    assert x.requires_grad == (pass_name not in ("forward", "grad_weight"))
    assert results[0].requires_grad == (pass_name == "forward+backward")


def test_ratio_is_to_the_best_right_native_one():
    r = row(
        native=[
            Timing(n, 0, w, None, ms, ms, ms, 7) for n, w, ms in (("a", False, 30), ("b", False, 20), ("c", True, 1))
        ]
    )
    assert r.best.name == "b"
    assert r.ratio == 2
    assert r.rate(r.ours) == pytest.approx(100)  # 1e9 operations in 10 ms
    assert geometric_mean([1, 4]) == 2


# The suites


@pytest.mark.parametrize("layer", conv2d.LAYERS, ids=lambda layer: layer.name)
def test_convolution_operations_are_pytorch_s_count(layer):
    x = torch.empty(layer.batch, layer.in_channels, layer.size, layer.size, device="meta")
    shape = layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.conv2d(x, torch.empty(shape, device="meta"), None, layer.stride, layer.pad, 1, layer.groups)
    assert layer.flops == counter.get_total_flops()


TINY = {
    "relu": (relu, relu.Layer((3, 5))),
    "relu in place": (relu, relu.Layer((3, 5), inplace=True)),
    "max_pool2d": (max_pool2d, max_pool2d.Layer(3, 9, (3, 2, 1), batch=2)),
    "cross_entropy": (cross_entropy, cross_entropy.Layer(6, 11)),
    "conv2d": (conv2d, conv2d.Layer(4, 4, 6, 3, batch=2, groups=2)),
    "conv2d+relu": (conv2d, conv2d.Layer(4, 4, 6, 3, batch=2, stride=2, fusion="relu")),
    **{f"overhead of {layer.name}": (overhead, layer) for layer in overhead.LAYERS},
    "adam": (optim, optim.Layer("Adam", "small", ((3, 2), (5,)))),
    "sgd": (optim, optim.Layer("SGD", "small", ((3, 2), (5,)))),
}


@pytest.mark.parametrize("name", TINY)
def test_every_variant_of_a_suite_is_right(name):
    suite, layer = TINY[name]
    for case in suite.cases(layer, torch.float32, QUICK):
        with fastnn.backend("cpu"):  # forced: a small ReLU would be native torch's
            results = measure(case, QUICK)
        for result in results:
            assert not result.ours.wrong
            assert not any(t.wrong for t in result.native)
            assert result.ours.note is None
            assert result.ratio > 0


def test_a_gpu_has_a_row_for_every_backend_and_native_at_its_best(monkeypatch):
    """What is listed; that it runs, a GPU has to show."""
    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic, mode: modes.append(mode) or function)
    gpu = Settings(torch.device("cuda"))
    off = {"cuda": "not built"}
    monkeypatch.setattr(harness.dispatch, "why_off", lambda backend, op, device: off.get(backend))
    assert set(relu.functions(gpu)) == {"eager", "compiled", "fastnn triton"}
    off.clear()
    who = ("eager", "compiled", "fastnn cuda", "fastnn triton")
    assert set(cross_entropy.functions(gpu)) == set(who)
    pooled = next(layer for layer in conv2d.layers(gpu) if layer.fusion == "relu+pool")
    for layer, settings in ((pooled, gpu), (conv2d.LAYERS[0], replace(gpu, compile_all=True))):
        names = set(conv2d.calls(layer, settings))
        assert names == {f"{name} {layout}" for name in who for layout in conv2d.LAYOUTS}
    assert set(modes) == {"max-autotune-no-cudagraphs"}
    variants = [Variant(name, list, ours=name.startswith("fastnn")) for name in who]
    graphs = [(f"graph of {name}", name != "eager", True) for name in who if name != "compiled"]
    for pass_name, more in (("forward", graphs), ("forward+backward", graphs), ("backward", [])):
        with_them = harness.with_graphs(variants, pass_name, gpu)
        assert with_them[: len(who)] == variants
        assert [(v.name, v.ours, v.graph) for v in with_them[len(who) :]] == more
    assert harness.with_graphs(variants, "forward", QUICK) == variants
    with fastnn.backend("torch"):
        assert harness.ours_of("relu", fastnn.dispatch.forced, gpu)["fastnn triton"]() == "triton"


@pytest.mark.parametrize("name", ["Adam", "SGD"])
@pytest.mark.parametrize("module", [torch.optim, fastnn.optim], ids=["torch", "fastnn"])
def test_steps_are_undone(module, name):
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    parameter.grad = torch.tensor([0.5, 3.0])
    optimizer = getattr(module, name)([parameter], **optim.ARGUMENTS[name])
    undo = harness.undo_steps(optimizer)
    before = parameter.detach().clone()
    optimizer.step()
    first = parameter.detach().clone()
    state = {key: entry for key, entry in optimizer.state[parameter].items() if isinstance(entry, torch.Tensor)}
    undo()
    assert torch.equal(parameter, before)
    optimizer.step()
    assert torch.equal(parameter, first)
    assert all(optimizer.state[parameter][key] is entry for key, entry in state.items())


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or fastnn.dispatch.why_off("cuda", "adam", torch.device("cuda")) is not None,
    reason="CUDA graphs need a GPU, and the kernels for it",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["adam", "sgd", "train"])
def test_graphs_of_a_step_are_right(name, dtype):
    suite, layer = {**TINY, "train": (train, train.Layer(batch=4, size=32))}[name]
    gpu = Settings(torch.device("cuda"), quick=True)
    (case,) = suite.cases(layer, dtype, gpu)
    graphs = [v for v in case.variants if "graph" in v.name and "compiled" not in v.name]
    for result in measure(replace(case, variants=[case.variants[0], *graphs]), gpu):
        assert not result.ours.wrong, result.ours
        assert not any(t.wrong for t in result.native), result.native
    assert {v.ours for v in graphs} == {False, True}


def test_a_gpu_has_the_rows_that_its_figures_are_of():
    gpu = Settings(torch.device("cuda"))
    convolutions = conv2d.layers(gpu)
    names = [layer.name for layer in convolutions]
    assert len(set(names)) == len(names)  # the rows' key: the batch is no part of it
    assert {layer.batch for layer in convolutions} == {64}
    assert len([n for n in names if n.startswith("ResNet-50")]) == 2 * len(conv2d.RESNET50)
    assert "depthwise 3x3 144→144@56" in names
    assert "3x3 3→32@224" in names
    assert "3x3 64→64@56" not in names  # it is ResNet-50's
    assert (1 << 28) in {math.prod(layer.shape) for layer in relu.layers(gpu)}
    assert "8192x128256" in {layer.name for layer in cross_entropy.layers(gpu)}
    assert [layer.batch for layer in train.layers(gpu)] == [64, 256]
    assert conv2d.layers(Settings(CPU)) == conv2d.LAYERS
    assert relu.layers(Settings(CPU)) == relu.LAYERS


# What is written


def test_command_writes_json_plots_and_the_same_again_from_the_json(tmp_path, monkeypatch, fixed_peaks, capsys):
    monkeypatch.setattr(relu, "LAYERS", [relu.Layer((4, 4))])
    file = tmp_path / "results" / "cpu.json"
    options = ["--suite", "relu", "--quick", "--json", str(file), "--plot", str(tmp_path / "plots")]
    assert command.main(options) == 0
    content = json.loads(file.read_text())
    assert {"machine", "software", "allocator", "commit", "date", "settings", "peaks", "summary", "rows"} == set(
        content
    )
    assert {"cpu", "cores", "threads", "isa", "torch_isa"} <= set(content["machine"])
    assert content["software"]["torch"] == torch.__version__
    assert [r["pass_name"] for r in content["rows"]] == ["forward", "backward", "forward+backward"]
    first = content["rows"][0]
    assert first["ratio"] == pytest.approx(first["native"][0]["median_ms"] / first["ours"]["median_ms"])
    assert first["ours"]["q1_ms"] <= first["ours"]["median_ms"] <= first["ours"]["q3_ms"]
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"ratios.png", "roofline.png"}

    again = tmp_path / "again.json"
    assert command.main(["--from", str(file), "--json", str(again)]) == 0
    assert again.read_text() == file.read_text()
    assert "geometric mean" in capsys.readouterr().out


def test_a_run_that_is_cut_has_written_what_it_measured(tmp_path, monkeypatch, fixed_peaks):
    layers = [relu.Layer((4, 4)), relu.Layer((4, 5))]
    monkeypatch.setattr(relu, "LAYERS", layers)

    def cut(case, settings):
        if case.layer == layers[1].name:
            raise KeyboardInterrupt
        return measure(case, settings)

    monkeypatch.setattr(command, "measure", cut)
    file = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        command.main(["--suite", "relu", "--quick", "--json", str(file)])
    run, rows = report.load(file)
    assert {r.layer for r in rows} == {layers[0].name}

    def cut_again(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", cut_again)
    with pytest.raises(KeyboardInterrupt):
        report.save(file, run, [])
    assert report.load(file) == (run, rows)


def test_runs_of_different_dtypes_are_shown_as_one(tmp_path, capsys):
    files = []
    for dtype in ("float32", "bfloat16"):
        files += ["--from", str(tmp_path / f"{dtype}.json")]
        run = {**run_facts(), "peaks": {**PEAKS, "gflops": {dtype: 100.0}}}
        report.save(tmp_path / f"{dtype}.json", run, [row(dtype=dtype)])
    assert command.main([*files, "--json", str(tmp_path / "both.json")]) == 0
    run, rows = report.load(tmp_path / "both.json")
    assert [r.dtype for r in rows] == list(run["peaks"]["gflops"]) == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads 0: expected 1 or more"),
        (["--from", "/nowhere/a.json"], "--from /nowhere/a.json: there is no such file"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_a_suite_whose_function_is_missing_fails_plainly_after_the_others(monkeypatch, fixed_peaks, capsys):
    monkeypatch.setattr(relu, "LAYERS", [relu.Layer((4, 4))])
    monkeypatch.setattr(fastnn.nn.functional, "cross_entropy", torch.nn.functional.cross_entropy)
    assert command.main(["--suite", "cross_entropy", "--suite", "relu", "--quick"]) == 1
    captured = capsys.readouterr()
    assert "suite cross_entropy did not run: fastnn.nn.functional has no cross_entropy" in captured.err
    assert "relu" in captured.out


def test_json_keeps_rows_that_were_not_timed(tmp_path):
    rows = [row(), row(ours=Timing("fastnn NCHW", math.nan, wrong=True, note="broken"))]
    run = run_facts()
    report.save(tmp_path / "r.json", run, rows)
    loaded_run, loaded = report.load(tmp_path / "r.json")
    assert loaded_run == run
    assert loaded[0] == rows[0]
    assert loaded[1].ours.note == "broken"
    assert loaded[1].ratio is None


def test_readme_tables_show_losses_and_the_second_baseline(tmp_path):
    rows = [row(2.0), row(0.5, "forward+backward", thp={"ratio": 0.8}), row(1.5, layer="1x1")]
    text = report.readme_tables(run_facts(), rows)
    assert "| conv2d | 3x3 | float32 | NCHW | 2.00 |  | **0.50 ▼** | **0.80 ▼** | 10 | 5 (eager NCHW) |" in text
    assert "| conv2d | float32 | 3 | 1.14 | **0.50 ▼** | 2.00 | 1 | 0.80 |" in text
    step = row(3.0, "step", suite="train", layer="example program, batch 64", ours=row().ours)
    step.ours = Timing("fastnn, imports changed", 1e-7, False, None, 500.0, 490.0, 510.0, 7)
    step.native[0] = Timing("eager NCHW, fused", 1e-7, False, None, 1500.0, 1490.0, 1510.0, 7)
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- headline -->\nx\n<!-- /headline -->\nb\n<!-- benchmarks -->\n<!-- /benchmarks -->\nc\n")
    run = run_facts()
    report.rewrite_readme(readme, run, [*rows, step])
    once = readme.read_text()
    assert "takes 500 ms where it imports fastnn, and 1500 ms in the best of 2 native" in once
    assert "**3.00x**" in once
    assert once.startswith("a\n<!-- headline -->")
    assert once.endswith("<!-- /benchmarks -->\nc\n")
    report.rewrite_readme(readme, run, [*rows, step])
    assert readme.read_text() == once
    report.rewrite_readme(readme, run, rows)  # no train suite this time: the sentence stays
    assert "takes 500 ms" in readme.read_text()


def test_a_run_on_a_gpu_rewrites_its_own_table_alone(tmp_path):
    parts = ["<!-- headline -->\nh\n<!-- /headline -->\n", "<!-- gpu benchmarks -->\n", "Not yet measured."]
    parts += ["\n<!-- /gpu benchmarks -->\n<!-- benchmarks -->\nc\n<!-- /benchmarks -->\n"]
    readme = tmp_path / "README.md"
    readme.write_text("".join(parts))
    run = run_facts()
    step = row(3.0, "step", suite="train")
    step.ours = replace(step.ours, name="fastnn cuda, imports changed")
    gpu_run = {**run, "machine": {**run["machine"], "gpu": "a GPU"}}
    report.rewrite_readme(readme, gpu_run, [step])
    parts[2] = report.readme_tables(gpu_run, [step])
    assert readme.read_text() == "".join(parts)
    report.rewrite_readme(readme, run, [row()])
    after = readme.read_text()
    assert parts[2] in after
    assert "\nc\n" not in after


@pytest.mark.parametrize("text", ["", "<!-- m --> <!-- m --> <!-- /m -->", "<!-- /m --> <!-- m -->"])
def test_missing_markers_are_an_error(text):
    with pytest.raises(ValueError, match="expected one <!-- m -->"):
        report.replace_between(text, "m", "x")


def test_the_readme_has_the_markers():
    text = (machine.ROOT / "README.md").read_text()
    for marker in ("headline", "benchmarks", "gpu benchmarks"):
        report.replace_between(text, marker, "x")


def test_measured_peaks_are_plausible():
    peaks = machine.peaks([torch.float32], CPU)
    assert set(peaks["gflops"]) == {"float32"}
    assert all(0.1 < value < 1e5 for value in (*peaks["gflops"].values(), peaks["copy_gbs"]))

"""Other people's models, from their configurations with random weights, trained as they are and converted.

They are those that benchmarks/models.py measures, made tiny.
"""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastnn
from benchmarks import machine, report
from benchmarks.harness import native_calls
from benchmarks.models import MODELS, PARTS, build, largest, measure, table, trained, training

# By how much a weight or a loss may differ after three steps, in which the weights move by 1e-4 and more.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}
# How many modules of a tiny model, its loss and its optimizer are swapped, fused and left alone.
COUNTS = {
    "ResNet-50": (24, 0, 0),
    "ConvNeXt-T": (6, 0, 1),
    "MobileNetV2": (54, 0, 52),
    "ViT, 4 layers": (3, 0, 1),
    "YOLOS, 4 layers": (3, 0, 1),
    "BERT, 4 layers": (2, 0, 0),
    "GPT-2, 4 layers": (2, 0, 0),
    "Wav2Vec2, 4 layers": (2, 0, 3),
    "U-Net": (23, 10, 5),
}


@pytest.fixture(params=MODELS)
def name(request):
    if request.param != "U-Net":
        pytest.importorskip("transformers", reason="transformers builds this model: pip install transformers")
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_training_beside_the_original(name, dtype):
    with native_calls() as calls, fastnn.backend("cpu"):  # forced: a small ReLU would be native torch's
        ours = trained(name, dtype, converted=True, tiny=True)
    assert not calls
    theirs = trained(name, dtype, converted=False, tiny=True)
    tolerance = TOLERANCE[dtype]
    if name == "MobileNetV2" and dtype is torch.float32:  # its 52 normalizations over a few samples amplify rounding
        tolerance = 4 * largest(theirs - trained(name, torch.float64, converted=False, tiny=True))
    assert largest(ours - theirs) <= tolerance


def test_what_is_converted(name):
    """What the report counts, and that revert undoes it and results are the original's again."""
    task = build(name, torch.float64, tiny=True)
    original = copy.deepcopy(task.model)
    classes, keys = [type(m) for m in original.modules()], list(original.state_dict())
    _, reports = training(task, converted=True)
    found = tuple(sum(len(getattr(r, what)) for r in reports) for what in ("swapped", "fused", "left_alone"))
    assert found == COUNTS[name], "\n".join(map(str, reports))
    assert list(task.model.state_dict()) == keys
    fastnn.revert(task.model)
    assert [type(m) for m in task.model.modules()] == classes
    with torch.no_grad():
        outputs = (task.logits(model.eval()(task.inputs)) for model in (task.model, original))
        torch.testing.assert_close(*outputs)


COMPILED = {"ResNet-50": "inductor", "ViT, 4 layers": "aot_eager", "BERT, 4 layers": "aot_eager", "U-Net": "aot_eager"}


@pytest.mark.parametrize(("name", "backend"), COMPILED.items(), indirect=["name"])
def test_compiled(name, backend):
    """Converted and compiled whole, in training mode: loss and gradients of the original, run eagerly."""
    torch._dynamo.reset()
    found = []
    for converted in (False, True):
        task, criterion = build(name, torch.float64, tiny=True), torch.nn.CrossEntropyLoss()
        if converted:
            fastnn.convert(task.model)
            fastnn.convert(criterion)

        def loss_of(inputs, target, task=task, criterion=criterion):
            return criterion(task.logits(task.model(inputs)), target)

        torch.manual_seed(0)  # of the dropouts
        if converted:
            counter = CompileCounterWithBackend(backend)
            loss_of = torch.compile(loss_of, fullgraph=True, backend=counter)
        loss = loss_of(task.inputs, task.target)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in task.model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    targets = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert "fastnn.cross_entropy.default" in targets


def test_left_alone():
    """Wav2Vec2's Conv1d layers, and no more."""
    pytest.importorskip("transformers", reason="transformers builds this model: pip install transformers")
    _, (of_model, *_) = training(build("Wav2Vec2, 4 layers", torch.float32, tiny=True), converted=True)
    assert [what for _, what in of_model.left_alone] == ["fastnn has no kernel for Conv1d"] * 3


def test_residual_networks_are_folded_for_inference():
    pytest.importorskip("transformers", reason="transformers builds this model: pip install transformers")
    task = build("ResNet-50", torch.float64, tiny=True)
    task.model(task.inputs)  # running statistics that are not 0 and 1
    original = copy.deepcopy(task.model.eval())
    fused = fastnn.convert(task.model, fold_batch_norm=True).fused
    assert len(fused) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in task.model.modules())
    with torch.no_grad():
        torch.testing.assert_close(task.model(task.inputs).logits, original(task.inputs).logits)


def test_rows_of_the_table():
    row = {key: value for part in PARTS for key, value in measure("U-Net", part, tiny=True).items()}
    assert row["speed"] > 0
    assert row["inference"] > 0
    assert row["float64"] <= TOLERANCE[torch.float64]
    row |= {"speed": 1.5, "memory before": 8, "memory after": 4, "inference": 2, "float64": 1e-16, "float32": 2e-7}
    row["native"] = 3e-7
    page = (machine.ROOT / "docs" / "models.md").read_text()
    written = report.replace_between(page, "models", table({"U-Net": row}))
    assert "| U-Net | 23 | 10 | 5 | 1.50 | 0.50 | 2.00 | 1e-16 | 2e-07 | 3e-07 |\n<!-- /models -->" in written

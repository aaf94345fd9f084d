"""Other people's models, before and after ``fastnn.convert``: ``python -m benchmarks.models``.

Each is built from its configuration with random weights. `MODELS` holds them, in a size that is worth timing and a tiny
one for the tests. A step is zero_grad, forward, cross-entropy, backward and the optimizer. Model, loss and optimizer
are torch's own, and on the other side the same three converted.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import fastnn
from benchmarks import machine, report
from benchmarks.harness import Settings, interleave
from benchmarks.train import stepper
from examples.compare import peak_memory

STEPS = 3  # after which the weights of both sides are compared
PARTS = ("speed", "memory before", "memory after")
COUNTS = ("swapped", "fused", "left alone")


@dataclass
class Task:
    """A model and one batch. ``logits`` takes the (rows, classes) to be trained from what the model returns."""

    model: nn.Module
    inputs: Tensor
    target: Tensor
    logits: Callable[[Any], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def classes(output: Any) -> Tensor:
    return output.logits


def positions(output: Any) -> Tensor:
    """Of every position of a sequence, or detection token."""
    return output.logits.flatten(0, 1)


def images(batch: int, height: int, width: int | None = None) -> Tensor:
    return torch.randn(batch, 3, height, width or height)


def sizes(tiny: bool, **small: Any) -> dict[str, Any]:
    """Arguments of a configuration: ten classes, and where it is not to be tiny its own sizes."""
    return {"num_labels": 10, **(small if tiny else {})}


def layers(tiny: bool, **small: Any) -> dict[str, Any]:
    """The same of a transformer, with four layers."""
    tiny_layer = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    return {"num_hidden_layers": 1 if tiny else 4, **sizes(tiny, **tiny_layer, **small)}


def resnet(tiny: bool) -> Task:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(**sizes(tiny, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2]))
    batch = images(4, 32) if tiny else images(8, 224)
    return Task(ResNetForImageClassification(config), batch, torch.arange(len(batch)), classes, sgd)


def convnext(tiny: bool) -> Task:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(**sizes(tiny, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))
    batch = images(2, 32) if tiny else images(4, 224)
    return Task(ConvNextForImageClassification(config), batch, torch.arange(len(batch)), classes, adamw)


def mobilenet_v2(tiny: bool) -> Task:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(**sizes(tiny, depth_multiplier=0.25))
    batch = images(8, 64 if tiny else 224)
    return Task(MobileNetV2ForImageClassification(config), batch, torch.arange(len(batch)), classes, sgd)


def vit(tiny: bool) -> Task:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**layers(tiny, image_size=16, patch_size=8))
    batch = images(2, 16) if tiny else images(4, 224)
    return Task(ViTForImageClassification(config), batch, torch.arange(len(batch)), classes, adamw)


def yolos(tiny: bool) -> Task:
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(**layers(tiny, image_size=[16, 24], patch_size=8, num_detection_tokens=4))
    if not tiny:  # attention over the 512 x 864 of its default takes minutes to measure
        config.image_size = [256, 432]
    batch = images(2, *config.image_size)
    target = torch.arange(2 * config.num_detection_tokens) % 10
    return Task(YolosForObjectDetection(config), batch, target, positions, adamw)


def bert(tiny: bool) -> Task:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**layers(tiny, vocab_size=50))
    words = torch.randint(config.vocab_size, (2, 7) if tiny else (4, 128))
    return Task(BertForSequenceClassification(config), words, torch.arange(len(words)), classes, adamw)


def gpt2(tiny: bool) -> Task:
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"n_embd": 16, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_layer=1 if tiny else 4, **sizes(tiny, **small))
    words = torch.randint(config.vocab_size, (2, 8) if tiny else (4, 129))
    return Task(GPT2LMHeadModel(config), words[:, :-1], words[:, 1:].flatten(), positions, adamw)


def wav2vec2(tiny: bool) -> Task:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    small = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    small |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    # Without what draws its random numbers from NumPy, or skips layers at random.
    config = Wav2Vec2Config(apply_spec_augment=False, layerdrop=0.0, **layers(tiny, **small))
    model = Wav2Vec2ForCTC(config)
    sound = torch.randn(2, 400 if tiny else 16000)
    frames = 2 * int(model._get_feat_extract_output_lengths(sound.shape[1]))
    return Task(model, sound, torch.arange(frames) % 10, positions, adamw)


class UNet(nn.Module):
    """Plain torch.nn: pairs of Conv2d → ReLU, a max-pool down and a transposed convolution up, skips in between."""

    def __init__(self, channels: Sequence[int], labels: int) -> None:
        super().__init__()

        def pair(inputs: int, outputs: int) -> nn.Sequential:
            first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
            return nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True))

        self.stem = pair(3, channels[0])
        steps = list(pairwise(channels))
        self.down = nn.ModuleList(pair(a, b) for a, b in steps)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in reversed(steps))
        self.merge = nn.ModuleList(pair(2 * a, a) for a, _ in reversed(steps))
        self.head = nn.Conv2d(channels[0], labels, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.stem(x)]
        for down in self.down:
            skips.append(down(nn.functional.max_pool2d(skips[-1], 2)))
        y = skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            y = merge(torch.cat([skips.pop(), up(y)], 1))
        return self.head(y)


def unet(tiny: bool) -> Task:
    batch, size = (2, 16) if tiny else (4, 128)
    target = torch.randint(5, (batch, size, size))
    return Task(UNet((4, 8, 8) if tiny else (32, 64, 128, 256), 5), images(batch, size), target, lambda y: y, sgd)


MODELS: dict[str, Callable[[bool], Task]] = {
    "ResNet-50": resnet,
    "ConvNeXt-T": convnext,
    "MobileNetV2": mobilenet_v2,
    "ViT, 4 layers": vit,
    "YOLOS, 4 layers": yolos,
    "BERT, 4 layers": bert,
    "GPT-2, 4 layers": gpt2,
    "Wav2Vec2, 4 layers": wav2vec2,
    "U-Net": unet,
}


def build(name: str, dtype: torch.dtype, tiny: bool) -> Task:
    torch.manual_seed(0)
    task = MODELS[name](tiny)
    task.model.to(dtype)
    if task.inputs.is_floating_point():
        task.inputs = task.inputs.to(dtype)
    return task


def training(task: Task, converted: bool) -> tuple[Callable[[], Sequence[Tensor]], list[fastnn.ConversionReport]]:
    """A function that trains the task's model by one step and returns loss and gradients, and what convert said."""
    model, criterion, optimizer = task.model, nn.CrossEntropyLoss(), task.optimizer(task.model.parameters())
    reports = [fastnn.convert(each) for each in (model, criterion, optimizer)] if converted else []

    def forward(inputs: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same dropout on both sides
        return task.logits(model(inputs))

    return stepper(model, forward, criterion, optimizer, task.inputs, task.target), reports


def inference(task: Task, converted: bool) -> Callable[[], Tensor]:
    """A function that runs the task's model in eval mode, batch normalization folded."""
    model = task.model.eval()
    if converted:
        fastnn.convert(model, fold_batch_norm=True)

    def run() -> Tensor:
        with torch.inference_mode():
            return task.logits(model(task.inputs))

    return run


def speed(runs: Sequence[Callable[[], Any]]) -> float:
    """The first one's time over the second one's."""
    first, second = (statistics.median(samples) for samples in interleave(runs, Settings(torch.device("cpu"))))
    return first / second


def trained(name: str, dtype: torch.dtype, converted: bool, tiny: bool) -> Tensor:
    """Every weight after three steps, and the loss of each, in float64."""
    task = build(name, dtype, tiny)
    run, _ = training(task, converted)
    losses = [run()[0] for _ in range(STEPS)]
    return torch.cat([t.detach().double().flatten() for t in (*losses, *task.model.parameters())])


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def measure(name: str, part: str, tiny: bool) -> dict[str, Any]:
    """One part of a row, in this process."""
    task = build(name, torch.float32, tiny)
    if part != "speed":
        run, _ = training(task, converted=part == "memory after")
        before = peak_memory()
        for _ in range(2):
            run()
        return {part: peak_memory() - before}
    (native, _), (ours, reports) = (training(copy.deepcopy(task), converted) for converted in (False, True))
    exact, ours64 = (trained(name, torch.float64, converted, tiny) for converted in (False, True))
    native32, ours32 = (trained(name, torch.float32, converted, tiny) for converted in (False, True))
    return {
        **{what: sum(len(getattr(each, what.replace(" ", "_"))) for each in reports) for what in COUNTS},
        "speed": speed([native, ours]),
        "inference": speed([inference(copy.deepcopy(task), converted) for converted in (False, True)]),
        "float64": largest(ours64 - exact),
        "float32": largest(ours32 - native32),
        "native": largest(native32 - exact),
    }


def measure_in_process(name: str, part: str, options: Sequence[str]) -> dict[str, Any]:
    """One part of a row in a process of its own: the peak of memory is a process's."""
    command = [sys.executable, "-m", "benchmarks.models", "--model", name, "--part", part, *options]
    done = subprocess.run(command, cwd=machine.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, row in rows.items():
        memory = row["memory after"] / row["memory before"]
        ratios = [f"{ratio:.2f}" for ratio in (row["speed"], memory, row["inference"])]
        differences = [f"{row[column]:.0e}" for column in ("float64", "float32", "native")]
        lines.append([name, *(str(row[what]) for what in COUNTS), *ratios, *differences])
    header = ["model", *COUNTS, "training speed", "training memory", "inference speed"]
    header += ["difference, float64", "float32", "native float32's own error"]
    return report.table(header, lines)


def where() -> str:
    import transformers

    facts = machine.facts(torch.device("cpu"))
    cpu, software = facts["machine"], facts["software"]
    return (
        f"{cpu['cpu']}, {cpu['threads']} threads, {cpu['isa']} kernels; torch {software['torch']}, "
        f"transformers {transformers.__version__}; commit {facts['commit'] or 'unknown'}, {facts['date'][:10]}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=str(__doc__).split("\n")[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="only this one (may be repeated)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    parser.add_argument("--write", action="store_true", help="rewrite the table in docs/models.md")
    parser.add_argument("--quick", action="store_true", help="tiny models: whether it runs, not how fast")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = options.model or list(MODELS)
    if options.part:
        print(json.dumps(measure(names[0], options.part, options.quick)))
        return 0
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        settings = ["--threads", str(options.threads), *["--quick"] * options.quick]
        parts = [measure_in_process(name, part, settings) for part in PARTS]
        rows[name] = {key: value for part in parts for key, value in part.items()}
        print(name, rows[name], file=sys.stderr)
    text = f"{where()}.\n\n{table(rows)}"
    print(text)
    if options.write:
        path = machine.ROOT / "docs" / "models.md"
        path.write_text(report.replace_between(path.read_text(), "models", text))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The demo program and its three-way comparison, on a few tiny images."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnn

for module in ("tqdm", "sklearn", "matplotlib"):
    pytest.importorskip(module)
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """The images are too tiny for more threads than one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def program():
    return load("image_classification")


@pytest.fixture
def folder(tmp_path):
    """data/{train,test}/{dark,light}: ten images a class, in several formats."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, level in (("dark", 40), ("light", 160)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i, extension in enumerate(["png", "jpg", "bmp", "gif", "webp"] * 2):
                pixels = generator.integers(level, level + 60, (9, 7, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.{extension}")
    return tmp_path / "data"


def tiny(folder, *more):
    return [f"--data={folder}", "--image-size=8", "--batch-size=8", "--epochs=2", *more]


def error_of(program, arguments):
    with pytest.raises(SystemExit) as raised:
        program.main(arguments)
    return str(raised.value)


def test_trains_on_a_folder(program, folder):
    (folder / "train" / "dark" / "notes.txt").write_text("not an image, and passed over")
    history = program.main(tiny(folder, "--epochs=3", "--lr=0.01"))
    assert len(history.losses) == len(history.step_times) == 3 * 3
    assert history.accuracy == 1.0


def test_digits_reach_the_accuracy_asked_for(program):
    assert program.main(["--image-size=8", "--epochs=3", "--lr=3e-3"]).accuracy >= 0.9


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_three_channels(program, mode):
    tensor = program.to_tensor(Image.new(mode, (5, 3)), 8)
    assert tensor.shape == (3, 8, 8)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()


def test_normalisation(program):
    tensor = program.to_tensor(Image.new("RGB", (8, 8), (255, 0, 51)), 8)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(tensor[:, 3, 4], torch.tensor(expected))


def test_data_errors_name_the_file_or_folder(program, folder, tmp_path):
    assert error_of(program, tiny(tmp_path / "nothing")) == f"error: {tmp_path / 'nothing'}: no such folder"
    assert error_of(program, tiny(folder / "train")) == f"error: {folder / 'train' / 'train'}: no such folder"

    (folder / "train" / "new").mkdir()
    assert error_of(program, tiny(folder)) == f"error: {folder / 'train' / 'new'}: no images in it"
    Image.new("L", (3, 3)).save(folder / "train" / "new" / "0.png")
    expected = f"error: {folder / 'train' / 'new'}: class 'new' is not in {folder / 'test'}"
    assert error_of(program, tiny(folder)) == expected
    (folder / "train" / "new").rename(folder / "test" / "new")
    expected = f"error: {folder / 'test' / 'new'}: class 'new' is not in {folder / 'train'}"
    assert error_of(program, tiny(folder)) == expected

    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert (
        error_of(program, tiny(tmp_path / "empty")) == f"error: {tmp_path / 'empty' / 'train'}: no class folders in it"
    )


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"text", lambda data: data[: len(data) // 2]])
@pytest.mark.parametrize("name", ["0.png", "1.jpg"])
def test_corrupt_images_are_named_before_training(program, folder, damage, name):
    file = folder / "test" / "light" / name
    file.write_bytes(damage(file.read_bytes()))
    assert error_of(program, tiny(folder)).startswith(f"error: {file}: not a readable image (")


@pytest.mark.parametrize(
    "argument",
    [
        "--image-size=3",
        "--epochs=0",
        "--batch-size=0",
        "--optimizer=other",
        "--lr=-1",
        "--lr=nan",
        "--momentum=-0.1",
        f"--seed={2**64}",
        "--device=nowhere",
        "--device=cuda:99",
    ],
)
def test_wrong_options(program, argument, capsys):
    assert error_of(program, [argument]) == "2"
    assert argument.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "more", [["--convert"], ["--optimizer=sgd", "--momentum=0.5", "--lr=0.01"]], ids=["adam", "sgd"]
)
def test_resumes_exactly(program, folder, tmp_path, more):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    history = program.main(tiny(folder, "--epochs=3", f"--checkpoint={whole}", *more))
    for epochs in (1, 2, 3):
        resumed = program.main(tiny(folder, f"--epochs={epochs}", f"--checkpoint={parts}", *more))
    assert resumed.losses == history.losses
    assert resumed.accuracy == history.accuracy
    states = [torch.load(path, weights_only=True) for path in (whole, parts)]
    assert states[0].pop("settings") == states[1].pop("settings")
    for state in states:
        del state["step_times"]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_an_interrupted_write_leaves_the_old_checkpoint(program, folder, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    program.main(tiny(folder, "--epochs=1", f"--checkpoint={path}"))
    before = path.read_bytes()

    def interrupted(state, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(program.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        program.main(tiny(folder, f"--checkpoint={path}"))
    assert path.read_bytes() == before


def test_checkpoint_errors(program, folder, tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("something else")
    assert error_of(program, tiny(folder, f"--checkpoint={path}")).startswith(f"error: {path}: not a checkpoint")
    path.unlink()
    nowhere = tmp_path / "nowhere" / "checkpoint.pt"
    assert error_of(program, tiny(folder, f"--checkpoint={nowhere}")) == f"error: {nowhere.parent}: no such folder"
    program.main(tiny(folder, "--epochs=1", f"--checkpoint={path}"))
    expected = f"error: {path}: saved with lr 0.001, but this run has 0.5"
    assert error_of(program, tiny(folder, f"--checkpoint={path}", "--lr=0.5")) == expected


def test_only_the_two_imports_differ():
    compare = load("compare")
    native, ours = (compare.load_program(native) for native in (True, False))
    assert native.nn is torch.nn
    assert native.optim is torch.optim
    assert ours.nn is fastnn.nn
    assert ours.optim is fastnn.optim


def test_comparison(folder, tmp_path):
    output = tmp_path / "results"
    command = [sys.executable, str(EXAMPLES / "compare.py"), f"--output={output}", *tiny(folder, "--epochs=1")]
    paths = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    results = json.loads((output / "results.json").read_text())
    assert list(results) == ["native", "fastnn", "converted"]
    for result in results.values():
        assert len(result["losses"]) == 3
        torch.testing.assert_close(result["losses"], results["native"]["losses"], rtol=1e-3, atol=1e-3)
        assert result["peak_memory"] > 0
    assert "2 fused" in done.stdout
    assert f"Loss curves and step times: {output / 'comparison.png'}" in done.stdout
    table = done.stdout[done.stdout.index("time a step") :]
    rows = [line.split() for line in table.splitlines()[2:5]]
    assert [row[0] for row in rows] == list(results)
    assert rows[0][-2:] == ["1.00x", "1.00x"]
    assert Image.open(output / "comparison.png").width > 1000


def test_comparison_stops_at_the_first_failure(tmp_path):
    command = [sys.executable, str(EXAMPLES / "compare.py"), f"--output={tmp_path}", f"--data={tmp_path / 'nothing'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {tmp_path / 'nothing'}: no such folder"
    assert "[2/3]" not in done.stdout

"""Checkpoints: which files a fit leaves, and which files are refused."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import perturbzoo
from perturbzoo.callbacks import BestAndLast
from perturbzoo.checkpoint import check_header, load, read_checkpoint
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError
from perturbzoo.models import find_model
from perturbzoo.models.base import SELECTION_METRIC, PerturbationModel
from perturbzoo.models.gears import GEARS

HELD_OUT = {"method": "explicit", "test": "G3+G4", "val": "G0+G1"}
NOTHING_HELD_OUT = {"method": "explicit", "test": "G3+G4"}


@pytest.fixture(scope="module")
def adata(make_adata: Callable[..., Any]) -> Any:
    return make_adata(cells_per_condition=15, n_controls=30)


def fit(
    adata: Any, root: Path, model: PerturbationModel | None = None, split: dict[str, Any] | None = None, **options: Any
) -> Trainer:
    seed_everything(0)
    data = PerturbSeqDataModule.from_anndata(adata, split=split or HELD_OUT, cells_per_condition=15)
    arguments = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "default_root_dir": root,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        **options,
    }
    trainer = Trainer(**arguments)
    trainer.fit(model or GEARS(hidden=4), data)
    return trainer


@pytest.fixture(scope="module")
def trained(adata: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    fit(adata, root)
    return root / "checkpoints/best.ckpt"


def edited(trained: Path, folder: Path, **header: Any) -> Path:
    """The trained checkpoint with some entries of its header changed."""
    checkpoint = read_checkpoint(trained)
    checkpoint["perturbzoo"] |= header
    file = folder / "edited.ckpt"
    torch.save(checkpoint, file)
    return file


# ---------------------------------------------------------------------------------------------- what a fit leaves


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"split": NOTHING_HELD_OUT},
        {"limit_val_batches": 0},
        {"check_val_every_n_epoch": 5},
        {"max_epochs": 1},
        {"model": "NoChange"},
        {"model": "Ridge", "max_epochs": 1, "limit_train_batches": 1},
        {"logger": "csv"},
        {"callbacks": "checkpoint"},
    ],
    ids=str,
)
def test_every_fit_leaves_best_and_last(adata: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    root, options = tmp_path / "root", dict(options)
    if "logger" in options:
        options["logger"] = CSVLogger(tmp_path / "elsewhere")
    if "callbacks" in options:
        options["callbacks"] = [ModelCheckpoint(dirpath=tmp_path / "own", filename="{epoch}", save_top_k=-1)]
    if "model" in options:
        options["model"] = find_model(options["model"])()
    trainer = fit(adata, root, **options)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.ckpt"))
    own = ["own/epoch=0.ckpt", "own/epoch=1.ckpt"] if "callbacks" in options else []
    assert found == [*own, "root/checkpoints/best.ckpt", "root/checkpoints/last.ckpt"]
    assert not list(tmp_path.rglob("*.part"))
    epochs = options.get("max_epochs", 2)
    assert read_checkpoint(root / "checkpoints/last.ckpt")["epoch"] == epochs - 1
    assert trainer.checkpoint_callbacks, "so that Lightning knows where the best one is"
    for name in ("best", "last"):
        assert type(load(root / f"checkpoints/{name}.ckpt")) is type(trainer.lightning_module)


def test_none_where_checkpoints_are_switched_off(adata: Any, tmp_path: Path) -> None:
    fit(adata, tmp_path, enable_checkpointing=False)
    fit(adata, tmp_path, fast_dev_run=True)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.1, 0.3, 0.2], 1),
        ([0.3, 0.3, 0.2], 0),  # a tie keeps the earlier
        ([None, None, None], 2),  # nothing to choose by: the latest
        ([None, 0.1, 0.0], 1),  # the first validation comes late
        ([0.2, None, 0.1], 0),
        ([np.nan, 0.1, np.nan], 1),
        ([-0.5, -0.2, -0.3], 1),
    ],
    ids=str,
)
def test_best_is_the_epoch_with_the_highest_score(tmp_path: Path, scores: list[float | None], best: int) -> None:
    """The rule alone: which epochs are kept, given what the trainer says their scores are."""

    class Epoch:
        fast_dev_run, is_global_zero, default_root_dir = False, True, str(tmp_path)

        def __init__(self, number: int) -> None:
            self.number = number
            score = scores[number]
            self.callback_metrics = {} if score is None else {SELECTION_METRIC: torch.tensor(score)}

        def save_checkpoint(self, path: Path, weights_only: bool) -> None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(str(self.number))

    callback: Any = BestAndLast()
    for number in range(len(scores)):
        callback.setup(Epoch(number), None, "fit")
        callback.on_train_epoch_end(Epoch(number), None)
        assert Path(callback.last_model_path).read_text() == str(number)
    assert Path(callback.best_model_path).read_text() == str(best)


def test_a_failed_write_keeps_the_earlier_checkpoints(tmp_path: Path) -> None:
    class Full:
        fast_dev_run, is_global_zero, default_root_dir = False, True, str(tmp_path)
        callback_metrics: dict[str, Any] = {}  # noqa: RUF012

        def save_checkpoint(self, path: Path, weights_only: bool) -> None:
            path.write_text("half")
            raise OSError(28, "No space left on device")

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.ckpt").write_text("earlier")
    callback: Any = BestAndLast()
    callback.setup(Full(), None, "fit")
    with pytest.raises(PerturbZooError, match=r"last\.ckpt: the checkpoint cannot be written: No space left on device"):
        callback.on_train_epoch_end(Full(), None)
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert (folder / "last.ckpt").read_text() == "earlier"


def test_best_can_be_tested_by_name(adata: Any, tmp_path: Path) -> None:
    trainer = fit(adata, tmp_path)
    trainer.test(datamodule=trainer.datamodule, ckpt_path="best")  # type: ignore[attr-defined]
    assert trainer.ckpt_path == str(tmp_path / "checkpoints/best.ckpt")


# ---------------------------------------------------------------------------------------------- what is in them


def test_a_checkpoint_holds_plain_values_only(adata: Any, tmp_path: Path) -> None:
    """Paths, NumPy's numbers and tuples are what Python users pass; ``weights_only`` would refuse the first two."""
    seed_everything(0)
    file = tmp_path / "screen.h5ad"
    adata.write_h5ad(file)
    data = PerturbSeqDataModule(file, split=HELD_OUT, min_cells=np.int64(5), covariates=())  # type: ignore[arg-type]
    trainer = Trainer(default_root_dir=tmp_path, max_epochs=1, logger=False, enable_progress_bar=False, accelerator="cpu")
    trainer.fit(GEARS(hidden=4, lr=np.float64(0.01)), data)  # type: ignore[arg-type]
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["perturbzoo"]["data"]["path"] == str(file)
    assert checkpoint["perturbzoo"]["data"]["covariates"] == []
    assert checkpoint["perturbzoo"]["arguments"]["lr"] == 0.01

    def check(value: Any) -> None:
        assert type(value) in (dict, list, tuple, str, int, float, bool, type(None), torch.Tensor) or isinstance(value, dict)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            check(part)

    check(checkpoint["perturbzoo"])
    check(checkpoint["hyper_parameters"])


def test_load_gives_the_model_of_the_last_epoch(adata: Any, tmp_path: Path) -> None:
    trainer = fit(adata, tmp_path)
    model, loaded = trainer.lightning_module, load(tmp_path / "checkpoints/last.ckpt")
    assert isinstance(loaded, GEARS)
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.get_spec().to_json() == model.get_spec().to_json()  # type: ignore[operator]
    assert perturbzoo.load(tmp_path / "checkpoints/last.ckpt").hparams == loaded.hparams


# ---------------------------------------------------------------------------------------------- what is refused


class Harmful:
    """Pickled, it would touch a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_pickled_object_is_refused(trained: Path, tmp_path: Path) -> None:
    checkpoint = {**read_checkpoint(trained), "object": Harmful(tmp_path / "touched")}
    torch.save(checkpoint, tmp_path / "harmful.ckpt")
    with pytest.raises(PerturbZooError, match=r"harmful\.ckpt: refused: it holds pickled objects"):
        load(tmp_path / "harmful.ckpt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(trained: Path, tmp_path: Path, share: float) -> None:
    content = trained.read_bytes()
    file = tmp_path / "short.ckpt"
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(PerturbZooError, match=r"short\.ckpt: not a readable checkpoint \(truncated or damaged\?\)"):
        load(file)


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"\x80\x02}q\x00.", b"\x00" * 100], ids=["empty", "text", "pickle", "zeros"]
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "note.ckpt"
    file.write_bytes(content)
    with pytest.raises(PerturbZooError, match=r"note\.ckpt: not a (readable|perturbzoo) checkpoint"):
        load(file)


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "archive.ckpt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(PerturbZooError, match=r"archive\.ckpt: not a readable checkpoint"):
        load(file)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(3), {"perturbzoo": {"schema": 1}}])
def test_other_peoples_checkpoints_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(PerturbZooError, match="not a perturbzoo checkpoint"):
        load(tmp_path / "other.ckpt")


def test_a_newer_version_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(PerturbZooError, match=r"written by perturbzoo 9\.1\.0 \(schema 99\).* up to schema 1: upgrade"):
        load(edited(trained, tmp_path, schema=99, version="9.1.0"))


def test_a_class_outside_the_zoo_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(PerturbZooError, match=r"no model 'os\.system' in the zoo"):
        load(edited(trained, tmp_path, **{"class": "os.system"}))


def test_weights_of_another_shape_are_refused(trained: Path, tmp_path: Path) -> None:
    arguments = {**read_checkpoint(trained)["perturbzoo"]["arguments"], "hidden": 5}
    with pytest.raises(PerturbZooError, match="its weights do not fit the GEARS it describes"):
        load(edited(trained, tmp_path, arguments=arguments))


def test_another_class_than_expected_is_refused(trained: Path) -> None:
    with pytest.raises(PerturbZooError, match="the checkpoint holds a GEARS, not a KNN"):
        check_header(read_checkpoint(trained), "KNN")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(PerturbZooError, match=r"gone\.ckpt: no such checkpoint"):
        load(tmp_path / "gone.ckpt")
    with pytest.raises(PerturbZooError, match="no such checkpoint"):
        load(tmp_path)

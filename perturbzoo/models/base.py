"""The contract every model of the zoo keeps: one class to subclass, three methods to write.

A model is constructed from hyper-parameters alone. Its sizes come from the data's :class:`~perturbzoo.data.spec.DataSpec`:
Lightning calls :meth:`PerturbationModel.setup`, which takes the spec from the data module and lets the model
:meth:`~PerturbationModel.prepare` what it fits in closed form (graphs, pseudobulks), then ``configure_model``, which lets it
:meth:`~PerturbationModel.build` its layers. A checkpoint holds spec and prepared tensors, so that it can be loaded alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import perturbzoo
from perturbzoo.checkpoint import check_header, load, plain_values
from perturbzoo.data.batch import ConditionTable, PerturbationBatch, encode_conditions
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.data.spec import DataSpec
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, shortened
from perturbzoo.evaluation.calibration import conformal_scale
from perturbzoo.evaluation.pseudobulk import Pseudobulks, PseudobulkSums

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

CHECKPOINT_SCHEMA = 1
SELECTION_METRIC = "val/pearson_delta"


@dataclass
class Prediction:
    """What a model says of each cell of a batch.

    Attributes
    ----------
    mean
        Shape ``(B, G)``: expected log1p-normalised expression, E[log1p x] and not log1p E[x].
    variance
        Shape ``(B, G)``: squared standard error of the predicted change, or None.
    """

    mean: Tensor
    variance: Tensor | None = None


def _own(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters without the entries the command line adds for itself."""
    return {name: plain_values(value) for name, value in hparams.items() if not name.startswith("_")}


class PerturbationModel(LightningModule):
    """Base class of the zoo.

    A subclass calls ``self.save_hyperparameters()`` in its constructor and writes :meth:`build`, :meth:`forward`,
    :meth:`loss` and ``configure_optimizers``; :meth:`prepare` if it computes anything from the training cells.
    """

    differentiates_in_forward: ClassVar[bool] = False
    """Whether ``forward`` needs gradients; such a model runs outside inference mode in validate, test and predict."""

    handles_time: ClassVar[bool] = False
    """Whether the model makes use of an intervention's onset and offset."""

    variance_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        # makes the intervals cover what they say on the validation conditions; fitted there in every validation of a fit
        self.register_buffer("variance_scale", torch.ones(()))
        self.spec: DataSpec | None = None
        self.prepared: dict[str, Any] = {}
        self.test_table: pd.DataFrame | None = None
        self.test_bulks: Pseudobulks | None = None
        self._built = False
        self._source: tuple[str, PerturbationModel] | None = None
        # of the data module it was trained on, for what a spec does not hold: names of columns, filters
        self.data_arguments: dict[str, Any] = {}
        self._val_sums: PseudobulkSums | None = None
        self._test_sums: PseudobulkSums | None = None

    # ------------------------------------------------------------------ what a model writes

    def prepare(self, data: PerturbSeqDataModule) -> dict[str, Any]:
        """Compute what :meth:`build` needs from the training cells; kept in the checkpoint.

        Returns
        -------
        Tensors, strings, numbers, and dicts and lists of them.
        """
        return {}

    def build(self) -> None:
        """Create the layers from ``self.hparams``, ``self.spec`` and ``self.prepared``."""
        raise NotImplementedError

    def forward(self, batch: PerturbationBatch) -> Prediction:
        """Predict the expression of each control cell of the batch under its condition."""
        raise NotImplementedError

    def loss(self, batch: PerturbationBatch) -> dict[str, Tensor]:
        """The terms of the training loss; their sum is minimised and each is logged under its name."""
        raise NotImplementedError

    @property
    def handles_dose(self) -> bool:
        """Whether a dose above 0 makes a difference; where not, fit and prediction say so."""
        return True

    @property
    def changes_cells_alike(self) -> bool:
        """Whether all cells of a condition and context get one change, by :meth:`delta`: computed once, however many cells."""
        return False

    def delta(self, table: ConditionTable, context_control: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predict the change of each pair, for a model that :attr:`changes_cells_alike`.

        Parameters
        ----------
        table
            C pairs.
        context_control
            Shape ``(C, G)``: mean control profile of each pair's context.

        Returns
        -------
        delta
            Shape ``(C, G)``: expected change of expression.
        variance
            Shape ``(C, G)``: squared standard error of it, or None.
        """
        raise NotImplementedError

    def parameter_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Which axes of which parameters run over ``"gene"`` or ``"target"``: how weights move to another screen."""
        return {}

    @property
    def predicts_variance(self) -> bool:
        """Whether predictions come with a variance."""
        return False

    @property
    def target_names(self) -> tuple[str, ...]:
        """Names of the targets the model can be asked about, in the order of its target axis; the spec's come first."""
        return self.get_spec().targets

    # ------------------------------------------------------------------ building

    def get_spec(self) -> DataSpec:
        """The data spec; an error where the model has none yet."""
        if self.spec is None:
            raise PerturbZooError(
                f"{type(self).__name__} has seen no data yet: fit it with a PerturbSeqDataModule or load a checkpoint"
            )
        return self.spec

    @property
    def data(self) -> PerturbSeqDataModule:
        """The trainer's data module."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PerturbSeqDataModule):
            raise PerturbZooError(
                f"{type(self).__name__} needs a PerturbSeqDataModule: trainer.{self.trainer.state.fn}(model, datamodule=...)"
            )
        return data

    def setup(self, stage: str) -> None:
        data = self.data
        assert data.spec is not None
        if stage == "fit" or self.spec is None:
            self.data_arguments = _own(data.hparams)
        if stage == "fit":
            self.train()  # a loaded model is in evaluation mode, in which it would not learn what dropout teaches
        if self.trainer.ckpt_path is not None:
            return  # spec and prepared tensors come from the checkpoint
        if self.spec is None:
            self.spec = data.spec
            self._say_if_doses_are_lost(data)
            self.prepared = self.prepare(data)
        else:
            self._match_data(stage)

    def _say_if_doses_are_lost(self, data: PerturbSeqDataModule) -> None:
        training = data.table.select(torch.from_numpy(data.pairs_of("train")))
        doses = training.dose[training.present & (training.dose > 0)].unique().tolist()
        if len(doses) > 1 and not self.handles_dose and self.trainer.is_global_zero:
            listed = shortened([f"{dose:g}" for dose in doses])
            message = f"{type(self).__name__} has no doses as it is set up: conditions at doses {listed} count as the same"
            warnings.warn(message, PerturbZooWarning, stacklevel=2)

    def _match_data(self, stage: str) -> None:
        """Make the data module read its cells the way this model's data were read."""
        spec, data = self.get_spec(), self.data
        assert data.spec is not None
        if data.spec.to_json() != spec.to_json():
            if stage == "fit":
                raise PerturbZooError(
                    f"this {type(self).__name__} was trained on other data: training can go on with the same data only; for "
                    "new data make a new model and initialise it from the checkpoint (--init_from)"
                )
            data.use_spec(spec)
            data.setup(stage)
        # the file may name targets that its split did not: they are counted the model's way, or refused by name
        context = data.table.context.tolist()
        data.table = encode_conditions(data.conditions, context, self.target_names, spec.default_kind)

    def configure_model(self) -> None:
        if self.spec is None or self._built:
            return
        self.build()
        self._built = True
        if self._source is not None:
            from perturbzoo.models.initialisation import take_weights

            take_weights(self, *self._source)
            self._source = None

    def initialise_from(self, path: str) -> None:
        """Start from another model's weights when layers are built: genes and targets are matched by name.

        Parameters
        ----------
        path
            A checkpoint of the same class, maybe of another screen.

        Raises
        ------
        PerturbZooError
            The checkpoint holds another class.
        """
        source = load(path)
        if type(source) is not type(self):
            raise PerturbZooError(
                f"{path} holds a {type(source).__name__}: a {type(self).__name__} cannot start from its weights"
            )
        self._source = (path, source)

    def configure_callbacks(self) -> list[Callback]:
        from perturbzoo.callbacks import default_callbacks

        return default_callbacks(self.trainer)

    # ------------------------------------------------------------------ training and validation

    def training_step(self, batch: PerturbationBatch, batch_idx: int) -> Tensor:
        terms = self.loss(batch)
        total = torch.stack(list(terms.values())).sum()
        named = {f"train/{name}": value.detach() for name, value in terms.items()}
        size = len(batch)
        self.log_dict(named, batch_size=size, on_step=False, on_epoch=True, sync_dist=True)
        self.log("train/loss", total.detach(), batch_size=size, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        return total

    def evaluate(self, batch: PerturbationBatch) -> Prediction:
        """``forward`` as validation, test and prediction call it: outside inference mode for a model that differentiates."""
        if self.differentiates_in_forward:
            with torch.inference_mode(False), torch.enable_grad():
                prediction = self(batch.clone())
        else:
            prediction = self(batch)
        variance = None if prediction.variance is None else prediction.variance.detach() * self.variance_scale
        return Prediction(prediction.mean.detach(), variance)

    def calibrate(self, bulks: Pseudobulks) -> Pseudobulks:
        """Fit to the validation pseudobulks what is fitted there, and return them as they are predicted with it.

        Here: the scale of predicted variances, by split conformal prediction.
        """
        if bulks.predicted_variance is None:
            return bulks
        self.variance_scale.fill_(conformal_scale(bulks))
        return replace(bulks, predicted_variance=bulks.predicted_variance * float(self.variance_scale))

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == "fit":
            # what calibrate() fits is fitted to predictions without it
            self.variance_scale.fill_(1.0)
        self._val_sums = self._new_sums()

    def validation_step(self, batch: PerturbationBatch, batch_idx: int) -> None:
        self._add(self._val_sums, batch)

    def on_validation_epoch_end(self) -> None:
        from perturbzoo.models.testing import validation_scores

        assert self._val_sums is not None
        bulks = self._val_sums.compute()
        if self.trainer.state.fn == "fit":
            bulks = self.calibrate(bulks)
        scores = validation_scores(self.data, bulks)
        # the sums were already reduced over ranks: every rank logs the same numbers, which their mean leaves as they are
        for name, value in scores.items():
            shown = name in ("pearson_delta", "pearson_delta_perturbed_reference", "mse")
            mean = torch.tensor(value, dtype=torch.float32)
            self.log(f"val/{name}", mean, batch_size=len(bulks), prog_bar=shown, sync_dist=True)
        self._val_sums = None

    def _new_sums(self) -> PseudobulkSums:
        data = self.data
        return PseudobulkSums(data.control_mean, data.index.context_of_pair, self.predicts_variance).to(self.device)

    def _add(self, sums: PseudobulkSums | None, batch: PerturbationBatch) -> None:
        assert sums is not None
        prediction = self.evaluate(batch)
        sums.update(batch.table.pair[batch.row], prediction.mean, batch.control, batch.observed, prediction.variance)

    # ------------------------------------------------------------------ test and prediction

    def on_test_epoch_start(self) -> None:
        self._test_sums = self._new_sums()

    def test_step(self, batch: PerturbationBatch, batch_idx: int) -> None:
        self._add(self._test_sums, batch)

    def on_test_epoch_end(self) -> None:
        from perturbzoo.models.testing import report_test

        assert self._test_sums is not None
        self.test_bulks = self._test_sums.compute()
        self.test_table = report_test(self, self.test_bulks, self.data)
        self._test_sums = None

    def predict_step(self, batch: PerturbationBatch, batch_idx: int) -> Prediction:
        return self.evaluate(batch)

    def predict(self, controls: AnnData, conditions: Any, **options: Any) -> AnnData:
        """Predict control cells under conditions nobody measured; see :func:`perturbzoo.prediction.predict`."""
        from perturbzoo.prediction import predict

        return predict(self, controls, conditions, **options)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in ("hyper_parameters", "datamodule_hyper_parameters", "optimizer_states", "lr_schedulers"):
            if name in checkpoint:
                checkpoint[name] = plain_values(checkpoint[name])
        checkpoint["perturbzoo"] = {
            "schema": CHECKPOINT_SCHEMA,
            "version": perturbzoo.__version__,
            "class": type(self).__name__,
            "arguments": _own(self.hparams),
            "spec": self.get_spec().to_json(),
            "prepared": self.prepared,
            "data": self.data_arguments,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        header = check_header(checkpoint, type(self).__name__)
        if not (self._built and self.get_spec().to_json() == header["spec"]):
            self.spec, self.prepared = DataSpec.from_json(header["spec"]), header["prepared"]
            self._built = False
            self.configure_model()
        if self._trainer is None or self.trainer.state.fn != "fit":
            self.data_arguments = header["data"]
        if self._trainer is not None:
            stage = self.trainer.state.fn
            self._match_data("fit" if stage is None else stage.value)


class ConditionDeltaModel(PerturbationModel):
    """A model whose predicted change depends on condition and context only: a subclass writes :meth:`delta`."""

    @property
    def changes_cells_alike(self) -> bool:
        return True

    def forward(self, batch: PerturbationBatch) -> Prediction:
        delta, variance = self.delta(batch.table, batch.context_control)
        return Prediction(batch.control + delta[batch.row], None if variance is None else variance[batch.row])

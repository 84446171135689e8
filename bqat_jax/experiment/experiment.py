"""The objects that a config describes, made before any data is read or computed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import rich.console

from bqat_jax.analysis.measurement import DiagnosisSettings
from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.data.preprocessing import Augmentation
from bqat_jax.data.sources import ImageData
from bqat_jax.distributed.replicas import Replicas
from bqat_jax.distributed.sharding import Placement
from bqat_jax.replacement.objective import Objective
from bqat_jax.replacement.plans import Plan
from bqat_jax.replacement.tasks import Task
from bqat_jax.storage import Hold, KeptArrays, Place
from bqat_jax.training.optimizer import OptimizerSpec
from bqat_jax.training.regularizers import Regularizers
from bqat_jax.training.strengths import TraceSettings
from bqat_jax.transform import Layers
from bqat_jax.transform.rules import LayerSettings


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Reading, normalisation and augmentation of images.

    Attributes:
        images: the opened dataset.
        batch_size: training batch size.
        on_device: whether complete splits are stored on the device.
        workers: processes that decode images.
        skips_damaged: whether unreadable examples are skipped.
        mean: channel means for a partner that is trained here, or whose file does not specify its own.
        std: channel standard deviations for that partner.
        augmentation: augmentation of training images.
        kept: cache of decoded splits and converted weights; None for no cache.
    """

    images: ImageData
    batch_size: int
    on_device: bool
    workers: int
    skips_damaged: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    kept: KeptArrays | None = None


@dataclasses.dataclass(frozen=True)
class PhaseSpec:
    """One phase of training.

    Attributes:
        steps: number of steps.
        optimizer: its optimizer.
    """

    steps: int
    optimizer: OptimizerSpec


@dataclasses.dataclass(frozen=True)
class PartnerSource:
    """The source of the partner: `torch_file`, `workdir`, or training if both are None.

    Attributes:
        network_name: name of the network, which selects the rules for PyTorch names.
        torch_file: a file of PyTorch weights.
        workdir: workdir of an earlier run.
        torch_key: dotted entry of the file; None to find it.
        new_head: whether to load all but the classifier from the file and train the partner from there.
        network_options: options of the network.
    """

    network_name: str
    torch_file: str | None
    workdir: Place | None
    torch_key: str | None
    new_head: bool
    network_options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class InitSource:
    """The start of the low-precision network.

    Attributes:
        workdir: workdir of another run, whose selected checkpoint is used; None for the partner.
        keeps_quantizers: whether that run's quantizers are used instead of calibrated ones.
    """

    workdir: Place | None
    keeps_quantizers: bool


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Steps between the actions of a training loop; 0 for never.

    Attributes:
        log: steps between records of metrics.
        save: steps between checkpoints.
        measure: steps between measurements of the strengths of estimators that need one.
        diagnose: steps between diagnoses.
        traced: the first and the last step to trace, counted from 1.
    """

    log: int
    save: int
    measure: int
    diagnose: int
    traced: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The experiment that a config describes.

    Attributes:
        config: the config as JSON; a resumed run must match it.
        method: the entries of `result.json` that come from the config.
        workdir: folder of all files that the run writes.
        hold: exclusive write access to the workdir.
        console: where progress is shown.
        plugins: plugin files that were loaded.
        seeds: one seed for each low-precision network trained in parallel; the partner uses the first.
        placement: the mesh, and how arrays are sharded over it.
        data: the dataset.
        network: the network, divided into blocks.
        shapes: shapes, dtypes and shardings of its variables.
        layers: its layers.
        quantizers: the settings of every layer's quantizers.
        plan: the replacement plan.
        objective: the training objective.
        regularizers: dampening and freezing of oscillating weights.
        draw_seed: seed of the plan's random draws.
        microbatches: parts that a batch is split into.
        batch_norm_groups: groups that batch norm normalises separately.
        calibration_batches: batches that quantizers are calibrated on.
        reestimation_batches: batches that batch-norm statistics are re-estimated on after training; 0 for none.
        partner: the training of the partner.
        partner_source: source of the partner if it is not trained.
        init: start of the low-precision network.
        training: the training of the low-precision network.
        intervals: steps between logs, checkpoints, measurements and diagnoses.
        kept_checkpoints: number of the newest checkpoints to keep.
        trace: settings of the measurement of estimators' strengths.
        diagnosis: the size of a diagnosis.
    """

    config: Mapping[str, Any]
    method: Mapping[str, Any]
    workdir: Place
    hold: Hold
    console: rich.console.Console
    plugins: tuple[Place, ...]
    seeds: range
    placement: Placement
    data: DataSpec
    network: BlockNetwork
    shapes: Any
    layers: Layers
    quantizers: Mapping[str, LayerSettings]
    plan: Plan
    objective: Objective
    regularizers: Regularizers
    draw_seed: int
    microbatches: int
    batch_norm_groups: int
    calibration_batches: int
    reestimation_batches: int
    partner: PhaseSpec
    partner_source: PartnerSource
    init: InitSource
    training: PhaseSpec
    intervals: Intervals
    kept_checkpoints: int
    trace: TraceSettings
    diagnosis: DiagnosisSettings

    @property
    def task(self) -> Task:
        """The objective's task."""
        return self.objective.task

    @property
    def single(self) -> Replicas:
        """One network on all devices."""
        return Replicas(1, self.placement)

    @property
    def replicas(self) -> Replicas:
        """The low-precision networks that are trained in parallel."""
        return Replicas(len(self.seeds), self.placement)

    @property
    def network_description(self) -> dict[str, Any]:
        """The network as JSON; two runs must agree on it to share a partner."""
        images = self.data.images
        name = 'length' if images.is_tokens else 'image_shape'
        return {**self.config['network'], name: list(images.image_shape), 'num_classes': images.num_classes}

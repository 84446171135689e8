"""What a config describes, as objects: decided before any data is read and anything is computed."""

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
    """How images are read and what happens to them.

    Attributes:
        images: the opened dataset.
        batch_size: of training.
        on_device: whether whole splits live on the device.
        workers: processes that decode images.
        skips_damaged: whether examples that cannot be read are skipped.
        mean: normalisation of a partner that is trained here, or whose file does not say its own.
        std: of the same.
        augmentation: of training images.
        kept: where decoded splits and converted weights are kept for later starts; None for nowhere.
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
        steps: how many.
        optimizer: of the phase.
    """

    steps: int
    optimizer: OptimizerSpec


@dataclasses.dataclass(frozen=True)
class PartnerSource:
    """Where the partner comes from; at most one of the two is given, and with neither it is trained.

    Attributes:
        network_name: of the network, by which the names of its PyTorch parameters are known.
        torch_file: a file of PyTorch weights.
        workdir: of an earlier run.
        torch_key: the entry of the file, dotted; None to find it.
        new_head: whether all but the classifier is taken from the file, and the partner is trained from there.
        network_options: of the network.
    """

    network_name: str
    torch_file: str | None
    workdir: Place | None
    torch_key: str | None
    new_head: bool
    network_options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class InitSource:
    """What the low-precision network starts from.

    Attributes:
        workdir: of another run, whose selected checkpoint it is; None for the partner.
        keeps_quantizers: whether the quantizers are taken from there too, instead of being calibrated.
    """

    workdir: Place | None
    keeps_quantizers: bool


@dataclasses.dataclass(frozen=True)
class Intervals:
    """What a training loop does every so many steps, 0 for never.

    Attributes:
        log: records metrics.
        save: saves a checkpoint.
        measure: measures the strengths of estimators that need one.
        diagnose: diagnoses the network.
        traced: the first and the last step to trace, counted from 1.
    """

    log: int
    save: int
    measure: int
    diagnose: int
    traced: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config describes.

    Attributes:
        config: the config as JSON, by which a workdir is known again.
        method: what `result.json` says of the config.
        workdir: where everything goes that the run leaves.
        hold: that this run alone writes there.
        console: where progress is shown.
        plugins: the user's files that were run.
        seeds: of the low-precision networks that are trained side by side; a single run has the first.
        placement: the devices, and where arrays lie on them.
        data: the dataset.
        network: the network, divided into blocks.
        shapes: shapes, dtypes and shardings of its variables.
        layers: its layers.
        quantizers: the settings of every layer's quantizers.
        plan: the replacement plan.
        objective: what is minimised.
        regularizers: what is done about oscillating weights.
        draw_seed: of what the plan draws.
        microbatches: parts that a batch is run in.
        batch_norm_groups: parts that batch norm normalises apart.
        calibration_batches: batches that quantizers are calibrated on.
        reestimation_batches: batches that batch-norm statistics are estimated on after training; 0 for none.
        partner: the training of the partner.
        partner_source: where the partner comes from otherwise.
        init: what the low-precision network starts from.
        training: its training.
        intervals: what the training loop does how often.
        kept_checkpoints: how many of the newest are kept.
        trace: how the strengths of estimators are measured.
        diagnosis: how much is measured by a diagnosis.
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
        """A single run on all devices."""
        return Replicas(1, self.placement)

    @property
    def replicas(self) -> Replicas:
        """The low-precision networks that are trained side by side."""
        return Replicas(len(self.seeds), self.placement)

    @property
    def network_description(self) -> dict[str, Any]:
        """The network as JSON: what two runs must share for one to take the other's partner."""
        images = self.data.images
        name = 'length' if images.is_tokens else 'image_shape'
        return {**self.config['network'], name: list(images.image_shape), 'num_classes': images.num_classes}

"""Opens a trained run: its partner and the selected checkpoint of its low-precision network."""

from typing import Any, NamedTuple

import ml_collections
import rich.console

from bqat_jax.blocks.block_network import BATCH_STATS
from bqat_jax.data.pipeline import Split
from bqat_jax.errors import UserError
from bqat_jax.experiment.checkpoints import Restored
from bqat_jax.experiment.configuration import Config, changed_keys, completed
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.experiment.low_precision import QUANTIZERS_FILE, Start, low_precision_phase, read_quantization
from bqat_jax.experiment.partner import Partner, load_partner
from bqat_jax.experiment.phase import Phase
from bqat_jax.experiment.reading import training_batches
from bqat_jax.experiment.run_phase import open_checkpoints
from bqat_jax.experiment.setup import make_experiment
from bqat_jax.experiment.streams import Stream
from bqat_jax.experiment.workdir import CONFIG, check_config, check_is_run
from bqat_jax.storage import Place, check_listed, read_json
from bqat_jax.training.reestimation import reestimate_batch_stats


class Finished(NamedTuple):
    """A trained network, ready to be evaluated.

    Attributes:
        partner: its partner.
        phase: the phase that trained it.
        restored: the selected checkpoint.
    """

    partner: Partner
    phase: Phase
    restored: Restored


def open_run(config: Config, workdir: Place, console: rich.console.Console) -> tuple[Experiment, Finished]:
    """Returns the experiment of a workdir and the selected checkpoint of its low-precision network.

    Args:
        config: the run's config.
        workdir: the run's workdir.
        console: where progress is shown.

    Raises:
        UserError: if the workdir holds no run of this config, or its checkpoint cannot be read.
    """
    check_is_run(workdir)
    experiment = make_experiment(config, workdir, console)
    check_config(experiment)
    partner = load_partner(experiment, workdir)
    if partner is None:
        raise UserError(f'{workdir} holds no finished partner yet: train first (--mode=train).')
    phase = low_precision_phase(experiment, partner, read_quantization(experiment))
    restored = None
    if phase.directory.is_dir():
        with open_checkpoints(experiment, phase.directory, read_only=True) as checkpoints:
            restored = checkpoints.restore_selected(phase.state_shapes)
    if restored is None:
        raise UserError(f'{workdir} holds no checkpoint of the low-precision network yet: train first (--mode=train).')
    return experiment, Finished(partner, phase, restored)


def collections_to_evaluate(experiment: Experiment, finished: Finished, train: Split | None) -> dict[str, Any]:
    """Returns the collections that the selected checkpoint is evaluated with, of all replicas.

    They are the checkpoint's. With `quant.reestimation_batches` the batch-norm statistics are re-estimated; every call
    uses one order of batches.

    Args:
        experiment: the experiment.
        finished: its trained network.
        train: the training split; None if nothing is re-estimated.
    """
    collections, count = finished.restored.state.collections, experiment.reestimation_batches
    if not count:
        return collections
    assert train is not None
    experiment.console.print(f'Estimating batch-norm statistics on {count} batches.')
    phase, state = finished.phase, finished.restored.state
    batches = training_batches(experiment, train, Stream.REESTIMATION, phase.replicas, 0, count)
    return {
        **collections,
        BATCH_STATS: reestimate_batch_stats(phase.spec, state, train.arrays, batches, phase.replicas),
    }


def find_start(experiment: Experiment, partner: Partner) -> Start:
    """Returns what the low-precision network starts from: its partner, or the network of the run in `init.workdir`.

    Raises:
        UserError: if that run's network or normalization differs, or its quantizers are to be kept and differ.
    """
    source = experiment.init
    if source.workdir is None:
        return Start(partner.variables, None, None)
    check_listed(source.workdir, 'init.workdir')
    config = _config_of(source.workdir, experiment)
    other, (other_partner, phase, restored) = open_run(config, source.workdir, experiment.console)
    where = f'init.workdir={str(source.workdir)!r}'
    changes = changed_keys(other.network_description, experiment.network_description)
    then, now = ({key: one.facts[key] for key in ('mean', 'std')} for one in (other_partner, partner))
    changes += changed_keys(then, now)
    if changes:
        raise UserError(f'{where}: its network is not that of this config (there -> here): {"; ".join(changes)}.')
    state = phase.replicas.first(restored.state)
    experiment.console.print(f'Starting from step {restored.step} of {source.workdir}.')
    variables = state.variables.of_network
    if not source.keeps_quantizers:
        return Start(variables, None, None)
    return Start(variables, state.variables.quantizers, read_json(source.workdir / QUANTIZERS_FILE))


def _config_of(workdir: Place, experiment: Experiment) -> Config:
    """The config of another run, on the devices and with the data folder of this one."""
    check_is_run(workdir)
    config: Config = ml_collections.ConfigDict(completed(read_json(workdir / CONFIG), workdir))
    own = experiment.config
    config.mesh = ml_collections.ConfigDict(own['mesh'])
    for key in ('dir', 'cache_dir', 'cache_gb', 'workers', 'on_device'):
        config.data[key] = own['data'][key]
    return config

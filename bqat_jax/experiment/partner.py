"""The full-precision partner: finds, imports or trains it, and stores it in the workdir."""

from pathlib import PurePosixPath
from typing import Any, NamedTuple

import jax

from bqat_jax.blocks.block_network import other_collections
from bqat_jax.data.preprocessing import Preprocessing, TokenPreprocessing
from bqat_jax.distributed.preemption import StopRequest
from bqat_jax.distributed.processes import agree
from bqat_jax.errors import UserError
from bqat_jax.experiment.checkpoints import Checkpoints
from bqat_jax.experiment.configuration import changed_keys
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.experiment.import_torch import import_torch, with_new_classifier
from bqat_jax.experiment.phase import Phase
from bqat_jax.experiment.reading import Data
from bqat_jax.experiment.run_phase import run_phase
from bqat_jax.experiment.streams import Stream, random_key
from bqat_jax.replacement.block_replacement import BlockReplacement
from bqat_jax.replacement.objective import task_alone
from bqat_jax.replacement.paths import Variables
from bqat_jax.replacement.plans import Plan
from bqat_jax.storage import COMMIT_FILE, Place, check_listed, read_json, write_once
from bqat_jax.training.spec import TrainSpec
from bqat_jax.transform import FULL_PRECISION

# In a workdir: partner/final is the finished partner, partner/checkpoints its training; partner/partner.json describes
# it and is written last.
DIRECTORY, FACTS = 'partner', 'partner.json'
TRAINING = f'{DIRECTORY}/checkpoints'


class Partner(NamedTuple):
    """A finished partner.

    Attributes:
        variables: {'params': ..., 'batch_stats': ...}.
        facts: 'network' (its description), 'mean' and 'std' (the normalisation of its inputs), 'source'.
    """

    variables: Any
    facts: dict[str, Any]


def find_partner(experiment: Experiment) -> Partner | None:
    """Returns the workdir's partner, or that of `partner.workdir` or `partner.torch_file`; None if it must be trained.

    An imported partner is stored in the workdir. With `partner.new_head` it must be trained first; the file is still
    checked here, before any data is read.

    Raises:
        UserError: if the source has no partner that fits.
    """
    partner = load_partner(experiment, experiment.workdir)
    if partner is not None:
        return partner
    source = experiment.partner_source
    if source.workdir is not None:
        partner = _take_from_workdir(experiment, source.workdir)
    elif source.torch_file is not None:
        partner = _import_from_torch(experiment)
    return None if partner is None else _keep(experiment, partner)


def pretrain_partner(experiment: Experiment, data: Data, stop: StopRequest) -> Partner:
    """Trains the partner in full precision on labels alone, and stores it in the workdir.

    It starts from random weights, or, with `partner.new_head`, from those of `partner.torch_file`.

    Raises:
        UserError: for the reasons of `run_phase`, or if the file cannot be read or does not fit.
        Stopped: after a request to stop.
    """
    facts = _new_facts(experiment)
    phase = Phase(
        name='pretrain',
        stream=Stream.PARTNER_TRAINING,
        spec=partner_spec(experiment, facts),
        optimizer=experiment.partner.optimizer,
        partner=None,
        shapes=Variables(experiment.shapes['params'], {}, other_collections(experiment.shapes)),
        directory=experiment.workdir / TRAINING,
        replicas=experiment.single,
    )

    def init(_):
        # Each device initialises its own shards: a large tree may not fit on one device.
        shardings = experiment.placement.shardings(experiment.shapes)
        make = jax.jit(lambda key: experiment.network.init(key), out_shardings=shardings)
        variables = make(random_key(experiment.seeds[0], Stream.PARTNER_INIT))
        if experiment.partner_source.new_head:
            variables = with_new_classifier(experiment, variables)
        return Variables(variables['params'], {}, other_collections(variables))

    variables = run_phase(experiment, phase, data, init, stop).state.variables
    trained = variables.of_network
    source = f'trained for {phase.spec.steps} steps'
    if experiment.partner_source.new_head:
        source += f' from PyTorch file {PurePosixPath(experiment.partner_source.torch_file or "").name} with a new head'
    return _keep(experiment, Partner(trained, {**facts, 'source': source}))


def partner_spec(experiment: Experiment, facts: dict[str, Any]) -> TrainSpec:
    """Returns the training of the partner: in full precision, on labels alone.

    Args:
        experiment: the experiment.
        facts: the partner's facts; its normalisation is used.
    """
    return TrainSpec(
        replacement=BlockReplacement(
            experiment.network,
            FULL_PRECISION,
            Plan('none', len(experiment.network.blocks)),
            task_alone(experiment.objective.task),
        ),
        prepare=make_preprocessing(experiment, facts),
        steps=experiment.partner.steps,
        microbatches=experiment.microbatches,
        batch_norm_groups=experiment.batch_norm_groups,
    )


def make_preprocessing(experiment: Experiment, facts: dict[str, Any]) -> Preprocessing | TokenPreprocessing:
    """Returns the preprocessing for a partner and for the low-precision network that starts from it."""
    if experiment.data.images.is_tokens:
        return TokenPreprocessing()
    return Preprocessing(tuple(facts['mean']), tuple(facts['std']), experiment.data.augmentation)


def load_partner(experiment: Experiment, workdir: Place) -> Partner | None:
    """Returns the finished partner of a workdir, or None if it has none.

    Raises:
        UserError: if it is not the config's network, or is damaged.
    """
    path = workdir / DIRECTORY / FACTS
    if not agree(path.is_file()):
        return None
    facts = read_json(path, network=dict, mean=list, std=list, source=str)
    changes = changed_keys(facts['network'], experiment.network_description)
    if changes:
        listed = '; '.join(changes)
        raise UserError(f'The partner in {workdir} is not the network of this config (there -> here): {listed}.')
    with Checkpoints(workdir / DIRECTORY / 'final', read_only=True) as checkpoints:
        restored = checkpoints.restore_selected(
            experiment.shapes, f'Move {workdir / DIRECTORY} away to train or import the partner again.'
        )
    if restored is None:  # a run writes the checkpoint before partner.json
        raise UserError(
            f'{path} describes a partner, but {path.parent / "final"} holds no finished checkpoint: it was copied in '
            f'part, or to a bucket without its files {COMMIT_FILE}. Copy it again with all files, or move '
            f'{path.parent} away to train or import the partner again.'
        )
    return Partner(restored.state, facts)


def _take_from_workdir(experiment: Experiment, workdir: Place) -> Partner:
    check_listed(workdir, 'partner.workdir')
    partner = load_partner(experiment, workdir)
    if partner is None:
        raise UserError(
            f'{workdir}, the source of the partner, holds no finished partner (no {DIRECTORY}/{FACTS} in it). '
            'Finish that run, or set partner.workdir or partner.torch_file.'
        )
    return partner._replace(facts={**partner.facts, 'source': f'workdir {workdir}'})


def _import_from_torch(experiment: Experiment) -> Partner | None:
    """The partner from the file; None if it must be trained first."""
    new_head = experiment.partner_source.new_head
    if new_head and agree((experiment.workdir / TRAINING).is_dir()):
        return None  # its training resumes without the file
    variables, source = import_torch(experiment)
    if new_head:
        return None
    return Partner(experiment.placement.put(variables), {**_new_facts(experiment), 'source': source})


def _new_facts(experiment: Experiment) -> dict[str, Any]:
    """Facts of a partner with the config's normalisation: a PyTorch file does not specify one."""
    mean, std = list(experiment.data.mean), list(experiment.data.std)
    return {'network': experiment.network_description, 'mean': mean, 'std': std}


def _keep(experiment: Experiment, partner: Partner) -> Partner:
    """Stores a partner in the workdir."""
    directory = experiment.workdir / DIRECTORY
    experiment.hold.check()
    with Checkpoints(directory / 'final') as checkpoints:
        if checkpoints.latest_step is None:  # else the process was killed between these two files
            checkpoints.save(0, partner.variables, {})
            checkpoints.wait()
    experiment.hold.check()
    write_once(directory / FACTS, partner.facts)
    experiment.console.print(f'Partner: {partner.facts["source"]}.')
    return partner

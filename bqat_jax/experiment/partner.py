"""The full-precision partner: where it comes from, and how it is kept in the workdir."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from bqat_jax.distributed.preemption import StopRequest
from bqat_jax.distributed.processes import agree, write_once
from bqat_jax.errors import UserError
from bqat_jax.experiment.checkpoints import Checkpoints
from bqat_jax.experiment.configuration import changed_keys
from bqat_jax.experiment.experiment import Setting
from bqat_jax.experiment.loop import Phase, run_phase
from bqat_jax.networks.torch_weights import NAME_RULES, import_state_dict, read_state_dict
from bqat_jax.replacement.block_replacement import BlockReplacement
from bqat_jax.replacement.objective import Objective
from bqat_jax.replacement.plans import Plan
from bqat_jax.storage import read_json
from bqat_jax.training.optimizer import NETWORK, QUANTIZERS
from bqat_jax.training.step import Problem
from bqat_jax.transform import FULL_PRECISION

# In a workdir: partner/final is the finished partner, partner/checkpoints its training, partner/partner.json says what
# it is, and is written last.
DIRECTORY, FACTS = 'partner', 'partner.json'
# Numbers of this phase's uses of randomness; see `Setting.key`.
INIT, PRETRAIN = 0, 1


@dataclasses.dataclass(frozen=True)
class Partner:
    """A finished partner.

    Attributes:
        variables: {'params': ..., 'batch_stats': ...}.
        facts: 'network' (its description), 'mean' and 'std' (the normalisation that belongs to its weights), 'source'.
    """

    variables: Any
    facts: dict[str, Any]

    def problem(self, setting: Setting) -> Problem:
        """Returns the partner's own training: full precision, labels alone."""
        return Problem(
            replacement=BlockReplacement(
                setting.network, FULL_PRECISION, Plan('none', len(setting.network.blocks)), Objective(distillation=0.0)
            ),
            preprocessing=setting.preprocessing(self.facts['mean'], self.facts['std']),
            steps=setting.steps(setting.config.partner),
            microbatches=setting.config.train.microbatches,
            batch_norm_groups=setting.config.train.batch_norm_groups,
        )


def obtain_partner(setting: Setting, stop: StopRequest) -> Partner:
    """Returns the partner: the workdir's own, or that of `partner.workdir` or `partner.torch_file`, or a trained one.

    From then on it is the workdir's own.

    Raises:
        UserError: if both sources are given, or the one given has no partner that fits.
        Stopped: as `run_phase`.
    """
    partner = load_partner(setting, setting.workdir)
    if partner is not None:
        return partner
    other, file = setting.config.partner.workdir, setting.config.partner.torch_file
    # A PyTorch file does not say its normalisation, and a new partner is trained with the config's.
    facts = {
        'network': setting.description,
        'mean': list(setting.config.data.mean),
        'std': list(setting.config.data.std),
    }
    if other and file:
        raise UserError('partner.workdir and partner.torch_file are both given: a run has one partner; give one.')
    if other:
        partner = load_partner(setting, Path(other))
        if partner is None:
            raise UserError(f'partner.workdir={other!r} holds no finished partner (no {DIRECTORY}/{FACTS} in it).')
        partner = Partner(partner.variables, {**partner.facts, 'source': f'workdir {other}'})
    elif file:
        name = setting.config.network.name
        if name not in NAME_RULES:
            raise UserError(
                f'partner.torch_file={file!r}: the names that PyTorch gives to the parameters of the network {name!r} '
                f'are not known, only those of {", ".join(NAME_RULES)}. Train the partner here, or add rules to '
                'bqat_jax.networks.name_rules.NAME_RULES in a plugin.'
            )
        rules = NAME_RULES[name]
        variables = import_state_dict(read_state_dict(file), rules, setting.abstract_variables)
        partner = Partner(
            setting.single.placement.put(variables), {**facts, 'source': f'PyTorch file {Path(file).name}'}
        )
    else:
        partner = _pretrain(setting, facts, stop)
    _save_partner(setting.workdir, partner)
    setting.console.print(f'Partner: {partner.facts["source"]}.')
    return partner


def load_partner(setting: Setting, workdir: Path) -> Partner | None:
    """Returns the finished partner that a workdir keeps, or None if it has none.

    Raises:
        UserError: if it is another network than the config's, or damaged.
    """
    path = workdir / DIRECTORY / FACTS
    if not agree(path.is_file()):
        return None
    facts = read_json(path)
    changes = changed_keys(facts['network'], setting.description)
    if changes:
        listed = '; '.join(changes)
        raise UserError(f'The partner in {workdir} is not the network of this config (there -> here): {listed}.')
    with Checkpoints(workdir / DIRECTORY / 'final', read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(setting.abstract_variables)
    return None if restored is None else Partner(restored.state, facts)


def _save_partner(workdir: Path, partner: Partner) -> None:
    with Checkpoints(workdir / DIRECTORY / 'final') as checkpoints:
        if checkpoints.latest_step is None:  # else a kill came between these two files
            checkpoints.save(0, partner.variables, {})
            checkpoints.wait()
    write_once(workdir / DIRECTORY / FACTS, partner.facts)


def _pretrain(setting: Setting, facts: dict[str, Any], stop: StopRequest) -> Partner:
    config = setting.config.partner
    phase = Phase(
        name='pretrain',
        purpose=PRETRAIN,
        problem=Partner(None, facts).problem(setting),
        partner=None,
        steps=setting.steps(config),
        optimizer=config.optimizer,
        directory=setting.workdir / DIRECTORY / 'checkpoints',
        replicas=setting.single,
    )

    def init(_):
        # Each device makes its part: nowhere is the whole of a large tree.
        shardings = setting.single.placement.shardings(setting.abstract_variables)
        make = jax.jit(lambda key: setting.network.init(key, setting.images.image_shape), out_shardings=shardings)
        variables = make(setting.key(INIT))
        return {NETWORK: variables['params'], QUANTIZERS: {}}, variables['batch_stats']

    restored = run_phase(setting, phase, init, {}, stop)
    variables = {'params': restored.state.params[NETWORK], 'batch_stats': restored.state.batch_stats}
    return Partner(variables, {**facts, 'source': f'trained for {phase.steps} steps'})

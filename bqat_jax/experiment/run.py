"""A whole run: partner, calibration, block-replaced training, evaluation. What `main.py` calls."""

import contextlib
import hashlib
import importlib.metadata
import platform
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rich.console

from bqat_jax import __version__
from bqat_jax.analysis.diagnosis import DIRECTORY as DIAGNOSES
from bqat_jax.analysis.diagnosis import diagnose
from bqat_jax.analysis.summary import print_summary, summarize
from bqat_jax.distributed.preemption import StopRequest
from bqat_jax.distributed.processes import agree, check_workdir_is_shared, is_first, total, wait_for_all, write_once
from bqat_jax.distributed.replicas import Replicas
from bqat_jax.errors import UserError
from bqat_jax.experiment.checkpoints import Restored
from bqat_jax.experiment.configuration import Config, check_resumable, to_plain
from bqat_jax.experiment.experiment import Setting, make_setting
from bqat_jax.experiment.loop import Phase, open_checkpoints, state_target
from bqat_jax.experiment.low_precision import low_precision_phase, quantizer_shapes, train_low_precision
from bqat_jax.experiment.partner import Partner, load_partner, obtain_partner
from bqat_jax.storage import locked, read_json
from bqat_jax.training.evaluation import Evaluation, evaluate
from bqat_jax.training.optimizer import NETWORK, QUANTIZERS
from bqat_jax.training.reestimation import reestimate_batch_stats
from bqat_jax.training.step import Problem, make_evaluation_step
from bqat_jax.transform.rules import NO_QUANTIZER

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorflow-datasets', 'grain', 'numpy')
FULL_PRECISION_BITS = 32
# Number of this use of randomness; see `Setting.key`.
REESTIMATION = 4


def train(
    config: Config,
    workdir: Path,
    *,
    name: str,
    overrides: dict[str, Any] | None = None,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Runs a config from wherever its workdir has got to, to the end; writes and returns `result.json`.

    Args:
        config: the resolved config.
        workdir: everything the run leaves goes there; called again with the same, it continues.
        name: of the config, for the record.
        overrides: what the command line changed, for the record.
        console: where progress is shown; the terminal if None.

    Raises:
        UserError: for a config or a workdir that cannot work, with the remedy.
        Stopped: if SIGTERM or SIGINT came; a checkpoint is saved.
    """
    with _opened(workdir), StopRequest() as stop:
        setting = make_setting(config, workdir, console or _console())
        _check_config(setting)
        _write_record(setting, name, overrides or {})
        _summarize(setting)
        partner = obtain_partner(setting, stop)
        phase, restored = train_low_precision(setting, partner, stop)
        return _finish(setting, partner, phase, restored, workdir / 'result.json', stop)


def summarize_network(config: Config, workdir: Path) -> dict[str, Any]:
    """Prints what a config's network is; writes `summary.json` and returns its totals.

    Raises:
        UserError: for a config that cannot work, or a workdir that was made with another.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    setting = make_setting(config, workdir, _console())
    _check_config(setting)
    return _summarize(setting)['totals']


def import_partner(
    config: Config, workdir: Path, *, name: str, overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Imports the partner that the config names into a workdir and evaluates it; writes and returns `import.json`.

    Training in the same workdir starts from it.

    Args:
        config: the resolved config.
        workdir: where the partner is kept.
        name: of the config, for the record.
        overrides: what the command line changed, for the record.

    Raises:
        UserError: if the config names no partner, or what it names does not fit.
    """
    if not (config.partner.torch_file or config.partner.workdir):
        raise UserError(
            'There is nothing to import: give --config.partner.torch_file=FILE or --config.partner.workdir=DIR.'
        )
    with _opened(workdir), StopRequest() as stop:
        setting = make_setting(config, workdir, _console())
        _check_config(setting)
        _write_record(setting, name, overrides or {})
        partner = obtain_partner(setting, stop)
        setting.console.print('Evaluating on the test split.')
        found = _evaluate_partner(setting, partner, stop)
        result = {'fp_top1': found.top1, 'examples_evaluated': found.examples, 'partner': partner.facts['source']}
        write_once(workdir / 'import.json', result)
        return result


def prepare_partner(config: Config, workdir: Path, *, name: str, console: rich.console.Console) -> None:
    """Trains or imports the partner alone and keeps it in a workdir, for `partner.workdir` of other runs.

    Args:
        config: the resolved config.
        workdir: where the partner is kept; called again with the same, it continues.
        name: of the config, for the record.
        console: where progress is shown.

    Raises:
        UserError: for a config or a workdir that cannot work, with the remedy.
        Stopped: if SIGTERM or SIGINT came; a checkpoint is saved.
    """
    with _opened(workdir), StopRequest() as stop:
        setting = make_setting(config, workdir, console)
        _check_config(setting)
        _write_record(setting, name, {})
        obtain_partner(setting, stop)


def evaluate_run(config: Config, workdir: Path) -> dict[str, Any]:
    """Evaluates the checkpoint that counts in a workdir on the test split; writes and returns `evaluation.json`.

    Raises:
        UserError: if the workdir holds no run of this config.
    """
    setting, partner, phase, restored = _open_run(config, workdir)
    with StopRequest() as stop:
        return _finish(setting, partner, phase, restored, workdir / 'evaluation.json', stop)


def diagnose_run(config: Config, workdir: Path) -> dict[str, Any]:
    """Diagnoses the checkpoint that counts in a workdir; writes files in `diagnosis/` and returns their names.

    Of seeds side by side the first is diagnosed.

    Raises:
        UserError: if the workdir holds no run of this config.
    """
    setting, partner, phase, restored = _open_run(config, workdir)
    setting.console.print('Measuring gradients, features and quantizers.')
    state = phase.replicas.first(restored.state)
    found = diagnose(setting, phase.problem, partner.variables, phase.optimizer, state)
    return {kind: str(workdir / DIAGNOSES / f'step_{found["step"]}.{kind}') for kind in ('json', 'png')}


def _open_run(config: Config, workdir: Path) -> tuple[Setting, Partner, Phase, Restored]:
    """The checkpoint that counts in a workdir, and what it is a checkpoint of."""
    if not (workdir / 'config.json').is_file():
        raise UserError(f'{workdir} holds no run (no config.json in it): train first (--mode=train).')
    setting = make_setting(config, workdir, _console())
    _check_config(setting)
    partner = load_partner(setting, workdir)
    if partner is None:
        raise UserError(f'{workdir} holds no finished partner yet: train first (--mode=train).')
    phase = low_precision_phase(setting, partner)
    restored = None
    if phase.directory.is_dir():
        with open_checkpoints(setting, phase.directory, read_only=True) as checkpoints:
            shapes = quantizer_shapes(setting, phase.problem.replacement.quantization)
            restored = checkpoints.restore_best(state_target(setting, phase, shapes))
    if restored is None:
        raise UserError(f'{workdir} holds no checkpoint of the low-precision network yet: train first (--mode=train).')
    return setting, partner, phase, restored


@contextlib.contextmanager
def _opened(workdir: Path) -> Iterator[None]:
    """A workdir that is there, and that nobody else writes to: of several processes the first one holds it for all."""
    if is_first():
        workdir.mkdir(parents=True, exist_ok=True)
    wait_for_all('workdir made')
    check_workdir_is_shared(workdir)
    with locked(workdir) if is_first() else contextlib.nullcontext():
        yield


def _console() -> rich.console.Console:
    """The terminal, to which the first process speaks for all."""
    return rich.console.Console(quiet=not is_first())


def _check_config(setting: Setting) -> None:
    path = setting.workdir / 'config.json'
    if agree(path.exists()):
        check_resumable(read_json(path), to_plain(setting.config), setting.workdir)


def _write_record(setting: Setting, name: str, overrides: dict[str, Any]) -> None:
    """Writes what is run, and with what."""
    write_once(setting.workdir / 'config.json', to_plain(setting.config))
    environment = {
        'config': name,
        'overrides': to_plain(overrides),
        'versions': {
            'bqat_jax': __version__,
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        'python': sys.version.split()[0],
        'plugins': {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in setting.plugins},
        'platform': platform.platform(),
        'devices': [device.device_kind for device in setting.mesh.devices.flat],
    }
    write_once(setting.workdir / 'environment.json', environment)


def _finish(
    setting: Setting, partner: Partner, phase: Phase, restored: Restored, path: Path, stop: StopRequest
) -> dict[str, Any]:
    """Evaluates partner and network on the test split; writes and returns the result."""
    config = setting.config
    setting.console.print('Evaluating on the test split.')
    batch_stats = _reestimate(setting, phase, restored)
    low = _evaluate(setting, phase.problem, restored.state.params, batch_stats, phase.replicas, stop)
    full = _evaluate_partner(setting, partner, stop)

    def bits(role):
        return FULL_PRECISION_BITS if config.quant[role].name == NO_QUANTIZER else config.quant[role].bits

    result = {
        'fp_top1': full.top1,
        **_of_seeds(setting, 'top1', [one.top1 for one in low]),
        'weight_bits': bits('weights'),
        'activation_bits': bits('activations'),
        'weight_quantizer': config.quant.weights.name,
        'weight_estimator': config.quant.weights.estimator,
        'activation_quantizer': config.quant.activations.name,
        'activation_estimator': config.quant.activations.estimator,
        'plan': config.replacement.plan,
        'distillation': config.replacement.distillation,
        'seed': config.seed,
        'steps': phase.steps,
        'checkpoint_step': restored.step,
        'seconds': round(restored.facts['seconds'], 2),
        'examples_evaluated': low[0].examples,
        'partner': partner.facts['source'],
    }
    if 'validation_top1' in restored.facts:
        result |= _of_seeds(setting, 'validation_top1', restored.facts['validation_top1'])
    if config.data.skip_damaged:
        result['damaged_examples'] = total(len(setting.damage.examples))
    write_once(path, result)
    return result


def _of_seeds(setting: Setting, name: str, values: list[float]) -> dict[str, Any]:
    """A value; of seeds side by side the mean, the standard deviation and all of them."""
    if len(values) == 1:
        return {name: values[0]}
    by_seed = {str(seed): value for seed, value in zip(setting.seeds, values, strict=True)}
    return {name: statistics.mean(values), f'{name}_std': statistics.stdev(values), f'{name}_by_seed': by_seed}


def _summarize(setting: Setting) -> dict[str, Any]:
    summary = summarize(setting)
    write_once(setting.workdir / 'summary.json', summary)
    print_summary(setting, summary)
    return summary


def _evaluate_partner(setting: Setting, partner: Partner, stop: StopRequest) -> Evaluation:
    params = {NETWORK: partner.variables['params'], QUANTIZERS: {}}
    batch_stats = partner.variables['batch_stats']
    return _evaluate(setting, partner.problem(setting), params, batch_stats, setting.single, stop)[0]


def _reestimate(setting: Setting, phase: Phase, restored: Restored) -> Any:
    """The batch statistics to evaluate with: those of the checkpoint, or estimated anew, the same in every call."""
    count, state = setting.config.quant.reestimation_batches, restored.state
    if not count:
        return state.batch_stats
    setting.console.print(f'Estimating batch-norm statistics on {count} batches.')
    split, replicas = setting.train_split, phase.replicas
    readings = [
        split.training_batches(setting.data_seed(REESTIMATION, replica), setting.config.train.batch_size, 0, count)
        for replica in range(replicas.count)
    ]
    return reestimate_batch_stats(phase.problem, state, split.arrays, replicas.batches(readings), replicas)


def _evaluate(
    setting: Setting, problem: Problem, params: Any, batch_stats: Any, replicas: Replicas, stop: StopRequest
) -> tuple[Evaluation, ...]:
    def stop_here():
        stop.check('while evaluating on the test split; what was trained is saved')

    step, split, batch_size = make_evaluation_step(problem, replicas), setting.test_split, setting.evaluation_batch_size
    return evaluate(step, params, batch_stats, split, batch_size, replicas, stop_here)

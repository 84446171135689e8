"""The modes of `main.py`; a run is partner, calibration, block-replaced training and evaluation."""

import dataclasses
import math
import statistics
from typing import Any, NamedTuple

import rich.console

from bqat_jax.analysis.diagnosis import DIRECTORY as DIAGNOSES
from bqat_jax.analysis.summary import print_summary, summarize
from bqat_jax.blocks.block_network import other_collections
from bqat_jax.data.pipeline import Split
from bqat_jax.distributed.preemption import Deadline, StopRequest
from bqat_jax.distributed.processes import is_first, total
from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config
from bqat_jax.experiment.diagnosing import make_phase_diagnosis
from bqat_jax.experiment.environment import check_memory
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.experiment.finished import Finished, collections_to_evaluate, find_start, open_run
from bqat_jax.experiment.low_precision import train_low_precision
from bqat_jax.experiment.metrics import VALIDATION
from bqat_jax.experiment.partner import Partner, find_partner, partner_spec, pretrain_partner
from bqat_jax.experiment.reading import Data, load_data, load_split, make_evaluation
from bqat_jax.experiment.reporting import report_finished
from bqat_jax.experiment.setup import make_experiment
from bqat_jax.experiment.workdir import check_config, opened, write_record
from bqat_jax.storage import Place, check_reachable, shorten_patience, write_once
from bqat_jax.training.evaluation import Evaluation
from bqat_jax.training.spec import NETWORK, QUANTIZERS

# Prefix of the metrics of the full-precision partner.
PARTNER = 'fp_'


def train(
    config: Config,
    workdir: Place,
    *,
    name: str,
    overrides: dict[str, Any] | None = None,
    console: rich.console.Console | None = None,
    deadline: Deadline | None = None,
) -> dict[str, Any]:
    """Starts or resumes the run of a workdir; writes and returns `result.json`.

    Args:
        config: the resolved config.
        workdir: folder of all files of the run; a second call with it resumes the run.
        name: name of the config, for the record.
        overrides: keys that the command line changed, for the record.
        console: where progress is shown; the terminal if None.
        deadline: when to stop.

    Raises:
        UserError: for a config or a workdir that cannot work, with the remedy.
        Stopped: if SIGTERM or SIGINT came, or the deadline passed; a checkpoint is saved.
    """
    with opened(workdir, config.storage.lease_seconds) as hold, StopRequest(shorten_patience, deadline) as stop:
        experiment = make_experiment(config, workdir, console or _console(), hold=hold)
        check_config(experiment)
        write_record(experiment, name, overrides)
        _summarize(experiment)
        check_memory(experiment)
        partner, data = find_partner(experiment), load_data(experiment)
        if partner is None:
            partner = pretrain_partner(experiment, data, stop)
        trained = train_low_precision(experiment, partner, data, lambda: find_start(experiment, partner), stop)
        finished = Finished(partner, *trained)
        tested = _collect(experiment, finished, data.train)
        result = _finish(experiment, finished, tested, data, 'result.json', stop)
        if config.report:
            report_finished(experiment, finished, tested.collections, tested.split, stop.is_due)
        return result


def summarize_network(config: Config, workdir: Place) -> dict[str, Any]:
    """Prints a summary of a config's network; writes `summary.json` and returns its totals.

    Raises:
        UserError: for a config that cannot work, or a workdir of another config.
    """
    check_reachable(workdir, '--workdir')
    workdir.mkdir(parents=True, exist_ok=True)
    experiment = make_experiment(config, workdir, _console())
    check_config(experiment)
    return _summarize(experiment)['totals']


def import_partner(
    config: Config, workdir: Place, *, name: str, overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Imports the partner that the config names into a workdir and evaluates it; writes and returns `import.json`.

    Training in that workdir uses it.

    Args:
        config: the resolved config.
        workdir: where the partner is stored.
        name: name of the config, for the record.
        overrides: keys that the command line changed, for the record.

    Raises:
        UserError: if the config names no partner, one with a new head, or one that does not fit.
    """
    experiment = make_experiment(config, workdir, _console())
    source = experiment.partner_source
    if source.torch_file is None and source.workdir is None:
        raise UserError(
            'There is nothing to import. Use --config.partner.torch_file=FILE or --config.partner.workdir=DIR.'
        )
    if source.new_head:
        raise UserError(
            'partner.new_head=True: a new head must be trained before the partner can be evaluated. Use --mode=train.'
        )
    with opened(workdir, config.storage.lease_seconds) as hold, StopRequest(shorten_patience) as stop:
        experiment = dataclasses.replace(experiment, hold=hold)
        check_config(experiment)
        write_record(experiment, name, overrides)
        partner = find_partner(experiment)
        assert partner is not None  # a source is set
        experiment.console.print('Evaluating on the test split.')
        test = load_split(experiment, experiment.data.images.test)
        evaluation = _evaluate_partner(experiment, partner, test, stop)
        result = {
            **{f'{PARTNER}{name}': evaluation.metrics[name] for name in _reported(experiment)},
            'examples_evaluated': evaluation.examples,
            'partner': partner.facts['source'],
        }
        write_once(workdir / 'import.json', result)
        return result


def prepare_partner(
    config: Config, workdir: Place, *, name: str, console: rich.console.Console, deadline: Deadline | None = None
) -> None:
    """Trains or imports only the partner and stores it in a workdir, for `partner.workdir` of other runs.

    Args:
        config: the resolved config.
        workdir: where the partner is stored; a second call with it resumes the run.
        name: name of the config, for the record.
        console: where progress is shown.
        deadline: when to stop.

    Raises:
        UserError: for a config or a workdir that cannot work, with the remedy.
        Stopped: if SIGTERM or SIGINT came, or the deadline passed; a checkpoint is saved.
    """
    with opened(workdir, config.storage.lease_seconds) as hold, StopRequest(shorten_patience, deadline) as stop:
        experiment = make_experiment(config, workdir, console, hold=hold)
        check_config(experiment)
        write_record(experiment, name, {})
        check_memory(experiment)
        if find_partner(experiment) is None:
            pretrain_partner(experiment, load_data(experiment), stop)


def evaluate_run(config: Config, workdir: Place) -> dict[str, Any]:
    """Evaluates the selected checkpoint of a workdir on the test split; writes and returns `evaluation.json`.

    Raises:
        UserError: if the workdir holds no run of this config.
    """
    check_reachable(workdir, '--workdir')
    experiment, finished = open_run(config, workdir, _console())
    data = None
    if experiment.reestimation_batches:
        data = Data(load_split(experiment, experiment.data.images.train), None)
    with StopRequest(shorten_patience) as stop:
        tested = _collect(experiment, finished, None if data is None else data.train)
        return _finish(experiment, finished, tested, data, 'evaluation.json', stop)


def diagnose_run(config: Config, workdir: Place) -> dict[str, Any]:
    """Diagnoses the selected checkpoint of a workdir; writes files in `diagnosis/` and returns their names.

    With replicas the first one is diagnosed.

    Raises:
        UserError: if the workdir holds no run of this config.
    """
    check_reachable(workdir, '--workdir')
    experiment, (_, phase, restored) = open_run(config, workdir, _console())
    train = load_split(experiment, experiment.data.images.train)
    experiment.console.print('Measuring gradients, features and quantizers.')
    step = make_phase_diagnosis(experiment, phase, train)(restored.state)['step']
    return {kind: str(workdir / DIAGNOSES / f'step_{step}.{kind}') for kind in ('json', 'png')}


def _console() -> rich.console.Console:
    """The terminal; only the first process prints."""
    return rich.console.Console(quiet=not is_first(), markup=False)


class Tested(NamedTuple):
    """The data and collections of an evaluation.

    Attributes:
        split: the test split.
        collections: the collections of all replicas; see `collections_to_evaluate`.
    """

    split: Split
    collections: Any


def _collect(experiment: Experiment, finished: Finished, train: Split | None) -> Tested:
    """Returns the data and collections of the evaluation; for `train` see `collections_to_evaluate`."""
    experiment.console.print('Evaluating on the test split.')
    test = load_split(experiment, experiment.data.images.test)
    return Tested(test, collections_to_evaluate(experiment, finished, train))


def _finish(
    experiment: Experiment, finished: Finished, tested: Tested, data: Data | None, file: str, stop: StopRequest
) -> dict[str, Any]:
    """Evaluates partner and network on the test split; writes and returns the result."""
    (partner, phase, restored), (test, collections) = finished, tested
    evaluation = make_evaluation(experiment, phase.spec, phase.replicas, test, lambda: _check(stop))
    low = evaluation(restored.state.params, collections)
    full = _evaluate_partner(experiment, partner, test, stop)
    of_seeds: dict[str, Any] = {}
    for name in _reported(experiment):
        of_seeds |= _of_seeds(experiment.seeds, name, [one.metrics[name] for one in low])
    result = {
        **{f'{PARTNER}{name}': full.metrics[name] for name in _reported(experiment)},
        **of_seeds,
        **experiment.method,
        'steps': phase.spec.steps,
        'checkpoint_step': restored.step,
        'seconds': round(restored.facts['seconds'], 2),
        'examples_evaluated': low[0].examples,
        'partner': partner.facts['source'],
    }
    if experiment.init.workdir is not None:
        result['init'] = str(experiment.init.workdir)
    validation = f'{VALIDATION}{experiment.task.score.name}'
    if validation in restored.facts:
        result |= _of_seeds(experiment.seeds, validation, restored.facts[validation])
    if experiment.data.skips_damaged:
        splits = [test, *(split for split in data or () if split is not None)]
        result['damaged_examples'] = total(len(set[str]().union(*(split.damaged for split in splits))))
    not_finite = full.not_finite + sum(one.not_finite for one in low)
    if not_finite:
        result['logits_not_finite'] = not_finite
        experiment.console.print(
            f'{not_finite} test examples have outputs that are NaN or infinite: the network overflows. They count as '
            'wrong, and their loss as infinite.'
        )
    experiment.hold.check()
    write_once(experiment.workdir / file, result)
    return result


def _reported(experiment: Experiment) -> tuple[str, ...]:
    """The names of the metrics in a result."""
    return (experiment.task.score.name, *experiment.task.reported)


def _of_seeds(seeds: range, name: str, values: list[float]) -> dict[str, Any]:
    """A metric: its value, or with replicas its mean, standard deviation and all values."""
    if len(values) == 1:
        return {name: values[0]}
    by_seed = {str(seed): value for seed, value in zip(seeds, values, strict=True)}
    spread = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    return {name: statistics.mean(values), f'{name}_std': spread, f'{name}_by_seed': by_seed}


def _summarize(experiment: Experiment) -> dict[str, Any]:
    summary = summarize(experiment.network, experiment.shapes, experiment.layers, experiment.quantizers)
    write_once(experiment.workdir / 'summary.json', summary)
    title = f'{experiment.partner_source.network_name}, {len(experiment.network.blocks)} blocks'
    print_summary(experiment.console, title, summary)
    return summary


def _evaluate_partner(experiment: Experiment, partner: Partner, test: Split, stop: StopRequest) -> Evaluation:
    spec = partner_spec(experiment, partner.facts)
    evaluation = make_evaluation(experiment, spec, experiment.single, test, lambda: _check(stop))
    params = {NETWORK: partner.variables['params'], QUANTIZERS: {}}
    return evaluation(params, other_collections(partner.variables))[0]


def _check(stop: StopRequest) -> None:
    stop.check('while evaluating on the test split; the trained network is saved')

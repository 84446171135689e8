"""The report of a run: reads the run's files, measures its network, writes `report.html`."""

import functools
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import rich.console

from bqat_jax.analysis.diagnosis import DIRECTORY as DIAGNOSES
from bqat_jax.data.pipeline import Split
from bqat_jax.data.preprocessing import get_array
from bqat_jax.distributed.processes import is_first, put_batch
from bqat_jax.distributed.sharding import over_batch
from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config, base_config, changed_values, to_plain
from bqat_jax.experiment.environment import describe_environment
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.experiment.finished import Finished, collections_to_evaluate, open_run
from bqat_jax.experiment.metrics import METRICS_FILE
from bqat_jax.experiment.reading import load_split
from bqat_jax.experiment.setup import make_experiment
from bqat_jax.experiment.workdir import ENVIRONMENT, check_config, check_is_run
from bqat_jax.replacement.paths import Variables
from bqat_jax.report.answers import Answers, Unavailable, make_answer_step
from bqat_jax.report.measuring import compare_features, look_at_quantizers
from bqat_jax.report.run_page import Alignment, Measured, Record, run_page
from bqat_jax.storage import Place, check_reachable, read_json, write_text
from bqat_jax.training.regularizers import VISIBLE_FREQUENCY

logger = logging.getLogger(__name__)

REPORT_FILE = 'report.html'
# Most test examples that the network is run on; most input elements, and least and most examples, of the batch for
# which layers are measured.
MOST_EXAMPLES = 10_000
MOST_INPUTS = 2**22
LOOKED_AT = (16, 256)
# The seed of the order of examples if only a part of the test split is read.
ORDER = 0


def report_run(config: Config, workdir: Place) -> dict[str, Any]:
    """Writes `report.html` of a workdir's run, finished or not, and returns its path.

    With replicas the network of the first seed is measured.

    Raises:
        UserError: if the workdir holds no run of this config, or several processes were started.
    """
    if jax.process_count() > 1:
        raise UserError('--mode=report runs in one process: leave config.distributed at its default, off.')
    check_reachable(workdir, '--workdir')
    check_is_run(workdir)
    experiment = make_experiment(config, workdir, rich.console.Console(markup=False))
    check_config(experiment)

    @functools.cache
    def opened():
        try:
            return open_run(config, workdir, experiment.console)[1]
        except UserError as error:  # the run has not come that far
            raise Unavailable(str(error)) from error

    return {'report': str(write_report(experiment, opened))}


def report_finished(
    experiment: Experiment, finished: Finished, collections: Any, test: Split, is_due: Callable[[], bool]
) -> None:
    """Writes the report of a run that has just finished; a failure is logged as a warning and the run stays complete.

    With several processes the first one reports the files and measures nothing: a measurement needs all processes, and
    a failure in one would leave the others waiting.

    Args:
        experiment: the experiment.
        finished: its trained network.
        collections: the collections that the network was evaluated with.
        test: the test split.
        is_due: whether a stop was requested; the remaining measurements are then left out.
    """
    if not is_first():
        return
    experiment.console.print('Writing the report.')
    began = time.monotonic()

    def opened():
        if jax.process_count() == 1 and is_due():
            raise Unavailable('The run was stopped before this was measured. Use --mode=report.')
        return finished

    try:
        path = write_report(experiment, opened, lambda: collections, lambda: test)
        experiment.console.print(f'Report: {path}, in {time.monotonic() - began:.1f} s.', soft_wrap=True)
    except Exception as error:  # the result is written; a report must not fail the run
        logger.warning(
            'The report of %s could not be written (%s: %s). The run is complete; --mode=report with its flags '
            'writes the report.',
            experiment.workdir,
            type(error).__name__,
            str(error).partition('\n')[0],
        )


def write_report(
    experiment: Experiment,
    opened: Callable[[], Finished],
    collections: Callable[[], Any] | None = None,
    test: Callable[[], Split] | None = None,
) -> Place:
    """Writes the report of a run and returns its path.

    Args:
        experiment: the experiment.
        opened: returns its trained network, or raises `Unavailable`.
        collections: returns the collections that the network is evaluated with; None to determine them.
        test: returns the test split; None to read it.
    """
    source = Network(experiment, opened, collections, test)
    record = read_record(experiment, source)
    measured = Measured(source.looks, source.alignment, source.answers, class_names(experiment))
    page = run_page(record, measured)
    experiment.hold.check()
    path = experiment.workdir / REPORT_FILE
    write_text(path, page)
    return path


class Network:
    """The network of a run, opened at the first measurement."""

    def __init__(
        self,
        experiment: Experiment,
        opened: Callable[[], Finished],
        collections: Callable[[], Any] | None,
        test: Callable[[], Split] | None,
    ):
        """Takes the arguments of `write_report`."""
        self._experiment, self._opened = experiment, opened
        self._collections = collections or self._find_collections
        self._test = functools.cache(test or (lambda: load_split(experiment, experiment.data.images.test)))

    def finished(self) -> Finished:
        """Returns the trained network.

        Raises:
            Unavailable: if it does not exist yet, or there are several processes.
        """
        if jax.process_count() > 1:
            raise Unavailable(
                f'The run had {jax.process_count()} processes, and one alone cannot measure it. Use --mode=report in '
                'one process.'
            )
        return self._opened()

    @functools.cached_property
    def variables(self) -> Variables:
        """The arrays of the network of the first seed."""
        finished = self.finished()
        first = finished.phase.replicas.first
        return first(finished.restored.state).variables._replace(collections=first(self._collections()))

    def looks(self) -> Any:
        """Returns the measurements of quantizers; see `look_at_quantizers`."""
        replacement = self.finished().phase.spec.replacement
        if not replacement.quantization.layers:
            return {}
        return look_at_quantizers(replacement, self.variables, self._batch)

    def alignment(self) -> Alignment:
        """Returns the similarity of features to the partner's; see `compare_features`."""
        phase = self.finished().phase
        cka = compare_features(phase.spec.replacement, self.variables, phase.partner, self._batch)
        if cka is None:
            raise Unavailable('There is no full-precision partner to compare with.')
        return Alignment(cka, jax.tree.leaves(self._batch)[0].shape[0])

    def answers(self) -> Answers:
        """Returns the network's answers on the test split, or on `MOST_EXAMPLES` of it."""
        images = self._experiment.data.images
        answer = make_answer_step(self._experiment.task, images.num_classes)
        spec, test, variables = self.finished().phase.spec, self._test(), self.variables

        @jax.jit
        def step(variables, arrays, batch):
            inputs, targets = spec.prepare(batch, arrays, None)
            return answer(spec.replacement.logits(variables, inputs), targets, batch['mask'])

        answers = Answers(np.zeros((images.num_classes,) * 2, np.int64))
        has_images = not images.is_tokens and not images.label_shape
        for batch in self._batches(test, self._round(self._experiment.data.batch_size), MOST_EXAMPLES):
            self.finished()  # raises if a stop is requested
            counts = jax.device_get(step(variables, test.arrays, self._put(batch)))
            answers.add(counts, functools.partial(_image_of, batch, test.arrays) if has_images else None)
        return answers

    @functools.cached_property
    def _batch(self) -> Any:
        """Preprocessed inputs of some test examples."""
        test, (least, most) = self._test(), LOOKED_AT
        numbers = max(1, int(np.prod(self._experiment.data.images.image_shape)))
        size = min(len(test), max(least, min(most, MOST_INPUTS // numbers)))
        devices = self._experiment.placement.mesh.devices.size
        size = max(1, size // devices) * devices
        batch = self._put(next(iter(self._batches(test, size, 1))))
        return jax.jit(self.finished().phase.spec.prepare, static_argnums=2)(batch, test.arrays, None).inputs

    def _batches(self, test: Split, size: int, most: int) -> Any:
        """Batches with every example once, or, for a split of more than `most`, a fixed random part."""
        if len(test) <= max(size, most):
            return test.evaluation_batches(size)
        return test.training_batches(ORDER, size, 0, max(1, most // size), random_crops=False)

    def _round(self, size: int) -> int:
        devices = self._experiment.placement.mesh.devices.size
        return -(-size // devices) * devices

    def _put(self, batch: Any) -> Any:
        return put_batch(batch, over_batch(self._experiment.placement.mesh))

    def _find_collections(self) -> Any:
        experiment = self._experiment
        train = load_split(experiment, experiment.data.images.train) if experiment.reestimation_batches else None
        return collections_to_evaluate(experiment, self.finished(), train)


def _image_of(batch: Mapping[str, Any], arrays: Any, place: int) -> np.ndarray:
    """An image of a batch before preprocessing."""
    one = {name: np.asarray(x)[place : place + 1] for name, x in batch.items()}
    return np.asarray(get_array(one, arrays, 'image'))[0]


def read_record(experiment: Experiment, network: Network) -> Record:
    """Reads the workdir's files; a missing or damaged one is noted.

    Args:
        experiment: the experiment.
        network: the run's network, whose trackers have oscillating weights.
    """
    workdir, notes = experiment.workdir, []

    def read(name):
        try:
            return read_json(workdir / name) if (workdir / name).exists() else None
        except (UserError, OSError) as error:
            notes.append(str(error))
            return None

    environment = read(ENVIRONMENT)
    if environment is None:
        notes.append(f'There is no readable {ENVIRONMENT}: versions and devices are those of this report.')
        environment = describe_environment(experiment)
    return Record(
        name=str(environment.get('config', experiment.workdir.name)),
        workdir=str(workdir),
        seeds=experiment.seeds,
        score=experiment.task.score,
        overrides=environment.get('overrides', {}),
        changes=changed_values(to_plain(base_config()), experiment.config),
        environment=environment,
        metrics=read_metrics(workdir / METRICS_FILE),
        result=read('result.json'),
        summary=read('summary.json'),
        oscillating=_oscillating(workdir, network),
        notes=notes,
    )


def read_metrics(path: Place) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, without those that are not metrics, such as an incomplete line."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().decode('utf-8', errors='replace').splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get('step'), int):
            lines.append(entry)
    return lines


def _oscillating(workdir: Place, network: Network) -> dict[str, float]:
    """The fraction of oscillating weights by layer, from the newest diagnosis or from the trackers of training."""
    folder = workdir / DIAGNOSES
    there = {path.stem.removeprefix('step_'): path for path in folder.glob('step_*.json')} if folder.is_dir() else {}
    files = {int(step): path for step, path in there.items() if step.isdecimal()}
    for step in sorted(files, reverse=True):
        try:
            shares = read_json(files[step]).get('oscillating')
        except UserError:
            continue
        if isinstance(shares, dict):
            return shares
    try:
        finished = network.finished()
    except Unavailable:
        return {}
    trackers = finished.phase.replicas.first(finished.restored.state.trackers)
    return {
        path: float(np.mean(np.asarray(tracker.frequency) > VISIBLE_FREQUENCY)) for path, tracker in trackers.items()
    }


def class_names(experiment: Experiment) -> list[str]:
    """Returns the class names that the data set declares, or the numbers of the classes."""
    images = experiment.data.images
    names: Any = None
    try:
        names = list(images.test.source.dataset_info.features['label'].names)
    except Exception:  # a source without such features
        logger.debug('The data set names no classes.', exc_info=True)
    if not names or len(names) != images.num_classes:
        names = range(images.num_classes)
    return [str(name) for name in names]

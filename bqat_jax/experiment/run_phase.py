"""Runs a phase from its newest checkpoint, or from the beginning, to its end."""

import contextlib
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from bqat_jax.distributed.preemption import StopRequest
from bqat_jax.distributed.sharding import leaves_with_paths
from bqat_jax.experiment.checkpoints import Checkpoints, Restored
from bqat_jax.experiment.compilation import compiled_beside
from bqat_jax.experiment.diagnosing import make_phase_diagnosis
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.experiment.hooks import Clock, Log, Save, diagnosis_hook, make_finite_check, strengths_hook
from bqat_jax.experiment.loop import After, Before, Hooks, Step, run_steps
from bqat_jax.experiment.metrics import Recording, open_recorder
from bqat_jax.experiment.phase import Phase
from bqat_jax.experiment.profiling import FOLDER, Trace
from bqat_jax.experiment.reading import Data, batch_shapes, make_evaluation, training_batches
from bqat_jax.experiment.streams import random_key
from bqat_jax.replacement.paths import Variables
from bqat_jax.storage import Place, write_once
from bqat_jax.training.optimizer import make_optimizer
from bqat_jax.training.state import TrainState, init_state
from bqat_jax.training.step import make_train_step
from bqat_jax.training.strengths import make_measurement


def run_phase(
    experiment: Experiment, phase: Phase, data: Data, init: Callable[[int], Variables], stop: StopRequest
) -> Restored:
    """Trains from the newest checkpoint of the phase, or from the beginning, to its end.

    Args:
        experiment: the experiment.
        phase: its phase.
        data: the training data.
        init: returns the initial variables of a replica.
        stop: checked after every step.

    Returns:
        The selected checkpoint: the best on the validation split, or the last without one. Its facts hold 'seconds',
        the time that the phase took.

    Raises:
        UserError: if the loss is not finite, or a checkpoint cannot be written.
        Stopped: after a request to stop, once a checkpoint is saved.
    """
    target = phase.state_shapes
    _report_sharding(experiment, phase, target)
    with open_checkpoints(experiment, phase.directory) as checkpoints:
        restored = checkpoints.restore_latest(target)
        start, seconds = (0, 0.0) if restored is None else (restored.facts['next_batch'], restored.facts['seconds'])
        if restored is not None:
            experiment.console.print(f'Phase {phase.name} resumes after step {start} of {phase.spec.steps}.')
        if restored is None or start < phase.spec.steps:
            with compiled_step(experiment, phase, data) as step:  # compiles while the state is made and saved
                state = initial_state(experiment, phase, init) if restored is None else restored.state
                seconds = _train(experiment, phase, data, (step, state, start, seconds), checkpoints, stop)
        selected = checkpoints.restore_selected(target)
        assert selected is not None  # the last step was saved
        return selected._replace(facts={**selected.facts, 'seconds': seconds})


def open_checkpoints(experiment: Experiment, directory: Place, *, read_only: bool = False) -> Checkpoints:
    """Opens the checkpoints of a phase with the experiment's options."""
    has_scores = len(experiment.data.images.validation) > 0
    return Checkpoints(directory, keep=experiment.kept_checkpoints, has_scores=has_scores, read_only=read_only)


def initial_state(experiment: Experiment, phase: Phase, init: Callable[[int], Variables]) -> TrainState:
    """Returns the state of all replicas before the first step; for `init` see `run_phase`."""
    optimizer, _ = make_optimizer(phase.optimizer, phase.spec.steps)

    def make(variables, key):
        # Copies: the step donates the state, and the partner may keep its arrays.
        return init_state(phase.spec, key, jax.tree.map(jnp.copy, variables), optimizer)

    replicas, axes = phase.replicas, (0, 0)
    arguments = [(init(number), random_key(experiment.seeds[number], phase.stream)) for number in range(replicas.count)]
    return replicas.jit(replicas.over(make, axes), axes)(*replicas.stack(arguments))


def _train(
    experiment: Experiment,
    phase: Phase,
    data: Data,
    position: tuple[Step, TrainState, int, float],
    checkpoints: Checkpoints,
    stop: StopRequest,
) -> float:
    """Makes the remaining steps from (step, state, steps done, seconds spent); returns the seconds of the phase."""
    (step, state, start, seconds), steps = position, phase.spec.steps
    clock = Clock(seconds, experiment.data.batch_size * phase.replicas.count)
    intervals, evaluation = experiment.intervals, None
    if data.validation is not None:
        evaluation = make_evaluation(experiment, phase.spec, phase.replicas, data.validation)
    place = Recording(experiment.workdir, experiment.hold, experiment.console)
    with (
        open_recorder(place, phase.name, None if checkpoints.latest_step is None else start, steps) as recorder,
        Trace(experiment.workdir / FOLDER / phase.name, *intervals.traced) as trace,
    ):
        log = Log(recorder, clock, make_finite_check(phase.name, checkpoints))
        save = Save(checkpoints, log, evaluation, experiment.task.score, experiment.hold)
        if checkpoints.latest_step is None:
            save.save(0, state)
            checkpoints.check_readable(0, phase.state_shapes)  # before hours of work rely on it
        hooks = Hooks(
            before=[*_measure_strengths(experiment, phase, data, log), (1, trace.start)],
            after=[
                (1, trace.stop),
                *_diagnose(experiment, phase, data, log),
                (1, log.hook(intervals.log, steps)),
                (1, save.hook(intervals.save, steps)),
                (1, save.stop_hook(stop, f'after step {{number}} of {steps} of phase {phase.name}')),
            ],
        )
        batches = training_batches(experiment, data.train, phase.stream, phase.replicas, start, steps)
        run_steps(step, state, batches, start, hooks)
        checkpoints.wait()
    return save.seconds


@contextlib.contextmanager
def compiled_step(experiment: Experiment, phase: Phase, data: Data) -> Iterator[Step]:
    """Yields the phase's step, which is compiled in a thread; its first call waits for the compilation.

    On a GPU the step is compiled when it is called, since XLA's autotuning needs an idle GPU; with several processes
    too, since they must compile in one order.
    """
    optimizer, learning_rate = make_optimizer(phase.optimizer, phase.spec.steps)
    train_step = make_train_step(phase.spec, optimizer, learning_rate, phase.replicas)
    others = phase.partner, data.train.arrays

    def step(state, batch):
        return train_step(state, *others, batch)

    if jax.process_count() > 1 or phase.replicas.mesh.devices.flat[0].platform == 'gpu':
        yield step
        return
    batch = batch_shapes(experiment, data.train, phase.replicas)
    with compiled_beside(train_step, phase.state_shapes, *others, batch) as wait:

        def waiting_step(state, batch):
            wait()
            return step(state, batch)

        yield waiting_step


def _measure_strengths(experiment: Experiment, phase: Phase, data: Data, log: Log) -> list[tuple[int, Before]]:
    """The hook that measures the strengths of estimators, if an estimator needs them."""
    quantizers = phase.spec.replacement.quantization.quantizers()
    if not any(quantizer.estimator.needs_strength for _, _, quantizer in quantizers):
        return []
    measurement = make_measurement(phase.spec, experiment.trace, phase.replicas)

    def measure(state, batch, number):
        return measurement(state, phase.partner, data.train.arrays, batch, number)

    def batches(done):
        stop = done + experiment.trace.batches
        return training_batches(experiment, data.train, phase.stream, phase.replicas, done, stop)

    return [(experiment.intervals.measure, strengths_hook(measure, batches, log))]


def _diagnose(experiment: Experiment, phase: Phase, data: Data, log: Log) -> list[tuple[int, After]]:
    """The hook that diagnoses a quantized network, if the config asks for it."""
    if not phase.spec.replacement.quantization.layers or not experiment.intervals.diagnose:
        return []

    diagnose = make_phase_diagnosis(experiment, phase, data.train)
    return [(experiment.intervals.diagnose, diagnosis_hook(diagnose, log.clock))]


def _report_sharding(experiment: Experiment, phase: Phase, target: TrainState) -> None:
    """Writes which arrays are sharded, and by which rule, to `sharding_<phase>.json`."""
    placement = phase.replicas.placement
    if not placement.shards:
        return
    sharded = placement.describe(target)
    write_once(experiment.workdir / f'sharding_{phase.name}.json', sharded)
    leaves = jax.tree.leaves(target)
    whole = sum(x.dtype.itemsize * x.size for x in leaves)
    own = sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    experiment.console.print(
        f'Phase {phase.name}: {len(sharded)} of {len(leaves)} arrays are sharded '
        f'(mesh.fsdp={placement.parts}); each device stores {own / 2**20:.1f} of {whole / 2**20:.1f} MiB.'
    )
    paths = [path for path, _ in leaves_with_paths(target)]
    for rule in placement.rules:
        if not any(rule.matches(path) for path in paths):
            experiment.console.print(f'The rule {rule.path!r} of mesh.rules matches no array of this phase.')

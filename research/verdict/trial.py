"""Runs a verdict: sweeps with increasing numbers of seeds, until every comparison is decided."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rich.console

from bqat_jax.errors import UserError
from bqat_jax.storage import read_json
from bqat_jax.sweeps import Sweep
from bqat_jax.sweeps.execution import compare
from bqat_jax.sweeps.tables import TABLES
from research.verdict.answers import Answer, Comparison, answer
from research.verdict.paired_tests import pair
from research.verdict.settings import Method, Setting

# Part of the error of a run whose loss or parameters are not finite.
DIVERGED = 'NaN or infinite'
METRIC = 'top1'
# The score of a run that diverged, which is the worst possible.
WORST = 0.0


@dataclasses.dataclass(frozen=True)
class Score:
    """The scores of a method in a setting.

    Attributes:
        by_seed: top-1 on the test split, of seeds 0, 1, ...
        choice: the selected overrides; None if all choices diverged.
        is_added: whether the choice is beyond the planned grid.
        diverged: runs that diverged, with their errors.
        seconds: mean seconds per seed; None if all diverged.
        seconds_of_choosing: seconds of all runs for the choice.
    """

    by_seed: tuple[float, ...]
    choice: dict[str, Any] | None
    is_added: bool
    diverged: tuple[str, ...]
    seconds: float | None
    seconds_of_choosing: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The results so far.

    Attributes:
        candidate: the method to test.
        settings: the settings.
        references: the methods to compare with.
        plugin: name and checksum of the file that registers the candidate; None if it is built in.
        scores: scores by setting and method.
        answers: answers to all comparisons.
    """

    candidate: Method
    settings: tuple[Setting, ...]
    references: tuple[Method, ...]
    plugin: dict[str, str] | None
    scores: dict[str, dict[str, Score]]
    answers: tuple[Answer, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every comparison is decided."""
        return all(one.is_decided for one in self.answers)


def fingerprint(plugin: Path | None) -> dict[str, str] | None:
    """Returns name and SHA-256 of a plugin, which reveal a change; None without a plugin."""
    if plugin is None:
        return None
    return {'file': plugin.name, 'sha256': hashlib.sha256(plugin.read_bytes()).hexdigest()}


def try_out(
    candidate: Method,
    references: Sequence[Method],
    settings: Sequence[Setting],
    workdir: Path,
    plugin: Path | None,
    save: Callable[[Verdict], None],
) -> Verdict:
    """Runs the missing sweeps and returns the verdict.

    Args:
        candidate: the method to test.
        references: the methods to compare with.
        settings: the settings, in order.
        workdir: folder of the sweeps, `sweeps/SETTING`; a second call with it resumes.
        plugin: the file that registers the candidate.
        save: called with the verdict so far after every look.

    Raises:
        UserError: if a run fails for another reason than divergence.
        Stopped: if SIGTERM or SIGINT came.
    """
    comparisons = [
        Comparison(setting.name, reference.name, setting.looks) for setting in settings for reference in references
    ]
    verdict = Verdict(
        candidate, tuple(settings), tuple(references), fingerprint(plugin), {}, tuple(answer(comparisons))
    )
    save(verdict)
    console = rich.console.Console(markup=False)
    for setting in settings:
        for seeds in setting.looks:
            decided = {
                one.comparison.reference
                for one in verdict.answers
                if one.comparison.setting == setting.name and one.is_decided
            }
            left = [reference for reference in references if reference.name not in decided]
            if not left:
                break
            console.print(f'{setting.name}: {seeds} seeds of {", ".join(one.name for one in [candidate, *left])}')
            scores = _run(setting, [candidate, *left], seeds, workdir / 'sweeps' / setting.name)
            verdict = _look(verdict, setting, scores)
            save(verdict)
    return verdict


def _look(verdict: Verdict, setting: Setting, scores: dict[str, Score]) -> Verdict:
    """Adds the results of one look."""
    comparisons = []
    for one in verdict.answers:
        comparison = one.comparison
        if comparison.setting == setting.name and comparison.reference in scores:
            values, others = (scores[name].by_seed for name in (verdict.candidate.name, comparison.reference))
            paired = pair(values, others, 1 / setting.test_examples)
            comparison = dataclasses.replace(comparison, looks=(*comparison.looks, paired))
        comparisons.append(comparison)
    of_setting = verdict.scores.get(setting.name, {}) | scores
    return dataclasses.replace(
        verdict, scores=verdict.scores | {setting.name: of_setting}, answers=tuple(answer(comparisons))
    )


def _run(setting: Setting, methods: Sequence[Method], seeds: int, folder: Path) -> dict[str, Score]:
    """Runs the sweep of one look."""
    sweep = Sweep(
        methods={method.name: method.overrides for method in methods},
        seeds=range(seeds),
        baseline=methods[0].name,
        settings={setting.name: {}},
        choices=setting.choices,
        choice_seeds=setting.choice_seeds,
    )
    compare(sweep, setting.config, folder, name='verdict')
    rows = read_json(folder / TABLES, settings=dict)['settings'][setting.name]
    return {name: score_of(row, seeds, folder) for name, row in rows.items()}


def score_of(row: dict[str, Any], seeds: int, folder: Path) -> Score:
    """Returns the scores of a method from its row in `sweep.json`; runs that diverged have the worst score.

    Raises:
        UserError: if a run failed for another reason.
    """
    for failed in row['failed']:
        if DIVERGED in failed['error']:
            continue
        where = folder / failed['workdir']
        if 'plugin' in failed:
            raise UserError(
                f'{failed["plugin"]} raised {failed["error"]} (traceback: {where / "error.json"}). Fix it and use '
                'another --workdir.'
            )
        raise UserError(f'The run {where} failed: {failed["error"]} Remove its error.json to repeat it.')
    diverged = tuple(f'{failed["workdir"]}: {failed["error"].partition(". ")[0]}' for failed in row['failed'])
    by_seed = tuple(row['by_seed'].get(str(seed), {METRIC: WORST})[METRIC] for seed in range(seeds))
    seconds = [score['seconds'] for score in row['by_seed'].values()]
    added = [one['overrides'] for one in row['choices'] if one.get('added')]
    return Score(
        by_seed=by_seed,
        choice=row['choice'],
        is_added=row['choice'] in added,
        diverged=diverged,
        seconds=sum(seconds) / len(seconds) if seconds else None,
        seconds_of_choosing=sum(one['seconds'] for one in row['choices']),
    )

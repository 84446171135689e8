"""A verdict as sentences, Markdown, JSON and a figure."""

import io
import statistics
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from research.verdict.answers import BETTER, LEVEL, NOT_DISTINGUISHABLE, POWER, UNDECIDED, WORSE, Answer
from research.verdict.settings import Setting
from research.verdict.trial import Score, Verdict

COLORS = {BETTER: 'tab:green', WORSE: 'tab:red', NOT_DISTINGUISHABLE: 'tab:gray', UNDECIDED: 'tab:blue'}


def sentence(verdict: Verdict, answer: Answer) -> str:
    """Returns an answer as a sentence."""
    comparison, candidate = answer.comparison, verdict.candidate.name
    where = f'{comparison.setting}: {candidate}'
    if not comparison.looks:
        return f'{where} against {comparison.reference}: {UNDECIDED}, no seed has run.'
    last = comparison.looks[-1]
    low, high = answer.interval or (0.0, 0.0)
    what = (
        f'{_points(last.mean)} points ({_points(low)} to {_points(high)}) over {last.seeds} seeds, p = {answer.p:.2g}'
    )
    if answer.outcome == NOT_DISTINGUISHABLE:
        same = ' (equal in every seed)' if answer.is_same else ''
        seen = f'{POWER:.0%} power to detect {100 * (answer.detectable or 0.0):.2f} points'
        return f'{where} is {NOT_DISTINGUISHABLE} from {comparison.reference}{same}: {what}; {seen}.'
    if answer.outcome == UNDECIDED:
        return f'{where} against {comparison.reference}: {UNDECIDED}: {what}.'
    cost = _cost(verdict, answer)
    return (
        f'{where} is {answer.outcome} than {comparison.reference}: {what}{f", at {cost} of its time" if cost else ""}.'
    )


def markdown(verdict: Verdict) -> str:
    """Returns `verdict.md`."""
    return '\n'.join(_lines(verdict)) + '\n'


def _lines(verdict: Verdict) -> Iterator[str]:
    yield f'# Verdict: {verdict.candidate.name}'
    yield ''
    if not verdict.is_complete:
        yield 'Not complete: run the same command again to resume.'
        yield ''
    yield from (f'- {sentence(verdict, one)}' for one in verdict.answers)
    yield from ('', '## Comparisons', '')
    against = f'{verdict.candidate.name} against'
    yield f'| setting | {against} | answer | difference, points | p | seeds | detectable | time |'
    yield '|---|---|---|---|---|---|---|---|'
    for one in verdict.answers:
        cells = [one.comparison.setting, one.comparison.reference, _outcome(one)]
        if one.comparison.looks and one.interval is not None:
            last = one.comparison.looks[-1]
            low, high = map(_points, one.interval)
            cells += [f'{_points(last.mean)} ({low} to {high})', f'{one.p:.2g}', str(last.seeds)]
            cells += [f'{100 * (one.detectable or 0.0):.2f}', _cost(verdict, one)]
        else:
            cells += [''] * 5
        yield f'| {" | ".join(cells)} |'
    yield from ('', '## Methods', '')
    yield '| setting | method | chosen | seeds | top-1 % | seconds a seed | seconds of choosing |'
    yield '|---|---|---|---|---|---|---|'
    for setting, scores in verdict.scores.items():
        for method, score in scores.items():
            yield f'| {setting} | {method} | {" | ".join(_cells(score))} |'
    diverged = [
        (setting, line) for setting, of in verdict.scores.items() for one in of.values() for line in one.diverged
    ]
    if diverged:
        yield ''
        yield from (f'- Diverged, scored as 0 %: {line}' for _, line in diverged)
    yield from ('', '## How to read it', '')
    yield (
        "Differences are paired by seed, with their 95 % interval (Student's t, not corrected). p is corrected for the "
        "looks at the results (O'Brien-Fleming-like shares, Bonferroni) and for the number of comparisons (Holm): if "
        f'there are no differences, the probability of any false claim is at most {LEVEL:g}. "Detectable" is the true '
        f'difference that the last look at {_planned(verdict)} detects with {POWER:.0%} power, given the measured '
        'spread. "Time" is seconds per seed relative to the reference. The learning rate of every method was chosen on '
        'held-out training images with other seeds; "added" marks one beyond the grid. All seeds share one '
        'full-precision partner, so the results do not generalize to other partners.'
    )


def _planned(verdict: Verdict) -> str:
    return ' and '.join(f'{setting.looks[-1]} seeds ({setting.name})' for setting in verdict.settings)


def _outcome(answer: Answer) -> str:
    return f'{answer.outcome} (equal in every seed)' if answer.is_same else answer.outcome


def _cells(score: Score) -> list[str]:
    rate = 'all diverged' if score.choice is None else f'learning rate {next(iter(score.choice.values())):g}'
    spread = f'{100 * statistics.mean(score.by_seed):.2f} ± {100 * statistics.stdev(score.by_seed):.2f}'
    seconds = '' if score.seconds is None else f'{score.seconds:.1f}'
    rate += ', added' if score.is_added else ''
    return [rate, str(len(score.by_seed)), spread, seconds, f'{score.seconds_of_choosing:.0f}']


def _points(value: float) -> str:
    return f'{100 * value:+.2f}'


def _cost(verdict: Verdict, answer: Answer) -> str:
    scores = verdict.scores.get(answer.comparison.setting, {})
    own, other = (scores.get(name) for name in (verdict.candidate.name, answer.comparison.reference))
    if own is None or other is None or not own.seconds or not other.seconds:
        return ''
    return f'{own.seconds / other.seconds:.2f}'


def to_json(verdict: Verdict) -> dict[str, Any]:
    """Returns `verdict.json`; scores are fractions."""
    return {
        'candidate': verdict.candidate.name,
        'references': [one.name for one in verdict.references],
        'plugin': verdict.plugin,
        'is_complete': verdict.is_complete,
        'level': LEVEL,
        'answers': [_answer_json(verdict, one) for one in verdict.answers],
        'scores': {
            setting: {method: vars(score) for method, score in scores.items()}
            for setting, scores in verdict.scores.items()
        },
    }


def _answer_json(verdict: Verdict, one: Answer) -> dict[str, Any]:
    return {
        'setting': one.comparison.setting,
        'reference': one.comparison.reference,
        'outcome': one.outcome,
        'the_same_in_every_seed': one.is_same,
        'p': one.p,
        'interval': one.interval,
        'detectable': one.detectable,
        'planned': one.comparison.planned,
        'looks': [vars(look) for look in one.comparison.looks],
        'sentence': sentence(verdict, one),
    }


def picture(verdict: Verdict) -> str:
    """Returns `verdict.svg`: every seed, and the differences with intervals and detectable differences."""
    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'verdict'}):
        rows = len(verdict.settings)
        figure = Figure(figsize=(10, 0.6 + rows * (1.2 + 0.35 * (1 + len(verdict.references)))), layout='constrained')
        panels = figure.subplots(rows, 2, squeeze=False)
        for (left, right), setting in zip(panels, verdict.settings, strict=True):
            _draw_scores(left, verdict, setting)
            _draw_differences(right, verdict, setting)
        buffer = io.StringIO()
        figure.savefig(buffer, format='svg', metadata={'Date': None})
    return buffer.getvalue()


def _draw_scores(axes: Any, verdict: Verdict, setting: Setting) -> None:
    scores = verdict.scores.get(setting.name, {})
    for height, score in enumerate(scores.values()):
        values = [100 * value for value in score.by_seed]
        axes.plot(values, [height] * len(values), 'o', color='tab:blue', alpha=0.4, markersize=4)
        axes.plot([statistics.mean(values)] * 2, [height - 0.3, height + 0.3], color='black')
    axes.set(title=setting.name, xlabel='top-1 %', yticks=range(len(scores)), yticklabels=list(scores))
    axes.set_ylim(len(scores) - 0.4, -0.6)
    axes.grid(axis='x', alpha=0.3)


def _draw_differences(axes: Any, verdict: Verdict, setting: Setting) -> None:
    answers = [one for one in verdict.answers if one.comparison.setting == setting.name and one.interval is not None]
    for height, one in enumerate(answers):
        mean, (low, high) = 100 * one.comparison.looks[-1].mean, (100 * x for x in one.interval or (0.0, 0.0))
        seen = 100 * (one.detectable or 0.0)
        axes.barh(height, 2 * seen, left=-seen, height=0.7, color='0.9', zorder=0)
        axes.plot([low, high], [height, height], color=COLORS[one.outcome], linewidth=2)
        axes.plot(mean, height, 'D', color=COLORS[one.outcome])
    axes.axvline(0, color='black', linewidth=0.8)
    labels = [f'{one.comparison.reference}: {one.outcome}' for one in answers]
    axes.set(
        title=f'{verdict.candidate.name} minus reference',
        xlabel='points; grey: not detectable',
        yticks=range(len(answers)),
        yticklabels=labels,
    )
    axes.set_ylim(len(answers) - 0.4, -0.6)
    axes.grid(axis='x', alpha=0.3)

"""Tests your gradient estimator against the STE, EWGS and the best method so far.

Command: python -m research.verdict --plugin=my_estimator.py --estimator=mine

The learning rate of every method is chosen on held-out training images. Then every method runs with 4 seeds, and with 8
if the result is not decided. Writes `verdict.md`, `verdict.json` and `verdict.svg`; resumes after a kill.
docs/research.md walks through an example.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from bqat_jax.distributed.preemption import Stopped
from bqat_jax.errors import UserError
from bqat_jax.quantizers import ESTIMATORS
from bqat_jax.quantizers.rounding import Context, QuantizeSpec, quantize
from bqat_jax.registry import load_plugins, place_in_plugins
from bqat_jax.storage import place, read_json, write_json, write_text
from research.verdict import page
from research.verdict.settings import REFERENCES, Method, find_settings, method_of
from research.verdict.trial import Verdict, fingerprint, try_out


def check_backward(text: str) -> None:
    """Runs an estimator's backward rule once at 2 bits, to find mistakes before training.

    Raises:
        UserError: if the rule changes the shape of its input.
        Exception: any exception of the rule.
    """
    spec, values = QuantizeSpec(ESTIMATORS.make(text), -2, 1), jnp.linspace(-3.0, 2.0, 11)
    context = Context(jnp.float32(0.5), jax.random.key(0), jnp.float32(1))
    _, pullback = jax.vjp(lambda v: quantize(spec, jnp.float32(1), jnp.float32(0), v, context), values)
    (gradient,) = pullback(jnp.ones_like(values))
    if gradient.shape != values.shape:
        raise UserError(f'estimator={text!r}: backward returns the shape {gradient.shape} for {values.shape}.')


def save(workdir: Path, verdict: Verdict) -> None:
    """Writes the verdict so far."""
    write_json(workdir / 'verdict.json', page.to_json(verdict))
    write_text(workdir / 'verdict.md', page.markdown(verdict))
    write_text(workdir / 'verdict.svg', page.picture(verdict))


def check_workdir(workdir: Path, candidate: Method, references: list[Method], plugin: Path | None) -> None:
    """Checks that a workdir is new, or holds this comparison.

    Raises:
        UserError: if it holds another estimator, another version of the plugin or other references.
    """
    path = workdir / 'verdict.json'
    if not path.is_file():
        return
    known = read_json(path, candidate=str, references=list)
    now = {
        'candidate': candidate.name,
        'references': [one.name for one in references],
        'plugin': fingerprint(plugin),
    }
    changed = [key for key, value in now.items() if known.get(key) != value]
    if changed:
        listed = '; '.join(f'{key}: {known.get(key)} -> {now[key]}' for key in changed)
        raise UserError(f'{workdir} holds another verdict (there -> now): {listed}. Use another --workdir.')


def main(argv: list[str]) -> None:
    """Reads the command line."""
    logging.set_verbosity(logging.ERROR)
    values = flags.FLAGS
    try:
        if len(argv) > 1:
            raise UserError(f'{" ".join(argv[1:])!r} is not understood. Write flags as --name=value.')
        plugin = None if values.plugin is None else Path(values.plugin).expanduser().absolute()
        load_plugins([] if plugin is None else [plugin])
        candidate = method_of(values.estimator)
        check_backward(values.estimator)
        references = [method_of(text) for text in values.reference]
        names = [one.name for one in (candidate, *references)]
        if len(set(names)) < len(names):
            raise UserError(
                f'--estimator={values.estimator}, --reference={", ".join(values.reference)}: methods must differ. '
                'Leave one out.'
            )
        settings = find_settings(values.data_dir, values.cifar_dir, values.partner_file, plugin)
        default = f'runs/verdict/{candidate.name}'
        workdir = Path(place(default if values.workdir is None else values.workdir, '--workdir'))
        check_workdir(workdir, candidate, references, plugin)
        workdir.mkdir(parents=True, exist_ok=True)
        verdict = try_out(candidate, references, settings, workdir, plugin, lambda known: save(workdir, known))
    except Stopped as stopped:
        print(stopped)
        return
    except UserError as error:
        raise SystemExit(f'Error: {error}') from error
    except Exception as error:
        where = place_in_plugins(error)
        if where is None:
            raise
        raise SystemExit(f'Error: {where} raised {type(error).__name__}: {error}.') from error
    print('\n'.join(page.sentence(verdict, one) for one in verdict.answers))
    print(f'{workdir / "verdict.md"}, verdict.json, verdict.svg')


if __name__ == '__main__':
    flags.DEFINE_string('plugin', None, 'Python file that registers the estimator; not needed for a built-in one.')
    flags.DEFINE_string('estimator', None, 'The estimator to test, with options: mine:strength=0.3.', required=True)
    flags.DEFINE_multi_string(
        'reference', list(REFERENCES), 'An estimator, or plan=NAME; repeat for more. They replace the defaults.'
    )
    flags.DEFINE_string('workdir', None, 'Folder of all files; runs/verdict/ESTIMATOR by default.')
    flags.DEFINE_string('data_dir', None, "Folder of the prepared digits; TensorFlow Datasets' default if not set.")
    flags.DEFINE_string('cifar_dir', None, 'Folder of the prepared CIFAR-10; with --partner_file, the second setting.')
    flags.DEFINE_string('partner_file', None, 'PyTorch or safetensors file of a full-precision ResNet-20.')
    app.run(main)

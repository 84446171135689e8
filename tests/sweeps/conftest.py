"""A sweep, and training that is stood in for."""

import statistics

import pytest

from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import to_plain
from bqat_jax.storage import write_json
from bqat_jax.sweeps import execution
from tests.conftest import ROOT
from tests.experiment.test_configuration import load_recipe

FILE = """
from bqat_jax.sweeps import Sweep

def get_sweep():
    return Sweep(
        methods={'plain': {'replacement.plan': 'none'}, 'prefix': {}},
        seeds=range(3),
        baseline='plain',
        settings={'W2A2': {}, 'W4A4': {'quant.weights.bits': 4}},
        choices=[{'optimizer.learning_rate': rate} for rate in (0.1, 0.2)],
        choice_seeds=(10, 11),
    )
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / 'my_sweep.py').write_text(FILE)
    config = load_recipe(ROOT / 'configs' / 'digits.py').get_config()
    config.sweep = str(tmp_path / 'my_sweep.py')
    config.report, config.sweep_extend = False, 0
    return config


class Training:
    """Stands in for the training program: remembers what ran, and leaves what a run leaves."""

    def __init__(self):
        self.ran, self.fails, self.stops_after = [], lambda config: False, None

    def prepare_partner(self, config, workdir, *, name, console, deadline):
        assert config.train.replicas == 1
        workdir.mkdir(parents=True, exist_ok=True)

    def train(self, config, workdir, *, name, console, deadline):
        if self.stops_after is not None and len(self.ran) >= self.stops_after:
            raise KeyboardInterrupt
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / 'config.json', to_plain(config))
        seeds = range(config.seed, config.seed + config.train.replicas)
        self.ran.append((config.replacement.plan, config.quant.weights.bits, config.optimizer.learning_rate, *seeds))
        if self.fails(config):
            raise UserError('the loss became NaN')
        top1 = {str(seed): self.top1(config, seed) for seed in seeds}
        result = {'top1': statistics.mean(top1.values()), 'fp_top1': 0.99, 'steps': 5, 'checkpoint_step': 5}
        result |= {'seconds': 2.0, 'validation_top1': result['top1'] - 0.01}
        if len(seeds) > 1:
            validation = {seed: value - 0.01 for seed, value in top1.items()}
            result |= {'top1_by_seed': top1, 'validation_top1_by_seed': validation}
        write_json(workdir / 'result.json', result)
        return result

    @staticmethod
    def top1(config, seed):
        """The plan none is best at 0.1, prefix at 0.2."""
        best = 0.1 if config.replacement.plan == 'none' else 0.2
        gain = 0.0 if config.replacement.plan == 'none' else 0.05
        return 0.8 + gain - abs(config.optimizer.learning_rate - best) + 0.001 * seed


@pytest.fixture
def training(monkeypatch):
    training = Training()
    monkeypatch.setattr(execution, 'train', training.train)
    monkeypatch.setattr(execution, 'prepare_partner', training.prepare_partner)
    return training


def run(config, workdir):
    return execution.run_sweep(config, workdir, name='digits')

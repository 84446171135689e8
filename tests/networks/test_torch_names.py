"""PyTorch's names: what wrappers put before them, and the way back from our paths."""

import jax
import pytest
from flax import traverse_util

from bqat_jax.networks.name_rules import NAME_RULES
from bqat_jax.networks.torch_names import PREFIXES, Translation, find_prefix, is_counter
from tests.networks.published_names import PUBLISHED, template_of

TRANSLATIONS = {family: Translation.of(rules) for family, rules in NAME_RULES.items()}
COMBINED = [*PREFIXES, 'module._orig_mod.', '_orig_mod.module.', 'module.module.', 'model.module._orig_mod.backbone.']


@pytest.mark.parametrize('prefix', ['', *COMBINED])
@pytest.mark.parametrize('case', PUBLISHED)
def test_the_prefix_of_all_names_is_found(case, prefix):
    family, _, names = PUBLISHED[case]
    assert find_prefix([prefix + name for name in names], TRANSLATIONS[family]) == prefix


def test_counters_need_no_prefix():
    names = ['module.conv1.weight', 'module.bn1.num_batches_tracked', 'n_averaged', 'num_batches_tracked']
    assert find_prefix(names, TRANSLATIONS['cifar_resnet']) == 'module.'
    assert find_prefix(['n_averaged'], TRANSLATIONS['cifar_resnet']) == find_prefix([], TRANSLATIONS['vit']) == ''


def test_a_prefix_that_some_names_lack_stays():
    names = ['model.conv1.weight', 'model.linear.bias', 'criterion.margin']
    assert find_prefix(names, TRANSLATIONS['cifar_resnet']) == ''


# The names of networks that themselves begin like a wrapper.
OWN = Translation.of(
    [
        (r'backbone\.conv\.weight', 'params/stem/conv/kernel'),
        (r'backbone\.model\.fc\.(weight|bias)', r'params/head/dense/kernel'),
    ]
)
OWN_NAMES = ('backbone.conv.weight', 'backbone.model.fc.weight')


@pytest.mark.parametrize('prefix', ['', *COMBINED])
def test_a_networks_own_names_lose_nothing(prefix):
    assert find_prefix([prefix + name for name in OWN_NAMES], OWN) == prefix
    assert find_prefix([prefix + OWN_NAMES[1]], OWN) == prefix


def test_names_that_are_known_either_way_stay():
    both = Translation.of([(r'(?:model\.)?fc\.weight', 'params/head/dense/kernel')])
    assert find_prefix(['model.fc.weight'], both) == ''
    assert find_prefix(['module.model.fc.weight'], both) == 'module.'


@pytest.mark.parametrize(
    ('name', 'counts'),
    [
        ('bn1.num_batches_tracked', True),
        ('module.n_averaged', True),
        ('n_averaged', True),
        ('head.mean_averaged', False),
        ('my_n_averaged', False),
        ('n_averaged.weight', False),
    ],
)
def test_counters_are_known_by_the_last_part_of_their_name(name, counts):
    assert is_counter(name) == counts


@pytest.mark.parametrize('case', PUBLISHED)
def test_every_path_of_a_network_has_a_name_that_gives_it(case):
    family, options, _ = PUBLISHED[case]
    translation = TRANSLATIONS[family]
    for path in traverse_util.flatten_dict(template_of(family, tuple(options.items())), sep='/'):
        names = translation.names([path])
        assert names and all(path in translation.paths(name) for name in names)


@pytest.mark.parametrize('case', [case for case in PUBLISHED if 'old' not in case])
def test_published_names_are_among_them(case):
    """But those of the second of two alternatives of one rule."""
    family, _, names = PUBLISHED[case]
    translation = TRANSLATIONS[family]
    paths = jax.tree.leaves(list(names.values()))
    possible = set(translation.names(paths))
    left = {name for name in names if name not in possible}
    assert all(name.startswith('classifier.') for name in left)  # timm's and torchvision's differ by '.1'

import pytest

from bqat_jax.transform.rules import assign_quantizers

PATHS = ('stem/conv', 'block1/conv1', 'block1/conv2', 'head/dense')
WEIGHTS = {'name': 'lsq', 'bits': 2, 'estimator': 'identity', 'granularity': 'tensor'}
ACTIVATIONS = {'name': 'lsq', 'bits': 3, 'estimator': 'identity', 'sign': 'auto'}


def assign(*rules):
    return assign_quantizers(PATHS, WEIGHTS, ACTIVATIONS, rules)


def test_defaults_hold_where_no_rule_does():
    settings = assign()
    assert set(settings) == set(PATHS)
    assert all(layer.weights.bits == 2 and layer.activations.bits == 3 for layer in settings.values())


def test_first_match_wins_and_changes_only_what_it_says():
    settings = assign(
        {'layers': 'stem/conv', 'weights': {'bits': 8}},
        {'layers': 'stem/.*|head/.*', 'weights': 'none', 'activations': {'bits': 4, 'sign': 'signed'}},
    )
    assert settings['stem/conv'].weights.bits == 8 and settings['stem/conv'].activations.bits == 3
    assert settings['head/dense'].weights is None
    assert settings['head/dense'].activations.bits == 4 and settings['head/dense'].activations.sign == 'signed'
    assert settings['block1/conv1'].weights.bits == 2


def test_a_name_of_none_is_full_precision():
    assert assign({'layers': 'stem/conv', 'weights': {'name': 'none'}})['stem/conv'].weights is None
    everything = assign_quantizers(PATHS, {**WEIGHTS, 'name': 'none'}, {**ACTIVATIONS, 'name': 'none'}, ())
    assert all(layer.weights is None and layer.activations is None for layer in everything.values())


def test_a_rule_must_match_whole_paths():
    with pytest.raises(ValueError, match=r'stem/conv, block1/conv1, block1/conv2, head/dense'):
        assign({'layers': 'conv1', 'weights': 'none'})


def test_a_rule_hidden_by_an_earlier_one_is_refused():
    with pytest.raises(ValueError, match=r'head/dense.*earlier rule'):
        assign({'layers': '.*', 'weights': 'none'}, {'layers': 'head/dense', 'weights': {'bits': 8}})


@pytest.mark.parametrize(
    ('rule', 'message'),
    [
        ({'layer': 'stem/conv'}, 'not understood'),
        ('stem/conv', 'not understood'),
        ({'layers': 'stem/conv', 'weigths': 'none'}, "Did you mean 'weights'"),
        ({'layers': '(', 'weights': 'none'}, 'regular expression'),
        ({'layers': 'stem/conv', 'weights': {'bit': 8}}, "Did you mean 'bits'"),
        ({'layers': 'stem/conv', 'weights': {'sign': 'auto'}}, "'sign'"),
        ({'layers': 'stem/conv', 'activations': {'granularity': 'channel'}}, "'granularity'"),
        ({'layers': 'stem/conv', 'weights': 8}, "'none' or a dict"),
        ({'layers': 'stem/conv', 'weights': {'bits': 9}}, 'bits=9'),
        ({'layers': 'stem/conv', 'weights': {'name': 'lsqx'}}, 'lsqx'),
        ({'layers': 'stem/conv', 'weights': {'estimator': 'ident'}}, 'identity'),
        ({'layers': 'stem/conv', 'weights': {'granularity': 'row'}}, 'tensor, channel'),
    ],
)
def test_bad_rules_are_refused_with_the_reason(rule, message):
    with pytest.raises(ValueError, match=message):
        assign(rule)

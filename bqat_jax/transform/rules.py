"""Path rules: which layer gets which quantizer.

Defaults apply to every layer; rules change them for the layers whose path they match. The first rule that matches a
layer applies. A rule is a dict:

    {'layers': 'stem/.*', 'weights': {'bits': 8}, 'activations': 'none'}

`layers` is a regular expression that must match the full path; `weights` and `activations` are either the settings to
change or 'none' for full precision.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bqat_jax.quantizers import QUANTIZERS, Quantizer
from bqat_jax.quantizers.estimators import get_estimator
from bqat_jax.registry import suggest

NO_QUANTIZER = 'none'
GRANULARITIES = ('auto', 'tensor', 'channel')
SIGNS = ('auto', 'signed', 'unsigned')
RESCALINGS = ('none', 'constant', 'stddev')
OUTPUT_CHANNEL_AXIS = -1
BATCH_AXIS = 0
NOT_OF = {'weights': ('sign',), 'activations': ('granularity', 'rescale')}


@dataclasses.dataclass(frozen=True)
class QuantizerSettings:
    """The settings of one quantizer in a config.

    Attributes:
        name: the quantizer and its options, such as 'lsq' or 'lsq:narrow=true', or 'none' for full precision.
        bits: number of bits.
        estimator: the gradient estimator and its options, such as 'ewgs:delta=0.1'.
        granularity: 'tensor' for one scale, 'channel' for one per output channel, 'auto' for the choice of the
            quantizer's paper (weights only).
        sign: 'signed', 'unsigned', or 'auto': unsigned if the layer's input is never negative during calibration
            (activations only; weights are always signed).
        rescale: rescaling of quantized weights, see `bqat_jax.transform.rescale` (weights only).

    Raises:
        ValueError: for an invalid granularity, sign or rescale.
    """

    name: str
    bits: int
    estimator: str = 'identity'
    granularity: str = 'auto'
    sign: str = 'auto'
    rescale: str = 'none'

    def __post_init__(self):
        if self.name == NO_QUANTIZER:
            return
        known = (('granularity', GRANULARITIES), ('sign', SIGNS), ('rescale', RESCALINGS))
        for key, allowed in known:
            if getattr(self, key) not in allowed:
                raise ValueError(f'{key}={getattr(self, key)!r}: must be one of {", ".join(allowed)}.')

    def make(self, *, of_weights: bool, signed: bool) -> Quantizer:
        """Returns the quantizer.

        Args:
            of_weights: True for weights, False for activations.
            signed: whether values can be negative.

        Raises:
            ValueError: for an unknown quantizer or estimator, or a combination that is not supported.
        """
        channel_axis = None
        if of_weights:
            by_default = QUANTIZERS.get(self.name.partition(':')[0]).channel_by_default
            if self.granularity == 'channel' or (self.granularity == 'auto' and by_default):
                channel_axis = OUTPUT_CHANNEL_AXIS
        return QUANTIZERS.make(
            self.name,
            bits=self.bits,
            signed=signed,
            channel_axis=channel_axis,
            batch_axis=None if of_weights else BATCH_AXIS,
            estimator=get_estimator(self.estimator),
        )

    def check(self, *, of_weights: bool) -> None:
        """Raises the ValueError of `make` if it fails for every possible sign."""
        signs = {'signed': [True], 'unsigned': [False], 'auto': [False, True]}
        errors = []
        for signed in [True] if of_weights else signs[self.sign]:
            try:
                self.make(of_weights=of_weights, signed=signed)
                return
            except ValueError as error:
                errors.append(error)
        raise errors[0]


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """The settings of one layer's weights and input; None for full precision."""

    weights: QuantizerSettings | None
    activations: QuantizerSettings | None


def assign_quantizers(
    paths: Sequence[str],
    weights: Mapping[str, Any],
    activations: Mapping[str, Any],
    rules: Sequence[Mapping[str, Any]],
) -> dict[str, LayerSettings]:
    """Returns the settings of every layer.

    Args:
        paths: the layers' paths, such as 'stage1_block1/conv1'.
        weights: default settings of the weights' quantizer, the fields of `QuantizerSettings`.
        activations: default settings of the quantizer of the layer's input.
        rules: changes for the layers that they match; the first matching rule applies.

    Raises:
        ValueError: for an invalid rule, a rule that applies to no layer, or unknown settings.
    """
    if isinstance(rules, Mapping | str):
        raise ValueError(f'The quantization rules {rules!r} are not a list. Write [{{...}}], one dict per rule.')
    compiled = [_parse_rule(rule) for rule in rules]
    used = [False] * len(compiled)
    settings = {}
    for path in paths:
        changes: dict[str, Any] = {}
        for number, (pattern, rule_changes) in enumerate(compiled):
            if pattern.fullmatch(path):
                used[number], changes = True, rule_changes
                break
        settings[path] = LayerSettings(
            weights=_settings('weights', weights, changes.get('weights', {})),
            activations=_settings('activations', activations, changes.get('activations', {})),
        )
    for (pattern, _), was_used in zip(compiled, used, strict=True):
        if not was_used:
            shadowed = [path for path in paths if pattern.fullmatch(path)]
            why = (
                f'every layer it matches ({", ".join(shadowed)}) is matched by an earlier rule'
                if shadowed
                else f'it matches the full path of no layer; the paths are: {", ".join(paths)}'
            )
            raise ValueError(
                f'The quantization rule for layers {pattern.pattern!r} applies to nothing: {why}. Set the rules '
                '(config.quant.rules) for the layers of this network.'
            )
    return settings


def _parse_rule(rule: Mapping[str, Any]) -> tuple[re.Pattern, dict[str, Any]]:
    if not isinstance(rule, Mapping) or 'layers' not in rule:
        raise ValueError(
            f"The quantization rule {rule!r} is not understood: write it as {{'layers': 'a regular expression', "
            "'weights': {...} or 'none', 'activations': {...} or 'none'}."
        )
    _check_keys(rule, ('layers', 'weights', 'activations'), f'The quantization rule {dict(rule)!r}')
    try:
        pattern = re.compile(rule['layers'])
    except (re.error, TypeError) as error:
        raise ValueError(f'{rule["layers"]!r} in a quantization rule is not a regular expression: {error}.') from error
    return pattern, {key: value for key, value in rule.items() if key != 'layers'}


def _settings(role: str, defaults: Mapping[str, Any], changes: Mapping[str, Any] | str) -> QuantizerSettings | None:
    if changes == NO_QUANTIZER:
        return None
    if not isinstance(changes, Mapping):
        raise ValueError(f"{role}={changes!r} in a quantization rule: write 'none' or a dict of settings.")
    if not hasattr(defaults, 'keys'):  # A ConfigDict is not a Mapping.
        raise ValueError(
            f"{role}={defaults!r}: write a dict of settings, {{'name': 'lsq', 'bits': 2}}, or {{'name': 'none'}}."
        )
    fields = [field.name for field in dataclasses.fields(QuantizerSettings)]
    # Weights are always signed; inputs have no output channels and are not rescaled.
    fields = [field for field in fields if field not in NOT_OF[role]]
    _check_keys({**defaults, **changes}, fields, f'A quantizer of {role}')
    given = {**defaults, **changes}
    if given.get('name') == NO_QUANTIZER:
        return None
    for key in ('name', 'bits'):
        if key not in given:
            raise ValueError(f"A quantizer of {role} has no {key!r}; write it as {{'name': 'lsq', 'bits': 2}}.")
    settings = QuantizerSettings(**given)
    settings.check(of_weights=role == 'weights')
    return settings


def _check_keys(given: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in given:
        if key not in known:
            listed = ', '.join(known)
            raise ValueError(f'{what} has an unknown key {key!r}; the keys are: {listed}.{suggest(key, known)}')

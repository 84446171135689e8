"""Arguments and settings of datasets that the recipes share."""

from typing import Any

from bqat_jax.experiment.configuration import Config, base_config, parse_argument

LSQ8 = {'name': 'lsq', 'bits': 8, 'estimator': 'identity'}


def begin(argument: str | None, **defaults: Any) -> tuple[Config, Config]:
    """Returns the base config with a recipe's arguments applied, and the arguments.

    Args:
        argument: the text after the colon of `--config=FILE.py:bits=2,plan=prefix`.
        **defaults: defaults of the arguments: `bits` (of weights and activations) and those of the recipe; all recipes
            have `plan`, `distillation` (from the partner to the network and to MP paths) and `cut`.
    """
    given = parse_argument(argument, **{'plan': 'prefix', 'distillation': 1.0, 'cut': 'stage', **defaults})
    config = base_config()
    config.quant.weights.bits = config.quant.activations.bits = given.bits
    config.replacement.plan = given.plan
    config.replacement.cut = given.cut
    config.replacement.distillation = config.replacement.path_distillation = given.distillation
    return config, given


def use_small_images(config: Config, name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Sets a dataset with the usual augmentation of CIFAR: crops after padding by 4 pixels, and flips."""
    config.data.name = name
    config.data.mean = mean
    config.data.std = std
    config.data.crop_padding = 4
    config.data.flip = True


def use_imagenet(config: Config) -> None:
    """Sets ImageNet, read by eight processes, with random resized crops of 224 pixels and flips."""
    config.data.name = 'imagenet2012'
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.test_split = 'validation'
    config.data.image_size = 224
    config.data.on_device = False
    config.data.workers = 8
    config.data.flip = True

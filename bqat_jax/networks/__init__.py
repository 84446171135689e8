"""Networks in plain Flax Linen, without quantization, each divided into stem, blocks and head."""

from bqat_jax.networks.cifar_resnet import cifar_resnet
from bqat_jax.networks.decoder import decoder
from bqat_jax.networks.mobilenet_v2 import mobilenet_v2
from bqat_jax.networks.registry import NETWORKS, make_network, register_network
from bqat_jax.networks.resnet import resnet
from bqat_jax.networks.unet import unet
from bqat_jax.networks.vgg_small import vgg_small
from bqat_jax.networks.vit import vit

__all__ = [
    'NETWORKS',
    'cifar_resnet',
    'decoder',
    'make_network',
    'mobilenet_v2',
    'register_network',
    'resnet',
    'unet',
    'vgg_small',
    'vit',
]

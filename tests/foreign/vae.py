"""A variational autoencoder: it draws from a random stream, and returns what its loss needs as a dict."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Encoder(nn.Module):
    latents: int

    @nn.compact
    def __call__(self, x):
        for features in (4, 6):
            x = nn.relu(nn.Conv(features, (3, 3), (2, 2))(x))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.latents, name='mean')(x), nn.Dense(self.latents, name='logvar')(x)


class Decoder(nn.Module):
    shape: tuple

    @nn.compact
    def __call__(self, z):
        height, width, channels = self.shape
        x = nn.relu(nn.Dense(height // 2 * (width // 2) * 4, name='grow')(z))
        x = x.reshape(z.shape[0], height // 2, width // 2, 4)
        return nn.ConvTranspose(channels, (3, 3), (2, 2), name='pixels')(x)


class VAE(nn.Module):
    latents: int = 4

    @nn.compact
    def __call__(self, image, train: bool):
        mean, logvar = Encoder(self.latents, name='encoder')(image)
        z = mean
        if train:
            z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(self.make_rng('latents'), mean.shape)
        z = nn.Dense(8, name='bridge')(z)
        return {'reconstruction': Decoder(image.shape[1:], name='decoder')(z), 'mean': mean, 'logvar': logvar}


def vae_loss(outputs, image):
    """The negative of the evidence's lower bound, summed over pixels and averaged over images."""
    error = ((outputs['reconstruction'] - image) ** 2).sum((1, 2, 3))
    mean, logvar = outputs['mean'], outputs['logvar']
    divergence = 0.5 * (jnp.exp(logvar) + mean**2 - 1 - logvar).sum(-1)
    return (error + divergence).mean()

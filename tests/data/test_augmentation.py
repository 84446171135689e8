import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.data.augmentation import adjust_colors, augment, color_jitter, normalize, random_crop, random_flip

IMAGES = jax.random.randint(jax.random.key(0), (64, 5, 6, 3), 1, 256).astype(jnp.uint8)


@pytest.mark.parametrize('padding', [1, 4])
def test_a_crop_is_a_window_of_the_padded_image_and_all_occur(padding):
    cropped = np.asarray(random_crop(jax.random.key(1), IMAGES, padding))
    padded = np.pad(np.asarray(IMAGES), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    seen = set()
    for before, after in zip(padded, cropped, strict=True):
        places = [
            (i, j)
            for i in range(2 * padding + 1)
            for j in range(2 * padding + 1)
            if np.array_equal(before[i : i + 5, j : j + 6], after)
        ]
        assert len(places) == 1
        seen.add(places[0])
    if padding == 1:
        assert len(seen) == 9


def test_no_padding_no_change():
    assert random_crop(jax.random.key(0), IMAGES, 0) is IMAGES


def test_a_flip_mirrors_about_half_of_the_images():
    flipped = np.asarray(random_flip(jax.random.key(1), IMAGES))
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(flipped, np.asarray(IMAGES), strict=True)]
    same = [np.array_equal(a, b) for a, b in zip(flipped, np.asarray(IMAGES), strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(
    'factors', [(1.3, 0.6, 1.0), (0.5, 1.0, 1.7), (1.0, 1.8, 0.0), (0.0, 0.5, 0.5), (1.0, 1.0, 1.0)]
)
def test_colours_are_adjusted_as_pil_does(factors, channels):
    from PIL import Image, ImageEnhance

    images = IMAGES[:8, :, :, :channels]
    got = adjust_colors(images, *[jnp.full((8, 1, 1, 1), factor) for factor in factors])
    for before, after in zip(np.asarray(images), np.asarray(got), strict=True):
        expected = Image.fromarray(before.squeeze())
        for kind, factor in zip(('Brightness', 'Contrast', 'Color'), factors, strict=True):
            expected = getattr(ImageEnhance, kind)(expected).enhance(factor)
        # PIL rounds after every step, and grey levels too.
        difference = after.squeeze().astype(int) - np.asarray(expected).astype(int)
        assert np.abs(difference).max() <= (0 if factors == (1.0, 1.0, 1.0) else 3)


def test_jitter_draws_other_factors_for_each_image():
    same = jnp.broadcast_to(IMAGES[:1], (64, *IMAGES.shape[1:]))
    jittered = np.asarray(color_jitter(jax.random.key(0), same, 0.4))
    assert len({image.tobytes() for image in jittered}) == 64
    brightness = jittered.mean((1, 2, 3)) / np.asarray(same).mean((1, 2, 3))
    assert 0.5 < brightness.min() < 0.8 and 1.05 < brightness.max() < 1.5  # bright values are cut off
    assert color_jitter(jax.random.key(0), IMAGES, 0.0) is IMAGES


def test_augment_depends_on_the_key_alone():
    run = jax.jit(lambda key: augment(key, IMAGES, crop_padding=2, flip=True))
    np.testing.assert_array_equal(run(jax.random.key(0)), run(jax.random.key(0)))
    assert not np.array_equal(run(jax.random.key(0)), run(jax.random.key(1)))
    assert run(jax.random.key(0)).dtype == jnp.uint8
    np.testing.assert_array_equal(augment(jax.random.key(0), IMAGES, crop_padding=0, flip=False), IMAGES)


def test_normalize_is_channel_by_channel():
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    expected = (np.asarray(IMAGES, np.float64) / 255 - mean) / std
    np.testing.assert_allclose(normalize(IMAGES, mean, std), expected, rtol=1e-5, atol=1e-6)

"""Tasks against formulas in float64, and what must hold of every task that is registered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads

import bqat_jax as bq
from bqat_jax.replacement.losses import feature_loss
from bqat_jax.replacement.objective import task_alone
from bqat_jax.replacement.tasks import TASKS
from bqat_jax.training.evaluation import evaluate

CLASSES = 5
BATCH, LENGTH = 6, 3
NAMES = [name for name in TASKS if TASKS.get(name).__module__.startswith('bqat_jax.')]
CLASSIFIERS = [name for name in NAMES if issubclass(TASKS.get(name), bq.Classification)]


def normal(seed, *shape):
    return 2 * jax.random.normal(jax.random.key(seed), shape)


def labels(seed, *shape):
    return jax.random.randint(jax.random.key(seed), shape, 0, CLASSES)


def case(name):
    """A task, outputs of two networks and targets, for a batch of sequences."""
    student, teacher = normal(0, BATCH, LENGTH, CLASSES), normal(1, BATCH, LENGTH, CLASSES)
    targets = {
        'multi_label': (normal(2, BATCH, LENGTH, CLASSES) > 0).astype(jnp.int32),
        'regression': normal(2, BATCH, LENGTH, CLASSES),
    }
    return bq.get_task(name), student, teacher, targets.get(name, labels(2, BATCH, LENGTH))


def float64(x):
    return np.asarray(x, np.float64)


def log_softmax(z):
    z = float64(z)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def cross_entropy(z, y):
    return -np.take_along_axis(log_softmax(z), np.asarray(y)[..., None], -1)[..., 0]


def kl(teacher, z, t):
    p, q = log_softmax(float64(teacher) / t), log_softmax(float64(z) / t)
    return t**2 * (np.exp(p) * (p - q)).sum(-1)


def sigmoid(z):
    return 1 / (1 + np.exp(-float64(z)))


def results(task, outputs, targets, mask=None):
    mask = jnp.ones(BATCH, bool) if mask is None else mask
    return task.results(jax.tree.map(np.asarray, task.counts(outputs, targets, mask)))


# Of every task that is registered.


@pytest.mark.parametrize('name', NAMES)
def test_a_distance_is_positive_and_zero_for_equal_outputs(name):
    task, student, teacher, targets = case(name)
    assert float(task.distance(student, teacher, targets, 2.0)) > 0
    assert abs(float(task.distance(teacher, teacher, targets, 2.0))) < 1e-6


@pytest.mark.parametrize('name', NAMES)
def test_gradients_are_those_of_the_differences(name):
    task, student, teacher, targets = case(name)
    check_grads(lambda z: task.loss(z, targets), (student,), 1, modes=['rev'], atol=1e-2, rtol=1e-2)
    check_grads(lambda z: task.distance(z, teacher, targets, 3.0), (student,), 1, modes=['rev'], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize('name', NAMES)
def test_the_order_of_examples_does_not_matter(name):
    task, student, teacher, targets = case(name)
    order = jnp.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_allclose(task.loss(student[order], targets[order]), task.loss(student, targets), rtol=1e-5)
    np.testing.assert_allclose(
        task.distance(student[order], teacher[order], targets[order], 2.0),
        task.distance(student, teacher, targets, 2.0),
        rtol=1e-5,
    )
    assert results(task, student[order], targets[order]) == pytest.approx(results(task, student, targets), rel=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_examples_that_fill_up_a_batch_do_not_count(name):
    task, student, _, targets = case(name)
    filled = student.at[4:].set(jnp.nan)
    mask = jnp.arange(BATCH) < 4
    assert results(task, filled, targets, mask) == pytest.approx(
        task.results(jax.tree.map(np.asarray, task.counts(student[:4], targets[:4], jnp.ones(4, bool)))), rel=1e-5
    )
    np.testing.assert_array_equal(task.is_finite(filled, targets), mask)


@pytest.mark.parametrize('name', NAMES)
def test_an_evaluation_in_batches_is_that_of_the_whole(name):
    task, student, _, targets = case(name)

    def step(rows):
        rows = jnp.asarray(rows)
        mask = rows >= 0
        counts = task.counts(student[rows], targets[rows], mask)
        return {**counts, 'examples': jnp.sum(mask), 'not_finite': jnp.int32(0)}

    # -1 fills up; the two batches weigh differently.
    (evaluation,) = evaluate(step, [(0, 1, 2, 3), (4, 5, -1, -1)], task)
    assert evaluation.examples == BATCH
    assert evaluation.metrics == pytest.approx(results(task, student, targets), rel=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_the_score_is_among_the_metrics_and_perfect_outputs_have_the_best(name):
    task, student, _, targets = case(name)
    perfect = jax.nn.one_hot(targets, CLASSES) if name in CLASSIFIERS else targets.astype(jnp.float32)
    if name != 'regression':
        perfect = 100 * (2 * perfect - 1)
    best, other = results(task, perfect, targets), results(task, student, targets)
    assert {task.score.name, *task.reported} <= set(best)
    rank = task.score.rank
    assert rank(best[task.score.name]) > rank(other[task.score.name]) > rank(float('nan'))
    assert best[task.score.name] == (1 if task.score.larger_is_better else pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize('name', NAMES)
def test_losses_are_float32_of_outputs_in_bfloat16(name):
    task, student, teacher, targets = case(name)
    student, teacher = (x.astype(jnp.bfloat16) for x in (student, teacher))
    assert task.loss(student, targets).dtype == task.distance(student, teacher, targets, 1.0).dtype == jnp.float32
    assert all(value.dtype == jnp.float32 for value in task.training_metrics(student, targets).values())


@pytest.mark.parametrize('name', NAMES)
def test_an_output_that_is_not_finite_is_the_worst(name):
    task, student, _, targets = case(name)
    bad = student.at[1, 2, 3].set(jnp.nan)
    values = results(task, bad, targets)
    assert not any(np.isnan(value) for value in values.values())
    score = task.score
    assert score.rank(values[score.name]) <= score.rank(results(task, student, targets)[score.name])
    np.testing.assert_array_equal(task.is_finite(bad, targets), np.arange(BATCH) != 1)


@pytest.mark.parametrize('name', NAMES)
def test_it_reads_one_array_of_a_tree(name):
    task, student, teacher, targets = case(name)
    option = 'prediction' if name == 'regression' else 'logits'
    chosen = bq.get_task(f'{name}:{option}=main/0')
    wrap = lambda z: {'main': (z,), 'aux': jnp.full(BATCH, jnp.nan)}  # noqa: E731
    assert chosen.loss(wrap(student), targets) == task.loss(student, targets)
    assert chosen.distance(wrap(student), wrap(teacher), targets, 2.0) == task.distance(student, teacher, targets, 2.0)
    assert results(chosen, wrap(student), targets) == results(task, student, targets)
    assert bool(jnp.all(chosen.is_finite(wrap(student), targets)))
    chosen.check(wrap(student), targets, CLASSES)
    with pytest.raises(ValueError, match=f"{option}='main/0'.*'other'"):
        chosen.check({'other': student}, targets)
    with pytest.raises(ValueError, match="'aux', 'main/0'" if option == 'logits' else 'structure'):
        task.check(wrap(student), targets)


# Formulas.


@pytest.mark.parametrize('shape', [(BATCH,), (BATCH, LENGTH), (BATCH, 2, LENGTH)])
def test_classification_in_float64(shape):
    task, z, teacher, y = bq.Classification(), normal(0, *shape, CLASSES), normal(1, *shape, CLASSES), labels(2, *shape)
    np.testing.assert_allclose(task.loss(z, y), cross_entropy(z, y).mean(), rtol=1e-5)
    np.testing.assert_allclose(task.distance(z, teacher, y, 3.0), kl(teacher, z, 3.0).mean(), rtol=1e-5)
    top1 = np.mean(np.argmax(np.asarray(z), -1) == np.asarray(y))
    assert results(task, z, y) == pytest.approx({'top1': top1, 'cross_entropy': cross_entropy(z, y).mean()}, rel=1e-5)
    np.testing.assert_allclose(task.training_metrics(z, y)['train_top1'], top1, rtol=1e-6)


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_tokens_are_images_in_another_shape(name):
    task, z, teacher, y = case(name)
    flat, flat_teacher, flat_y = z.reshape(-1, CLASSES), teacher.reshape(-1, CLASSES), y.reshape(-1)
    np.testing.assert_allclose(task.loss(z, y), task.loss(flat, flat_y), rtol=1e-6)
    np.testing.assert_allclose(
        task.distance(z, teacher, y, 2.0), task.distance(flat, flat_teacher, flat_y, 2.0), rtol=1e-6
    )
    assert results(task, z, y) == pytest.approx(results(task, flat, flat_y, jnp.ones(flat_y.shape, bool)), rel=1e-6)


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_what_is_ignored_counts_nowhere(name):
    _, z, teacher, y = case(name)
    task, y = bq.get_task(f'{name}:ignore=-1'), y.at[1].set(-1).at[4, 2].set(-1)
    kept = np.asarray(y) != -1
    np.testing.assert_allclose(task.loss(z, y), cross_entropy(z, np.maximum(y, 0))[kept].mean(), rtol=1e-5)
    np.testing.assert_allclose(task.distance(z, teacher, y, 2.0), kl(teacher, z, 2.0)[kept].mean(), rtol=1e-5)
    np.testing.assert_allclose(
        task.training_metrics(z, y)['train_top1'],
        np.mean((np.argmax(np.asarray(z), -1) == np.asarray(y))[kept]),
        rtol=1e-6,
    )
    only = results(bq.get_task(name), z[kept], y[kept], jnp.ones(kept.sum(), bool))
    # Padding may hold anything: attention with all keys masked gives NaN.
    bad = jnp.where(jnp.asarray(kept)[..., None], z, jnp.nan)
    assert results(task, bad, y) == pytest.approx(only, rel=1e-6)
    assert bool(jnp.all(task.is_finite(bad, y)))
    gradient = jax.grad(lambda z: task.loss(z, y) + task.distance(z, teacher, y, 2.0))
    np.testing.assert_array_equal(gradient(bad), gradient(z))
    assert not np.any(np.asarray(gradient(z))[~kept])


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_with_everything_ignored_the_loss_is_zero(name):
    task, (_, z, teacher, y) = bq.get_task(f'{name}:ignore=255'), case(name)
    y = jnp.full_like(y, 255).astype(jnp.uint8)
    loss, gradient = jax.value_and_grad(lambda z: task.loss(z, y) + task.distance(z, teacher, y, 1.0))(z)
    assert float(loss) == 0 and not np.any(gradient)
    assert all(np.isnan(value) for value in results(task, z, y).values())


def test_soft_labels_that_are_certain_are_labels():
    task, z, _, y = case('classification')
    soft = jax.nn.one_hot(y, CLASSES)
    np.testing.assert_allclose(task.loss(z, soft), task.loss(z, y), rtol=1e-6)
    assert results(task, z, soft) == pytest.approx(results(task, z, y), rel=1e-6)
    mixed = jax.nn.softmax(normal(5, *z.shape))
    np.testing.assert_allclose(task.loss(z, mixed), -(float64(mixed) * log_softmax(z)).sum(-1).mean(), rtol=1e-5)


def test_bits_per_byte_of_a_uniform_guess_over_256():
    task, z, y = bq.LanguageModel(), jnp.zeros((BATCH, LENGTH, 256)), labels(0, BATCH, LENGTH)
    assert results(task, z, y)['bits_per_byte'] == pytest.approx(8, rel=1e-6)
    assert float(task.training_metrics(z, y)['train_bits_per_byte']) == pytest.approx(8, rel=1e-6)


def test_mean_iou_is_that_of_the_confusion_matrix():
    z, y = normal(0, BATCH, 4, 4, CLASSES + 2), labels(1, BATCH, 4, 4).at[0, 0].set(255)
    z = z.at[..., CLASSES + 1].set(-1e9)  # a class that occurs nowhere does not count; class 5 is only predicted
    matrix = np.zeros((CLASSES + 2, CLASSES + 2))
    kept = np.asarray(y) != 255
    np.add.at(matrix, (np.asarray(y)[kept], np.argmax(np.asarray(z), -1)[kept]), 1)
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    values = results(bq.Segmentation(ignore=255), z, y)
    assert values['mean_iou'] == pytest.approx(np.mean(np.diag(matrix)[union > 0] / union[union > 0]))
    assert np.sum(union > 0) == CLASSES + 1
    assert values['top1'] == pytest.approx(np.trace(matrix) / matrix.sum())


def test_several_labels_in_float64():
    task, z, teacher, y = case('multi_label')
    p, q, t = sigmoid(z), np.asarray(y), 2.0
    loss = -(q * np.log(p) + (1 - q) * np.log(1 - p)).mean()
    np.testing.assert_allclose(task.loss(z, y), loss, rtol=1e-5)
    a, b = sigmoid(float64(teacher) / t), sigmoid(float64(z) / t)
    expected = t**2 * (a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))).mean()
    np.testing.assert_allclose(task.distance(z, teacher, y, t), expected, rtol=1e-5)
    accuracy = np.mean((p > 0.5) == (q == 1))
    assert results(task, z, y) == pytest.approx({'label_accuracy': accuracy, 'cross_entropy': loss}, rel=1e-5)


def test_regression_in_float64():
    task, y, teacher, targets = case('regression')
    mse = np.mean((float64(y) - float64(targets)) ** 2)
    np.testing.assert_allclose(task.loss(y, targets), mse, rtol=1e-5)
    assert results(task, y, targets) == pytest.approx({'mse': mse}, rel=1e-5)
    expected = np.sum((float64(y) - float64(teacher)) ** 2) / np.sum(float64(teacher) ** 2)
    np.testing.assert_allclose(task.distance(y, teacher, targets, 7.0), expected, rtol=1e-5)
    tree, target_tree = {'a': y, 'b': (y[:, 0, 0],)}, {'a': targets, 'b': (targets[:, 0, 0],)}
    errors = np.concatenate([float64(y - targets).ravel(), float64(y - targets)[:, 0, 0]])
    np.testing.assert_allclose(task.loss(tree, target_tree), np.mean(errors**2), rtol=1e-5)
    assert results(task, tree, target_tree) == pytest.approx({'mse': np.mean(errors**2)}, rel=1e-5)


def test_features_may_be_trees_whose_integers_do_not_count():
    h, g = normal(0, 3, 4), normal(1, 3, 4)
    mask = jnp.arange(3)
    np.testing.assert_array_equal(
        feature_loss([{'x': h, 'mask': mask}], [{'x': g, 'mask': mask}]), feature_loss([h], [g])
    )
    two = feature_loss([(h, 2 * h)], [(g, 5 * g)])
    np.testing.assert_allclose(two, (feature_loss([h], [g]) + feature_loss([2 * h], [5 * g])) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match='feature_matching'):
        feature_loss([mask], [mask])


# A user's own.


def vae_loss(outputs, images):
    reconstruction, center, log_variance = outputs
    error = jnp.sum((reconstruction - images) ** 2, axis=-1)
    return jnp.mean(error + 0.5 * jnp.sum(jnp.exp(log_variance) + center**2 - 1 - log_variance, axis=-1))


def vae_case():
    outputs = normal(0, BATCH, 4), normal(1, BATCH, 2), 0.1 * normal(2, BATCH, 2)
    return outputs, normal(3, BATCH, 4)


def test_a_loss_is_enough_for_a_task():
    task, (outputs, images) = bq.CustomTask(vae_loss), vae_case()
    mask = jnp.arange(BATCH) < 4
    expected = vae_loss(*jax.tree.map(lambda x: x[:4], (outputs, images)))
    assert results(task, outputs, images, mask) == pytest.approx({'loss': float(expected)}, rel=1e-5)
    assert task.score.name == 'loss' and not task.score.larger_is_better
    student = bq.replacement.paths.Outputs(outputs)
    loss, terms = task_alone(task)(images, student, bq.replacement.paths.Outputs(None), [], jnp.zeros(0))
    assert loss == terms['loss/task'] == vae_loss(outputs, images)
    with pytest.raises(ValueError, match=r"replacement.distillation=1.0: the task 'custom' has no distance"):
        bq.Objective(task=task)
    with pytest.raises(ValueError, match=r'path_teaching=0.5'):
        bq.Objective(distillation=0.0, path_distillation=0.0, path_teaching=0.5, task=task)
    with pytest.raises(ValueError, match='scalar'):
        bq.CustomTask(lambda outputs, targets: outputs).loss(images, images)


def test_a_distance_of_ones_own_is_distilled():
    outputs, images = vae_case()
    task = bq.CustomTask(vae_loss, lambda student, teacher: jnp.mean((student[0] - teacher[0]) ** 2))
    teacher = jax.tree.map(lambda x: x + 1, outputs)
    wrap = bq.replacement.paths.Outputs
    loss, terms = bq.Objective(task=task)(images, wrap(outputs), wrap(teacher), [teacher], jnp.ones(1))
    np.testing.assert_allclose(terms['loss/distillation'], 1.0, rtol=1e-5)
    np.testing.assert_allclose(loss, vae_loss(outputs, images) + 1 + vae_loss(teacher, images), rtol=1e-5)


def test_a_registered_task_has_options(registries):
    @bq.register_task('margin')
    class Margin(bq.Task):
        width: float = 1.0

        def loss(self, outputs, targets):
            return jnp.mean(jnp.maximum(self.width - outputs * targets, 0.0))

    task = bq.get_task('margin:width=2')
    assert not task.has_distance and float(task.loss(jnp.ones(3), jnp.ones(3))) == 1
    with pytest.raises(ValueError, match='defines no distance'):
        task.distance(jnp.ones(3), jnp.ones(3), None, 1.0)


# What does not fit.

Z = jax.ShapeDtypeStruct((8, 10), 'float32')
Y = jax.ShapeDtypeStruct((8,), 'int32')


def shaped(*shape, dtype='float32'):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ('task', 'outputs', 'targets', 'message'),
    [
        ('classification', shaped(8, 1, 1, 10), Y, r'\(8, 1, 1, 10\) and the labels \(8,\).*Remove the axes of size 1'),
        ('segmentation', shaped(8, 10, 4, 5), shaped(8, 4, 5, dtype='int32'), r'jnp\.moveaxis\(x, 1, -1\)'),
        ('classification', Z, shaped(8, 1, dtype='int32'), r'labels\[\.\.\., 0\]'),
        ('classification', shaped(8, 12), Y, '12 logits, and the data have 10 classes'),
        ('classification', Z, shaped(8), r'the targets \(8,\) \(float32\)'),
        ('classification', Z, shaped(8, dtype='bool'), 'bool'),
        ('classification', shaped(8), Y, r'\(batch, \.\., classes\)'),
        ('classification', shaped(8, 10, dtype='int32'), Y, 'logits are int32'),
        ('classification', Z, {'y': Y}, 'targets are a dict'),
        ('classification:ignore=-1', Z, shaped(8, dtype='uint8'), 'uint8, which cannot hold it'),
        ('classification:ignore=-1', Z, shaped(8, 10), 'no label to ignore'),
        ('classification:logits=main', Z, Y, 'output is one array. Omit logits'),
        ('classification', {'logits': Z, 'aux': Z}, Y, "'aux', 'logits'. Choose"),
        ('classification:logits=logit', {'logits': Z, 'aux': Z}, Y, "Did you mean 'logits'"),
        ('multi_label', Z, Y, r'\(8, 10\) and the targets \(8,\)'),
        ('regression', shaped(8, 1), shaped(8), r'\(8, 1\) and the targets \(8,\).*outputs\[:, 0\]'),
        ('regression', {'y': Z}, Z, "prediction='name'"),
        ('regression', shaped(8, dtype='int32'), shaped(8), 'outputs are int32'),
    ],
)
def test_what_does_not_fit_is_refused(task, outputs, targets, message):
    with pytest.raises(ValueError, match=message):
        bq.get_task(task).check(outputs, targets, 10)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('clasification', "Did you mean 'classification'"),
        ('classification:ignore=x', 'classification:ignore=0'),
        ('regression:ignore=1', 'prediction'),
    ],
)
def test_names_and_options_that_do_not_exist_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        bq.get_task(text)


# Training.


class Tagger(nn.Module):
    """A class for every token, or with one class a number for every token."""

    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name='a')(x))
        x = nn.relu(nn.Dense(16, name='b')(x))
        return nn.Dense(self.classes, name='c')(x)


@pytest.mark.parametrize('name', ['regression', 'language_model:ignore=-1'])
def test_block_replacement_trains_it(name):
    task, network = bq.get_task(name), Tagger(CLASSES)
    inputs = normal(0, 32, 4, 8)
    wanted = network.apply(network.init(jax.random.key(7), inputs), inputs)
    assert isinstance(wanted, jax.Array)
    targets = wanted if name == 'regression' else jnp.argmax(wanted, -1).at[:, 3].set(-1)
    blocks = bq.split_after(network, ('a', 'b'), (4, 8))
    bits = {'name': 'lsq', 'bits': 3, 'estimator': 'identity'}
    partner = blocks.init(jax.random.key(1), (4, 8))
    replacement, variables = bq.replace_blocks(
        blocks,
        partner,
        [inputs],
        {'weights': bits, 'activations': bits},
        objective=bq.Objective(task=task, feature_matching=0.1, distillation=0.1, path_distillation=0.1),
    )
    batch = bq.Batch(inputs, targets)

    @jax.jit
    def step(variables):
        def loss(trained):
            return replacement.loss(
                variables._replace(params=trained), partner, batch, bq.Context(key=jax.random.key(2))
            )

        (_, (_, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(variables.params)
        params = jax.tree.map(lambda x, g: x - 0.05 * g, variables.params, gradients)
        return variables._replace(params=params), metrics

    history = []
    for _ in range(30):
        variables, metrics = step(variables)
        history.append(float(metrics[f'loss/{task.loss_name}']))
    assert np.isfinite(history).all() and history[-1] < 0.8 * history[0]
    assert f'loss/path1_{task.loss_name}' in metrics and 'loss/features' in metrics
    outputs = replacement.logits(variables, inputs)
    value = task.results(jax.tree.map(np.asarray, task.counts(outputs, targets, jnp.ones(32, bool))))
    assert np.isfinite(value[task.score.name])


def test_outputs_of_a_task_of_ones_own_may_be_scalars_and_integers():
    outputs = {'x': jnp.arange(8.0).reshape(4, 2), 'loss': jnp.float32(1), 'codes': jnp.arange(4)}
    task = bq.CustomTask(lambda outputs, targets: jnp.mean((outputs['x'] - targets) ** 2) + outputs['loss'])
    targets, mask = outputs['x'].at[1].add(1.0), jnp.array([True, True, False, True])
    assert results(task, outputs, targets, mask) == pytest.approx({'loss': 1 + 1 / 3})
    np.testing.assert_array_equal(task.is_finite(outputs, targets), True)
    np.testing.assert_array_equal(task.is_finite({**outputs, 'loss': jnp.float32(jnp.nan)}, targets), False)


@pytest.mark.parametrize(('name', 'what'), [('segmentation', 'pixel'), ('language_model', 'token')])
def test_one_label_of_an_image_is_none_of_its_parts(name, what):
    with pytest.raises(ValueError, match=f'one label per {what}'):
        bq.get_task(name).check(normal(0, BATCH, CLASSES), labels(1, BATCH), CLASSES)

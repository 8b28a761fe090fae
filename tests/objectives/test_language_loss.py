"""The token mean over everything that is added up."""

import jax.numpy as jnp
import numpy as np

from tpo_jax.objectives.language import answer_accuracy, language_loss, token_accuracy

LOGPS = jnp.log(jnp.array([[[0.5, 0.25]], [[0.1, 0.9]]]))
WEIGHTS = jnp.array([[[1.0, 1.0]], [[1.0, 0.0]]])


def test_is_the_mean_negative_log_likelihood_of_weighted_tokens():
    np.testing.assert_allclose(
        language_loss(LOGPS, WEIGHTS).mean(), -np.log([0.5, 0.25, 0.1]).mean(), rtol=1e-6
    )


def test_rows_add_up_to_the_token_mean_not_to_a_mean_of_means():
    rows = [language_loss(LOGPS[i : i + 1], WEIGHTS[i : i + 1]) for i in range(2)]
    np.testing.assert_allclose(
        (rows[0] + rows[1]).mean(), language_loss(LOGPS, WEIGHTS).mean(), rtol=1e-6
    )
    assert float(rows[0].mean() + rows[1].mean()) / 2 != float((rows[0] + rows[1]).mean())


def test_no_answer_at_all_is_zero():
    assert float(language_loss(LOGPS, 0 * WEIGHTS).mean()) == 0.0


def test_token_accuracy_ignores_tokens_of_weight_zero():
    correct = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    np.testing.assert_allclose(token_accuracy(correct, WEIGHTS).mean(), 1 / 3, rtol=1e-6)


def test_an_answer_counts_when_all_of_its_weighted_tokens_are_right():
    correct = jnp.array([[[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]], [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]])
    weights = jnp.array([[[1.0, 0.5, 1.0], [1.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    found = answer_accuracy(correct, weights)
    assert (float(found.total), float(found.weight)) == (2.0, 3.0)

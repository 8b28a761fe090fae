"""Llama, Mistral, Qwen2 and Qwen3 against `transformers`, from the published layout.

    python -m tests.parity.test_language_families     # writes tests/interop/language_logits.npz
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.language_folders import CONFIGS, GOLDEN, GOLDEN_EVERY, tokens_of, write_folder
from tpo_jax.interop.check_language import forward
from tpo_jax.interop.export import export_model, import_model
from tpo_jax.interop.folder import load_codec, load_language, open_leaves
from tpo_jax.models.language import bind
from tpo_jax.parallel.paths import unflatten

pytestmark = pytest.mark.parity
T, PROMPT, STEPS = 24, 7, 64


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def pair(request, tmp_path_factory):
    """Their model, our config and parameters; ours was imported, theirs is of our export."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(folder / "source", request.param)
    import_model(folder / "source", folder / "model")
    export_model(folder / "model", folder / "exported")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(folder / "exported", dtype=torch.float32).eval()
    config, _ = load_language(folder / "model")
    leaves = {path: np.asarray(leaf) for path, leaf in open_leaves(folder / "model").items()}
    return theirs, config, unflatten(leaves)["language"]


def _forward(config, params, tokens, positions, segments):
    """States in the order of `transformers` and logits."""
    embeds, states, last, logits = forward(config, params, tokens, positions, segments)
    return jnp.concatenate([embeds[None], states[:-1], last[None]]), logits


def _rows(config):
    """tokens, mask, positions int[3, T]: a whole row, one padded left, one padded right."""
    mask = np.ones((3, T), np.int32)
    # Published "dynamic" takes the longest row of the batch, ours each row by itself.
    if config.rope_scaling is None or config.rope_scaling.kind != "dynamic":
        mask[1, :9] = mask[2, -7:] = 0
    tokens = np.random.default_rng(1).integers(0, config.num_tokens, (3, T))
    return tokens, mask, np.where(mask, np.cumsum(mask, axis=1) - 1, 0)


def _theirs(model, tokens, mask, positions):
    import torch

    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions), output_hidden_states=True,
        )  # fmt: skip
    states = torch.stack(out.hidden_states).float().numpy()
    return states, out.logits.float().numpy()


def test_states_of_every_layer_logits_and_bfloat16(pair):
    import torch

    theirs, config, params = pair
    tokens, mask, positions = _rows(config)
    want_states, want = _theirs(theirs, tokens, mask, positions)
    states, logits = _forward(config, params, tokens, positions, mask)
    real = mask.astype(bool)
    for layer, (a, b) in enumerate(zip(states, want_states, strict=True)):
        np.testing.assert_allclose(a[real], b[real], atol=2e-4, err_msg=f"layer {layer}")
    np.testing.assert_allclose(logits[real], want[real], atol=2e-4)

    halved = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    _, rough = _forward(config, halved, tokens, positions, mask)
    rough_model = copy.deepcopy(theirs).to(torch.bfloat16)  # a way back would keep its rounding
    _, their_rough = _theirs(rough_model, tokens, mask, positions)
    ours_off = np.abs(np.asarray(rough, np.float32) - want)[real]
    theirs_off = np.abs(their_rough - want)[real]
    assert ours_off.mean() <= 2 * theirs_off.mean() and ours_off.max() <= 2 * theirs_off.max()


# A loop of 64 steps takes longer to optimise than to run.
@functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
def _generate(config, params, prompt):
    """Greedy int32[STEPS] after int32[PROMPT], token by token through the caches."""
    model = bind(config, params)
    ones = jnp.ones((1, PROMPT), jnp.int32)
    hidden, prefix = model.prefill(
        model.embed_tokens(prompt[None]), jnp.arange(PROMPT)[None], ones
    )

    def choose(hidden):
        logits = (hidden @ model.table.T)[: config.num_tokens]
        return jnp.argmax(logits).astype(jnp.int32)

    def step(carry, index):
        token, own = carry
        at = (PROMPT + index)[None, None, None]
        hidden, own = model.extend(
            model.embed_tokens(token[None, None, None]), at, jnp.ones((1, 1, 1), jnp.int32),
            prefix, ones, own, index,
        )  # fmt: skip
        return (choose(hidden[0, 0, 0]), own), token

    start = (choose(hidden[0, -1]), model.empty_cache(1, 1, STEPS, hidden.dtype))
    return jax.lax.scan(step, start, jnp.arange(STEPS))[1]


def test_greedy_generation_gives_the_same_64_tokens(pair):
    import torch

    theirs, config, params = pair
    prompt = np.random.default_rng(2).integers(0, config.num_tokens, PROMPT)
    want = theirs.generate(
        torch.tensor(prompt[None]), attention_mask=torch.ones((1, PROMPT), dtype=torch.long),
        do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    got = _generate(config, params, prompt)
    np.testing.assert_array_equal(got, want[0, PROMPT:].numpy())
    assert len(set(got.tolist())) > 8  # not one token over and over


def test_the_chat_template_gives_the_tokens_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_folder(tmp_path / "source", "qwen2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "source")
    codec = load_codec(tmp_path / "source")
    question, answer = "a red circle moves", "it is blue"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def rendered(turns, generate):
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=generate, tokenize=False)
        return tokenizer.encode(text, add_special_tokens=False)

    before = codec.build_prefix(0).tolist()[: codec.template.visual_offset]
    assert before + codec.build_branch(question, None).ids.tolist() == rendered(turns[:1], True)
    whole = before + codec.build_branch(question, answer).ids.tolist()
    assert whole == rendered(turns, False)[: len(whole)]
    assert codec.eos_id == tokenizer.eos_token_id


def write_golden() -> None:
    """One row of logits of every family, for the tests that run without torch."""
    import tempfile

    import torch
    import transformers

    golden = {}
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(f"{folder}/source", name)
            load = transformers.AutoModelForCausalLM.from_pretrained
            model = load(f"{folder}/source", dtype=torch.float32).eval()
        tokens = tokens_of(name)
        _, logits = _theirs(model, tokens, np.ones_like(tokens), np.arange(tokens.size)[None])
        golden[name] = logits[0, :, ::GOLDEN_EVERY]
    np.savez_compressed(GOLDEN, **golden)


if __name__ == "__main__":
    write_golden()

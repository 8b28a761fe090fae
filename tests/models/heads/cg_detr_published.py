"""CG-DETR as VideoChat-TPO runs it, in float64 NumPy on the published tensors by their own names.

Written from the paper (2311.08835), the sizes in OpenGVLab/TPO's tensor index, and what was read in
its third_party/cgdetr/cg_detr/{model,transformer,crossattention,position_encoding}.py. It is about
one video and one question without padding: rows are clips, words, queries. `w` are the tensors
below "cg_model." as float64.
"""

import numpy as np

DUMMIES = 45


def norm(w, name, x):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return normal * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def mlp(w, name, x, layers):
    for i in range(layers):
        x = linear(w, f"{name}.layers.{i}", x)
        x = np.maximum(x, 0) if i < layers - 1 else x
    return x


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def logit(x):
    return np.log(np.maximum(x, 1e-3) / np.maximum(1 - x, 1e-3))


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def waves(places, width):
    """Places [n] in [0, 1] as in the first transformer: sine and cosine of one wave in turn."""
    out = np.empty((len(places), width))
    for i in range(width):
        angle = 2 * np.pi * places / 10000 ** (2 * (i // 2) / width)
        out[:, i] = np.cos(angle) if i % 2 else np.sin(angle)
    return out


def split(x, heads):
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)


def attention(q, k, v, heads):
    """What is read [T, C], and the weights [heads, T, K]."""
    q, k, v = (split(x, heads) for x in (q, k, v))
    weights = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]))
    return (weights @ v).transpose(1, 0, 2).reshape(q.shape[1], -1), weights


def project(w, name, x):
    """The two layers in front: norm and linear, with a rectifier behind the first only."""
    x = np.maximum(linear(w, f"{name}.0.net.1", norm(w, f"{name}.0.LayerNorm", x)), 0)
    return linear(w, f"{name}.1.net.1", norm(w, f"{name}.1.LayerNorm", x))


def feed_forward(w, name, x):
    hidden = linear(w, f"{name}.linear1", x)
    hidden = np.where(hidden > 0, hidden, w[f"{name}.activation.weight"] * hidden)
    return linear(w, f"{name}.linear2", hidden)


def encoder(w, name, x, places, heads):
    i = 0
    while f"{name}.layers.{i}.norm1.weight" in w:
        layer = f"{name}.layers.{i}"
        query, key, value = np.split(w[f"{layer}.self_attn.in_proj_weight"], 3)
        biases = np.split(w[f"{layer}.self_attn.in_proj_bias"], 3)
        placed = x + places
        read, _ = attention(
            placed @ query.T + biases[0], placed @ key.T + biases[1], x @ value.T + biases[2], heads
        )
        x = norm(w, f"{layer}.norm1", x + linear(w, f"{layer}.self_attn.out_proj", read))
        x = norm(w, f"{layer}.norm2", x + feed_forward(w, layer, x))
        i += 1
    return x


def text(w, words, prompt, heads):
    """Words and the state behind them [T + 1, C], and what the dummies are for them [45, C]."""
    words = project(w, "input_txt_proj", np.concatenate([words, prompt[None]]))
    words = words + w["token_type_embeddings.weight"][0]
    places = np.concatenate([w["dummy_rep_pos"], np.zeros_like(words)])
    both = np.concatenate([w["dummy_rep_token"], words])
    return words, encoder(w, "txtproj_encoder", both, places, heads)[:DUMMIES]


def clips(w, features):
    """Clips [n, C] of features [n, D], and their positions."""
    n = len(features)
    ends = np.stack([np.arange(n), np.arange(1, n + 1)], axis=1) / n
    x = project(w, "input_vid_proj", np.concatenate([features, ends], axis=1))
    # The release divides by n + 1e-6.
    places = waves(np.arange(1, n + 1) / (n + 1e-6), x.shape[1])
    return x + w["token_type_embeddings.weight"][1], places


def reader(w, name, x, read):
    x = x + linear(w, f"{name}.self_attn.out_proj", read)
    return norm(w, f"{name}.norm2", x + feed_forward(w, name, norm(w, f"{name}.norm1", x)))


def read_text(w, x, places, words, dummies, heads):
    """Clips that have read the text, and the attention of clips to dummies and words [n, 45 + T]:
    dummies take part in the softmax, but give nothing."""
    keys = np.concatenate([dummies, words])
    key_places = np.concatenate([w["dummy_rep_pos"], np.zeros_like(words)])
    values = np.concatenate([np.zeros_like(dummies), words])
    found, i = [], 0
    while f"transformer.t2v_encoder.layers.{i}.norm1.weight" in w:
        read, weights = attention(x + places, keys + key_places, values, heads)
        x = reader(w, f"transformer.t2v_encoder.layers.{i}", x, read)
        found.append(weights.mean(0))
        i += 1
    return x, np.mean(found, axis=0)


def saliency_token(w, x, to_words, used=1):
    """[C] of clips before they read: their mean and the prompts that are most like them, each clip
    as heavy as its attention to words. It then goes through the readers with nothing to read."""
    mean = x.mean(0)
    prompts = w["global_rep_token"]
    alike = softmax(unit(x - mean) @ unit(prompts).T)
    shares = (alike * (to_words / to_words.sum())[:, None]).sum(0)
    best = np.argsort(-shares)[:used]
    token, i = (mean + shares[best] @ prompts[best])[None], 0
    while f"transformer.t2v_encoder.layers.{i}.norm1.weight" in w:
        token = reader(w, f"transformer.t2v_encoder.layers.{i}", token, np.zeros_like(token))
        i += 1
    return token[0]


def remember(w, x, places, token, heads):
    """Memory of clips [n, C] and of the token [C], and saliency [n]."""
    both = encoder(
        w, "transformer.encoder", np.concatenate([token[None], x]),
        np.concatenate([w["global_rep_pos"], places]), heads,
    )  # fmt: skip
    whole, memory = both[0], both[1:] + both[0]
    seen = linear(w, "saliency_proj1", memory) @ linear(w, "saliency_proj2", whole)
    return memory, whole, seen / np.sqrt(len(whole))


def decode(w, memory, places, heads):
    """Logits and spans [layers, 10, 2] of every decoder layer."""
    name, width = "transformer.decoder", memory.shape[1]
    reference = sigmoid(w["query_embed.weight"])
    x, logits, spans, i = np.zeros((len(reference), width)), [], [], 0
    while f"{name}.layers.{i}.norm1.weight" in w:
        layer = f"{name}.layers.{i}"

        def at(part, given, layer=layer):
            return linear(w, f"{layer}.{part}", given)

        sine = np.concatenate([waves(reference[:, j], width // 2) for j in range(2)], axis=1)
        place = mlp(w, f"{name}.ref_point_head", sine, 2)
        if i:
            sine = sine * mlp(w, f"{name}.query_scale", x, 2)
        scale = sigmoid(mlp(w, f"{name}.ref_anchor_head", x, 2))
        sine = sine * scale / reference[:, 1:]
        q = at("sa_qcontent_proj", x) + at("sa_qpos_proj", place)
        k = at("sa_kcontent_proj", x) + at("sa_kpos_proj", place)
        read, _ = attention(q, k, at("sa_v_proj", x), heads)
        x = norm(w, f"{layer}.norm1", x + at("self_attn.out_proj", read))

        q, k, k_place = (at("ca_qcontent_proj", x), at("ca_kcontent_proj", memory),
                         at("ca_kpos_proj", places))  # fmt: skip
        if i == 0:
            q, k = q + at("ca_qpos_proj", place), k + k_place
        sides = ((q, at("ca_qpos_sine_proj", sine)), (k, k_place))
        q, k = (np.concatenate([split(a, heads), split(b, heads)], axis=-1) for a, b in sides)
        q, k = (a.transpose(1, 0, 2).reshape(a.shape[1], -1) for a in (q, k))
        read, _ = attention(q, k, at("ca_v_proj", memory), heads)
        x = norm(w, f"{layer}.norm2", x + at("cross_attn.out_proj", read))
        x = norm(w, f"{layer}.norm3", x + feed_forward(w, layer, x))

        state = norm(w, f"{name}.norm", x)
        logits.append(linear(w, "class_embed", state))
        spans.append(sigmoid(mlp(w, "span_embed", state, 3) + logit(reference)))
        # As in the release, the prediction of a layer starts from what the layer before refined.
        reference = sigmoid(mlp(w, f"{name}.bbox_embed", x, 3) + logit(reference))
        i += 1
    return np.stack(logits), np.stack(spans)


def tokens_for_losses(w, x, places, relevant, words, dummies, heads):
    """Sentence, dummy sentence, moment and the rest's token, with the rows behind each of them."""

    def led(name, encoded, start, rows, row_places):
        both = np.concatenate([w[f"{start}_rep_token"][None], rows])
        all_places = np.concatenate([w[f"{start}_rep_pos"][None], row_places])
        out = encoder(w, encoded, both, all_places, heads)
        return {name: out[0], f"{name}_rows": out[1:]}

    return {
        **led("sentence", "scls_encoder", "sent", words, np.zeros_like(words)),
        **led("dummy_sentence", "scls_encoder", "sent", dummies, w["dummy_rep_pos"]),
        **led("moment", "transformer.mcls_encoder", "moment", x[relevant], places[relevant]),
        **led("other", "transformer.mcls_encoder", "moment", x[~relevant], places[~relevant]),
    }


def run(w, words, prompt, features, heads):
    """All outputs for one question: logits and spans [layers, 10, 2], saliency [n] and relevance
    [n], the attention to words."""
    words, dummies = text(w, words, prompt, heads)
    x, places = clips(w, features)
    read, weights = read_text(w, x, places, words, dummies, heads)
    to_words = weights[:, DUMMIES:].sum(1)
    token = saliency_token(w, x, to_words)
    memory, _, saliency = remember(w, read, places, token, heads)
    logits, spans = decode(w, memory, places, heads)
    return {"logits": logits, "spans": spans, "saliency": saliency, "relevance": to_words}

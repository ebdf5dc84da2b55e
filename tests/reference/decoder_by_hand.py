"""A pruned Qwen2.5-VL decoder written out in NumPy float64, from the formulas and nothing else.

No cache, no Hugging Face layer: every step recomputes the whole sequence with an explicit mask. Scores come
from the primal covariance [head_dim, head_dim], not from the dual Gram the package uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ep_export.policy import Budget, MaxMin, Nothing, Schedule, Scorer, Select, Source, TopK

__all__ = ["HandResult", "run_by_hand"]


@dataclass(frozen=True)
class HandResult:
    """Logits of every position that got to the end; for every cut what was kept and what for."""

    logits: np.ndarray
    kept_index: list[np.ndarray]
    scores: list[np.ndarray]


def run_by_hand(
    model, embeds, position_ids, visual_index, schedule: Schedule, counts, *, prompt_length: int
) -> HandResult:
    """embeds [S, d] and position_ids [3, S] of a prompt, text appended to it included.

    `counts` says for every cut how many visual tokens go on.
    """
    config = model.config.text_config
    weights = {
        name: p.detach().numpy().astype(np.float64)
        for name, p in model.named_parameters()
        if "visual" not in name
    }
    embeds = np.asarray(embeds, dtype=np.float64)
    cos, sin = _rotary(config, np.asarray(position_ids))
    hidden, rows, projections = embeds, np.arange(len(embeds)), ()
    cuts = {cut.layer: (cut.chooser, k) for cut, k in zip(schedule.cuts, counts, strict=True)}
    kept, scores = [], []
    for i in range(config.num_hidden_layers):
        if i in cuts and len(visual_index):
            chooser, k = cuts[i]
            prompt = np.flatnonzero(rows < prompt_length)
            projections = (*projections[:3], *(len(prompt) * a[prompt[-1]] for a in projections[3:]))
            visual = np.flatnonzero(np.isin(rows, visual_index))
            chosen, score = _choose(config, chooser, hidden, projections, visual, k)
            stay = np.setdiff1d(np.arange(len(rows)), np.setdiff1d(visual, chosen))
            hidden, rows = hidden[stay], rows[stay]
            kept.append(rows)
            scores.append(score)
        hidden, projections = _layer(config, weights, i, hidden, cos[rows], sin[rows])
    hidden = _norm(hidden, weights["model.language_model.norm.weight"], config.rms_norm_eps)
    return HandResult(hidden @ weights["lm_head.weight"].T, kept, scores)


def _rotary(config, position_ids):
    half = config.hidden_size // config.num_attention_heads // 2
    theta = config.rope_parameters["rope_theta"]
    frequency = theta ** (-np.arange(half) / half)
    axis = np.repeat(
        [0, 1, 2], config.rope_parameters["mrope_section"]
    )  # which position each frequency turns by
    angle = position_ids[axis].T * frequency
    angle = np.concatenate([angle, angle], axis=1)
    return np.cos(angle), np.sin(angle)


def _layer(config, weights, i, hidden, cos, sin):
    w = {k.split(f"layers.{i}.")[1]: v for k, v in weights.items() if f"layers.{i}." in k}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    x = _norm(hidden, w["input_layernorm.weight"], config.rms_norm_eps)
    q, k, v = (
        x @ w[f"self_attn.{name}_proj.weight"].T + w[f"self_attn.{name}_proj.bias"]
        for name in ("q", "k", "v")
    )
    weights = [
        _weights(
            _turn(_head(q, h, heads), cos, sin),
            _turn(_head(k, h // (heads // kv_heads), kv_heads), cos, sin),
        )
        for h in range(heads)
    ]
    attended = [weights[h] @ _head(v, h // (heads // kv_heads), kv_heads) for h in range(heads)]
    hidden = hidden + np.concatenate(attended, axis=1) @ w["self_attn.o_proj.weight"].T
    x = _norm(hidden, w["post_attention_layernorm.weight"], config.rms_norm_eps)
    gate = x @ w["mlp.gate_proj.weight"].T
    up = x @ w["mlp.up_proj.weight"].T
    hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down_proj.weight"].T
    return hidden, (q, k, v, sum(weights) / heads)


def _norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * weight


def _head(x, index, heads):
    width = x.shape[1] // heads
    return x[:, index * width : (index + 1) * width]


def _turn(x, cos, sin):
    half = x.shape[1] // 2
    return x * cos + np.concatenate([-x[:, half:], x[:, :half]], axis=1) * sin


def _weights(q, k):
    scores = q @ k.T / np.sqrt(q.shape[1])
    scores[np.triu_indices(len(q), 1)] = -np.inf  # kept tokens stay in order, so order is causality
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def _choose(config, chooser, hidden, projections, visual, k):
    """Positions [k] of the arriving sequence that stay, and what every visual token scores."""
    if isinstance(chooser, Nothing):
        return visual[:0], np.zeros(0)
    if isinstance(chooser, MaxMin):
        return visual[_farthest(hidden[visual], k)], np.zeros(0)
    assert isinstance(chooser, TopK)
    scores = _scores(_states(config, projections, hidden, chooser.source)[visual], chooser.scorer)
    return _best(scores, k, visual, chooser), scores


def _farthest(hidden, k):
    """Greedy max-min on the whole matrix of cosine distances."""
    unit = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    np.fill_diagonal(distance, np.inf)
    chosen = [int(distance.min(axis=1).argmax())]
    while len(chosen) < k:
        nearest = distance[:, chosen].min(axis=1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return np.sort(chosen)


def _states(config, projections, hidden, source):
    heads = config.num_key_value_heads if source in {Source.KEY, Source.VALUE} else config.num_attention_heads
    heads = 1 if source is Source.ATTENTION else heads
    projected = (Source.QUERY, Source.KEY, Source.VALUE, Source.ATTENTION)
    chosen = dict(zip(projected, projections, strict=False)).get(source, hidden)
    return chosen.reshape(len(chosen), heads, -1)


def _scores(states, scorer):
    if scorer is Scorer.NORM:
        return np.sqrt((states**2).sum(axis=(1, 2)))
    return np.array([_entropy(token, scorer) for token in states])


def _entropy(token, scorer):
    heads = len(token)
    rows = token - token.mean(axis=0)
    if scorer is not Scorer.RELEASED:
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    covariance = rows.T @ rows / heads
    if scorer is Scorer.ORDER2:
        purity = (covariance**2).sum()
        return -np.log(purity) if purity > 0 else 0.0
    eigenvalues = np.linalg.eigvalsh(covariance)
    positive = eigenvalues[eigenvalues > 1e-10]
    entropy = -(positive * np.log(positive)).sum()
    if scorer is Scorer.RELEASED:
        entropy += (
            -(heads - len(positive)) * 1e-10 * np.log(1e-10)
        )  # the dual has `heads` eigenvalues, clamped
        return entropy / (np.log(heads) if heads > 1 else 1)
    return entropy


def _best(scores, k, visual, chooser):
    best_first = np.argsort(-scores if chooser.select is Select.HIGHEST else scores, kind="stable")
    order = best_first
    if chooser.budget is Budget.PER_PICTURE:
        picture = np.cumsum(np.diff(visual, prepend=visual[0]) > 1)
        share = np.empty(len(scores))
        for p in np.unique(picture):
            members = [t for t in best_first if picture[t] == p]
            share[members] = (np.arange(len(members)) + 0.5) / len(members)
        order = np.argsort(share, kind="stable")
    return visual[order[:k]]

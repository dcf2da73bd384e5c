"""meta_dt.py: slow recomputations of both updates, sequences, prompts and rollouts; where the data come from; runs.

The slow functions are loops over tasks, steps, tokens and heads in float64, written from the equations. They share only
the networks' parameters with the script.
"""

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, OnDevice, read_rows, stop_message, to_meta

import data_collect as dc
import meta_dt

OBS_DIM, ACT_DIM, HORIZON = 3, 2, 12
KNOWN = OBS_DIM + ACT_DIM + 1  # columns of a context
SIZES = {"env": "point-robot", "width": 16, "encoder_width": 8, "z_dim": 4, "layers": 2, "heads": 2, "window": 6}
SIZES |= {"prompt_length": 3, "return_scale": 10.0, "world_model_loss": "reward", "world_model_updates": 1}
SMALL = {"env": "point-robot", "device": "cpu", "width": 32, "encoder_width": 32}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_agent(obs_dim=OBS_DIM, act_dim=ACT_DIM, horizon=HORIZON, std=0.4, **changes):
    """Agent with parameters large enough that nothing is near zero; std=None: as it starts."""
    args = dc.resolve(meta_dt.Args(**SIZES | changes), meta_dt.ENV_DEFAULTS)
    torch.manual_seed(0)
    data = SimpleNamespace(obs_dim=obs_dim, act_dim=act_dim, family=SimpleNamespace(horizon=horizon))
    agent = meta_dt.Agent(data, args)
    with torch.no_grad():
        for parameter in agent.parameters() if std else ():
            parameter.normal_(0, std)
    return agent, args


def make_episodes(lengths, seed=0):
    """-> episodes [E, H, ctx_dim], lengths [E]; zeros after the end."""
    rows = torch.randn(len(lengths), HORIZON, KNOWN + OBS_DIM, generator=torch.Generator().manual_seed(seed))
    rows[..., OBS_DIM : KNOWN - 1] = rows[..., OBS_DIM : KNOWN - 1].tanh()
    lengths = torch.as_tensor(lengths)
    return rows * (torch.arange(HORIZON) < lengths[:, None])[..., None], lengths


def assert_shares(found, expected):
    """The values `found` are draws from the distribution {value: probability}, whose sum need not be 1."""
    counts, total = Counter(found), sum(expected.values())
    assert set(counts) == {value for value, p in expected.items() if p > 0}
    for value, count in counts.items():
        p = expected[value] / total
        assert abs(count / len(found) - p) < 5 * math.sqrt(p * (1 - p) / len(found)) + 1e-9, value


def in_rows(*columns):
    """Tensors with as many rows -> their rows as tuples."""
    return list(map(tuple, torch.cat([column.reshape(len(column), -1) for column in columns], 1).tolist()))


# ---- slow recomputations ----------------------------------------------------------------


def affine(layer, x):
    return layer.weight @ x + layer.bias


def slow_norm(norm, x):
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * norm.weight + norm.bias


def slow_z(encoder, past, args):
    """z from the transitions (obs, act, rew) of an episode so far; only the last ones count."""
    gru, size = encoder.gru, args.encoder_width
    obs_dim, act_dim = encoder.embed[0].in_features, encoder.embed[1].in_features
    hidden, nothing = torch.zeros(size), torch.zeros(obs_dim + act_dim + 1)
    for row in [nothing] * (args.context_horizon - len(past)) + list(past)[-args.context_horizon :]:
        parts = row[:obs_dim], row[obs_dim : obs_dim + act_dim], row[obs_dim + act_dim :]
        x = torch.cat([affine(layer, part).relu() for layer, part in zip(encoder.embed, parts)])
        a, b = gru.weight_ih_l0 @ x + gru.bias_ih_l0, gru.weight_hh_l0 @ hidden + gru.bias_hh_l0
        reset, keep = torch.sigmoid(a[:size] + b[:size]), torch.sigmoid(a[size : 2 * size] + b[size : 2 * size])
        hidden = (1 - keep) * torch.tanh(a[2 * size :] + reset * b[2 * size :]) + keep * hidden
    return affine(encoder.head, hidden)


def slow_decode(decoder, z, act, *obs):
    x = torch.cat([*(affine(decoder.obs, o).relu() for o in obs), affine(decoder.act, act).relu(), z])
    x = affine(decoder.net[2], affine(decoder.net[0], x).relu()).relu()
    return affine(decoder.net[4], x)


def slow_errors(model, episode, t, args):
    """Errors of the world model at step t of an episode [n, ctx_dim]: of the reward, of the next observation or both;
    and z."""
    z = slow_z(model.encoder, episode[:t, :KNOWN], args)
    obs, act, rew, next_obs = episode[t].split([OBS_DIM, ACT_DIM, 1, OBS_DIM])
    errors = []
    if args.world_model_loss in ("reward", "both"):
        errors.append(slow_decode(model.reward, z, act, obs, next_obs) - rew)
    if args.world_model_loss in ("state", "both"):
        errors.append(slow_decode(model.state, z, act, obs) - next_obs)
    return errors, z


def slow_sequence(agent, episode, args):
    """Of one whole episode [n, ctx_dim]: its steps (rtg, obs, z, act, t), and {start: score} of its prompts."""
    steps, errors, model = [], [], agent.world_model
    for t in range(len(episode)):
        parts, z = slow_errors(model, episode, t, args)
        errors.append(sum(abs(value) for part in parts for value in part.tolist()))
        rtg = sum(row[KNOWN - 1] for row in episode[t:]) / args.return_scale
        steps.append((rtg[None], episode[t, :OBS_DIM], z, episode[t, OBS_DIM : KNOWN - 1], t))
    k = args.prompt_length
    starts = range(args.context_horizon, len(episode) - k + 1)
    return steps, {start: sum(errors[start : start + k]) for start in starts}


def slow_transformer(net, steps, prompt, args, drop=lambda x: x):
    """Actions at all `steps` after the `prompt`, both lists of (rtg, obs, z, act, t)."""
    size, part, tokens = args.width, args.width // args.heads, []
    for rtg, obs, _, act, t in prompt:
        parts = affine(net.prompt_rtg, rtg), affine(net.prompt_obs, obs), affine(net.prompt_act, act)
        tokens += [token + net.prompt_time.weight[t] for token in parts]
    for rtg, obs, z, act, t in steps:
        state = affine(net.state, torch.cat([affine(net.obs, obs), z]))
        parts = affine(net.rtg, rtg), state, affine(net.act, act)
        tokens += [slow_norm(net.norm, token + net.time.weight[t]) for token in parts]
    tokens = [drop(token) for token in tokens]
    for n in range(args.layers):
        block, after = net.blocks[n], []
        normed = [slow_norm(block.norm_1, token) for token in tokens]
        queries, kv = ([affine(layer, x) for x in normed] for layer in (block.query, block.key_value))
        for i, token in enumerate(tokens):
            heads = []
            for head in range(args.heads):
                first = head * part
                q, keys = queries[i][first : first + part], [x[first : first + part] for x in kv[: i + 1]]
                values = [x[size + first : size + first + part] for x in kv[: i + 1]]
                weights = torch.stack([torch.dot(q, key) / math.sqrt(part) for key in keys]).exp()
                heads.append(drop(sum(w * value for w, value in zip(weights, values)) / weights.sum()))
            token = token + drop(affine(block.project, torch.cat(heads)))
            after.append(token + drop(affine(block.down, affine(block.up, slow_norm(block.norm_2, token)).relu())))
        tokens = after
    states = tokens[3 * len(prompt) + 1 :: 3]
    return [torch.tanh(affine(net.head, slow_norm(net.final_norm, token))) for token in states]


def assert_first_step(trained, fixed, call, loss, clip, lr, weight_decay):
    """call() -> metrics is one step of Adam on `loss`, with clipped gradients, of `trained` alone."""
    parameters = list(trained.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = math.sqrt(sum(g.pow(2).sum().item() for g in gradients if g is not None))
    before = [p.detach().clone() for p in parameters]
    kept = [p.detach().clone() for p in fixed.parameters()]
    for p in [*parameters, *fixed.parameters()]:
        p.grad = torch.full_like(p, 7.0)  # of an earlier update
    metrics = call()
    assert all(torch.equal(p, q) and (p.grad == 7).all() for p, q in zip(fixed.parameters(), kept))
    for p, old, gradient in zip(parameters, before, gradients):
        if gradient is None:
            assert p.grad is None and torch.equal(p, old)
            continue
        gradient = gradient * min(1, clip / norm)
        torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-10)
        expected = (1 - lr * weight_decay) * old - lr * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-8, atol=1e-3 * lr)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    return {tag: value.item() for tag, value in metrics.items()}, norm


# ---- the two updates --------------------------------------------------------------------

DRAWN = [(0, 0), (0, 11), (1, 3), (1, 3), (2, 7), (3, 4), (3, 1)]  # episode and step, also before h steps are done


@pytest.mark.parametrize("loss, horizon, clip", [("reward", 4, 1.0), ("state", 3, 1e6), ("both", 5, 1.0)])
def test_world_model_update_equals_a_slow_recomputation(loss, horizon, clip, double, monkeypatch):
    monkeypatch.setattr(meta_dt, "WORLD_MODEL_CLIP", clip)
    agent, args = make_agent(world_model_loss=loss, context_horizon=horizon, world_model_lr=3e-3)
    episodes, lengths = make_episodes([12, 9, 12, 5])
    total, latents = 0.0, []
    for episode, step in DRAWN:
        errors, z = slow_errors(agent.world_model, episodes[episode], step, args)
        total = total + sum(error.pow(2).sum() / (len(error) * len(DRAWN)) for error in errors)
        latents.append(z.detach())
    episode, step = torch.tensor(DRAWN).T
    call = partial(meta_dt.update_world_model, agent, episodes, lengths, episode, step, args)
    found, norm = assert_first_step(agent.world_model, agent.transformer, call, total, clip, 3e-3, 0.0)
    std = np.std(torch.stack(latents).numpy(), axis=0, ddof=1).mean()
    expected = {"losses/world_model": total.item(), "stats/world_model_grad": norm, "z/between_std": std}
    assert norm > 1.0 and found == pytest.approx(expected)


def make_windows(agent, args):
    """Windows of K and of k random steps, padded behind or in front; whole, short and no prompts. Padding is large."""
    generator = torch.Generator().manual_seed(1)
    number = torch.arange(args.window)
    valid = torch.stack([number < 6, number < 4, number >= 2, number < 6])
    prompt_valid = torch.arange(args.prompt_length) < torch.tensor([3, 0, 3, 2])[:, None]
    windows = []
    for first, valid in (([0, 6, 2, 5], valid), ([4, 4, 9, 5], prompt_valid)):
        rows = torch.randn(*valid.shape, sum(agent.transformer.sizes), generator=generator)
        steps = torch.tensor(first)[:, None] + torch.arange(valid.shape[1])
        windows.append(meta_dt.Window(torch.where(valid[..., None], rows, 1e3), steps, valid))
    return windows


def listed(window, args):
    """Window -> for each row the list of its valid steps."""
    sizes = [1, OBS_DIM, args.z_dim, ACT_DIM]
    steps = [[(*row.split(sizes), t) for row, t in zip(rows, times)] for rows, times in zip(window.rows, window.steps)]
    return [[step for step, valid in zip(row, inside) if valid] for row, inside in zip(steps, window.valid)]


def fake_dropout(x, p, training=True):
    return x - p * x.abs() if training else x


def fake_attention(q, k, v, mask, p):
    return fake_dropout(attention(q, k, v, mask), p)


attention = torch.nn.functional.scaled_dot_product_attention
VARIANTS = [({}, 0.25, True), ({"layers": 1, "heads": 4, "weight_decay": 0.5}, 1e6, True), ({"layers": 3}, 0.25, False)]


@pytest.mark.parametrize("variant, clip, with_prompt", VARIANTS, ids=str)
def test_transformer_update_equals_a_slow_recomputation(variant, clip, with_prompt, double, monkeypatch):
    """A known change replaces dropout, which shows where it acts. Padding counts nowhere."""
    monkeypatch.setattr(meta_dt, "CLIP", clip)
    monkeypatch.setattr(meta_dt.F, "dropout", fake_dropout)
    monkeypatch.setattr(meta_dt.F, "scaled_dot_product_attention", fake_attention)
    agent, args = make_agent(**{"dropout": 0.3, "lr": 2e-3, "weight_decay": 0.2} | variant)
    window, prompt = make_windows(agent, args)
    total, count = 0.0, int(window.valid.sum()) * ACT_DIM
    for steps, before in zip(listed(window, args), listed(prompt, args)):
        before = before if with_prompt else []
        acts = slow_transformer(agent.transformer, steps, before, args, lambda x: fake_dropout(x, args.dropout))
        total = total + sum((act - step[3]).pow(2).sum() / count for act, step in zip(acts, steps))
    call, decay = partial(meta_dt.update, agent, window, prompt if with_prompt else None, args), args.weight_decay
    found, norm = assert_first_step(agent.transformer, agent.world_model, call, total, clip, 2e-3, decay)
    assert norm > 0.25 and found == pytest.approx({"losses/actor": total.item(), "stats/actor_grad": norm})


def test_training_and_adaptation_stay_on_the_device(monkeypatch):
    """Both phases and the policy on a device without values."""
    agent, args = make_agent(world_model_loss="both", meta_batch=4, batch_size=12)
    to_meta(agent)
    episodes = torch.zeros(3, 5, HORIZON, 2 * OBS_DIM + ACT_DIM + 1, device="meta")
    lengths = torch.full((3, 5), HORIZON, device="meta")
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
    with OnDevice():
        episode, step = meta_dt.draw_steps(lengths, args, None)
        flat = episodes.flatten(0, 1), lengths.flatten()
        metrics = [meta_dt.update_world_model(agent, *flat, episode, step, args)]
        sequences = meta_dt.read_episodes(agent, *meta_dt.best_first(agent, episodes, lengths))
        metrics.append(meta_dt.update(agent, *meta_dt.draw_windows(sequences, lengths, args, None), args))
        mask = torch.ones(15, HORIZON, device="meta")
        policy = meta_dt.adapt(agent, flat[0], mask, targets=torch.zeros(3, device="meta"))
        for _ in range(2):
            act = policy(torch.zeros(15, OBS_DIM, device="meta"), torch.zeros(15, device="meta"))
        z = meta_dt.embed(agent, flat[0], mask)
    assert act.shape == (15, ACT_DIM) and z.shape == (15, args.z_dim) and z.device.type == "meta"
    assert all(value.device.type == "meta" for values in metrics for value in values.values())


# ---- sizes and the start ----------------------------------------------------------------

def test_networks_start_as_the_official_ones():
    sizes = {name: getattr(meta_dt.Args(), name) for name in ("width", "encoder_width", "z_dim", "layers", "heads")}
    agent, _ = make_agent(27, 8, 200, std=None, **sizes)
    parts = agent.world_model.encoder, agent.world_model.reward, agent.transformer
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [71_040, 25_553, 658_632]
    for name, p in [*agent.world_model.named_parameters(), *agent.transformer.blocks.named_parameters()]:
        if "norm" in name:
            continue
        if "bias" in name:
            assert (p == 0).all(), name
        elif "gru" in name:
            torch.testing.assert_close(p.T @ p, torch.eye(p.shape[1]))
        elif p in set(agent.world_model.parameters()):
            bound = math.sqrt(6 / sum(p.shape))
            assert 0.8 * bound < p.abs().max() <= bound, name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name


# ---- sequences --------------------------------------------------------------------------


def test_cut_pads_outside_the_episode():
    """Contexts have zeros before the episode, windows after it, and nothing of another one."""
    rows = torch.arange(1.0, 25.0).view(2, 12, 1)
    episode, start = torch.tensor([0, 0, 1]), torch.tensor([-3, 1, -4])
    context, steps, valid = meta_dt.cut(rows, torch.tensor([12, 12]), episode, start, 4)
    assert context[..., 0].tolist() == [[0, 0, 0, 1], [2, 3, 4, 5], [0, 0, 0, 0]]
    assert valid.tolist() == [[False] * 3 + [True], [True] * 4, [False] * 4] and (steps >= 0).all()
    cut, steps, valid = meta_dt.cut(rows, torch.tensor([7, 12]), torch.tensor([0]), torch.tensor([5]), 9)
    assert cut[0, :, 0].tolist() == [6, 7] + [0] * 7 and valid[0].tolist() == [True] * 2 + [False] * 7
    assert steps[0].tolist() == [5, 6, 7, 8, 9, 10, 11, 11, 11]


def test_returns_and_scores_equal_hand_made_values():
    assert meta_dt.returns_to_go(torch.tensor([1.0, 2.0, 3.0])).tolist() == [6, 5, 3]
    scores = meta_dt.prompt_scores(torch.tensor([[0.0, 0, 0, 0, 1, 2, 3, 4, 0, 0]]), torch.tensor([10]), 4, 3)
    assert scores.tolist() == [[0, 0, 0, 0, 6, 9, 7, 4]]
    assert meta_dt.prompt_scores(torch.ones(1, 10), torch.tensor([8]), 4, 3).tolist() == [[0, 0, 0, 0, 3, 3, 0, 0]]


@pytest.mark.parametrize("loss, horizon, length", [("state", 2, 5), ("both", 4, 3)])
def test_sequences_match_slow_loops(loss, horizon, length, double):
    """Returns-to-go, observations, z, actions and scores of two tasks, best episodes first, missing ones last."""
    agent, args = make_agent(world_model_loss=loss, context_horizon=horizon, prompt_length=length, return_scale=7.0)
    episodes, lengths = make_episodes([12, 9, 6, 12, 0, 12])
    episodes[3:, :, KNOWN - 1] -= 9  # worse than the 0 of a missing episode
    episodes[4] = 0
    order = [*sorted(range(3), key=lambda n: -episodes[n, :, KNOWN - 1].sum()), 3, 5, 4]
    order[3:5] = sorted(order[3:5], key=lambda n: -episodes[n, :, KNOWN - 1].sum())
    best = meta_dt.best_first(agent, episodes.view(2, 3, HORIZON, -1), lengths.view(2, 3))
    sequences = meta_dt.read_episodes(agent, *best)
    assert torch.equal(sequences.lengths, lengths[order]) and not any(x.requires_grad for x in sequences)
    for n, (at, count) in enumerate(zip(order, sequences.lengths)):
        steps, scores = slow_sequence(agent, episodes[at, :count], args)
        expected = torch.zeros(HORIZON - length + 1)
        for start, score in scores.items():
            expected[start] = score
        torch.testing.assert_close(sequences.scores[n], expected)
        for row, (*parts, _) in zip(sequences.rows[n], steps):
            torch.testing.assert_close(row, torch.cat(parts))


def test_embedding_averages_z_of_complete_contexts(double):
    """A shorter episode gives z after its last transition, an empty one z of zeros."""
    (agent, args), horizon = make_agent(), 4
    episodes, lengths = make_episodes([12, 9, 4, 2, 0])
    found = meta_dt.embed(agent, episodes, (torch.arange(HORIZON) < lengths[:, None]).double())
    for z, episode, length in zip(found, episodes, lengths.tolist()):
        known = episode[:, :KNOWN]
        whole = [slow_z(agent.world_model.encoder, known[: t + 1], args) for t in range(horizon - 1, length)]
        expected = sum(whole) / len(whole) if whole else slow_z(agent.world_model.encoder, known[:length], args)
        torch.testing.assert_close(z, expected.detach())
    assert not found.requires_grad


# ---- drawing batches --------------------------------------------------------------------


def numbered_sequences(lengths):
    """Sequences whose rows are (episode, step): lengths [U, N] -> Sequences."""
    lengths = torch.as_tensor(lengths).flatten()
    number, step = torch.meshgrid(torch.arange(len(lengths)), torch.arange(HORIZON), indexing="ij")
    scores = meta_dt.prompt_scores(1.0 + (7 * number + step * step) % 5, lengths, 4, 3)
    return meta_dt.Sequences(torch.stack([number, step], -1).float(), lengths, scores)


def test_world_model_steps_are_uniform():
    """Several independent steps of one episode."""
    lengths, args = torch.tensor([[12, 5], [3, 0]]), meta_dt.Args(meta_batch=20_000, context_size=2)
    episode, step = (x.view(20_000, 2) for x in meta_dt.draw_steps(lengths, args, torch.Generator().manual_seed(0)))
    assert (episode == episode[:, :1]).all()
    counts = {0: (12, 0.25), 1: (5, 0.25), 2: (3, 0.5)}
    expected = {(n, a, b): p / count**2 for n, (count, p) in counts.items() for a in range(count) for b in range(count)}
    assert_shares(in_rows(episode[:, :1], step), expected)


@pytest.mark.parametrize("which, share", [("best", 1.0), ("any", 0.5)])
def test_windows_and_prompts_follow_their_distributions(which, share):
    """Windows: uniform over tasks, the first share of their episodes, and the last step. Prompts: uniform over the
    other episodes, or over the first three; the start in proportion to its score; dropped independently."""
    lengths = torch.tensor([[12, 12, 12, 12, 10], [12, 12, 9, 0, 0]])
    sequences = numbered_sequences(lengths)
    changes = {"prompt_dropout": 0.3, "prompt_episodes": which, "episode_share": share}
    _, args = make_agent(meta_batch=10_000, batch_size=13, **changes)
    window, prompt = meta_dt.draw_windows(sequences, lengths, args, torch.Generator().manual_seed(0))
    count = lengths.flatten().tolist()
    assert window.rows.shape == (30_000, 6, 2) and prompt.rows.shape == (30_000, 3, 2)  # 13 steps: 3 windows of 6
    own, first = window.rows[:, 0, 0].long(), window.steps[:, 0]
    other, start = prompt.rows[:, 0, 0].long(), prompt.steps[:, 0]
    expected, pairs = Counter(), {}
    cut_from = [range(5), (5, 6, 7)] if share == 1 else [(0, 1, 2), (5, 6)]  # half of five and of three, rounded up
    for task, n in [(task, n) for task in (0, 1) for n in cut_from[task]]:
        others = [m for m in range(5 * task, 5 * task + 5) if m != n and count[m] > 0]
        others = others[:3] if which == "best" else others
        pairs |= {(n, m): 1 / len(cut_from[task]) / len(others) for m in others}
        for last in range(count[n]):
            expected[n, max(last - 5, 0)] += 1 / len(cut_from[task]) / count[n]
    assert_shares(in_rows(own, first), expected)
    assert_shares(in_rows(own, other), pairs)
    for m in set(other.tolist()):
        possible = {j: score for j, score in enumerate(sequences.scores[m].tolist()) if score > 0}
        assert_shares(start[other == m].tolist(), possible)
    kept = prompt.valid.any(1)
    assert torch.equal(kept, prompt.valid.all(1))
    for early in (True, False):
        assert_shares(kept[(first == 0) == early].tolist(), {True: 0.7, False: 0.3})


def test_training_reads_only_training_tasks(numbered, numbered_path, tmp_path, monkeypatch):
    """Every step of the world model and every window and prompt are traced to task, episode and step. z is of the
    trained world model, which no longer changes. The learning rate rises, stays and falls."""
    learn, update, seen, models = meta_dt.update_world_model, meta_dt.update, [], []
    known = numbered.episodes[..., :4]
    origin = {bytes(known[at].numpy()): at for at in np.ndindex(known.shape[:3]) if at[2] < numbered.lengths[at[:2]]}

    def learn_spy(agent, episodes, lengths, episode, step, args):
        seen.append(agent.world_model_opt.param_groups[0]["lr"])
        assert len(episode) == 4 * 8 and len(set(episode.tolist())) <= 4  # --meta-batch, --context-size
        for n, t in zip(episode.tolist(), step.tolist()):
            task, number, now = origin[bytes(episodes[n, t, :4].numpy())]
            assert task in numbered.train_ids and now == t < lengths[n] == numbered.lengths[task, number]
            assert torch.equal(episodes[n], numbered.episodes[task, number, :, :-1])
        return learn(agent, episodes, lengths, episode, step, args)

    def trace(agent, rows, steps, valid, args):
        """Check one row of a Window -> task, episode and number of its first step."""
        rtg, obs, z, act = rows[valid].split([1, 2, args.z_dim, 2], -1)
        places = [origin[bytes(row.numpy())] for row in torch.cat([obs, act], -1)]
        task, n, first = places[0]
        assert places == [(task, n, t) for t in range(first, first + len(places))]
        assert steps[valid].tolist() == [t for _, _, t in places] and task in numbered.train_ids
        expected = [numbered.episodes[task, n, t:, 4].sum() / args.return_scale for _, _, t in places]
        np.testing.assert_allclose(rtg[:, 0], expected, rtol=1e-4, atol=1e-4)
        past = numbered.episodes[task, n, :first, :5]
        torch.testing.assert_close(z[0], slow_z(agent.world_model.encoder, past, args), rtol=1e-3, atol=1e-5)
        return places[0]

    def update_spy(agent, window, prompt, args):
        seen.append(agent.opt.param_groups[0]["lr"])
        assert not any(p.requires_grad for p in agent.world_model.parameters())
        assert window.rows.shape[:2] == (4 * 2, args.window)  # 24 steps: two windows of 20
        for mine, prompts in zip(zip(*window), zip(*prompt)):
            task, number, _ = trace(agent, *mine, args)
            if prompts[2].any():  # not dropped
                found, other, start = trace(agent, *prompts, args)
                possible = range(args.context_horizon, numbered.lengths[task, other] - args.prompt_length + 1)
                assert found == task and other != number and start in (possible or [0])
        return update(agent, window, prompt, args)

    monkeypatch.setattr(meta_dt, "update_world_model", learn_spy)
    monkeypatch.setattr(meta_dt, "update", update_spy)
    monkeypatch.setattr(meta_dt, "evaluate_all", lambda *_: {"z/nearest_task_acc": 0.0, "z/probe_r2": 0.0})
    changes = {"total_updates": 8, "meta_batch": 4, "batch_size": 24, "context_size": 8}
    changes |= {"lr": 0.5, "warmup_updates": 2, "world_model_lr": 0.02, "world_model_updates": 3}
    meta_dt.train(meta_dt.Args(dataset=str(numbered_path), run_dir=str(tmp_path), **SMALL | changes))
    assert seen == pytest.approx([0.02] * 3 + [0.25, 0.5, 0.5, 0.5, 0.5, 0.375, 0.25, 0.125])


# ---- rollouts ---------------------------------------------------------------------------


def test_rollouts_match_a_slow_transformer(double):
    """Episodes of two tasks, two rows each: z of the episode so far, the last K steps with their numbers, the return
    still to come, the prompt of the row's only episode; no dropout. The last row has no context."""
    agent, args = make_agent(dropout=0.5, window=5)
    episodes, _ = make_episodes([HORIZON] * 4)
    given, lengths = make_episodes([12, 9, 11, 0], seed=1)
    mask = (torch.arange(HORIZON) < lengths[:, None]).double()
    adapt = partial(meta_dt.adapt, targets=torch.tensor([5.0, -3.0]))
    policies = [adapt(agent, given, mask, explore) for explore in (False, True)]
    policies.append(adapt(agent, given[:, :0], mask[:, :0]))
    without, _ = make_agent(window=5, prompt_dropout=1.0)
    policies.append(adapt(without, given, mask))
    obs, rew = episodes[..., :OBS_DIM], episodes[..., KNOWN - 1]
    history, prompts = [[] for _ in range(4)], [[] for _ in range(4)]
    for n in range(3):
        steps, scores = slow_sequence(agent, given[n, : lengths[n]], args)
        start = max(scores, key=scores.get)
        prompts[n] = steps[start : start + args.prompt_length]
    for t in range(HORIZON):
        before = rew[:, t - 1] if t > 0 else torch.full((4,), 1e3)  # an earlier episode's
        found, again, *no_prompt = (policy(obs[:, t], before) for policy in policies)
        assert torch.equal(found, again) and torch.equal(*no_prompt)
        torch.testing.assert_close(found[3], no_prompt[0][3])
        for n in range(4):
            rtg = ([5.0, 5.0, -3.0, -3.0][n] - rew[n, :t].sum()) / args.return_scale
            past = [torch.cat([o, a, rew[n, s][None]]) for s, (_, o, _, a, _) in enumerate(history[n])]
            z = slow_z(agent.world_model.encoder, past, args)
            history[n].append((rtg[None], obs[n, t], z, found[n], t))
            if t in (0, 1, 5, 11):
                act = slow_transformer(agent.transformer, history[n][-5:], prompts[n], args)[-1]
                torch.testing.assert_close(found[n], act, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["best", "any"])
def test_prompt_starts_where_errors_are_largest(kind, double):
    """In one of the row's best three episodes, or of all, each as often; never in an empty one. Evaluations repeat
    their prompts, but another seed changes them."""
    agent, args = make_agent(prompt_episodes=kind)
    episodes, _ = make_episodes([HORIZON] * 4)
    slow = [slow_sequence(agent, episode, args) for episode in episodes]
    best = sorted(range(4), key=lambda n: -slow[n][0][0][0].item())[: 3 if kind == "best" else 4]
    order = [np.random.default_rng(row).permutation(4) for row in range(300)]
    context, mask = torch.stack([episodes[numbers].flatten(0, 1) for numbers in order]), torch.ones(300, 5 * HORIZON)
    context, mask[:, 4 * HORIZON :] = torch.nn.functional.pad(context, (0, 0, 0, HORIZON)), 0
    rows, steps, valid = meta_dt.find_prompt(agent, context, mask)
    origin = {tuple(step[1].tolist()): n for n in range(4) for step in slow[n][0]}
    which, starts = [origin[row] for row in in_rows(rows[:, 0, 1 : 1 + OBS_DIM])], steps[:, 0].tolist()
    assert_shares(which, dict.fromkeys(best, 1))
    assert valid.all() and torch.equal(steps, steps[:, :1] + torch.arange(3))
    for n, start, row in zip(which[:40], starts, rows):
        torch.testing.assert_close(row, torch.stack([torch.cat(step[:4]) for step in slow[n][0][start : start + 3]]))
    assert set(zip(which, starts)) == {(n, max(slow[n][1], key=slow[n][1].get)) for n in best}
    for args.seed, same in ((0, True), (5, False)):
        assert torch.equal(meta_dt.find_prompt(agent, context[:20], mask[:20]).rows, rows[:20]) == same


@pytest.mark.parametrize("which", ["train_top", "task_max", -7.5])
def test_protocols_aim_at_their_tasks_returns(which, numbered, monkeypatch):
    seen = {}

    def evaluate(data, adapt, protocols, episodes):
        seen[protocols[0]] = adapt.keywords["targets"].tolist()
        return {}

    monkeypatch.setattr(dc, "evaluate", evaluate)
    monkeypatch.setattr(dc, "embedding_quality", lambda *_: {})
    meta_dt.evaluate_all("agent", numbered, meta_dt.Args(target_return=which), dc.PROTOCOLS, 3)
    best = numbered.episode_returns.max(1)  # of four episodes the best quarter is the best one
    for protocol in dc.PROTOCOLS:
        goals = best[:6] if protocol == "train" else best[6:]
        expected = {"task_max": goals, "train_top": [best[:6].mean()]}.get(which, [which])
        assert seen[protocol] == pytest.approx(expected)


def test_best_quarters_are_rounded_up():
    """Two of five, one of three, one of one; test tasks do not count."""
    returns = np.array([[1.0, 4, 2, 3, 5], [-8, -7, -9, 0, 0], [100, 0, 0, 0, 0], [-6, 0, 0, 0, 0]])
    present = np.array([5, 3, 1, 1])
    data = SimpleNamespace(episode_returns=returns, present=present, train_ids=np.array([0, 1, 3]), device="cpu")
    assert meta_dt.target_returns(data, np.array([2]), "train_top").tolist() == pytest.approx([(4.5 - 7 - 6) / 3])


# ---- learning ---------------------------------------------------------------------------


def test_learns_point_robot(tmp_path):
    """Random -20.3, the data's mean over many policies -6.8, expert -4.7. Seed 0 reaches -6.0; z of zeros in rollouts
    gives -6.6, a flipped sign in the loss -33."""
    settings = {"layers": 1, "lr": 3e-3, "meta_batch": 16, "batch_size": 20, "context_size": 16, "final_episodes": 3}
    settings |= {"dataset": str(ROOT / "datasets" / "point-robot.npz"), "run_dir": str(tmp_path)}
    result = meta_dt.train(meta_dt.Args(**SMALL | settings, total_updates=200, log_every=200))
    losses = {tag: float(value) for _, tag, value in read_rows(result["run_dir"])}
    assert result["eval/iid/return"] > -6.4 and result["z/probe_r2"] > 0.9
    assert losses["losses/world_model"] < 0.004 and losses["losses/actor"] < 0.25


# ---- defaults and bad input -------------------------------------------------------------


DEFAULTS = {"ant-dir": ("reward", 20, 5, 500, 1e-4), "point-robot-wind": ("state", 20, 5, 10, 1e-4)}
DEFAULTS |= {"hopper-rand-params": ("state", 8, 3, 500, 1e-4), "cheetah-vel": ("reward", 20, 5, 500, 2)}


@pytest.mark.parametrize("env", DEFAULTS)
def test_defaults_follow_the_family(env, monkeypatch):
    monkeypatch.setattr(dc, "load_dataset", lambda *_: 1 / 0)  # the arguments are complete by then
    args = meta_dt.Args(env=env, device="cpu", total_updates=105)
    with pytest.raises(ZeroDivisionError):
        meta_dt.train(args)
    found = args.world_model_loss, args.window, args.prompt_length, args.return_scale, args.weight_decay
    assert found == DEFAULTS[env] and (args.world_model_updates, args.warmup_updates) == (105, 10)


def test_bad_sizes_are_refused(numbered, monkeypatch):
    fits = meta_dt.Args(env="point-robot", context_horizon=14, prompt_length=6, width=6, heads=3)
    meta_dt.check_sizes(fits, numbered)
    for name, value in (("prompt_length", 7), ("context_horizon", 15), ("heads", 4), ("episode_share", 1.5)):
        message = stop_message(meta_dt.check_sizes, replace(fits, **{name: value}), numbered)
        assert f"--{name.replace('_', '-')} {value}" in message
    monkeypatch.setattr(numbered, "min_episodes", 1)
    assert "two episodes" in stop_message(meta_dt.check_sizes, fits, numbered)

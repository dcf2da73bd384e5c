"""meta_dt.py: slow recomputations of both updates, sequences, prompts and rollouts; where the data come from; runs.

The slow functions are loops over tasks, steps, tokens and heads in float64, written from the equations. They share only
the networks' parameters with the script.
"""

import math
import re
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, OnDevice, flags, load, read_rows, stop_message, to_meta
from torch.utils.flop_counter import FlopCounterMode

import data_collect as dc
import meta_dt

OBS_DIM, ACT_DIM, HORIZON = 3, 2, 12
KNOWN = OBS_DIM + ACT_DIM + 1  # columns of a context
SIZES = {"env": "point-robot", "width": 16, "encoder_width": 8, "z_dim": 4, "layers": 2, "heads": 2, "window": 6}
SIZES |= {"prompt_length": 3, "return_scale": 10.0, "world_model_loss": "reward", "world_model_updates": 1}
SMALL = {"env": "point-robot", "device": "cpu", "total_updates": 40, "log_every": 10, "eval_every": 20}
SMALL |= {"save_every": 10, "eval_episodes": 1, "meta_batch": 4, "batch_size": 8, "context_size": 8}
SMALL |= {"width": 16, "encoder_width": 16}


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


def make_episodes(lengths, obs_dim=OBS_DIM, act_dim=ACT_DIM, horizon=HORIZON, seed=0):
    """-> episodes [E, H, ctx_dim], lengths [E]; zeros after the end."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(lengths), horizon, 2 * obs_dim + act_dim + 1, generator=generator)
    rows[..., obs_dim : obs_dim + act_dim] = rows[..., obs_dim : obs_dim + act_dim].tanh()
    lengths = torch.as_tensor(lengths)
    return rows * (torch.arange(horizon) < lengths[:, None])[..., None], lengths


def run(path, folder, **changes):
    return meta_dt.train(meta_dt.Args(**SMALL | {"dataset": str(path), "run_dir": str(folder)} | changes))


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


@pytest.fixture
def unevaluated(monkeypatch):
    """Runs without the time that evaluations take."""
    results = {"eval/iid/return": 0.0, "eval/iid/normalized": 0.0, "z/nearest_task_acc": 0.0, "z/probe_r2": 0.0}
    monkeypatch.setattr(meta_dt, "evaluate_all", lambda *_: dict(results))


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


@pytest.mark.parametrize("clip", [1.0, 1e6])
@pytest.mark.parametrize("loss, horizon", [("reward", 4), ("state", 3), ("both", 5)])
def test_world_model_steps_on_its_slow_loss(loss, horizon, clip, double, monkeypatch):
    if clip > 1:
        monkeypatch.setattr(meta_dt, "WORLD_MODEL_CLIP", clip)
    agent, args = make_agent(world_model_loss=loss, context_horizon=horizon, world_model_lr=3e-3)
    episodes, lengths = make_episodes([12, 9, 12, 5])
    total, latents = 0.0, []
    for episode, step in DRAWN:
        errors, z = slow_errors(agent.world_model, episodes[episode], step, args)
        assert [len(error) for error in errors] == {"reward": [1], "state": [OBS_DIM], "both": [1, OBS_DIM]}[loss]
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
VARIANTS = [{}, {"layers": 1, "heads": 4, "dropout": 0.0, "weight_decay": 0.5}, {"layers": 3, "heads": 1}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("clip, with_prompt", [(0.25, True), (1e6, True), (0.25, False)])
def test_transformer_steps_on_its_slow_loss(variant, clip, with_prompt, double, monkeypatch):
    """A known change replaces dropout, which shows where it acts. Padding counts nowhere."""
    if clip > 1:
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


def test_nothing_needs_the_host(monkeypatch):
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
        for which in ("best", "any"):
            drawn = meta_dt.draw_windows(sequences, lengths, replace(args, prompt_episodes=which), None)
            metrics.append(meta_dt.update(agent, *drawn, args))
        mask = torch.ones(15, HORIZON, device="meta")
        policy = meta_dt.adapt(agent, flat[0], mask, targets=torch.zeros(3, device="meta"))
        for _ in range(2):
            act = policy(torch.zeros(15, OBS_DIM, device="meta"), torch.zeros(15, device="meta"))
        z = meta_dt.embed(agent, flat[0], mask)
    assert act.shape == (15, ACT_DIM) and z.shape == (15, args.z_dim) and z.device.type == "meta"
    assert all(value.device.type == "meta" for values in metrics for value in values.values())


# ---- sizes and the start ----------------------------------------------------------------

DEFAULTS = asdict(meta_dt.Args())
DEFAULTS = {name: DEFAULTS[name] for name in SIZES if name not in ("env", "world_model_loss", "world_model_updates")}


@pytest.mark.parametrize(
    "sizes, encoder, reward, state, transformer",
    [
        ((2, 2, 20), 70_544, 25_057, None, 606_642),
        ((27, 8, 200), 71_040, 25_553, None, 658_632),
        ((11, 3, 200), None, None, 24_459, 654_403),
        ((17, 6, 200), None, None, 25_377, 656_422),
        ((39, 4, 500), None, None, None, 735_620),
    ],
)
def test_parameter_counts_are_the_official_ones(sizes, encoder, reward, state, transformer):
    agent, _ = make_agent(*sizes, std=None, **DEFAULTS | {"world_model_loss": "both"})
    model = agent.world_model
    parts = model.encoder, model.reward, model.state, agent.transformer
    found = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert all(value == count for value, count in zip((encoder, reward, state, transformer), found) if value)


def test_networks_start_as_the_official_ones():
    agent, _ = make_agent(std=None, width=64, encoder_width=64, world_model_loss="both")
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


def test_cost_of_an_update_at_the_default_sizes():
    agent, args = make_agent(27, 8, 200, std=None, **DEFAULTS | {"env": "ant-dir"})
    episodes, lengths = (x[None] for x in make_episodes([200] * 4, 27, 8, 200))
    sequences = meta_dt.read_episodes(agent, episodes, lengths)
    window, prompt = meta_dt.draw_windows(sequences, lengths, args, torch.Generator().manual_seed(0))
    assert window.rows.shape[:2] == (32, 20) and prompt.rows.shape[:2] == (32, 5)
    with FlopCounterMode(display=False) as flops:
        meta_dt.update(agent, window, prompt, args)
    assert 6.5 < flops.get_total_flops() / 1e9 <= 7.5


def test_rollouts_compute_one_last_block_token():
    agent, args = make_agent(27, 8, 200, std=None, **DEFAULTS | {"env": "ant-dir"})
    window, layers, width, steps = args.window, args.layers, args.width, []
    act = meta_dt.adapt(agent, torch.zeros(2, 0, 63), torch.zeros(2, 0), targets=torch.zeros(1))
    for _ in range(window + 1):
        with FlopCounterMode(display=False) as flops:
            act(torch.zeros(2, 27), torch.zeros(2))
        steps.append(flops.get_total_flops())
    tokens = 2 * 3 * window
    whole = (layers - 1) * tokens * 2 * 12 * width**2  # qkv, projection and MLP of a block: 12 width^2 weights
    keys = tokens * 2 * 2 * width**2  # keys and values of the last block
    assert steps[-1] < 1.1 * (whole + keys)  # the rest: attention, embeddings, world model


# ---- sequences --------------------------------------------------------------------------


def test_returns_to_go_vector():
    rtg = meta_dt.returns_to_go(torch.tensor([1.0, 2.0, 3.0]))
    assert rtg.tolist() == [6, 5, 3]
    torch.testing.assert_close(rtg / 10, torch.tensor([0.6, 0.5, 0.3]))


def test_context_vectors():
    """The last 4 steps; zeros before the episode, nothing of another one."""
    rows = torch.arange(1.0, 25.0).view(2, 12, 1)
    lengths, step = torch.tensor([12, 12]), torch.tensor([0, 1, 5, 0])
    episode = torch.tensor([0, 0, 0, 1])
    context, steps, valid = meta_dt.cut(rows, lengths, episode, step - 4, 4)
    assert context[..., 0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [2, 3, 4, 5], [0, 0, 0, 0]]
    assert valid.tolist() == [[False] * 4, [False] * 3 + [True], [True] * 4, [False] * 4]
    assert (steps >= 0).all() and (steps < 12).all()


def test_cut_pads_after_an_episodes_end():
    rows = torch.arange(1.0, 13.0).view(1, 12, 1)
    cut, steps, valid = meta_dt.cut(rows, torch.tensor([7]), torch.tensor([0]), torch.tensor([5]), 9)
    assert cut[0, :, 0].tolist() == [6, 7] + [0] * 7 and valid[0].tolist() == [True] * 2 + [False] * 7
    assert steps[0].tolist() == [5, 6, 7, 8, 9, 10, 11, 11, 11]


def test_prompt_scores_vector():
    scores = meta_dt.prompt_scores(torch.tensor([[0.0, 0, 0, 0, 1, 2, 3, 4, 0, 0]]), torch.tensor([10]), 4, 3)
    assert scores.tolist() == [[0, 0, 0, 0, 6, 9, 7, 4]]
    assert meta_dt.prompt_scores(torch.ones(1, 10), torch.tensor([8]), 4, 3).tolist() == [[0, 0, 0, 0, 3, 3, 0, 0]]


@pytest.mark.parametrize("loss, horizon, length", [("reward", 4, 3), ("state", 2, 5), ("both", 3, 1)])
def test_sequences_match_slow_loops(loss, horizon, length, double):
    """Returns-to-go, observations, z, actions and scores of two tasks; one episode is missing, others are short."""
    agent, args = make_agent(world_model_loss=loss, context_horizon=horizon, prompt_length=length, return_scale=7.0)
    episodes, lengths = make_episodes([12, 9, 6, 12, 12, 0])
    sequences = meta_dt.read_episodes(agent, episodes.view(2, 3, HORIZON, -1), lengths.view(2, 3))
    assert torch.equal(sequences.lengths, lengths) and not any(x.requires_grad for x in sequences)
    for n, count in enumerate(lengths):
        steps, scores = slow_sequence(agent, episodes[n, :count], args)
        expected = torch.zeros(HORIZON - length + 1)
        for start, score in scores.items():
            expected[start] = score
        torch.testing.assert_close(sequences.scores[n], expected)
        for row, (*parts, _) in zip(sequences.rows[n], steps):
            torch.testing.assert_close(row, torch.cat(parts))


@pytest.mark.parametrize("horizon", [1, 4])
def test_embedding_averages_z_of_complete_contexts(horizon, double):
    """A shorter episode gives z after its last transition, an empty one z of zeros."""
    agent, args = make_agent(context_horizon=horizon)
    episodes, lengths = make_episodes([12, 9, 5, 4, 2, 0])
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
    lengths = torch.tensor([[12, 12, 5], [7, 3, 0]])
    args = meta_dt.Args(meta_batch=10_000, context_size=3)
    episode, step = meta_dt.draw_steps(lengths, args, torch.Generator().manual_seed(0))
    assert episode.shape == step.shape == (30_000,)
    groups = episode.view(-1, 3)
    assert (groups == groups[:, :1]).all()  # several steps of one episode
    count, counts = lengths.flatten(), [3, 3, 3, 2, 2]
    expected = {(n, t): 1 / (counts[n] * count[n]).item() for n in range(5) for t in range(count[n])}
    assert_shares(list(zip(groups[:, 0].tolist(), step[::3].tolist())), expected)
    pairs = step.view(-1, 3)[groups[:, 0] == 4][:, :2]
    assert_shares(in_rows(pairs), {(a, b): 1 for a in range(3) for b in range(3)})


@pytest.mark.parametrize("which, share", [("best", 1.0), ("any", 1.0), ("any", 0.5)])
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
    kept, early, mine = prompt.valid.any(1), first == 0, own == 0
    assert torch.equal(kept, prompt.valid.all(1))
    found = in_rows(early[mine], other[mine], kept[mine])  # three independent draws
    kept, others = {True: 0.7, False: 0.3}, (1, 2, 3) if which == "best" else (1, 2, 3, 4)
    assert_shares(found, {(e, m, k): kept[k] for e in (True, False) for m in others for k in kept})


def test_best_episodes_come_first():
    agent, _ = make_agent()
    lengths = torch.tensor([[12, 12, 9, 12], [12, 12, 12, 0]])
    episodes, _ = make_episodes(lengths.flatten())
    episodes[4:7, :, KNOWN - 1] -= 9  # worse than the 0 of a missing episode
    episodes = episodes.view(2, 4, HORIZON, -1)
    found, sorted_lengths = meta_dt.best_first(agent, episodes, lengths)
    for task, present in enumerate((4, 3)):
        order = sorted(range(present), key=lambda n: -sum(episodes[task, n, :, KNOWN - 1].tolist()))
        order += range(present, 4)
        assert torch.equal(found[task], episodes[task, order])
        assert sorted_lengths[task].tolist() == lengths[task, order].tolist()


@pytest.mark.parametrize("which", ["best", "any"])
@pytest.mark.parametrize("source", ["numbered", "tiny", "walker"])
def test_training_reads_only_training_tasks(source, which, request, tmp_path, monkeypatch, unevaluated):
    """Every step of the world model and every window and prompt are traced to task, episode and step. z is of the
    trained world model."""
    data, path = request.getfixturevalue(source), request.getfixturevalue(source + "_path")
    obs_dim, known = data.obs_dim, data.obs_dim + data.act_dim
    learn, update, seen, origin, ranks = meta_dt.update_world_model, meta_dt.update, [], {}, set()
    for task, n in np.ndindex(*data.lengths.shape):
        for t in range(data.lengths[task, n]):
            origin[bytes(data.episodes[task, n, t, :known].numpy())] = task, n, t
    returns = np.where(data.lengths > 0, data.episode_returns, -np.inf)

    def learn_spy(agent, episodes, lengths, episode, step, args):
        seen.append(("world model", agent.world_model_opt.param_groups[0]["lr"]))
        assert len(episode) == 4 * 8 and len(set(episode.tolist())) <= 4  # --meta-batch, --context-size
        for n, t in zip(episode.tolist(), step.tolist()):
            task, number, now = origin[bytes(episodes[n, t, :known].numpy())]
            assert task in data.train_ids and now == t < lengths[n] == data.lengths[task, number]
            assert torch.equal(episodes[n], data.episodes[task, number, :, :-1])
        return learn(agent, episodes, lengths, episode, step, args)

    def trace(agent, rows, steps, valid, args):
        """Check one row of a Window -> task, episode and number of its first step."""
        rtg, obs, z, act = rows[valid].split([1, obs_dim, args.z_dim, data.act_dim], -1)
        places = [origin[bytes(row.numpy())] for row in torch.cat([obs, act], -1)]
        task, n, first = places[0]
        assert places == [(task, n, t) for t in range(first, first + len(places))]
        assert steps[valid].tolist() == [t for _, _, t in places] and task in data.train_ids
        still = data.episodes[task, n, :, known].double()
        expected = [still[t:].sum() / args.return_scale for _, _, t in places]
        np.testing.assert_allclose(rtg[:, 0], expected, rtol=1e-4, atol=1e-4)
        past = data.episodes[task, n, :first, : known + 1]
        torch.testing.assert_close(z[0], slow_z(agent.world_model.encoder, past, args), rtol=1e-3, atol=1e-5)
        return places[0]

    def update_spy(agent, window, prompt, args):
        seen.append("transformer")
        assert window.rows.shape[:2] == (4 * math.ceil(20 / args.window), args.window)
        for mine, prompts in zip(zip(*window), zip(*prompt)):
            task, number, _ = trace(agent, *mine, args)
            if prompts[2].any():  # not dropped
                found, other, start = trace(agent, *prompts, args)
                others = [n for n in np.argsort(-returns[task]) if n != number and data.lengths[task, n] > 0]
                possible = range(args.context_horizon, data.lengths[task, other] - args.prompt_length + 1)
                assert found == task and start in (possible or [0])
                ranks.add(others.index(other))
        return update(agent, window, prompt, args)

    monkeypatch.setattr(meta_dt, "update_world_model", learn_spy)
    monkeypatch.setattr(meta_dt, "update", update_spy)
    run(path, tmp_path, env=data.env, total_updates=8, batch_size=20, world_model_lr=0.02, prompt_episodes=which)
    assert seen == [("world model", 0.02)] * 8 + ["transformer"] * 8
    others = (data.lengths[data.train_tasks] > 0).sum(1).max().item() - 1
    assert ranks == {0, 1, 2} if which == "best" else 3 <= len(ranks) and max(ranks) == others - 1


# ---- rollouts ---------------------------------------------------------------------------


def slow_prompt(agent, episode, args):
    """Of a single episode, so nothing is left to chance."""
    steps, scores = slow_sequence(agent, episode, args)
    start = max(scores, key=scores.get)
    return steps[start : start + args.prompt_length]


@pytest.mark.parametrize("context", ["an episode", "an empty one", "none", "always dropped"])
def test_rollouts_match_a_slow_transformer(context, double):
    """Whole episodes of two tasks, two rows each: z of the episode so far, the last K steps with their numbers, the
    return still to come, the prompt; no dropout."""
    dropped = {"prompt_dropout": 1.0} if context == "always dropped" else {}
    agent, args = make_agent(dropout=0.5, window=5, **dropped)
    episodes, _ = make_episodes([HORIZON] * 4)
    given, lengths = make_episodes([12, 9, 12, 11] if "empty" not in context else [0] * 4, seed=1)
    given = given[:, : 0 if context == "none" else HORIZON]
    mask = (torch.arange(given.shape[1]) < lengths[:, None]).double()
    targets = torch.tensor([5.0, -3.0])
    policies = [meta_dt.adapt(agent, given, mask, explore, targets=targets) for explore in (False, True)]
    obs, rew = episodes[..., :OBS_DIM], episodes[..., KNOWN - 1]
    history, past = [[] for _ in range(4)], [[] for _ in range(4)]
    with torch.no_grad():
        prompts = [
            slow_prompt(agent, episode[:length], args) if context == "an episode" else []
            for episode, length in zip(given, lengths)
        ]
        for t in range(HORIZON):
            before = rew[:, t - 1] if t > 0 else torch.full((4,), 1e3)  # an earlier episode's
            found, again = (policy(obs[:, t], before) for policy in policies)
            assert torch.equal(found, again)
            for n in range(4):
                rtg = ([5.0, 5.0, -3.0, -3.0][n] - rew[n, :t].sum()) / args.return_scale
                z = slow_z(agent.world_model.encoder, past[n], args)
                history[n].append((rtg[None], obs[n, t], z, torch.zeros(ACT_DIM), t))
                act = slow_transformer(agent.transformer, history[n][-5:], prompts[n], args)[-1]
                torch.testing.assert_close(found[n], act, rtol=1e-7, atol=1e-9)
                history[n][-1] = (*history[n][-1][:3], act, t)
                past[n].append(torch.cat([obs[n, t], act, rew[n, t][None]]))


def test_return_to_go_falls_by_the_rewards(monkeypatch):
    (agent, _), windows = make_agent(), []

    def forward(window, prompt, last):
        windows.append(window.rows.clone())
        return window.rows[:, -1:, -ACT_DIM:]

    monkeypatch.setattr(agent.transformer, "forward", forward)
    policy = meta_dt.adapt(agent, torch.zeros(1, 0, 9), torch.zeros(1, 0), targets=torch.tensor([5.0]))
    for rew in (0.0, -1.0, -2.0):
        policy(torch.zeros(1, OBS_DIM), torch.tensor([rew]))
    torch.testing.assert_close(windows[-1][0, :, 0], torch.tensor([0.5, 0.6, 0.8]))


@pytest.mark.parametrize("kind", ["best", "any"])
def test_prompt_starts_where_errors_are_largest(kind, double):
    """In one of the row's best three episodes, or of all, each as often; never in an empty one."""
    agent, args = make_agent(prompt_episodes=kind)
    episodes, _ = make_episodes([HORIZON] * 4)
    slow = [slow_sequence(agent, episode, args) for episode in episodes]
    best = sorted(range(4), key=lambda n: -slow[n][0][0][0].item())[: 3 if kind == "best" else 4]
    order = [np.random.default_rng(row).permutation(4) for row in range(800)]
    context, mask = torch.stack([episodes[numbers].flatten(0, 1) for numbers in order]), torch.ones(800, 5 * HORIZON)
    context, mask[:, 4 * HORIZON :] = torch.nn.functional.pad(context, (0, 0, 0, HORIZON)), 0
    rows, steps, valid = meta_dt.find_prompt(agent, context, mask)
    origin = {tuple(step[1].tolist()): n for n in range(4) for step in slow[n][0]}
    which, starts = [origin[row] for row in in_rows(rows[:, 0, 1 : 1 + OBS_DIM])], steps[:, 0].tolist()
    assert_shares(which, dict.fromkeys(best, 1))
    assert valid.all() and torch.equal(steps, steps[:, :1] + torch.arange(3))
    for n, start, row in zip(which[:40], starts, rows):
        torch.testing.assert_close(row, torch.stack([torch.cat(step[:4]) for step in slow[n][0][start : start + 3]]))
    for n in best:
        assert {start for m, start in zip(which, starts) if m == n} == {max(slow[n][1], key=slow[n][1].get)}


def test_evaluations_repeat_their_prompts(double):
    """Another seed, and one more episode, change them."""
    agent, args = make_agent()
    context, mask = make_episodes([5 * HORIZON] * 40, horizon=5 * HORIZON)[0], torch.ones(40, 5 * HORIZON)
    mask[:, 4 * HORIZON :] = 0
    rows = meta_dt.find_prompt(agent, context[:, : 4 * HORIZON], mask[:, : 4 * HORIZON]).rows
    assert torch.equal(meta_dt.find_prompt(agent, context[:, : 4 * HORIZON], mask[:, : 4 * HORIZON]).rows, rows)
    others = [meta_dt.find_prompt(agent, context, mask).rows]
    args.seed = 5
    others.append(meta_dt.find_prompt(agent, context[:, : 4 * HORIZON], mask[:, : 4 * HORIZON]).rows)
    assert all((other != rows).flatten(1).any(1).double().mean() > 0.4 for other in others)


@pytest.mark.parametrize("which", ["train_top", "task_max", -7.5, 0.0])
def test_protocols_aim_at_their_tasks_returns(which, tiny, monkeypatch):
    seen = {}

    def evaluate(data, adapt, protocols, episodes):
        assert data is tiny and episodes == 3 and adapt.func is meta_dt.adapt and adapt.args == ("agent",)
        seen.update({protocol: adapt.keywords["targets"].tolist() for protocol in protocols})
        return {protocols[0]: 1.0}

    monkeypatch.setattr(dc, "evaluate", evaluate)
    monkeypatch.setattr(dc, "embedding_quality", lambda data, embed: {"embed": (data, embed.func, embed.args)})
    args = meta_dt.Args(target_return=which)
    results = meta_dt.evaluate_all("agent", tiny, args, dc.PROTOCOLS, 3)
    assert results == dict.fromkeys(dc.PROTOCOLS, 1.0) | {"embed": (tiny, meta_dt.embed, ("agent",))}
    returns = [returns[count > 0] for returns, count in zip(tiny.episode_returns, tiny.lengths.numpy())]
    best = np.array([each.max() for each in returns])
    assert len(returns[tiny.train_ids[0]]) == 8
    shared = {"train_top": np.mean([np.sort(returns[task])[-2:].mean() for task in tiny.train_ids])}
    shared |= {which: which} if isinstance(which, float) else {}
    for protocol in dc.PROTOCOLS:
        tasks = tiny.train_ids if protocol == "train" else tiny.test_ids
        assert seen[protocol] == pytest.approx([shared[which]] if which in shared else best[tasks])
    elsewhere = SimpleNamespace(**vars(tiny) | {"device": "meta"})
    target = meta_dt.target_returns(elsewhere, tiny.test_ids, which)
    assert target.device.type == "meta" and target.dtype == torch.float


def test_best_quarters_are_rounded_up():
    """Two of five, one of three, one of one; test tasks do not count."""
    returns = np.array([[1.0, 4, 2, 3, 5], [-8, -7, -9, 0, 0], [100, 0, 0, 0, 0], [-6, 0, 0, 0, 0]])
    present = np.array([5, 3, 1, 1])
    data = SimpleNamespace(episode_returns=returns, present=present, train_ids=np.array([0, 1, 3]), device="cpu")
    assert meta_dt.target_returns(data, np.array([2]), "train_top").tolist() == pytest.approx([(4.5 - 7 - 6) / 3])


# ---- runs -------------------------------------------------------------------------------


def test_run_reports_every_shot_and_its_target(tiny_path, tmp_path, capsys):
    shorter = {"total_updates": 8, "eval_every": 8, "log_every": 4}
    result = run(tiny_path, tmp_path, target_return="task_max", **shorter)
    shots = [result[f"eval/online/return_ep_{k}"] for k in range(1, 11)]
    assert shots[0] == pytest.approx(result["eval/zero_shot/return"], abs=1e-4)  # no prompt before the first episode
    assert shots[4] == result["eval/online/return"] and shots[1] != shots[0]
    data = dc.load_dataset("point-robot", tiny_path)
    goal = np.mean([data.episode_returns[task, : data.present[task]].max() for task in data.test_ids])
    assert f"target return (task_max): {goal:.1f}" in capsys.readouterr().out
    tags = {tag for _, tag, _ in read_rows(result["run_dir"])}
    assert {"losses/world_model", "stats/world_model_grad", "z/between_std", "losses/actor", "stats/actor_grad"} <= tags


@pytest.mark.parametrize("lr_decay", [True, False])
def test_learning_rate_rises_stays_and_falls(lr_decay, tiny_path, tmp_path, monkeypatch, unevaluated):
    """Also in a resumed, longer run. The world model no longer changes."""
    seen, update, models = [], meta_dt.update, []

    def spy(agent, *drawn):
        seen.append([group["lr"] for group in agent.opt.param_groups])
        models.append([p.clone() for p in agent.world_model.parameters()])
        assert not any(p.requires_grad for p in agent.world_model.parameters())
        return update(agent, *drawn)

    def draw_spy(*inputs):
        assert inputs[-1].initial_seed() == torch.initial_seed() == 7
        return draw(*inputs)

    draw = meta_dt.draw_windows
    monkeypatch.setattr(meta_dt, "draw_windows", draw_spy)
    monkeypatch.setattr(meta_dt, "update", spy)
    changes = {"seed": 7, "lr": 0.5, "warmup_updates": 4, "world_model_updates": 3, "total_updates": 20}
    run_dir = run(tiny_path, tmp_path, lr_decay=lr_decay, **changes)["run_dir"]
    stored = load(run_dir)["args"] | {"resume": run_dir, "total_updates": 30, "target_return": "task_max"}
    meta_dt.train(meta_dt.Args(**stored))
    falls = [0.5 * (1 - n / 10) for n in range(10)] + [0.5 * (2 - n / 15) for n in range(20, 30)]
    falls = falls if lr_decay else [0.5] * 20
    np.testing.assert_allclose(np.concatenate(seen), [0.125, 0.25, 0.375] + [0.5] * 7 + falls, rtol=1e-6)
    assert all(torch.equal(p, q) for model in models for p, q in zip(model, models[0]))


def test_learns_point_robot(tmp_path):
    path = ROOT / "datasets" / "point-robot.npz"
    if not path.is_file():
        pytest.skip("datasets/point-robot.npz is not there: python data_collect.py --env point-robot makes it")
    settings = {"width": 32, "encoder_width": 32, "layers": 1, "meta_batch": 16, "batch_size": 20, "context_size": 16}
    settings |= {"total_updates": 200, "lr": 3e-3, "log_every": 200, "eval_every": 200, "save_every": 200}
    result = run(path, tmp_path, world_model_updates=200, **settings)
    assert result["eval/iid/return"] > -6.8  # the data's mean, over many policies; random -20.3, expert -4.7
    assert result["z/probe_r2"] > 0.9
    losses = {tag: float(value) for _, tag, value in read_rows(result["run_dir"])}
    assert losses["losses/world_model"] < 0.004 and losses["losses/actor"] < 0.25


# ---- defaults and bad input -------------------------------------------------------------


def resolved(monkeypatch, **changes):
    """Arguments as they are when the data are loaded."""

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(dc, "load_dataset", stop)
    args = meta_dt.Args(**changes)
    with pytest.raises(Stop):
        meta_dt.train(args)
    return args


@pytest.mark.parametrize(
    "env, loss, window, prompt_length, scale, decay",
    [("ant-dir", "reward", 20, 5, 500, 1e-4), ("point-robot-wind", "state", 20, 5, 10, 1e-4)]
    + [("hopper-rand-params", "state", 8, 3, 500, 1e-4), ("point-robot", "reward", 20, 5, 10, 1e-4)]
    + [("cheetah-vel", "reward", 20, 5, 500, 2), ("cheetah-dir", "reward", 20, 5, 500, 1e-4)],
)
def test_defaults_follow_the_family(env, loss, window, prompt_length, scale, decay, monkeypatch):
    args = resolved(monkeypatch, env=env, total_updates=100)
    assert (args.world_model_loss, args.window, args.prompt_length) == (loss, window, prompt_length)
    assert (args.return_scale, args.world_model_updates, args.warmup_updates) == (scale, 100, 10)
    assert args.weight_decay == decay  # 1e-4 is the official one


def test_given_values_stay(monkeypatch):
    given = {"world_model_updates": 3, "warmup_updates": 1, "weight_decay": 0.0, "dropout": 0.0, "prompt_dropout": 0.0}
    given |= {"world_model_loss": "both", "window": 7, "prompt_length": 2, "return_scale": 3.0}
    assert asdict(resolved(monkeypatch, **given)).items() >= given.items()


def command(*arguments):
    return dc.command_line(meta_dt.Args, meta_dt.train, meta_dt.__doc__, meta_dt.ENV_DEFAULTS, list(arguments))


def test_resumed_runs_may_change_the_target(tiny_path, tmp_path, capsys, unevaluated):
    """A number, also a negative one, or a name."""
    settings = flags(SMALL | {"total_updates": 4, "dataset": tiny_path, "run_dir": tmp_path})
    run_dir = command(*settings, "--target-return", "-5.5")["run_dir"]
    assert load(run_dir)["args"]["target_return"] == -5.5
    for more, expected in (([], "(-5.5): -5.5"), (["--target-return", "0"], "(0.0): 0.0")):
        capsys.readouterr()
        command("--resume", run_dir, "--eval-only", *more)
        assert f"target return {expected}" in capsys.readouterr().out
    command("--resume", run_dir, "--total-updates", "8", "--target-return", "task_max")
    assert load(run_dir)["args"]["target_return"] == "task_max"


@pytest.mark.parametrize("text", ["nan", "inf", "expert"])
def test_bad_target_return(text, capsys):
    with pytest.raises(SystemExit) as stop:
        command("--target-return", text)
    printed = capsys.readouterr()
    if text == "expert":  # tyro's message, as of every unknown choice
        assert stop.value.code == 2 and not printed.out
        assert all(word in printed.err for word in ("--target-return", "FLOAT", "train_top", "expert"))
    else:
        assert re.match(r"--target-return \S+: must be finite\b", stop.value.code)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prompt_length": 17}, "--prompt-length 17"),
        ({"context_horizon": 16}, "--context-horizon 16"),
        ({"heads": 3}, "--heads 3"),
        ({"episode_share": 1.5}, "--episode-share 1.5"),
    ],
)
def test_bad_sizes_stop_before_any_training(changes, words, tiny_path, tmp_path):
    message = stop_message(lambda: run(tiny_path, tmp_path / "runs", **changes))
    assert words in message and not (tmp_path / "runs").exists()


def test_sizes_that_just_fit(numbered, monkeypatch):
    args = meta_dt.Args(env="point-robot", dataset="d.npz", context_horizon=14, prompt_length=6, width=6, heads=3)
    for count in (2, 1):
        monkeypatch.setattr(numbered, "min_episodes", count)
        if count == 2:
            meta_dt.check_sizes(args, numbered)
    assert re.match(f"{numbered.path}: .*two episodes", stop_message(meta_dt.check_sizes, args, numbered))

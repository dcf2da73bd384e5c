"""meta_dt.py: contexts, prompts, causality and padding of the transformer, what each phase trains, rollouts, runs."""

import inspect
import math
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load, read_rows, stop_message
from torch.utils.flop_counter import FlopCounterMode

import data_collect as dc
import meta_dt

OBS_DIM, ACT_DIM, HORIZON = 3, 2, 12
SIZES = {"env": "point-robot", "width": 16, "encoder_width": 16, "window": 6, "prompt_length": 3}
SMALL = {"env": "point-robot", "device": "cpu", "total_updates": 40, "log_every": 10, "eval_every": 20}
SMALL |= {"save_every": 10, "eval_episodes": 1, "meta_batch": 4, "batch_size": 8, "context_size": 8}
SMALL |= {"width": 16, "encoder_width": 16}


def make_agent(obs_dim=OBS_DIM, act_dim=ACT_DIM, horizon=HORIZON, **changes):
    settings = SIZES | {"world_model_loss": "reward", "world_model_updates": 1, "warmup_updates": 0} | changes
    args = dc.resolve(meta_dt.Args(**settings), meta_dt.ENV_ARGS, meta_dt.MAY_BE_ZERO, meta_dt.RANGES)
    torch.manual_seed(0)
    data = SimpleNamespace(obs_dim=obs_dim, act_dim=act_dim, family=SimpleNamespace(horizon=horizon))
    agent = meta_dt.Agent(data, args)
    with torch.no_grad():  # biases of 0 would hide what padding does
        for name, parameter in agent.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.1)
    return agent, args


def make_episodes(count, lengths, obs_dim=OBS_DIM, act_dim=ACT_DIM, horizon=HORIZON, seed=0):
    """-> episodes [count, H, ctx_dim], lengths [count]; zeros after the end."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, horizon, 2 * obs_dim + act_dim + 1, generator=generator)
    rows[..., obs_dim : obs_dim + act_dim] = rows[..., obs_dim : obs_dim + act_dim].tanh()
    lengths = torch.as_tensor(lengths)
    return rows * (torch.arange(horizon) < lengths[:, None])[..., None], lengths


def make_window(agent, count=2, steps=6, seed=0):
    """-> a Window, and a prompt of 3 steps."""
    generator = torch.Generator().manual_seed(seed)
    dim = sum(agent.transformer.sizes)
    rows, prompt = (torch.randn(count, n, dim, generator=generator) for n in (steps, 3))
    number = torch.arange(steps).expand(count, -1)
    window = meta_dt.Window(rows, number + 2, torch.ones_like(number, dtype=torch.bool))
    return window, meta_dt.Window(prompt, number[:, :3] + 4, torch.ones(count, 3, dtype=torch.bool))


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# ---- sizes ------------------------------------------------------------------------------


def full_agent(obs_dim, act_dim, horizon, loss="both"):
    sizes = {"width": 128, "encoder_width": 128, "window": None, "prompt_length": None}
    return make_agent(obs_dim, act_dim, horizon, world_model_loss=loss, **sizes)[0]


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
def test_numbers_of_parameters_are_the_official_ones(sizes, encoder, reward, state, transformer):
    agent = full_agent(*sizes)
    model = agent.world_model
    found = [parameters(m) for m in (model.encoder, model.reward, model.state, agent.transformer)]
    assert all(value == count for value, count in zip((encoder, reward, state, transformer), found) if value)
    assert parameters(agent.transformer.blocks) + parameters(agent.transformer.final_norm) == 595_072


def test_only_the_decoder_of_what_differs_is_there():
    for loss, decoders in (("reward", (True, False)), ("state", (False, True)), ("both", (True, True))):
        model = make_agent(world_model_loss=loss)[0].world_model
        assert (model.reward is not None, model.state is not None) == decoders
        rows, _ = make_episodes(4, [HORIZON] * 4)
        dims = [error.shape[-1] for error in model.residuals(rows, torch.zeros(4, HORIZON, 16))]
        assert dims == [1] * decoders[0] + [OBS_DIM] * decoders[1]


# ---- sequences --------------------------------------------------------------------------


def test_returns_to_go_vector():
    rtg = meta_dt.returns_to_go(torch.tensor([1.0, 2.0, 3.0]))
    assert rtg.tolist() == [6, 5, 3]
    torch.testing.assert_close(rtg / 10, torch.tensor([0.6, 0.5, 0.3]))


def test_context_vectors():
    """The last 4 steps, zeros before the episode, nothing of the episode before."""
    rows = torch.arange(1.0, 25.0).view(2, 12, 1)
    lengths, step = torch.tensor([12, 12]), torch.tensor([0, 1, 5, 0])
    episode = torch.tensor([0, 0, 0, 1])
    context, steps, valid = meta_dt.cut(rows, lengths, episode, step - 4, 4)
    assert context[..., 0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [2, 3, 4, 5], [0, 0, 0, 0]]
    assert valid.tolist() == [[False] * 4, [False] * 3 + [True], [True] * 4, [False] * 4]
    assert (steps >= 0).all() and (steps < 12).all()


def test_cut_pads_after_the_end_of_a_shorter_episode():
    rows = torch.arange(1.0, 13.0).view(1, 12, 1)
    cut, steps, valid = meta_dt.cut(rows, torch.tensor([7]), torch.tensor([0]), torch.tensor([5]), 9)
    assert cut[0, :, 0].tolist() == [6, 7] + [0] * 7 and valid[0].tolist() == [True] * 2 + [False] * 7
    assert steps.max() < 12


def test_z_sees_the_last_transitions_and_nothing_else():
    agent, args = make_agent()
    rows, lengths = make_episodes(1, [HORIZON])
    t, columns = 7, slice(0, OBS_DIM + ACT_DIM + 1)

    def z(rows):
        every = torch.zeros(1, dtype=torch.long)
        return agent.world_model.infer(rows, lengths, every, every + t, args.context_horizon)

    for step in range(HORIZON):
        changed = rows.clone()
        changed[:, step, columns] += 1
        assert torch.equal(z(changed), z(rows)) == (not t - 4 <= step < t), step
    changed = rows.clone()
    changed[:, t - 1, OBS_DIM] += 1  # the action before
    assert not torch.equal(z(changed), z(rows))
    changed[:, :, columns.stop :] += 1  # next observations are not part of it
    rows[:, t - 1, OBS_DIM] += 1
    assert torch.equal(z(changed), z(rows))


ERRORS = torch.tensor([[0.0, 0, 0, 0, 1, 2, 3, 4, 0, 0]])


def test_window_scores_vector():
    scores = meta_dt.window_scores(ERRORS, torch.tensor([10]), 4, 3)
    assert scores.tolist() == [[0, 0, 0, 0, 6, 9, 7, 4]]
    assert meta_dt.select(scores, "argmax", None).tolist() == [5]
    assert meta_dt.select(scores, "last", None).tolist() == [7]
    generator = torch.Generator().manual_seed(0)
    for how, expected in (("sample", [0.2308, 0.3462, 0.2692, 0.1538]), ("random", [0.25] * 4)):
        draws = meta_dt.select(scores.expand(40_000, -1), how, generator)
        np.testing.assert_allclose(draws.bincount(minlength=8) / 40_000, [0, 0, 0, 0, *expected], atol=0.01)


def test_window_scores_stay_inside_shorter_episodes():
    errors = torch.ones(4, 10)
    scores = meta_dt.window_scores(errors, torch.tensor([10, 8, 6, 0]), 4, 3)
    assert [row.nonzero().flatten().tolist() for row in scores] == [[4, 5, 6, 7], [4, 5], [], []]
    for how in ("argmax", "sample", "random", "last"):
        start = meta_dt.select(scores, how, torch.Generator().manual_seed(0))
        assert start.shape == (4,) and start[2:].tolist() == [0, 0] and (start >= 0).all() and (start <= 7).all()


@pytest.mark.parametrize("loss", ["reward", "state", "both"])
def test_episodes_are_scored_by_the_errors_of_the_world_model(loss):
    agent, _ = make_agent(world_model_loss=loss, return_scale=10.0)
    episodes, lengths = make_episodes(3, [12, 9, 0])
    sequences = meta_dt.read_episodes(agent, episodes, lengths)
    rtg, obs, z, act = sequences.rows.split(agent.transformer.sizes, -1)
    columns = episodes.split(agent.world_model.sizes, -1)
    assert torch.equal(obs, columns[0]) and torch.equal(act, columns[1])
    assert rtg[0, 4, 0].item() == pytest.approx(columns[2][0, 4:].sum().item() / 10, abs=1e-6)
    assert sequences.scores.shape == (3, 10) and (sequences.scores[2] == 0).all()
    errors = agent.world_model.residuals(episodes[:1, 5:8], z[:1, 5:8])
    expected = sum(error.abs().sum() for error in errors)
    assert sequences.scores[0, 5].item() == pytest.approx(expected.item(), rel=1e-5)


# ---- the transformer --------------------------------------------------------------------


def columns_of(agent):
    start = np.cumsum([0, *agent.transformer.sizes])
    return {name: slice(start[i], start[i + 1]) for i, name in enumerate(("rtg", "obs", "z", "act"))}


@pytest.mark.parametrize("with_prompt", [False, True])
def test_an_action_sees_its_state_and_the_past_alone(with_prompt):
    agent, _ = make_agent()
    window, prompt = make_window(agent)
    prompt = prompt if with_prompt else None
    before = agent.transformer(window, prompt)
    t = 3
    for name, column in columns_of(agent).items():
        rows = window.rows.clone()
        rows[:, t, column] += 1
        after = agent.transformer(window._replace(rows=rows), prompt)
        first = t + (name == "act")  # of the actions that may change; the own slot's placeholder has no effect
        assert torch.equal(after[:, :first], before[:, :first]), name
        assert (after[:, first:] != before[:, first:]).any(-1).all(), name


def test_every_entry_of_the_prompt_but_its_z_reaches_every_action():
    agent, _ = make_agent()
    window, prompt = make_window(agent)
    before = agent.transformer(window, prompt)
    for name, column in columns_of(agent).items():
        for step in range(3):
            rows = prompt.rows.clone()
            rows[:, step, column] += 1
            changed = (agent.transformer(window, prompt._replace(rows=rows)) != before).any(-1)
            assert not changed.any() if name == "z" else changed.all()
    later = prompt._replace(steps=prompt.steps + 1)
    assert (agent.transformer(window, later) != before).any(-1).all()


def test_the_prompt_does_not_see_the_window():
    agent, _ = make_agent()
    window, prompt = make_window(agent)
    hidden = []
    agent.transformer.blocks[-2].register_forward_hook(lambda module, inputs, output: hidden.append(output[:, :9]))
    agent.transformer(window, prompt)
    agent.transformer(window._replace(rows=window.rows + 1), prompt)
    assert torch.equal(*hidden)


def test_a_dropped_prompt_is_no_prompt():
    agent, _ = make_agent()
    window, prompt = make_window(agent)
    kept = torch.tensor([True, False])
    mixed = agent.transformer(window, prompt._replace(valid=prompt.valid & kept[:, None]))
    torch.testing.assert_close(mixed[1], agent.transformer(window)[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed[0], agent.transformer(window, prompt)[0], atol=1e-6, rtol=1e-5)
    assert (mixed[0] != agent.transformer(window)[0]).any()


def test_padding_changes_no_action():
    """7 steps alone, with 13 steps of padding behind, and with padding of whatever content in front."""
    agent, _ = make_agent()
    episodes, lengths = make_episodes(1, [7])
    sequences = meta_dt.read_episodes(agent, episodes, lengths)
    zero = torch.zeros(1, dtype=torch.long)
    alone, padded = (sequences.cut(zero, zero, count) for count in (7, 20))
    _, prompt = make_window(agent, 1)
    for given in (None, prompt):
        expected = agent.transformer(alone, given)
        torch.testing.assert_close(agent.transformer(padded, given)[:, :7], expected, atol=1e-5, rtol=0)
        full = padded._replace(rows=torch.where(padded.valid[..., None], padded.rows, 1e3))
        torch.testing.assert_close(agent.transformer(full, given)[:, :7], expected, atol=1e-5, rtol=0)
        front = meta_dt.Window(*(part.roll(13, 1) for part in full))
        found = agent.transformer(front, given)
        torch.testing.assert_close(found[:, 13:], expected, atol=1e-5, rtol=0)
        assert found.isfinite().all()


def test_attention_is_the_plain_formula():
    agent, _ = make_agent(heads=2)
    block, x = agent.transformer.blocks[0], torch.randn(2, 5, 16)
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in block.qkv(block.norm_1(x)).split(16, -1))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(8) - 1e4 * ~mask).softmax(-1)
    y = x + block.project((weights @ v).transpose(1, 2).flatten(2))
    expected = y + block.down(F.relu(block.up(block.norm_2(y))))
    torch.testing.assert_close(block(x, mask, 0.0), expected)


def test_dropout_acts_only_where_it_is_asked_for():
    agent, _ = make_agent()
    window, prompt = make_window(agent)
    assert torch.equal(agent.transformer(window, prompt), agent.transformer(window, prompt))
    assert not torch.equal(agent.transformer(window, prompt, 0.1), agent.transformer(window, prompt, 0.1))


# ---- losses and updates -----------------------------------------------------------------


def test_targets_of_padding_do_not_count():
    prediction, act = torch.randn(2, 5, ACT_DIM), torch.randn(2, 5, ACT_DIM)
    valid = torch.arange(5) < torch.tensor([[5], [3]])
    loss = meta_dt.action_loss(prediction, act, valid)
    assert loss.item() == pytest.approx((prediction - act).pow(2)[valid].mean().item(), rel=1e-6)
    for value in (1e6, math.inf):
        assert torch.equal(meta_dt.action_loss(prediction, torch.where(valid[..., None], act, value), valid), loss)


def test_world_model_loss_is_the_mean_square_of_each_part():
    reward, state = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0, 0, 0], [0, 2, 2]])
    assert meta_dt.world_model_loss([reward]).item() == 5
    assert meta_dt.world_model_loss([reward, state]).item() == 5 + 1.5


def test_warm_up_vectors():
    factors = [meta_dt.warm_up(step, 10_000) for step in (0, 99, 9_999, 50_000)]
    assert factors == pytest.approx([1e-4, 0.01, 1, 1]) and meta_dt.warm_up(0, 0) == 1


def setup_updates(**changes):
    agent, args = make_agent(meta_batch=4, batch_size=12, context_size=5, **changes)
    episodes, lengths = make_episodes(6, [12] * 6)
    steps = torch.arange(12)
    best = torch.tensor([[0, 1, 2], [5, 4, 3]])
    world_model = partial(meta_dt.update_world_model, agent, episodes, lengths, steps // 2, steps, args)

    def policy():
        sequences = meta_dt.read_episodes(agent, episodes, lengths)
        drawn = meta_dt.draw_windows(sequences, best, lengths.view(2, 3), args, torch.Generator().manual_seed(0))
        return meta_dt.update(agent, *drawn, args)

    return agent, world_model, policy


@pytest.mark.parametrize("loss", ["reward", "state", "both"])
def test_each_update_trains_its_own_network(loss):
    agent, world_model, policy = setup_updates(world_model_loss=loss)
    for call, moved in ((world_model, "world_model"), (policy, "transformer")):
        before = {name: value.clone() for name, value in agent.state_dict().items()}
        metrics = call()
        after = agent.state_dict()
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed == {name for name in after if name.startswith(moved)}
        assert all(value.dim() == 0 and value.isfinite() and not value.requires_grad for value in metrics.values())


def test_the_dataset_is_read_once_and_whole(tiny):
    agent, _ = make_agent(tiny.obs_dim, tiny.act_dim, tiny.family.horizon)
    train = torch.as_tensor(tiny.train_ids)
    sequences = meta_dt.read_tasks(agent, tiny.episodes[train][..., :-1], tiny.lengths[train])
    assert len(sequences.rows) == len(tiny.train_ids) * tiny.lengths.shape[1] and not sequences.rows.requires_grad
    second = tiny.train_ids[1]
    alone = meta_dt.read_episodes(agent, tiny.episodes[second, 2:3, :, :-1], tiny.lengths[second, 2:3])
    row = tiny.lengths.shape[1] + 2
    torch.testing.assert_close(sequences.rows[row], alone.rows[0])
    torch.testing.assert_close(sequences.scores[row], alone.scores[0])


def test_the_world_model_learns_what_tells_the_tasks_apart():
    """Two episodes that differ in the reward alone: unknown before the first step, known after one."""
    agent, args = make_agent(world_model_lr=1e-2)
    episodes, lengths = make_episodes(1, [HORIZON])
    episodes, lengths = episodes.repeat(2, 1, 1), lengths.repeat(2)
    reward = OBS_DIM + ACT_DIM
    episodes[..., reward] = torch.tensor([[-1.0], [1.0]])
    step = torch.arange(HORIZON).repeat(2)
    episode = torch.arange(2).repeat_interleave(HORIZON)
    for _ in range(150):
        meta_dt.update_world_model(agent, episodes, lengths, episode, step, args)
    z = agent.world_model.infer(episodes, lengths, episode, step, args.context_horizon)
    (error,) = agent.world_model.residuals(episodes.flatten(0, 1), z)
    error = error.detach().view(2, HORIZON).abs()
    assert error[:, 1:].max() < 0.2 < error[:, 0].max()


def test_one_episode_is_learned_by_heart():
    sizes = {"width": 128, "encoder_width": 16, "window": 20, "dropout": 0.0, "lr": 1e-3}
    agent, args = make_agent(2, 2, 20, **sizes)
    sequences = meta_dt.read_episodes(agent, *make_episodes(1, [20], 2, 2, 20))
    zero = torch.zeros(1, dtype=torch.long)
    window = sequences.cut(zero, zero, 20)
    for step in range(300):
        dc.set_lr(agent.opt, args.lr * meta_dt.warm_up(step, 30) * min(1.0, 2 - 2 * (step / 300)))
        metrics = meta_dt.update(agent, window, None, args)
    assert metrics["losses/actor"] < 1e-4


def test_cost_of_an_update_at_the_default_sizes():
    sizes = {"width": 128, "encoder_width": 128, "window": None, "prompt_length": None, "env": "ant-dir"}
    agent, args = make_agent(27, 8, 200, **sizes)
    episodes, lengths = make_episodes(4, [200] * 4, 27, 8, 200)
    sequences = meta_dt.read_episodes(agent, episodes, lengths)
    best = torch.arange(4)[None]
    window, prompt = meta_dt.draw_windows(sequences, best, lengths[None], args, torch.Generator().manual_seed(0))
    assert window.rows.shape[:2] == (32, 20) and prompt.rows.shape[:2] == (32, 5)
    with FlopCounterMode(display=False) as flops:
        meta_dt.update(agent, window, prompt, args)
    assert 6.5 < flops.get_total_flops() / 1e9 <= 7.5


# ---- drawing batches --------------------------------------------------------------------


def test_prompts_come_from_the_best_other_episodes_of_the_task():
    agent, args = make_agent(meta_batch=500, batch_size=6, prompt_dropout=0.25)
    tasks, count = 3, 7
    lengths = torch.full((tasks, count), HORIZON)
    lengths[1, 5:] = 0
    episodes, _ = make_episodes(tasks * count, lengths.flatten())
    sequences = meta_dt.read_episodes(agent, episodes, lengths.flatten())
    sequences.rows[..., 0] = torch.arange(tasks * count)[:, None]  # in place of the return-to-go: the episode's number
    best = torch.tensor([[3, 0, 6, 2], [4, 1, 0, 2], [5, 6, 1, 0]])  # within each task
    seen, generator = set(), torch.Generator().manual_seed(0)
    numbers = best + count * torch.arange(tasks)[:, None]
    window, prompt = meta_dt.draw_windows(sequences, numbers, lengths, args, generator)
    own, other = window.rows[:, 0, 0].long(), prompt.rows[:, 0, 0].long()
    assert set(own.tolist()) == {n for n in range(tasks * count) if lengths.flatten()[n] > 0}
    assert (own != other).all() and (own // count == other // count).all()
    for a, b in zip((own % count).tolist(), zip((own // count).tolist(), (other % count).tolist())):
        task, pick = b
        allowed = [n for n in best[task].tolist() if n != a][:3]
        assert pick in allowed
        seen.add((task, a, pick))
    assert len(seen) == 3 * (7 + 5 + 7)
    kept = prompt.valid.any(1)
    assert torch.equal(kept, prompt.valid.all(1)) and 0.7 < kept.float().mean() < 0.8
    starts, last = window.steps[:, 0], HORIZON - args.window
    assert starts.min() == 0 and starts.max() == last and window.valid.all()
    share = (starts == 0).float().mean()  # all windows whose last step is one of the first K
    assert abs(share - args.window / HORIZON) < 4 * math.sqrt(share * (1 - share) / len(starts))
    assert (prompt.steps[:, 0] >= args.context_horizon).all() and (prompt.steps[:, -1] < HORIZON).all()


def test_best_episodes_are_those_of_the_highest_return():
    agent, _ = make_agent()
    lengths = torch.tensor([[12, 12, 9, 12], [12, 12, 12, 0]])
    episodes, _ = make_episodes(8, lengths.flatten())
    reward = OBS_DIM + ACT_DIM
    returns = episodes[..., reward].sum(1).view(2, 4)
    found = meta_dt.best_episodes(meta_dt.read_tasks(agent, episodes.view(2, 4, HORIZON, -1), lengths), lengths, 3)
    for task, present in enumerate((4, 3)):
        order = sorted(range(present), key=lambda n, task=task: -returns[task, n].item())
        assert found[task].tolist() == [4 * task + n for n in order[:3]]


def test_world_model_steps_are_real_ones_of_every_task(walker):
    args = meta_dt.Args(meta_batch=40, context_size=10)
    lengths = walker.lengths[walker.train_ids]
    episode, step = meta_dt.draw_steps(lengths, args, torch.Generator().manual_seed(0))
    assert (step < lengths.flatten()[episode]).all()
    assert set((episode // lengths.shape[1]).tolist()) == set(range(len(walker.train_ids)))
    assert all(len(set(part.tolist())) == 1 for part in episode.view(40, 10))


def test_both_phases_learn_from_the_training_tasks_alone(walker, walker_path, tmp_path, monkeypatch):
    """What the world model learns from and what the transformer reads are the episodes of the training tasks; the prompts
    are from the best of each.
    that the prompts are from are the best of each."""
    seen, world_model, draw = [], meta_dt.update_world_model, meta_dt.draw_windows
    expected = walker.episodes[walker.train_ids][..., :-1].flatten(0, 1)
    lengths, returns = walker.lengths[walker.train_ids], walker.episode_returns[walker.train_ids]

    def learn(agent, episodes, all_lengths, episode, step, args):
        seen.append("world model")
        assert torch.equal(episodes, expected) and torch.equal(all_lengths, lengths.flatten())
        return world_model(agent, episodes, all_lengths, episode, step, args)

    def read(sequences, best, given, args, generator):
        seen.append("transformer")
        _, obs, _, act = sequences.rows.split([1, walker.obs_dim, args.z_dim, walker.act_dim], -1)
        assert torch.equal(torch.cat([obs, act], -1), expected[..., : walker.obs_dim + walker.act_dim])
        assert torch.equal(sequences.lengths, lengths.flatten()) and torch.equal(given, lengths)
        order = np.where(lengths > 0, -returns, np.inf).argsort(1)[:, : min(4, walker.min_episodes)]
        assert (best % lengths.shape[1]).tolist() == order.tolist()
        assert (best // lengths.shape[1] == torch.arange(len(lengths))[:, None]).all()
        return draw(sequences, best, given, args, generator)

    monkeypatch.setattr(meta_dt, "update_world_model", learn)
    monkeypatch.setattr(meta_dt, "draw_windows", read)
    run(walker_path, tmp_path, env="walker-rand-params", total_updates=2, log_every=2)
    assert seen == ["world model", *["transformer"] * 2]


# ---- rollouts ---------------------------------------------------------------------------


def play_back(agent, args, episodes, lengths, monkeypatch, target=5.0):
    """Feed recorded episodes to the policy, step by step -> list of the windows that the transformer was given."""
    windows, act_dim = [], agent.transformer.sizes[-1]
    obs, act, rew, _ = episodes.split(agent.world_model.sizes, -1)

    def forward(window, prompt=None, dropout=0.0):
        windows.append(window)
        return act[:, len(windows) - 1][:, None]

    monkeypatch.setattr(agent.transformer, "forward", forward)
    empty = torch.zeros(len(episodes), 0, episodes.shape[-1])
    policy = meta_dt.adapt(agent, empty, empty[..., 0], targets=torch.tensor([target]))
    last = torch.zeros(len(episodes))
    with torch.no_grad():
        for t in range(episodes.shape[1]):
            assert policy(obs[:, t], last).shape == (len(episodes), act_dim)
            last = rew[:, t, 0]
    return windows


def test_rollouts_see_what_training_saw(monkeypatch):
    """z, observations, actions and step numbers of every window of a rollout are those of the precomputed sequences."""
    agent, args = make_agent()
    episodes, lengths = make_episodes(4, [HORIZON] * 4)
    sequences = meta_dt.read_episodes(agent, episodes, lengths)
    every = torch.arange(4)
    for t, window in enumerate(play_back(agent, args, episodes, lengths, monkeypatch)):
        count = min(t + 1, args.window)
        expected = sequences.cut(every, every * 0 + t + 1 - count, count)
        assert torch.equal(window.steps, expected.steps) and window.valid.all()
        torch.testing.assert_close(window.rows[:, :-1, 1:], expected.rows[:, :-1, 1:])
        act = columns_of(agent)["act"]
        torch.testing.assert_close(window.rows[:, -1, 1 : act.start], expected.rows[:, -1, 1 : act.start])
        assert (window.rows[:, -1, act] == 0).all()  # not chosen yet


def test_return_to_go_falls_by_the_rewards(monkeypatch):
    agent, args = make_agent(return_scale=10.0)
    episodes, lengths = make_episodes(1, [HORIZON])
    episodes[0, :2, OBS_DIM + ACT_DIM] = torch.tensor([-1.0, -2.0])
    window = play_back(agent, args, episodes, lengths, monkeypatch)[2]
    torch.testing.assert_close(window.rows[0, :, 0], torch.tensor([0.5, 0.6, 0.8]))


def test_rows_of_a_rollout_do_not_influence_each_other(tiny):
    agent, _ = make_agent(tiny.obs_dim, tiny.act_dim, tiny.family.horizon)
    tasks = tiny.test_ids
    context, mask = tiny.episodes[tasks, 0, :, :-1], torch.ones(len(tasks), tiny.family.horizon)
    targets = torch.tensor([-5.0, -7.0, -9.0])

    def play(rows):
        env = dc.TaskEnv(tiny.family, tiny.task_params, tasks[rows])
        policy = meta_dt.adapt(agent, context[rows], mask[rows], targets=targets[rows])
        done = dc.rollout(env, lambda obs, rew: policy(tiny.standardize(obs), rew), [7 + int(i) for i in rows])
        return done["actions"], done["rewards"]

    together = play(np.arange(3))
    for i in range(3):
        for one, all_rows in zip(play(np.array([i])), together):
            np.testing.assert_allclose(one[0], all_rows[i], atol=1e-5)
    assert np.abs(together[0][0] - together[0][1]).max() > 1e-4


def test_point_robot_vector():
    family = dc.FAMILIES["point-robot"]
    state, rewards = np.zeros((1, 2)), []
    for act in ([1, 0],) * 5 + ([0, 0],) * 3:
        state = family.step(state, np.array([act]), None)
        rewards.append(float(family.reward(family.outcome(None, state), None, np.array([[0.5, 0.0]]))[0]))
    assert rewards == pytest.approx([-0.4, -0.3, -0.2, -0.1, 0, 0, 0, 0], abs=1e-12)
    assert sum(rewards) == pytest.approx(-1)


def test_the_prompt_is_the_worst_predicted_part_of_a_best_episode():
    agent, _ = make_agent()
    episodes, _ = make_episodes(10, [HORIZON] * 10)
    reward = OBS_DIM + ACT_DIM
    episodes[..., reward] = torch.arange(10).view(2, 5).float().flatten()[:, None]  # returns rise with the number
    episodes[:, 6, reward] += 50  # nothing predicts this one
    context = episodes.view(2, 5 * HORIZON, -1)
    rows, steps, valid = meta_dt.find_prompt(agent, context, torch.ones(2, 5 * HORIZON))
    assert valid.all() and all(6 in row for row in steps.tolist())
    for row, step, task in zip(rows, steps, range(2)):
        matches = [n for n in range(10) if torch.equal(episodes[n, step, :OBS_DIM], row[:, 1 : 1 + OBS_DIM])]
        assert len(matches) == 1 and matches[0] in range(5 * task + 2, 5 * task + 5)


def test_contexts_without_transitions_give_no_prompt():
    agent, _ = make_agent()
    context, mask = torch.zeros(3, HORIZON, 2 * OBS_DIM + ACT_DIM + 1), torch.zeros(3, HORIZON)
    assert not meta_dt.find_prompt(agent, context, mask).valid.any()
    obs, targets = torch.randn(3, OBS_DIM), torch.tensor([1.0])
    with torch.no_grad():
        with_empty = meta_dt.adapt(agent, context, mask, targets=targets)(obs, torch.zeros(3))
        with_none = meta_dt.adapt(agent, context[:, :0], mask[:, :0], targets=targets)(obs, torch.zeros(3))
    torch.testing.assert_close(with_empty, with_none)


@pytest.mark.parametrize("prompt_dropout", [0.25, 1.0])
def test_prompts_matter_unless_all_were_dropped(prompt_dropout):
    agent, _ = make_agent(prompt_dropout=prompt_dropout)
    episodes, _ = make_episodes(2, [HORIZON] * 2)
    obs, targets = torch.randn(2, OBS_DIM), torch.tensor([1.0])
    acts = [
        meta_dt.adapt(agent, context, torch.ones(context.shape[:2]), targets=targets)(obs, torch.zeros(2))
        for context in (episodes, episodes[:, :0])
    ]
    assert torch.equal(*acts) == (prompt_dropout == 1)


def test_embed_is_z_after_the_last_transition():
    agent, args = make_agent()
    episodes, lengths = make_episodes(3, [12, 9, 2])
    mask = (torch.arange(HORIZON) < lengths[:, None]).float()
    every = torch.arange(3)
    expected = agent.world_model.infer(episodes, lengths, every, lengths, args.context_horizon)
    torch.testing.assert_close(meta_dt.embed(agent, episodes, mask), expected.detach())


def test_target_returns(tiny):
    best = np.array([tiny.episode_returns[t][tiny.lengths[t].numpy() > 0].max() for t in range(len(tiny.lengths))])
    train, test = best[tiny.train_ids], best[tiny.test_ids]
    expected = {"train_mean_max": [train.mean()], "train_max": [train.max()], "task_max": test}
    for which, values in expected.items():
        np.testing.assert_allclose(meta_dt.target_returns(tiny, tiny.test_ids, which), values, rtol=1e-6)


# ---- whole runs -------------------------------------------------------------------------


def run(path, folder, **changes):
    return meta_dt.train(meta_dt.Args(**SMALL | {"dataset": str(path), "run_dir": str(folder)} | changes))


@pytest.mark.parametrize("extra", [{}, {"prompt_select": "last", "target_return": "task_max", "heads": 2}])
def test_run_moves_every_parameter_and_reports_every_shot(extra, tiny_path, tmp_path, capsys):
    result = run(tiny_path, tmp_path, **extra)
    torch.manual_seed(0)
    args = dc.stored_args(meta_dt.Args, result["run_dir"])
    before = meta_dt.Agent(dc.load_dataset("point-robot", tiny_path), args).state_dict()
    assert not [k for k, value in load(result["run_dir"])["agent"].items() if torch.equal(value, before[k])]
    for protocol in dc.PROTOCOLS:
        assert math.isfinite(result[f"eval/{protocol}/return"])
    shots = [result[f"eval/online/return_ep_{k}"] for k in range(1, 6)]
    assert shots[0] == pytest.approx(result["eval/zero_shot/return"], abs=1e-4)  # no prompt before the first episode
    assert shots[-1] == result["eval/online/return"] and shots[1] != shots[0]
    out = capsys.readouterr().out
    assert re.search(rf"target return \({args.target_return}\): -\d+\.\d", out)
    assert {"losses/world_model", "losses/actor"} <= {tag for _, tag, _ in read_rows(result["run_dir"])}


def test_the_world_model_is_frozen_while_the_transformer_learns(tiny_path, tmp_path, monkeypatch):
    seen, read = {}, meta_dt.read_tasks

    def spy(agent, episodes, lengths):
        assert "agent" not in seen  # once
        seen["agent"], seen["before"] = agent, [p.clone() for p in agent.world_model.parameters()]
        return read(agent, episodes, lengths)

    monkeypatch.setattr(meta_dt, "read_tasks", spy)
    run(tiny_path, tmp_path)
    after = list(seen["agent"].world_model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(seen["before"], after))
    assert all(p.grad is None and not p.requires_grad for p in after)


@pytest.mark.parametrize("lr_decay", [True, False])
def test_learning_rate_rises_stays_and_falls(lr_decay, tiny_path, tmp_path, monkeypatch):
    seen, update = [], meta_dt.update

    def spy(agent, *drawn):
        seen.append([group["lr"].item() for group in agent.opt.param_groups])
        return update(agent, *drawn)

    monkeypatch.setattr(meta_dt, "update", spy)
    run(tiny_path, tmp_path, lr=1.0, warmup_updates=4, world_model_updates=1, lr_decay=lr_decay)
    falls = [1 - n / 20 for n in range(20)] if lr_decay else [1] * 20
    np.testing.assert_allclose(np.concatenate(seen), [0.25, 0.5, 0.75, 1] + [1] * 16 + falls, rtol=1e-6)


def test_run_on_episodes_of_different_lengths(walker_path, tmp_path):
    result = run(walker_path, tmp_path, env="walker-rand-params", total_updates=4, log_every=2)
    assert math.isfinite(result["eval/online/return"])
    assert dc.stored_args(meta_dt.Args, result["run_dir"]).world_model_loss == "state"


# ---- defaults and bad input -------------------------------------------------------------


@pytest.mark.parametrize(
    "env, loss, window, prompt_length, scale",
    [("ant-dir", "reward", 20, 5, 500), ("point-robot-wind", "state", 20, 5, 10)]
    + [("hopper-rand-params", "state", 8, 3, 500), ("point-robot", "reward", 20, 5, 10)],
)
def test_defaults_follow_the_family(env, loss, window, prompt_length, scale, monkeypatch):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(dc, "load_dataset", stop)
    args = meta_dt.Args(env=env, total_updates=100)
    with pytest.raises(Stop):
        meta_dt.train(args)
    assert (args.world_model_loss, args.window, args.prompt_length) == (loss, window, prompt_length)
    assert (args.return_scale, args.world_model_updates, args.warmup_updates) == (scale, 50, 10)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prompt_length": 17}, "--prompt-length 17"),
        ({"context_horizon": 16}, "--context-horizon 16"),
        ({"heads": 3}, "--heads 3"),
        ({"dropout": 1.5}, "--dropout 1.5"),
        ({"prompt_dropout": -0.1}, "--prompt-dropout -0.1"),
        ({"window": 0}, "--window 0"),
        ({"return_scale": math.nan}, "--return-scale nan"),
        ({"world_model_lr": 0.0}, "--world-model-lr 0.0"),
    ],
)
def test_bad_input_gets_one_line_before_any_training(changes, words, tiny_path, tmp_path):
    message = stop_message(lambda: run(tiny_path, tmp_path / "runs", **changes))
    assert words in message and not (tmp_path / "runs").exists()


def test_one_episode_per_task_is_too_few(tiny_path, tmp_path, monkeypatch):
    real = dc.load_dataset

    def load_one(*arguments):
        data = real(*arguments)
        data.min_episodes = 1
        return data

    monkeypatch.setattr(dc, "load_dataset", load_one)
    assert "two episodes" in stop_message(lambda: run(tiny_path, tmp_path))


def test_nothing_in_an_update_reads_from_the_device():
    for function in (meta_dt.update, meta_dt.update_world_model, meta_dt.draw_windows, meta_dt.Transformer.forward):
        assert not re.search(r"\.item\(|\.cpu\(|\.numpy\(|\.tolist\(", inspect.getsource(function))

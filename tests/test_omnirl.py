"""omnirl.py: counts, both models, the loss and one whole update against slow recomputations in float64; what a context
may hold; targets; own episodes; learning. The slow functions take one stream, one state and one action at a time."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import load, read_rows, stop_message

import omnirl

S, A = omnirl.FAMILY.states, omnirl.FAMILY.actions
SMALL = {"device": "cpu", "streams": 6, "context_rows": 64, "batch_size": 1000, "width": 16, "depth": 2, "warmup": 1}
SMALL |= {"temperature": 0.5}
MEMORIES = ["counts", "transformer"]


@pytest.fixture(autouse=True)
def more_contexts(monkeypatch):
    monkeypatch.setattr(omnirl, "EVERY", 16)


def play(args, seed=3):
    """-> agent, worlds of up to six streams on four tasks, tasks, numbers of the streams' tasks, their rows."""
    torch.manual_seed(seed)
    rng, agent = np.random.default_rng(seed), omnirl.Agent(args)
    ids = np.array([3, 0, 1, 2, 0, 3])[: args.streams]
    tasks = omnirl.FAMILY.draw_tasks(4, rng)
    worlds = omnirl.Worlds(tasks, ids, rng, args.renumber)
    own = args.own_share if args.memory == "counts" else 0
    rows = omnirl.roll_out(worlds, omnirl.Behavior(worlds, agent, args, rng, own), args.context_rows, rng)
    return agent, worlds, tasks, ids, rows


def make(args, rows, worlds):
    name = omnirl.contexts_of_counts if args.memory == "counts" else omnirl.contexts_of_rows
    return name(rows, worlds, args, np.random.default_rng(0))


def chances(worlds):
    return np.diff(worlds.chances, axis=-1, prepend=0.0)


# ---- the equations, slowly --------------------------------------------------------------


def slow_layers(net, x):
    """A Sequential at one vector."""
    for layer in net:
        if isinstance(layer, torch.nn.Sequential):
            x = slow_layers(layer, x)
        elif isinstance(layer, torch.nn.Linear):
            x = layer.weight @ x if layer.bias is None else layer.weight @ x + layer.bias
        elif isinstance(layer, torch.nn.LayerNorm):
            x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * layer.weight + layer.bias
        else:
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x


def steps_of(rows, b, length):
    """The actions among the first steps of stream b -> list of (s, a, r, s', ended, tag)."""
    steps = []
    for t in range(1, length + 1):
        if rows.act[b, t] < A:
            after, ended = int(rows.state[b, t]), rows.over[b, t] == 1
            pair = int(rows.state[b, t - 1]), int(rows.act[b, t])
            steps.append((*pair, float(rows.rew[b, t]), after, ended, rows.tag[b, t]))
    return steps


def slow_count_net(net, steps):
    """-> logits [S, A] of one context."""
    rewards = [r for _, _, r, _, _, _ in steps]
    total = max(1, len(steps))
    mean = sum(rewards) / total
    std = max(sum(r * r for r in rewards) / total - mean**2, 1e-6) ** 0.5
    pairs, states, share = {}, {}, {}
    for s in range(S):
        for a in range(A):
            own = [step for step in steps if step[:2] == (s, a)]
            n = max(1, len(own))
            tags, m = sum(step[5] for step in own), sum(step[2] for step in own) / n
            z = (m - mean) / std if own else 0.0
            spread = max(sum(step[2] ** 2 for step in own) / n - m**2, 0.0) ** 0.5
            features = [math.log1p(len(own)), (len(own) + 1) ** -0.5, float(bool(own)), math.log1p(tags), tags / n]
            features += [math.asinh(z), math.tanh(z), math.asinh(m), math.asinh(10 * m) / 3]
            features += [math.asinh(spread), math.log(std) / 3, math.log1p(total) / 5]
            pairs[s, a] = slow_layers(net.pair, torch.tensor(features, dtype=torch.float64))
            share[s, a] = [sum(step[3] == j for step in own) / n for j in range(S)]
        left, entered = sum(step[0] == s for step in steps), [step for step in steps if step[3] == s]
        features = [float(any(step[4] for step in entered)), math.log1p(left), math.log1p(len(entered))]
        states[s] = slow_layers([net.place], torch.tensor(features, dtype=torch.float64))
    for to_pairs, to_states in zip(net.to_pairs, [*net.to_states, None]):
        for s, a in pairs:
            after = sum(share[s, a][j] * states[j] for j in range(S))
            pairs[s, a] = pairs[s, a] + slow_layers(to_pairs, torch.cat([pairs[s, a], after, states[s]]))
        for s in range(S) if to_states else ():
            mine = torch.stack([pairs[s, a] for a in range(A)])
            states[s] = states[s] + slow_layers(to_states, torch.cat([states[s], mine.max(0).values, mine.mean(0)]))
    return torch.stack([torch.cat([slow_layers(net.head, pairs[s, a]) for a in range(A)]) for s in range(S)])


def slow_token(net, rows, b, t):
    """Row t before anybody acts in it -> token [W], state, state before or None, number of the action before."""
    one = lambda x: torch.tensor(float(x), dtype=torch.float64)  # noqa: E731
    act, rew, tag, before = A + 1, 0.0, 0, None
    if t > 0:
        act, tag, before, rew = int(rows.act[b, t]), int(rows.tag[b, t]), int(rows.state[b, t - 1]), rows.rew[b, t]
    rewards = [one(rew).asinh(), one(rew).tanh(), one(10 * rew).asinh() / 3, one(rew / 10).asinh()]
    x = net.act.weight[act] + slow_layers([net.rew], torch.stack(rewards))
    x = x + net.over.weight[int(rows.over[b, t])] + net.tag.weight[tag]
    state = int(rows.state[b, t])
    if net.names:
        x = x + net.names.weight[state] + net.names.weight[S + (S if before is None else before)]
    return x + slow_layers(net.mix, x), state, before, act


def slow_transformer(net, rows, b, length):
    """-> logits [T, A] of one stream."""
    tokens = [slow_token(net, rows, b, t) for t in range(length)]
    xs = [token[0] for token in tokens]
    for block in net.blocks:
        heads, out = block.heads, []
        y = [slow_layers([block.norm], x) for x in xs]
        query, key = zip(*[torch.split(block.query_key.weight @ v, len(v)) for v in y])
        value = [(block.values.weight @ v).view(heads, -1) for v in y]
        for t, (_, state, before, _) in enumerate(tokens):
            mixed = []
            for h in range(heads):
                scores = []
                for j, (_, j_state, j_before, j_act) in enumerate(tokens[: t + 1]):
                    q, k = query[t].view(heads, -1)[h], key[j].view(heads, -1)[h]
                    score = (q * k).sum() / math.sqrt(len(q))
                    if block.matching:
                        (mine, old), (found, other) = block.query_state[h], block.key_state[h]
                        score = score + mine * found * (state == j_before) + mine * other * (state == j_state)
                        if before is not None:
                            score = score + old * found * (before == j_before) + old * other * (before == j_state)
                        score = score + block.query_act[h, j_act]
                    scores.append(score)
                weights = torch.stack(scores).softmax(0)
                mixed.append(sum(w * v[h] for w, v in zip(weights, value)))
            x = xs[t] + slow_layers([block.out], torch.cat(mixed))
            out.append(x + slow_layers(block.feed, x))
        xs = out
    return torch.stack([slow_layers(net.head, x) for x in xs])


def slow_loss(agent, rows, worlds, args):
    """Mean of -log p(optimal action), over all states of all contexts or all steps of all streams."""
    terms, length = [], args.context_rows
    for b in range(args.streams):
        if args.memory == "counts":
            for length in range(0, args.context_rows, omnirl.EVERY):
                logp = slow_count_net(agent.model, steps_of(rows, b, length)).log_softmax(-1)
                terms += [-logp[s, worlds.optimal[b, s]] for s in range(S) if not worlds.ends[b, s]]
        else:
            logp = slow_transformer(agent.model, rows, b, args.context_rows).log_softmax(-1)
            wanted = [worlds.optimal[b, rows.state[b, t]] for t in range(args.context_rows)]
            terms += [-logp[t, wanted[t]] for t in range(args.context_rows) if not rows.over[b, t]]
    return torch.stack(terms).mean()


# ---- one update -------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "matching"), [("counts", True), ("transformer", True), ("transformer", False)])
def test_update_equals_slow_recomputation(memory, matching, monkeypatch):
    monkeypatch.setattr(omnirl, "EVERY", 8)
    few = SMALL | {"context_rows": 16, "streams": 2, "lr": 1e-2}
    args = omnirl.Args(**few, memory=memory, matching=matching)
    agent, worlds, _, _, rows = play(args)
    slow = copy.deepcopy(agent).double()
    loss = slow_loss(slow, rows, worlds, args)
    loss.backward()
    metrics = omnirl.update(agent, *make(args, rows, worlds), args, torch.Generator().manual_seed(0))
    assert metrics["losses/cross_entropy"].item() == pytest.approx(loss.item(), rel=1e-4)
    grads = [p.grad for p in slow.parameters()]
    scale = min(1.0, 1.0 / (sum((g**2).sum() for g in grads) ** 0.5 + 1e-6))
    for (name, new), old, grad in zip(agent.named_parameters(), slow.parameters(), grads):
        torch.testing.assert_close(new.grad.double(), scale * grad, rtol=1e-3, atol=1e-5, msg=name)
        grad, sure = grad * scale, grad.abs() > 1e-4  # the first step of AdamW is a sign
        expected = old * (1 - args.lr * 0.01) - args.lr * grad / (grad.abs() + 1e-8)
        assert torch.allclose(new.double()[sure], expected[sure], atol=1e-4), name


def test_rows_without_target_do_not_count():
    logits = torch.tensor([[0.0, math.log(3)], [5.0, 0.0], [0.0, 0.0]])
    loss, rows = omnirl.cross_entropy(logits, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))
    assert loss.item() == pytest.approx((math.log(4) + 2 * math.log(2)) / 3) and rows[1] == 0


def test_cached_rows_equal_whole_sequence():
    args = omnirl.Args(**SMALL, memory="transformer")
    agent, worlds, _, _, rows = play(args)
    context, _ = make(args, rows, worlds)
    caches = agent.model.empty_caches(args.streams, args.context_rows, "cpu")
    with torch.no_grad():
        whole = agent.model(context)
        for t in range(args.context_rows):
            one = agent.model(rows.tensors(t, t + 1), caches, t)
            assert torch.allclose(one[:, 0], whole[:, t], atol=1e-5)


# ---- contexts and targets ---------------------------------------------------------------


@pytest.mark.parametrize("renumber", [True, False])
def test_targets_are_optimal_in_their_task(renumber):
    args = omnirl.Args(**SMALL, memory="transformer", renumber=renumber)
    _, worlds, tasks, ids, rows = play(args)
    moves = chances(worlds)
    q = np.zeros(moves.shape[:3])
    for _ in range(4000):
        q = (moves * (worlds.rewards + 0.994 * q.max(-1)[:, None, None])).sum(-1)
    target = make(args, rows, worlds)[1].numpy()
    by_state = make(omnirl.Args(**SMALL), rows, worlds)[1].numpy().reshape(4, args.streams, S, A)
    for b in range(args.streams):
        best = np.isclose(q[b], q[b].max(-1, keepdims=True), rtol=1e-6)
        for t in range(args.context_rows):
            acted = not rows.over[b, t]
            assert target[b, t].sum() == acted and (not acted or best[rows.state[b, t], target[b, t].argmax()])
        assert (by_state[:, b].sum(-1) == ~worlds.ends[b]).all()
        assert all(best[s, by_state[k, b, s].argmax()] for k in range(4) for s in range(S) if not worlds.ends[b, s])
        rewards = np.sort(tasks.rewards[ids[b]].ravel())
        assert np.array_equal(np.sort(worlds.rewards[b].ravel()), rewards)


def test_streams_follow_their_own_task():
    args = omnirl.Args(**SMALL | {"context_rows": 512})
    _, worlds, _, _, rows = play(args)
    moves, start = chances(worlds), np.diff(worlds.start, prepend=0.0)
    for b in range(args.streams):
        clock = 0
        for t in range(args.context_rows):
            s, a, after, rew = rows.state[b, t], rows.act[b, t + 1], rows.state[b, t + 1], rows.rew[b, t + 1]
            assert rows.before[b, t + 1] == s
            if a == A:
                assert rows.over[b, t] and start[b, after] > 0 and rew == 0 and not rows.over[b, t + 1]
                clock = 0
                continue
            clock += 1
            assert not rows.over[b, t] and moves[b, s, a, after] > 1e-12
            noise = worlds.noise[b, s, a, after]
            assert abs(rew - worlds.rewards[b, s, a, after]) <= 6 * noise + 1e-5 * abs(rew) + 1e-6
            assert rows.over[b, t + 1] == (1 if worlds.ends[b, after] else 2 if clock == omnirl.LIMIT else 0)
    assert (rows.over == 1).any() and (rows.over == 2).any()


def test_renumbering_is_new_for_every_stream():
    tasks = omnirl.FAMILY.draw_tasks(1, np.random.default_rng(0))
    ids = np.zeros(50, int)
    worlds = omnirl.Worlds(tasks, ids, np.random.default_rng(1))
    fixed = omnirl.Worlds(tasks, ids, np.random.default_rng(1), renumber=False)
    of_action = worlds.rewards.sum((1, 3)).round(6)  # the states' numbers do not matter
    assert len({tuple(row) for row in worlds.start}) > 20 and len({tuple(row) for row in of_action}) > 20
    assert len({tuple(row) for row in fixed.optimal}) == 1
    assert np.allclose(fixed.ends[0, tasks.names[0]], tasks.ends[0])
    assert np.array_equal(fixed.optimal[0, tasks.names[0]], tasks.policy[0])


def test_behavior_targets_are_actions_taken_next():
    args = omnirl.Args(**SMALL, supervision="behavior")
    _, worlds, _, _, rows = play(args)
    target = make(args, rows, worlds)[1].view(4, args.streams, S, A)
    for k in range(4):
        for b in range(args.streams):
            taken = np.zeros((S, A + 1))
            for t in range(16 * k, 16 * k + 16):
                taken[rows.state[b, t], rows.act[b, t + 1]] += 1
            assert np.array_equal(target[k, b].numpy(), taken[:, :A])
    rows_target = omnirl.contexts_of_rows(rows, worlds, args, None)[1].numpy()
    acted = rows.act[:, 1:] < A
    assert np.array_equal(rows_target.argmax(-1)[acted], rows.act[:, 1:][acted])


@pytest.mark.parametrize("memory", MEMORIES)
def test_query_asks_once_per_stream(memory):
    args = omnirl.Args(**SMALL, memory=memory, supervision="query")
    _, worlds, _, _, rows = play(args)
    target = make(args, rows, worlds)[1]
    full = make(omnirl.Args(**SMALL, memory=memory), rows, worlds)[1]
    asked = target.view(4, args.streams, -1).sum((0, 2)) if memory == "counts" else target.sum((1, 2))
    assert (asked == 1).all() and (target <= full).all()


def test_tags_mark_the_noisy_optimal_policy():
    args = omnirl.Args(**SMALL | {"context_rows": 512, "streams": 6}, oracle_share=1.0)
    _, worlds, _, _, rows = play(args)
    right = worlds.optimal[np.arange(6)[:, None], rows.state[:, :-1]] == rows.act[:, 1:]
    tagged = (rows.act < A) & (rows.tag == 1)
    assert right[tagged[:, 1:]].mean() > 0.4 and rows.tag[:, 1].all()
    assert not play(omnirl.Args(**SMALL, oracle_share=0.0))[-1].tag.any()


def test_learners_act_at_random_less_and_less():
    args, size = omnirl.Args(**SMALL, oracle_share=0.0), 400
    tasks, ids = omnirl.FAMILY.draw_tasks(1, np.random.default_rng(0)), np.zeros(size, int)
    worlds = omnirl.Worlds(tasks, ids, np.random.default_rng(1))
    behavior = omnirl.Behavior(worlds, None, args, np.random.default_rng(2), 0.0)
    uniform = np.isinf(behavior.decay)
    assert 0.05 < uniform.mean() < 0.3 and (behavior.noise[uniform] == 1).all()
    shares = behavior.decay[~uniform] / args.context_rows
    assert 0.2 <= shares.min() < 0.4 and 1.2 < shares.max() <= 1.5
    rows = omnirl.Rows(*(np.zeros((size, 70), int) for _ in range(6)))
    behavior.noise[:], behavior.decay[:] = 1, 64
    greedy = [(behavior(rows, t)[0] == behavior.q[:, 0].argmax(-1)).mean() for t in (1, 33, 63)]
    assert 0.1 < greedy[0] < 0.35 and 0.5 < greedy[1] < 0.75 and greedy[2] > 0.9


def test_plan_follows_rewards_and_bonus():
    """Action 0 leads from 0 to 1, where a reward of 2 waits; action 1 stays in 0 for 1. State 1 ends."""
    state, before, act, rew = [[0, 1, 0, 0, 0]], [[2, 0, 1, 0, 0]], [[3, 0, 2, 1, 1]], [[0, 2, 0, 1, 1]]
    rows = omnirl.Rows(*np.array([state, [[0, 1, 0, 0, 2]], before, act, rew, [[0] * 5]]))
    counts = omnirl.count(rows, 4, 2, 2)
    assert counts.moves[0, 0].tolist() == [[0, 1], [2, 0]] and counts.rew[0, 0].tolist() == [2, 2]
    assert counts.ends.tolist() == [[0, 1]]  # a time limit is no end
    zero, gamma = torch.zeros(1), torch.tensor([0.5])
    q, value = omnirl.plan(counts, torch.zeros(1, 2), gamma, zero, sweeps=60)
    assert torch.allclose(q[0, 0], torch.tensor([2.0, 2.0])) and value[0].tolist() == pytest.approx([2, 0])
    eager, _ = omnirl.plan(counts, torch.zeros(1, 2), gamma, zero + 1, sweeps=60)
    std = (6 / 3 - (4 / 3) ** 2) ** 0.5
    assert eager[0, 0, 0].item() == pytest.approx(2 + std, rel=1e-5)  # tried once
    assert eager[0, 1, 0].item() == pytest.approx(2 * std, rel=1e-5)  # never tried


def test_learners_break_ties_by_chance():
    args, size = omnirl.Args(**SMALL, oracle_share=0.0), 400
    tasks, rng = omnirl.FAMILY.draw_tasks(1, np.random.default_rng(0)), np.random.default_rng(2)
    worlds = omnirl.Worlds(tasks, np.zeros(size, int), rng)
    behavior = omnirl.Behavior(worlds, None, args, rng, 0.0)
    rows = omnirl.Rows(*(np.full((size, 70), value) for value in (0, 0, 0, A, 0.0, 0)))  # nothing was ever tried
    behavior(rows, omnirl.EVERY)
    first = np.bincount(behavior.q[:, 0].argmax(-1), minlength=A)
    assert first.sum() == size and first.min() > size / A / 2 and abs(behavior.q).max() < 1e-3


# ---- own episodes and runs --------------------------------------------------------------


def test_reader_counts_every_row_once():
    args, seen = omnirl.Args(**SMALL), []
    _, worlds, _, _, rows = play(args)

    class Agent:
        def probs(self, counts, streams, temperature):
            seen.append(counts.moves.sum((1, 2, 3)).tolist())
            return np.ones((args.streams, S, A)) / A

    reader = omnirl.CountReader(Agent(), worlds, args.context_rows, args, np.random.default_rng(0))
    for t in range(2 * args.think_every + 1):
        reader(rows, t)
    steps = [[len(steps_of(rows, b, k * args.think_every)) for b in range(args.streams)] for k in range(3)]
    assert seen == steps


def test_returns_belong_to_their_episode():
    act = np.array([[A + 1, 1, 1, A, 0, A, 2, A], [A + 1, 2, A, 0, 0, 0, A, A]])
    rew = np.array([[0, 5, 3, 0, 2, 0, 7, 0], [0, 4, 0, 1, 1, 1, 0, 0]], np.float32)
    rows = omnirl.Rows(None, None, None, act, rew, None)
    tasks = type("Tasks", (), {"uniform": np.array([-1.0, 9.0])})
    got = omnirl.normalized_returns(rows, tasks, np.array([1, 0]), 2)
    assert np.array_equal(got, [[8 - 9, 2 - 9], [4 + 1, 3 + 1]])


def run(tmp_path, **changes):
    settings = SMALL | {"streams": 4, "batch_size": 8, "log_every": 1, "save_every": 1, "total_updates": 3}
    settings |= {"eval_every": 9, "final_episodes": 1, "final_plays": 1, "run_dir": str(tmp_path)}
    return omnirl.train(omnirl.Args(**settings | changes))


@pytest.mark.parametrize("memory", MEMORIES)
def test_resumed_run_equals_uninterrupted_one(memory, tmp_path):
    whole = run(tmp_path / "one", memory=memory, lr_decay=False)
    part = run(tmp_path / "two", memory=memory, lr_decay=False, total_updates=2)
    resumed = run(tmp_path, memory=memory, lr_decay=False, resume=part["run_dir"])
    one, two = load(whole["run_dir"]), load(resumed["run_dir"])
    assert all(torch.equal(one["agent"][name], two["agent"][name]) for name in one["agent"])
    assert resumed["eval/own/normalized_ep_1"] == whole["eval/own/normalized_ep_1"]
    last = [[row for row in read_rows(r["run_dir"]) if row[0] == 3] for r in (whole, resumed)]
    assert last[0] == last[1]


def test_learning_rate_rises_then_falls(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(omnirl.dc, "set_lr", lambda opt, lr: rates.append(lr))
    run(tmp_path, total_updates=8, warmup=4, lr=8.0)
    assert rates == pytest.approx([2, 4, 6, 8, 8, 6, 4, 2])


def test_streams_grow_in_the_second_half():
    args = omnirl.Args(memory="transformer", total_updates=4, streams=3, batch_size=2, context_rows=1024)
    sizes = [(x.streams, x.batch_size, x.context_rows) for x in (omnirl.stage(args, step) for step in (1, 2, 3, 4))]
    assert sizes == [(12, 8, 256)] * 2 + [(3, 2, 1024)] * 2
    args.memory = "counts"
    assert omnirl.stage(args, 1) is args


def test_fixed_tasks_are_evaluated_as_seen(tmp_path):
    result = run(tmp_path, train_tasks=3, total_updates=1)
    assert all(math.isfinite(result[f"eval/{name}/normalized_ep_1"]) for name in ("own", "seen"))


def test_context_is_whole_number_of_parts(tmp_path):
    assert "--context-rows 63" in stop_message(lambda: run(tmp_path, context_rows=63))


# ---- learning ---------------------------------------------------------------------------


def test_learns_to_act_in_new_tasks(monkeypatch, tmp_path):
    """Own episodes 4 to 6. Below 20: labels of another task, no rewards in the context."""
    monkeypatch.setattr(omnirl, "EVERY", 64)
    settings = dict(device="cpu", run_dir=str(tmp_path), streams=32, context_rows=512, batch_size=32, total_updates=12)
    settings |= dict(eval_every=99, log_every=99, final_episodes=6, final_plays=1, width=16, depth=3)
    result = omnirl.train(omnirl.Args(**settings))
    assert np.mean([result[f"eval/own/normalized_ep_{k}"] for k in (4, 5, 6)]) > 30

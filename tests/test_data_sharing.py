"""data_sharing.py: whole updates against a slow recomputation in float64, the sheet's vectors, which transitions are
labelled and shared with which reward, own episodes, a training from outside, learning."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from actor_critic_suite import DATA, assert_same_update, gradients, make_batch, slow_logp
from conftest import OnDevice, load, pattern, read_rows, slow_net, slow_twin, stop_message, to_meta, uniform
from torch.distributions import Normal
from torch.utils._pytree import tree_map

import data_collect as dc
import data_sharing
import focal

TASKS, Z_DIM = 4, 3


def make(**changes):
    """Agent with parameters large enough that nothing is near zero, args, z."""
    settings = {"width": 16, "lr": 0.01, "tau": 0.1, "gamma": 0.9, "reward_scale": 3.0, "cql_weight": 0.7}
    args = data_sharing.Args(**settings | {"proposals": 2, "entropy_weight": 0.3, "percentile": 70.0} | changes)
    torch.manual_seed(0)
    agent = data_sharing.Agent(DATA, Z_DIM, args).double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.normal_(0, 0.4)
        for net in (*agent.critic.nets, *agent.critic_target.nets):  # either twin is the smaller one at times
            net.net[-1].weight.sub_(net.net[-1].weight.mean())
            net.net[-1].bias.zero_()
    return agent, args, pattern((TASKS, Z_DIM))


def rows_of(batch, start, stop):
    return dc.Batch(*(x[:, start:stop] for x in batch))


# ---- one update -------------------------------------------------------------------------


def slow_policy(agent, obs, z):
    mean, log_std = slow_net(agent.actor, obs, z).chunk(2)
    return Normal(mean, log_std.clamp(-5, 2).exp())


def slow_drawn(policy, noise):
    """Actions for given noise [N, act_dim] -> list of (action, log-density)."""
    acts = [torch.tanh(policy.mean + policy.stddev * row) for row in noise]
    return [(act, slow_logp(policy, act)) for act in acts]


def slow_percentile(values, percent):
    """Linear between neighbors in the sorted list."""
    values = sorted(values)
    place = percent / 100 * (len(values) - 1)
    low = math.floor(place)
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def slow_weights(agent, z, shared, reference, args):
    """-> list per task of the weights of the shared rows."""
    tasks, size = shared.rew.shape
    if args.sharing not in ("cds", "cds-uds"):
        return [[1.0] * size for _ in range(tasks)]

    def value(batch, m, b):
        return min(slow_twin(agent.critic_target, batch.obs[m, b], batch.act[m, b], z[m])).item()

    delta = []
    for m in range(tasks):
        threshold = slow_percentile([value(reference, m, k) for k in range(reference.rew.shape[1])], args.percentile)
        delta.append([value(shared, m, b) - threshold for b in range(size)])
    tau = sum(abs(d) for row in delta for d in row) / (tasks * size)
    gate = (lambda d: float(d >= 0)) if args.gate == "hard" else lambda d: 1 / (1 + math.exp(-d / tau))
    return [[gate(d) for d in row] for row in delta]


def slow_update(agent, opt, z, own, shared, reference, args):
    weights = slow_weights(agent, z, shared, reference, args)
    split, size = own.rew.shape[1], own.rew.shape[1] + shared.rew.shape[1]
    shape = TASKS, size, args.proposals, 2
    normal, evenly, of_policy = pattern(shape), 2 * uniform(shape) - 1, pattern((TASKS, size, 1, 2))
    total, sums = TASKS * size, dict.fromkeys(("q", "gap", "actor", "q_mean", "entropy", "gap_own", "gap_shared"), 0.0)
    for m in range(TASKS):
        for b in range(size):
            batch, k, w = (own, b, 1.0) if b < split else (shared, b - split, weights[m][max(b - split, 0)])
            obs, act, rew, next_obs, term = (x[m, k] for x in batch)
            here = slow_drawn(slow_policy(agent, obs, z[m]), normal[m, b])
            there = slow_drawn(slow_policy(agent, next_obs, z[m]), normal[m, b])
            anywhere = [(row, torch.tensor(-2 * math.log(2))) for row in evenly[m, b]]
            next_value = min(slow_twin(agent.critic_target, next_obs, there[0][0], z[m]))[0].item()
            target = args.reward_scale * rew + (0.0 if term else args.gamma * next_value)
            proposals = [(a.detach(), density.detach()) for a, density in (*here, *there, *anywhere)]
            for net in agent.critic.nets:
                value = slow_net(net, obs, act, z[m])[0]
                soft = sum(torch.exp(slow_net(net, obs, a, z[m])[0] - density) for a, density in proposals).log()
                sums["q"] += w * (value - target) ** 2 / total
                sums["gap"] += args.cql_weight * w * (soft - value) / total
                part, rows = ("gap_own", split) if b < split else ("gap_shared", size - split)
                sums[part] += (soft - value) / (2 * TASKS * rows)
            ((pi_act, log_pi),) = slow_drawn(slow_policy(agent, obs, z[m]), of_policy[m, b])
            pi_value = min(slow_twin(agent.critic, obs, pi_act, z[m]))[0]
            sums["actor"] += w * (args.entropy_weight * log_pi - pi_value) / total
            sums["q_mean"] += pi_value / total
            sums["entropy"] -= log_pi / total
    gradients(sums["q"] + sums["gap"], agent.critic)
    gradients(sums["actor"], agent.actor)
    opt.step()
    with torch.no_grad():
        for target, source in zip(agent.critic_target.parameters(), agent.critic.parameters()):
            target.copy_((1 - args.tau) * target + args.tau * source)
    metrics = {f"{'losses' if k in ('q', 'gap', 'actor') else 'stats'}/{k}": v for k, v in sums.items()}
    if size > split:
        return metrics | {"stats/weight": np.mean(weights)}
    return {tag: value for tag, value in metrics.items() if tag != "stats/gap_shared"}


CASES = [{"sharing": sharing} for sharing in ("none", "uds", "cds", "cds-uds")]
CASES += [{"sharing": "cds", "gate": "hard", "percentile": percentile} for percentile in (35.0, 45.0)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_updates_equal_a_slow_recomputation(case, known_noise):
    """Weights, percentile, losses, which loss moves what, two steps in a row."""
    agent, args, z = make(**case)
    twin = copy.deepcopy(agent)
    opt = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], args.lr)
    for k in range(2):
        batch, reference = make_batch(k, size=7), make_batch(10 + k, size=5)
        own, shared = rows_of(batch, 0, 4), rows_of(batch, 4, 4 if args.sharing == "none" else 7)
        expected = slow_update(twin, opt, z, own, shared, reference, args)
        metrics = data_sharing.update(agent, z, own, shared, reference, args)
        if "gate" in case:
            assert 0.1 < metrics["stats/weight"] < 0.9  # both kinds of rows
        assert_same_update(agent, twin, metrics, expected)


def test_update_stays_on_the_device():
    agent, args, z = make(sharing="cds-uds")
    batches = (make_batch(k) for k in range(3))
    inputs = tree_map(lambda x: x.float().to("meta"), (z, *batches))
    with OnDevice():
        metrics = data_sharing.update(to_meta(agent), *inputs, args)
    assert all(value.device.type == "meta" for value in metrics.values())


# ---- vectors ----------------------------------------------------------------------------


def test_weights_equal_hand_made_values():
    delta = torch.tensor([[1.4, 0.0, -2.0]])
    np.testing.assert_allclose(data_sharing.share_weight(delta, "soft"), [[0.77474383, 0.5, 0.14620194]], rtol=1e-6)
    assert data_sharing.share_weight(delta, "hard").tolist() == [[1, 1, 0]]
    assert (data_sharing.share_weight(torch.zeros(2, 3), "soft") == 0.5).all()  # not NaN


def test_gaps_equal_hand_made_values():
    q = torch.tensor([0.0, 1.0, 0.5, 1.5, 1.0, 2.0]).expand(2, 1, 1, -1)  # uniform, pi(s'), pi(s)
    density = torch.tensor([-math.log(2), -math.log(2), 0.5, -0.5, 0.0, -1.0]).expand(1, 1, -1)
    gap = data_sharing.conservative_gap(q, density, torch.full((2, 1, 1), 1.2))
    np.testing.assert_allclose(gap, np.full((2, 1, 1), 2.45401464), rtol=1e-6)
    for act_dim, expected in ((2, 4.78749174), (8, 8.94637483)):  # a constant Q, uniform proposals
        density = torch.full((1, 1, 30), -act_dim * math.log(2))
        gap = data_sharing.conservative_gap(torch.zeros(2, 1, 1, 30), density, torch.zeros(2, 1, 1))
        np.testing.assert_allclose(gap, np.full((2, 1, 1), expected), rtol=1e-6)


def test_log_density_equals_a_hand_made_value(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    act, log_density = data_sharing.Policy(*torch.tensor([[0.3], [math.log(0.5)]]).double()).sample(1)
    assert act.item() == pytest.approx(math.tanh(0.8)) and log_density.item() == pytest.approx(-0.1442842320)


def test_log_std_is_clamped():
    agent, _, z = make()
    for bias, expected in ((-9.0, -5), (9.0, 2)):
        with torch.no_grad():
            agent.actor.net[-1].weight.zero_()
            agent.actor.net[-1].bias.fill_(bias)
        assert (agent.policy(torch.zeros(TASKS, 2, 3).double(), z).log_std == expected).all()


# ---- labelled and shared transitions ----------------------------------------------------


def pool_of(data, **changes):
    return data_sharing.Pool(data, data_sharing.Args(**{"labelled_episodes": 3} | changes))


def places(data, batch):
    """Where transitions come from, told by their actions -> nested lists of (task, episode, step)."""
    acts = data.episodes[..., 2:4].numpy()
    real = data.recorded(data.lengths).numpy()
    index = {acts[place].tobytes(): place for place in zip(*real.nonzero())}
    assert len(index) == real.sum()
    return [[index[act.numpy().tobytes()] for act in row] for row in batch.act]


def labelled_places(data, task, count, worst):
    """The rewards are summed anew."""
    returns = data.episodes[task, :, :, 4].double().sum(1).tolist()
    best = sorted(range(len(returns)), key=lambda n: returns[n], reverse=not worst)[:count]
    return {(task, n, t) for n in best for t in range(data.family.horizon)}


@pytest.mark.parametrize("labelled", ["best", "worst"])
def test_own_and_shared_transitions_come_from_their_places(labelled, tiny):
    pool, generator = pool_of(tiny, labelled=labelled, batch_size=512), torch.Generator().manual_seed(0)
    task_ids = torch.tensor([0, 4, 0])
    own, shared = pool.own(task_ids, 512, generator), pool.shared(task_ids, generator)
    assert own.rew.shape == (3, 512) and shared.rew.shape == (3, 256)
    everything = {(int(i), n, t) for i in tiny.train_ids for n in range(8) for t in range(20)}
    for task, of_own, of_shared in zip(task_ids.tolist(), places(tiny, own), places(tiny, shared)):
        wanted = labelled_places(tiny, task, 3, labelled == "worst")
        assert set(of_own) == wanted
        assert set(of_shared) <= everything - wanted
        counts = np.bincount([i for i, _, _ in of_shared])[tiny.train_ids]
        assert counts.min() > 20 and counts.max() < 70  # tasks are drawn uniformly, the own one too
    many = pool.shared(torch.zeros(40, dtype=torch.long), generator)
    seen = set().union(*places(tiny, many))
    assert len(seen) > 0.99 * len(everything - labelled_places(tiny, 0, 3, labelled == "worst"))


@pytest.mark.parametrize("env", ["point-robot", "sparse-point-robot"])
@pytest.mark.parametrize("sharing", ["all", "cds"])
def test_relabelled_rewards_equal_the_simulator(env, sharing):
    data = dc.load_dataset(env)
    pool = pool_of(data, env=env, sharing=sharing, batch_size=256)
    task_ids = data.train_tasks[[0, 7, 20]]
    shared = pool.shared(task_ids, torch.Generator().manual_seed(0))
    tasks = task_ids.repeat_interleave(128).numpy()
    simulator = dc.TaskEnv(data.family, data.task_params, tasks)
    simulator.reset(seed=0)
    obs, next_obs = (x.flatten(0, 1).double() * data.obs_std + data.obs_mean for x in (shared.obs, shared.next_obs))
    simulator.state = obs.numpy()
    reached, rew, *_ = simulator.step(shared.act.flatten(0, 1).numpy())
    np.testing.assert_allclose(reached, next_obs, atol=1e-5)
    np.testing.assert_allclose(shared.rew.flatten(), rew, atol=1e-5)
    assert len(np.unique(rew.round(4))) > 10


def test_own_rewards_are_the_recorded_ones(tiny):
    own = pool_of(tiny).own(torch.tensor([1, 5]), 64, torch.Generator().manual_seed(0))
    for row, rewards in zip(places(tiny, own), own.rew):
        assert [tiny.episodes[place][4].item() for place in row] == rewards.tolist()


@pytest.mark.parametrize("sharing", ["uds", "cds-uds"])
def test_unlabelled_data_get_the_least_reward(sharing, tiny):
    labelled = set.union(*(labelled_places(tiny, int(i), 3, False) for i in tiny.train_ids))
    rewards = np.array([tiny.episodes[place][4].item() for place in sorted(labelled)])
    least, task_ids = np.quantile(rewards, 0.01), torch.tensor([1, 3])
    pool = pool_of(tiny, sharing=sharing)
    assert least < -0.5 and pool.std == pytest.approx(rewards.std(ddof=1), rel=1e-5)
    rew = pool.shared(task_ids, torch.Generator().manual_seed(0)).rew
    np.testing.assert_allclose(rew, np.full((2, 16), least), rtol=1e-5)
    zero = pool_of(tiny, sharing=sharing, unlabelled_reward="zero")
    assert (zero.shared(task_ids, torch.Generator().manual_seed(0)).rew == 0).all()


def test_tasks_are_known_by_standardized_parameters(tiny):
    train = tiny.task_params[tiny.train_ids]
    expected = (tiny.task_params - train.mean(0)) / train.std(0)
    np.testing.assert_allclose(pool_of(tiny).z, expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"env": "point-robot-wind"}, "reward alone"),
        ({"env": "cheetah-vel"}, "point-robot"),
        ({"labelled_episodes": 50}, "at most 49"),
        ({"shared_fraction": 1.0}, "--shared-fraction"),
        ({"percentile": 101.0}, "--percentile"),
    ],
)
def test_what_cannot_be_shared_is_refused(changes, named, tmp_path):
    assert named in stop_message(data_sharing.train, data_sharing.Args(device="cpu", run_dir=str(tmp_path), **changes))
    assert not list(tmp_path.iterdir())


# ---- a training -------------------------------------------------------------------------


def run(path, folder, **changes):
    settings = {"device": "cpu", "dataset": str(path), "run_dir": str(folder), "total_updates": 8, "width": 16}
    settings |= {"meta_batch": 5, "labelled_episodes": 2, "log_every": 1, "eval_every": 4, "save_every": 4}
    return data_sharing.train(data_sharing.Args(**settings | changes))


@pytest.mark.parametrize("sharing", ["none", "all", "cds-uds"])
def test_networks_see_the_tasks_of_their_batches(sharing, tiny, tiny_path, tmp_path, monkeypatch):
    updates, update = [], data_sharing.update

    def watch(agent, *batches):
        updates.append((agent.opt.param_groups[0]["lr"], batches))
        return update(agent, *batches)

    monkeypatch.setattr(data_sharing, "update", watch)
    run(tiny_path, tmp_path, sharing=sharing, lr=1e-3, batch_size=20, shared_fraction=0.4, percentile_size=6)
    known, seen = pool_of(tiny).z, set()
    for (lr, (z, own, shared, reference, args)), share in zip(updates, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25], strict=True):
        assert lr == pytest.approx(share * 1e-3)
        shared_size = 0 if sharing == "none" else 8
        assert [x.rew.shape for x in (own, shared, reference)] == [(5, 20 - shared_size), (5, shared_size), (5, 6)]
        for task, *rows in zip(z, places(tiny, own), places(tiny, reference)):
            (i,) = {i for row in rows for i, _, _ in row}
            assert torch.equal(task, known[i]) and i in tiny.train_ids
            seen.add(i)
        assert args.reward_scale == pytest.approx(1 / pool_of(tiny, labelled_episodes=2).std)
    assert len(seen) == 6


def test_evaluation_equals_episodes_by_hand(tiny):
    """Two episodes per task; the point always starts at the origin and the mean action is taken."""
    torch.manual_seed(0)
    pool = pool_of(tiny)
    agent = data_sharing.Agent(tiny, 2, data_sharing.Args(width=16))
    results = data_sharing.evaluate_all(agent, pool, 2)
    for name, ids in (("train", tiny.train_ids), ("iid", tiny.test_ids)):
        returns = []
        for i in ids:
            place, total = torch.zeros(2), 0.0
            for _ in range(20):
                obs = (place - tiny.obs_mean) / tiny.obs_std
                place = place + 0.1 * torch.tanh(slow_net(agent.actor, obs, pool.z[i])[:2]).detach()
                total -= math.dist(place, tiny.task_params[i])
            returns += [total, total]
        assert results[f"eval/{name}/return"] == pytest.approx(np.mean(returns), abs=1e-3)
        error = np.std(returns, ddof=1) / len(returns) ** 0.5
        assert results[f"eval/{name}/return_se"] == pytest.approx(error, abs=1e-3)


def test_resumed_run_equals_uninterrupted_one(tiny_path, tmp_path):
    whole = run(tiny_path, tmp_path / "one", lr_decay=False)
    part = run(tiny_path, tmp_path / "two", lr_decay=False, total_updates=4)
    resumed = run(tiny_path, tmp_path, lr_decay=False, resume=part["run_dir"])
    one, two = load(whole["run_dir"]), load(resumed["run_dir"])
    assert all(torch.equal(one["agent"][name], two["agent"][name]) for name in one["agent"])
    last = [[row for row in read_rows(r["run_dir"]) if row[0] == 8] for r in (whole, resumed)]
    assert last[0] == last[1] and resumed["eval/train/return"] == whole["eval/train/return"]


def test_shared_blocks_equal_those_of_focal():
    for name in ("MLP", "Twin"):
        assert inspect.getsource(getattr(data_sharing, name)) == inspect.getsource(getattr(focal, name))


# ---- learning ---------------------------------------------------------------------------


def test_learns_from_shared_data(tmp_path):
    """Only the worst episode of each training task is labelled. Below 68: rewards of another task, networks blind to
    the task, the least reward (uds)."""
    settings = {"device": "cpu", "run_dir": str(tmp_path), "total_updates": 200, "eval_every": 999}
    settings |= {"sharing": "cds", "labelled": "worst", "labelled_episodes": 1}
    assert data_sharing.train(data_sharing.Args(**settings))["eval/train/normalized"] > 75

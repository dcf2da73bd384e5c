"""Task families, simulation and behavior policies of data_collect.py against independent computations."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from conftest import OnDevice, pattern, stop_message, task_distance, to_meta

import data_collect as dc

NAMES = [name for name in dc.FAMILIES if name != "any-mdp"]  # which has test_any_mdp.py
every_family = pytest.mark.parametrize("name", NAMES)


def make_env(name, task_ids):
    return dc.TaskEnv(dc.FAMILIES[name], dc.FAMILIES[name].draw()[0], task_ids)


def random_actions(env, steps):
    return np.random.default_rng(0).uniform(-1, 1, (steps, *env.action_space.shape)).astype(np.float32)


def play(env, actions):
    """-> observations [steps, B, O], rewards [steps, B]."""
    results = [env.step(act)[:2] for act in actions]
    return np.stack([obs for obs, _ in results]), np.stack([rew for _, rew in results])


# ---- families ---------------------------------------------------------------

HALVES = list(range(20)), list(range(20, 40))
EVERY_FOURTH = [i for i in range(40) if i % 4 != 2], list(range(2, 40, 4))
SPLITS = {"point-robot": EVERY_FOURTH, "ant-goal": EVERY_FOURTH, "cheetah-dir": ([0, 1], [0, 1])}
SPLITS |= {"point-robot-wind": (list(range(40)), list(range(40, 50)))}
SPLITS |= {"point-robot-square": (list(range(45)), list(range(45, 50)))}
SPARSE = [1, 6, 9, 22, 23, 24, 27, 39, 54, 61, 66, 72, 82, 84, 88, 89, 90, 92, 96, 99]
SPLITS |= {"sparse-point-robot": (sorted({*range(100)} - {*SPARSE}), SPARSE)}
KNOWN = {  # family -> {task: its first parameters}, of CORRO's and CSRO's files or by hand
    "point-robot": {0: (1, 0), 13: (0.5, 0.8660), 26: (-0.5, 0.8660), 39: (-1, 0)},
    "point-robot-square": {0: (-0.4760, -0.6826), 49: (0.0214, -0.7492)},
    "sparse-point-robot": {0: (1, 0), 33: (0.5, 0.8660), 66: (-0.5, 0.8660), 99: (-1, 0)},
    "point-robot-wind": {0: (-0.0238, 0.0336), 1: (-0.0341, 0.0110), 49: (0.0473, -0.0375)},
    "cheetah-vel": {0: (1.2511,), 1: (1.3080,), 2: (1.6524,)},
    "cheetah-dir": {0: (1,), 1: (-1,)},
    "ant-dir": {0: (-0.8671, 0.4981), 39: (-0.8365, 0.5480)},
    "ant-dir-full": {0: (-0.8671, 0.4981), 39: (-0.8365, 0.5480)},
    "ant-goal": {0: (2, 0), 5: (1.4142, 1.4142), 10: (0, 2), 20: (-2, 0)},
    "hopper-rand-params": {0: (-2.1938,), 1: (2.7362,), 2: (-1.5722,)},
    "walker-rand-params": {0: (-2.1938,), 1: (2.7362,), 2: (-1.5722,)},
}


@every_family
def test_tasks_equal_the_papers(name):
    params, train_ids, test_ids = dc.FAMILIES[name].draw()
    assert (train_ids.tolist(), test_ids.tolist()) == SPLITS.get(name, HALVES)
    for task, known in KNOWN[name].items():
        np.testing.assert_allclose(params[task, : len(known)], known, atol=6e-5)
    expected = [[task_distance(name, one, two) for two in params] for one in params]
    np.testing.assert_allclose(dc.FAMILIES[name].distance(params[:, None], params), expected, atol=1e-12)


def plain_reward(name, outcome, act, params):
    """The reward of one transition in Python floats, as the papers' code writes it."""
    effort = sum(a * a for a in act)
    return {
        "point-robot": lambda: -math.dist(outcome, params),
        "point-robot-square": lambda: -math.dist(outcome, params),
        "sparse-point-robot": lambda: max(0.0, (0.2 - math.dist(outcome, params)) / 0.2),
        "point-robot-wind": lambda: -math.dist(outcome, (1, 0)),
        "cheetah-vel": lambda: -abs(outcome[0] - params[0]) - 0.05 * effort,
        "cheetah-dir": lambda: params[0] * outcome[0] - 0.05 * effort,
        "ant-dir": lambda: outcome[0] * params[0] + outcome[1] * params[1],
        "ant-dir-full": lambda: outcome[0] * params[0] + outcome[1] * params[1] - 0.5 * effort + 1,
        "ant-goal": lambda: -abs(outcome[0] - params[0]) - abs(outcome[1] - params[1]) - 0.1 * effort,
        "hopper-rand-params": lambda: outcome[0] - 0.001 * effort,
        "walker-rand-params": lambda: outcome[0] + 1 - 0.001 * effort,
    }[name]()


@every_family
def test_reward_equals_its_formula(name):
    family, rng = dc.FAMILIES[name], np.random.default_rng(0)
    params = family.draw()[0]
    task_params = params[rng.integers(len(params), size=200)]
    outcome = rng.normal(0, 1.5, (200, family.outcome_dim))
    if name == "sparse-point-robot":
        outcome = task_params + rng.normal(0, 0.12, (200, 2))
    act = rng.uniform(-1, 1, (200, family.act_dim))
    expected = [plain_reward(name, *row) for row in zip(outcome.tolist(), act.tolist(), task_params.tolist())]
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(family.reward(outcome, act, task_params), expected, atol=1e-12)
    tensors = [torch.as_tensor(x) for x in (outcome, act, task_params)]
    np.testing.assert_allclose(family.reward(*[x.float() for x in tensors]).numpy(), expected, atol=1e-5)
    if name == "sparse-point-robot":  # its behavior policies are trained on the dense reward
        expected = [plain_reward("point-robot", *row) for row in zip(outcome, act, task_params)]
    np.testing.assert_allclose(family.training_reward(*tensors).numpy(), expected, atol=1e-12)


def test_ant_is_stuck_upside_down():
    family = dc.FAMILIES["ant-dir"]
    rng, data = np.random.default_rng(0), mujoco.MjData(family.model)
    state = family.reset(rng, np.zeros((200, 2)))
    state[50:, 4:8] = rng.normal(size=(150, 4))
    state[:, 4:8] /= np.linalg.norm(state[:, 4:8], axis=1, keepdims=True)
    upside_down = []
    for row in state:
        data.qpos[:] = row[1:16]
        mujoco.mj_kinematics(family.model, data)
        upside_down.append(data.body("torso").xmat[8] < 0)
    assert family.stuck(state).tolist() == upside_down and not any(upside_down[:50]) and any(upside_down)


# ---- simulation against a plain MuJoCo loop ---------------------------------

BODIES = {  # family -> asset, time step, frame skip
    "ant-dir": ("ant.xml", 0.01, 5),
    "ant-goal": ("ant.xml", 0.01, 5),
    "cheetah-vel": ("half_cheetah.xml", 0.01, 5),
    "hopper-rand-params": ("hopper.xml", 0.004, 4),
    "walker-rand-params": ("walker2d.xml", 0.004, 4),
}
VARIED = {"hopper-rand-params": {"body_mass": 1.5, "body_inertia": 1.5, "dof_damping": 1.3, "geom_friction": 1.5}}
VARIED["walker-rand-params"] = {"body_mass": 1.5, "geom_friction": 1.5}


def plain_model(name, task):
    """The model of a task, loaded and randomized without data_collect; mj_setConst is not called."""
    asset, timestep, _ = BODIES[name]
    model = mujoco.MjModel.from_xml_path(str(Path(gym.__file__).parent / "envs" / "mujoco" / "assets" / asset))
    model.opt.timestep = timestep
    generator = random.Random(task + 1)
    for attribute, base in VARIED.get(name, {}).items():
        values = getattr(model, attribute)
        for index in np.ndindex(values.shape):
            values[index] *= base ** generator.uniform(-3, 3)
    return model


def plain_observation(name, qpos, qvel):
    if name == "ant-dir":
        return np.concatenate([qpos[2:], qvel])
    if name == "cheetah-vel":
        return np.concatenate([qpos[1:], qvel, [qpos[0], 0, 0.7 + qpos[1]]])
    return np.concatenate([qpos, qvel])


def plain_outcome(name, before, after, dt):
    if name == "ant-goal":
        return after[:2]
    return (after[:2] - before[:2]) / dt if name == "ant-dir" else (after[:1] - before[:1]) / dt


@pytest.mark.parametrize("name", BODIES)
def test_row_follows_a_plain_mj_step_loop(name):
    task, (_, timestep, skip) = 7, BODIES[name]
    env = make_env(name, [task])
    obs, _ = env.reset(seed=3)
    model = plain_model(name, task)
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = env.state[0, 1 : 1 + model.nq], env.state[0, 1 + model.nq :]
    np.testing.assert_allclose(obs[0], plain_observation(name, data.qpos, data.qvel), rtol=1e-6)
    for steps, wild in enumerate(random_actions(env, 50) * (0.2 if name == "walker-rand-params" else 1.3)):
        act = wild.clip(-1, 1)
        before, data.ctrl[:] = data.qpos.copy(), act[0]
        for _ in range(skip):
            mujoco.mj_step(model, data)
        outcome = plain_outcome(name, before, data.qpos, timestep * skip)
        expected = plain_reward(name, outcome, act[0].astype(np.float64), env.params[task])
        obs, rew, terminated, truncated, info = env.step(wild)
        np.testing.assert_allclose(obs[0], plain_observation(name, data.qpos, data.qvel), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(rew[0], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(info["outcome"][0], outcome, rtol=1e-6, atol=1e-6)
        assert not truncated[0] and terminated[0] == (name == "walker-rand-params" and data.qpos[1] <= 0.5)
        if terminated[0]:
            break
    assert steps > 20


def test_reset_draws_around_the_models_pose():
    for name, limit in (("ant-dir", 0.1), ("hopper-rand-params", 0.005)):
        state, model = dc.FAMILIES[name].reset(np.random.default_rng(0), np.zeros((5000, 1))), plain_model(name, 0)
        offset, qvel = state[:, 1 : 1 + model.nq] - model.qpos0, state[:, 1 + model.nq :]
        for noise in (offset, qvel) if limit < 0.1 else (offset,):  # uniform
            assert 0.99 * limit < abs(noise).max() <= limit and abs(noise.mean(0)).max() < 0.05 * limit
            np.testing.assert_allclose(noise.std(0), limit / math.sqrt(3), rtol=0.05)
        assert not state[:, 0].any()
        if limit == 0.1:  # normal
            np.testing.assert_allclose(qvel.std(0), 0.1, rtol=0.05)
            assert abs(qvel).max() > 0.3


# ---- TaskEnv ----------------------------------------------------------------


@pytest.mark.parametrize("name, bad", [("point-robot", np.nan), ("ant-dir", np.inf)])
def test_action_not_finite_is_refused(name, bad):
    env = make_env(name, [0, 1, 0])
    env.reset(seed=0)
    before, act = env.state.copy(), np.zeros((3, env.family.act_dim), np.float32)
    act[1, -1] = bad
    assert "task 1 is not finite" in stop_message(env.step, act)
    assert np.array_equal(env.state, before)


def test_reset_mask_rebinds_only_its_rows():
    env, reference = make_env("ant-goal", [0, 1, 2]), make_env("ant-goal", [0, 1, 2])
    actions = random_actions(env, 20)
    env.reset(seed=0), reference.reset(seed=0)
    play(env, actions[:9])
    outcome = env.step(actions[9])[4]["outcome"]
    before = outcome.copy()
    after, _ = env.reset(seed=7, options={"reset_mask": np.array([False, True, False]), "task_ids": [9, 9, 9]})
    assert np.array_equal(outcome, before)  # a reset leaves alone what the step returned
    assert env.task_ids.tolist() == [0, 9, 2] and env.steps.tolist() == [10, 0, 10]
    assert np.array_equal(after[1], make_env("ant-goal", [9]).reset(seed=[8])[0][0])
    got, expected = play(env, actions[10:]), play(reference, actions)
    for mine, full in zip(got, expected):
        assert np.array_equal(mine[:, [0, 2]], full[10:, [0, 2]]) and not np.array_equal(mine[:, 1], full[10:, 1])


@pytest.mark.parametrize("name", ["point-robot-wind", "cheetah-vel"])
def test_time_limit_truncates_once_then_rows_rest(name):
    env = make_env(name, [0, 1])
    env.reset(seed=0)
    for t, act in enumerate(random_actions(env, env.family.horizon), 1):
        obs, rew, terminated, truncated, _ = env.step(act)
        assert not terminated.any() and truncated.tolist() == [t == env.family.horizon] * 2 and (rew != 0).all()
    still, rew, terminated, truncated, _ = env.step(act)
    assert np.array_equal(still, obs) and not (rew.any() or terminated.any() or truncated.any())
    env.reset(options={"reset_mask": np.array([False, True])})  # wakes its row alone
    assert (env.step(act)[1] != 0).tolist() == [False, True]


@pytest.mark.parametrize("steps", [0, 199])
def test_only_the_fallen_walker_terminates(steps):
    env = make_env("walker-rand-params", [0, 1, 2])
    env.reset(seed=0)
    env.state[1, 2:4] = 0.51, np.pi / 2  # height and pitch: lies flat above the ground and falls
    env.state[1, 1 + env.family.model.nq + 1] = -2.0
    env.steps[:2] = steps  # a fall in the last step is no time-out
    obs, rew, terminated, truncated, _ = env.step(np.zeros((3, 6)))
    assert terminated.tolist() == [False, True, False] and truncated.tolist() == [steps == 199, False, False]
    assert (rew != 0).all()
    later, rew, terminated, _, _ = env.step(np.ones((3, 6)))
    assert np.array_equal(later[1], obs[1]) and not terminated.any()
    assert (rew != 0).tolist() == [steps == 0, False, True]


@pytest.mark.parametrize("threads", [1, 2])
def test_row_does_not_depend_on_its_neighbors(threads):
    torch.set_num_threads(threads)
    try:
        env = make_env("walker-rand-params", [3, 1, 2, 5, 4])
    finally:
        torch.set_num_threads(1)
    assert len(env.scratch) == threads
    env.reset(seed=10)
    actions = random_actions(env, 15)
    obs, rew = play(env, actions)
    for row, task in enumerate([3, 1, 2, 5, 4]):
        single = make_env("walker-rand-params", [task])
        single.reset(seed=10 + row)
        single_obs, single_rew = play(single, actions[:, row : row + 1])
        np.testing.assert_allclose(single_obs[:, 0], obs[:, row], rtol=0, atol=1e-12)
        np.testing.assert_allclose(single_rew[:, 0], rew[:, row], rtol=0, atol=1e-12)


def test_diverged_row_keeps_its_state():
    env, reference = make_env("hopper-rand-params", [0, 1, 2]), make_env("hopper-rand-params", [0, 1, 2])
    env.reset(seed=0), reference.reset(seed=0)
    env.state[1, 1 + env.family.model.nq :] = 1e9
    broken = env.state[1].copy()
    for t, act in enumerate(random_actions(env, 3)):
        obs, rew, terminated, truncated, info = env.step(act)
        expected_obs, expected_rew, *_ = reference.step(act)
        assert info["diverged"].tolist() == [False, t == 0, False] and not (terminated | truncated).any()
        assert np.array_equal(env.state[1], broken) and rew[1] == 0
        assert np.array_equal(obs[[0, 2]], expected_obs[[0, 2]]) and np.array_equal(rew[[0, 2]], expected_rew[[0, 2]])
    assert env.live.tolist() == [True, False, True] and env.steps.tolist() == [3, 0, 3]


def test_saved_state_continues_bit_for_bit(tmp_path):
    env, other = make_env("walker-rand-params", [0, 1, 2]), make_env("walker-rand-params", [9, 9, 9])
    env.reset(seed=0)
    actions = random_actions(env, 12)
    play(env, actions[:5])
    torch.save(env.get_state(), tmp_path / "state.pt")
    other.set_state(torch.load(tmp_path / "state.pt", weights_only=True))

    def go_on(env):
        first = play(env, actions[5:9])
        start, _ = env.reset(options={"reset_mask": np.array([True, False, True]), "task_ids": [4, 4, 5]})
        return [*first, start, *play(env, actions[9:]), env.task_ids, env.steps]

    assert all(np.array_equal(a, b) for a, b in zip(go_on(other), go_on(env)))


# ---- rollout ----------------------------------------------------------------


def test_rollout_records_what_happened():
    env, seen = make_env("point-robot", [0, 20]), []

    def policy(obs, rew):
        seen.append((obs.clone(), rew.clone()))
        return torch.tensor([[0.5, 3.0], [-0.25, 0.0]])  # 3 lies outside of the action space

    done = dc.rollout(env, policy, [0, 1], standardize=lambda obs: 2 * obs)
    assert done["lengths"].tolist() == [20, 20] and not done["terminated"].any() and not done["diverged"].any()
    assert (done["actions"] == np.array([[0.5, 1.0], [-0.25, 0.0]], np.float32)[:, None]).all()
    position = np.arange(21)[:, None] * np.array([[[0.05, 0.1]], [[-0.025, 0.0]]])
    np.testing.assert_allclose(done["observations"], 2 * position, atol=1e-6)
    goals = env.params[[0, 20]][:, None]
    np.testing.assert_allclose(done["rewards"], -np.linalg.norm(position[:, 1:] - goals, axis=-1), atol=1e-6)
    for t, (obs, rew) in enumerate(seen):  # the policy sees the observation and the previous reward
        assert np.array_equal(obs, done["observations"][:, t])
        assert np.array_equal(rew, done["rewards"][:, t - 1] if t else np.zeros(2))
    assert len(seen) == 20


def test_rollout_is_zero_after_each_end():
    env, seeds = make_env("walker-rand-params", range(6)), [5, 3, 0, 1, 2, 9]
    generator = torch.Generator().manual_seed(0)
    done = dc.rollout(env, lambda obs, rew: torch.rand(6, 6, generator=generator) * 2 - 1, seeds)
    assert np.array_equal(done["observations"][:, 0], env.reset(seed=seeds)[0])
    assert len(set(done["lengths"].tolist())) > 2 and done["terminated"].any()
    for row, length in enumerate(done["lengths"]):
        height = done["observations"][row, : length + 1, 1]
        assert (height[:-1] > 0.5).all() and (height[-1] <= 0.5) == done["terminated"][row]
        assert done["terminated"][row] or length == 200
        for key, start in (("observations", length + 1), ("actions", length), ("rewards", length)):
            assert done[key][row, start - 1].any() and not done[key][row, start:].any()


def diverging(monkeypatch, rows, call):
    """Make these rows diverge in the call-th step of all envs -> list: live rows of each step."""
    original, calls = dc.TaskEnv._simulate, []

    def simulate(env, state, act, live):
        next_state, diverged = original(env, state, act, live)
        calls.append(len(state))
        if len(calls) == call:
            diverged[rows] = True
        return np.where(diverged[:, None], state, next_state), diverged

    monkeypatch.setattr(dc.TaskEnv, "_simulate", simulate)
    return calls


def test_rollout_drops_a_diverged_step(monkeypatch):
    diverging(monkeypatch, 0, 4)
    done = dc.rollout(make_env("point-robot", [0, 1]), lambda obs, rew: torch.ones(2, 2), [0, 1])
    assert done["diverged"].tolist() == [True, False] and done["lengths"].tolist() == [3, 20]
    assert done["observations"][0, 3].any() and not done["observations"][0, 4:].any()
    assert not done["rewards"][0, 3:].any() and not done["actions"][0, 3:].any()


# ---- SAC --------------------------------------------------------------------


def slow_mlp(p, prefix, x):
    """One row through linear, layer norm, ReLU, linear, layer norm, ReLU, linear; p: parameters by name."""
    for i in (0, 3):
        x = p[f"{prefix}.{i}.weight"] @ x + p[f"{prefix}.{i}.bias"]
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        x = (p[f"{prefix}.{i + 1}.weight"] * x + p[f"{prefix}.{i + 1}.bias"]).clamp(min=0)
    return p[f"{prefix}.6.weight"] @ x + p[f"{prefix}.6.bias"]


def slow_policy(p, obs, task, noise):
    """-> act, log-probability of one row, given its standard normal draw."""
    mean, raw = slow_mlp(p, "actor.net", torch.cat([obs, task])).chunk(2)
    std = (-1.5 + 3.5 * raw.tanh()).exp()
    act = (mean + std * noise).tanh()
    density = (-(noise**2) / 2).exp() / (std * math.sqrt(2 * math.pi)) / (1 - act**2)
    return act, density.log().sum()


def numbers(*shape, seed):
    """Reproducible normal numbers that `known_noise` does not touch."""
    return torch.as_tensor(np.random.default_rng(seed).normal(size=shape))


def test_sac_update_follows_its_equations(known_noise):
    """Row by row in float64; the first step of Adam is the gradient's sign."""
    agent = dc.SAC(SimpleNamespace(obs_dim=3, act_dim=2, gamma=0.8), 2, SimpleNamespace(width=6, lr=3e-3)).double()
    with torch.no_grad():
        agent.log_temperature.fill_(math.log(0.4))
        for i, value in enumerate(agent.parameters()):  # targets that differ, no bias 0, no weight of a norm 1
            value += 0.3 * numbers(*value.shape, seed=i + 100)
    p = {name: value.detach().clone().requires_grad_() for name, value in agent.state_dict().items()}
    obs, next_obs, task = numbers(7, 3, seed=0), numbers(7, 3, seed=1), numbers(7, 2, seed=2)
    act, rew, term = numbers(7, 2, seed=3).tanh(), 2 * numbers(7, seed=4), numbers(7, seed=5).gt(0).double()
    critic_loss, q_mean = agent.update(obs, act, rew, next_obs, term, task)
    noise, alpha, grads = pattern(act.shape), p["log_temperature"].detach().exp(), {}

    def q(net, obs, task, act):
        return [slow_mlp(p, f"{net}.{k}", torch.cat([obs, task, act]))[0] for k in (0, 1)]

    def descend(loss, part):
        names = [name for name in p if name.startswith(part)]
        for name, g in zip(names, torch.autograd.grad(loss, [p[name] for name in names])):
            grads[name], p[name] = g, (p[name] - 3e-3 * g / (abs(g) + 1e-8)).detach().requires_grad_()

    losses, smaller, actor_losses, logps = [], [], [], []
    for i in range(7):
        next_act, next_logp = slow_policy(p, next_obs[i], task[i], noise[i])
        soft = sum(q("critic_target", next_obs[i], task[i], next_act)) / 2 - alpha * next_logp
        target = (rew[i] if term[i] else rew[i] + 0.8 * soft).detach()
        losses += [(value - target) ** 2 for value in q("critic", obs[i], task[i], act[i])]
    descend(sum(losses) / 7, "critic.")
    for i in range(7):
        pi_act, logp = slow_policy(p, obs[i], task[i], noise[i])
        smaller.append(min(q("critic", obs[i], task[i], pi_act)))
        actor_losses.append(alpha * logp - smaller[-1]), logps.append(logp.detach())
    descend(sum(actor_losses) / 7, "actor.")
    descend(-p["log_temperature"] * (sum(logps) / 7 - 2), "log_temperature")  # the wanted entropy is -act_dim
    torch.testing.assert_close(critic_loss, (sum(losses) / 7).detach())
    torch.testing.assert_close(q_mean, (sum(smaller) / 7).detach())
    for name, value in agent.named_parameters():
        if name.startswith("critic_target."):
            p[name] = 0.995 * p[name] + 0.005 * p[name.replace("_target", "")]
            assert not value.requires_grad
        torch.testing.assert_close(value.grad, grads.get(name), rtol=1e-6, atol=1e-10, msg=name)
        torch.testing.assert_close(value.detach(), p[name].detach(), rtol=1e-7, atol=1e-7, msg=name)


def test_sac_and_replay_stay_on_the_device():
    family = dc.FAMILIES["cheetah-vel"]
    agent = to_meta(dc.SAC(family, 1, SimpleNamespace(width=8, lr=1e-3)))
    replay = dc.Replay(family, 9, torch.device("meta"))
    replay.count = 5
    with OnDevice():
        obs, act, outcome, next_obs, term, task_ids = replay.sample(16)
        params = torch.zeros(40, 1, device="meta")[task_ids]
        losses = agent.update(obs, act, family.training_reward(outcome, act, params), next_obs, term, params)
    assert all(loss.shape == () and loss.device.type == "meta" for loss in losses)


# ---- train_behavior ---------------------------------------------------------


class Telling(dc.Point):
    """A family whose transitions tell where they come from. State: number of the episode, step, task parameter of the
    step. Reward: 100 times the parameter of the task that was acted in + that of the task the reward is for. Every
    fourth episode terminates after three steps, every other fourth is stuck from its beginning."""

    obs_dim = outcome_dim = 3
    horizon, param_scale, episodes = 6, 10.0, 0

    def reset(self, rng, params):
        count = len(params)
        self.episodes += count
        return np.stack([self.episodes - count + 1.0 + np.arange(count), *np.zeros((2, count))], 1)

    def step(self, state, act, params):
        return np.stack([state[:, 0], state[:, 1] + 1, params[:, 0]], 1)

    def reward(self, outcome, act, params):
        return 100 * outcome[..., 2] + params[..., 0]

    def training_reward(self, outcome, act, params):
        return self.reward(outcome, act, params) + 0.5

    def terminated(self, state):
        return (state[:, 0] % 4 == 0) & (state[:, 1] == 3)

    def stuck(self, state):
        return state[:, 0] % 4 == 1


def train(family, task_ids=range(4), **settings):
    """train_behavior -> snapshots, saved states."""
    settings, states = {"total_updates": 40, "rows": 8, "width": 8, "batch_size": 16} | settings, []
    params = np.arange(1.0, 7.0)[:, None] if isinstance(family, Telling) else family.draw()[0]
    inputs = family, params, np.array(task_ids), dc.Args(**settings), torch.device("cpu"), None, states.append
    return dc.train_behavior(*inputs, SimpleNamespace(received=None), "this task"), states


@pytest.fixture
def updates(monkeypatch):
    """Of every update of a training: its batch, the actor's parameters after it."""
    events, update = [], dc.SAC.update

    def spy(agent, *batch):
        result = update(agent, *batch)
        after = {name: value.clone() for name, value in agent.actor.state_dict().items()}
        events.append(([x.clone().numpy() for x in batch], after))
        return result

    monkeypatch.setattr(dc.SAC, "update", spy)
    return events


def uniform(hits, over):
    """Whether each of the numbers `over` is hit about equally often, and nothing else."""
    counts = np.array([hits.count(i) for i in over])
    return counts.sum() == len(hits) > 400 and abs(counts / len(hits) - 1 / len(over)).max() < 0.08


@pytest.mark.parametrize("dynamics_vary", [False, True])
def test_every_batch_has_consistent_transitions_and_rewards(dynamics_vary, updates):
    task_ids = [1, 3, 4]
    family, tasks, taught = Telling(), {}, {task + 1: [] for task in task_ids}
    family.dynamics_vary = dynamics_vary
    train(family, task_ids, total_updates=200, rows=64, updates_per_step=3)
    for (obs, act, rew, next_obs, term, task), _ in updates:
        for i, (episode, step, _) in enumerate(obs):
            own, told = next_obs[i, 2], task[i, 0] * 10
            assert tasks.setdefault(episode, own) == own  # a row changes its task only with its episode
            assert next_obs[i].tolist() == [episode, step + 1, own] and abs(act[i]).max() <= 1
            assert term[i] == (episode % 4 == 0 and step == 2)
            assert rew[i] == pytest.approx(100 * own + told + 0.5, abs=1e-3)  # for the task that the policy is told
            if dynamics_vary or i < 8:  # the first half of a batch keeps its task
                assert told == pytest.approx(own)
            else:
                taught[own].append(round(told))
    assert uniform(list(tasks.values()), [i + 1 for i in task_ids])
    assert dynamics_vary or all(uniform(told, [i + 1 for i in task_ids]) for told in taught.values())


@pytest.mark.parametrize("total_updates, updates_per_step", [(40, 2), (7, 3), (1, 1)])
def test_twenty_snapshots_lie_evenly_over_training(total_updates, updates_per_step, updates):
    settings = {"total_updates": total_updates, "updates_per_step": updates_per_step}
    snapshots, _ = train(dc.FAMILIES["point-robot"], **settings)
    assert len(snapshots) == 20 and len(updates) == total_updates
    checked = sorted({*range(updates_per_step, total_updates, updates_per_step), total_updates})
    for k, snapshot in enumerate(snapshots, 1):  # the first time that k twentieths are done
        _, expected = updates[next(s for s in checked if s * 20 >= k * total_updates) - 1]
        assert set(snapshot) == set(expected) and all(torch.equal(snapshot[name], expected[name]) for name in expected)


def test_diverged_transitions_stay_out_of_the_replay(monkeypatch):
    calls = diverging(monkeypatch, [2, 5], 9)
    _, states = train(Telling())
    assert calls == [8] * len(calls)  # the rows were reset and went on
    obs, _, _, next_obs, _ = states[-1]["replay_rows"].split([3, 2, 3, 3, 1], 1)
    assert len(obs) == sum(calls) - 2 and torch.equal(next_obs[:, 1], obs[:, 1] + 1)  # a void step stands still


def test_exploding_training_names_lr():
    message = stop_message(lambda: train(dc.FAMILIES["point-robot"], lr=1e30))
    assert "--lr" in message and "this task" in message


def test_behavior_policies_learn(tiny):
    """200 updates; with the sign of the actor's loss or of the rewards turned around they end near -31."""
    assert tiny.random_returns.mean() < -20 and tiny.expert_returns.mean() > -9  # seen: -20.6 and -8.4
    assert (tiny.expert_returns > tiny.random_returns + 8).all()

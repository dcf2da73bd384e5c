"""Task families, TaskEnv, rollout and the behavior policies of data_collect.py against independent computations."""

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
MUJOCO = [name for name, family in dc.FAMILIES.items() if isinstance(family, dc.Mujoco)]
RAND_PARAMS = ["hopper-rand-params", "walker-rand-params"]


def make_env(name, task_ids):
    family = dc.FAMILIES[name]
    return dc.TaskEnv(family, family.draw()[0], task_ids)


def random_actions(env, steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, *env.action_space.shape)).astype(np.float32)


def play(env, actions):
    """-> observations [steps, B, O], rewards [steps, B]."""
    results = [env.step(act)[:2] for act in actions]
    return np.stack([obs for obs, _ in results]), np.stack([rew for _, rew in results])


# ---- families ---------------------------------------------------------------

# obs_dim, act_dim, horizon, (training tasks, test tasks), gamma of SAC, its updates and width
POINT, BODY = (0.9, 1_500, 64), (0.99, 120_000, 256)
SIZES = {
    "point-robot": (2, 2, 20, (30, 10), *POINT),
    "sparse-point-robot": (2, 2, 20, (80, 20), *POINT),
    "point-robot-wind": (2, 2, 25, (40, 10), *POINT),
    "cheetah-vel": (20, 6, 200, (20, 20), *BODY),
    "cheetah-dir": (20, 6, 200, (2, 2), *BODY),
    "ant-dir": (27, 8, 200, (20, 20), *BODY),
    "ant-dir-full": (27, 8, 200, (20, 20), *BODY),
    "ant-goal": (29, 8, 200, (30, 10), *BODY),
    "hopper-rand-params": (12, 3, 200, (20, 20), *BODY),
    "walker-rand-params": (18, 6, 200, (20, 20), *BODY),
}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_the_family(name):
    f = dc.FAMILIES[name]
    assert (f.obs_dim, f.act_dim, f.horizon, f.counts, f.gamma, f.sac_total_updates, f.sac_width) == SIZES[name]
    assert f.dynamics_vary == (name in ("point-robot-wind", *RAND_PARAMS))
    assert 0.9 < abs(f.draw()[0] / f.param_scale).max() <= 1  # what the task-conditioned SAC sees


@pytest.mark.parametrize("counts", [(30, 10), (10, 4), (5, 3), (20, 20), (3, 1)])
def test_interleaved_split_has_the_sizes_asked_for(counts):
    family = dc.Family()
    family.counts = counts
    _, train, test = family.split_interleaved(np.zeros((sum(counts), 1)))
    assert (len(train), len(test)) == counts and sorted([*train, *test]) == list(range(sum(counts)))


def test_corros_seeds_draw_directions_and_speeds():
    angles = np.arctan2(*dc.FAMILIES["ant-dir"].draw()[0].T[::-1]) % (2 * np.pi)
    np.testing.assert_allclose(angles[[0, 1, 2, 39]], [2.62, 2.739, 3.461, 2.562], atol=5e-4)
    np.testing.assert_allclose(np.hypot(*dc.FAMILIES["ant-dir"].draw()[0].T), 1, rtol=1e-15)
    assert np.array_equal(dc.FAMILIES["ant-dir-full"].draw()[0], dc.FAMILIES["ant-dir"].draw()[0])
    speeds = dc.FAMILIES["cheetah-vel"].draw()[0][:, 0]
    np.testing.assert_allclose(speeds[:3], [1.251, 1.308, 1.652], atol=5e-4)
    assert speeds.min() >= 0 and 2.5 < speeds.max() <= 3


@pytest.mark.parametrize("name, size", [("hopper-rand-params", 41), ("walker-rand-params", 32)])
def test_corros_seeds_draw_physical_parameters(name, size):
    params, _, _ = dc.FAMILIES[name].draw()
    np.testing.assert_allclose(params[:3, 0], [-2.1938, 2.7362, -1.5722], atol=5e-5)
    for seed, row in enumerate(params, 1):
        generator = random.Random(seed)
        assert row.tolist() == [generator.uniform(-3, 3) for _ in range(size)]  # not rounded anywhere


@pytest.mark.parametrize(
    "name, radius, step",
    [("point-robot", 1, math.pi / 39), ("sparse-point-robot", 1, math.pi / 99), ("ant-goal", 2, math.pi / 20)],
)
def test_goals_lie_evenly_on_the_circle(name, radius, step):
    params, _, _ = dc.FAMILIES[name].draw()
    goals = [[radius * math.cos(step * i), radius * math.sin(step * i)] for i in range(len(params))]
    np.testing.assert_allclose(params, goals, atol=1e-14)


def test_wind_is_drawn_all_x_before_all_y():
    params, _, _ = dc.FAMILIES["point-robot-wind"].draw()
    draws = np.random.RandomState(1337).uniform(-0.05, 0.05, 100)
    assert params[:, 0].tolist() == draws[:50].tolist() and params[:, 1].tolist() == draws[50:].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_distance_of_any_two_tasks(name):
    params, _, _ = dc.FAMILIES[name].draw()
    expected = [[task_distance(name, one, two) for two in params] for one in params]
    np.testing.assert_allclose(dc.FAMILIES[name].distance(params[:, None], params), expected, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_tasks_are_split_as_the_family_says_and_always_alike(name):
    numpy_before, python_before = np.random.get_state(), random.getstate()
    first, again = dc.FAMILIES[name].draw(), dc.FAMILIES[name].draw()
    assert random.getstate() == python_before
    assert np.array_equal(np.random.get_state()[1], numpy_before[1]) and np.random.get_state()[2] == numpy_before[2]
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(first, again))
    params, train_ids, test_ids = first
    assert params.dtype == np.float64 and len(np.unique(params, axis=0)) == len(params)
    train, test = SIZES[name][3]
    expected = list(range(train)), list(range(train, train + test))
    if name == "cheetah-dir":
        assert params.tolist() == [[1.0], [-1.0]]
        expected = [0, 1], [0, 1]
    if name in ("point-robot", "ant-goal"):  # every fourth is a test task
        expected = [i for i in range(40) if i % 4 != 2], [2, 6, 10, 14, 18, 22, 26, 30, 34, 38]
    if name == "sparse-point-robot":
        order = np.random.RandomState(1337).permutation(100)
        expected = sorted(order[:80]), sorted(order[80:])
    assert (train_ids.tolist(), test_ids.tolist()) == expected and len(params) == len({*train_ids, *test_ids})


def plain_reward(name, outcome, act, params):
    """The reward of one transition in Python floats, as the papers' code writes it."""
    effort = sum(a * a for a in act)
    return {
        "point-robot": lambda: -math.dist(outcome, params),
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


@pytest.mark.parametrize("name", NAMES)
def test_reward_equals_its_formula_in_numpy_and_torch(name):
    family, rng = dc.FAMILIES[name], np.random.default_rng(0)
    params = family.draw()[0]
    task_params = params[rng.integers(len(params), size=200)]
    outcome = rng.normal(0, 1.5, (200, family.outcome_dim))
    if name == "sparse-point-robot":
        outcome = task_params + rng.normal(0, 0.12, (200, 2))
    act = rng.uniform(-1, 1, (200, family.act_dim))
    expected = [plain_reward(name, *row) for row in zip(outcome.tolist(), act.tolist(), task_params.tolist())]
    assert np.std(expected) > 0.1
    rew = family.reward(outcome, act, task_params)
    assert rew.shape == (200,)
    np.testing.assert_allclose(rew, expected, atol=1e-12)
    tensors = [torch.as_tensor(x) for x in (outcome, act, task_params)]
    np.testing.assert_allclose(family.reward(*[x.float() for x in tensors]).numpy(), expected, atol=1e-5)
    if name == "sparse-point-robot":  # its behavior policies are trained on the dense reward
        expected = [plain_reward("point-robot", *row) for row in zip(outcome, act, task_params)]
    np.testing.assert_allclose(family.training_reward(*tensors).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_only_a_sunken_walker_terminates_and_only_ants_are_ever_stuck(name):
    family = dc.FAMILIES[name]
    state = family.reset(np.random.default_rng(0), np.repeat(family.draw()[0][:1], 4, 0))
    if name in MUJOCO:
        state[:, 2] = [0.5, 0.49, 0.51, -3.0]
    expected = [True, True, False, True] if name == "walker-rand-params" else [False] * 4
    assert family.terminated(state).tolist() == expected
    state = np.full_like(state, 3.0)
    assert family.stuck(state).tolist() == [name.startswith("ant")] * 4


def test_ant_is_stuck_when_its_torso_points_down():
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
    """The model of task number `task`, loaded and randomized without data_collect."""
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
    steps = 0
    for wild in random_actions(env, 50) * (0.2 if name == "walker-rand-params" else 1.3):
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
        steps += 1
        if terminated[0]:
            break
    assert steps > 20
    env.close()


@pytest.mark.parametrize("name", BODIES)
def test_reset_draws_around_the_models_pose(name):
    """gymnasium's noise: hopper and walker uniform within 0.005; the others' positions uniform within 0.1 and
    velocities normal with deviation 0.1."""
    state = dc.FAMILIES[name].reset(np.random.default_rng(0), np.zeros((5000, 1)))
    model = plain_model(name, 0)
    offset, qvel = state[:, 1 : 1 + model.nq] - model.qpos0, state[:, 1 + model.nq :]
    limit = 0.005 if name in RAND_PARAMS else 0.1
    for noise in (offset, qvel) if name in RAND_PARAMS else (offset,):
        assert 0.99 * limit < abs(noise).max() <= limit and abs(noise.mean(0)).max() < 0.05 * limit
        np.testing.assert_allclose(noise.std(0), limit / math.sqrt(3), rtol=0.05)
    if name not in RAND_PARAMS:
        np.testing.assert_allclose(qvel.std(0), 0.1, rtol=0.05)
        assert abs(qvel).max() > 0.3 and abs(qvel.mean(0)).max() < 0.01
    assert not state[:, 0].any()


@pytest.mark.parametrize("name", RAND_PARAMS)
def test_models_multiply_the_original_by_powers_and_leave_it_alone(name):
    family = dc.FAMILIES[name]
    fields = ["body_mass", "body_inertia", "dof_damping", "geom_friction", "actuator_gear", "dof_armature"]
    fields += ["dof_invweight0", "body_invweight0"]  # stale on purpose: mj_setConst is not called
    original = {field: getattr(family.model, field).copy() for field in fields}
    params, _, _ = family.draw()
    family.models(params)  # must not act on the models of the next call
    for task, model in enumerate(family.models(params[:5])):
        expected = plain_model(name, task)
        for field in fields:
            np.testing.assert_allclose(getattr(model, field), getattr(expected, field), rtol=1e-14, err_msg=field)
            assert np.array_equal(getattr(model, field), original[field]) == (field not in VARIED[name]), field
    for field in fields:
        assert np.array_equal(getattr(family.model, field), original[field]), field


# ---- TaskEnv ----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_spaces_hold_what_reset_and_step_return(name):
    env = make_env(name, [0, 1, 1])
    obs, info = env.reset(seed=0)
    assert obs in env.observation_space and obs[0] in env.single_observation_space and info == {}
    assert env.metadata["autoreset_mode"] is gym.vector.AutoresetMode.DISABLED
    assert env.single_action_space == gym.spaces.Box(-1.0, 1.0, (env.family.act_dim,), np.float32)
    env.action_space.seed(0)
    obs, rew, terminated, truncated, info = env.step(env.action_space.sample())
    assert obs in env.observation_space and obs.dtype == np.float32 and obs.shape == (3, env.family.obs_dim)
    assert rew.shape == terminated.shape == truncated.shape == info["diverged"].shape == (3,)
    assert terminated.dtype == truncated.dtype == info["diverged"].dtype == bool and rew.dtype == np.float64
    assert info["outcome"].shape == (3, env.family.outcome_dim)
    env.close()


def test_point_moves_by_a_tenth_of_the_clipped_action_plus_wind():
    env = make_env("point-robot-wind", [0, 7])
    assert not env.reset(seed=0)[0].any()
    obs, rew, _, _, info = env.step(np.array([[5.0, -0.5], [0.25, -9.0]]))
    expected = np.array([[0.1, -0.05], [0.025, -0.1]]) + env.params[[0, 7]]
    np.testing.assert_allclose(env.state, expected, atol=1e-15)
    np.testing.assert_allclose(obs, expected, atol=1e-7)
    np.testing.assert_allclose(rew, -np.hypot(expected[:, 0] - 1, expected[:, 1]), atol=1e-12)
    env.reset()  # leaves alone what the step returned
    np.testing.assert_allclose(info["outcome"], expected, atol=1e-15)


def test_int_seed_gives_row_i_the_seed_plus_i():
    env = make_env("ant-dir", [0, 1, 2])
    first, _ = env.reset(seed=5)
    assert np.array_equal(env.reset(seed=[5, 6, 7])[0], first) and len(np.unique(first, axis=0)) == 3
    assert np.array_equal(env.reset(seed=6)[0][:2], first[1:])
    env.reset(seed=5)
    later = [env.reset()[0] for _ in range(2)]
    env.reset(seed=5)
    assert env.np_random_seed == 5  # gymnasium draws a new generator where reset did not store the seed
    assert np.array_equal(env.reset()[0], later[0]) and not np.array_equal(*later)


def test_reset_mask_resets_and_rebinds_only_its_rows():
    env, reference = make_env("ant-goal", [0, 1, 2]), make_env("ant-goal", [0, 1, 2])
    actions = random_actions(env, 20)
    env.reset(seed=0), reference.reset(seed=0)
    play(env, actions[:10])
    after, _ = env.reset(seed=7, options={"reset_mask": np.array([False, True, False]), "task_ids": [9, 9, 9]})
    assert env.task_ids.tolist() == [0, 9, 2] and env.steps.tolist() == [10, 0, 10]
    assert np.array_equal(after[1], make_env("ant-goal", [9]).reset(seed=[8])[0][0])
    got, expected = play(env, actions[10:]), play(reference, actions)
    for mine, full in zip(got, expected):
        assert np.array_equal(mine[:, [0, 2]], full[10:, [0, 2]]) and not np.array_equal(mine[:, 1], full[10:, 1])
    effort = 0.1 * (actions[10:, 1].astype(np.float64) ** 2).sum(1)
    distance = abs(got[0][:, 1, :2] - env.params[9]).sum(1)
    np.testing.assert_allclose(got[1][:, 1], -distance - effort, atol=1e-5)
    env.close(), reference.close()


def test_bad_masks_and_wrong_numbers_of_seeds_or_actions_are_refused():
    env = make_env("point-robot", [0, 1])
    for mask in ([True, False], np.ones(3, bool), np.ones(2), np.zeros(2, bool)):
        with pytest.raises(ValueError, match="reset_mask"):
            env.reset(options={"reset_mask": mask})
    with pytest.raises(ValueError, match="3 seeds for 2 rows"):
        env.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="shape"):
        env.step(np.zeros((3, 2)))


@pytest.mark.parametrize("name", ["point-robot-wind", "cheetah-vel"])
def test_time_limit_truncates_once_and_then_the_rows_stand_still(name):
    env = make_env(name, [0, 1])
    env.reset(seed=0)
    for t, act in enumerate(random_actions(env, env.family.horizon), 1):
        obs, rew, terminated, truncated, _ = env.step(act)
        assert not terminated.any() and truncated.tolist() == [t == env.family.horizon] * 2
        assert (rew != 0).all()
    state = env.state.copy()
    for act in random_actions(env, 3):
        still, rew, terminated, truncated, _ = env.step(act)
        assert np.array_equal(still, obs) and np.array_equal(env.state, state)
        assert not rew.any() and not terminated.any() and not truncated.any()
    env.reset(options={"reset_mask": np.array([False, True])})  # wakes its row alone
    _, rew, *_ = env.step(act)
    assert (rew != 0).tolist() == [False, True] and np.array_equal(env.state[0], state[0])
    if name == "point-robot-wind":
        np.testing.assert_allclose(env.state[1], 0.1 * act[1] + env.params[1], rtol=1e-5)
    env.close()


@pytest.mark.parametrize("steps", [0, 199])
def test_fallen_walker_terminates_while_the_others_go_on(steps):
    env = make_env("walker-rand-params", [0, 1, 2])
    env.reset(seed=0)
    env.state[1, 2:4] = 0.51, np.pi / 2  # height and pitch: lies flat above the ground and falls
    env.state[1, 1 + env.family.model.nq + 1] = -2.0
    env.steps[:2] = steps  # a fall in the last step is no time-out
    obs, rew, terminated, truncated, _ = env.step(np.zeros((3, 6)))
    assert terminated.tolist() == [False, True, False] and truncated.tolist() == [steps == 199, False, False]
    assert (rew != 0).all()
    fallen, before = obs[1], env.steps.copy()
    obs, rew, terminated, _, _ = env.step(np.ones((3, 6)))
    assert np.array_equal(obs[1], fallen) and rew[1] == 0 and not terminated.any()
    assert (rew != 0).tolist() == [steps == 0, False, True] and (env.steps - before).tolist() == [steps == 0, 0, 1]
    env.close()


@pytest.mark.parametrize("name", ["ant-dir", "walker-rand-params"])
def test_row_does_not_depend_on_its_neighbors(name):
    env = make_env(name, [3, 1, 2, 5])
    env.reset(seed=10)
    actions = random_actions(env, 15)
    obs, rew = play(env, actions)
    for row, task in enumerate([3, 1, 2, 5]):
        single = make_env(name, [task])
        single.reset(seed=10 + row)
        single_obs, single_rew = play(single, actions[:, row : row + 1])
        assert np.array_equal(single_obs[:, 0], obs[:, row]) and np.array_equal(single_rew[:, 0], rew[:, row])
        single.close()
    env.close()


def test_number_of_threads_does_not_change_the_result():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            env = make_env("hopper-rand-params", range(9))
        finally:
            torch.set_num_threads(1)
        assert len(env.scratch) == threads
        env.reset(seed=0)
        results.append(play(env, random_actions(env, 30)))
        env.close()
    for one, two in zip(*results):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)


def test_diverged_row_keeps_its_state_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warning into a log file
    env, reference = make_env("hopper-rand-params", [0, 1, 2]), make_env("hopper-rand-params", [0, 1, 2])
    env.reset(seed=0), reference.reset(seed=0)
    env.state[1, 1 + env.family.model.nq :] = 1e9
    broken = env.state[1].copy()
    actions = random_actions(env, 3)
    for t, act in enumerate(actions):
        obs, rew, terminated, truncated, info = env.step(act)
        expected_obs, expected_rew, *_ = reference.step(act)
        assert info["diverged"].tolist() == [False, t == 0, False]
        assert np.array_equal(env.state[1], broken) and rew[1] == 0
        assert not terminated.any() and not truncated.any()
        assert np.array_equal(obs[[0, 2]], expected_obs[[0, 2]]) and np.array_equal(rew[[0, 2]], expected_rew[[0, 2]])
    assert env.live.tolist() == [True, False, True] and env.steps.tolist() == [3, 0, 3]
    env.reset(options={"reset_mask": np.array([False, True, False])})
    _, rew, _, _, info = env.step(actions[0])
    assert rew[1] != 0 and not info["diverged"].any()
    env.close(), reference.close()


@pytest.mark.parametrize("name", ["point-robot-wind", "ant-dir", "walker-rand-params"])
def test_saved_state_continues_bit_for_bit(name, tmp_path):
    env = make_env(name, [0, 1, 2])
    env.reset(seed=0)
    actions = random_actions(env, 12)
    play(env, actions[:5])
    saved = env.get_state()

    def go_on(env):
        first = play(env, actions[5:9])
        start, _ = env.reset(options={"reset_mask": np.array([True, False, True]), "task_ids": [4, 4, 5]})
        return [*first, start, *play(env, actions[9:]), env.task_ids, env.steps]

    expected = go_on(env)
    torch.save(saved, tmp_path / "state.pt")  # only now: it shares no memory with an env that goes on
    other = make_env(name, [9, 9, 9])
    other.set_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for a, b in zip(go_on(other), expected):
        assert np.array_equal(a, b)
    env.close(), other.close()


# ---- rollout and transitions ------------------------------------------------


def test_rollout_records_what_happened():
    env = make_env("point-robot", [0, 20])
    seen = []

    def policy(obs, rew):
        seen.append((obs.clone(), rew.clone()))
        return torch.tensor([[0.5, 3.0], [-0.25, 0.0]])  # 3 lies outside of the action space

    done = dc.rollout(env, policy, [0, 1])
    assert done["observations"].shape == (2, 21, 2) and done["actions"].shape == (2, 20, 2)
    assert done["lengths"].tolist() == [20, 20] and not done["terminated"].any() and not done["diverged"].any()
    assert (done["actions"] == np.array([[0.5, 1.0], [-0.25, 0.0]], np.float32)[:, None]).all()
    steps = np.arange(21)[:, None] * np.array([[[0.05, 0.1]], [[-0.025, 0.0]]])
    np.testing.assert_allclose(done["observations"], steps, atol=1e-6)
    goals = env.params[[0, 20]][:, None]
    distance = np.sqrt(((done["observations"][:, 1:] - goals) ** 2).sum(-1))
    np.testing.assert_allclose(done["rewards"], -distance, atol=1e-6)
    for t, (obs, rew) in enumerate(seen):  # the policy sees the observation and the previous reward
        assert np.array_equal(obs.numpy(), done["observations"][:, t])
        assert np.array_equal(rew.numpy(), done["rewards"][:, t - 1] if t else np.zeros(2, np.float32))
    assert {done[key].dtype for key in ("observations", "actions", "rewards")} == {np.dtype(np.float32)}


def test_rollout_of_walkers_is_zero_after_each_end():
    env = make_env("walker-rand-params", [0, 1, 2, 3, 4, 5])
    generator = torch.Generator().manual_seed(0)
    done = dc.rollout(env, lambda obs, rew: torch.rand(6, 6, generator=generator) * 2 - 1, [5, 3, 0, 1, 2, 9])
    assert np.array_equal(done["observations"][:, 0], env.reset(seed=[5, 3, 0, 1, 2, 9])[0])
    env.close()
    lengths = done["lengths"]
    assert len(set(lengths.tolist())) > 2 and lengths.min() > 1 and done["terminated"].any()
    for row, length in enumerate(lengths):
        height = done["observations"][row, : length + 1, 1]
        assert (height[:-1] > 0.5).all() and (height[-1] <= 0.5) == done["terminated"][row]
        assert done["terminated"][row] or length == 200
        assert (done["rewards"][row, :length] != 0).all() and abs(done["actions"][row, :length]).min() > 0
        for key, start in (("observations", length + 1), ("actions", length), ("rewards", length)):
            assert not done[key][row, start:].any()


def diverging(monkeypatch, rows, call):
    """Make these rows of every env diverge in the call-th step -> list: live rows of each step."""
    original, calls = dc.TaskEnv._simulate, []

    def simulate(env, state, act, live):
        next_state, diverged = original(env, state, act, live)
        calls.append(len(state))
        diverged[rows] = len(calls) == call
        return np.where(diverged[:, None], state, next_state), diverged

    monkeypatch.setattr(dc.TaskEnv, "_simulate", simulate)
    return calls


def test_rollout_reports_a_diverged_row_and_drops_its_void_step(monkeypatch):
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


def slow_policy(p, obs, task, noise, prefix="actor.net"):
    """-> act, log-probability of one row, given its standard normal draw."""
    mean, raw = slow_mlp(p, prefix, torch.cat([obs, task])).chunk(2)
    std = (-1.5 + 3.5 * raw.tanh()).exp()
    act = (mean + std * noise).tanh()
    density = (-(noise**2) / 2).exp() / (std * math.sqrt(2 * math.pi)) / (1 - act**2)
    return act, density.log().sum()


class SlowSAC:
    """The same update row by row in float64, with Adam written out."""

    def __init__(self, agent, gamma, target_entropy, lr):
        self.p = {name: value.detach().clone().requires_grad_() for name, value in agent.state_dict().items()}
        self.gamma, self.target_entropy, self.lr = gamma, target_entropy, lr
        self.grads, self.moments, self.updates = {}, {}, 0

    def q(self, net, obs, task, act):
        return slow_mlp(self.p, net, torch.cat([obs, task, act]))[0]

    def descend(self, loss, part):
        names = [name for name in self.p if name.startswith(part)]
        for name, g in zip(names, torch.autograd.grad(loss, [self.p[name] for name in names])):
            m, v = self.moments.get(name, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            step = m / (1 - 0.9**self.updates) / ((v / (1 - 0.999**self.updates)).sqrt() + 1e-8)
            self.grads[name], self.moments[name] = g, (m, v)
            self.p[name] = (self.p[name] - self.lr * step).detach().requires_grad_()

    def update(self, obs, act, rew, next_obs, term, task):
        """-> critic loss, mean of the smaller twin, which twin was smaller per row."""
        self.updates += 1
        noise, alpha = pattern(act.shape), self.p["log_temperature"].detach().exp()
        losses, twins, logps = [], [], []
        for i in range(len(obs)):
            next_act, next_logp = slow_policy(self.p, next_obs[i], task[i], noise[i])
            q1, q2 = (self.q(f"critic_target.{k}", next_obs[i], task[i], next_act) for k in (0, 1))
            soft = (q1 + q2) / 2 - alpha * next_logp
            target = (rew[i] if term[i] else rew[i] + self.gamma * soft).detach()
            losses += [(self.q(f"critic.{k}", obs[i], task[i], act[i]) - target) ** 2 for k in (0, 1)]
        critic_loss = sum(losses) / len(obs)
        self.descend(critic_loss, "critic.")
        for i in range(len(obs)):
            pi_act, logp = slow_policy(self.p, obs[i], task[i], noise[i])
            twins.append([self.q(f"critic.{k}", obs[i], task[i], pi_act) for k in (0, 1)])
            logps.append(logp)
        actor_loss = sum(alpha * logp - min(pair) for logp, pair in zip(logps, twins)) / len(obs)
        self.descend(actor_loss, "actor.")
        entropy = -sum(logps).detach() / len(obs)
        self.descend(self.p["log_temperature"] * (entropy - self.target_entropy), "log_temperature")
        for name in self.p:
            if name.startswith("critic_target."):
                online = self.p[name.replace("critic_target", "critic")]
                self.p[name] = (0.995 * self.p[name] + 0.005 * online).detach()
        return critic_loss, sum(min(pair) for pair in twins) / len(obs), [a < b for a, b in twins]


def numbers(*shape, seed):
    """Reproducible normal numbers that `known_noise` does not touch."""
    return torch.as_tensor(np.random.default_rng(seed).normal(size=shape))


def test_sac_update_is_that_of_the_equations(known_noise):
    torch.manual_seed(0)
    family = SimpleNamespace(obs_dim=3, act_dim=2, gamma=0.8)
    agent = dc.SAC(family, 2, SimpleNamespace(width=6, lr=3e-3)).double()
    assert agent.log_temperature.item() == pytest.approx(math.log(0.1))
    assert all(torch.equal(a, b) for a, b in zip(agent.critic.parameters(), agent.critic_target.parameters()))
    with torch.no_grad():
        agent.log_temperature.fill_(math.log(0.4))
        for i, value in enumerate(agent.parameters()):  # targets that differ, no bias 0, no weight of a norm 1
            value += 0.3 * numbers(*value.shape, seed=i + 100)
    slow, smaller = SlowSAC(agent, gamma=0.8, target_entropy=-2.0, lr=3e-3), []
    for update in range(3):
        batch = [numbers(7, 3, seed=update), numbers(7, 2, seed=update + 10).tanh(), 2 * numbers(7, seed=update + 20)]
        batch += [numbers(7, 3, seed=update + 30), torch.tensor([0.0, 1, 0, 0, 1, 0, 0]).double()]
        batch.append(numbers(7, 2, seed=update + 40))
        critic_loss, q_mean = agent.update(*batch)
        expected_loss, expected_q, first = slow.update(*batch)
        smaller += first
        torch.testing.assert_close(critic_loss, expected_loss.detach())
        torch.testing.assert_close(q_mean, expected_q.detach())
        graph = [critic_loss, q_mean, *agent.critic_target.parameters()]  # one that grows with each update
        assert not any(x.requires_grad for x in graph)
        for name, value in agent.named_parameters():
            torch.testing.assert_close(value.grad, slow.grads.get(name), rtol=1e-6, atol=1e-10, msg=name)
            torch.testing.assert_close(value.detach(), slow.p[name].detach(), rtol=1e-7, atol=1e-9, msg=name)
    assert 0 < sum(smaller) < len(smaller)  # either twin was the smaller one somewhere


def test_mode_is_the_mean_and_the_log_probability_finite_far_out(known_noise):
    actor = dc.BehaviorActor(3, 2, 1, 8)
    obs, task = numbers(9, 3, seed=0).float(), numbers(9, 1, seed=1).float()
    for row, mode in enumerate(actor.mode(obs, task)):
        expected, _ = slow_policy(actor.state_dict(), obs[row], task[row], torch.zeros(2), "net")
        torch.testing.assert_close(mode, expected)
    with torch.no_grad():
        actor.net[-1].bias += 20  # there 1 - tanh^2 is 0 in float32
    assert actor(obs, task)[1].isfinite().all()


def test_replay_samples_every_transition_added_so_far_and_no_other():
    replay = dc.Replay(SimpleNamespace(obs_dim=1, act_dim=2, outcome_dim=1), 9, torch.device("cpu"))
    for start in (0, 3):
        new = np.arange(start, start + 3.0) + 1
        replay.add(new[:, None], np.stack([new, -new], 1), 10 * new[:, None], 100 * new[:, None], new == 2, new - 1)
        obs, act, outcome, next_obs, term, task_ids = replay.sample(200)
        assert obs.unique().tolist() == [1 + i for i in range(start + 3)] and obs.shape == (200, 1)
        for got, factor in ((act[:, :1], 1), (act[:, 1:], -1), (outcome, 10), (next_obs, 100)):
            assert torch.equal(got, factor * obs)
        assert torch.equal(term == 1, obs[:, 0] == 2) and torch.equal(task_ids, obs[:, 0].long() - 1)


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
    horizon, param_scale = 6, 10.0

    def __init__(self, dynamics_vary):
        self.dynamics_vary, self.episodes = dynamics_vary, 0

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


def train(family, task_ids=range(4), saved=None, stopping=(), params=None, **settings):
    """train_behavior -> snapshots or None, saved states."""
    settings = {"total_updates": 40, "rows": 8, "width": 8, "batch_size": 16} | settings
    states, params = [], family.draw()[0] if params is None else params
    inputs = family, params, np.array(task_ids), dc.Args(**settings), torch.device("cpu")
    return dc.train_behavior(*inputs, saved, states.append, stopping, "this task"), states


@pytest.fixture
def spied(monkeypatch):
    """Everything that a training does in order: ("step", task_ids, state, act, expected act of row 0, result of step)
    or ("update", batch, the actor's parameters after it)."""
    events, agents = [], []
    make, step, update = dc.SAC.__init__, dc.TaskEnv.step, dc.SAC.update

    def spy_make(agent, *inputs):
        make(agent, *inputs)
        agents.append(agent)

    def spy_step(env, act):
        p = {name: value.double() for name, value in agents[-1].state_dict().items()}
        obs = torch.as_tensor(env.family.observe(env.state)[0], dtype=torch.double)
        task = torch.as_tensor(env.params[env.task_ids[0]] / env.family.param_scale)
        policy = slow_policy(p, obs, task, pattern(act.shape)[0])[0].numpy()
        before = env.task_ids.copy(), env.state.copy(), act.copy(), policy
        events.append(("step", *before, result := step(env, act)))
        return result

    def spy_update(agent, *batch):
        result = update(agent, *batch)
        after = {name: value.clone() for name, value in agent.actor.state_dict().items()}
        events.append(("update", [x.clone().numpy() for x in batch], after))
        return result

    monkeypatch.setattr(dc.SAC, "__init__", spy_make)
    monkeypatch.setattr(dc.TaskEnv, "step", spy_step)
    monkeypatch.setattr(dc.SAC, "update", spy_update)
    return events


@pytest.mark.parametrize("dynamics_vary", [False, True])
@pytest.mark.parametrize("task_ids", [[1, 3, 4], [2]], ids=["shared", "per-task"])
def test_training_of_a_behavior_policy_step_by_step(dynamics_vary, task_ids, spied, known_noise):
    family = Telling(dynamics_vary)
    params = np.arange(1.0, 7.0)[:, None]  # of tasks 0 to 5
    _, states = train(family, task_ids, params=params, total_updates=200, rows=64, updates_per_step=3)
    # one episode of random actions in every row, then 3 updates after each step, 200 in all
    assert "".join(event[0][0] for event in spied) == "s" * 5 + 66 * "suuu" + "suu"

    recorded, returns, finished, restarts, stuck_steps, starts, changes = {}, {}, [], 0, 0, {}, []
    steps = [event[1:] for event in spied if event[0] == "step"]
    for t, (tasks, state, act, policy, (next_obs, rew, terminated, truncated, _)) in enumerate(steps):
        if t < family.horizon:
            assert abs(act).max() <= 1 and abs(act.mean()) < 0.2 and abs(act.std() - 1 / math.sqrt(3)) < 0.1
        else:
            np.testing.assert_allclose(act[0], policy, atol=1e-4)
        for row, (episode, step, _) in enumerate(state):
            if step == 0:
                starts[episode] = tasks[row]
            assert starts[episode] == tasks[row]  # a row changes its task only with its episode
            recorded[episode, step] = act[row], params[tasks[row], 0], terminated[row]
            returns[episode] = returns.get(episode, 0.0) + rew[row]
            if terminated[row] or truncated[row]:
                finished.append(returns[episode])
            elif t + 1 < len(steps):
                again = steps[t + 1][1][row, 0] != episode
                assert not again or episode % 4 == 1  # only stuck rows start afresh early
                stuck_steps, restarts = stuck_steps + (episode % 4 == 1), restarts + again
            if t + 1 < len(steps) and steps[t + 1][1][row, 0] != episode:
                changes.append(steps[t + 1][0][row] != tasks[row])
            assert t + 1 == len(steps) or not (terminated | truncated)[row] or steps[t + 1][1][row, 1] == 0
    assert abs(restarts / stuck_steps - 0.05) < 0.015 and stuck_steps > 1000
    assert states[-1]["progress"]["returns"] == finished[-64:] and states[-1]["progress"]["diverged"] == 0
    assert np.mean(changes) == pytest.approx(1 - 1 / len(task_ids), abs=0.05)  # a task drawn anew for each episode
    counts = np.bincount(list(starts.values()), minlength=6)
    assert set(np.flatnonzero(counts)) == set(task_ids)
    assert abs(counts[task_ids] / counts.sum() - 1 / len(task_ids)).max() < 0.05

    taught = []
    for obs, act, rew, next_obs, term, task in [event[1] for event in spied if event[0] == "update"]:
        for i, (episode, step, _) in enumerate(obs):
            expected_act, own, expected_term = recorded[episode, step]
            assert next_obs[i].tolist() == [episode, step + 1, own]
            np.testing.assert_allclose(act[i], expected_act, atol=1e-7)
            assert term[i] == expected_term == (episode % 4 == 0 and step == 2)
            told = task[i, 0] * 10  # the task that the policy sees is the one that the reward is for
            assert rew[i] == pytest.approx(100 * own + told + 0.5, abs=1e-3)
            if dynamics_vary or i < 8:  # the first half of a batch keeps its task
                assert told == pytest.approx(own)
            else:
                taught.append((own, round(told)))
    if dynamics_vary:
        return
    for own in task_ids:  # the other half teaches any task, whichever it was recorded in
        hits = np.bincount([told for task, told in taught if task == params[own, 0]], minlength=7)
        assert set(np.flatnonzero(hits)) == {i + 1 for i in task_ids} and hits.sum() > 400
        assert abs(hits[params[task_ids, 0].astype(int)] / hits.sum() - 1 / len(task_ids)).max() < 0.08


@pytest.mark.parametrize("total_updates, updates_per_step", [(40, 2), (7, 3), (1, 1)])
def test_twenty_snapshots_lie_evenly_over_the_training(total_updates, updates_per_step, spied):
    settings = {"total_updates": total_updates, "updates_per_step": updates_per_step}
    snapshots, states = train(dc.FAMILIES["point-robot"], **settings)
    actors = [event[2] for event in spied if event[0] == "update"]
    assert len(snapshots) == 20 and len(actors) == total_updates
    checked = sorted({*range(updates_per_step, total_updates, updates_per_step), total_updates})
    for k, snapshot in enumerate(snapshots, 1):  # the first time that k twentieths are done
        expected = actors[next(s for s in checked if s * 20 >= k * total_updates) - 1]
        assert set(snapshot) == set(expected) and all(torch.equal(snapshot[name], expected[name]) for name in expected)
    assert states[-1]["progress"]["step"] == total_updates


def test_seed_and_task_decide_the_policy():
    family = dc.FAMILIES["point-robot"]
    first, again, other_seed, other_task = (
        train(family, tasks, seed=seed, total_updates=1, lr=1e-9)[0][-1]["net.0.weight"]  # as good as initial
        for tasks, seed in (([1], 0), ([1], 0), ([1], 1), ([2], 0))
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other_seed, atol=1e-6) and not torch.allclose(first, other_task, atol=1e-6)


@pytest.mark.parametrize("rows", [[2], range(8)], ids=["one row", "all rows"])
def test_diverged_transitions_stay_out_of_the_replay_and_their_rows_restart(rows, spied, monkeypatch):
    calls = diverging(monkeypatch, list(rows), 9)
    family = Telling(False)
    snapshots, states = train(family, params=np.arange(1.0, 7.0)[:, None])
    assert len(snapshots) == 20 and calls == [8] * len(calls)  # every row was reset and went on
    assert states[-1]["progress"]["diverged"] == len(rows)
    steps = [event[1:] for event in spied if event[0] == "step"]
    void = {tuple(steps[8][1][row, :2]) for row in rows}
    kept = {tuple(state[:2]) for step in steps for state in step[1]} - void
    assert {tuple(row[:2]) for row in states[-1]["replay_rows"].tolist()} == kept
    assert len(states[-1]["replay_rows"]) == len(kept) == sum(calls) - len(rows)
    assert all(steps[9][1][row, 1] == 0 for row in rows)


def test_exploding_training_ends_with_one_line_naming_lr():
    message = stop_message(lambda: train(dc.FAMILIES["point-robot"], lr=1e30))
    assert "--lr" in message and "this task" in message


def test_behavior_policies_learn_to_reach_their_goals(tiny):
    """200 updates; with the sign of the actor's loss or of the rewards turned around they end near -31."""
    assert tiny.random_returns.mean() < -20 and tiny.expert_returns.mean() > -9  # seen: -20.6 and -8.4
    assert (tiny.expert_returns > tiny.random_returns + 8).all()

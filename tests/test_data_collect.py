"""Task families, TaskEnv, rollout and evaluate of data_collect.py against independent computations."""

import itertools
import math
import random
import shutil
import warnings
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from conftest import TINY, stop_message
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import data_collect as dc

NAMES = list(dc.FAMILIES)
MUJOCO = [name for name, family in dc.FAMILIES.items() if isinstance(family, dc.Mujoco)]


def make_env(name, task_ids):
    family = dc.FAMILIES[name]
    return dc.TaskEnv(family, family.draw()[0], task_ids)


def random_actions(env, steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, *env.action_space.shape)).astype(np.float32)


def play(env, actions):
    """-> observations [steps, B, O], rewards [steps, B]."""
    results = [env.step(act)[:2] for act in actions]
    return np.stack([obs for obs, _ in results]), np.stack([rew for _, rew in results])


# ---- task parameters --------------------------------------------------------


def test_ant_directions_are_corros_seeds():
    params, _, _ = dc.FAMILIES["ant-dir"].draw()
    angles = np.arctan2(params[:, 1], params[:, 0]) % (2 * np.pi)
    np.testing.assert_allclose(angles[:3], [2.62, 2.739, 3.461], atol=5e-4)
    np.testing.assert_allclose(angles[39], 2.562, atol=5e-4)
    np.testing.assert_allclose(np.hypot(*params.T), 1, rtol=1e-15)


def test_cheetah_speeds_are_corros_seeds():
    params, _, _ = dc.FAMILIES["cheetah-vel"].draw()
    np.testing.assert_allclose(params[:3, 0], [1.251, 1.308, 1.652], atol=5e-4)
    assert params.min() >= 0 and params.max() <= 3


@pytest.mark.parametrize("name, size", [("hopper-rand-params", 41), ("walker-rand-params", 32)])
def test_physical_parameters_are_corros_seeds(name, size):
    params, _, _ = dc.FAMILIES[name].draw()
    assert params.shape == (40, size)
    np.testing.assert_allclose(params[:3, 0], [-2.1938, 2.7362, -1.5722], atol=5e-5)
    for seed, row in enumerate(params, 1):
        generator = random.Random(seed)
        assert row.tolist() == [generator.uniform(-3, 3) for _ in range(size)]  # not rounded anywhere


def test_cheetah_dir_trains_and_tests_on_the_same_two_tasks():
    params, train_ids, test_ids = dc.FAMILIES["cheetah-dir"].draw()
    assert params.tolist() == [[1.0], [-1.0]]
    assert train_ids.tolist() == test_ids.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["point-robot", "ant-goal"])
def test_interleaved_split_is_every_fourth_task(name):
    _, train_ids, test_ids = dc.FAMILIES[name].draw()
    assert test_ids.tolist() == [2, 6, 10, 14, 18, 22, 26, 30, 34, 38]
    assert train_ids.tolist() == [i for i in range(40) if i % 4 != 2]


@pytest.mark.parametrize(
    "name, train, test",
    [(name, 20, 20) for name in MUJOCO if name not in ("cheetah-dir", "ant-goal")] + [("point-robot-wind", 40, 10)],
)
def test_first_tasks_train_and_the_others_test(name, train, test):
    params, train_ids, test_ids = dc.FAMILIES[name].draw()
    assert train_ids.tolist() == list(range(train))
    assert test_ids.tolist() == list(range(train, train + test)) and len(params) == train + test


def test_sparse_goals_are_split_at_random_but_always_alike():
    params, train_ids, test_ids = dc.FAMILIES["sparse-point-robot"].draw()
    order = np.random.RandomState(1337).permutation(100)
    assert train_ids.tolist() == sorted(order[:80]) and test_ids.tolist() == sorted(order[80:])
    goals = [[math.cos(math.pi * i / 99), math.sin(math.pi * i / 99)] for i in range(100)]
    np.testing.assert_allclose(params, goals, atol=1e-15)


def test_point_goals_lie_evenly_on_half_circle():
    params, _, _ = dc.FAMILIES["point-robot"].draw()
    goals = [[math.cos(math.pi * i / 39), math.sin(math.pi * i / 39)] for i in range(40)]
    np.testing.assert_allclose(params, goals, atol=1e-15)


def test_ant_goals_lie_evenly_on_circle_of_two_meters_without_repetition():
    params, _, _ = dc.FAMILIES["ant-goal"].draw()
    goals = [[2 * math.cos(math.pi * i / 20), 2 * math.sin(math.pi * i / 20)] for i in range(40)]
    np.testing.assert_allclose(params, goals, atol=1e-14)


def test_wind_is_drawn_all_x_before_all_y():
    params, _, _ = dc.FAMILIES["point-robot-wind"].draw()
    draws = np.random.RandomState(1337).uniform(-0.05, 0.05, 100)
    assert params[:, 0].tolist() == draws[:50].tolist() and params[:, 1].tolist() == draws[50:].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_draw_is_the_same_on_every_call_and_leaves_global_generators_alone(name):
    numpy_before, python_before = np.random.get_state(), random.getstate()
    first, again = dc.FAMILIES[name].draw(), dc.FAMILIES[name].draw()
    assert random.getstate() == python_before
    assert np.array_equal(np.random.get_state()[1], numpy_before[1]) and np.random.get_state()[2] == numpy_before[2]
    for a, b in zip(first, again):
        assert np.array_equal(a, b) and a.dtype == b.dtype
    params, train_ids, test_ids = first
    assert params.dtype == np.float64 and len(np.unique(params, axis=0)) == len(params)
    assert (len(train_ids), len(test_ids)) == dc.FAMILIES[name].counts
    if name != "cheetah-dir":
        assert sorted([*train_ids, *test_ids]) == list(range(len(params)))


# ---- rewards ----------------------------------------------------------------


def plain_reward(name, outcome, act, params):
    """The reward of one transition in Python floats, as environments.md section 2 writes it."""
    effort = sum(a * a for a in act)
    if name == "point-robot":
        return -math.dist(outcome, params)
    if name == "sparse-point-robot":
        distance = math.dist(outcome, params)
        return (0.2 - distance) / 0.2 if distance <= 0.2 else 0.0
    if name == "point-robot-wind":
        return -math.dist(outcome, (1, 0))
    if name == "cheetah-vel":
        return -abs(outcome[0] - params[0]) - 0.05 * effort
    if name == "cheetah-dir":
        return params[0] * outcome[0] - 0.05 * effort
    if name == "ant-dir":
        return outcome[0] * params[0] + outcome[1] * params[1]
    if name == "ant-dir-full":
        return outcome[0] * params[0] + outcome[1] * params[1] - 0.5 * effort + 1
    if name == "ant-goal":
        return -abs(outcome[0] - params[0]) - abs(outcome[1] - params[1]) - 0.1 * effort
    if name == "hopper-rand-params":
        return outcome[0] - 0.001 * effort
    return {"walker-rand-params": outcome[0] + 1 - 0.001 * effort}[name]


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
    np.testing.assert_allclose(family.reward(*tensors).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(family.reward(*[x.float() for x in tensors]).numpy(), expected, atol=1e-5)


def test_sparse_behavior_policies_are_trained_on_the_dense_reward():
    family, dense = dc.FAMILIES["sparse-point-robot"], dc.FAMILIES["point-robot"]
    position, act, goal = np.array([[0.0, 0.0], [0.9, 0.1]]), np.zeros((2, 2)), np.array([[1.0, 0.0]] * 2)
    assert np.array_equal(family.training_reward(position, act, goal), dense.reward(position, act, goal))
    assert not np.array_equal(family.training_reward(position, act, goal), family.reward(position, act, goal))
    for other in set(dc.FAMILIES) - {"sparse-point-robot"}:
        assert type(dc.FAMILIES[other]).training_reward is dc.Family.training_reward


def test_sparse_reward_falls_from_one_at_the_goal_to_zero_at_the_rim():
    family = dc.FAMILIES["sparse-point-robot"]
    distance = np.array([0.0, 0.1, 0.2, 0.21, 1.0])
    goal = np.array([0.6, 0.8])
    outcome = goal + distance[:, None] * np.array([0.8, -0.6])
    rew = family.reward(outcome, np.zeros((5, 2)), np.tile(goal, (5, 1)))
    np.testing.assert_allclose(rew, [1, 0.5, 0, 0, 0], atol=1e-12)
    assert (rew >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_only_a_sunken_walker_terminates(name):
    family = dc.FAMILIES[name]
    state = family.reset(np.random.default_rng(0), 4)
    if name in MUJOCO:
        state[:, 2] = [0.5, 0.49, 0.51, -3.0]
    expected = [True, True, False, True] if name == "walker-rand-params" else [False] * 4
    assert family.terminated(state).tolist() == expected


# ---- simulation against a plain MuJoCo loop ---------------------------------

BODIES = {  # family -> asset, time step, frame skip
    "ant-dir": ("ant.xml", 0.01, 5),
    "ant-goal": ("ant.xml", 0.01, 5),
    "cheetah-vel": ("half_cheetah.xml", 0.01, 5),
    "hopper-rand-params": ("hopper.xml", 0.004, 4),
    "walker-rand-params": ("walker2d.xml", 0.004, 4),
}


def plain_model(name, task):
    """The model of task number `task`, loaded and randomized without data_collect."""
    asset, timestep, _ = BODIES[name]
    model = mujoco.MjModel.from_xml_path(str(Path(gym.__file__).parent / "envs" / "mujoco" / "assets" / asset))
    model.opt.timestep = timestep
    generator = random.Random(task + 1)
    factors = {"hopper-rand-params": [("body_mass", 1.5), ("body_inertia", 1.5), ("dof_damping", 1.3)]}
    factors["hopper-rand-params"].append(("geom_friction", 1.5))
    factors["walker-rand-params"] = [("body_mass", 1.5), ("geom_friction", 1.5)]
    for attribute, base in factors.get(name, []):
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
    for act in random_actions(env, 50) * (0.2 if name == "walker-rand-params" else 1.0):
        before, data.ctrl[:] = data.qpos.copy(), act[0]
        for _ in range(skip):
            mujoco.mj_step(model, data)
        outcome = plain_outcome(name, before, data.qpos, timestep * skip)
        expected = plain_reward(name, outcome, act[0].astype(np.float64), env.params[task])
        obs, rew, terminated, truncated, info = env.step(act)
        np.testing.assert_allclose(obs[0], plain_observation(name, data.qpos, data.qvel), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(rew[0], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(info["outcome"][0], outcome, rtol=1e-6, atol=1e-6)
        assert not truncated[0] and terminated[0] == (name == "walker-rand-params" and data.qpos[1] <= 0.5)
        steps += 1
        if terminated[0]:
            break
    assert steps > 20
    env.close()


@pytest.mark.parametrize("name", ["ant-dir", "cheetah-vel"])
def test_reset_draws_around_the_models_pose(name):
    """Positions uniform within 0.1, velocities normal with deviation 0.1 (gymnasium's noise)."""
    family = dc.FAMILIES[name]
    qpos, qvel = family.split(family.reset(np.random.default_rng(0), 5000))
    offset = qpos - family.model.qpos0
    assert abs(offset).max() <= 0.1 and abs(offset).max() > 0.099 and abs(offset.mean(0)).max() < 0.005
    np.testing.assert_allclose(qvel.std(0), 0.1, rtol=0.05)
    assert abs(qvel).max() > 0.3


@pytest.mark.parametrize("name", ["hopper-rand-params", "walker-rand-params"])
def test_reset_of_hopper_and_walker_is_uniform_within_five_thousandths(name):
    family = dc.FAMILIES[name]
    qpos, qvel = family.split(family.reset(np.random.default_rng(0), 5000))
    for offset in (qpos - family.model.qpos0, qvel):
        assert 0.0049 < abs(offset).max() <= 0.005 and abs(offset.mean(0)).max() < 3e-4


def test_point_moves_by_a_tenth_of_the_clipped_action_plus_wind():
    env = make_env("point-robot-wind", [0, 7])
    env.reset(seed=0)
    obs, rew, *_ = env.step(np.array([[5.0, -0.5], [0.25, -9.0]]))
    expected = np.array([[0.1, -0.05], [0.025, -0.1]]) + env.params[[0, 7]]
    np.testing.assert_allclose(env.state, expected, atol=1e-15)
    np.testing.assert_allclose(obs, expected, atol=1e-7)
    np.testing.assert_allclose(rew, -np.hypot(expected[:, 0] - 1, expected[:, 1]), atol=1e-12)


# ---- models of the rand-params families -------------------------------------


@pytest.mark.parametrize("name", ["hopper-rand-params", "walker-rand-params"])
def test_models_multiply_the_original_by_powers_and_leave_it_alone(name):
    family = dc.FAMILIES[name]
    fields = ["body_mass", "body_inertia", "dof_damping", "geom_friction", "actuator_gear", "dof_armature"]
    fields += ["dof_invweight0", "body_invweight0"]  # stale on purpose: mj_setConst is not called
    original = {field: getattr(family.model, field).copy() for field in fields}
    params, _, _ = family.draw()
    family.models(params)  # must not act on the models of the next call
    models = family.models(params[:5])
    varied = dict(family.randomized)
    assert varied == {"body_mass": 1.5, "geom_friction": 1.5} | (
        {"body_inertia": 1.5, "dof_damping": 1.3} if name == "hopper-rand-params" else {}
    )
    for task, model in enumerate(models):
        expected = plain_model(name, task)
        for field in fields:
            np.testing.assert_allclose(getattr(model, field), getattr(expected, field), rtol=1e-14, err_msg=field)
            changed = not np.array_equal(getattr(model, field), original[field])
            assert changed == (field in varied), field
    for field in fields:
        assert np.array_equal(getattr(family.model, field), original[field]), field


@pytest.mark.parametrize("name", ["hopper-rand-params", "walker-rand-params"])
def test_zero_parameters_give_the_original_and_ones_the_base(name):
    family = dc.FAMILIES[name]
    size = family.draw()[0].shape[1]
    zero, one = family.models(np.stack([np.zeros(size), np.ones(size)]))
    for field, base in family.randomized:
        original = getattr(family.model, field)
        assert np.array_equal(getattr(zero, field), original)
        np.testing.assert_allclose(getattr(one, field), original * base, rtol=1e-15)


# ---- TaskEnv ----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_spaces_hold_what_reset_and_step_return(name):
    env = make_env(name, [0, 1, 1])
    family = env.family
    assert env.single_observation_space.shape == (family.obs_dim,)
    assert env.single_action_space.shape == (family.act_dim,)
    obs, info = env.reset(seed=0)
    assert obs in env.observation_space and obs.dtype == np.float32 and info == {}
    assert obs[0] in env.single_observation_space
    env.action_space.seed(0)
    obs, rew, terminated, truncated, info = env.step(env.action_space.sample())
    assert obs in env.observation_space and obs.dtype == np.float32 and obs.shape == (3, family.obs_dim)
    assert rew.shape == terminated.shape == truncated.shape == info["diverged"].shape == (3,)
    assert terminated.dtype == truncated.dtype == info["diverged"].dtype == bool and rew.dtype == np.float64
    assert info["outcome"].shape == (3, family.outcome_dim)
    env.close()


def test_int_seed_gives_row_i_the_seed_plus_i():
    env = make_env("ant-dir", [0, 1, 2])
    first, _ = env.reset(seed=5)
    assert np.array_equal(env.reset(seed=[5, 6, 7])[0], first)
    assert np.array_equal(env.reset(seed=np.array([5, 6, 7]))[0], first)
    assert np.array_equal(env.reset(seed=6)[0][:2], first[1:])
    assert len(np.unique(first, axis=0)) == 3
    env.reset(seed=5)
    later = [env.reset()[0] for _ in range(2)]
    env.reset(seed=5)
    assert np.array_equal(env.reset()[0], later[0]) and not np.array_equal(*later)


def test_reading_np_random_seed_does_not_disturb_the_generator():
    # gymnasium's property draws a new generator where reset(seed) did not store the seed
    env = make_env("hopper-rand-params", [0])
    env.reset(seed=5)
    expected, _ = env.reset()
    env.reset(seed=5)
    assert env.np_random_seed == 5
    assert np.array_equal(env.reset()[0], expected)


def test_reset_mask_resets_and_rebinds_only_its_rows():
    env = make_env("point-robot", [0, 1, 2, 3])
    env.reset(seed=0)
    for act in random_actions(env, 4):
        obs, *_ = env.step(act)
    mask = np.array([True, False, True, False])
    after, _ = env.reset(seed=1, options={"reset_mask": mask, "task_ids": [30, 31, 32, 33]})
    assert (after[mask] == 0).all() and np.array_equal(after[~mask], obs[~mask])
    assert env.task_ids.tolist() == [30, 1, 32, 3] and env.steps.tolist() == [0, 4, 0, 4]
    obs, rew, *_ = env.step(np.full((4, 2), 0.5))
    goals = env.family.draw()[0][[30, 1, 32, 3]]
    np.testing.assert_allclose(rew, -np.hypot(*(obs - goals).T), atol=1e-6)


def test_reset_mask_on_a_body_keeps_the_other_rows_bit_for_bit():
    env, reference = make_env("hopper-rand-params", [0, 1, 2]), make_env("hopper-rand-params", [0, 1, 2])
    actions = random_actions(env, 20)
    env.reset(seed=0), reference.reset(seed=0)
    play(env, actions[:10])
    env.reset(options={"reset_mask": np.array([False, True, False]), "task_ids": [9, 9, 9]})
    got, expected = play(env, actions[10:]), play(reference, actions)
    for mine, full in zip(got, expected):
        assert np.array_equal(mine[:, [0, 2]], full[10:, [0, 2]]) and not np.array_equal(mine[:, 1], full[10:, 1])
    env.close(), reference.close()


@pytest.mark.parametrize(
    "options",
    [{"reset_mask": [True, False]}, {"reset_mask": np.ones(3, bool)}, {"reset_mask": np.ones(2)}]
    + [{"reset_mask": np.zeros(2, bool)}],
    ids=["list", "wrong length", "not bool", "all false"],
)
def test_reset_refuses_a_bad_mask(options):
    with pytest.raises(ValueError, match="reset_mask"):
        make_env("point-robot", [0, 1]).reset(options=options)


def test_wrong_number_of_seeds_or_actions_is_refused():
    env = make_env("point-robot", [0, 1])
    with pytest.raises(ValueError, match="3 seeds for 2 rows"):
        env.reset(seed=[1, 2, 3])
    env.reset(seed=0)
    with pytest.raises(ValueError, match="shape"):
        env.step(np.zeros((3, 2)))


@pytest.mark.parametrize("name", ["point-robot", "point-robot-wind", "cheetah-vel"])
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
    env.close()


def test_fallen_walker_terminates_while_the_others_go_on():
    env = make_env("walker-rand-params", [0, 1, 2])
    env.reset(seed=0)
    env.state[1, 2:4] = 0.51, np.pi / 2  # height and pitch: lies flat above the ground and falls
    env.state[1, 1 + env.family.model.nq + 1] = -2.0
    obs, rew, terminated, truncated, _ = env.step(np.zeros((3, 6)))
    assert terminated.tolist() == [False, True, False] and not truncated.any() and (rew != 0).all()
    fallen, steps = obs[1], env.steps.copy()
    obs, rew, terminated, _, _ = env.step(np.ones((3, 6)))
    assert np.array_equal(obs[1], fallen) and rew[1] == 0 and not terminated.any()
    assert rew[0] != 0 and rew[2] != 0 and (env.steps - steps).tolist() == [1, 0, 1]
    env.close()


@pytest.mark.parametrize("name", ["ant-dir", "walker-rand-params", "point-robot-wind"])
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


@pytest.mark.parametrize("name", ["ant-goal", "hopper-rand-params"])
def test_number_of_threads_does_not_change_the_result(name):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            env = make_env(name, range(9))
        finally:
            torch.set_num_threads(1)
        assert len(env.scratch) == threads
        env.reset(seed=0)
        results.append(play(env, random_actions(env, 30)))
        env.close()
    for one, two in zip(*results):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)
    assert np.std(results[0][1]) > 0


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
    torch.save(env.get_state(), tmp_path / "state.pt")

    def go_on(env):
        first = play(env, actions[5:9])
        start, _ = env.reset(options={"reset_mask": np.array([True, False, True]), "task_ids": [4, 4, 5]})
        return [*first, start, *play(env, actions[9:]), env.task_ids, env.steps]

    expected = go_on(env)
    other = make_env(name, [9, 9, 9])
    other.set_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for a, b in zip(go_on(other), expected):
        assert np.array_equal(a, b)
    env.close(), other.close()


def test_saved_state_does_not_change_when_the_env_goes_on():
    # the tensors of get_state must not share memory with arrays that reset writes into
    env = make_env("point-robot", [0, 1])
    env.reset(seed=0)
    env.step(np.ones((2, 2)))
    saved = env.get_state()
    env.reset(options={"task_ids": [3, 3]})
    assert saved["task_ids"].tolist() == [0, 1] and saved["steps"].tolist() == [1, 1]
    assert saved["live"].all()
    np.testing.assert_allclose(saved["state"].numpy(), 0.1)


@pytest.mark.parametrize("name", ["point-robot", "hopper-rand-params"])
def test_env_neither_reads_nor_moves_global_generators(name):
    def episode():
        env = make_env(name, [0, 1])
        starts = [env.reset(seed=0)[0], env.reset()[0]]
        rewards = play(env, random_actions(env, 5))[1]
        env.close()
        return np.concatenate([np.ravel(x) for x in (*starts, rewards)])

    np.random.seed(1), torch.manual_seed(1), random.seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state(), random.getstate()
    first = episode()
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1]) and random.getstate() == before[2]
    np.random.seed(2), torch.manual_seed(2), random.seed(2)
    assert np.array_equal(episode(), first)


class SingleTask(gym.Env):
    """One row of TaskEnv as an ordinary gymnasium environment, for gymnasium's checker."""

    def __init__(self, name):
        self.rows = make_env(name, [0])
        self.observation_space = self.rows.single_observation_space
        self.action_space = self.rows.single_action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        obs, info = self.rows.reset(seed=seed)
        return obs[0], info

    def step(self, action):
        obs, rew, terminated, truncated, info = self.rows.step(action[None])
        info = {key: value[0] for key, value in info.items()}
        return obs[0], float(rew[0]), bool(terminated[0]), bool(truncated[0]), info


@pytest.mark.parametrize("name", ["point-robot-wind", "cheetah-vel", "ant-goal", "walker-rand-params"])
def test_gymnasiums_checker_finds_nothing(name):
    # where the outcome is the new position, the checker also notices an info that a later reset overwrites
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(SingleTask(name), skip_render_check=True)
    messages = [str(w.message) for w in caught]
    assert not [m for m in messages if "infinity" not in m]  # observations are unbounded


def test_gymnasiums_episode_statistics_count_returns_and_lengths():
    env = RecordEpisodeStatistics(make_env("point-robot", [0, 5, 9]))
    for seed in (0, 1):
        env.reset(seed=seed, options={"reset_mask": np.ones(3, bool)})
        total = np.zeros(3)
        for act in random_actions(env, 20, seed):
            _, rew, _, truncated, info = env.step(act)
            total += rew
        assert truncated.all() and info["episode"]["l"].tolist() == [20, 20, 20]
        np.testing.assert_allclose(info["episode"]["r"], total, rtol=1e-6)
    assert env.episode_count == 6 and list(env.length_queue) == [20] * 6


# ---- behavior policies ------------------------------------------------------


def test_log_probability_is_that_of_a_tanh_gaussian():
    torch.manual_seed(0)
    actor = dc.BehaviorActor(3, 2, 1, 16)
    obs, task = torch.randn(500, 3), torch.randn(500, 1)
    act, logp = actor(obs, task)
    mean, raw = actor.net(torch.cat([obs, task], 1)).chunk(2, 1)
    normal = torch.distributions.Normal(mean, (-1.5 + 3.5 * raw.tanh()).exp())
    tanh = torch.distributions.transforms.TanhTransform()
    expected = torch.distributions.TransformedDistribution(normal, tanh).log_prob(act).sum(1)
    inside = (abs(act) < 0.99).all(1)  # beyond, the inverse of tanh loses digits
    assert inside.sum() > 100 and act.shape == (500, 2) and abs(act).max() < 1
    torch.testing.assert_close(logp[inside], expected[inside], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(actor.mode(obs, task), torch.tanh(mean))


def test_sac_update_moves_every_network_targets_included():
    torch.manual_seed(0)
    family = dc.FAMILIES["point-robot"]
    agent = dc.SAC(family, 2, dc.Args(env="point-robot", width=16))
    agent.make_optimizers(1e-3)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    for _ in range(20):
        batch = [torch.randn(64, 2), torch.rand(64, 2) * 2 - 1, torch.randn(64), torch.randn(64, 2)]
        losses = agent.update(*batch, torch.zeros(64), torch.randn(64, 2))
    still = [name for name, value in agent.state_dict().items() if torch.equal(value, before[name])]
    assert not still, f"never updated: {still}"
    assert all(math.isfinite(x) for x in losses)


def train(args, saved=None, stop=lambda: False):
    """train_behavior on the first tasks of the family -> snapshots or None, saved states."""
    family = dc.FAMILIES[args.env]
    states = []
    params = family.draw()[0][:4]
    device = torch.device("cpu")
    done = dc.train_behavior(family, params, np.arange(4), args, device, saved, states.append, stop, args.env)
    return done, states


def tiny_args(**changes):
    settings = {"env": "point-robot", "total_updates": 40, "rows": 8, "width": 16, "batch_size": 16}
    return dc.Args(**settings | changes)


@pytest.mark.parametrize("total_updates", [40, 7, 1])
def test_training_leaves_twenty_snapshots_whatever_its_length(total_updates):
    snapshots, _ = train(tiny_args(total_updates=total_updates))
    assert len(snapshots) == dc.PHASES == 20
    if total_updates == 40:
        for earlier, later in itertools.pairwise(snapshots[::5]):
            assert not torch.equal(earlier["net.0.weight"], later["net.0.weight"])


def test_diverged_transitions_stay_out_of_the_replay(monkeypatch):
    original, calls = dc.TaskEnv._simulate, []

    def simulate(env, state, act, live):
        next_state, diverged = original(env, state, act, live)
        calls.append(len(state))
        diverged[2] = len(calls) == 9
        return np.where(diverged[:, None], state, next_state), diverged

    monkeypatch.setattr(dc.TaskEnv, "_simulate", simulate)
    _, states = train(tiny_args())
    assert states[-1]["progress"]["diverged"] == 1
    assert len(states[-1]["replay_rows"]) == sum(calls) - 1
    assert calls == [8] * len(calls)  # the row was reset and went on


def test_divergence_of_all_rows_at_once_does_not_stop_the_training(monkeypatch):
    # Replay.add must accept zero transitions: with --rows 1 a single diverged step is enough
    original, calls = dc.TaskEnv._simulate, []

    def simulate(env, state, act, live):
        calls.append(len(state))
        next_state, diverged = original(env, state, act, live)
        return (state, ~diverged) if len(calls) == 9 else (next_state, diverged)

    monkeypatch.setattr(dc.TaskEnv, "_simulate", simulate)
    snapshots, states = train(tiny_args())
    assert len(snapshots) == 20 and states[-1]["progress"]["diverged"] == 8


def test_exploding_training_ends_with_one_line_naming_lr():
    assert "--lr" in stop_message(train, tiny_args(lr=1e30))


def test_ant_is_stuck_when_its_torso_points_down():
    family = dc.FAMILIES["ant-dir"]
    rng, data = np.random.default_rng(0), mujoco.MjData(family.model)
    state = family.reset(rng, 200)
    state[50:, 4:8] = rng.normal(size=(150, 4))
    state[:, 4:8] /= np.linalg.norm(state[:, 4:8], axis=1, keepdims=True)
    upside_down = []
    for row in state:
        data.qpos[:] = row[1:16]
        mujoco.mj_kinematics(family.model, data)
        upside_down.append(data.body("torso").xmat[8] < 0)
    assert family.stuck(state).tolist() == upside_down and not any(upside_down[:50]) and any(upside_down)


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
    done = dc.rollout(env, lambda obs, rew: torch.rand(6, 6, generator=generator) * 2 - 1, list(range(6)))
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


def test_rollout_reports_a_diverged_row_and_drops_its_void_step(monkeypatch):
    original, calls = dc.TaskEnv._simulate, []

    def simulate(env, state, act, live):
        next_state, diverged = original(env, state, act, live)
        calls.append(len(state))
        diverged[0] = len(calls) == 4
        return np.where(diverged[:, None], state, next_state), diverged

    monkeypatch.setattr(dc.TaskEnv, "_simulate", simulate)
    done = dc.rollout(make_env("point-robot", [0, 1]), lambda obs, rew: torch.ones(2, 2), [0, 1])
    assert done["diverged"].tolist() == [True, False] and done["lengths"].tolist() == [3, 20]
    assert not done["observations"][0, 4:].any() and not done["rewards"][0, 3:].any()


@pytest.mark.parametrize("prefix", ["", "ood_"])
def test_transitions_never_cross_a_reset(walker_path, prefix):
    arrays = dict(np.load(walker_path))
    rows = dc.transitions(arrays, prefix)
    family = dc.FAMILIES["walker-rand-params"]
    lengths, terminated = arrays[prefix + "lengths"], arrays[prefix + "terminated"]
    assert rows.shape == (*lengths.shape, 200, 2 * 18 + 6 + 2) and rows.dtype == torch.float32
    assert terminated.any() and len(np.unique(lengths)) > 3
    for where in np.ndindex(lengths.shape):
        length, episode = lengths[where], rows[where].numpy()
        obs, act, rew, next_obs, term = np.split(episode, [18, 24, 25, 43], 1)
        assert not episode[length:].any()
        assert np.array_equal(next_obs[: max(length - 1, 0)], obs[1:length])
        if length == 0:
            continue
        assert abs(obs[0] - [0, 1.25, *[0] * 16]).max() <= 0.00501  # starts at a reset, nowhere else
        assert term[length - 1] == terminated[where] and not term[: length - 1].any()
        assert terminated[where] == (next_obs[length - 1, 1] <= 0.5) and (next_obs[: length - 1, 1] > 0.5).all()
        assert terminated[where] or length == 200
        speed = (next_obs[:length, 0].astype(np.float64) - obs[:length, 0]) / family.dt
        expected = speed + 1 - 1e-3 * (act[:length] ** 2).sum(1)
        np.testing.assert_allclose(rew[:length, 0], expected, atol=2e-4)  # positions are float32


def test_recorded_rewards_follow_from_the_observations(tiny_path):
    arrays = dict(np.load(tiny_path))
    played = arrays["lengths"] > 0
    distance = np.linalg.norm(arrays["observations"][:, :, 1:] - arrays["task_params"][:, None, None], axis=-1)
    np.testing.assert_allclose(arrays["rewards"][played], -distance[played], atol=1e-6)
    step = np.diff(arrays["observations"], axis=2)
    np.testing.assert_allclose(step, 0.1 * arrays["actions"], atol=1e-6)
    assert not arrays["rewards"][~played].any() and not arrays["terminated"].any()
    test_goals = arrays["task_params"][arrays["test_ids"]][:, None, None]
    distance = np.linalg.norm(arrays["ood_observations"][:, :, 1:] - test_goals, axis=-1)
    np.testing.assert_allclose(arrays["ood_rewards"], -distance, atol=1e-6)


def test_diverged_episode_of_a_collection_is_played_again_and_counted(tiny_path, tmp_path, monkeypatch):
    shutil.copy(tiny_path.with_name("point-robot.policies.pt"), tmp_path)  # no training needed
    original, calls = dc.TaskEnv._simulate, []

    def simulate(env, state, act, live):
        next_state, diverged = original(env, state, act, live)
        calls.append(len(state))
        diverged[-1] = len(calls) == 95  # while the episodes of the file are played
        return np.where(diverged[:, None], state, next_state), diverged

    monkeypatch.setattr(dc.TaskEnv, "_simulate", simulate)
    path = tmp_path / "point-robot.npz"
    dc.collect(dc.Args(env="point-robot", out=str(path), **TINY))
    assert len(calls) > 95
    data = dc.load_dataset("point-robot", path)
    assert data.header["diverged_episodes"] == 1
    assert set(data.lengths.flatten().tolist()) == {0, 20} and set(data.ood_lengths.flatten().tolist()) == {20}
    assert dc.load_dataset("point-robot", tiny_path).header["diverged_episodes"] == 0


# ---- evaluation -------------------------------------------------------------


def standing(context, mask, explore):
    return lambda obs, rew: torch.zeros(len(obs), 2)


def recorder(calls, act=0.3):
    """An adapt that keeps what it is given and then always moves alike."""

    def adapt(context, mask, explore):
        calls.append((context.clone(), mask.clone(), explore))
        return lambda obs, rew: torch.full((len(obs), 2), act)

    return adapt


def greedy(goals, mean=0, spread=1):
    def adapt(context, mask, explore):
        target = torch.as_tensor(goals, dtype=torch.float32)
        return lambda obs, rew: ((target - (obs * spread + mean)) / 0.1).clamp(-1, 1)

    return adapt


def greedy_return(goal):
    """The return of the best policy, axis by axis, in Python floats."""
    position, total = [0.0, 0.0], 0.0
    for _ in range(20):
        position = [p + max(-0.1, min(0.1, g - p)) for p, g in zip(position, goal)]
        total -= math.dist(position, goal)
    return total


def test_evaluate_gives_every_tag_and_the_same_numbers_twice(tiny):
    np.random.seed(1), torch.manual_seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = dc.evaluate(tiny, recorder([]), dc.PROTOCOLS)
    assert np.array_equal(np.random.get_state()[1], before[0]) and torch.equal(torch.get_rng_state(), before[1])
    np.random.seed(2), torch.manual_seed(2)
    assert dc.evaluate(tiny, recorder([]), dc.PROTOCOLS) == first
    expected = {f"eval/{protocol}/{kind}" for protocol in dc.PROTOCOLS for kind in ("return", "normalized")}
    expected |= {f"eval/{p}/return_task_{i:02d}" for p in dc.PROTOCOLS if p != "train" for i in tiny.test_ids}
    expected |= {f"eval/train/return_task_{i:02d}" for i in tiny.train_ids}
    expected |= {f"eval/online/return_ep_{k}" for k in (1, 2, 3, 4, 5)}
    assert set(first) == expected
    assert all(isinstance(value, float) and math.isfinite(value) for value in first.values())


def test_evaluate_runs_only_the_protocols_asked_for(tiny):
    assert {tag.split("/")[1] for tag in dc.evaluate(tiny, standing, ("zero_shot", "ood"))} == {"zero_shot", "ood"}


def test_walker_evaluation_is_deterministic_too(walker):
    def adapt(context, mask, explore):
        return lambda obs, rew: torch.sin(3 * obs[:, :6])

    protocols = ("iid", "zero_shot", "ood_random")
    first = dc.evaluate(walker, adapt, protocols)
    assert dc.evaluate(walker, adapt, protocols) == first
    # without context the same episodes are played: contexts decide nothing but adapt's answer
    assert first["eval/iid/return"] == first["eval/zero_shot/return"]


@pytest.mark.parametrize("protocol", ["iid", "train"])
def test_context_is_one_whole_episode_of_the_right_task(tiny, protocol):
    calls = []
    dc.evaluate(tiny, recorder(calls), (protocol,), episodes=4)
    tasks = tiny.test_ids if protocol == "iid" else tiny.train_ids
    ((context, mask, explore),) = calls
    assert context.shape == (4 * len(tasks), 20, tiny.ctx_dim) and mask.shape == (4 * len(tasks), 20)
    assert explore is False and (mask == 1).all()
    used = []
    for row, task in enumerate(tasks.repeat(4)):
        same = [n for n in range(8) if torch.equal(tiny.episodes[task, n, :, :-1], context[row])]
        assert len(same) == 1 and tiny.lengths[task, same[0]] == 20
        used.append((task, *same))
    assert len(set(used)) > len(tasks)  # the episodes of one task get different contexts


def test_iid_mask_marks_the_real_transitions_of_short_episodes(walker):
    calls = []

    def adapt(context, mask, explore):
        calls.append((context, mask))
        return lambda obs, rew: torch.zeros(len(obs), 6)

    dc.evaluate(walker, adapt, ("train",), episodes=5)
    ((context, mask),) = calls
    assert context.shape == (15, 200, walker.ctx_dim) and 0 < mask.mean() < 1
    for row, task in enumerate(walker.train_ids.repeat(5)):
        length = int(mask[row].sum())
        assert mask[row, :length].all() and not context[row, length:].any()
        n = [n for n in range(5) if torch.equal(walker.episodes[task, n, :, :-1], context[row])]
        assert len(n) == 1 and walker.lengths[task, n[0]] == length


def test_ood_context_is_played_on_the_test_task_by_foreign_policies(tiny):
    for protocol, columns in (("ood", 5), ("ood_random", 1)):
        calls = []
        dc.evaluate(tiny, recorder(calls), (protocol,))
        ((context, mask, explore),) = calls
        assert context.shape == (3 * columns, 20, tiny.ctx_dim) and (mask == 1).all() and explore is False
        for row, (v, c) in enumerate(itertools.product(range(3), range(columns))):
            column = c if protocol == "ood" else 5
            assert torch.equal(context[row], tiny.ood_episodes[v, column, :, :-1])
            behavior = tiny.ood_behavior_task[v, column]
            assert behavior == dc.RANDOM if protocol == "ood_random" else behavior in tiny.train_ids
            goal = tiny.task_params[tiny.test_ids[v]]
            position = context[row, :, 5:7] * tiny.obs_spread + tiny.obs_mean
            distance = np.linalg.norm(position.numpy() - goal, axis=1)
            np.testing.assert_allclose(context[row, :, 4], -distance, atol=1e-6)


def test_online_context_grows_by_the_rows_own_episodes(tiny):
    calls = []
    episodes = 0.1 * np.arange(1, 6)  # the k-th policy moves by this

    def adapt(context, mask, explore):
        calls.append((context.clone(), mask.clone(), explore))
        act = episodes[len(calls) - 1]
        return lambda obs, rew: torch.full((len(obs), 2), act)

    results = dc.evaluate(tiny, adapt, ("online",), episodes=7)
    assert [explore for _, _, explore in calls] == [True, True, False, False, False]
    for k, (context, mask, _) in enumerate(calls):
        assert context.shape == (3, 20 * k, tiny.ctx_dim) and mask.shape == (3, 20 * k) and (mask == 1).all()
        if k:
            assert torch.equal(context[:, :-20], calls[k - 1][0])
            own = context[:, -20:]
            np.testing.assert_allclose(own[..., 2:4], episodes[k - 1], atol=1e-6)
            goals = tiny.task_params[tiny.test_ids][:, None]
            position = own[..., 5:7] * tiny.obs_spread + tiny.obs_mean
            distance = np.linalg.norm(position.numpy() - goals, axis=-1)
            np.testing.assert_allclose(own[..., 4], -distance, atol=1e-6)
            mean_return = own[..., 4].double().sum(1).mean().item()
            assert results[f"eval/online/return_ep_{k}"] == pytest.approx(mean_return, abs=1e-5)
    assert results["eval/online/return"] == results["eval/online/return_ep_5"]


def test_online_mask_covers_episodes_of_different_length(walker):
    calls = []

    def adapt(context, mask, explore):
        calls.append((context.clone(), mask.clone()))
        return lambda obs, rew: torch.sin(7 * obs[:, :6])

    dc.evaluate(walker, adapt, ("online",))
    context, mask = calls[-1]
    assert mask.shape == (2, 800) and 0 < mask.mean() < 1
    for row, episode in itertools.product(range(2), range(4)):
        part = slice(200 * episode, 200 * (episode + 1))
        length = int(mask[row, part].sum())
        assert length > 1 and mask[row, part][:length].all() and not context[row, part][length:].any()
        assert (context[row, part][:length, 24] != 0).all()  # rewards of real transitions


def test_policies_see_standardized_observations(walker):
    seen = []

    def adapt(context, mask, explore):
        return lambda obs, rew: seen.append(obs) or torch.zeros(len(obs), 6)

    trace = []
    dc.evaluate(walker, adapt, ("zero_shot",), trace=trace)
    start = walker.standardize(torch.tensor([0, 1.25] + [0] * 16))  # every reset lies within 0.005 of this
    assert ((seen[0] - start).abs() <= 0.0051 / walker.obs_spread).all()
    for t in range(3):
        torch.testing.assert_close(torch.as_tensor(trace[0]["observations"][:, t]), seen[t], rtol=0, atol=1e-5)


def test_zero_shot_has_no_context(tiny):
    calls = []
    dc.evaluate(tiny, recorder(calls), ("zero_shot",), episodes=3)
    ((context, mask, explore),) = calls
    assert context.shape == (9, 0, tiny.ctx_dim) and mask.shape == (9, 0) and explore is False


def test_optimal_policy_reaches_the_analytic_return(tiny):
    goals = tiny.task_params[tiny.test_ids.repeat(2)]
    results = dc.evaluate(tiny, greedy(goals, tiny.obs_mean, tiny.obs_spread), ("iid",), episodes=2)
    expected = [greedy_return(goal) for goal in tiny.task_params[tiny.test_ids].tolist()]
    for task, value in zip(tiny.test_ids, expected):
        assert results[f"eval/iid/return_task_{task:02d}"] == pytest.approx(value, abs=1e-4)
    assert results["eval/iid/return"] == pytest.approx(np.mean(expected), abs=1e-4)


def test_optimal_return_over_all_goals_of_the_half_circle_is_minus_3_9():
    params = dc.FAMILIES["point-robot"].draw()[0]
    env = make_env("point-robot", range(40))
    returns = dc.rollout(env, greedy(params)(None, None, False), list(range(40)))["rewards"].sum(1)
    np.testing.assert_allclose(returns, [greedy_return(goal) for goal in params.tolist()], atol=1e-4)
    assert returns.mean() == pytest.approx(-3.9, abs=0.1)


def test_normalized_is_0_for_random_and_100_for_expert_on_each_tasks_own_scale(tiny):
    tasks = tiny.test_ids
    random_returns, expert_returns = tiny.random_returns[tasks], tiny.expert_returns[tasks]
    np.testing.assert_allclose(dc.normalize(tiny, tasks, random_returns), 0, atol=1e-12)
    np.testing.assert_allclose(dc.normalize(tiny, tasks, expert_returns), 100)
    np.testing.assert_allclose(dc.normalize(tiny, tasks, (random_returns + expert_returns) / 2), 50)
    results = dc.evaluate(tiny, standing, ("zero_shot",))
    returns = np.array([results[f"eval/zero_shot/return_task_{i:02d}"] for i in tasks])
    expected = 100 * np.mean((returns - random_returns) / (expert_returns - random_returns))
    assert results["eval/zero_shot/normalized"] == pytest.approx(expected)
    assert results["eval/zero_shot/return"] == pytest.approx(-20, abs=1e-5)  # stays 1 m away for 20 steps


def test_trace_keeps_each_protocols_last_episodes_with_their_context(tiny):
    calls, trace = [], []
    results = dc.evaluate(tiny, recorder(calls), ("iid", "online"), episodes=3, trace=trace)
    assert len(trace) == 2
    for protocol, done, (context, mask, _) in zip(("iid", "online"), trace, (calls[0], calls[-1])):
        assert torch.equal(done["context"], context) and torch.equal(done["mask"], mask)
        assert done["rewards"].sum(1).mean() == pytest.approx(results[f"eval/{protocol}/return"], rel=1e-5)


def telling_tasks_apart(data, answer):
    """An embed that recognizes each recorded episode and gives answer(its task)."""
    known = {data.episodes[t, n, :, :-1].numpy().tobytes(): t for t, n in (data.lengths > 0).nonzero().tolist()}

    def embed(context, mask):
        assert mask.shape == context.shape[:2]
        return torch.stack([answer(known[row.numpy().tobytes()]) for row in context])

    return embed


def test_label_contexts_takes_recorded_episodes_evenly_and_names_their_tasks(walker):
    z, tasks = dc.label_contexts(walker, telling_tasks_apart(walker, lambda t: torch.tensor([float(t)])), limit=2)
    assert tasks == [t for t in [*walker.train_ids, *walker.test_ids] for _ in range(2)]
    assert z[:, 0].tolist() == tasks
    lengths = dc.label_contexts(walker, lambda context, mask: mask.sum(1, keepdim=True), limit=2)[0]
    last = (walker.lengths > 0).sum(1) - 1
    assert lengths[:, 0].tolist() == [int(walker.lengths[t, n]) for t in dict.fromkeys(tasks) for n in (0, last[t])]


def test_embedding_quality_is_1_for_the_true_parameters_and_poor_for_a_constant(tiny):
    params = torch.as_tensor(tiny.task_params, dtype=torch.float32)
    perfect = dc.embedding_quality(tiny, telling_tasks_apart(tiny, lambda t: 3 * params[t] - 1))
    assert perfect["z/nearest_task_acc"] == 1 and perfect["z/probe_r2"] == pytest.approx(1, abs=1e-5)
    constant = dc.embedding_quality(tiny, telling_tasks_apart(tiny, lambda t: torch.zeros(2)))
    assert constant["z/nearest_task_acc"] == pytest.approx(1 / 6)
    assert constant["z/probe_r2"] == pytest.approx(0, abs=1e-5)

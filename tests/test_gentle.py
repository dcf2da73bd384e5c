"""gentle.py: its task models, its pseudo-transitions, its encoder's loss; the rest is in actor_critic_suite.py."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from actor_critic_suite import DATA, FAST, METHOD, ActorCriticSuite, assert_same_update, check_best, check_segments
from actor_critic_suite import gradients, make_context, slow_embedding, slow_policy, train_on_point_robot, vectors
from conftest import OnDevice, dataset_on_meta, origin, slow_net, to_meta

import gentle

TASKS, STATES, FOREIGN, ENSEMBLE = 5, 4, 2, 3
SIZES = vars(DATA) | {"train_ids": np.array([8, 0, 3, 2, 7])}
DYNAMICS = SimpleNamespace(**SIZES, family=SimpleNamespace(dynamics_vary=True))
REWARDS = SimpleNamespace(**SIZES, family=SimpleNamespace(dynamics_vary=False))
Y_STD = (2.0, 0.5, 1.5, 3.0)


def slow_y(agent, row):
    """The reward, then the change of the observation, if the row has one, each in units of its deviation."""
    raw = [row[5], *(row[6 + d] - row[d] for d in range(len(row) - 6))]
    return torch.stack([x / std for x, std in zip(raw, agent.y_std)])


def slow_error(predicted, ys):
    """Lists of [y_dim] -> mean squared error of the reward, plus the mean over all other dimensions."""
    squares = torch.stack([(a - b) ** 2 for a, b in zip(predicted, ys)])
    return squares[:, 0].mean() + (squares[:, 1:].mean() if squares.shape[1] > 1 else 0.0)


def slow_model(agent, task, member, x):
    """One model of one task at one (s, a) -> [y_dim]."""
    *hidden, last = zip(*([p[task, member] for p in ps] for ps in (agent.models.weights, agent.models.biases)))
    for weight, bias in hidden:
        x = weight.T @ x + bias[0]
        x = torch.where(x > 0, x, 0.0)
    return last[0].T @ x + last[1][0]


class TestGENTLE(ActorCriticSuite):
    script, data = gentle, DYNAMICS
    method = {"decoder_width": 8, "ensemble": ENSEMBLE, "model_width": 6, "model_lr": 0.02, "pseudo_states": STATES}
    method |= {"label_tasks": 1 + FOREIGN}
    own = {"model_opt": ("models", "model_lr")}
    embedding = staticmethod(lambda encoder, rows: slow_embedding(encoder, rows[:, : encoder.net[0].in_features]))
    contexts = 0  # `watched` calls what comes first in an update task_ids: here it is the context

    def make_args(self, **changes):
        given = METHOD | self.method | changes
        del given["metric_weight"]
        return gentle.Args(**given)

    def make_agent(self, data=None, **changes):
        agent, args = super().make_agent(data, **changes)
        agent.y_std.copy_(torch.tensor(Y_STD[: len(agent.y_std)]))
        return agent, args

    def make_contexts(self, seed):
        return [make_context(seed)[..., : 9 if self.data is DYNAMICS else 6]]

    def make_rows(self, *shape, seed=0):
        width = 9 if self.data is DYNAMICS else 6
        return torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed)).double()

    def update(self, agent, contexts, rest, args, task_ids=None):
        return gentle.update(agent, *contexts, *rest, args)

    def slow_encoder(self, agent, opts, contexts, segment, args):
        (context,) = contexts
        z = [slow_embedding(agent.encoder, rows) for rows in context]
        predicted = [slow_net(agent.decoder, row[:5], z[m]) for m in range(len(z)) for row in context[m]]
        loss = slow_error(predicted, [slow_y(agent, row) for row in context.flatten(0, 1)])
        gradients(loss, agent.decoder)
        return loss, {}

    def test_updates_of_a_reward_family_equal_a_recomputation(self, known_noise):
        self.data = REWARDS
        self.check_updates()

    @pytest.mark.parametrize("data", [DYNAMICS, REWARDS])
    def test_model_updates_equal_a_slow_recomputation(self, data):
        """Every model learns from its own rows alone."""
        self.data = data
        agent, args = self.make_agent()
        twin, opt = copy.deepcopy(agent), None
        opt = torch.optim.Adam(twin.models.parameters(), args.model_lr)
        for k in range(2):
            rows = self.make_rows(TASKS, ENSEMBLE, 6, seed=k)
            places = [(u, e, row) for u in range(TASKS) for e in range(ENSEMBLE) for row in rows[u, e]]
            predicted = [slow_model(twin, u, e, row[:5]) for u, e, row in places]
            loss = slow_error(predicted, [slow_y(twin, row) for _, _, row in places])
            gradients(loss, twin.models)
            opt.step()
            assert_same_update(agent, twin, gentle.update_models(agent, rows), {"losses/models": loss})

    @pytest.mark.parametrize("data", [DYNAMICS, REWARDS])
    def test_pseudo_transitions_equal_a_slow_recomputation(self, data):
        """States of a task and N others, actions with the z of the state's task, labels of the store's task."""
        self.data = data
        agent, args = self.make_agent()
        rows, sources = self.make_rows(TASKS, STATES), []
        for seed in range(3):
            gentle.rebuild(agent, rows, torch.Generator().manual_seed(seed))
            assert agent.pseudo.shape == (TASKS, (1 + FOREIGN) * STATES, rows.shape[-1])
            z = [slow_embedding(agent.encoder, task_rows) for task_rows in rows]
            sources.append([])
            for j in range(TASKS):
                found = []
                for row in agent.pseudo[j]:
                    ((i, k),) = (rows[..., :3] == row[:3]).all(-1).nonzero().tolist()
                    found.append((i, k))
                    act = torch.tanh(slow_policy(agent, rows[i, k, :3], z[i])[0].mean)
                    x = torch.cat([rows[i, k, :3], act])
                    y = sum(slow_model(agent, j, e, x) for e in range(ENSEMBLE)) / ENSEMBLE * agent.y_std
                    torch.testing.assert_close(row, torch.cat([x, y[:1], y[1:] + row[: len(y) - 1]]))
                tasks = {i for i, _ in found}
                assert len(tasks) == 1 + FOREIGN and j in tasks
                assert sorted(found) == sorted((i, k) for i in tasks for k in range(STATES))
                sources[-1].append(tasks)
            assert all(sum(i in tasks for tasks in sources[-1]) == 1 + FOREIGN for i in range(TASKS))
        assert sources[0] != sources[1] or sources[1] != sources[2]
        assert not agent.pseudo.requires_grad and all(p.grad is None for p in agent.parameters())

    def test_all_tasks_may_label_the_same_states(self):
        """With N = U - 1 (s, a) does not tell the task; with N = 0 it does."""
        for labels, same in ((TASKS, True), (99, True), (1, False)):
            agent, _ = self.make_agent(label_tasks=labels)
            gentle.rebuild(agent, self.make_rows(TASKS, STATES), None)
            stores = [sorted(map(tuple, store[:, :5].tolist())) for store in agent.pseudo]
            assert all((store == stores[0]) == same for store in stores[1:])
            assert not torch.equal(agent.pseudo[0, :, 5].sort()[0], agent.pseudo[1, :, 5].sort()[0])

    def test_encoder_sees_next_obs_where_dynamics_vary(self):
        for data, width in ((DYNAMICS, 9), (REWARDS, 6)):
            agent, _ = self.make_agent(data)
            context, mask = make_context(0), torch.ones(4, 3).double()
            z = agent.encoder(context, mask)
            torch.testing.assert_close(z[0], slow_embedding(agent.encoder, context[0, :, :width]))

    def watch_labels(self, monkeypatch):
        """Models whose reward is the place of their task among the training tasks."""

        def forward(models, x):
            places = torch.arange(len(models.weights[0]), dtype=x.dtype)
            return places[:, None, None, None].expand(-1, models.weights[0].shape[1], x.shape[2], 1)

        monkeypatch.setattr(gentle.TaskModels, "forward", forward)
        monkeypatch.setattr(gentle, "update_models", lambda agent, rows: {})

    def test_every_row_sees_its_own_training_task(self, numbered, numbered_path, tmp_path, monkeypatch):
        """60 of 64 rows are pseudo-transitions that the task's own models labelled; the others are of one episode."""
        self.watch_labels(monkeypatch)
        stds, rebuilds, rebuild = [], [], gentle.rebuild

        def watch_rebuild(agent, rows, generator):
            stds.append(agent.y_std.item())
            rebuilds.append(rows[..., 4])
            rebuild(agent, rows, generator)

        monkeypatch.setattr(gentle, "rebuild", watch_rebuild)
        changes = {"context_size": 64, "rebuild_every": 8, "pseudo_states": 50, "label_tasks": 3}
        updates, contexts = self.watched(monkeypatch, tmp_path, numbered_path, **changes, model_updates=1)
        assert len(updates) == 20 and len(rebuilds) == 3  # before updates 1, 9 and 17
        rew = numbered.episodes[numbered.train_tasks][numbered.recorded(numbered.lengths[numbered.train_tasks])][:, 4]
        assert stds[0] == pytest.approx(rew.double().std().item(), rel=1e-5)
        for rows in rebuilds:  # of all training tasks and their episodes, in the order of the file
            assert rows.shape == (6, 50) and (origin(rows)[0] == torch.arange(5, -1, -1)[:, None]).all()
            assert set(origin(rows)[1].flatten().tolist()) == {0, 1, 2, 3}
        states = {tuple(row[:2].tolist()): int(row[4]) // 1000 for row in numbered.episodes.flatten(0, 2) if row.any()}
        tasks_seen, others, episodes = [], [], set()
        for u in updates:
            context = u.task_ids
            assert context.shape == (5, 64, 5)
            task, episode, _ = origin(context[:, 60:, 4])
            tasks_seen.append(task[:, 0])
            assert (task == task[:, :1]).all() and (episode == episode[:, :1]).all()
            episodes |= set(episode[:, 0].tolist())
            label = 5 - context[:, :60, 4] / stds[0]  # the file's training tasks come in reversed order
            torch.testing.assert_close(label, task[:, :1].float().expand(-1, 60), atol=1e-4, rtol=0)
            for m in range(5):
                found = [states[tuple(row[:2].tolist())] for row in context[m, :60]]
                assert len(set(found)) == 3 and int(task[m, 0]) in found
                others.append(sum(i != task[m, 0] for i in found) / 60)
            check_segments(u.segment, tasks_seen[-1], FAST)
        assert np.mean(others) == pytest.approx(2 / 3, abs=0.04) and episodes == {0, 1, 2, 3}
        assert set(torch.cat(tasks_seen).tolist()) == set(range(6))
        assert any(len(set(tasks.tolist())) < 5 for tasks in tasks_seen)  # with replacement
        check_best([u.bc_batch.rew for u in updates], tasks_seen, numbered, FAST["bc_top_fraction"])
        assert set(origin(contexts[0])[0].tolist()) == {6, 7, 8}

    def test_models_learn_from_their_own_tasks(self, numbered_path, tmp_path, monkeypatch):
        seen, rates, update_models = [], [], gentle.update_models

        def watch(agent, rows):
            seen.append(rows[..., 4])
            rates.append(agent.model_opt.param_groups[0]["lr"])
            return update_models(agent, rows)

        monkeypatch.setattr(gentle, "update_models", watch)
        changes = {"model_updates": 4, "model_lr": 0.008, "model_batch_size": 7, "ensemble": 2, "total_updates": 1}
        self.watched(monkeypatch, tmp_path, numbered_path, **changes)
        assert rates == pytest.approx([0.008, 0.008, 0.008, 0.004])
        for rew in seen:
            assert rew.shape == (6, 2, 7) and (origin(rew)[0] == torch.arange(5, -1, -1)[:, None, None]).all()
            assert not torch.equal(rew[:, 0], rew[:, 1])

    @pytest.mark.parametrize("decay", [True, False])
    def test_learning_rates_fall_in_the_second_half(self, decay, numbered_path, tmp_path, monkeypatch):
        changes = {"total_updates": 8, "lr_decay": decay, "model_updates": 1}
        updates, _ = self.watched(monkeypatch, tmp_path, numbered_path, **changes)
        shares = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25] if decay else [1] * 8
        for u, share in zip(updates, shares, strict=True):
            assert [u.rates[opt] for opt in ("opt", "behavior_opt")] == pytest.approx([share * FAST["lr"]] * 2)

    def test_update_stays_on_the_device(self, numbered):
        args = self.make_args()
        agent, data = to_meta(gentle.Agent(numbered, args)), dataset_on_meta(numbered)
        with OnDevice():
            rows = data.sample(data.train_tasks, STATES, None)
            gentle.update_models(agent, rows[:, None].expand(-1, ENSEMBLE, -1, -1))
            gentle.rebuild(agent, rows, None)
            segment = data.sample_segments(data.train_tasks, 5, args.n_step, args.gamma, None)
            batch = data.sample_batch(data.train_tasks, 5, None, 0.5)
            metrics = gentle.update(agent, agent.pseudo, segment, batch, args)
        assert all(value.device.type == "meta" for value in metrics.values())

    def test_reward_scale_follows_the_data(self, numbered, numbered_path, tmp_path, monkeypatch):
        monkeypatch.setitem(gentle.ENV_DEFAULTS[""], "model_updates", 1)
        super().test_reward_scale_follows_the_data(numbered, numbered_path, tmp_path, monkeypatch)

    def test_learns_point_robot(self, tmp_path):
        """On the shipped data."""
        result = train_on_point_robot(gentle, tmp_path, kl_coef=0.1, model_updates=200, rebuild_every=50)
        # three seeds: -6.8 to -7.5, -6.2 to -7.0, 0.2 to 0.4
        assert result["eval/iid/return"] > -8.5 and result["eval/bc/return"] > -7.5
        assert abs(result["eval/iid/q_error"]) < 0.8 and result["z/probe_r2"] > 0.8
        # three seeds: -10.2 to -10.7, -10.0 to -12.5; with --pseudo-share 0 -14.1 and -16.8
        assert result["eval/ood/return"] > -12 and result["eval/online/return"] > -14.5


# ---- hand-made vectors ------------------------------------------------------------------


def test_reconstruction_and_its_gradient_match_vectors():
    """Two rows (s, a, r), a decoder s + a + 2 z of the mean z."""
    encoder, each = gentle.Encoder(1, 1, 4), vectors([(0.2,), (0.6,)]).requires_grad_()
    encoder.net = torch.nn.Identity()
    z = encoder(each, vectors((1, 1)))
    loss = gentle.squared_error(vectors([(1,), (1,)]) + 2 * z[:, None], vectors([(1.5,), (2,)]))
    loss.backward()
    assert loss.item() == pytest.approx(0.065) and each.grad.flatten().tolist() == pytest.approx([0.1, 0.1])
    both = gentle.squared_error(vectors((1, 0, 0), (0, 0, 0)), vectors((0, 2, 0), (0, 0, 4)))
    assert both.item() == pytest.approx(0.5 + 20 / 4)  # the reward counts as much as all dimensions of s'


def test_models_start_like_linear_layers():
    torch.manual_seed(0)
    models = gentle.TaskModels(6, 3, 5, 40, 2)
    assert [tuple(w.shape) for w in models.weights] == [(6, 3, 5, 40), (6, 3, 40, 40), (6, 3, 40, 2)]
    for weight, bias in zip(models.weights, models.biases):
        bound = weight.shape[2] ** -0.5
        assert 0.95 * bound < weight.abs().max() <= bound and (bias == 0).all()
        assert bias.shape == (6, 3, 1, weight.shape[3]) and not torch.equal(weight[0, 0], weight[0, 1])

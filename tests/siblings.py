"""What the scripts whose actor-critic is that of focal.py are tested for alike, CSRO, ER-TRL, FOCAL++, IDAQ, UNICORN:
whole updates against a slow recomputation, networks, the data of a training, learning. Their own tests have what their
encoders add.
"""

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OnDevice, origin, to_meta
from test_focal import DATA, FAST, TASK_IDS, Z, assert_same_update, check_best, check_clamps, check_evaluation
from test_focal import check_learning, check_segments, decaying, gradients, make_batch, make_context, make_segment
from test_focal import slow_actor_critic, slow_embedding, slow_multiplier_and_targets, slow_policy, start, vectors

import data_collect as dc

# float32, in which the optimizers keep it, holds this learning rate exactly
METHOD = {"width": 16, "encoder_width": 16, "z_dim": 3, "lr": 2**-7, "tau": 0.1, "gamma": 0.9, "reward_scale": 3.0}
METHOD |= {"metric_weight": 7.0, "brac_alpha": 1.75, "brac_alpha_lr": 0.3, "divergence_target": 0.2}
METHOD |= {"brac_alpha_max": 100.0, "n_step": 3}


class Sibling:
    """Base of a test class: names the script and says how its encoder is trained."""

    script = None
    data = DATA  # sizes
    method = {}  # arguments beside METHOD
    encoder_shapes = [(48, 9), (48, 48), (5, 48)]  # of its layers with 48 hidden units, z_dim 5
    own = {}  # optimizer beside `opt`: (the network it trains, the argument that is its learning rate)
    contexts = 1  # that an update is given
    embedding = staticmethod(slow_embedding)  # encoder, transitions of a context -> z

    def slow_encoder(self, agent, opts, contexts, segment, args):
        """The steps of the networks in `own`, with opts {name: optimizer} -> loss of the encoder, with graph, and the
        metrics that focal.py does not have."""
        raise NotImplementedError

    def tasks(self, task_ids):
        """What an update of `watched` was given as task_ids -> the tasks."""
        return task_ids

    def slow_after(self, agent, args):
        """What follows the optimizer's step."""

    def make_agent(self, data=None, **changes):
        """Agent with parameters large enough that nothing is near zero -> agent, args."""
        args = self.script.Args(**METHOD | self.method | changes)
        torch.manual_seed(0)
        agent = self.script.Agent(data or self.data, args).double()
        with torch.no_grad():
            for parameter in agent.parameters():
                parameter.normal_(0, 0.4)
            for net in (agent.q, agent.q_target):  # now the one twin is the smaller, now the other
                net.w_3.sub_(net.w_3.mean(1, keepdim=True))
                net.b_3.zero_()
        return agent, args

    def make_contexts(self, seed):
        return [make_context(seed + 10 * i) for i in range(self.contexts)]

    def slow_update(self, agent, opts, contexts, segment, best, args):
        """One update of a copy of the agent by optimizers of its own -> metrics."""
        z = torch.stack([self.embedding(agent.encoder, rows) for rows in contexts[0]]).detach()
        encoder, metrics = self.slow_encoder(agent, opts, contexts, segment, args)
        sums = slow_actor_critic(agent, z, segment, best, args, 0.0)
        actor = agent.brac_alpha.item() * sums["divergence"] - sums["value"]
        gradients(encoder, agent.encoder)
        gradients(sums["q"], agent.q)
        gradients(actor, agent.shift)
        gradients(sums["behavior"], agent.behavior)
        opts["opt"].step()
        self.slow_after(agent, args)
        slow_multiplier_and_targets(agent, sums["divergence"], args)
        return {
            "losses/encoder": encoder,
            "losses/q": sums["q"],
            "losses/actor": actor,
            "losses/behavior": sums["behavior"],
            "stats/q_mean": sums["value"],
            "stats/divergence": sums["divergence"],
            "stats/brac_alpha": agent.brac_alpha,
            "z/between_std": sum(z[:, d].std() for d in range(args.z_dim)) / args.z_dim,
            **metrics,
        }

    def check_updates(self, updates=2, **changes):
        """Call it with `known_noise` in place."""
        agent, args = self.make_agent(**changes)
        twin = copy.deepcopy(agent)
        nets = [net for net, _ in self.own.values()]
        rest = [p for name, p in twin.named_parameters() if p.requires_grad and name.split(".")[0] not in nets]
        opts = {"opt": torch.optim.Adam(rest, args.lr)}
        for name, (net, rate) in self.own.items():
            opts[name] = torch.optim.Adam(getattr(twin, net).parameters(), getattr(args, rate))
        for k in range(updates):
            contexts, rest = self.make_contexts(k), (make_segment(100 + k, args), make_batch(200 + k))
            with decaying(twin.behavior, args):
                expected = self.slow_update(twin, opts, contexts, *rest, args)
            metrics = self.script.update(agent, TASK_IDS, *contexts, *rest, args)
            assert_same_update(agent, twin, metrics, expected)

    @pytest.mark.parametrize("case", [{}, {"target_noise": 1.0, "n_step": 1}])
    def test_two_updates_are_those_of_a_slow_recomputation(self, case, known_noise):
        self.check_updates(**case)

    def test_inputs_of_the_slow_recomputation_tell_alternatives_apart(self):
        """Twins differ in both directions."""
        agent, args = self.make_agent()
        batch, z = start(make_segment(100, args)), torch.tanh(make_context(0)[:, 0, :3])
        with torch.no_grad():
            for q in (agent.q, agent.q_target):
                assert 0 < (q(batch.obs, batch.act, z)[0] < q(batch.obs, batch.act, z)[1]).double().mean() < 1

    @pytest.mark.parametrize("target, expected", [(1e6, 0.0), (0.0, 3.0)])
    def test_multiplier_keeps_to_its_bounds(self, target, expected):
        agent, args = self.make_agent(brac_alpha_lr=1e4, brac_alpha_max=3.0, divergence_target=target)
        self.script.update(agent, TASK_IDS, *self.make_contexts(0), make_segment(0, args), make_batch(0), args)
        assert agent.brac_alpha == expected

    def test_log_std_is_clamped(self):
        check_clamps(self.make_agent()[0], [(-3, -5), (1, 2)])

    # ---- networks

    def sized_agent(self):
        changes = {"width": 64, "encoder_width": 48, "z_dim": 5}
        return self.script.Agent(self.data, self.script.Args(**METHOD | self.method | changes))

    def test_networks_have_the_asked_sizes_and_start_as_they_should(self):
        """The last layer of both policies all but at 0; the targets at the critics, which differ."""
        agent = self.sized_agent()
        layers = [layer for layer in agent.encoder.modules() if isinstance(layer, torch.nn.Linear)]
        assert [tuple(layer.weight.shape) for layer in layers] == self.encoder_shapes
        assert agent.q.w_2.shape == (2, 64, 64) and agent.shift.w_2.shape == agent.behavior.w_2.shape == (1, 64, 64)
        for net in (agent.shift, agent.behavior):
            assert 8e-4 < net.w_3.abs().max() <= 1e-3 and 0 < net.b_3.abs().max() <= 1e-3
        for target, source in zip(agent.q_target.parameters(), agent.q.parameters()):
            assert torch.equal(target, source) and not target.requires_grad and not torch.equal(source[0], source[1])

    @pytest.mark.parametrize("explore", [False, True])
    def test_adapted_policy_is_the_mean_action_at_the_embedding_of_the_real_transitions(self, explore):
        agent, _ = self.make_agent()
        context, obs = make_context(0), torch.randn(4, DATA.obs_dim).double()
        mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).double()
        agent.z_mean.copy_(vectors(0.3, -0.2, 0.7))
        act = self.script.adapt(agent, context, mask, explore)(obs, torch.zeros(4))
        z = self.script.embed(agent, context, mask)
        assert not z.requires_grad
        for row in range(4):
            rows = context[row][mask[row] == 1]
            expected = self.embedding(agent.encoder, rows) if len(rows) else agent.z_mean
            torch.testing.assert_close(z[row], expected)
            torch.testing.assert_close(act[row], torch.tanh(slow_policy(agent, obs[row], expected)[0].mean))
        assert (self.script.embed(agent, context[:, :0], mask[:, :0]) == agent.z_mean).all()

    def test_metric_loss_and_tanh_gaussian_vectors(self):
        loss = self.script.metric_loss(Z, torch.tensor([0, 0, 1, 1]))
        assert loss.item() == pytest.approx(1.2531530948, abs=1e-9)
        mean, std, pre = vectors([0.3], [0.5], [0.8])
        assert self.script.tanh_gaussian_logp(mean, std.log(), pre).item() == pytest.approx(-0.1442842320, abs=1e-10)

    # ---- training

    def watched(self, monkeypatch, folder, path, **changes):
        """Train on a file whose training tasks come in another order -> what each update was given, with the learning
        rates at that time, and the contexts of the evaluation."""
        monkeypatch.chdir(folder)
        with np.load(path) as file:
            arrays = dict(file)
        np.savez("numbered.npz", **arrays | {"train_ids": arrays["train_ids"][::-1]})
        updates, contexts, update, adapt = [], [], self.script.update, self.script.adapt

        def watch(agent, task_ids, *given):
            *given_contexts, segment, best, args = given
            rates = [float(getattr(agent, opt).param_groups[0]["lr"]) for opt in ("opt", *self.own)]
            parts = {"task_ids": self.tasks(task_ids), "contexts": given_contexts, "segment": segment, "best": best}
            updates.append(SimpleNamespace(**parts, rates=rates))
            return update(agent, task_ids, *given)

        def watch_adapt(agent, context, mask, explore, clone=False):
            contexts.append(context[..., 4][mask == 1])  # rewards
            return adapt(agent, context, mask, explore, clone)

        monkeypatch.setattr(self.script, "update", watch)
        monkeypatch.setattr(self.script, "adapt", watch_adapt)
        settings = {name: value for name, value in FAST.items() if name != "dual_lr"}
        self.script.train(self.script.Args(**settings | {"dataset": "numbered.npz"} | changes))
        return updates, contexts

    def test_training_sees_training_tasks_and_every_row_its_own_task(
        self, numbered, numbered_path, tmp_path, monkeypatch, **changes
    ):
        updates, contexts = self.watched(monkeypatch, tmp_path, numbered_path, **changes)
        assert len(updates) == 20 and set(torch.cat([u.task_ids for u in updates]).tolist()) == set(range(6))
        assert any(len(set(u.task_ids.tolist())) < 5 for u in updates)  # with replacement
        for u in updates:
            assert len(u.contexts) == self.contexts
            for context in u.contexts:
                assert context.shape == (5, 6, 7) and (context[..., 4] >= 0).all()
                task, episode, _ = origin(context[..., 4])
                assert (task == u.task_ids[:, None]).all() and (episode == episode[:, :1]).all()
            assert len({tuple(origin(context[..., 4])[1][:, 0].tolist()) for context in u.contexts}) == self.contexts
            check_segments(u.segment, u.task_ids, FAST)
        check_best([u.best.rew for u in updates], [u.task_ids for u in updates], numbered, FAST["anchor_share"])
        of_protocols = contexts[:20]  # one of each, but ten of online, five of np_online; then come those of pi_beta
        of_test, foreign, *_, of_training = of_protocols
        assert set(origin(of_test)[0].tolist()) == {6, 7, 8} and (of_test > 0).all() and (foreign < 0).all()
        assert set(origin(of_training)[0].tolist()) == set(range(6))

    def test_evaluation_is_that_of_slow_policies_and_critics(self, numbered, **changes):
        agent, args = self.make_agent(numbered, **changes)
        check_evaluation(self.script, agent, args, numbered, partial(self.embedding, agent.encoder))

    @pytest.mark.parametrize("decay", [True, False])
    def test_learning_rates_fall_in_the_second_half(self, decay, numbered_path, tmp_path, monkeypatch):
        rates = {"lr": 1e-3} | {rate: 1e-3 / (k + 2) for k, (_, rate) in enumerate(self.own.values()) if rate != "lr"}
        changes = rates | {"total_updates": 8, "lr_decay": decay}
        updates, _ = self.watched(monkeypatch, tmp_path, numbered_path, **changes)
        shares = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25] if decay else [1] * 8
        initial = np.array([rates[rate] for rate in ("lr", *(rate for _, rate in self.own.values()))])
        np.testing.assert_allclose([u.rates for u in updates], np.outer(shares, initial), rtol=1e-6)

    @pytest.mark.parametrize("wanted", [True, False])
    def test_update_is_compiled_if_asked(self, wanted, numbered_path, tmp_path, monkeypatch):
        compiled = []
        monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
        self.watched(monkeypatch, tmp_path, numbered_path, compile=wanted, total_updates=1)
        assert compiled == [self.script.update] * wanted

    def test_update_stays_on_the_device(self, **changes):
        args = self.script.Args(**METHOD | self.method | changes)
        agent = to_meta(self.script.Agent(self.data, args))
        rows = lambda *shape: torch.zeros(4, *shape, device="meta")
        best = dc.Batch(rows(5, 3), rows(5, 2), rows(5), rows(5, 3), rows(5))
        segment = dc.Segment(rows(5, 3, 3), rows(5, 3, 2), rows(5, 3), rows(5, 3, 3), rows(5, 3), rows(5))
        with OnDevice():
            metrics = self.script.update(agent, rows().long(), *[rows(6, 9)] * self.contexts, segment, best, args)
        assert all(value.device.type == "meta" for value in metrics.values())

    def test_learns_point_robot_on_the_shipped_data(self, tmp_path):
        check_learning(self.script, tmp_path)

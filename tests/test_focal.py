"""focal.py: its dual critic, and vectors of what several scripts share; the rest is in actor_critic_suite.py."""

import math

import pytest
import torch
from actor_critic_suite import TASK_IDS, ActorCriticSuite, Z, check_clamps, gradients, make_batch
from actor_critic_suite import slow_actor_critic, slow_embedding, slow_metric, slow_metrics
from actor_critic_suite import slow_multiplier_and_targets, slow_policy, start, take_steps, vectors
from conftest import origin, pattern, slow_net, uniform

import focal


def slow_fenchel(c_data, c_policy):
    return 1 - torch.log(1 + c_data.exp()) + torch.log(torch.log(1 + c_policy.exp()) + 1e-8)


def slow_dual_step(agent, opt, batch, z, args, noise, share):
    """One step of the dual critic -> loss, its values at the data before the step."""
    tasks, size = batch.rew.shape
    c_data, loss = torch.zeros(tasks, size).double(), 0.0
    for m in range(tasks):
        for b in range(size):
            obs, act = batch.obs[m, b], batch.act[m, b]
            policy, _ = slow_policy(agent, obs, z[m])
            pi_act = torch.tanh(policy.mean + policy.stddev * noise[m, b]).detach()
            c = slow_net(agent.dual, obs, act, z[m])[0]
            c_data[m, b] = c.detach()
            between = (pi_act + share[m, b] * (act - pi_act)).requires_grad_()
            slope = slow_net(agent.dual, obs, between, z[m])[0]
            if args.gp_mode == "gradient":
                (gradient,) = torch.autograd.grad(slope, between, create_graph=True)
                slope = torch.sqrt(1e-8 + sum(g**2 for g in gradient))
            excess = max(abs(slope) - 1, torch.tensor(0.0))
            divergence = slow_fenchel(c, slow_net(agent.dual, obs, pi_act, z[m])[0])
            loss = loss + (args.gp_weight * excess**2 - divergence) / (tasks * size)
    gradients(loss, agent.dual)
    opt.step()
    return loss, c_data


class TestFocal(ActorCriticSuite):
    script = focal
    method = {"gp_weight": 2.5, "dual_lr": 2**-5}

    def make_agent(self, data=None, **changes):
        agent, args = super().make_agent(data, **changes)
        if args.divergence == "dual":
            with torch.no_grad():  # values of both signs, slopes on both sides of 1
                last = agent.dual.net[-1]
                last.weight.sub_(last.weight.mean()).mul_(3)
                last.bias.fill_(-2.0)
        return agent, args

    def make_rest(self, seed, args):
        draws = args.dual_iters if args.divergence == "dual" else 1
        return *super().make_rest(seed, args), [make_batch(10 * seed + i) for i in range(draws - 1)]

    def slow_update(self, agent, opts, contexts, segment, bc_batch, more, args):
        batch, noise = start(segment), pattern(bc_batch.act.shape)
        z = torch.stack([slow_embedding(agent.encoder, rows) for rows in contexts[0]])
        metric = args.metric_weight * slow_metric(z, TASK_IDS.tolist())
        fixed, divergence_of, dual_loss = z.detach(), None, None
        if args.divergence == "dual":
            share = uniform(batch.rew[..., None].shape)
            for other in (batch, *more):
                dual_loss, c_data = slow_dual_step(agent, opts["dual_opt"], other, fixed, args, noise, share)

            def divergence_of(m, b, pi_act):
                return slow_fenchel(c_data[m, b], slow_net(agent.dual, batch.obs[m, b], pi_act, fixed[m])[0])

        sums = slow_actor_critic(agent, fixed, segment, bc_batch, args, args.entropy_weight, divergence_of)
        actor = agent.kl_coef.item() * sums["divergence"] - sums["value"] + args.entropy_weight * sums["logp"]
        gradients(metric, agent.encoder)
        gradients(sums["q"], agent.critic)
        gradients(actor, agent.residual)
        if args.divergence == "primal":
            gradients(sums["behavior"], agent.behavior)
        take_steps(opts)
        slow_multiplier_and_targets(agent, sums["divergence"], args)
        metrics = slow_metrics(agent, fixed, metric, actor, sums)
        return metrics if dual_loss is None else metrics | {"losses/dual": dual_loss}

    cases = [{}, {"target_noise": 0.5}, {"target_noise": 1.0, "n_step": 1}, {"entropy_weight": 0.3}]
    DUAL = [{"gp_mode": mode} for mode in ("gradient", "output")] + [{"dual_iters": 1, "entropy_weight": 0.3}]

    @pytest.mark.parametrize("case", DUAL)
    def test_dual_updates_equal_a_slow_recomputation(self, case, known_noise):
        self.own = {"dual_opt": ("dual", "dual_lr")}
        self.check_updates(divergence="dual", **case)

    def test_dual_policy_has_a_clamped_log_std(self):
        check_clamps(self.make_agent(divergence="dual")[0], [(None, -5), (None, 2)])

    def test_every_dual_step_sees_other_transitions(self, numbered_path, tmp_path, monkeypatch):
        changes = {"divergence": "dual", "dual_iters": 3, "total_updates": 10}
        updates, _ = self.watched(monkeypatch, tmp_path, numbered_path, **changes)
        assert len(updates) == 10
        for u in updates:
            (more,) = u.more
            assert len(more) == 2
            for rew in (batch.rew for batch in more):
                task, episode, _ = origin(rew)
                assert rew.shape == (5, 8) and (task == u.task_ids[:, None]).all() and (episode != episode[:, :1]).any()
            for one, other in zip([start(u.segment), *more], more):
                assert not torch.equal(one.rew, other.rew)

    def test_dual_evaluation_equals_a_slow_recomputation(self, numbered):
        self.test_evaluation_equals_a_slow_recomputation(numbered, divergence="dual")

    def test_dual_learning_rate_stays(self, numbered_path, tmp_path, monkeypatch):
        changes = {"divergence": "dual", "dual_iters": 1, "dual_lr": 2e-3, "total_updates": 8}
        updates, _ = self.watched(monkeypatch, tmp_path, numbered_path, **changes)
        assert [u.rates["dual_opt"] for u in updates] == [2e-3] * 8
        assert updates[-1].rates["opt"] == pytest.approx(0.25e-3)

    @pytest.mark.parametrize("case", [{}, {"divergence": "dual"}, {"divergence": "dual", "gp_mode": "output"}])
    def test_update_stays_on_the_device(self, case):
        super().test_update_stays_on_the_device(**case)


# ---- what several scripts share ----------------------------------------------------------


def test_log_density_equals_a_hand_made_value():
    mean, std, pre = vectors([0.3], [0.5], [0.8])
    assert focal.Gaussian(mean, std.log()).log_prob(pre).item() == pytest.approx(-0.1442842320, abs=1e-10)


@pytest.mark.parametrize(
    "z, tasks, expected",
    [
        (Z, [0, 0, 1, 1], 1.2531530948),
        (Z, [0, 1, 2, 3], 3.5162509533),
        (torch.zeros(2, 2).double(), [0, 0], 0.0315911854),
        (torch.zeros(2, 2).double(), [0, 1], 9.99000999),
        (torch.tanh(torch.arange(18).double().reshape(6, 3) / 6 - 1.5), [0, 0, 1, 1, 2, 2], 1.8120708194),
    ],
)
def test_metric_loss_equals_hand_made_values(z, tasks, expected):
    assert focal.metric_loss(z, torch.tensor(tasks)).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "c_data, c_policy, expected",
    [(0, 0, -0.0596600867), (1, -1, -1.473978031), (-1, 1, 0.9592522006), (math.log(math.e - 1),) * 2 + (1e-8,)],
)
def test_dual_divergence_equals_hand_made_values(c_data, c_policy, expected):
    value = focal.dual_divergence(*vectors(c_data, c_policy))
    assert value.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("mode, value, expected", [("gradient", None, 80), ("output", -2.0, 5), ("output", 0.5, 0)])
def test_dual_penalty_equals_hand_made_values(mode, value, expected):
    def dual(x, z):  # its slope in the action is 5 everywhere, or its value is given
        return 9 * x[..., :1] + 3 * x[..., 1:2] + 4 * x[..., 2:] if value is None else torch.full((2, 3, 1), value)

    obs, act = torch.randn(2, 3, 1).double(), torch.randn(2, 3, 2).double()
    penalty = focal.dual_penalty(dual, obs, act, None, mode)
    assert 5 * penalty.item() == pytest.approx(expected, abs=1e-6)

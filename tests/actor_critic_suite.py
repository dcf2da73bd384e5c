"""Tests that all scripts with the actor-critic of focal.py pass: whole updates against a slow recomputation, networks,
the data of a training, learning. A script's own test file adds what its encoder needs.

The slow update goes through tasks and transitions one by one in float64. It uses only a script's parameters.
"""

import copy
import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, OnDevice, origin, pattern, slow_layers, slow_net, slow_twin, to_meta
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform
from torch.utils._pytree import tree_map

import data_collect as dc

DATA = SimpleNamespace(obs_dim=3, act_dim=2, ctx_dim=9)
TASK_IDS = torch.tensor([4, 7, 4, 2])
METHOD = {"width": 16, "encoder_width": 16, "z_dim": 3, "lr": 0.01, "tau": 0.1, "gamma": 0.9, "reward_scale": 3.0}
METHOD |= {"metric_weight": 7.0, "kl_coef": 1.75, "kl_coef_lr": 0.3, "kl_target": 0.2}
METHOD |= {"kl_coef_max": 100.0, "n_step": 3}
FAST = {"env": "point-robot", "device": "cpu", "width": 16, "encoder_width": 16, "z_dim": 3, "total_updates": 20}
FAST |= {"log_every": 20, "eval_every": 20, "save_every": 20, "final_episodes": 3, "meta_batch": 5, "batch_size": 8}
FAST |= {"context_size": 6, "lr": 1e-3, "run_dir": "runs", "gamma": 0.5, "n_step": 3, "bc_top_fraction": 0.4}


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float64)


Z = vectors((0.5, 0.5), (0.5, 0.3), (-0.5, -0.5), (-0.3, -0.5))  # for the vectors of the metric loss


# ---- inputs of an update ----------------------------------------------------------------


def make_batch(seed, tasks=len(TASK_IDS), size=4):
    """Every third transition terminates; two actions lie at the bounds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.empty(tasks, size, *shape, dtype=torch.float64).normal_(generator=generator)

    act = normal(DATA.act_dim).clamp(-0.9, 0.9)
    act[0, 0], act[1, 2, 1] = torch.tensor([1.0, -0.9995]), -1.0
    term = (torch.arange(tasks * size).reshape(tasks, size) % 3 == 0).double()
    return dc.Batch(normal(DATA.obs_dim), act, normal(), normal(DATA.obs_dim), term)


def make_segment(seed, args, tasks=len(TASK_IDS), size=4):
    """Segments of 1 to n_step transitions, then repetitions of the last one; the task itself ended every other one."""
    number, step = torch.arange(tasks * size).reshape(tasks, size), torch.arange(args.n_step)
    length = 1 + number % args.n_step
    pick = number[..., None] * args.n_step + torch.minimum(step, length[..., None] - 1)
    batch = make_batch(seed, tasks, size * args.n_step)
    parts = (x.flatten(0, 1)[pick] for x in batch[:4])
    discount = args.gamma ** step.double() * (step < length[..., None])
    return dc.Segment(*parts, discount, args.gamma ** length.double() * (number % 2))


def start(segment):
    """The first transitions -> Batch without `term`."""
    return dc.Batch(*(x[:, :, 0] for x in segment[:4]), None)


def make_context(seed):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.empty(len(TASK_IDS), 3, DATA.ctx_dim, dtype=torch.float64).normal_(generator=generator)


# ---- the slow update --------------------------------------------------------------------


def slow_embedding(encoder, context):
    """context [K, ctx_dim] -> z [z_dim]."""
    return sum(torch.tanh(slow_layers(encoder.net, row)) for row in context) / len(context)


def slow_metric(z, tasks):
    """Root distance of each pair of one task, inverse distance of each pair of two, averaged apart."""
    pull, push, near, far = 0.0, 0.0, 0, 0
    for i in range(len(z)):
        for j in range(i + 1, len(z)):
            distance = sum((z[i, d] - z[j, d]) ** 2 for d in range(z.shape[1])) / z.shape[1]
            if tasks[i] == tasks[j]:
                pull, near = pull + torch.sqrt(distance + 0.001), near + 1
            else:
                push, far = push + 1 / (distance + 0.1), far + 1
    return pull / (near + 0.001) + push / (far + 0.001)


def slow_policy(agent, obs, z):
    """Policy and behavior policy at one obs -> two normal distributions before the tanh. The second is None if the
    agent has no behavior policy."""
    mean, log_std = slow_net(agent.residual, obs, z).chunk(2)
    if agent.behavior is None:
        return Normal(mean, log_std.clamp(-5, 2).exp()), None
    mean_b, log_std_b = slow_net(agent.behavior, obs, z).chunk(2)
    log_std_b = log_std_b.clamp(-3, 1)
    log_std = torch.clamp(log_std_b.detach() + log_std, -5, 2)
    return Normal(mean_b.detach() + mean, log_std.exp()), Normal(mean_b, log_std_b.exp())


def slow_logp(normal, act):
    """Log-density of the squashed action."""
    return TransformedDistribution(Independent(normal, 1), TanhTransform(cache_size=1)).log_prob(act)


def gradients(loss, module):
    """Leave the gradient of a loss in the parameters of a module."""
    parameters = list(module.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)):
        parameter.grad = grad


def slow_q(agent, obs, act, z, args):
    """-> the values of both critics at one row."""
    return [value[0] for value in slow_twin(agent.critic, obs, act, z)]


def slow_target(agent, z, obs, rewards, terminated, args, entropy_weight, noise):
    """The rewards of a segment [n], then the value at the obs after them -> scalar. With an entropy, the next action is
    always a sample."""
    policy, _ = slow_policy(agent, obs, z)
    act = torch.tanh(policy.mean + policy.stddev * noise * (1.0 if entropy_weight else args.target_noise))
    value = min(slow_twin(agent.critic_target, obs, act, z))[0]
    if entropy_weight:
        value = value - entropy_weight * slow_logp(policy, act)
    target = 0.0 if terminated else value.detach()
    for rew in reversed(rewards):
        target = args.reward_scale * rew + args.gamma * target
    return target


def slow_actor_critic(agent, z, segment, bc_batch, args, entropy_weight, divergence_of=None):
    """Losses of critic, behavior policy and policy at fixed z [M, z_dim] -> dict of means with graph. divergence_of:
    (m, b, action of the policy) -> estimate that replaces the closed form."""
    tasks, size, _ = segment.rew.shape
    noise, sums = pattern(bc_batch.act.shape), dict.fromkeys(("q", "behavior", "divergence", "value", "logp"), 0.0)
    for m in range(tasks):
        for b in range(size):
            obs, act = segment.obs[m, b, 0], segment.act[m, b, 0]
            end = int((segment.discount[m, b] > 0).sum())
            way = segment.next_obs[m, b, end - 1], list(segment.rew[m, b, :end]), segment.bootstrap[m, b] == 0
            target = slow_target(agent, z[m], *way, args, entropy_weight, noise[m, b])
            sums["q"] += sum((value - target) ** 2 for value in slow_q(agent, obs, act, z[m], args))
            policy, behavior = slow_policy(agent, obs, z[m])
            pi_act = torch.tanh(policy.mean + policy.stddev * noise[m, b])
            sums["value"] += min(slow_q(agent, obs, pi_act, z[m], args))
            if entropy_weight:
                sums["logp"] += slow_logp(policy, pi_act)
            if behavior is not None:
                _, fitted = slow_policy(agent, bc_batch.obs[m, b], z[m])
                sums["behavior"] -= slow_logp(fitted, bc_batch.act[m, b].clamp(-0.999, 0.999))
                fixed = Normal(behavior.mean.detach(), behavior.stddev.detach())
                sums["divergence"] += kl_divergence(policy, fixed).sum()
            elif divergence_of:
                sums["divergence"] += divergence_of(m, b, pi_act)
    return {name: value / (tasks * size) for name, value in sums.items()}


def take_steps(opts):
    """The steps that end an update."""
    for name in ("opt", "behavior_opt"):
        if name in opts:
            opts[name].step()


def slow_multiplier_and_targets(agent, divergence, args, critic="critic"):
    """kl_coef moves towards its target within its bounds, target networks move towards the critics."""
    with torch.no_grad():
        moved = agent.kl_coef + args.kl_coef_lr * (divergence - args.kl_target)
        agent.kl_coef.fill_(min(max(float(moved), 0.0), args.kl_coef_max))
        target, source = agent.get_submodule(f"{critic}_target"), agent.get_submodule(critic)
        for target, source in zip(target.parameters(), source.parameters()):
            target.copy_((1 - args.tau) * target + args.tau * source)


def slow_metrics(agent, z, encoder, actor, sums):
    """What an update reports: losses of encoder and policy, `sums` of slow_actor_critic, deviation of z [M, z_dim]."""
    return {
        "losses/encoder": encoder,
        "losses/q": sums["q"],
        "losses/actor": actor,
        **({"losses/behavior": sums["behavior"]} if agent.behavior is not None else {}),
        "stats/q_mean": sums["value"],
        "stats/divergence": sums["divergence"],
        "stats/kl_coef": agent.kl_coef,
        "z/between_std": sum(z[:, d].std() for d in range(z.shape[1])) / z.shape[1],
    }


def assert_same_update(agent, twin, metrics, expected):
    """Metrics, gradients, parameters and buffers agree, and the same parameters have no gradient."""
    assert metrics.keys() == expected.keys()
    for tag, value in metrics.items():
        assert value.shape == () and not value.requires_grad, tag
        assert value.item() == pytest.approx(torch.as_tensor(expected[tag]).item(), rel=1e-7, abs=1e-7), tag
    for name, parameter in agent.named_parameters():
        other = twin.get_parameter(name)
        if other.grad is None:
            assert parameter.grad is None, name
        else:
            # without noise nothing moves unicorn's log_var, and a softmax ignores corro's bias
            assert (other.grad != 0).any() or name in ("encoder.log_var", "aggregator.score.bias"), name
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-6, atol=1e-8, msg=lambda m: f"{name}: {m}")
        torch.testing.assert_close(parameter, other, rtol=1e-7, atol=1e-8, msg=lambda m: f"{name}: {m}")
    for name, buffer in agent.named_buffers():
        close = partial(torch.testing.assert_close, equal_nan=True, msg=lambda m: f"{name}: {m}")
        close(buffer, twin.get_buffer(name), rtol=1e-9, atol=0)


# ---- checks -----------------------------------------------------------------------------


def fill_last(net, bias):
    """Make an MLP constant."""
    with torch.no_grad():
        net.net[-1].weight.zero_()
        net.net[-1].bias.fill_(bias)


def check_clamps(agent, expected):
    """expected: (log_std of the behavior policy or None, of the policy) where both networks ask for -9, and for 9."""
    for sign, (of_behavior, of_policy) in zip((-1, 1), expected):
        for net in filter(None, (agent.residual, agent.behavior)):
            fill_last(net, 9.0 * sign)
        pi, pi_beta = agent.policies(torch.randn(4, 5, 3).double(), torch.randn(4, 3).double())
        assert (pi.log_std == of_policy).all() and (pi.mean == (9 if pi_beta is None else 18) * sign).all()
        assert pi_beta is None or (pi_beta.log_std == of_behavior).all()


def check_segments(segment, task_ids, args):
    """They are of the rows' own tasks and of several episodes, as long and as discounted as asked."""
    assert segment.rew.shape == (*segment.bootstrap.shape, args["n_step"])
    task, episode, _ = origin(segment.rew)
    assert (task == task_ids[:, None, None]).all() and (episode != episode[:, :1]).any()
    powers = [args["gamma"] ** k for k in range(args["n_step"] + 1)]
    assert set(segment.discount.flatten().tolist()) <= {0, *powers[:-1]} and (segment.discount[..., 0] == 1).all()
    assert set(segment.bootstrap.flatten().tolist()) <= {0, *powers[1:]} and (segment.bootstrap == powers[-1]).any()


def check_best(batches, tasks, data, share):
    """The batches, with the tasks [M] of each, cover exactly the share of each task's transitions that belongs to its
    episodes of highest return."""
    seen, wanted = set(), set()
    for rew, task_ids in zip(batches, tasks):
        task, episode, step = origin(rew)
        assert (task == task_ids[:, None]).all()
        seen |= set(zip(*(x.flatten().tolist() for x in (task, episode, step))))
    for task in range(6):
        order = sorted(range(4), key=lambda episode: -data.episode_returns[task, episode])
        ranked = [(task, episode, step) for episode in order for step in range(data.lengths[task, episode])]
        wanted |= set(ranked[: math.ceil(share * len(ranked))])
    assert seen <= wanted and len(seen) > 0.9 * len(wanted)


def check_evaluation(script, agent, args, data, infer, nothing=None, q=slow_q):
    """Returns of policy and behavior policy and the critic's error equal a slow recomputation. z = infer(transitions of
    a context); without a transition z is `nothing`, by default the mean over the training episodes."""
    agent = agent.float()  # as the data
    if nothing is None:
        places = [(t, n) for t in data.train_ids for n in range(data.lengths.shape[1]) if data.lengths[t, n] > 0]
        nothing = sum(infer(data.episodes[t, n, : data.lengths[t, n], :-1]) for t, n in places) / len(places)

    def latents(context, mask):
        return [infer(rows[real == 1]) if real.any() else nothing for rows, real in zip(context, mask)]

    def slow_adapt(which, context, mask, explore):
        z = latents(context, mask)
        means = lambda obs: [slow_policy(agent, *row)[which].mean for row in zip(obs, z)]  # noqa: E731
        return lambda obs, rew: torch.tanh(torch.stack(means(obs))).detach()

    def slow_value(context, mask, obs):
        def of(obs, z):
            act = torch.tanh(slow_policy(agent, obs, z)[0].mean)
            return min(q(agent, obs, act, z, args)) / args.reward_scale

        return torch.stack([torch.stack([of(o, z) for o in pair]) for pair, z in zip(obs, latents(context, mask))])

    traced = []
    expected = dc.evaluate(data, partial(slow_adapt, 0), ("train", "iid", "zero_shot"), 3, traced)
    expected |= dc.q_error(traced[1], slow_value, args.gamma)
    if agent.behavior is not None:
        bc = dc.evaluate(data, partial(slow_adapt, 1), ("iid",), 3)
        assert abs(bc["eval/iid/return"] - expected["eval/iid/return"]) > 0.1
        expected |= {tag.replace("iid", "bc"): value for tag, value in bc.items()}
    found = script.evaluate_all(agent, data, args, ("train", "iid", "zero_shot"), 3)
    assert {"z/nearest_task_acc", "z/probe_r2"} <= {tag for tag in found if tag.startswith("z/")}
    assert {tag: value for tag, value in found.items() if tag[:2] != "z/"} == pytest.approx(
        expected, rel=1e-4, abs=1e-4
    )


def train_on_point_robot(script, folder, **changes):
    """On the shipped data: random -20.3, data -6.8, expert -4.7."""
    path = str(ROOT / "datasets" / "point-robot.npz")
    settings = {"env": "point-robot", "dataset": path, "device": "cpu", "run_dir": str(folder)}
    settings |= {"width": 64, "encoder_width": 64, "batch_size": 16, "context_size": 20, "total_updates": 400}
    settings |= {"log_every": 200, "eval_every": 400, "save_every": 400, "lr": 3e-3, "reward_scale": 1.0, "n_step": 5}
    return script.train(script.Args(**settings | changes))


def check_learning(script, folder, **changes):
    """With so small a kl_coef a wrong critic leads the policy away from the data. Four seeds of three scripts: policy
    -5.6 to -5.9, behavior policy -5.3 to -5.6, error of the critic -0.1 to -0.2."""
    result = train_on_point_robot(script, folder, kl_coef=0.1, **changes)
    assert result["eval/iid/return"] > -6.2  # batches of other tasks -6.4, a flipped sign in the policy loss -19
    assert result["eval/bc/return"] > -5.8  # fitted to all data -6.1
    assert abs(result["eval/iid/q_error"]) < 0.5  # rewards of the segment alone 0.8, value at its first next_obs -1.7
    assert result["z/nearest_task_acc"] > 0.2 and result["z/probe_r2"] > 0.8  # chance 0.03, 0


# ---- a script's tests -------------------------------------------------------------------


class ActorCriticSuite:
    """Base of a test class, which names the script and recomputes the encoder's loss."""

    script = None
    data = DATA  # sizes
    method = {}  # arguments beside METHOD
    encoder_shapes = [(48, 9), (48, 48), (5, 48)]  # of its layers with 48 hidden units, z_dim 5
    # optimizers besides behavior_opt, and opt for all other networks: name -> (its networks, the argument that is its
    # learning rate)
    own = {}
    critic, critic_dim = "critic", 1  # name of the twin network, size of its value
    contexts = 1  # number of contexts that an update is given
    value_std = 8.0  # standard deviation that discounted returns get where the family has no reward scale
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

    def make_args(self, **changes):
        return self.script.Args(**METHOD | self.method | changes)

    def make_agent(self, data=None, **changes):
        """Agent with parameters large enough that nothing is near zero -> agent, args."""
        args = self.make_args(**changes)
        torch.manual_seed(0)
        agent = self.script.Agent(data or self.data, args).double()
        with torch.no_grad():
            for parameter in agent.parameters():
                parameter.normal_(0, 0.4)
            if data is not None:
                agent.encoder.net[0].weight[:, 4] /= 1000  # the rewards of `numbered` are large
            nets = [agent.get_submodule(self.critic + suffix).nets for suffix in ("", "_target")]
            for net in (*nets[0], *nets[1]):  # either twin is the smaller one at times
                net.net[-1].weight.sub_(net.net[-1].weight.mean())
                net.net[-1].bias.zero_()
        return agent, args

    def make_contexts(self, seed):
        return [make_context(seed + 10 * i) for i in range(self.contexts)]

    def make_rest(self, seed, args):
        """What an update is given between contexts and args: segment, bc_batch, and what a script may add."""
        return make_segment(100 + seed, args), make_batch(200 + seed)

    def update(self, agent, contexts, rest, args, task_ids=TASK_IDS):
        return self.script.update(agent, task_ids, *contexts, *rest, args)

    def slow_update(self, agent, opts, contexts, segment, bc_batch, args):
        """One update of a copy of the agent by optimizers of its own -> metrics."""
        z = torch.stack([self.embedding(agent.encoder, rows) for rows in contexts[0]]).detach()
        encoder, metrics = self.slow_encoder(agent, opts, contexts, segment, args)
        sums = slow_actor_critic(agent, z, segment, bc_batch, args, 0.0)
        actor = agent.kl_coef.item() * sums["divergence"] - sums["value"]
        gradients(encoder, agent.encoder)
        gradients(sums["q"], agent.critic)
        gradients(actor, agent.residual)
        gradients(sums["behavior"], agent.behavior)
        take_steps(opts)
        self.slow_after(agent, args)
        slow_multiplier_and_targets(agent, sums["divergence"], args)
        return slow_metrics(agent, z, encoder, actor, sums) | metrics

    def check_updates(self, updates=2, **changes):
        """Call it with `known_noise` in place."""
        agent, args = self.make_agent(**changes)
        twin = copy.deepcopy(agent)
        nets = ["behavior", *(net for nets, _ in self.own.values() for net in nets.split())]
        rest = [p for name, p in twin.named_parameters() if p.requires_grad and name.split(".")[0] not in nets]
        opts = {"opt": torch.optim.Adam(rest, args.lr)} if rest else {}
        if twin.behavior is not None:
            decay = {"weight_decay": args.bc_weight_decay}
            opts["behavior_opt"] = torch.optim.AdamW(twin.behavior.parameters(), args.lr, **decay)
        betas = getattr(args, "gan_momentum", 0.9), 0.999
        for name, (nets, rate) in self.own.items():
            params = [p for net in nets.split() for p in getattr(twin, net).parameters()]
            opts[name] = torch.optim.Adam(params, getattr(args, rate), betas)
        for k in range(updates):
            contexts, rest = self.make_contexts(k), self.make_rest(k, args)
            expected = self.slow_update(twin, opts, contexts, *rest, args)
            assert_same_update(agent, twin, self.update(agent, contexts, rest, args), expected)

    cases = [{}, {"target_noise": 1.0, "n_step": 1}]  # arguments of the updates that are recomputed

    def test_updates_equal_a_slow_recomputation(self, known_noise):
        for case in self.cases:
            self.check_updates(**case)

    def test_a_single_task_gives_finite_numbers(self):
        """--meta-batch 1: nothing to deviate from."""
        agent, args = self.make_agent()
        contexts, rest = tree_map(lambda x: x[:1], (self.make_contexts(0), self.make_rest(0, args)))
        metrics = self.update(agent, contexts, rest, args, TASK_IDS[:1])
        assert all(value.isfinite() for value in (*metrics.values(), *(p.sum() for p in agent.parameters())))

    @pytest.mark.parametrize("target, expected", [(1e6, 0.0), (0.0, 3.0)])
    def test_kl_coef_keeps_to_its_bounds(self, target, expected):
        agent, args = self.make_agent(kl_coef_lr=1e4, kl_coef_max=3.0, kl_target=target)
        self.update(agent, self.make_contexts(0), self.make_rest(0, args), args)
        assert agent.kl_coef == expected

    def test_log_std_is_clamped(self):
        check_clamps(self.make_agent()[0], [(-3, -5), (1, 2)])

    # ---- networks

    def sized_agent(self):
        changes = {"width": 64, "encoder_width": 48, "z_dim": 5}
        return self.script.Agent(self.data, self.make_args(**changes))

    def test_networks_start_as_they_should(self):
        """They have the asked sizes; both policies start near 0; the targets equal the critics, which differ."""
        agent = self.sized_agent()
        layers = [layer for layer in agent.encoder.modules() if isinstance(layer, torch.nn.Linear)]
        assert [tuple(layer.weight.shape) for layer in layers] == self.encoder_shapes
        critic, target = (agent.get_submodule(self.critic + suffix) for suffix in ("", "_target"))
        sizes = self.critic_dim, self.critic_dim, 4, 4
        for net, out_dim in zip((*critic.nets, agent.residual, agent.behavior), sizes):
            assert net.net[3].weight.shape == (64, 64) and net.net[6].weight.shape == (out_dim, 64)
        for net in (agent.residual, agent.behavior):
            weight, bias = net.net[-1].parameters()
            assert -1e-3 <= weight.min() < -8e-4 and 8e-4 < weight.max() <= 1e-3 and 0 < bias.abs().max() <= 1e-3
        for follower, leader in zip(target.parameters(), critic.parameters()):
            assert torch.equal(follower, leader) and not follower.requires_grad
        assert not any(map(torch.equal, *(net.parameters() for net in critic.nets)))

    @pytest.mark.parametrize("explore", [False, True])
    def test_adapted_policy_acts_on_the_real_transitions(self, explore):
        """With its mean action; without a transition z is z_mean."""
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
            given_contexts, (segment, bc_batch, *more, _) = given[: self.contexts], given[self.contexts :]
            rates = {name: opt.param_groups[0]["lr"] for name, opt in dc.optimizers(agent).items()}
            parts = {"contexts": given_contexts, "segment": segment, "bc_batch": bc_batch, "more": more, "rates": rates}
            updates.append(SimpleNamespace(task_ids=self.tasks(task_ids), **parts))
            return update(agent, task_ids, *given)

        def watch_adapt(agent, context, mask, explore, **more):
            contexts.append(context[..., 4][mask == 1])  # rewards
            return adapt(agent, context, mask, explore, **more)

        monkeypatch.setattr(self.script, "update", watch)
        monkeypatch.setattr(self.script, "adapt", watch_adapt)
        self.script.train(self.script.Args(**FAST | {"dataset": "numbered.npz"} | changes))
        return updates, contexts

    def test_reward_scale_follows_the_data(self, numbered, numbered_path, tmp_path, monkeypatch):
        """Where neither a flag nor the family's entry gives one."""
        monkeypatch.setattr(self.script, "ENV_DEFAULTS", {"": self.script.ENV_DEFAULTS[""]})
        self.watched(monkeypatch, tmp_path, numbered_path, reward_scale=None)
        (path,) = tmp_path.glob("runs/point-robot/*/*/args.json")
        args = json.loads(path.read_text())["args"]
        assert args["reward_scale"] == pytest.approx(self.value_std / numbered.value_std(args["gamma"]))

    def test_every_row_sees_its_own_training_task(self, numbered, numbered_path, tmp_path, monkeypatch, **changes):
        updates, contexts = self.watched(monkeypatch, tmp_path, numbered_path, **changes)
        assert len(updates) == 20 and set(torch.cat([u.task_ids for u in updates]).tolist()) == set(range(6))
        assert any(len(set(u.task_ids.tolist())) < 5 for u in updates)  # with replacement
        episodes = set()
        for u in updates:
            assert len(u.contexts) == self.contexts
            for context in u.contexts:
                assert context.shape == (5, 6, 7) and (context[..., 4] >= 0).all()
                task, episode, _ = origin(context[..., 4])
                assert (task == u.task_ids[:, None]).all() and (episode == episode[:, :1]).all()
                episodes |= set(episode[:, 0].tolist())
            assert len({tuple(origin(context[..., 4])[1][:, 0].tolist()) for context in u.contexts}) == self.contexts
            check_segments(u.segment, u.task_ids, FAST)
        assert episodes == {0, 1, 2, 3}
        check_best([u.bc_batch.rew for u in updates], [u.task_ids for u in updates], numbered, FAST["bc_top_fraction"])
        of_protocols = contexts[:20]  # one each, except ten of online, five of online_random_start; then pi_beta's
        of_test, foreign, *_, of_training = of_protocols
        assert set(origin(of_test)[0].tolist()) == {6, 7, 8} and (of_test > 0).all() and (foreign < 0).all()
        assert set(origin(of_training)[0].tolist()) == set(range(6))

    def test_evaluation_equals_a_slow_recomputation(self, numbered, **changes):
        agent, args = self.make_agent(numbered, **changes)
        check_evaluation(self.script, agent, args, numbered, partial(self.embedding, agent.encoder))

    @pytest.mark.parametrize("decay", [True, False])
    def test_learning_rates_fall_in_the_second_half(self, decay, numbered_path, tmp_path, monkeypatch):
        rates = {"lr": 1e-3} | {rate: 1e-3 / (k + 2) for k, (_, rate) in enumerate(self.own.values()) if rate != "lr"}
        changes = rates | {"total_updates": 8, "lr_decay": decay}
        updates, _ = self.watched(monkeypatch, tmp_path, numbered_path, **changes)
        initial = {"opt": 1e-3, "behavior_opt": 1e-3} | {opt: rates[rate] for opt, (_, rate) in self.own.items()}
        shares = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25] if decay else [1] * 8
        for u, share in zip(updates, shares, strict=True):
            assert u.rates == pytest.approx({opt: share * initial[opt] for opt in u.rates})

    def test_update_stays_on_the_device(self, **changes):
        args = self.make_args(**changes)
        agent = to_meta(self.script.Agent(self.data, args))
        inputs = tree_map(lambda x: x.float().to("meta"), (*self.make_contexts(0), *self.make_rest(0, args)))
        with OnDevice():
            metrics = self.script.update(agent, TASK_IDS.to("meta"), *inputs, args)
        assert all(value.device.type == "meta" for value in metrics.values())

    def test_learns_point_robot(self, tmp_path):
        """On the shipped data."""
        check_learning(self.script, tmp_path)

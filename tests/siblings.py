"""What the scripts whose actor-critic is that of focal.py are tested for alike, FOCAL itself, CSRO, ER-TRL, FOCAL++,
IDAQ, UNICORN: whole updates against a slow recomputation, networks, the data of a training, learning. Their own tests
have what their encoders add; those of CORRO take single parts.

The slow update goes through tasks and transitions one by one in float64; of a script it uses the parameters alone.
"""

import contextlib
import copy
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, OnDevice, origin, pattern, slow_net, to_meta
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import data_collect as dc

DATA = SimpleNamespace(obs_dim=3, act_dim=2, ctx_dim=9)
TASK_IDS = torch.tensor([4, 7, 4, 2])
# float32, in which the optimizers keep it, holds this learning rate exactly
METHOD = {"width": 16, "encoder_width": 16, "z_dim": 3, "lr": 2**-7, "tau": 0.1, "gamma": 0.9, "reward_scale": 3.0}
METHOD |= {"metric_weight": 7.0, "brac_alpha": 1.75, "brac_alpha_lr": 0.3, "divergence_target": 0.2}
METHOD |= {"brac_alpha_max": 100.0, "n_step": 3}
FAST = {"env": "point-robot", "device": "cpu", "width": 16, "encoder_width": 16, "z_dim": 3, "total_updates": 20}
FAST |= {"log_every": 20, "eval_every": 20, "save_every": 20, "final_episodes": 3, "meta_batch": 5, "batch_size": 8}
FAST |= {"context_size": 6, "lr": 1e-3, "run_dir": "runs", "gamma": 0.5, "n_step": 3, "anchor_share": 0.4}


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float64)


Z = vectors((0.5, 0.5), (0.5, 0.3), (-0.5, -0.5), (-0.3, -0.5))  # of the vectors of the metric loss


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
    """Segments of 1 to n_step transitions, every other one of which the task itself ended; the last one is repeated."""
    number, step = torch.arange(tasks * size).reshape(tasks, size), torch.arange(args.n_step)
    length = 1 + number % args.n_step
    pick = number[..., None] * args.n_step + torch.minimum(step, length[..., None] - 1)
    batch = make_batch(seed, tasks, size * args.n_step)
    parts = (x.flatten(0, 1)[pick] for x in batch[:4])
    weight = args.gamma ** step.double() * (step < length[..., None])
    return dc.Segment(*parts, weight, args.gamma ** length.double() * (number % 2))


def start(segment):
    """The first transitions -> Batch without `term`."""
    return dc.Batch(*(x[:, :, 0] for x in segment[:4]), None)


def make_context(seed):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.empty(len(TASK_IDS), 3, DATA.ctx_dim, dtype=torch.float64).normal_(generator=generator)


# ---- the slow update --------------------------------------------------------------------


def slow_embedding(encoder, context):
    """context [K, ctx_dim] -> z [z_dim]."""
    first, second, last = (layer for layer in encoder.net if hasattr(layer, "weight"))
    total = 0.0
    for row in context:
        for layer in (first, second):
            row = layer.weight @ row + layer.bias
            row = torch.where(row > 0, row, 0.0)
        total = total + torch.tanh(last.weight @ row + last.bias)
    return total / len(context)


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
    """Policy and behavior policy at one obs -> two normal distributions before the tanh; the second None without a
    behavior policy."""
    half, shift = DATA.act_dim, slow_net(agent.shift, obs, z)
    if agent.behavior is None:
        return Normal(shift[:half], shift[half:].clamp(-5, 2).exp()), None
    behavior = slow_net(agent.behavior, obs, z)
    log_std_b = behavior[half:].clamp(-3, 1)
    log_std = torch.clamp(log_std_b.detach() + shift[half:], -5, 2)
    return Normal(behavior[:half].detach() + shift[:half], log_std.exp()), Normal(behavior[:half], log_std_b.exp())


def slow_logp(normal, act):
    """Log-density of the squashed action."""
    return TransformedDistribution(Independent(normal, 1), TanhTransform(cache_size=1)).log_prob(act)


def gradients(loss, module):
    """Leave the gradient of a loss in the parameters of a module."""
    parameters = list(module.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)):
        parameter.grad = grad


def slow_target(agent, z, obs, rewards, terminated, args, entropy_weight, noise):
    """The rewards of a segment [n], then the value at the obs after them -> scalar. With an entropy, the next action is
    a sample whatever target_noise says."""
    policy, _ = slow_policy(agent, obs, z)
    act = torch.tanh(policy.mean + policy.stddev * noise * (1.0 if entropy_weight else args.target_noise))
    value = min(slow_net(agent.q_target, obs, act, z, member=e)[0] for e in range(2))
    if entropy_weight:
        value = value - entropy_weight * slow_logp(policy, act)
    target = 0.0 if terminated else value.detach()
    for rew in reversed(rewards):
        target = args.reward_scale * rew + args.gamma * target
    return target


def slow_actor_critic(agent, z, segment, best, args, entropy_weight, divergence_of=None):
    """Losses of critics, behavior policy and policy at fixed z [M, z_dim] -> dict of sums with graph. divergence_of:
    (m, b, action of the policy) -> estimate in place of the closed form."""
    tasks, size, _ = segment.rew.shape
    noise, sums = pattern(best.act.shape), dict.fromkeys(("q", "behavior", "divergence", "value", "logp"), 0.0)
    for m in range(tasks):
        for b in range(size):
            obs, act, _, _, _ = (x if x is None else x[m, b] for x in start(segment))
            end = int((segment.weight[m, b] > 0).sum())
            way = segment.next_obs[m, b, end - 1], list(segment.rew[m, b, :end]), segment.bootstrap[m, b] == 0
            target = slow_target(agent, z[m], *way, args, entropy_weight, noise[m, b])
            for e in range(2):
                sums["q"] += (slow_net(agent.q, obs, act, z[m], member=e)[0] - target) ** 2
            policy, behavior = slow_policy(agent, obs, z[m])
            pi_act = torch.tanh(policy.mean + policy.stddev * noise[m, b])
            sums["value"] += min(slow_net(agent.q, obs, pi_act, z[m], member=e)[0] for e in range(2))
            if entropy_weight:
                sums["logp"] += slow_logp(policy, pi_act)
            if behavior is not None:
                _, fitted = slow_policy(agent, best.obs[m, b], z[m])
                sums["behavior"] -= slow_logp(fitted, best.act[m, b].clamp(-0.999, 0.999))
                fixed = Normal(behavior.mean.detach(), behavior.stddev.detach())
                sums["divergence"] += kl_divergence(policy, fixed).sum()
            elif divergence_of:
                sums["divergence"] += divergence_of(m, b, pi_act)
    return {name: value / (tasks * size) for name, value in sums.items()}


def slow_multiplier_and_targets(agent, divergence, args):
    """brac_alpha towards its target within its bounds, target networks towards the critics."""
    with torch.no_grad():
        moved = agent.brac_alpha + args.brac_alpha_lr * (divergence - args.divergence_target)
        agent.brac_alpha.fill_(min(max(float(moved), 0.0), args.brac_alpha_max))
        for target, source in zip(agent.q_target.parameters(), agent.q.parameters()):
            target.copy_((1 - args.tau) * target + args.tau * source)


def slow_metrics(agent, z, encoder, actor, sums):
    """What an update reports: losses of encoder and policy, `sums` of slow_actor_critic, spread of z [M, z_dim]."""
    return {
        "losses/encoder": encoder,
        "losses/q": sums["q"],
        "losses/actor": actor,
        **({"losses/behavior": sums["behavior"]} if agent.behavior is not None else {}),
        "stats/q_mean": sums["value"],
        "stats/divergence": sums["divergence"],
        "stats/brac_alpha": agent.brac_alpha,
        "z/between_std": sum(z[:, d].std() for d in range(z.shape[1])) / z.shape[1],
    }


def assert_same_update(agent, twin, metrics, expected):
    """Metrics, gradients, parameters and buffers, or that there is no gradient."""
    assert metrics.keys() == expected.keys()
    for tag, value in metrics.items():
        assert value.shape == () and not value.requires_grad, tag
        assert value.item() == pytest.approx(expected[tag].item(), rel=1e-7, abs=1e-7), tag
    for name, parameter in agent.named_parameters():
        other = twin.get_parameter(name)
        if other.grad is None:
            assert parameter.grad is None, name
        else:
            assert (other.grad != 0).any() or name == "encoder.log_var", name  # without noise nothing moves unicorn's
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-6, atol=1e-8, msg=lambda m: f"{name}: {m}")
        torch.testing.assert_close(parameter, other, rtol=1e-7, atol=1e-8, msg=lambda m: f"{name}: {m}")
    for name, buffer in agent.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name), rtol=1e-9, atol=0, msg=lambda m: f"{name}: {m}")


@contextlib.contextmanager
def decaying(behavior, args):
    """In its block pi_beta (or None) takes a step of Adam; after it, the weight decay of the weights from before."""
    params = [] if behavior is None else list(behavior.parameters())
    decay = [args.lr * args.behavior_decay * p.detach() for p in params]
    yield
    for parameter, amount in zip(params, decay):
        parameter.data -= amount


# ---- checks -----------------------------------------------------------------------------


def check_clamps(agent, expected):
    """expected: (log_std of the behavior policy or None, of the policy) where both networks ask for -9, and for 9."""
    for sign, (of_behavior, of_policy) in zip((-1, 1), expected):
        with torch.no_grad():
            for net in (agent.shift, agent.behavior):
                if net is not None:
                    net.w_3.zero_()
                    net.b_3.fill_(9.0 * sign)
        mean, log_std, _, log_std_b = agent.policies(torch.randn(4, 5, 3).double(), torch.randn(4, 3).double())
        assert (log_std == of_policy).all() and (mean == (9 if log_std_b is None else 18) * sign).all()
        assert log_std_b is None or (log_std_b == of_behavior).all()


def check_segments(segment, task_ids, args):
    """Of the rows' own tasks, those of a row of several episodes; as long and as discounted as asked."""
    assert segment.rew.shape == (*segment.bootstrap.shape, args["n_step"])
    task, episode, _ = origin(segment.rew)
    assert (task == task_ids[:, None, None]).all() and (episode != episode[:, :1]).any()
    powers = [args["gamma"] ** k for k in range(args["n_step"] + 1)]
    assert set(segment.weight.flatten().tolist()) <= {0, *powers[:-1]} and (segment.weight[..., 0] == 1).all()
    assert set(segment.bootstrap.flatten().tolist()) <= {0, *powers[1:]} and (segment.bootstrap == powers[-1]).any()


def check_best(batches, tasks, data, share):
    """batches of the tasks [M] of each update: all of their share of each task's transitions, those of its episodes of
    highest return."""
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


def check_evaluation(script, agent, args, data, infer, nothing=None):
    """Returns of policy and behavior policy, and the critic's error, against those of slow policies and critics at
    z = infer(transitions of a context), without any `nothing`, by default the mean over the training episodes."""
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
            return min(slow_net(agent.q, obs, act, z, member=e)[0] for e in range(2)) / args.reward_scale

        return torch.stack([torch.stack([of(o, z) for o in pair]) for pair, z in zip(obs, latents(context, mask))])

    traced = []
    expected = dc.evaluate(data, partial(slow_adapt, 0), ("train", "iid", "zero_shot"), 3, traced)
    expected |= dc.q_error(traced[1], slow_value, args.gamma)
    if agent.behavior is not None:
        clone = dc.evaluate(data, partial(slow_adapt, 1), ("iid",), 3)
        assert abs(clone["eval/iid/return"] - expected["eval/iid/return"]) > 0.1
        expected |= {tag.replace("iid", "clone"): value for tag, value in clone.items()}
    found = script.evaluate_all(agent, data, args, ("train", "iid", "zero_shot"), 3)
    assert {"z/nearest_task_acc", "z/probe_r2"} <= {tag for tag in found if tag.startswith("z/")}
    assert {tag: value for tag, value in found.items() if tag[:2] != "z/"} == pytest.approx(
        expected, rel=1e-4, abs=1e-4
    )


def train_on_point_robot(script, folder, **changes):
    """On the shipped data: random -20.3, data -6.8, expert -4.7."""
    path = ROOT / "datasets" / "point-robot.npz"
    if not path.is_file():
        pytest.skip("datasets/point-robot.npz is not there: python data_collect.py --env point-robot makes it")
    settings = {"env": "point-robot", "dataset": str(path), "device": "cpu", "run_dir": str(folder)}
    settings |= {"width": 64, "encoder_width": 64, "batch_size": 16, "context_size": 20, "total_updates": 400}
    settings |= {"log_every": 200, "eval_every": 400, "save_every": 400, "lr": 3e-3, "reward_scale": 1.0, "n_step": 5}
    return script.train(script.Args(**settings | changes))


def check_learning(script, folder, **changes):
    """brac_alpha is so small that the critics could lead the policy away from the data. Four seeds of three scripts:
    policy -5.6 to -5.9, behavior policy -5.3 to -5.6, error of the critic -0.1 to -0.2."""
    result = train_on_point_robot(script, folder, brac_alpha=0.1, **changes)
    assert result["eval/iid/return"] > -6.2  # batches of other tasks -6.4, a flipped sign in the policy loss -19
    assert result["eval/clone/return"] > -5.8  # fitted to all of the data -6.1
    assert abs(result["eval/iid/q_error"]) < 0.5  # rewards of the segment alone 0.8, value at its first next_obs -1.7
    assert result["z/nearest_task_acc"] > 0.2 and result["z/probe_r2"] > 0.8  # chance 0.03, 0


# ---- a script's tests -------------------------------------------------------------------


class Sibling:
    """Base of a test class: names the script and says how its encoder is trained."""

    script = None
    data = DATA  # sizes
    method = {}  # arguments beside METHOD
    encoder_shapes = [(48, 9), (48, 48), (5, 48)]  # of its layers with 48 hidden units, z_dim 5
    own = {}  # optimizer beside `opt`: (the network it trains, the argument that is its learning rate)
    contexts = 1  # that an update is given first
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

    def make_rest(self, seed, args):
        """What an update is given between contexts and args: segment, best, and what a script may add."""
        return make_segment(100 + seed, args), make_batch(200 + seed)

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
        return slow_metrics(agent, z, encoder, actor, sums) | metrics

    def check_updates(self, updates=2, **changes):
        """Call it with `known_noise` in place."""
        agent, args = self.make_agent(**changes)
        twin = copy.deepcopy(agent)
        nets = [net for net, _ in self.own.values()]
        rest = [p for name, p in twin.named_parameters() if p.requires_grad and name.split(".")[0] not in nets]
        opts = {"opt": torch.optim.Adam(rest, args.lr)}
        betas = getattr(args, "gan_momentum", 0.9), 0.999
        for name, (net, rate) in self.own.items():
            opts[name] = torch.optim.Adam(getattr(twin, net).parameters(), getattr(args, rate), betas)
        for k in range(updates):
            contexts, rest = self.make_contexts(k), self.make_rest(k, args)
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
        self.script.update(agent, TASK_IDS, *self.make_contexts(0), *self.make_rest(0, args), args)
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
            given_contexts, (segment, best, *more, _) = given[: self.contexts], given[self.contexts :]
            rates = [float(getattr(agent, opt).param_groups[0]["lr"]) for opt in ("opt", *self.own)]
            parts = {"contexts": given_contexts, "segment": segment, "best": best, "more": more, "rates": rates}
            updates.append(SimpleNamespace(task_ids=self.tasks(task_ids), **parts))
            return update(agent, task_ids, *given)

        def watch_adapt(agent, context, mask, explore, clone=False):
            contexts.append(context[..., 4][mask == 1])  # rewards
            return adapt(agent, context, mask, explore, clone)

        monkeypatch.setattr(self.script, "update", watch)
        monkeypatch.setattr(self.script, "adapt", watch_adapt)
        self.script.train(self.script.Args(**FAST | {"dataset": "numbered.npz"} | changes))
        return updates, contexts

    def test_training_sees_training_tasks_and_every_row_its_own_task(
        self, numbered, numbered_path, tmp_path, monkeypatch, **changes
    ):
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
        inputs = *[rows(6, 9)] * self.contexts, segment, best, *self.make_rest(0, args)[2:]
        with OnDevice():
            metrics = self.script.update(agent, rows().long(), *inputs, args)
        assert all(value.device.type == "meta" for value in metrics.values())

    def test_learns_point_robot_on_the_shipped_data(self, tmp_path):
        check_learning(self.script, tmp_path)

"""csro.py: whole updates against a slow recomputation, test vectors of its losses, the data it trains on, learning.

What it shares with focal.py, critics and policies, is recomputed as there (test_focal.py).
"""

import copy
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OnDevice, origin, to_meta
from test_focal import DATA, FAST, TASK_IDS, assert_same_update, check_best, check_clamps, check_evaluation
from test_focal import check_learning, check_segments, decaying, gradients, make_batch, make_context, make_segment
from test_focal import slow_actor_critic, slow_embedding, slow_metric, slow_multiplier_and_targets, slow_policy, start
from test_focal import vectors
from test_unicorn import slow_layers

import csro
import data_collect as dc

# float32, in which the optimizers keep it, holds this learning rate exactly
METHOD = {"width": 16, "encoder_width": 16, "z_dim": 3, "lr": 2**-7, "tau": 0.1, "gamma": 0.9, "reward_scale": 3.0}
METHOD |= {"metric_weight": 7.0, "club_weight": 2.5, "guess_weight": 4.0, "brac_alpha": 1.75, "brac_alpha_lr": 0.3}
METHOD |= {"divergence_target": 0.2, "brac_alpha_max": 100.0, "n_step": 3}


def make_agent(data=DATA, **changes):
    """Agent with parameters large enough that nothing is near zero -> agent, args."""
    args = csro.Args(**METHOD | changes)
    torch.manual_seed(0)
    agent = csro.Agent(data, args).double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.normal_(0, 0.4)
        for net in (agent.q, agent.q_target):  # now the one twin is the smaller, now the other
            net.w_3.sub_(net.w_3.mean(1, keepdim=True))
            net.b_3.zero_()
    return agent, args


# ---- the slow update --------------------------------------------------------------------


def slow_guess(agent, row):
    """A row of a context -> mean and variance of the guess at its embedding, from obs and act alone."""
    out = torch.tanh(slow_layers(agent.guess.net, row[:5]))
    return out[:3], torch.log(1 + torch.exp(out[3:]))


def slow_guess_loss(agent, context):
    """The mean over tasks, transitions and dimensions; gradients to the guess alone."""
    total = 0.0
    for row in context.flatten(0, 1):
        each, (mean, var) = torch.tanh(slow_layers(agent.encoder.net, row)).detach(), slow_guess(agent, row)
        density = torch.distributions.Normal(mean, var.sqrt()).log_prob(each) + 0.5 * math.log(2 * math.pi)
        total = total - density.mean() / (context.shape[0] * context.shape[1])
    return total


def slow_club(agent, context):
    """Over all pairs of a task's transitions; gradients to the encoder alone."""
    total, (tasks, size) = 0.0, context.shape[:2]
    for rows in context:
        each = [torch.tanh(slow_layers(agent.encoder.net, row)) for row in rows]
        for k in range(size):
            mean, var = (x.detach() for x in slow_guess(agent, rows[k]))
            negative = sum(-((each[j] - mean) ** 2 / var).mean() for j in range(size)) / size
            total = total + (-((each[k] - mean) ** 2 / var).mean() - negative) / (tasks * size)
    return total


def slow_update(agent, opts, context, segment, best, args):
    """One update of a copy of the agent by optimizers of its own -> metrics."""
    fit = args.guess_weight * slow_guess_loss(agent, context)
    gradients(fit, agent.guess)
    opts[1].step()  # before the bound is taken
    bound = slow_club(agent, context)
    z = torch.stack([slow_embedding(agent.encoder, rows) for rows in context])
    encoder = args.metric_weight * slow_metric(z, TASK_IDS.tolist()) + args.club_weight * bound
    sums = slow_actor_critic(agent, z.detach(), segment, best, args, 0.0)
    actor = agent.brac_alpha.item() * sums["divergence"] - sums["value"]
    gradients(encoder, agent.encoder)
    gradients(sums["q"], agent.q)
    gradients(actor, agent.shift)
    gradients(sums["behavior"], agent.behavior)
    with torch.no_grad():
        each = torch.stack([torch.tanh(slow_layers(agent.encoder.net, row)) for row in context.flatten(0, 1)])
        within = np.std(each.reshape(*context.shape[:2], 3).numpy(), axis=1).mean()
    opts[0].step()
    slow_multiplier_and_targets(agent, sums["divergence"], args)
    return {
        "losses/encoder": encoder,
        "losses/guess": fit,
        "losses/q": sums["q"],
        "losses/actor": actor,
        "losses/behavior": sums["behavior"],
        "stats/club": bound,
        "stats/q_mean": sums["value"],
        "stats/divergence": sums["divergence"],
        "stats/brac_alpha": agent.brac_alpha,
        "z/between_std": sum(z[:, d].std() for d in range(args.z_dim)) / args.z_dim,
        "z/within_std": within,
    }


@pytest.mark.parametrize("case", [{}, {"club_weight": 0.0}, {"target_noise": 1.0, "n_step": 1}])
def test_two_updates_are_those_of_a_slow_recomputation(case, known_noise):
    agent, args = make_agent(**case)
    twin = copy.deepcopy(agent)
    trained = [p for name, p in twin.named_parameters() if p.requires_grad and not name.startswith("guess")]
    opts = [torch.optim.Adam(trained, args.lr), torch.optim.Adam(twin.guess.parameters(), args.lr)]
    for k in range(2):
        inputs = make_context(k), make_segment(100 + k, args), make_batch(200 + k)
        with decaying(twin.behavior, args):
            expected = slow_update(twin, opts, *inputs, args)
        metrics = csro.update(agent, TASK_IDS, *inputs, args)
        assert_same_update(agent, twin, metrics, expected)


def test_inputs_of_the_slow_recomputation_tell_alternatives_apart():
    """Twins differ in both directions."""
    agent, args = make_agent()
    batch, z = start(make_segment(100, args)), torch.tanh(make_context(0)[:, 0, :3])
    with torch.no_grad():
        for q in (agent.q, agent.q_target):
            assert 0 < (q(batch.obs, batch.act, z)[0] < q(batch.obs, batch.act, z)[1]).double().mean() < 1


@pytest.mark.parametrize("target, expected", [(1e6, 0.0), (0.0, 3.0)])
def test_multiplier_keeps_to_its_bounds(target, expected):
    agent, args = make_agent(brac_alpha_lr=1e4, brac_alpha_max=3.0, divergence_target=target)
    csro.update(agent, TASK_IDS, make_context(0), make_segment(0, args), make_batch(0), args)
    assert agent.brac_alpha == expected


def test_log_std_is_clamped():
    check_clamps(make_agent()[0], [(-3, -5), (1, 2)])


# ---- networks ---------------------------------------------------------------------------


def test_networks_have_the_asked_sizes_and_start_as_they_should():
    """The last layer of both policies all but at 0; the targets at the critics, which differ."""
    agent = csro.Agent(DATA, csro.Args(**METHOD | {"width": 64, "encoder_width": 48, "z_dim": 5}))
    assert [tuple(layer.weight.shape) for layer in agent.encoder.net[::2]] == [(48, 9), (48, 48), (5, 48)]
    assert [tuple(layer.weight.shape) for layer in agent.guess.net[::2]] == [(48, 5), (48, 48), (10, 48)]
    assert agent.q.w_2.shape == (2, 64, 64) and agent.shift.w_2.shape == agent.behavior.w_2.shape == (1, 64, 64)
    for net in (agent.shift, agent.behavior):
        assert 8e-4 < net.w_3.abs().max() <= 1e-3 and 0 < net.b_3.abs().max() <= 1e-3
    for target, source in zip(agent.q_target.parameters(), agent.q.parameters()):
        assert torch.equal(target, source) and not target.requires_grad and not torch.equal(source[0], source[1])


@pytest.mark.parametrize("explore", [False, True])
def test_adapted_policy_is_the_mean_action_at_the_embedding_of_the_real_transitions(explore):
    agent, _ = make_agent()
    context, obs = make_context(0), torch.randn(4, DATA.obs_dim).double()
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).double()
    act = csro.adapt(agent, context, mask, explore)(obs, torch.zeros(4))
    z = csro.embed(agent, context, mask)
    assert not z.requires_grad
    for row in range(4):
        rows = context[row][mask[row] == 1]
        expected = slow_embedding(agent.encoder, rows) if len(rows) else torch.zeros(3).double()
        torch.testing.assert_close(z[row], expected)
        torch.testing.assert_close(act[row], torch.tanh(slow_policy(agent, obs[row], expected)[0].mean))
    assert (csro.embed(agent, context[:, :0], mask[:, :0]) == 0).all()


# ---- vectors of the losses --------------------------------------------------------------


def test_bound_and_guess_loss_vectors():
    each, mean, var = (vectors(*rows)[None].requires_grad_() for rows in ([[0.2], [0.8]], [[0.1], [0.5]], [[0.5], [1]]))
    bound = csro.club(each, mean, var)
    assert bound.item() == pytest.approx(0.24)
    (gradient,) = torch.autograd.grad(bound, each)
    np.testing.assert_allclose(gradient.flatten(), [-0.25, 0.55], rtol=1e-12)
    assert csro.guess_loss(each, mean, var).item() == pytest.approx(-0.1457867951, abs=1e-10)


def test_bound_of_constant_embeddings_is_zero_and_takes_no_pairs_across_tasks():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 6, 3, generator=generator).double()
    var, shift = torch.rand(2, 6, 3, generator=generator).double() + 0.3, vectors([[0.0]], [[5.0]])
    assert csro.club(torch.full((2, 6, 3), 0.7).double(), mean, var).item() == pytest.approx(0, abs=1e-12)
    each = torch.randn(2, 6, 3, generator=generator).double()
    assert csro.club(each + shift, mean + shift, var).item() == pytest.approx(csro.club(each, mean, var).item())


def test_variance_of_the_guess_is_bounded():
    guess = csro.Guess(1, 1, 1, 4)
    guess.net = torch.nn.Identity()
    mean, var = guess(torch.tensor([[[0.5, -50.0], [-0.5, 0.0], [9.0, 50.0]]]))
    np.testing.assert_allclose(mean[0, :, 0], np.tanh([0.5, -0.5, 9.0]), rtol=1e-6)
    np.testing.assert_allclose(var[0, :, 0], [0.3132616875, 0.6931471806, 1.3132616875], rtol=1e-6)


def test_metric_loss_and_tanh_gaussian_vectors():
    z = vectors((0.5, 0.5), (0.5, 0.3), (-0.5, -0.5), (-0.3, -0.5))
    assert csro.metric_loss(z, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(1.2531530948, abs=1e-9)
    mean, std, pre = vectors([0.3], [0.5], [0.8])
    assert csro.tanh_gaussian_logp(mean, std.log(), pre).item() == pytest.approx(-0.1442842320, abs=1e-10)


def test_default_weight_is_that_of_the_official_code_for_the_family():
    for env, weight in (("ant-goal", 50), ("cheetah-vel", 10), ("point-robot", 25), ("walker-rand-params", 25)):
        assert dc.resolve(csro.Args(env=env), csro.ENV_ARGS, csro.MAY_BE_ZERO).club_weight == weight


# ---- training ---------------------------------------------------------------------------


def watched(monkeypatch, folder, path, **changes):
    """Train -> what each update was given, with the learning rates at that time, and the contexts of the evaluation."""
    monkeypatch.chdir(folder)
    updates, contexts, update, adapt = [], [], csro.update, csro.adapt

    def watch(agent, task_ids, context, segment, best, args):
        rates = [float(opt.param_groups[0]["lr"]) for opt in (agent.opt, agent.guess_opt)]
        given = {"task_ids": task_ids, "context": context, "segment": segment, "best": best}
        updates.append(SimpleNamespace(**given, rates=rates))
        return update(agent, task_ids, context, segment, best, args)

    def watch_adapt(agent, context, mask, explore, clone=False):
        contexts.append(context[..., 4][mask == 1])  # rewards
        return adapt(agent, context, mask, explore, clone)

    monkeypatch.setattr(csro, "update", watch)
    monkeypatch.setattr(csro, "adapt", watch_adapt)
    settings = {name: value for name, value in FAST.items() if name != "dual_lr"}
    csro.train(csro.Args(**settings | {"dataset": str(path)} | changes))
    return updates, contexts


def test_training_sees_training_tasks_and_every_row_its_own_task(numbered, numbered_path, tmp_path, monkeypatch):
    updates, contexts = watched(monkeypatch, tmp_path, numbered_path)
    assert len(updates) == 20 and set(torch.cat([u.task_ids for u in updates]).tolist()) == set(range(6))
    assert any(len(set(u.task_ids.tolist())) < 5 for u in updates)  # with replacement
    for u in updates:
        assert u.context.shape == (5, 6, 7) and (u.context[..., 4] >= 0).all()
        task, episode, _ = origin(u.context[..., 4])
        assert (task == u.task_ids[:, None]).all() and (episode == episode[:, :1]).all()
        check_segments(u.segment, u.task_ids, FAST)
    check_best([u.best.rew for u in updates], [u.task_ids for u in updates], numbered, FAST["anchor_share"])
    of_test, foreign, *_, of_training = contexts[
        :15
    ]  # one of each protocol, but five of either online; then of pi_beta
    assert set(origin(of_test)[0].tolist()) == {6, 7, 8} and (of_test > 0).all() and (foreign < 0).all()
    assert set(origin(of_training)[0].tolist()) == set(range(6))


def test_evaluation_is_that_of_slow_policies_and_critics(numbered):
    agent, args = make_agent(numbered)
    check_evaluation(csro, agent, args, numbered, partial(slow_embedding, agent.encoder))


@pytest.mark.parametrize("decay", [True, False])
def test_learning_rates_fall_in_the_second_half(decay, numbered_path, tmp_path, monkeypatch):
    updates, _ = watched(monkeypatch, tmp_path, numbered_path, total_updates=8, lr_decay=decay)
    shares = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25] if decay else [1] * 8
    np.testing.assert_allclose([u.rates for u in updates], [[1e-3 * share] * 2 for share in shares], rtol=1e-6)


@pytest.mark.parametrize("wanted", [True, False])
def test_update_is_compiled_if_asked(wanted, numbered_path, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    watched(monkeypatch, tmp_path, numbered_path, compile=wanted, total_updates=1)
    assert compiled == [csro.update] * wanted


def test_update_stays_on_the_device():
    agent = to_meta(csro.Agent(DATA, csro.Args(**METHOD)))
    rows = lambda *shape: torch.zeros(4, *shape, device="meta")
    best = dc.Batch(rows(5, 3), rows(5, 2), rows(5), rows(5, 3), rows(5))
    segment = dc.Segment(rows(5, 3, 3), rows(5, 3, 2), rows(5, 3), rows(5, 3, 3), rows(5, 3), rows(5))
    with OnDevice():
        metrics = csro.update(agent, rows().long(), rows(6, 9), segment, best, csro.Args(**METHOD))
    assert all(value.device.type == "meta" for value in metrics.values())


def test_learns_point_robot_on_the_shipped_data(tmp_path):
    check_learning(csro, tmp_path)

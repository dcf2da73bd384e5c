"""unicorn.py: whole updates against a slow recomputation, test vectors of its losses, the data it trains on, learning.

What it shares with focal.py, critics and policies, is recomputed as there (test_focal.py).
"""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OnDevice, origin, pattern, slow_net, to_meta
from test_focal import assert_same_update, check_best, check_clamps, check_evaluation, check_learning, check_segments
from test_focal import decaying, gradients, make_batch, make_segment, slow_actor_critic, slow_metric
from test_focal import slow_multiplier_and_targets, slow_policy, start

import data_collect as dc
import unicorn

DATA = SimpleNamespace(obs_dim=3, act_dim=2, ctx_dim=9, train_ids=np.array([5, 0, 3, 2, 7]))
LABELS = torch.tensor([4, 1, 4, 2])
# float32, in which the optimizer keeps it, holds this learning rate exactly
METHOD = {"width": 16, "encoder_width": 16, "decoder_width": 8, "z_dim": 3, "lr": 2**-7, "tau": 0.1, "gamma": 0.9}
METHOD |= {"reward_scale": 3.0, "metric_weight": 0.7, "entropy_weight": 0.3, "brac_alpha": 1.75, "brac_alpha_lr": 0.3}
METHOD |= {"divergence_target": 0.2, "brac_alpha_max": 100.0, "n_step": 3}


def make_agent(data=DATA, **changes):
    """Agent with parameters large enough that nothing is near zero -> agent, args."""
    args = unicorn.Args(**METHOD | changes)
    torch.manual_seed(0)
    agent = unicorn.Agent(data, args).double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.normal_(0, 0.4)
        for q in (agent.q, agent.q_target):
            q.w_3.sub_(q.w_3.mean(1, keepdim=True))  # now the one twin is the smaller, now the other
            q.b_3.zero_()
        agent.encoder.log_var[0] = -4.0  # below its limit
        if args.variant != "sup":
            for head in agent.heads:
                head.low.sub_(2)
                head.high.add_(1)
    return agent, args


def make_context(seed):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.empty(len(LABELS), 3, DATA.ctx_dim, dtype=torch.float64).normal_(generator=generator)


# ---- the slow update --------------------------------------------------------------------


def slow_layers(layers, row):
    """A row through linear layers with ReLU between them."""
    layers = [layer for layer in layers if hasattr(layer, "weight")]
    for layer in layers[:-1]:
        row = layer.weight @ row + layer.bias
        row = torch.where(row > 0, row, 0.0)
    return layers[-1].weight @ row + layers[-1].bias


def slow_embedding(encoder, context, noise):
    """context [K, ctx_dim], noise [K, z_dim] -> z [z_dim]."""
    std = torch.sqrt(torch.clamp(torch.exp(encoder.log_var), 0.1, 10.0))
    return sum(torch.tanh(slow_layers(encoder.net, row) + std * e) for row, e in zip(context, noise)) / len(context)


def softplus(x):
    return torch.log(1 + torch.exp(x))


def slow_reconstruction(head, context, z, target_of):
    """Mean over transitions and dimensions, with the pull on the limits. target_of: row -> [dim]."""
    total, count = 0.0, 0
    for m in range(len(context)):
        for row in context[m]:
            out, target = slow_net(head, row[:5], z[m]), target_of(row)
            for d in range(len(target)):
                log_var = head.high[d] - softplus(head.high[d] - out[len(target) + d])
                log_var = head.low[d] + softplus(log_var - head.low[d])
                total, count = total + (out[d] - target[d]) ** 2 / torch.exp(log_var) + log_var, count + 1
    return total / count + 0.01 * (sum(head.high) - sum(head.low))


def slow_task_losses(agent, z, context, args):
    if args.variant == "sup":
        logits = [slow_layers(agent.heads[0], row) for row in z]
        chosen = [torch.log(torch.exp(row).sum()) - row[label] for row, label in zip(logits, LABELS)]
        return {"classifier": sum(chosen) / len(chosen)}
    loss = slow_reconstruction(agent.heads[0], context, z, lambda row: row[5:6])
    if args.recon_state:
        loss = loss + slow_reconstruction(agent.heads[1], context, z, lambda row: row[6:] - row[:3])
    if args.variant == "ss-0":
        return {"reconstruction": loss}
    return {"reconstruction": loss, "metric": args.metric_weight * slow_metric(z, LABELS.tolist())}


def slow_update(agent, opt, context, segment, best, args):
    """One update of a copy of the agent by an optimizer of its own -> metrics."""
    noise = pattern((*context.shape[:2], args.z_dim)) * (1.0 if args.enc_noise else 0.0)
    z = torch.stack([slow_embedding(agent.encoder, *rows) for rows in zip(context, noise)])
    parts, fixed = slow_task_losses(agent, z, context, args), z.detach()
    total = sum(parts.values())
    entropy_weight = args.entropy_weight if args.backbone == "sac" else 0.0
    sums = slow_actor_critic(agent, fixed, segment, best, args, entropy_weight)
    if args.backbone == "brac":
        actor = agent.brac_alpha.item() * sums["divergence"] - sums["value"]
        gradients(sums["behavior"], agent.behavior)
    else:
        actor = args.entropy_weight * sums["logp"] - sums["value"]
    gradients(total, agent.heads)
    gradients(total, agent.encoder)
    gradients(sums["q"], agent.q)
    gradients(actor, agent.shift)
    opt.step()
    alpha = agent.brac_alpha.clone()
    slow_multiplier_and_targets(agent, sums["divergence"], args)
    if args.backbone == "sac":
        agent.brac_alpha.copy_(alpha)  # nothing moves it
    return {
        **{f"losses/{name}": loss for name, loss in parts.items()},
        "losses/encoder": total,
        "losses/q": sums["q"],
        "losses/actor": actor,
        "losses/behavior": torch.as_tensor(sums["behavior"]),
        "stats/q_mean": sums["value"],
        "stats/divergence": torch.as_tensor(sums["divergence"]),
        "stats/brac_alpha": agent.brac_alpha,
        "z/between_std": sum(fixed[:, d].std() for d in range(args.z_dim)) / args.z_dim,
    }


CASES = [{}, {"variant": "ss-0", "recon_state": False, "target_noise": 0.5}]
CASES += [{"variant": "sup", "target_noise": 1.0, "n_step": 1}, {"enc_noise": False}]
CASES += [{"backbone": "sac"}, {"backbone": "sac", "variant": "ss-0"}]


@pytest.mark.parametrize("case", CASES)
def test_two_updates_are_those_of_a_slow_recomputation(case, known_noise):
    agent, args = make_agent(**case)
    twin = copy.deepcopy(agent)
    opt = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], args.lr)
    for k in range(2):
        inputs = make_context(k), make_segment(k, args), make_batch(2 + k)
        with decaying(twin.behavior, args):
            expected = slow_update(twin, opt, *inputs, args)
        metrics = unicorn.update(agent, LABELS, *inputs, args)
        assert_same_update(agent, twin, metrics, expected)


def test_inputs_of_the_slow_recomputation_tell_alternatives_apart():
    """The twins differ in both directions."""
    agent, args = make_agent()
    batch, z = start(make_segment(0, args)), torch.tanh(make_context(0)[:, 0, :3])
    with torch.no_grad():
        for q in (agent.q, agent.q_target):
            values = q(batch.obs, batch.act, z)
            assert 0 < (values[0] < values[1]).double().mean() < 1


@pytest.mark.parametrize("target, expected", [(1e6, 0.0), (0.0, 3.0)])
def test_multiplier_keeps_to_its_bounds(target, expected):
    agent, args = make_agent(brac_alpha_lr=1e4, brac_alpha_max=3.0, divergence_target=target)
    unicorn.update(agent, LABELS, make_context(0), make_segment(0, args), make_batch(0), args)
    assert agent.brac_alpha == expected


@pytest.mark.parametrize("backbone, expected", [("brac", [(-3, -5), (1, 2)]), ("sac", [(None, -5), (None, 2)])])
def test_log_std_is_clamped(backbone, expected):
    check_clamps(make_agent(backbone=backbone)[0], expected)


# ---- networks ---------------------------------------------------------------------------


def test_networks_have_the_asked_sizes_and_start_as_they_should():
    """The last layer of both policies all but at 0; the targets at the critics, which differ; limits at -10 and 0.5."""
    sizes = {"width": 64, "encoder_width": 48, "decoder_width": 24, "z_dim": 5}
    agent, sup = (unicorn.Agent(DATA, unicorn.Args(**METHOD | sizes, variant=name)) for name in ("ss", "sup"))
    assert [tuple(layer.weight.shape) for layer in agent.encoder.net[::2]] == [(48, 9), (48, 48), (5, 48)]
    assert (agent.encoder.log_var == 0).all() and agent.encoder.log_var.shape == (5,)
    assert [tuple(layer.weight.shape) for layer in sup.heads[0][::2]] == [(24, 5), (24, 24), (5, 24)]
    assert agent.q.w_2.shape == (2, 64, 64) and agent.shift.w_2.shape == agent.behavior.w_2.shape == (1, 64, 64)
    for head, dim in zip(agent.heads, (1, 3), strict=True):
        assert head.w_2.shape == (1, 24, 24) and head.w_3.shape == (1, 24, 2 * dim)
        assert head.low.tolist() == [-10] * dim and head.high.tolist() == [0.5] * dim
    for net in (agent.shift, agent.behavior):
        assert 8e-4 < net.w_3.abs().max() <= 1e-3 and 0 < net.b_3.abs().max() <= 1e-3
    for target, source in zip(agent.q_target.parameters(), agent.q.parameters()):
        assert torch.equal(target, source) and not target.requires_grad and not torch.equal(source[0], source[1])


def test_noise_is_bounded_from_both_sides():
    """Variance within 0.1 and 10."""
    encoder = unicorn.Encoder(2, 2, 4)
    encoder.net = torch.nn.Identity()
    with torch.no_grad():
        encoder.log_var.copy_(torch.tensor([-9.0, 9.0]))
    z = encoder(torch.zeros(1, 1, 2), torch.ones(1, 1), torch.full((1, 1, 2), 0.5))
    np.testing.assert_allclose(torch.atanh(z).detach()[0], [0.5 * 0.1**0.5, 0.5 * 10**0.5], rtol=1e-5)


@pytest.mark.parametrize("explore", [False, True])
def test_adapted_policy_is_the_mean_action_at_the_embedding_of_the_real_transitions(explore):
    """Without noise, whatever the training had."""
    agent, _ = make_agent()
    context, obs = make_context(0), torch.randn(4, DATA.obs_dim).double()
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).double()
    agent.z_mean.copy_(vectors(0.3, -0.2, 0.7))
    act = unicorn.adapt(agent, context, mask, explore)(obs, torch.zeros(4))
    z = unicorn.embed(agent, context, mask)
    assert not z.requires_grad
    for row in range(4):
        rows = context[row][mask[row] == 1]
        expected = slow_embedding(agent.encoder, rows, torch.zeros(len(rows), 3)) if len(rows) else agent.z_mean
        torch.testing.assert_close(z[row], expected.double())
        torch.testing.assert_close(act[row], torch.tanh(slow_policy(agent, obs[row], expected.double())[0].mean))
    assert (unicorn.embed(agent, context[:, :0], mask[:, :0]) == agent.z_mean).all()


# ---- vectors of the losses --------------------------------------------------------------


def vectors(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_negative_log_likelihood_and_total_loss_vectors():
    mean, log_var, target = vectors(0, 1), vectors(0, -1), vectors(0.5, 0)
    assert unicorn.gaussian_nll(mean[:1], log_var[:1], target[:1]).item() == pytest.approx(0.25)
    assert unicorn.gaussian_nll(mean[1:], log_var[1:], target[1:]).item() == pytest.approx(1.7182818285)
    head = lambda *_: (mean, log_var)
    head.low, head.high = vectors(-10, -10), vectors(0.5, 0.5)
    reconstruction = unicorn.reconstruction_loss(head, None, None, None, target).item()
    assert reconstruction == pytest.approx(1.1941409142)
    z = vectors((0.5, 0.5), (0.5, 0.3), (-0.5, -0.5), (-0.3, -0.5))
    metric = unicorn.metric_loss(z, torch.tensor([0, 0, 1, 1])).item()
    assert reconstruction + 0.15 * metric == pytest.approx(1.3821138784, abs=1e-9)


def test_soft_limits_of_the_log_variance_vector():
    raw = vectors(-20, -10, 0, 0.5, 5)
    expected = [-9.9999546011, -9.3068665874, -0.4740040505, -0.1930921092, 0.4889800971]
    np.testing.assert_allclose(unicorn.soft_clamp(raw, vectors(-10), vectors(0.5)), expected, atol=1e-9)


def test_classifier_loss_vector_and_chance_level():
    agent, args = make_agent(variant="sup")
    agent.heads[0] = torch.nn.Identity()
    logits = vectors((2, 0, -1), (0, 1, 0))
    loss = unicorn.task_losses(agent, logits, torch.tensor([0, 2]), None, args)["classifier"]
    assert loss.item() == pytest.approx(0.8606453667, abs=1e-9)
    chance = unicorn.task_losses(agent, torch.zeros(1, 20), torch.tensor([3]), None, args)["classifier"]
    assert chance.item() == pytest.approx(math.log(20), abs=1e-6)


def test_tanh_gaussian_logp_vector_and_bounds():
    mean, std, pre = vectors([0.3], [0.5], [0.8])
    assert unicorn.tanh_gaussian_logp(mean, std.log(), pre).item() == pytest.approx(-0.1442842320, abs=1e-10)
    np.testing.assert_allclose(torch.tanh(unicorn.pre_tanh(vectors(-1, -0.5, 0.9985))), [-0.999, -0.5, 0.9985])


def test_default_weight_is_that_of_the_paper_for_the_family():
    for env, weight in (("ant-dir", 0.15), ("point-robot", 0.15), ("hopper-rand-params", 1.5)):
        assert dc.resolve(unicorn.Args(env=env), unicorn.ENV_ARGS, unicorn.MAY_BE_ZERO).metric_weight == weight


# ---- training ---------------------------------------------------------------------------

FAST = {"env": "point-robot", "device": "cpu", "width": 16, "encoder_width": 16, "decoder_width": 8, "z_dim": 3}
FAST |= {"total_updates": 20, "log_every": 20, "eval_every": 20, "save_every": 20, "final_episodes": 3}
FAST |= {"meta_batch": 5, "batch_size": 8, "context_size": 6, "lr": 1e-3, "run_dir": "runs", "gamma": 0.5, "n_step": 3}
FAST |= {"anchor_share": 0.4}


def watched(monkeypatch, folder, path, **changes):
    """Train on a file whose training tasks come in another order -> what each update was given, with the learning
    rate at that time, and the contexts of the evaluation."""
    monkeypatch.chdir(folder)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez("numbered.npz", **arrays | {"train_ids": arrays["train_ids"][::-1]})
    updates, contexts, update, adapt = [], [], unicorn.update, unicorn.adapt

    def watch(agent, labels, context, segment, best, args):
        rate = float(agent.opt.param_groups[0]["lr"])
        updates.append(SimpleNamespace(labels=labels, context=context, segment=segment, best=best, rate=rate))
        return update(agent, labels, context, segment, best, args)

    def watch_adapt(agent, context, mask, explore, clone=False):
        contexts.append(context[..., 4][mask == 1])  # rewards
        return adapt(agent, context, mask, explore, clone)

    monkeypatch.setattr(unicorn, "update", watch)
    monkeypatch.setattr(unicorn, "adapt", watch_adapt)
    unicorn.train(unicorn.Args(**FAST | {"dataset": "numbered.npz"} | changes))
    return updates, contexts


@pytest.mark.parametrize("variant", ["ss", "sup"])
def test_training_sees_training_tasks_and_every_row_its_own_task(
    variant, numbered, numbered_path, tmp_path, monkeypatch
):
    updates, contexts = watched(monkeypatch, tmp_path, numbered_path, variant=variant)
    assert len(updates) == 20 and set(torch.cat([u.labels for u in updates]).tolist()) == set(range(6))
    assert any(len(set(u.labels.tolist())) < 5 for u in updates)  # with replacement
    for u in updates:
        assert u.context.shape == (5, 6, 7) and u.segment.rew.shape == (5, 8, 3)
        task, episode, _ = origin(u.context[..., 4])
        assert (u.context[..., 4] >= 0).all()
        assert (task == 5 - u.labels[:, None]).all() and (episode == episode[:, :1]).all()
        check_segments(u.segment, 5 - u.labels, FAST)
    check_best([u.best.rew for u in updates], [5 - u.labels for u in updates], numbered, FAST["anchor_share"])
    of_protocols = contexts[:20]  # one of each, but ten of online, five of np_online; then come those of pi_beta
    of_test, foreign, *_, of_training = of_protocols
    assert set(origin(of_test)[0].tolist()) == {6, 7, 8} and (of_test > 0).all() and (foreign < 0).all()
    assert set(origin(of_training)[0].tolist()) == set(range(6))


@pytest.mark.parametrize("backbone", ["brac", "sac"])
def test_evaluation_is_that_of_slow_policies_and_critics(backbone, numbered):
    agent, args = make_agent(numbered, backbone=backbone)
    infer = lambda rows: slow_embedding(agent.encoder, rows, torch.zeros(len(rows), 3))  # noqa: E731
    check_evaluation(unicorn, agent, args, numbered, infer)


@pytest.mark.parametrize("decay", [True, False])
def test_learning_rate_falls_in_the_second_half(decay, numbered_path, tmp_path, monkeypatch):
    updates, _ = watched(monkeypatch, tmp_path, numbered_path, total_updates=8, lr_decay=decay)
    shares = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25] if decay else [1] * 8
    np.testing.assert_allclose([u.rate for u in updates], [1e-3 * share for share in shares], rtol=1e-6)


@pytest.mark.parametrize("wanted", [True, False])
def test_update_is_compiled_if_asked(wanted, numbered_path, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    watched(monkeypatch, tmp_path, numbered_path, compile=wanted, total_updates=1)
    assert compiled == [unicorn.update] * wanted


@pytest.mark.parametrize("case", CASES)
def test_update_stays_on_the_device(case):
    args = unicorn.Args(**METHOD | case)
    agent = to_meta(unicorn.Agent(DATA, args))
    rows = lambda *shape: torch.zeros(4, *shape, device="meta")
    best = dc.Batch(rows(5, 3), rows(5, 2), rows(5), rows(5, 3), rows(5))
    segment = dc.Segment(rows(5, 3, 3), rows(5, 3, 2), rows(5, 3), rows(5, 3, 3), rows(5, 3), rows(5))
    with OnDevice():
        metrics = unicorn.update(agent, rows().long(), rows(6, 9), segment, best, args)
    assert all(value.device.type == "meta" for value in metrics.values())


def test_learns_point_robot_on_the_shipped_data(tmp_path):
    check_learning(unicorn, tmp_path)

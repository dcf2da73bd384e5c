"""flora.py: facts of the method, gradient routing, training runs, resume, bad input, learning."""

import copy
import csv
import json
import math
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data_collect as dc
import flora
from conftest import ROOT, run_script, start_script

SMALL = dict(width=32, encoder_width=32, feature_dim=8, z_dim=5, num_flows=2, meta_batch=4, batch_size=16, context_size=10)
SHORT = SMALL | dict(env="point-robot", total_updates=60, log_every=5, eval_every=20, save_every=20, bandit_every=10, eval_episodes=1)


def make_args(**changes):
    return flora.resolve(flora.Args(**SMALL | dict(env="point-robot") | changes))


def make_agent(args, obs_dim=2, act_dim=2):
    torch.manual_seed(0)
    agent = flora.Agent(obs_dim, act_dim, 2 * obs_dim + act_dim + 1, args)
    agent.make_optimizer(args)
    return agent


def make_batch(args, obs_dim=2, act_dim=2):
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(args.meta_batch, *shape, generator=generator)

    b = args.batch_size
    term = (torch.rand(args.meta_batch, b, generator=generator) < 0.3).float()
    batch = randn(b, obs_dim), randn(b, act_dim).tanh(), randn(b), randn(b, obs_dim), term
    return randn(args.context_size, 2 * obs_dim + act_dim + 1), batch


# ---- facts of the method ----------------------------------------------------


@pytest.mark.parametrize("num_flows", [1, 4])
@pytest.mark.parametrize("z_dim", [5, 20])
@pytest.mark.parametrize("scale", [0.1, 5.0])  # 5: w.u < -1 in some flows before the correction
def test_log_det_of_flows_is_that_of_the_jacobian(num_flows, z_dim, scale):
    torch.manual_seed(num_flows + z_dim)
    flows = flora.PlanarFlows(num_flows, z_dim).double()
    with torch.no_grad():
        flows.u.copy_(scale * torch.randn(num_flows, z_dim))
        flows.b.copy_(torch.randn(num_flows))
        flows.u[0] = -2 * flows.w[0]
    z = torch.randn(3, z_dim, dtype=torch.double)
    log_det = flows(z)[1]
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda x: flows(x[None])[0][0], z[i])
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(log_det[i].item(), abs=1e-8)
    assert ((flows.w * flows.corrected_u()).sum(-1) >= -1).all()


def test_no_flows_and_no_displacement_are_the_identity():
    z = torch.randn(4, 5)
    none, zero = flora.PlanarFlows(0, 5), flora.PlanarFlows(3, 5)
    with torch.no_grad():  # the corrected u is 0 where softplus(w.u) - 1 = 0
        zero.u.copy_(math.log(math.e - 1) * zero.w / (zero.w**2).sum(-1, keepdim=True))
    for flows in (none, zero):
        z_k, log_det = flows(z)
        torch.testing.assert_close(z_k, z, atol=1e-6, rtol=0)
        torch.testing.assert_close(log_det, torch.zeros(4), atol=1e-6, rtol=0)


def test_feature_spread_is_not_divided_by_two():
    mean, spread = flora.feature_spread(torch.tensor([[1.0, 4.0], [3.0, 0.0]]))
    assert mean.tolist() == [2, 2]
    assert spread.tolist() == pytest.approx([1.41421, 2.82843], abs=1e-5)
    assert (mean - spread).tolist() == pytest.approx([0.58579, -0.82843], abs=1e-5)


def test_bandit_credits_the_drawn_arm_only():
    agent = make_agent(make_args(num_arms=2))
    generator = torch.Generator().manual_seed(0)
    agent.bandit_step(torch.tensor(0.5), 0.1, generator)
    assert agent.arm_logits.tolist() == [0, 0]  # the first return has no predecessor
    agent.arm.fill_(0)
    agent.bandit_step(torch.tensor(1.5), 0.2, generator)  # gain 1, p = 0.5
    assert agent.arm_logits.tolist() == pytest.approx([0.4, 0])
    assert agent.arm_logits.softmax(0).tolist() == pytest.approx([0.59869, 0.40131], abs=1e-5)
    agent.arm.fill_(1)
    before = agent.arm_probs()[1].item()
    agent.bandit_step(torch.tensor(-99.0), 0.1, generator)  # clipped to -1
    assert agent.arm_logits.tolist() == pytest.approx([0.4, -0.1 / before])
    agent.arm_logits.copy_(torch.tensor([50.0, 0.0]))
    assert agent.arm_probs().min().item() == pytest.approx(0.05)


def test_feature_loss_is_huber_summed_over_features():
    psi = torch.tensor([[[[0.5, 3.0]]], [[[0.0, 0.0]]]])
    assert flora.feature_loss(psi, torch.zeros(1, 1, 2)).item() == pytest.approx(0.125 + 2.5)


def test_a_lower_alpha_never_raises_q_with_softmax_weights():
    torch.manual_seed(0)
    weights = flora.Weights(5, 8, 16, "softmax")(3 * torch.randn(1000, 5))
    mean, spread = flora.feature_spread(5 * torch.randn(2, 1000, 8))
    values = [((mean + alpha * spread) * weights).sum(-1) for alpha in (-1.0, -0.5, 0.0)]
    assert (values[0] <= values[1] + 1e-5).all() and (values[1] <= values[2] + 1e-5).all()


def test_kl_sample_averages_to_the_closed_form_without_flows():
    torch.manual_seed(0)
    mean, var = torch.randn(3, 5), torch.rand(3, 5) + 0.1
    z = mean + var.sqrt() * torch.randn(200_000, 3, 5)
    sampled = flora.posterior_kl(z, z, mean, var, torch.zeros(3)).mean(0)
    prior, posterior = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(mean, var.sqrt())
    torch.testing.assert_close(sampled, torch.distributions.kl_divergence(posterior, prior).sum(-1), atol=0.03, rtol=0)


def test_value_likelihood_is_a_sum_over_transitions():
    psi, weights, target = torch.randn(2, 3, 7, 4), torch.rand(3, 1, 4), torch.randn(3, 7)
    expected = 0.0
    for e in range(2):
        for m in range(3):
            for b in range(7):
                q = sum(psi[e, m, b, d].item() * weights[m, 0, d].item() for d in range(4))
                expected -= 0.5 * (q - target[m, b].item()) ** 2 / (2 * 3)
    assert flora.value_log_likelihood(psi, weights, target).item() == pytest.approx(expected, rel=1e-4)


def test_densities_and_divergence_of_policies():
    logp = flora.tanh_gaussian_logp(*(torch.tensor([x], dtype=torch.double) for x in (0.3, math.log(0.5), 0.6640367703)))
    assert logp.item() == pytest.approx(-0.1442842320, abs=1e-8)
    a, b = [(torch.randn(4, 3), 0.5 * torch.randn(4, 3)) for _ in range(2)]
    normals = [torch.distributions.Normal(mean, log_std.exp()) for mean, log_std in (a, b)]
    torch.testing.assert_close(flora.gaussian_kl(*a, *b), torch.distributions.kl_divergence(*normals).sum(-1))


def test_posterior_is_a_product_of_gaussians_over_real_transitions():
    torch.manual_seed(0)
    encoder, context = flora.Encoder(7, 3, 16), torch.randn(2, 6, 7)
    mask = torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2])
    mean, var = encoder(context, mask)
    for m in range(2):
        for d in range(3):
            precision = weighted = 0.0
            for k in range(int(mask[m].sum())):
                out = encoder.net(context[m, k])
                p = 1 / F.softplus(out[3 + d]).item()
                precision, weighted = precision + p, weighted + p * out[d].item()
            assert var[m, d].item() == pytest.approx(1 / precision, rel=1e-4)
            assert mean[m, d].item() == pytest.approx(weighted / precision, rel=1e-3, abs=1e-6)
    shuffled = encoder(context[:, [3, 1, 0, 2, 5, 4]], mask[:, [3, 1, 0, 2, 5, 4]])
    torch.testing.assert_close(shuffled[0], mean)
    garbage = context.clone()
    garbage[1, 4:] = 99.0
    torch.testing.assert_close(encoder(garbage, mask)[0], mean)


def test_actions_are_tanh_of_the_mean():
    actor = flora.TanhGaussian(2, 2, 5, 16, -5, 2)
    with torch.no_grad():
        actor.net[-1].bias[:2] = torch.tensor([3.0, -3.0])
    act = actor.mode(torch.zeros(1, 2), torch.zeros(1, 5))
    assert act[0].tolist() == pytest.approx([math.tanh(3), -math.tanh(3)], abs=0.02)


# ---- update -----------------------------------------------------------------


def losses_of(agent, context, batch, args):
    """The losses of update, written anew from the equations, with the same random numbers."""
    obs, act, rew, next_obs, term = batch
    rew = args.reward_scale * rew
    noise = torch.randn(args.meta_batch, args.z_dim)
    mean, var = agent.encoder(context, torch.ones(context.shape[:2]))
    z_0 = mean + var.sqrt() * noise
    z, log_det = agent.flows(z_0)
    normal = torch.distributions.Normal
    kl = (normal(mean, var.sqrt()).log_prob(z_0) - normal(0, 1).log_prob(z)).sum(-1) - log_det
    z_b = z[:, None].expand(-1, args.batch_size, -1)
    weights = agent.weights.net(z).softmax(-1)[:, None]
    mu, log_std = agent.actor(next_obs, z_b.detach())
    next_act = torch.tanh(mu + log_std.exp() * torch.randn_like(mu))
    psi_1, psi_2 = (psi(next_obs, next_act, z_b) for psi in agent.psi_target)
    tilde = ((psi_1 + psi_2) / 2 + agent.arms[agent.arm] * (psi_1 - psi_2).abs() / math.sqrt(2)).detach()
    phi = agent.phi(obs, act, next_obs, z_b)
    discount = args.gamma * (1 - term)
    y = (rew + discount * (tilde * weights).sum(-1)).detach()
    reward = 0.5 * ((rew - (phi * weights).sum(-1)) ** 2).mean()
    feature, likelihood = 0.0, 0.0
    for psi in agent.psi:
        value = psi(obs, act, z_b)
        feature = feature + F.smooth_l1_loss(value, (phi + discount[..., None] * tilde).detach(), reduction="none").sum(-1).mean()
        likelihood = likelihood - 0.25 * ((value * weights).sum(-1) - y).pow(2).sum(1).mean()
    encoder = args.feature_weight * (reward + feature) - likelihood + args.kl_weight * kl.mean()
    fixed = z_b.detach()
    mu_b, log_std_b = agent.behavior(obs, fixed)
    behavior = -flora.tanh_gaussian_logp(mu_b, log_std_b, act).mean()
    mu, log_std = agent.actor(obs, fixed)
    pi_act = torch.tanh(mu + log_std.exp() * torch.randn_like(mu))
    q = torch.minimum(*[(psi(obs, pi_act, fixed) * weights.detach()).sum(-1) for psi in agent.psi])
    divergence = torch.distributions.kl_divergence(normal(mu, log_std.exp()), normal(mu_b.detach(), log_std_b.exp().detach()))
    actor = agent.brac_alpha * divergence.sum(-1).mean() - q.mean()
    return {"encoder": encoder, "feature": feature, "reward": reward, "behavior": behavior, "actor": actor}


# which parameters each loss trains
ROUTES = {
    "encoder": ("encoder", "flows"),
    "feature": ("psi",),
    "reward": ("phi", "weights"),
    "behavior": ("behavior",),
    "actor": ("actor",),
}


def test_losses_and_gradient_routes_of_one_update():
    args = make_args(alpha_min=-1.0, kl_weight=0.1, feature_weight=0.01)
    agent, (context, batch) = make_agent(args), make_batch(args)
    with torch.no_grad():
        for psi in agent.psi_target:  # targets apart from the networks
            for p in psi.parameters():
                p.add_(0.05 * torch.randn_like(p))
    agent.arm.fill_(1)
    reference = copy.deepcopy(agent)
    torch.manual_seed(5)
    metrics = flora.update(agent, context, batch, args)
    torch.manual_seed(5)
    losses = losses_of(reference, context, batch, args)
    for name, loss in losses.items():
        assert metrics[f"losses/{name}"].item() == pytest.approx(loss.item(), rel=1e-4), name
    for name, modules in ROUTES.items():
        for module in modules:
            params = list(getattr(reference, module).parameters())
            expected = torch.autograd.grad(losses[name], params, retain_graph=True)
            for ours, grad in zip(getattr(agent, module).parameters(), expected):
                torch.testing.assert_close(ours.grad, grad, rtol=2e-3, atol=1e-5)
    assert {m for modules in ROUTES.values() for m in modules} | {"psi_target"} == set(dict(agent.named_children()))


def test_targets_follow_slowly_and_multiplier_stays_in_bounds():
    args = make_args(tau=0.005, brac_alpha=0.01, brac_alpha_lr=5.0, divergence_target=50.0)
    agent, (context, batch) = make_agent(args), make_batch(args)
    target = [p.clone() for p in agent.psi_target.parameters()]
    flora.update(agent, context, batch, args)
    for before, now, network in zip(target, agent.psi_target.parameters(), agent.psi.parameters()):
        torch.testing.assert_close(now, 0.995 * before + 0.005 * network)
    assert agent.brac_alpha.item() == 0  # the divergence is below its target: clipped at 0, no wind-up
    args.divergence_target = -1000.0
    flora.update(agent, context, batch, args)
    assert agent.brac_alpha.item() == args.brac_alpha_max


def test_q_error_bootstraps_at_the_time_limit_only():
    args = make_args(gamma=0.9, reward_scale=2.0)
    agent = make_agent(args)
    context, mask = torch.randn(2, 5, 7), torch.ones(2, 5)
    obs, rew = torch.randn(2, 4, 2), torch.randn(2, 3)
    rew[1, 2] = 0.0
    trace = {"context": context, "mask": mask, "observations": obs.numpy(), "rewards": rew.numpy()}
    trace |= {"lengths": torch.tensor([3, 2]).numpy(), "terminated": torch.tensor([False, True]).numpy()}
    z = agent.infer(context, mask, 0.0)[0]
    expected = 0.0
    for row, length in ((0, 3), (1, 2)):
        def q(o):
            return agent.q(o, agent.actor.mode(o, z[row]), z[row], agent.weights(z[row]))[0].item()

        target = sum(0.9**t * 2 * rew[row, t].item() for t in range(length))
        target += 0.9**3 * q(obs[0, 3]) if row == 0 else 0.0
        expected += (q(obs[row, 0]) - target) / 2 / 2
    assert flora.q_error(agent, trace, args) == pytest.approx(expected, abs=1e-4)


# ---- training runs ----------------------------------------------------------


def run(tiny_path, tmp_path, **changes):
    return flora.train(flora.Args(**SHORT | dict(dataset=str(tiny_path), run_dir=str(tmp_path)) | changes))


def read_metrics(run_dir):
    with open(Path(run_dir) / "metrics.csv", newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def straight(tiny_path, tmp_path_factory):
    return run(tiny_path, tmp_path_factory.mktemp("straight"))


def test_training_moves_every_network_and_writes_its_files(straight, tiny):
    run_dir = Path(straight["run_dir"])
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert state["step"] == 60
    torch.manual_seed(0)
    fresh = flora.Agent(2, 2, 7, make_args()).state_dict()
    fixed = {"arms", "brac_alpha", "arm"}  # brac_alpha_lr is 0 in the point families
    still = [k for k, v in fresh.items() if k not in fixed and torch.equal(v, state["agent"][k])]
    assert not still, f"never updated: {still}"
    rows = read_metrics(run_dir)
    tags = {row[1] for row in rows[1:]}
    assert all(math.isfinite(float(row[2])) for row in rows[1:])
    for protocol in dc.PROTOCOLS:
        assert {f"eval/{protocol}/return", f"eval/{protocol}/normalized"} <= tags & set(straight)
    assert {"losses/encoder", "stats/divergence", "stats/spread_policy", "z/between_std", "bandit/prob_-1.00"} <= tags
    assert {"eval/iid/q_error", "z/nearest_task_acc", "z/probe_r2"} <= tags
    stored = json.loads((run_dir / "args.json").read_text())
    assert stored["args"]["width"] == 32 and {"torch", "mujoco"} <= set(stored["versions"])
    assert json.loads((run_dir / "result.json").read_text())["step"] == 60
    events = EventAccumulator(str(run_dir)).Reload()
    assert "losses/encoder" in events.Tags()["scalars"]
    assert len(events.Scalars("eval/iid/return")) == 3
    assert list(run_dir.glob("*/z/metadata.tsv"))


@pytest.mark.parametrize("change", [{"num_flows": 0}, {"alpha_min": 0.0}, {"weight_activation": "none"}, {"bandit_feedback": "rollout"}])
def test_every_variant_trains(tiny_path, tmp_path, change):
    results = run(tiny_path, tmp_path, total_updates=30, **change)
    assert math.isfinite(results["eval/iid/return"])
    if "alpha_min" in change:
        assert {row[2] for row in read_metrics(results["run_dir"]) if row[1] == "stats/alpha"} <= {"0.0", "-0.0"}


def test_same_seed_same_metrics_other_seed_others(straight, tiny_path, tmp_path):
    again, other = run(tiny_path, tmp_path), run(tiny_path, tmp_path, seed=1)
    assert read_metrics(again["run_dir"]) == read_metrics(straight["run_dir"])
    assert read_metrics(other["run_dir"]) != read_metrics(straight["run_dir"])


def command(tiny_path, *more):
    settings = SHORT | {"dataset": str(tiny_path), "total_updates": 400}
    return [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))] + list(more)


@pytest.mark.parametrize("kind, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_interrupted_training_resumes_to_the_same_metrics(tiny_path, tmp_path, kind, code):
    straight = run(tiny_path, tmp_path / "straight", total_updates=400)
    process = start_script(tmp_path, "flora.py", *command(tiny_path))
    while not process.stdout.readline().startswith("[    105/"):
        assert process.poll() is None
    process.send_signal(kind)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in stderr
    (run_dir,) = (tmp_path / "runs/point-robot/flora").iterdir()
    if kind == signal.SIGINT:
        assert f"--resume {run_dir.relative_to(tmp_path)}" in stdout
    flora.train(flora.Args(resume=str(run_dir)))
    assert read_metrics(run_dir) == read_metrics(straight["run_dir"])
    ours, theirs = (torch.load(Path(d) / "checkpoint.pt", weights_only=True) for d in (run_dir, straight["run_dir"]))
    assert all(torch.equal(v, theirs["agent"][k]) for k, v in ours["agent"].items())


def test_eval_only_gives_the_numbers_of_the_last_evaluation(straight):
    results = flora.train(flora.Args(resume=straight["run_dir"], eval_only=True))
    for protocol in dc.PROTOCOLS:
        assert results[f"eval/{protocol}/return"] == straight[f"eval/{protocol}/return"]


def test_non_finite_loss_stops_and_keeps_the_good_checkpoint(tiny_path, tmp_path, monkeypatch):
    original, calls = flora.update, []

    def breaking(agent, *rest):
        calls.append(1)
        if len(calls) == 31:
            agent.actor.net[0].weight.data.fill_(math.nan)
        return original(agent, *rest)

    monkeypatch.setattr(flora, "update", breaking)
    with pytest.raises(SystemExit, match=r"stopped at update 35: losses/\w+ is nan.*checkpoint.pt"):
        run(tiny_path, tmp_path)
    (path,) = tmp_path.glob("*/*/*/checkpoint.pt")
    state = torch.load(path, weights_only=True)
    assert state["step"] == 20 and all(torch.isfinite(v).all() for k, v in state["agent"].items() if "actor" in k)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dataset": "none.npz"}, "python data_collect.py --env point-robot"),
        ({"env": "ant-dir"}, "holds point-robot, not ant-dir"),
        ({"eval_only": True}, "--eval-only needs --resume"),
        ({"resume": "nowhere"}, "no checkpoint.pt there"),
        ({"lr": 0.0}, "--lr 0.0: must be positive"),
        ({"alpha_min": 1.0}, "--alpha-min 1.0: must lie between -1 and 0"),
        ({"gamma": 2.0}, "--gamma 2.0"),
        ({"meta_batch": 0}, "--meta-batch 0"),
        ({"run_dir": "FILE/runs"}, "choose another --run-dir"),
    ],
)
def test_bad_arguments_end_with_one_line(tiny_path, tmp_path, changes, words):
    (tmp_path / "file").write_text("")
    if "run_dir" in changes:
        changes = {"run_dir": str(tmp_path / "file" / "runs")}
    with pytest.raises(SystemExit) as caught:
        run(tiny_path, tmp_path, **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_resume_refuses_contradictions_and_damage(straight, tmp_path):
    with pytest.raises(SystemExit, match="--seed 3: the run to resume has 0; drop the flag"):
        flora.train(flora.Args(resume=straight["run_dir"], seed=3))
    (tmp_path / "checkpoint.pt").write_bytes(b"junk")
    with pytest.raises(SystemExit, match="damaged"):
        flora.train(flora.Args(resume=str(tmp_path)))
    torch.save({"other": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="another script or version"):
        flora.train(flora.Args(resume=str(tmp_path)))


def test_command_line_typo_and_help(tmp_path):
    code, stdout, stderr = run_script(tmp_path, "flora.py", "--env", "point-robot", "--totl-updates", "3")
    assert code == 2 and "--totl-updates" in stdout + stderr and "Traceback" not in stderr
    code, stdout, stderr = run_script(tmp_path, "flora.py", "--env", "point-robot")
    assert code == 1 and "data_collect.py --env point-robot" in stderr and "Traceback" not in stderr
    code, stdout, _ = run_script(tmp_path, "flora.py", "--help")
    assert code == 0
    assert all("--" + field.name.replace("_", "-") in stdout for field in fields(flora.Args))


def test_point_robot_is_learned_on_the_shipped_data(tmp_path):
    """Test tasks, context of one offline episode; random -20, data about -7, expert about -5."""
    args = flora.Args(env="point-robot", dataset=str(ROOT / "datasets/point-robot.npz"), run_dir=str(tmp_path))
    args.total_updates, args.batch_size, args.context_size, args.eval_every = 1000, 32, 20, 1000
    results = flora.train(args)
    assert results["eval/iid/return"] > -9
    assert results["z/nearest_task_acc"] > 0.2  # chance is 1 / 30
    assert results["z/probe_r2"] > 0.7

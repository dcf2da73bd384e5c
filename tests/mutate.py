"""Do the tests notice a wrong program? Makes single wrong edits, one at a time, in a copy of the repository and runs
the tests of the edited script. An edit that passes them shows a line that nothing checks.

    python tests/mutate.py                          # all scripts: hours of one core
    python tests/mutate.py flora.py --jobs 4        # one script, four tests side by side
    python tests/mutate.py --only twins             # the edits whose name contains the word
    python tests/mutate.py --list                   # only check that every edit can still be made: a second

pytest does not collect this file. The working tree is only read: each job has its own copy in a temporary folder, with
links to the datasets.

To extend it, add a Mutant to MUTANTS: what is then wrong with the program, a text that occurs exactly once in the
script, and what to put in its place. The edited program must still run, and must do something else than it should, not
the same in another way or but for a rounding. Edits are best chosen from a method's equations, before a look at the
tests. Where no test can notice one, give the reason as `equivalent`: it is then expected to survive.

The exit code is 1 if an edit survives without such a reason, is killed in spite of one, cannot be made any more, or
ends pytest in another way than with a failed test or a hang."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# no compiled files: they are told apart by size and second only, so that of one edit could stand in for the next
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
BAD = {"SURVIVED", "ERROR", "CANNOT BE APPLIED"}


class Mutant(NamedTuple):
    name: str  # what is wrong with the program
    old: str  # a text that occurs exactly once in the script
    new: str  # what stands in its place
    equivalent: str = ""  # why no test can notice


def commands(script):
    """pytest's arguments in the order in which an edit meets them: the second call sees what the first lets pass."""
    name = script.removesuffix(".py")
    if name == "data_collect":
        return [
            ["tests/test_any_mdp.py", "tests/test_data_collect.py", "tests/test_dataset_file.py"],
            ["tests/test_scripts.py"],
        ]
    return [[f"tests/test_{name}.py"], ["tests/test_scripts.py", "-k", name]]


def edited(script, mutant):
    """-> text of the edited script, line of the edit; ValueError if it cannot be made."""
    text = (ROOT / script).read_text()
    before, *after = text.split(mutant.old)
    if len(after) != 1:
        raise ValueError(f"its text occurs {len(after)} times")
    changed = before + mutant.new + after[0]
    try:
        compile(changed, script, "exec")
    except SyntaxError as error:
        raise ValueError(f"the result is no Python: {error}") from None
    return changed, before.count("\n") + 1


def copy_tree(target):
    """What git knows of the working tree, or would add; datasets as links."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        source, copy = ROOT / name, target / name
        if source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(source) if name.startswith("datasets/") else shutil.copy(source, copy)
    return target


def run_tests(tree, arguments, running, limit=None):
    """-> pytest's exit code, None if it took longer than `limit` seconds, and its last line that names a test."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--basetemp={tree}-tests"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    place = {"cwd": tree, "env": os.environ | ENVIRONMENT, "start_new_session": True}
    process = subprocess.Popen([*command, *arguments], **streams, **place)
    running.append(process)
    try:
        lines = process.communicate(timeout=limit)[0].splitlines()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the programs that the tests have started
        process.communicate()
        return None, f"longer than {limit:.0f} s"
    named = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return process.returncode, (named or lines or [""])[-1][:110]


def time_tests(trees, running, script):
    """Run the tests of the script as it is -> seconds that they may take on an edited one; they must pass."""
    tree, limits = trees.get(), []
    for arguments in commands(script):
        start = time.time()
        code, said = run_tests(tree, arguments, running)
        what = f"{script} unmodified: {' '.join(arguments)} ended with {code} after {time.time() - start:.0f} s: {said}"
        if code:
            raise SystemExit(what)
        print(what, flush=True)
        limits.append(60 + 5 * (time.time() - start))
    trees.put(tree)
    return limits


def examine(trees, running, script, mutant, limits):
    """Run the tests on an edited copy -> verdict, what there is to say."""
    (text, line), tree = edited(script, mutant), trees.get()
    original = (tree / script).read_text()
    (tree / script).write_text(text)
    for arguments, limit in zip(commands(script), limits):
        code, said = run_tests(tree, arguments, running, limit)
        if code != 0:
            break
    (tree / script).write_text(original)
    trees.put(tree)
    if code in (1, None) and not mutant.equivalent:
        return "killed", said
    if code != 0:
        return "ERROR", f"pytest ended with {code}: {said}"
    if mutant.equivalent:
        return "equivalent", mutant.equivalent
    old, new = mutant.old.replace("\n", "\n- "), mutant.new.replace("\n", "\n+ ")
    return "SURVIVED", f"{script}:{line}\n- {old}\n+ {new}"


def run_all(chosen, jobs, tally):
    running = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        trees = Queue()
        for job in range(jobs):
            trees.put(copy_tree(Path(folder) / str(job)))
        try:
            scripts = list(dict.fromkeys(script for script, _ in chosen))
            limits = dict(zip(scripts, pool.map(partial(time_tests, trees, running), scripts)))
            start = time.time()
            futures = {pool.submit(examine, trees, running, s, mutant, limits[s]): (s, mutant) for s, mutant in chosen}
            for done, future in enumerate(as_completed(futures), 1):
                (script, mutant), (verdict, said) = futures[future], future.result()
                tally[script][verdict] += 1
                left = (time.time() - start) / done * (len(chosen) - done) / 60
                print(f"[{done}/{len(chosen)}, {left:.0f} min left] {script} {verdict}: {mutant.name}")
                print("    " + said.replace("\n", "\n    "), flush=True)
        except BaseException:  # e.g. Ctrl-C, which does not reach the tests
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            raise


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="by default all of " + ", ".join(MUTANTS))
    parser.add_argument("--jobs", type=int, default=1, help="tests side by side, each on one thread")
    parser.add_argument("--only", default="", metavar="TEXT", help="only edits whose name contains it")
    parser.add_argument("--list", action="store_true", help="only check that every edit can be made")
    args = parser.parse_args()
    scripts = [f"{Path(name).stem}.py" for name in args.scripts] or list(MUTANTS)
    if not set(scripts) <= set(MUTANTS):
        parser.error("no edits of " + ", ".join(sorted(set(scripts) - set(MUTANTS))))
    tally, chosen = {script: Counter() for script in scripts}, []
    for script, mutant in [(s, m) for s in scripts for m in MUTANTS[s] if args.only.lower() in m.name.lower()]:
        try:
            line = edited(script, mutant)[1]
        except ValueError as error:
            tally[script]["CANNOT BE APPLIED"] += 1
            print(f"{script} CANNOT BE APPLIED: {mutant.name}\n    {error}")
            continue
        chosen.append((script, mutant))
        if args.list:
            tally[script]["applies"] += 1
            print(f"{script}:{line}: {mutant.name}" + f" (equivalent: {mutant.equivalent})" * bool(mutant.equivalent))
    if not args.list:
        run_all(chosen, args.jobs, tally)
    for script, counts in tally.items():
        print(f"{script}: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in sorted(counts)))
    return int(any(BAD & set(counts) for counts in tally.values()))


SEEDS = [  # what all scripts share
    Mutant("one initialization for all seeds", "torch.manual_seed(args.seed)", "torch.manual_seed(0)"),
    Mutant("the same batches for all seeds", "(data.device).manual_seed(args.seed)", "(data.device).manual_seed(0)"),
]
BACKBONE = [  # what focal.py, unicorn.py, corro.py and, but for the entropy, the siblings of focal.py share
    *SEEDS,
    Mutant("the actor minimizes Q", "agent.brac_alpha * divergence - q_mean", "agent.brac_alpha * divergence + q_mean"),
    Mutant(
        "the target is the maximum of the twins",
        "torch.tanh(next_pre), z_fixed).amin(0)",
        "torch.tanh(next_pre), z_fixed).amax(0)",
    ),
    Mutant("targets of the online critics", "next_q = agent.q_target(", "next_q = agent.q("),
    Mutant("the value after a segment is ignored", "segment.bootstrap * next_q", "0 * next_q"),
    Mutant(
        "the value after a segment is discounted by one step",
        "segment.bootstrap * next_q",
        "args.gamma * (segment.bootstrap > 0) * next_q",
    ),
    Mutant("termination ignored", "segment.bootstrap * next_q", "args.gamma**args.n_step * next_q"),
    Mutant("rewards are not discounted", "(segment.weight * segment.rew)", "((segment.weight > 0) * segment.rew)"),
    Mutant(
        "rewards after the episode's end count",
        "(segment.weight * segment.rew)",
        "(args.gamma ** torch.arange(args.n_step, device=obs.device) * segment.rew)",
    ),
    Mutant("the value is that after the first step", "segment.next_obs[:, :, -1]", "segment.next_obs[:, :, 0]"),
    Mutant("the critics learn the last action", "segment.act[:, :, 0]", "segment.act[:, :, -1]"),
    Mutant("reward scale ignored", "args.reward_scale * (segment", "(segment"),
    Mutant("target noise ignored", "next_pre = mean + next_noise * log_std.exp()", "next_pre = mean + log_std.exp()"),
    Mutant("next actions without noise", "next_pre = mean + next_noise *", "next_pre = mean + 0 *"),
    Mutant("entropy is a cost in the target", "next_q - args.entropy_weight", "next_q + args.entropy_weight"),
    Mutant("the behavior policy is driven away from the data", "behavior_loss = -tanh", "behavior_loss = tanh"),
    Mutant(
        "the behavior policy is fitted to all of the data",
        "agent.fitted(best.obs, z_fixed), pre_tanh(best.act))",
        "agent.fitted(obs, z_fixed), pre_tanh(act))",
    ),
    Mutant("the behavior policy is fitted to actions after their tanh", "pre_tanh(best.act))", "best.act)"),
    Mutant("anchor-share without effect", "generator, args.anchor_share)", "generator)"),
    Mutant(
        "divergence from the behavior policy to the policy",
        "divergence = gaussian_kl(mean, log_std, mean_b, log_std_b)",
        "divergence = gaussian_kl(mean_b, log_std_b, mean, log_std)",
    ),
    Mutant("the policy does not start at the behavior policy", "return mean_b + mean,", "return mean,"),
    Mutant("the clone is the policy", "torch.tanh(mean_b if clone else mean)", "torch.tanh(mean)"),
    Mutant("the clone is not evaluated, but the policy", "partial(adapt, agent, clone=True)", "partial(adapt, agent)"),
    Mutant(
        "the final evaluation plays as many episodes as in training",
        "protocols, episodes, clone)",
        "protocols, args.eval_episodes, clone)",
    ),
    Mutant(
        "the critic's error is that of scaled rewards", ".amin(0) / args.reward_scale", ".amin(0) * args.reward_scale"
    ),
    Mutant(
        "the critic's error is that of the twins' mean",
        "agent.q(obs, agent.act(obs, z), z).amin(0)",
        "agent.q(obs, agent.act(obs, z), z).mean(0)",
    ),
    Mutant("the critic's error without discount", "q, args.gamma, protocols", "q, 1.0, protocols"),
    Mutant("n-step without effect", "args.n_step, args.gamma, generator", "1, args.gamma, generator"),
    Mutant("segments without discount", "args.n_step, args.gamma, generator", "args.n_step, 1.0, generator"),
    Mutant("contexts of other tasks", "sample_context(task_ids,", "sample_context(task_ids.roll(1),"),
    Mutant("segments of other tasks", "sample_segments(task_ids,", "sample_segments(task_ids.roll(1),"),
    Mutant(
        "the behavior policy is fitted to other tasks",
        "best = data.sample_batch(task_ids,",
        "best = data.sample_batch(task_ids.roll(1),",
    ),
    Mutant("no decay of the learning rate", "args.lr * run.decay", "args.lr"),
]
WITHOUT_CONTEXT = [  # what focal.py, unicorn.py and the siblings of focal.py share
    Mutant("z = 0 without a context", "torch.where(mask.any(1, keepdim=True), z, agent.z_mean)", "z"),
    Mutant("the mean of z is never set", "    agent.z_mean.copy_(", "    0 * agent.z_mean.add("),
    Mutant(
        "the mean of z over test tasks",
        "partial(embed, agent), data.train_ids)",
        "partial(embed, agent), data.test_ids)",
    ),
]
# edits of lines that read otherwise without an entropy
OF_THE_ENTROPY = {"the target is the maximum of the twins", "target noise ignored", "next actions without noise"}
OF_THE_ENTROPY |= {"entropy is a cost in the target", "no decay of the learning rate"}

MUTANTS = {
    "flora.py": [
        *SEEDS,
        Mutant("the actor minimizes Q", "divergence - q.mean()", "divergence + q.mean()"),
        Mutant("the divergence is rewarded", "agent.brac_alpha * divergence - q", "-agent.brac_alpha * divergence - q"),
        Mutant("the policy's Q is the maximum of the twins", ".sum(-1).amin(0), psi", ".sum(-1).amax(0), psi"),
        Mutant("segments of one step", "args.batch_size, args.n_step, args", "args.batch_size, 1, args"),
        Mutant("gamma ignored", "args.n_step, args.gamma, generator)", "args.n_step, 1.0, generator)"),
        Mutant("reward scale ignored in the update", "rew = args.reward_scale * segment.rew", "rew = segment.rew"),
        Mutant("rewards along a segment are not discounted", "(segment.weight * rew).sum(-1)", "rew.sum(-1)"),
        Mutant("the first reward of a segment alone", "(segment.weight * rew).sum(-1)", "rew[..., 0]"),
        Mutant(
            "rewards along a segment are discounted one step early",
            "(segment.weight * rew).sum(-1)",
            "(args.gamma * segment.weight * rew).sum(-1)",
        ),
        Mutant(
            "features along a segment are not discounted", "(segment.weight[..., None] * path_phi).sum", "path_phi.sum"
        ),
        Mutant("the first features of a segment alone", "(segment.weight[..., None] * path_phi).sum(2)", "phi"),
        Mutant("the first features of a segment twice", "agent.phi(moves[:, :, 1:]", "agent.phi(moves[:, :, :-1]"),
        Mutant("no value after a segment", "segment.bootstrap * next_q", "0 * next_q"),
        Mutant("no features after a segment", "segment.bootstrap[..., None] * next_psi", "0 * next_psi"),
        Mutant("the value after a segment is not discounted", "+ segment.bootstrap * next_q", "+ next_q"),
        Mutant(
            "the value after the first step of a segment",
            "next_obs = segment.next_obs[:, :, -1]",
            "next_obs = segment.next_obs[:, :, 0]",
        ),
        Mutant(
            "the value before the last step of a segment",
            "next_obs = segment.next_obs[:, :, -1]",
            "next_obs = segment.obs[:, :, -1]",
        ),
        Mutant(
            "the last transition of a segment is learned from",
            "obs, act = segment.obs[:, :, 0], segment.act[:, :, 0]",
            "obs, act = segment.obs[:, :, -1], segment.act[:, :, -1]",
        ),
        Mutant(
            "the reward loss has the last reward",
            "reward_loss(phi, weights, rew[..., 0])",
            "reward_loss(phi, weights, rew[..., -1])",
        ),
        Mutant("no noise in the targets' action", "args.target_noise * log_std.exp()", "0 * log_std.exp()"),
        Mutant("metric weight ignored", "args.metric_weight * metric_loss", "metric_loss"),
        Mutant("no metric loss", "    if args.metric_weight:\n", "    if False:\n"),
        Mutant("metric loss of a sample of the posterior", "metric_loss(z_mean, task_ids)", "metric_loss(z, task_ids)"),
        Mutant(
            "every row of the metric loss is another task",
            "metric_loss(z_mean, task_ids)",
            "metric_loss(z_mean, torch.arange(len(z), device=z.device))",
        ),
        Mutant("full noise in the targets' action", "args.target_noise * log_std.exp()", "log_std.exp()"),
        Mutant(
            "the targets' noise in the policy's own action",
            "pi_act = torch.tanh(mean + log_std.exp()",
            "pi_act = torch.tanh(mean + args.target_noise * log_std.exp()",
        ),
        Mutant("the correction goes upwards", "psi_mean + alpha * psi_spread", "psi_mean - alpha * psi_spread"),
        Mutant("the spread is a root mean square", "pow(2).sum(0).sqrt()", "pow(2).mean(0).sqrt()"),
        Mutant(
            "targets of the online successor features", "feature_spread(agent.psi_target(", "feature_spread(agent.psi("
        ),
        Mutant(
            "the features in their target are not detached",
            "        path_phi = torch.cat([phi[:, :, None], later_phi], 2)  # [M, B, n, D]\n        path_psi = (",
            "    path_phi = torch.cat([phi[:, :, None], later_phi], 2)\n    if True:\n        path_psi = (",
        ),
        Mutant("squares in place of Huber's loss", "F.huber_loss(psi,", "F.mse_loss(psi,"),
        Mutant("the feature loss is a mean over features", ".sum((0, -1)).mean()", ".mean(-1).sum(0).mean()"),
        Mutant(
            "no correction in the likelihood's target",
            "next_q = (next_psi * weights_fixed).sum(-1)",
            "next_q = (psi_mean * weights_fixed).sum(-1)",
        ),
        Mutant("the KL term is maximized", "likelihood - args.kl_weight * kl", "likelihood + args.kl_weight * kl"),
        Mutant("the likelihood is minimized", "(loss_r + loss_psi) - elbo", "(loss_r + loss_psi) + elbo"),
        Mutant("likelihood weight ignored", "args.likelihood_weight * value_log", "value_log"),
        Mutant("feature weight ignored", "args.feature_weight * (loss_r + loss_psi)", "(loss_r + loss_psi)"),
        Mutant("the flows' volume has the wrong sign", ".sum(-1) - log_det", ".sum(-1) + log_det"),
        Mutant("the prior sees z before the flows", "log_q + 0.5 * z_k.pow(2)", "log_q + 0.5 * z_0.pow(2)"),
        Mutant("wrong slope of tanh in the flows' volume", "((1 - h**2) * (w @ u))", "((1 - h) * (w @ u))"),
        Mutant("flows that need not be invertible", "zip(self.corrected_u(), self.w", "zip(self.u, self.w"),
        Mutant("padding of a context counts as evidence", "mask[..., None] / F.softplus(var)", "1 / F.softplus(var)"),
        Mutant("the noise of z has the variance as its scale", "mean + var.sqrt() * noise", "mean + var * noise"),
        Mutant(
            "no noise on z in training",
            "noise = torch.randn(len(context), args",
            "noise = torch.zeros(len(context), args",
        ),
        Mutant(
            "W is not trained",
            "inputs=[*agent.phi.parameters(), *agent.weights.parameters()]",
            "inputs=[*agent.phi.parameters()]",
        ),
        Mutant(
            "z gets no gradient through W",
            "weights = agent.weights(z)[:, None]  #",
            "weights = agent.weights(z_fixed)[:, None]  #",
        ),
        Mutant("softmax of W over the tasks", "logits.softmax(-1) if", "logits.softmax(0) if"),
        Mutant("the behavior policy is driven away from the data", "behavior_loss = -tanh", "behavior_loss = tanh"),
        Mutant(
            "divergence from the behavior policy to the policy",
            "divergence = gaussian_kl(mean, log_std, mean_b, log_std_b)",
            "divergence = gaussian_kl(mean_b, log_std_b, mean, log_std)",
        ),
        Mutant("the policy does not start at the behavior policy", "return mean_b + mean,", "return mean,"),
        Mutant(
            "the behavior policy is fitted to the segments",
            "agent.fitted(best.obs, z_fixed), pre_tanh(best.act)",
            "agent.fitted(obs, z_fixed), pre_tanh(act)",
        ),
        Mutant("the behavior policy is fitted to all episodes", "generator, args.anchor_share)", "generator)"),
        Mutant(
            "the behavior policy is fitted to other tasks' best",
            "sample_batch(task_ids,",
            "sample_batch(task_ids.roll(1),",
        ),
        Mutant("log-density without the slope of tanh", "(gaussian - log_slope).sum(-1)", "gaussian.sum(-1)"),
        Mutant(
            "the multiplier falls where it should grow",
            "(divergence - args.divergence_target)",
            "(args.divergence_target - divergence)",
        ),
        Mutant("the multiplier has no limit", ".clamp_(0, args.brac_alpha_max)", ".clamp_(min=0)"),
        Mutant(
            "targets follow at 1 - tau",
            "list(agent.psi.parameters()), args.tau)",
            "list(agent.psi.parameters()), 1 - args.tau)",
        ),
        Mutant("a reward of the bandit is divided by no probability", "gain / self.arm_probs()[self.arm]", "gain"),
        Mutant(
            "the bandit credits losses", "(episode_return - self.last_return)", "(self.last_return - episode_return)"
        ),
        Mutant("no least probability of an arm", "floor = 0.05", "floor = 0.0"),
        Mutant("one arm for the whole training", "run.step % args.bandit_every == 0", "run.step == 0"),
        Mutant(
            "the bandit's value is pessimistic", "(psi.mean(0) * agent.weights(z)", "(psi.amin(0) * agent.weights(z)"
        ),
        Mutant("contexts of other tasks", "sample_context(task_ids,", "sample_context(task_ids.roll(1),"),
        Mutant("segments of other tasks", "sample_segments(task_ids,", "sample_segments(task_ids.roll(1),"),
        Mutant(
            "training on test tasks",
            "data.sample_tasks(args.meta_batch, generator)",
            "data.sample_tasks(args.meta_batch, generator) * 0 + int(data.test_ids[0])",
        ),
        Mutant("no decay of the encoder's learning rate", "args.encoder_lr * run.decay", "args.encoder_lr"),
        Mutant("the encoder learns at the rate of the rest", "torch.tensor(args.encoder_lr)", "torch.tensor(args.lr)"),
        Mutant("the encoder falls to the rate of the rest", "args.encoder_lr * run.decay", "args.lr * run.decay"),
        Mutant(
            "the encoder takes two steps",
            'apart = ("behavior.", "encoder.", "flows.")',
            'apart = ("behavior.", "flows.")',
        ),
        Mutant(
            "the flows take two steps",
            'apart = ("behavior.", "encoder.", "flows.")',
            'apart = ("behavior.", "encoder.")',
        ),
        Mutant("the encoder is not trained", "    agent.encoder_opt.step()\n", ""),
        Mutant("the encoder's gradients add up", "    agent.encoder_opt.zero_grad()\n", ""),
        Mutant(
            "the flows are not trained",
            "[*self.encoder.parameters(), *self.flows.parameters()]\n        self",
            "[*self.encoder.parameters()]\n        self",
        ),
        Mutant("no decay of the learning rate", "args.lr * run.decay", "args.lr"),
        Mutant(
            "a compiled update gives the buffers of its graph away", "donated_buffer = False", "donated_buffer = True"
        ),
        Mutant("evaluation always samples z", "noise = explore * torch.randn", "noise = torch.randn"),
        Mutant("the clone is the policy", "mean_b if clone else mean", "mean"),
        Mutant("the clone is not adapted", "agent.act(obs[:, None], z, clone)", "agent.act(obs[:, None], z)"),
        Mutant("the clone is not evaluated", "partial(adapt, agent, clone=True)", "partial(adapt, agent)"),
        Mutant("the value has the scale of the losses", ")[0] / args.reward_scale", ")[0]"),
        Mutant(
            "the value is of the clone's action",
            "agent.act(obs, z), z, agent.weights(z)[:, None])[0]",
            "agent.act(obs, z, True), z, agent.weights(z)[:, None])[0]",
        ),
        Mutant("the critic's error without discount", "q, args.gamma, protocols", "q, 1.0, protocols"),
        Mutant(
            "every evaluation has the episodes of the training's",
            "protocols, episodes, clone)",
            "protocols, args.eval_episodes, clone)",
        ),
        Mutant(
            "the behavior policy is not detached for the policy",
            "with torch.no_grad():\n            mean_b, log_std_b = self.fitted",
            "if True:\n            mean_b, log_std_b = self.fitted",
            equivalent="every backward pass names the parameters that it reaches",
        ),
        Mutant(
            "policy and targets see a sample",
            "z_fixed = agent.flows(z_mean)[0]",
            "z_fixed = z.detach()",
        ),
        Mutant(
            "policy and targets see the mean before the flows", "z_fixed = agent.flows(z_mean)[0]", "z_fixed = z_mean"
        ),
        Mutant("the policy's Q has the sample's weights", "z_fixed, weights_fixed)", "z_fixed, weights.detach())"),
        Mutant("the targets have the sample's weights", "next_psi * weights_fixed", "next_psi * weights"),
        Mutant(
            "the errors' mean counts in the likelihood", "error.var((1, 2), correction=0)", "error.pow(2).mean((1, 2))"
        ),
        Mutant("both networks share the errors' spread", "error.var((1, 2), correction=0)", "error.var(correction=0)"),
        Mutant("pi_beta without weight decay", '"weight_decay": args.behavior_decay', '"weight_decay": 0.0'),
        Mutant("everything decays", '"params": rest, "weight_decay": 0.0', '"params": rest, "weight_decay": 0.3'),
        Mutant("the features start at random", "(self.behavior, self.shift, self.phi)", "(self.behavior, self.shift)"),
    ],
    "focal.py": [
        *WITHOUT_CONTEXT,
        *BACKBONE,
        Mutant("an entropy at the mean", "1.0 if args.entropy_weight else args.target_noise", "args.target_noise"),
        Mutant(
            "further steps of the dual critic on other tasks",
            "more = [data.sample_batch(task_ids,",
            "more = [data.sample_batch(task_ids.roll(1),",
        ),
        Mutant(
            "the policy's Q is the mean of the twins",
            "agent.q(obs, pi_act, z_fixed).amin(0)",
            "agent.q(obs, pi_act, z_fixed).mean(0)",
        ),
        Mutant(
            "entropy is a cost of the policy", "actor_loss + args.entropy_weight", "actor_loss - args.entropy_weight"
        ),
        Mutant("the critics' losses are averaged", ".pow(2).mean((1, 2)).sum()", ".pow(2).mean()"),
        Mutant("different tasks attract each other", "return pull + push", "return pull - push"),
        Mutant(
            "pairs of one task are taken for pairs of two",
            "(task_ids[:, None] == task_ids)",
            "(task_ids[:, None] != task_ids)",
        ),
        Mutant(
            "a task drawn twice counts as two",
            "metric_loss(z, task_ids)\n",
            "metric_loss(z, torch.arange(len(z), device=z.device))\n",
        ),
        Mutant("metric weight ignored", "args.metric_weight * metric_loss", "metric_loss"),
        Mutant(
            "distance as a sum over dimensions", "(z[:, None] - z).pow(2).mean(-1)", "(z[:, None] - z).pow(2).sum(-1)"
        ),
        Mutant("attraction without its root", "(distance + EPS).sqrt()", "(distance + EPS)"),
        Mutant("the critics train the encoder too", "z_fixed = z.detach()", "z_fixed = z"),
        Mutant("z is averaged over the padding too", "mask.sum(1, keepdim=True).clamp(min=1)", "max(mask.shape[1], 1)"),
        Mutant(
            "embeddings without bound", "torch.tanh(self.net(context.flatten(0, 1)))", "self.net(context.flatten(0, 1))"
        ),
        Mutant(
            "the dual divergence has its sides exchanged",
            "1 - F.softplus(c_data) + torch.log(F.softplus(c_policy) + 1e-8)",
            "1 - F.softplus(c_policy) + torch.log(F.softplus(c_data) + 1e-8)",
        ),
        Mutant("the dual critic is minimized", "loss = penalty - dual_divergence", "loss = penalty + dual_divergence"),
        Mutant(
            "the penalty is taken at the policy's actions alone",
            "torch.lerp(pi_act, act, torch.rand_like(act[..., :1]))",
            "pi_act.clone()",
        ),
        Mutant("slopes below 1 are punished too", "(slope.abs() - 1).clamp(min=0)", "(slope.abs() - 1)"),
        Mutant("weight of the penalty ignored", "args.gp_weight * slope_penalty", "slope_penalty"),
        Mutant("the modes of the penalty are exchanged", 'if mode == "gradient":', 'if mode == "output":'),
        Mutant("the dual critic steps once per update", "for other in more:", "for other in more[:0]:"),
        Mutant("dual learning rate ignored", "torch.tensor(args.dual_lr)", "torch.tensor(args.lr)"),
        Mutant(
            "the dual divergence has no gradient",
            "agent.dual(obs, pi_act, z_fixed)[0])",
            "agent.dual(obs, pi_act.detach(), z_fixed)[0])",
        ),
        Mutant(
            "the multiplier falls where it should grow",
            "(divergence - args.divergence_target)",
            "(args.divergence_target - divergence)",
        ),
        Mutant(
            "targets are copies of the critics",
            "list(agent.q.parameters()), args.tau)",
            "list(agent.q.parameters()), 1.0)",
        ),
        Mutant("z does not enter the networks", "(h + of_task[:, :, None])", "(h + self.b_1[:, :, None])"),
    ],
    "csro.py": [
        *WITHOUT_CONTEXT,
        *(m for m in BACKBONE if m.name not in OF_THE_ENTROPY),
        Mutant("targets of the online critics", "next_q = agent.q_target(", "next_q = agent.q("),
        Mutant("the target is the maximum of the twins", "next_act, z_fixed).amin(0)", "next_act, z_fixed).amax(0)"),
        Mutant("target noise ignored", "args.target_noise * log_std.exp()", "log_std.exp()"),
        Mutant("next actions without noise", "args.target_noise * log_std.exp()", "0 * log_std.exp()"),
        Mutant(
            "no decay of the guess's learning rate",
            "set_lr(agent.guess_opt, args.lr * run.decay)",
            "set_lr(agent.guess_opt, args.lr)",
        ),
        Mutant("no decay of the learning rate", "set_lr(agent.opt, args.lr * run.decay)", "set_lr(agent.opt, args.lr)"),
        Mutant("the bound is made large", "+ args.club_weight * bound", "- args.club_weight * bound"),
        Mutant("the weight of the bound ignored", "+ args.club_weight * bound", "+ bound"),
        Mutant("metric weight ignored", "args.metric_weight * metric_loss", "metric_loss"),
        Mutant(
            "the bound has CLUB's factor 1/2", "((of_all - own) / var).mean()", "((of_all - own) / (2 * var)).mean()"
        ),
        Mutant("the negatives are the mean embedding", "(center - mean).pow(2) + spread", "(center - mean).pow(2)"),
        Mutant("sample variance of the embeddings", "each.var(1, correction=0", "each.var(1, correction=1"),
        Mutant("negatives of all tasks", "each.mean(1, keepdim=True), each", "each.mean((0, 1), keepdim=True), each"),
        Mutant(
            "the guess sees the rewards",
            "context[..., : obs.shape[-1] + act.shape[-1]]",
            "context[..., 1 : 1 + obs.shape[-1] + act.shape[-1]]",
        ),
        Mutant(
            "the encoder pleases the guess",
            "guess_loss(each.detach(), *agent",
            "guess_loss(each, *agent",
            "the backward pass reaches the guess's parameters alone",
        ),
        Mutant("the guess is not trained", "    agent.guess_opt.step()\n", ""),
        Mutant("the guess's gradients add up", "    agent.guess_opt.zero_grad()\n", ""),
        Mutant("the guess's weight ignored", "args.guess_weight * guess_loss", "guess_loss"),
        Mutant("no logarithm of the variance", " + 0.5 * var.log()).mean()", ").mean()"),
        Mutant(
            "the guess's mean without bound",
            "mean, var = torch.tanh(self.net(obs_act)).chunk(2, -1)",
            "mean, var = self.net(obs_act).chunk(2, -1)",
        ),
        Mutant("z is averaged over the padding too", "mask.sum(1, keepdim=True).clamp(min=1)", "max(mask.shape[1], 1)"),
        Mutant("the padding is embedded", "self.each(context) * mask[..., None]", "self.each(context)"),
        Mutant("the critics train the encoder too", "z_fixed = z.detach()", "z_fixed = z"),
        Mutant(
            "the multiplier falls where it should grow",
            "(divergence - args.divergence_target)",
            "(args.divergence_target - divergence)",
        ),
        Mutant("another default weight of the guess", "guess_weight: float = 10.0", "guess_weight: float = 1.0"),
        Mutant(
            "its ablation is refused",
            'MAY_BE_ZERO = {"metric_weight", "club_weight"}',
            'MAY_BE_ZERO = {"metric_weight"}',
        ),
    ],
    "er_trl.py": [
        *WITHOUT_CONTEXT,
        *(m for m in BACKBONE if m.name not in OF_THE_ENTROPY),
        Mutant("the target is the maximum of the twins", "next_act, z_fixed).amin(0)", "next_act, z_fixed).amax(0)"),
        Mutant("target noise ignored", "args.target_noise * log_std.exp()", "log_std.exp()"),
        Mutant("next actions without noise", "args.target_noise * log_std.exp()", "0 * log_std.exp()"),
        Mutant("no decay of the learning rate", "set_lr(agent.opt, args.lr * run.decay)", "set_lr(agent.opt, args.lr)"),
        Mutant("no decay of the GAN's learning rate", "args.gan_lr * run.decay", "args.gan_lr"),
        Mutant("the GAN learns at the others' rate", "args.gan_lr * run.decay", "args.lr * run.decay"),
        Mutant(
            "the encoder minimizes the entropy", "- args.behavior_entropy_weight *", "+ args.behavior_entropy_weight *"
        ),
        Mutant("the weight of the entropy ignored", "- args.behavior_entropy_weight * entropy", "- entropy"),
        Mutant("metric weight ignored", "args.metric_weight * metric_loss", "metric_loss"),
        Mutant(
            "no entropy reaches the encoder", "agent.generator(obs, z)).mean()", "agent.generator(obs, z_fixed)).mean()"
        ),
        Mutant(
            "entropy of the data's actions",
            "action_entropy(agent.generator(obs, z))",
            "action_entropy(act + 0 * z.sum())",
        ),
        Mutant("covariance of all tasks", "act - act.mean(1, keepdim=True)", "act - act.mean((0, 1), keepdim=True)"),
        Mutant("covariance about 0", "act - act.mean(1, keepdim=True)", "act"),
        Mutant("biased covariance", "max(act.shape[1] - 1, 1)", "act.shape[1]"),
        Mutant("the covariance's diagonal without its least value", "+ 1e-5 * torch.eye", "+ 0 * torch.eye"),
        Mutant("entropy without its factor 1/2", "return 0.5 * torch.linalg", "return torch.linalg"),
        Mutant(
            "the discriminator takes imitated actions for the data's",
            "+ F.softplus(fake).mean()",
            "+ F.softplus(-fake).mean()",
        ),
        Mutant("the discriminator does not see the data", "F.softplus(-real).mean() + F", "0 * real.mean() + F"),
        Mutant(
            "the generator wants to be told apart", "return F.softplus(-fake).mean()", "return F.softplus(fake).mean()"
        ),
        Mutant(
            "the generator minimizes log(1 - D)", "return F.softplus(-fake).mean()", "return -F.softplus(fake).mean()"
        ),
        Mutant("the generator is not trained", "    agent.generator_opt.step()\n", ""),
        Mutant("the discriminator is not trained", "    agent.discriminator_opt.step()\n", ""),
        Mutant("the generator's gradients add up", "    agent.generator_opt.zero_grad()\n", ""),
        Mutant("the discriminator's gradients add up", "    agent.discriminator_opt.zero_grad()\n", ""),
        Mutant("one step of the GAN", "range(args.gan_steps)", "range(1)"),
        Mutant("the GAN's momentum ignored", "betas=(args.gan_momentum, 0.999), ", ""),
        Mutant("another momentum of the GAN", "gan_momentum: float = 0.5", "gan_momentum: float = 0.9"),
        Mutant("any momentum of the GAN", "MAY_BE_ZERO, RANGES)", "MAY_BE_ZERO)"),
        Mutant("the generator without noise", "torch.cat([obs, noise], -1)", "torch.cat([obs, 0 * noise], -1)"),
        Mutant("the tasks share their noise", "torch.randn(*obs.shape[:2], self", "torch.randn(1, obs.shape[1], self"),
        Mutant(
            "imitated actions without bound",
            "return torch.tanh(super().forward(torch.cat([obs, noise], -1), z)[0])",
            "return super().forward(torch.cat([obs, noise], -1), z)[0]",
        ),
        Mutant(
            "the GAN imitates the best episodes",
            "update_gan(agent, obs, act, z_fixed)",
            "update_gan(agent, best.obs, best.act, z_fixed)",
        ),
        Mutant("the critics train the encoder too", "z_fixed = z.detach()", "z_fixed = z"),
        Mutant("z is averaged over the padding too", "mask.sum(1, keepdim=True).clamp(min=1)", "max(mask.shape[1], 1)"),
        Mutant(
            "the multiplier falls where it should grow",
            "(divergence - args.divergence_target)",
            "(args.divergence_target - divergence)",
        ),
    ],
    "focal_pp.py": [
        *WITHOUT_CONTEXT,
        *(m for m in BACKBONE if m.name not in OF_THE_ENTROPY),
        Mutant("the target is the maximum of the twins", "next_act, z_fixed).amin(0)", "next_act, z_fixed).amax(0)"),
        Mutant("target noise ignored", "args.target_noise * log_std.exp()", "log_std.exp()"),
        Mutant("next actions without noise", "args.target_noise * log_std.exp()", "0 * log_std.exp()"),
        Mutant("no decay of the learning rate", "args.lr * run.decay", "args.lr"),
        Mutant("metric weight ignored", "args.metric_weight * metric_loss", "metric_loss"),
        Mutant("contrastive weight ignored", "args.nce_weight * nce", "nce"),
        Mutant("similarities are not normalized", "F.normalize(query, dim=-1) @", "query @"),
        Mutant("keys are not normalized", "F.normalize(key, dim=-1).T", "key.T"),
        Mutant("temperature ignored", "F.normalize(key, dim=-1).T / temperature", "F.normalize(key, dim=-1).T"),
        Mutant("a task's other contexts are negatives", "similarity.masked_fill(twins, -math.inf)", "similarity"),
        Mutant(
            "keys pick queries",
            "return F.cross_entropy(similarity.masked_fill",
            "return F.cross_entropy(similarity.T.masked_fill",
        ),
        Mutant("keys of the same contexts", "agent.key_encoder(other, real)", "agent.key_encoder(context, real)"),
        Mutant("keys of the encoder itself", "agent.key_encoder(other, real)", "agent.encoder(other, real)"),
        Mutant("the key encoder stays", "1 - args.momentum)", "0.0)"),
        Mutant("the key encoder copies", "1 - args.momentum)", "1.0)"),
        Mutant("momentum the other way", "1 - args.momentum)", "args.momentum)"),
        Mutant("both contexts are one", "generator) for _ in range(2))", "generator),) * 2"),
        Mutant("gate without effect", "gate.exp() * mask", "mask"),
        Mutant("gate without exponential", "gate.exp() * mask", "gate * mask"),
        Mutant(
            "gate of the first feature",
            "(torch.tanh(self.narrow(h)))).mean(-1)",
            "(torch.tanh(self.narrow(h))))[..., 0]",
        ),
        Mutant("gate without its first tanh", "self.widen(torch.tanh(self.narrow(h)))", "self.widen(self.narrow(h))"),
        Mutant("the padding has weight", "gate.exp() * mask", "gate.exp()"),
        Mutant("the padding is seen", "real = (mask > 0) |", "real = (mask > -1) |"),
        Mutant("attention in place of the transition", "h = h + self.attend(h, mask)", "h = self.attend(h, mask)"),
        Mutant("one head", "x.unflatten(-1, (self.heads, -1))", "x.unflatten(-1, (1, -1))"),
        Mutant("queries and keys change places", "attention(query, key, value", "attention(key, query, value"),
        Mutant("embeddings without bound", "torch.tanh(self.last(h))", "self.last(h)"),
        Mutant("--no-gate without effect", "args.encoder_width, args.gate, args", "args.encoder_width, True, args"),
        Mutant("--no-attention without effect", "args.attention, args.heads)", "True, args.heads)"),
        Mutant(
            "rows after the first sixteen are those again",
            "zip(context.split(16), mask.split(16))",
            "zip(context.split(16)[:1] * len(mask.split(16)), mask.split(16))",
        ),
        Mutant("any number of heads passes", "args.attention and args.encoder_width % args.heads", "False"),
        Mutant("the critics train the encoder too", "z_fixed = z.detach()", "z_fixed = z"),
        Mutant(
            "the multiplier falls where it should grow",
            "(divergence - args.divergence_target)",
            "(args.divergence_target - divergence)",
        ),
        Mutant("any momentum", "MAY_BE_ZERO, RANGES)", "MAY_BE_ZERO)"),
        Mutant("another default temperature", "temperature: float = 0.1", "temperature: float = 1.0"),
        Mutant("a gate of the wrong activation", "torch.sigmoid(self.widen(", "torch.tanh(self.widen("),
    ],
    "idaq.py": [
        *WITHOUT_CONTEXT,
        *(m for m in BACKBONE if m.name not in OF_THE_ENTROPY),
        Mutant("the target is the maximum of the twins", "next_act, z_fixed).amin(0)", "next_act, z_fixed).amax(0)"),
        Mutant("target noise ignored", "args.target_noise * log_std.exp()", "log_std.exp()"),
        Mutant("next actions without noise", "args.target_noise * log_std.exp()", "0 * log_std.exp()"),
        Mutant("no decay of the learning rate", "args.lr * run.decay", "args.lr"),
        Mutant("metric weight ignored", "args.metric_weight * metric_loss", "metric_loss"),
        Mutant("the nearest candidate", "distance == distance.amax", "distance == distance.amin"),
        Mutant("far from the farthest tried", ".mean(-1).amin(-1)  # [R, K]", ".mean(-1).amax(-1)  # [R, K]"),
        Mutant("the reference stage forgets what was tried", "        tried.append(z)\n", ""),
        Mutant(
            "the last episode of the reference stage is missing",
            "k < args.reference_episodes",
            "k < args.reference_episodes - 1",
        ),
        Mutant(
            "the z of the last episode is inferred",
            "        if last:\n            z = best_z",
            "        if False:\n            z = best_z",
        ),
        Mutant("worse episodes are accepted", "(returns > best)", "(returns < best)"),
        Mutant("all episodes are accepted", "(returns > best)[:, None]", "(returns > -math.inf)[:, None]"),
        Mutant(
            "the reference stage keeps all that improved",
            "torch.where(better & reference, 0.0, kept)",
            "kept",
        ),
        Mutant(
            "a better episode replaces the accepted ones",
            "torch.where(better & reference, 0.0, kept)",
            "torch.where(better, 0.0, kept)",
        ),
        Mutant("the best return is the last", "torch.maximum(best, returns)", "returns"),
        Mutant("the best z is the last", "torch.where(better, z, best_z)", "z"),
        Mutant("candidates of one training task", "torch.randint(len(pool)", "torch.randint(1"),
        Mutant(
            "hypotheses of the test tasks",
            "log = data.sample_context(data.train_tasks,",
            "log = data.sample_context(torch.as_tensor(data.test_ids),",
        ),
        Mutant(
            "the encoder sees raw observations",
            'data.standardize(torch.as_tensor(done["observations"], device=device)).cpu().numpy()',
            'done["observations"]',
        ),
        Mutant("one start for all episodes", "dc.reset_seeds(tasks, number, k)", "dc.reset_seeds(tasks, number, 0)"),
        Mutant("the return that counts is the best", '"idaq", tasks, found)', '"idaq", tasks, best.numpy())'),
        Mutant("adaptation at every evaluation", 'if "online" in protocols:', "if True:"),
        Mutant(
            "the multiplier falls where it should grow",
            "(divergence - args.divergence_target)",
            "(args.divergence_target - divergence)",
        ),
        Mutant(
            "the adaptation sees raw observations",
            "agent.act(data.standardize(obs)[:, None], z)",
            "agent.act(obs[:, None], z)",
        ),
        Mutant(
            "pi_beta plays the adaptation",
            "agent.act(data.standardize(obs)[:, None], z)",
            "agent.act(data.standardize(obs)[:, None], z, True)",
        ),
        Mutant(
            "what follows an own episode's end is context",
            'data.recorded(torch.as_tensor(done["lengths"], device=device)) * better',
            '(data.recorded(torch.as_tensor(done["lengths"], device=device)) | True) * better',
        ),
        Mutant(
            "the adaptation plays fewer episodes",
            "results |= explore_and_adapt(agent, data, args, episodes)",
            "results |= explore_and_adapt(agent, data, args, args.eval_episodes)",
        ),
        Mutant("diverged episodes are believed", 'np.where(done["diverged"], -math.inf, found)', "found"),
        Mutant("one reference episode by default", "reference_episodes: int = 5", "reference_episodes: int = 1"),
        Mutant("a shorter horizon on MuJoCo than FOCAL's", "gamma=0.97", "gamma=0.9"),
    ],
    "unicorn.py": [
        *WITHOUT_CONTEXT,
        *BACKBONE,
        Mutant("an entropy at the mean", '1.0 if args.backbone == "sac" else args.target_noise', "args.target_noise"),
        Mutant("the actor minimizes Q (sac)", "log_std, pi_pre).mean() - q_mean", "log_std, pi_pre).mean() + q_mean"),
        Mutant(
            "entropy is a cost of the policy",
            "actor_loss = args.entropy_weight *",
            "actor_loss = -args.entropy_weight *",
        ),
        Mutant("the critics train the encoder too", "z_fixed = z.detach()", "z_fixed = z"),
        Mutant("the likelihood rewards large variances", "(-log_var).exp() + log_var", "(-log_var).exp() - log_var"),
        Mutant("errors are multiplied by the variance", "* (-log_var).exp()", "* log_var.exp()"),
        Mutant(
            "the limits of the variance are pushed apart",
            "0.01 * (decoder.high.sum() - ",
            "-0.01 * (decoder.high.sum() - ",
        ),
        Mutant("no lower limit of the variance", "return low + F.softplus(x - low)", "return x"),
        Mutant(
            "the next state is reconstructed, not the difference",
            "targets = (rew, next_obs - obs)",
            "targets = (rew, next_obs)",
        ),
        Mutant(
            "the decoders do not see z",
            "gaussian_nll(*decoder(obs, act, z), target)",
            "gaussian_nll(*decoder(obs, act, 0 * z), target)",
        ),
        Mutant(
            "the decoders are not trained",
            "[*agent.encoder.parameters(), *agent.heads.parameters(), ",
            "[*agent.encoder.parameters(), ",
        ),
        Mutant("metric weight ignored", '"metric": args.metric_weight * metric_loss', '"metric": metric_loss'),
        Mutant("ss-0 has the metric loss", 'if args.variant == "ss-0":', 'if args.variant == "ss-00":'),
        Mutant("no attraction within a task", "return pull + push", "return push"),
        Mutant("repulsion over all pairs", "other = pairs - same", "other = pairs"),
        Mutant("recon-state without effect", "dims = [1, obs_dim] if args.recon_state else [1]", "dims = [1, obs_dim]"),
        Mutant("enc-noise without effect", " if args.enc_noise else 0.0", ""),
        Mutant(
            "noise on z in evaluation",
            "agent.encoder(context, mask, 0.0)",
            "agent.encoder(context, mask, torch.randn_like(context[..., :1]))",
        ),
        Mutant(
            "the noise of z has the variance as its scale",
            "self.log_var.exp().clamp(0.1, 10).sqrt()",
            "self.log_var.exp().clamp(0.1, 10)",
        ),
        Mutant(
            "noise after the bound of the embedding",
            "torch.tanh(mean + std * noise)",
            "(torch.tanh(mean) + std * noise)",
        ),
        Mutant("padding enters z", "std * noise) * mask[..., None]", "std * noise)"),
        Mutant(
            "the classifier learns the labels of other rows",
            "(agent.heads[0](z), labels)",
            "(agent.heads[0](z), labels.roll(1))",
        ),
        Mutant("labels are taken for task numbers", "task_ids = data.train_tasks[labels]", "task_ids = labels"),
        Mutant(
            "the multiplier falls where it should grow", "args.brac_alpha_lr * excess", "-args.brac_alpha_lr * excess"
        ),
        Mutant("targets do not follow", "list(agent.q.parameters()), args.tau)", "list(agent.q.parameters()), 0.0)"),
        Mutant(
            "the policy may be nearly deterministic",
            "(log_std_b + log_std).clamp(-5, 2)",
            "(log_std_b + log_std).clamp(-20, 2)",
        ),
    ],
    "corro.py": [
        *BACKBONE,
        Mutant("an entropy at the mean", '1.0 if args.backbone == "sac" else args.target_noise', "args.target_noise"),
        Mutant("the actor minimizes Q (sac)", "log_std, pi_pre).mean() - q_mean", "log_std, pi_pre).mean() + q_mean"),
        Mutant(
            "the policy's Q is the maximum of the twins",
            "agent.q(obs, pi_act, z_fixed).amin(0)",
            "agent.q(obs, pi_act, z_fixed).amax(0)",
        ),
        Mutant(
            "keys of other tasks",
            "generator)[..., :-1].unbind(1)\n",
            "generator)[..., :-1].unbind(1)\n            key = key.roll(1, 0)\n",
        ),
        Mutant(
            "a query is its own key",
            "torch.cat([query[:, None], key[:, None], negatives]",
            "torch.cat([query[:, None], query[:, None], negatives]",
        ),
        Mutant(
            "similarities are multiplied by the temperature", "similarity / temperature", "similarity * temperature"
        ),
        Mutant(
            "temperature ignored", "cross_entropy(similarity / temperature, first)", "cross_entropy(similarity, first)"
        ),
        Mutant("embeddings off the sphere", "F.normalize(self.net(rows), dim=-1)", "self.net(rows)"),
        Mutant(
            "noise on the next observation, not the reward",
            "negatives[..., -1 - data.obs_dim]",
            "negatives[..., -data.obs_dim]",
        ),
        Mutant(
            "reward noise ignores the spread of the rewards",
            "args.reward_noise * data.reward_spread *",
            "args.reward_noise *",
        ),
        Mutant(
            "all negatives of a query have the same reward",
            "* torch.randn_like(reward)",
            "* torch.randn_like(reward[:, :1])",
        ),
        Mutant(
            "the first two kinds of negatives are exchanged",
            '"generative" if dc.FAMILIES[args.env].dynamics_vary else "reward"',
            '"reward" if dc.FAMILIES[args.env].dynamics_vary else "generative"',
        ),
        Mutant("the VAE's KL has a wrong sign", "log_var.exp() - 1 - log_var", "log_var.exp() - 1 + log_var"),
        Mutant("weight of the VAE's KL ignored", "return kl_weight * kl.mean()", "return kl.mean()"),
        Mutant(
            "the reward weighs as one dimension among all", "error[:, 1:].mean() + error[:, 0].mean()", "error.mean()"
        ),
        Mutant("counterfactuals without noise", "latent = torch.randn(*rows", "latent = torch.zeros(*rows"),
        Mutant(
            "no noise in the VAE's latent",
            "latent = mean + (0.5 * log_var).exp() * torch.randn_like(mean)",
            "latent = mean",
        ),
        Mutant("the VAE's noise has the variance as its scale", "(0.5 * log_var).exp()", "log_var.exp()"),
        Mutant(
            "the VAE learns on test tasks",
            "data.sample_tasks(args.cvae_batch_size, generator)",
            "data.sample_tasks(args.cvae_batch_size, generator) * 0 + int(data.test_ids[0])",
        ),
        Mutant(
            "queries of test tasks",
            "data.sample_tasks(args.num_queries, generator)",
            "data.sample_tasks(args.num_queries, generator) * 0 + int(data.test_ids[0])",
        ),
        Mutant(
            "the aggregator is not trained", "agent.q(obs, act, z) - q_target", "agent.q(obs, act, z_fixed) - q_target"
        ),
        Mutant("padding takes attention", ".masked_fill(mask == 0, -1e9)", ""),
        Mutant(
            "a mean in place of the attention",
            "(score.softmax(1) * mask)",
            "(mask / mask.sum(1, keepdim=True).clamp(min=1))",
        ),
        Mutant(
            "encoder-updates without effect",
            "    if args.encoder_updates is None:\n        args.encoder_updates",
            "    args.encoder_updates",
        ),
        Mutant("the encoder in the point families as short as elsewhere", '(4 if "point" in args.env else 1)', "1"),
        Mutant("the encoder everywhere as long as in the point families", '(4 if "point" in args.env else 1)', "4"),
        Mutant(
            "contexts not standardized",
            "return (self.encoder(rows) - self.center) / self.spread",
            "return self.encoder(rows)",
        ),
        Mutant("the data not standardized", "return points.sub_(agent.center).div_(agent.spread)", "return points"),
        Mutant("the data not centered", "points.sub_(agent.center).div_", "points.div_"),
        Mutant(
            "standardized over test tasks, too",
            "    train = data.train_ids\n",
            "    train = list(range(len(data.lengths)))\n",
        ),
        Mutant("padding in the standardization", "(points * real[..., None]).sum(2)", "points.sum(2)"),
        Mutant(
            "empty episodes in the standardization",
            "(data.lengths[train, :, None] > 0) /",
            "(data.lengths[train, :, None] >= 0) /",
        ),
        Mutant("the spread of a sum, not of a component", ".sum((0, 1)).mean().sqrt()", ".sum().sqrt()"),
        Mutant("nothing for a collapsed encoder", ".sqrt().clamp(min=1e-6)", ".sqrt()"),
        Mutant(
            "the VAE trains as long as the policy",
            "args.total_updates // 2 if args.cvae_updates",
            "args.total_updates if args.cvae_updates",
        ),
        Mutant(
            "encoder-lr without effect",
            "self.encoder.parameters(), args.encoder_lr,",
            "self.encoder.parameters(), args.lr,",
        ),
        Mutant(
            "the multiplier ignores its target", "excess = divergence - args.divergence_target", "excess = divergence"
        ),
        Mutant(
            "targets follow at 1 - tau",
            "list(agent.q.parameters()), args.tau)",
            "list(agent.q.parameters()), 1 - args.tau)",
        ),
    ],
    "macaw.py": [
        *SEEDS,
        Mutant("the policy flees good actions", "return -masked_mean(self.weigh(", "return masked_mean(self.weigh("),
        Mutant(
            "the advantage is flipped",
            "rows.ret + rows.tail * self.value(weights, rows.last_obs) - value",
            "value - rows.ret - rows.tail * self.value(weights, rows.last_obs)",
        ),
        Mutant(
            "the advantage is not continued at the end",
            "rows.ret + rows.tail * self.value(weights, rows.last_obs) - value",
            "rows.ret - value",
        ),
        Mutant("the inner policy flees good actions", "error - self.weigh(", "error + self.weigh("),
        Mutant(
            "the advantage head does not see the action",
            "torch.cat([h, rows.act], -1)",
            "torch.cat([h, 0 * rows.act], -1)",
        ),
        Mutant("the head's loss has no weight", "F.softplus(self.c) * (guess - adv)", "(guess - adv)"),
        Mutant("the head regresses the weight", "(guess - adv).pow(2)", "(guess - self.weigh(adv, rows.mask)).pow(2)"),
        Mutant("the latent ascends", "z = z - a * hold(slope)", "z = z + a * hold(slope)"),
        Mutant("the map stays where it was", "(b * (old_z * z).sum(1, keepdim=True) + c)", "c"),
        Mutant(
            "the offset stays where it was",
            "(b * (old_z * z).sum(1, keepdim=True) + c)",
            "(b * (old_z * z).sum(1, keepdim=True))",
        ),
        Mutant(
            "the latent's slope ignores earlier steps of the map",
            "slope = slope - b * (old_grad",
            "slope = slope - 0 * (old_grad",
        ),
        Mutant(
            "the outer gradient is always of first order",
            "torch.Tensor.detach if first_order else lambda x: x",
            "torch.Tensor.detach",
        ),
        Mutant("first-order without effect", "torch.Tensor.detach if first_order else lambda x: x", "lambda x: x"),
        Mutant("one rate for z, U and u", "a, b, c = rates", "a = b = c = rates[0]"),
        Mutant("returns are not discounted", "mask[..., t] + gamma * ahead", "mask[..., t] + ahead"),
        Mutant("the continuing discount counts padding", "(1 - (1 - gamma) * mask[..., t])", "gamma"),
        Mutant(
            "termination ignored",
            "torch.zeros_like(ended), 1 - ended",
            "torch.zeros_like(ended), torch.ones_like(ended)",
        ),
        Mutant("the cap is on the exponent", "clamp(max=math.log(max_weight))", "clamp(max=max_weight)"),
        Mutant("no cap of the weights", ".clamp(max=math.log(max_weight))", ""),
        Mutant("advantages are centered only", "(temperature * (variance.sqrt() + 1e-8))", "temperature"),
        Mutant("temperature ignored", "(temperature * (variance.sqrt() + 1e-8))", "(variance.sqrt() + 1e-8)"),
        Mutant(
            "biased spread of the advantages",
            "(mask.sum(1, keepdim=True) - 1).clamp(min=1)",
            "mask.sum(1, keepdim=True).clamp(min=1)",
        ),
        Mutant("the policy's spread ignored", "((act - mean) / std).pow(2)", "(act - mean).pow(2)"),
        Mutant(
            "the blend is mostly the adapted value function",
            "torch.lerp(before, after, args.tau)",
            "torch.lerp(after, before, args.tau)",
        ),
        Mutant(
            "the outer target is not continued at the end",
            "target = outer.ret + outer.tail * agent.value(blend, outer.last_obs)",
            "target = outer.ret",
        ),
        Mutant(
            "the outer policy loss is of the initial policy",
            "agent.policy_loss(policy, outer, adv)",
            "agent.policy_loss(agent.policy_net.generate(len(adv)), outer, adv)",
        ),
        Mutant(
            "outer loss on the inner rows",
            "inner, outer = draw_rows(data, table, task_ids, args, generator)",
            "inner, _ = draw_rows(data, table, task_ids, args, generator)\n            outer = inner",
        ),
        Mutant("the outer rows may be of the inner episode", "counts = counts.scatter(1, inner, 0.0)", "pass"),
        Mutant(
            "rows of the buffer ignore the segment", "torch.multinomial(allowed * counts,", "torch.multinomial(counts,"
        ),
        Mutant(
            "episodes of the buffer count alike", "torch.multinomial(allowed * counts,", "torch.multinomial(allowed,"
        ),
        Mutant("inner-rows without effect", 'if args.inner_rows == "episode":  # [ours', "if True:  # [ours"),
        Mutant(
            "rows of the buffer are spread over their episodes",
            'if args.inner_rows == "episode":  # evenly',
            "if True:  # evenly",
        ),
        Mutant(
            "rows of the inner episode are not spread over it",
            'if args.inner_rows == "episode":  # evenly',
            "if False:  # evenly",
        ),
        Mutant(
            "the outer rows follow the inner segment",
            "torch.multinomial(counts, args.batch_size",
            "torch.multinomial(counts * allowed, args.batch_size",
        ),
        Mutant(
            "rows of the buffer need two episodes",
            'if args.inner_rows == "episode" and data.min_episodes < 2:',
            "if data.min_episodes < 2:",
        ),
        Mutant(
            "outer rows of other tasks",
            "rows(outer, torch.rand(outer.shape, device=device, generator=generator))",
            "Rows(*(x.roll(1, 0) for x in rows(outer, torch.rand(outer.shape, device=device, generator=generator))))",
        ),
        Mutant(
            "the inner advantage is of the initial value function",
            "found = self.value(value, rows.obs)",
            "found = self.value(self.value_net.generate(tasks), rows.obs)",
        ),
        Mutant("terminal-bootstrap without effect", "tail * self.args.terminal_bootstrap", "tail"),
        Mutant("returns are not scaled", "ret / self.return_spread", "ret"),
        Mutant("the spread is that of all tasks", "ret[train][seen].std()", "ret[mask > 0].std()"),
        Mutant(
            "inner-steps without effect in training",
            "agent.inner_loop(inner, args.inner_steps,",
            "agent.inner_loop(inner, 1,",
        ),
        Mutant(
            "the middle is centered at the first quarter",
            '"middle": (count - size) // 2',
            '"middle": (count // 2 - size) // 2',
        ),
        Mutant("exploration without noise", "        if explore:\n", "        if False:\n"),
        Mutant("evaluation does not adapt", "if not context.shape[1] or not steps:", "if True:"),
        Mutant("value-lr without effect", "agent.value_opt, args.value_lr", "agent.value_opt, args.lr"),
        Mutant("no decay of the rates' learning rate", "args.rate_lr * run.decay", "args.rate_lr"),
        Mutant(
            "fine-tuning flees good actions",
            "agent.policy_loss(policy, batch, adv).sum().backward()",
            "(-agent.policy_loss(policy, batch, adv)).sum().backward()",
        ),
        Mutant("fine-tuning forgets earlier episodes", "zip(*own)))", "zip(*own[-1:])))"),
        Mutant(
            "training on test tasks",
            "data.sample_tasks(args.meta_batch, generator)",
            "data.sample_tasks(args.meta_batch, generator) * 0 + int(data.test_ids[0])",
        ),
    ],
    "meta_dt.py": [
        *SEEDS,
        Mutant("the return so far, not to go", "rew.flip(-1).cumsum(-1).flip(-1)", "rew.cumsum(-1)"),
        Mutant(
            "returns-to-go off by one", "rew.flip(-1).cumsum(-1).flip(-1)", "rew.flip(-1).cumsum(-1).flip(-1) - rew"
        ),
        Mutant("the data's returns are not scaled", "[..., None] / args.return_scale", "[..., None]"),
        Mutant("a rollout's rewards are not scaled", "rtg = rtg - rew / args.return_scale", "rtg = rtg - rew"),
        Mutant(
            "a rollout adds its rewards", "rtg = rtg - rew / args.return_scale", "rtg = rtg + rew / args.return_scale"
        ),
        Mutant("windows of all episodes", "generator, args.episode_share)", "generator)"),
        Mutant("episodes of no whole share are left out", ".sum(1)).ceil())", ".sum(1)).floor())"),
        Mutant("prompts of other rows at test", "zip(windows, prompts)", "zip(windows, prompts[::-1])"),
        Mutant("all rows act at once", 'if device.type == "cpu" else count', 'if device.type == "none" else count'),
        Mutant(
            "the prompt is what is predicted best",
            "return scores.argmax(1)",
            "return torch.where(scores > 0, scores, 1e9).argmin(1)",
        ),
        Mutant("prompts may start before a context is complete", "(start >= context_horizon) & ", ""),
        Mutant(
            "the last start of a prompt is impossible",
            "start <= lengths[:, None] - count",
            "start < lengths[:, None] - count",
        ),
        Mutant(
            "random and proportional draws are exchanged",
            'weights = scores if how == "sample"',
            'weights = scores if how == "random"',
        ),
        Mutant(
            "training takes the same prompt every time",
            '"sample" if args.prompt_select == "argmax" else args.prompt_select',
            "args.prompt_select",
        ),
        Mutant(
            "at test the prompt is drawn",
            "select(sequences.scores[episode], args.prompt_select, generator)",
            'select(sequences.scores[episode], "sample", generator)',
        ),
        Mutant(
            "a context holds the step itself",
            "episode, step - horizon, horizon)",
            "episode, step - horizon + 1, horizon)",
        ),
        Mutant(
            "rows outside an episode are not zero",
            "rows[episode[:, None], steps] * valid[..., None]",
            "rows[episode[:, None], steps]",
        ),
        Mutant("steps before an episode count as valid", "valid = (steps >= 0) & (steps", "valid = (steps"),
        Mutant("state tokens without z", "torch.cat([self.obs(obs), z], -1)", "torch.cat([self.obs(obs), 0 * z], -1)"),
        Mutant("an action is read after itself", "else 1 - 3 * window", "else 2 - 3 * window"),
        Mutant("a rollout's action is read after itself", "slice(-2 if last", "slice(-1 if last"),
        Mutant("rollouts compute what nobody reads", "*parts, last=True)[:, 0]", "*parts)[:, -1]"),
        Mutant("no causal mask", "(causal & valid[:, None] | itself)", "(valid[:, None] | itself)"),
        Mutant(
            "padding and dropped prompts are attended to",
            "(causal & valid[:, None] | itself)",
            "(causal & torch.ones_like(valid[:, None]) | itself)",
        ),
        Mutant("no embedding of the time", " + self.time(window.steps)[:, :, None]", ""),
        Mutant(
            "the prompt's steps count from 0",
            "self.prompt_time(prompt.steps)",
            "self.prompt_time(prompt.steps - prompt.steps[:, :1])",
        ),
        Mutant(
            "no dropout in training",
            "agent.transformer(window, prompt, args.dropout)",
            "agent.transformer(window, prompt)",
        ),
        Mutant("dropout at test", "*parts, last=True)", "*parts, args.dropout, last=True)"),
        Mutant(
            "no dropout after the attention",
            "F.dropout(self.project(attended), dropout, dropout > 0)",
            "self.project(attended)",
        ),
        Mutant(
            "prompt dropout is the share that is kept",
            "draw[2] >= args.prompt_dropout",
            "draw[2] < args.prompt_dropout",
        ),
        Mutant("a purely zero-shot network gets prompts at test", " and args.prompt_dropout < 1", ""),
        Mutant(
            "the prompt may be of the window's own episode", "rank += rank >= number", "rank += 0 * (rank >= number)"
        ),
        Mutant("prompts of other tasks", "other = ranked[task, rank]", "other = ranked[task.roll(1), rank]"),
        Mutant("prompts of the worst episodes", "returns.argsort(1, descending=True)", "returns.argsort(1)"),
        Mutant(
            "a missing episode may give the prompt",
            ".view_as(lengths).masked_fill(lengths == 0, -math.inf)",
            ".view_as(lengths)",
        ),
        Mutant("best and any are exchanged", 'if args.prompt_episodes == "best"', 'if args.prompt_episodes == "any"'),
        Mutant(
            "best is the very best in training",
            "(lengths[task] > 0).sum(1) - 1, args)",
            "(lengths[task] > 0).sum(1).clamp(max=1), args)",
        ),
        Mutant(
            "the worst other episode gives no prompt",
            "(lengths[task] > 0).sum(1) - 1, args)",
            "(lengths[task] > 0).sum(1) - 2, args)",
        ),
        Mutant(
            "at test the best episode gives the prompt",
            "draw_rank(draw, (lengths > 0).sum(1), args)",
            "draw_rank(0 * draw, (lengths > 0).sum(1), args)",
        ),
        Mutant(
            "at test missing episodes give prompts",
            "draw_rank(draw, (lengths > 0).sum(1), args)",
            "draw_rank(draw, (lengths >= 0).sum(1), args)",
        ),
        Mutant("windows from a uniform step on", "(last - args.window + 1).clamp(min=0)", "last"),
        Mutant("no warm-up", "min((step + 1) / max(updates, 1), 1.0)", "1.0"),
        Mutant("the warm-up starts at 0", "min((step + 1) / max(updates, 1), 1.0)", "min(step / max(updates, 1), 1.0)"),
        Mutant("no decay of the learning rate", "args.warmup_updates) * run.decay", "args.warmup_updates)"),
        Mutant(
            "the transformer's gradient is clipped at 1",
            "clip_grad_norm_(agent.transformer.parameters(), CLIP)",
            "clip_grad_norm_(agent.transformer.parameters(), 1.0)",
        ),
        Mutant(
            "the world model's gradient is not clipped",
            "clip_grad_norm_(model.parameters(), WORLD_MODEL_CLIP)",
            "clip_grad_norm_(model.parameters(), 1e9)",
        ),
        Mutant("no weight decay", "weight_decay=args.weight_decay", "weight_decay=0.0"),
        Mutant("padding counts in the loss", "torch.where(valid, error, 0).sum() / valid.sum()", "error.mean()"),
        Mutant(
            "the reward's decoder sees the state twice",
            "self.reward(z, act, obs, next_obs)",
            "self.reward(z, act, obs, obs)",
        ),
        Mutant(
            "the state's decoder predicts the state",
            "self.state(z, act, obs) - next_obs",
            "self.state(z, act, obs) - obs",
        ),
        Mutant(
            "absolute errors train the world model", "error.pow(2).mean() for error", "error.abs().mean() for error"
        ),
        Mutant(
            "the world model predicts what all tasks share",
            '"state" if dc.FAMILIES[args.env].dynamics_vary else "reward"',
            '"reward" if dc.FAMILIES[args.env].dynamics_vary else "state"',
        ),
        Mutant("train_max is the mean", "best[train].max()", "best[train].mean()"),
        Mutant(
            "missing episodes count as returns of 0",
            "(data.episode_returns).masked_fill(~present, -math.inf)",
            "(data.episode_returns)",
        ),
        Mutant("train_top is the worst quarter", ".sort(1, descending=True)", ".sort(1)"),
        Mutant("train_top is the best half", "keepdim=True) / 4", "keepdim=True) / 2"),
        Mutant("train_top is a sum", ", 0).sum(1) / quarter[:, 0].ceil()", ", 0).sum(1)"),
        Mutant("train_top is of all tasks", "top[train].mean()", "top.mean()"),
        Mutant("a target as a number is scaled twice", "torch.tensor([which],", "torch.tensor([which / 500],"),
        Mutant(
            "targets must be positive", '"target_return": (-1_000_000, 1_000_000)', '"target_return": (0, 1_000_000)'
        ),
        Mutant(
            "targets are given to the wrong rows",
            "targets.repeat_interleave(count // len(targets))",
            "targets.repeat(count // len(targets))",
        ),
        Mutant("a rollout remembers no actions", "rows[:, t, -act_dim:] = act", "rows[:, t, -act_dim:] = 0"),
        Mutant("a rollout's rewards lie one step late", "seen[:, t - 1, -1] = rew", "seen[:, t, -1] = rew"),
        Mutant(
            "the embedding leaves out the last transition",
            "& (step <= length)",
            "& (step < length)",
        ),
        Mutant("the embedding counts incomplete contexts", "(step >= length.clamp(max=horizon)) & ", ""),
        Mutant(
            "the embedding of an episode shorter than a context is not finite", "length.clamp(max=horizon)", "horizon"
        ),
        Mutant("the embedding counts steps after the end", " & (step <= length)", ""),
        Mutant("the embedding is a sum", ".sum(0) / counts.sum()", ".sum(0)"),
        Mutant(
            "half as many updates of the world model",
            "args.world_model_updates = args.total_updates",
            "args.world_model_updates = args.total_updates // 2",
        ),
        Mutant(
            "training on test tasks",
            "    check_sizes(args, data)\n",
            "    data.train_tasks = torch.as_tensor(data.test_ids, device=data.device)\n",
        ),
    ],
    "data_collect.py": [
        Mutant("runs of a fork are continued by the original", '("", script_name(args_class))', "(script,)"),
        Mutant("bodies are kept in single precision", "    kept_as = np.float16", "    kept_as = np.float32"),
        Mutant("points are kept in half precision", "    kept_as = np.float32", "    kept_as = np.float16"),
        Mutant("half precision is refused", 'if getattr(arrays.get(key), "dtype", None) == np.float16:', "if False:"),
        Mutant("any-mdp: rewards unscaled", "rewards=100 / gap * rewards", "rewards=rewards"),
        Mutant("any-mdp: the noise unscaled", "noise=100 / gap * noise", "noise=noise"),
        Mutant(
            "any-mdp: numbers are not permuted", "names=rng.permutation(self.states)", "names=np.arange(self.states)"
        ),
        Mutant(
            "any-mdp: a start may be a pit",
            "(rng.random(self.states) < share) & (start == 0)",
            "(rng.random(self.states) < share)",
        ),
        Mutant("any-mdp: the goal ends too often", "(rng.random() < 0.3), pits", "(rng.random() < 0.6), pits"),
        Mutant("any-mdp: fewer pits", "rng.uniform(-0.2, 0.4)", "rng.uniform(-0.4, 0.2)"),
        Mutant("any-mdp: a wider band", "s + self.states // 4 + 1", "s + self.states // 2 + 1"),
        Mutant("any-mdp: further back", "s - self.states // 2 - 1", "s - self.states"),
        Mutant("any-mdp: rest in the last state", "0.5 * (s < last), 1.0", "0.5, 1.0"),
        Mutant(
            "any-mdp: actions do not differ",
            "weights = weights / weights.sum(0) * band",
            "weights = (1 + 0 * weights) * band",
        ),
        Mutant("any-mdp: pits are not made worse", "* (pits_gain > 0)", "* 0"),
        Mutant("any-mdp: the last state is not made better", "* (goal_lacks > 0) *", "* 0 *"),
        Mutant("any-mdp: an optimal policy of one sweep", "if not optimal or (q", "if optimal or (q"),
        Mutant(
            "any-mdp: values of the uniform policy are undiscounted by the chance to end",
            "gamma * moves, earned)",
            "gamma * moves.T, earned)",
        ),
        Mutant("any-mdp: the policy is not far-sighted", "expected, 0.994)", "expected, 0.5)"),
        Mutant(
            "any-mdp: returns of one step less",
            "for _ in range(self.horizon):\n            value = earned",
            "for _ in range(self.horizon - 1):\n            value = earned",
        ),
        Mutant("any-mdp: no check of what is gained", "return gain[start > 0].min() >= 2 and", "return"),
        Mutant(
            "any-mdp: no check of the visits",
            "min() >= 2 and (1 - (visits**2).sum(1)).min() > 0.7 and entropy.min() > 0.35",
            "min() >= 2",
        ),
        Mutant(
            "any-mdp: the first state is the start",
            "(dice[:, :1] >= self.tables.start[task].cumsum(1)).sum(1)",
            "(0 * dice[:, :1] >= self.tables.start[task].cumsum(1)).sum(1)",
        ),
        Mutant(
            "any-mdp: one throw of the dice for all steps",
            "state[rows, 4 + step, None]",
            "state[rows, 4 + 0 * step, None]",
        ),
        Mutant("any-mdp: the smallest entry is the action", "inner, act.argmax(1)]", "inner, act.argmin(1)]"),
        Mutant("any-mdp: the reward of the smallest entry", "act.argmax(-1), outcome", "act.argmin(-1), outcome"),
        Mutant(
            "any-mdp: the inner state is observed", "np.eye(self.states)[state[:, 1]", "np.eye(self.states)[state[:, 0]"
        ),
        Mutant("any-mdp: rewards without noise", " + self.tables.noise[index] * outcome[..., 2]", ""),
        Mutant(
            "any-mdp: the noise is that of the first step",
            "4 + self.horizon + state[:, 2].astype(int).clip",
            "4 + self.horizon + 0 * state[:, 2].astype(int).clip",
        ),
        Mutant("any-mdp: no state ends an episode", "return state[:, 3] > 0", "return state[:, 3] > 1"),
        Mutant("any-mdp: distance of inner states", "(self.known[numbers", "(self.tables.policy[numbers"),
        Mutant(
            "any-mdp: the behavior knows inner states",
            "self.known[params[:, 0].astype(int), obs",
            "self.tables.policy[params[:, 0].astype(int), obs",
        ),
        Mutant("any-mdp: skill has no effect", "rng.random(len(obs)) < skill", "rng.random(len(obs)) < 0.5"),
        Mutant(
            "any-mdp: the action vector has no noise",
            "rng.random((len(obs), self.actions)) - (",
            "0.5 + 0 * rng.random((len(obs), self.actions)) - (",
        ),
        Mutant(
            "any-mdp: behavior of one skill", "skill = 1.0 if deterministic else (phase + 1) / PHASES", "skill = 1.0"
        ),
        Mutant("any-mdp: its parameters are regressed", "if not data.family.measured:", "if False:"),
        # task families
        Mutant("point-robot flees its goal", "return -(((outcome - params) ** 2)", "return (((outcome - params) ** 2)"),
        Mutant(
            "point-robot's goals on the whole circle",
            "on_circle(np.linspace(0, np.pi, sum",
            "on_circle(np.linspace(0, 2 * np.pi, sum",
        ),
        Mutant("another fourth of the tasks are the test tasks", "test = step // 2 +", "test = step // 2 - 1 +"),
        Mutant("sparse rewards are negative far from the goal", "/ 0.2).clip(0)", "/ 0.2)"),
        Mutant(
            "behavior policies are trained on the sparse reward",
            "        return super().reward(outcome, act, params)\n",
            "        return self.reward(outcome, act, params)\n",
        ),
        Mutant("the wind blows the other way", "0.1 * act + params", "0.1 * act - params"),
        Mutant("the winds are drawn pair by pair", "self.split_first(wind.T)", "self.split_first(wind.reshape(-1, 2))"),
        Mutant(
            "seeds of the tasks from 0",
            "RandomState(seed).rand() for seed in range(1, sum(self.counts) + 1)",
            "RandomState(seed).rand() for seed in range(sum(self.counts))",
        ),
        Mutant(
            "cheetah-vel is paid for effort", "params[..., 0]) - 0.05 * (act**2)", "params[..., 0]) + 0.05 * (act**2)"
        ),
        Mutant(
            "cheetah-dir always runs forward",
            "return params[..., 0] * outcome[..., 0] - 0.05",
            "return outcome[..., 0] - 0.05",
        ),
        Mutant("ant-dir always walks along x", "return (outcome * params).sum(-1)", "return outcome[..., 0]"),
        Mutant("ant-dir-full without its bonus", " - 0.5 * (act**2).sum(-1) + 1.0", " - 0.5 * (act**2).sum(-1)"),
        Mutant(
            "ant-goal's distance is Euclidean",
            "-abs(outcome - params).sum(-1)",
            "-(((outcome - params) ** 2).sum(-1) ** 0.5)",
        ),
        Mutant("physical parameters only grow", "original * base**exponent", "original * base ** abs(exponent)"),
        Mutant("the walker falls at 0.8 m", "state[:, 2] <= 0.5", "state[:, 2] <= 0.8"),
        Mutant(
            "velocity per simulator step",
            "(next_state[:, axes] - state[:, axes]) / self.dt",
            "(next_state[:, axes] - state[:, axes]) / self.timestep",
        ),
        # simulation
        Mutant(
            "the time limit is one step late",
            "(self.steps >= self.family.horizon)",
            "(self.steps > self.family.horizon)",
        ),
        Mutant(
            "a time limit counts as a termination",
            "moved & self.family.terminated(next_state)",
            "moved & (self.family.terminated(next_state) | (self.steps >= self.family.horizon))",
        ),
        Mutant("rows go on after the time limit", "moved & ~terminated & ~truncated\n", "moved & ~terminated\n"),
        Mutant("a broken row is rewarded and goes on", "moved = live & ~diverged", "moved = live"),
        Mutant("a silent reset of the simulator is not noticed", "(abs(next_state[:, 0] - clock) > 1e-9) | ", ""),
        Mutant(
            "actions are not clipped",
            "np.clip(np.asarray(actions, np.float64), -1.0, 1.0)",
            "np.asarray(actions, np.float64)",
        ),
        Mutant(
            "a reset rebinds all rows",
            'self.task_ids[mask] = np.asarray(options["task_ids"])[mask]',
            'self.task_ids[:] = np.asarray(options["task_ids"])',
        ),
        Mutant(
            "a reset does not restart the clock",
            "self.steps[mask], self.live[mask] = 0, True",
            "self.live[mask] = True",
        ),
        Mutant(
            "every row is reset with one seed",
            "seed = seed + np.arange(self.num_envs)",
            "seed = seed + np.zeros(self.num_envs, int)",
        ),
        Mutant("any last evaluation of a checkpoint", "not fits(self.recorded, int | None)", "False"),
        Mutant("recorded actions are not clipped", "act[live].clip(-1, 1), rew[live]", "act[live], rew[live]"),
        Mutant(
            "only a fall in the last step is recorded",
            'out["terminated"] |= terminated',
            'out["terminated"] = terminated',
        ),
        # dataset
        Mutant("observations are centered only", "((obs - self.obs_mean) / self.obs_spread)", "(obs - self.obs_mean)"),
        Mutant(
            "the padding enters the statistics",
            "[self.train_ids, :, :-1][recorded]",
            "[self.train_ids, :, :-1].reshape(-1, self.obs_dim)",
        ),
        Mutant("observations are not limited", ".clamp(-OBS_LIMIT, OBS_LIMIT)", ""),
        Mutant(
            "foreign contexts are not standardized",
            'keys = ("observations", "ood_observations")',
            'keys = ("observations",)',
        ),
        Mutant("training tasks are numbered from 0", "return self.train_tasks[draw]", "return draw"),
        Mutant(
            "batches hold padding",
            "count = share * self.counts[task_ids, None]",
            "count = share * self.valid.shape[1]",
        ),
        Mutant("batches know no share", "count = share * self.counts", "count = self.counts"),
        Mutant(
            "the share is that of the worst episodes",
            "returns.where(valid, -math.inf).flatten(1).argsort(dim=1, descending=True, stable=True)",
            "returns.where(valid, math.inf).flatten(1).argsort(dim=1, stable=True)",
        ),
        Mutant(
            "the share is that of the first episodes",
            "returns.where(valid, -math.inf)",
            "(0 * returns).where(valid, -math.inf)",
        ),
        Mutant(
            "transitions are ordered by the next task's returns",
            "returns.where(valid, -math.inf)",
            "returns.roll(1, 0).where(valid, -math.inf)",
        ),
        Mutant(
            "padding counts among the transitions of a bad episode",
            "returns.where(valid, -math.inf).flatten(1)",
            "returns.flatten(1)",
        ),
        Mutant(
            "batches draw from all transitions whatever the share",
            "self.draw(task_ids, size, generator, share)]",
            "self.draw(task_ids, size, generator)]",
        ),
        Mutant(
            "sample_batch forgets the share",
            "self.unpack(self.sample(task_ids, size, generator, share))",
            "self.unpack(self.sample(task_ids, size, generator))",
        ),
        Mutant(
            "segments start at the best transitions only",
            "start = self.draw(task_ids, size, generator)[..., None]",
            "start = self.draw(task_ids, size, generator, 0.5)[..., None]",
        ),
        Mutant(
            "segments start with their second transition",
            "k = torch.arange(steps, device=self.device)\n",
            "k = torch.arange(1, steps + 1, device=self.device)\n",
        ),
        Mutant(
            "segments go on into the next episode",
            "start + torch.minimum(k, left - 1)",
            "(start + k).clamp(max=self.valid.numel() - 1)",
        ),
        Mutant(
            "segments go on into the padding",
            "torch.minimum(k, left - 1)]",
            "torch.minimum(k, horizon - 1 - start % horizon)]",
        ),
        Mutant(
            "segments stop one transition early",
            "torch.minimum(k, left - 1)]",
            "torch.minimum(k, left - 2).clamp(min=0)]",
        ),
        Mutant(
            "the end of a segment is that of another episode",
            "self.lengths.flatten()[start // horizon]",
            "self.lengths.flatten()[start // horizon - 1]",
        ),
        Mutant(
            "all episodes have the full length for a segment",
            "self.lengths.flatten()[start // horizon] - start % horizon",
            "horizon - start % horizon",
        ),
        Mutant(
            "the transitions left of an episode are counted from its start",
            "self.lengths.flatten()[start // horizon] - start % horizon",
            "self.lengths.flatten()[start // horizon]",
        ),
        Mutant("segments bootstrap where the task ended", " * (1 - term[..., -1])", ""),
        Mutant("segments know a termination of their first step only", "(1 - term[..., -1])", "(1 - term[..., 0])"),
        Mutant(
            "the bootstrap has one discount for all segments",
            "gamma ** left.clamp(max=steps)[..., 0]",
            "gamma**steps",
        ),
        Mutant("the bootstrap is discounted as if no segment ended", "left.clamp(max=steps)[..., 0]", "left[..., 0]"),
        Mutant(
            "the bootstrap's discount is one step short",
            "left.clamp(max=steps)[..., 0]",
            "(left.clamp(max=steps)[..., 0] - 1)",
        ),
        Mutant("rewards past the end count", "gamma**k * (k < left)", "gamma**k * (k < left + steps)"),
        Mutant("the last reward of an episode does not count", "gamma**k * (k < left)", "gamma**k * (k < left - 1)"),
        Mutant("rewards of a segment are not discounted", "gamma**k * (k < left)", "1.0 * (k < left)"),
        Mutant(
            "all batches are of the first task",
            "self.valid[task_ids[:, None], pick.long()] + task_ids[:, None] * self.valid.shape[1]",
            "self.valid[task_ids[:, None], pick.long()]",
        ),
        Mutant(
            "contexts are of the first episode",
            "(present / torch.empty_like(present).exponential_(generator=generator))",
            "present",
        ),
        Mutant(
            "contexts hold padding",
            "generator=generator) * length).long()",
            "generator=generator) * self.family.horizon).long()",
        ),
        Mutant(
            "contexts use episodes of other lengths",
            "length = self.lengths[task_ids[:, None], episode]",
            "length = self.lengths[task_ids[:, None], 0 * episode]",
        ),
        Mutant("no transition terminates", "& (steps == lengths[..., None] - 1)", "& (steps == lengths[..., None])"),
        Mutant(
            "all transitions of a fallen episode terminate",
            "& (steps == lengths[..., None] - 1)",
            "& (steps <= lengths[..., None] - 1)",
        ),
        Mutant("the next observation is the current one", "obs[..., 1:, :], term", "obs[..., :-1, :], term"),
        Mutant(
            "rows after the end are not zero",
            "    rows[steps >= lengths[..., None]] = 0.0",
            "    rows[steps > lengths[..., None]] = 0.0",
        ),
        # checks of the file
        Mutant("infinite values pass", "not (abs(array) < LARGEST).all():", "np.isnan(array).any():"),
        Mutant(
            "actions below -1 pass",
            'abs(arrays[prefix + "actions"]).max(initial=0) > 1',
            'arrays[prefix + "actions"].max(initial=0) > 1',
        ),
        Mutant("a task may be listed twice", "or len(set(ids)) != len(ids) or", "or"),
        Mutant(
            "lengths beyond the horizon pass", "range(family.horizon + 1)).all()", "range(family.horizon + 2)).all()"
        ),
        Mutant("another family's file passes", "if family_name != env:", "if False:"),
        Mutant(
            "wrong distances of foreign contexts pass",
            '(abs(arrays["ood_distance"] - foreign_distance(family, arrays)) < 1e-9).all()',
            '(arrays["ood_distance"] >= -1).all()',
        ),
        Mutant("a file of another format version passes", "or version != FORMAT_VERSION:", "or False:"),
        Mutant(
            "a task without an episode passes",
            "if not (lengths[ids] > 0).any(1).all():",
            "if not (lengths[ids] > 0).any():",
        ),
        # evaluation
        Mutant(
            "the two kinds of foreign contexts are exchanged",
            '== (protocol == "ood_random")',
            '!= (protocol == "ood_random")',
        ),
        Mutant(
            "the protocol train is on test tasks",
            'data.train_ids[:10] if protocol == "train" else data.test_ids',
            "data.test_ids",
        ),
        Mutant(
            "evaluation contexts of other tasks",
            "context, lengths = data.episodes[row_tasks, pick], data.lengths[row_tasks, pick]",
            "context, lengths = (x[np.roll(row_tasks, episodes), pick] for x in (data.episodes, data.lengths))",
        ),
        Mutant("every episode gets the same context", "np.resize(order, episodes)", "order[:1].repeat(episodes)"),
        Mutant("an ignored signal is heard", "if signal.getsignal(number) != signal.SIG_IGN", "if True"),
        Mutant("two collections at once", "fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
        Mutant(
            "a signal after the last training is lost",
            "            if stopping:\n",
            "            if snapshots is None:\n",
        ),
        Mutant("files of any size are begun", "> 0.9 * MOST_BYTES", "> 9 * MOST_BYTES"),
        Mutant("the remedy makes other data", 'f" --quality {quality}" if quality', 'f" --quality {quality}" if False'),
        Mutant("an expert worse than random has a scale", "np.where(best > worst,", "np.where(best != worst,"),
        Mutant(
            "any-mdp: sampled returns",
            "random_returns, expert_returns = family.exact_returns",
            "_ = family.exact_returns",
        ),
        Mutant(
            "any-mdp: the uniform policy's returns of the first action",
            "(moves * rewards).sum(-1).mean(2)",
            "(moves * rewards).sum(-1)[:, :, 0]",
        ),
        Mutant(
            "contexts repeat before all were used",
            ".permutation(data.present[task])",
            ".integers(data.present[task], size=data.present[task])",
        ),
        Mutant(
            "contexts in the order of the file",
            "np.random.default_rng(10_000 + task).permutation(data.present[task])",
            "np.arange(data.present[task])",
        ),
        Mutant(
            "all tasks have one order of contexts",
            "np.random.default_rng(10_000 + task).permutation",
            "np.random.default_rng(10_000).permutation",
        ),
        Mutant(
            "other contexts at every call",
            "np.random.default_rng(10_000 + task).permutation",
            "np.random.default_rng().permutation",
        ),
        Mutant(
            "rows of a task are not its own",
            "row_tasks, number = tasks.repeat(episodes), np",
            "row_tasks, number = np.tile(tasks, episodes), np",
        ),
        Mutant(
            "all episodes of a task have one start",
            "97 * tasks + number + 31 * k",
            "97 * tasks + 31 * k",
        ),
        Mutant(
            "foreign contexts of one column",
            "(row + number) % columns.shape[1]",
            "(0 * number)",
        ),
        Mutant(
            "few foreign contexts are the nearest", "(row + number) % columns.shape[1]", "number % columns.shape[1]"
        ),
        Mutant(
            "foreign contexts of other tasks' columns",
            "columns[row, (row + number)",
            "columns[row - 1, (row + number)",
        ),
        Mutant(
            "foreign contexts of other test tasks",
            "context, lengths = data.ood_episodes[row, column], data.ood_lengths[row, column]",
            "context, lengths = data.ood_episodes[row - 1, column], data.ood_lengths[row - 1, column]",
        ),
        Mutant("distances of other rows", "data.ood_distance[row, column]", "data.ood_distance[row - 1, column]"),
        Mutant("near and far are exchanged", "('near', 'middle', 'far')[k]", "('far', 'middle', 'near')[k]"),
        Mutant(
            "two halves instead of thirds", "np.quantile(distance, (1 / 3, 2 / 3))", "np.quantile(distance, (1 / 2, 1))"
        ),
        Mutant(
            "thirds of the range of distances",
            "np.quantile(distance, (1 / 3, 2 / 3))",
            "np.linspace(distance.min(), distance.max(), 4)[1:3]",
        ),
        Mutant(
            "equal distances are far",
            "np.searchsorted(np.quantile(distance, (1 / 3, 2 / 3)), distance)",
            "np.searchsorted(np.quantile(distance, (1 / 3, 2 / 3)), distance, side='right')",
        ),
        Mutant("thirds of returns", "normalized[third == k].mean()", "returns[third == k].mean()"),
        Mutant("the standard error is the spread", "returns.std(ddof=1) / len(returns) ** 0.5", "returns.std(ddof=1)"),
        Mutant("the standard error is that of a population", "returns.std(ddof=1)", "returns.std()"),
        Mutant(
            "the standard error is over tasks",
            "returns.std(ddof=1) / len(returns) ** 0.5",
            "returns.std(ddof=1) / len(tasks) ** 0.5",
        ),
        Mutant("a single episode has a standard error", "    if len(returns) > 1:\n", "    if True:\n"),
        Mutant(
            "rows are normalized by other tasks",
            "normalize(data, row_tasks, returns)",
            "normalize(data, np.sort(row_tasks)[::-1], returns)",
        ),
        Mutant(
            "the contexts' mask is one step too long",
            "data.recorded(lengths)[:, : context",
            "data.recorded(lengths + 1)[:, : context",
        ),
        Mutant("policies get raw observations", "return policy(data.standardize(obs), rew)", "return policy(obs, rew)"),
        Mutant("the tenth of the own episodes is reported", "if k < reported:", "if True:"),
        Mutant(
            "all own episodes are told of in either protocol",
            'MORE_EPISODES * (protocol == "online")',
            "MORE_EPISODES * own",
        ),
        Mutant(
            "the online protocol explores to the end",
            "own and k < EXPLORATION_EPISODES",
            "own",
        ),
        Mutant("no random episode before the own ones", 'protocol == "np_online" and k == 0', "False"),
        Mutant("random episodes only", 'protocol == "np_online" and k == 0', 'protocol == "np_online"'),
        Mutant(
            "the random episode repeats one action",
            "(rng.uniform(-1, 1, (",
            "(np.random.default_rng(1).uniform(-1, 1, (",
        ),
        Mutant("the random actions are small", "(rng.uniform(-1, 1, (", "(rng.uniform(-0.5, 0.5, ("),
        Mutant(
            "the online protocol forgets earlier episodes",
            "context = torch.cat([context, transitions(done, device=device)], 1)",
            "context = torch.cat([0 * context, transitions(done, device=device)], 1)",
        ),
        Mutant("the online protocol repeats one start", "+ number + 31 * k)", "+ number + 0 * k)"),
        Mutant(
            "returns are averaged over the wrong rows",
            "returns.reshape(len(tasks), episodes).mean(1)",
            "returns.reshape(episodes, len(tasks)).mean(0)",
        ),
        Mutant("the critic's error in another protocol", 'traced[protocols.index("iid")]', "traced[0]"),
        Mutant("the critic's error without discount", 'index("iid")], value, gamma)', 'index("iid")], value, 1.0)'),
        Mutant("the clone's return for the policy's", 'tag.replace("iid", "clone")', "tag"),
        Mutant(
            "the clone plays once", 'evaluate(data, clone, ("iid",), episodes)', 'evaluate(data, clone, ("iid",), 1)'
        ),
        Mutant("the policy plays as its clone", "evaluate(data, clone,", "evaluate(data, adapt,"),
        Mutant("no clone is evaluated", "if clone is not None:", "if False:"),
        Mutant("the policy plays once", "adapt, protocols, episodes, traced)", "adapt, protocols, 1, traced)"),
        Mutant(
            "q_error's critic is asked at the start alone",
            "last = obs[torch.arange(len(obs), device=mask.device), length]",
            "last = obs[:, 0]",
        ),
        Mutant("q_error ends one step early", "device=mask.device), length]", "device=mask.device), length - 1]"),
        Mutant("q_error does not go on past the time limit", " + gamma**length * ~terminated * last_q", ""),
        Mutant("q_error goes on past a termination", "gamma**length * ~terminated * last_q", "gamma**length * last_q"),
        Mutant("q_error goes on without discount", "gamma**length * ~terminated * last_q", "~terminated * last_q"),
        Mutant(
            "q_error goes on as from the time limit",
            "gamma**length * ~terminated",
            "gamma ** rew.shape[1] * ~terminated",
        ),
        Mutant("q_error's rewards have no discount", "(discounts * rew).sum(1)", "rew.sum(1)"),
        Mutant("q_error has the other sign", "(first_q - monte_carlo).mean()", "(monte_carlo - first_q).mean()"),
        Mutant("q_error is absolute", "(first_q - monte_carlo).mean()", "(first_q - monte_carlo).abs().mean()"),
        Mutant("q_relative has the sign of the return", "abs(monte_carlo.mean().item())", "monte_carlo.mean().item()"),
        Mutant(
            "q_relative is a share of the rows' sizes",
            "abs(monte_carlo.mean().item())",
            "monte_carlo.abs().mean().item()",
        ),
        Mutant(
            "q_relative of no return is infinite", "error / max(size, 1e-8)", "(error / size if size else float('inf'))"
        ),
        Mutant(
            "q_error has a history of gradients",
            "    with torch.no_grad():\n        first_q",
            "    if True:\n        first_q",
        ),
        Mutant(
            "normalized with other tasks' scales",
            "data.random_returns[tasks], data.expert_returns[tasks]",
            "data.random_returns[: len(tasks)], data.expert_returns[: len(tasks)]",
        ),
        Mutant(
            "centroids know the contexts they are tested on", "z[~odd & (task == t)].mean(0)", "z[task == t].mean(0)"
        ),
        Mutant(
            "the probe is tested on the training tasks",
            "label_contexts(data, embed, data.test_ids)",
            "label_contexts(data, embed, data.train_ids)",
        ),
        Mutant("the probe reads saturated dimensions", "rcond=1e-3, driver", "driver"),
        Mutant("the probe without intercept", "@ probe + mean - target", "@ probe - target"),
        # runs
        Mutant(
            "the learning rate falls from the start",
            "min(1.0, 2 - 2 * (self.step / self.total))",
            "1 - self.step / self.total",
        ),
        Mutant(
            "lr-decay without effect",
            "(self.step / self.total)) if self.args.lr_decay else 1.0",
            "(self.step / self.total))",
        ),
        Mutant("a resumed run has fresh optimizers", 'opt.load_state_dict(saved["opts"][name])', "pass"),
        Mutant(
            "a resumed run draws the first batches again", 'self.generator.set_state(saved["generator"].cpu())', "pass"
        ),
        Mutant("a resumed run repeats the noise", "torch.set_rng_state(cpu)", "pass"),
        Mutant(
            "rows after the checkpoint stay in metrics.csv",
            "kept = rows[: self.rows]",
            "kept = rows",
        ),
        Mutant(
            "resumed runs may change every argument", 'if getattr(self.args, name) != saved["args"][name]:', "if False:"
        ),
        Mutant("resumed runs may change the data", 'if self.data.header != saved["data"]:', "if False:"),
        Mutant(
            "the last evaluation is as all others",
            "results = self.evaluate()\n        if self.recorded",
            'results = self.evaluate(("iid", "train"), self.args.eval_episodes)\n        if self.recorded',
        ),
        Mutant(
            "every evaluation is as the last",
            'self.evaluate(("iid", "train"), args.eval_episodes)',
            "self.evaluate()",
        ),
        Mutant(
            "evaluations during the training have many episodes",
            'self.evaluate(("iid", "train"), args.eval_episodes)',
            'self.evaluate(("iid", "train"))',
        ),
        Mutant(
            "the last evaluation has few episodes", "episodes or self.args.final_episodes", "self.args.eval_episodes"
        ),
        Mutant(
            "a resumed run may not have other final episodes",
            '"eval_episodes", "final_episodes", "device"}',
            '"eval_episodes", "device"}',
        ),
        Mutant("the line has no standard errors", "return_se']:.1f}\" if f", "return_se']:.1f}\" if 0 and f"),
        Mutant("the line leaves pi_beta's return out", 'and tag.endswith("/return")]:', "and tag[5:-7] in PROTOCOLS]:"),
        Mutant("targets without noise are refused", '{"target_noise", "behavior_decay"}', '{"behavior_decay"}'),
        Mutant("pi_beta without weight decay is refused", '{"target_noise", "behavior_decay"}', '{"target_noise"}'),
        Mutant("a share above 1 passes", '"anchor_share": (0, 1), ', ""),
        Mutant(
            "no share passes",
            '{"target_noise", "behavior_decay"}',
            '{"anchor_share", "target_noise", "behavior_decay"}',
        ),
        Mutant("segments of any length pass", ', "n_step": (1, 100)', ""),
        Mutant("infinite losses pass", "if not math.isfinite(value)]", "if math.isnan(value)]"),
        Mutant(
            "broken parameters are saved", "if all(p.isfinite().all() for p in self.agent.parameters()):", "if True:"
        ),
        Mutant("no checkpoint before the end", "if self.step % args.save_every == 0 or last:", "if last:"),
        Mutant(
            "no checkpoint before the last evaluation",
            "if self.step % args.save_every == 0 or last:",
            "if self.step % args.save_every == 0:",
        ),
        Mutant(
            "the last evaluation's rows are lost when a run goes on",
            "        self.save()  # with the evaluation",
            "        # with",
        ),
        Mutant("the last evaluation is logged twice", "if self.recorded != self.step:  # else", "if True:  # else"),
        Mutant(
            "a family's own arguments do not win",
            "defaults |= values if part in args.env else {}",
            "defaults = (values if part in args.env else {}) | defaults",
        ),
        # behavior policies
        Mutant(
            "SAC's target is the sum of the twins",
            "for q in self.critic_target) / 2 -",
            "for q in self.critic_target) -",
        ),
        Mutant(
            "SAC's target is of the online critics", "for q in self.critic_target) / 2", "for q in self.critic) / 2"
        ),
        Mutant("SAC without discount", "rew + self.gamma * (1 - term) * next_q", "rew + (1 - term) * next_q"),
        Mutant("SAC ignores terminations", "rew + self.gamma * (1 - term) * next_q", "rew + self.gamma * next_q"),
        Mutant("entropy is a cost in SAC's target", "- temperature * next_logp", "+ temperature * next_logp"),
        Mutant("SAC's actor minimizes Q", "(temperature * pi_logp - q).mean()", "(temperature * pi_logp + q).mean()"),
        Mutant("SAC's actor takes the maximum of the twins", "q = torch.min(*[q(pi_in)", "q = torch.max(*[q(pi_in)"),
        Mutant(
            "the temperature falls where it should grow",
            "(-self.log_temperature * (pi_logp",
            "(self.log_temperature * (pi_logp",
        ),
        Mutant("the target entropy is positive", "-float(family.act_dim)", "float(family.act_dim)"),
        Mutant(
            "SAC's targets follow 20 times too fast",
            "list(self.critic.parameters()), 0.005)",
            "list(self.critic.parameters()), 0.1)",
        ),
        Mutant(
            "the slope of tanh has the wrong sign", "logp = logp - 2 * (math.log(2)", "logp = logp + 2 * (math.log(2)"
        ),
        Mutant(
            "the replay gives rows that were never written",
            "torch.randint(self.count, (size,)",
            "torch.randint(len(self.rows), (size,)",
        ),
        Mutant(
            "the replay gives other rows' tasks",
            "term[:, 0], self.task_ids[index]",
            "term[:, 0], self.task_ids[index.flip(0)]",
        ),
        Mutant(
            "rewards are those of other rows' tasks",
            "training_reward(b_outcome, b_act, raw[b_tasks])",
            "training_reward(b_outcome, b_act, raw[b_tasks.flip(0)])",
        ),
        Mutant("relabelling where the dynamics differ", "if not family.dynamics_vary:", "if True:"),
        Mutant("the whole batch is relabelled", "half = args.batch_size // 2", "half = 0"),
        Mutant("no warm-up with random actions", "warmup = family.horizon", "warmup = 1"),
        Mutant(
            "a time limit is stored as a termination",
            'info["outcome"], next_obs, terminated, env.task_ids',
            'info["outcome"], next_obs, terminated | truncated, env.task_ids',
        ),
        Mutant(
            "broken transitions are learned from", 'kept = ~info["diverged"]', 'kept = np.ones_like(info["diverged"])'
        ),
        Mutant("an interrupted training continues with fresh episodes", 'env.set_state(saved["env"])', "pass"),
        # rolling out
        Mutant(
            "mixed data start with the untrained policy",
            "np.linspace(PHASES // 10 - 1, PHASES - 1, count)",
            "np.linspace(0, PHASES - 1, count)",
        ),
        Mutant("medium is at nine tenths", "random_returns + 0.5 * (expert", "random_returns + 0.9 * (expert"),
        Mutant("medium-expert has its shares exchanged", "round(0.7 * count)", "round(0.3 * count)"),
        Mutant(
            "test tasks have as many episodes as training tasks",
            "args.test_episodes if task in test_ids else args.episodes",
            "args.episodes",
        ),
        Mutant(
            "foreign contexts are by the task's own policy",
            "ood = record(phases, np.repeat(test_ids[:, None], foreign.shape[1], 1), foreign)",
            "ood = record(phases, *[np.repeat(test_ids[:, None], foreign.shape[1], 1)] * 2)",
        ),
        Mutant(
            "foreign policies know the task they play",
            "else scaled[torch.as_tensor(policy_ids,",
            "else scaled[torch.as_tensor(task_ids,",
        ),
        Mutant(
            "foreign contexts of the first snapshot in the random column",
            "foreign, phases = np.full((2, len(test_ids), count + 1), RANDOM)",
            "foreign, phases = np.full((2, len(test_ids), count + 1), np.array([RANDOM, 0])[:, None, None])",
        ),
        Mutant(
            "foreign policies are spread over the list of tasks, the same for every test task",
            'others[distance.argsort(kind="stable")]',
            "others",
        ),
        Mutant("rounding orders equally distant tasks", "params[others]).round(9)", "params[others])"),
        Mutant(
            "foreign policies from far to near", 'distance.argsort(kind="stable")', '(-distance).argsort(kind="stable")'
        ),
        Mutant(
            "every column of foreign contexts has its phase",
            "stages[(row + column) % len(stages)]",
            "stages[column % 3]",
        ),
        Mutant("every test task has one phase", "stages[(row + column) % len(stages)]", "stages[row % 3]"),
        Mutant(
            "the nearest policies of each part act again and again",
            "part[np.lexsort((acted[:, part].sum(0), acted[phase, part]))[0]]",
            "part[0]",
        ),
        Mutant(
            "foreign policies have phases of their own",
            "np.lexsort((acted[:, part].sum(0), acted[phase, part]))",
            "np.lexsort((-acted[phase, part], acted[:, part].sum(0)))",
        ),
        Mutant(
            "a test task's own policy counts as foreign", "others = train_ids[train_ids != task]", "others = train_ids"
        ),
        Mutant(
            "the distance of directions has a sign",
            "abs(np.arctan2(cross, (params * others).sum(-1)))",
            "np.arctan2(cross, (params * others).sum(-1))",
        ),
        Mutant(
            "distances are squared",
            "return ((params - others) ** 2).sum(-1) ** 0.5",
            "return ((params - others) ** 2).sum(-1)",
        ),
        Mutant(
            "the random policy's distance is that of task 0",
            "np.where(behavior == RANDOM, -1.0, distance)",
            "distance",
        ),
        Mutant(
            "the recorded step is one phase early",
            "(phase + 1) * args.total_updates // PHASES",
            "phase * args.total_updates // PHASES",
        ),
        Mutant("broken episodes are kept", 'while done["diverged"].any():', "while False:"),
        Mutant(
            "per-task policies play by the task they play on",
            "else np.asarray(policy_ids)\n",
            "else np.asarray(task_ids)\n",
        ),
        Mutant(
            "files with other amounts of episodes train anew",
            'POLICY_SETTINGS += ("rows",',
            'POLICY_SETTINGS += ("episodes", "test_episodes", "rows",',
        ),
        Mutant("other settings continue old policies", 'if policies["settings"] != wanted:', "if False:"),
        Mutant(
            "other settings pass as the finished file",
            "changed = [k for k in settings if settings[k] != written.get(k)]",
            "changed = []",
        ),
    ],
}


if __name__ == "__main__":
    sys.exit(main())

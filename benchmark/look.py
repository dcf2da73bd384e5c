"""What adapted policies do: paths seen from above, and pictures of the robot; and where an encoder puts the tasks.

Run:  python benchmark/look.py RUN_DIR .. --figure paths.png            # point robots and ants, from above
      python benchmark/look.py RUN_DIR .. --z z.png                     # z of the test tasks' episodes, on a plane
      python benchmark/look.py RUN_DIR --frames pictures --tasks 21 30  # picture after picture, with MuJoCo's renderer
      python benchmark/look.py RUN_DIR --strip ant.png --tasks 21 30    # five pictures of an ant from above
Each run has its panel. The policy plays the first episode of the evaluation's --protocol, with that episode's context:
iid (an episode of the task's own data) or ood (one by another task's policy). Pictures need a machine on which MuJoCo
can draw without a window (set MUJOCO_GL=egl); 20 pictures a second make a film of the speed of life, with
ffmpeg -framerate 20 -i pictures/task21-%03d.png film.mp4
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from report import picture, pyplot, revisit

import data_collect as dc


def play(tasks, script, agent, data, args, protocol="iid"):
    """The first episode of that protocol of `dc.evaluate` on each task -> the family, the tasks, params [B, P], states
    [B, H + 1, S] of the simulation."""
    tasks = data.test_ids if tasks is None else np.array(tasks)
    if not np.isin(tasks, data.test_ids).all():
        raise SystemExit(f"--tasks: the test tasks are {', '.join(map(str, data.test_ids))}")
    context, mask = first_context(data, protocol, tasks)
    env = dc.TaskEnv(data.family, data.task_params, tasks)
    policy = script.adapt(agent, context, mask)
    obs, _ = env.reset(seed=dc.reset_seeds(tasks, 0, 0))
    rew, states = np.zeros(len(tasks)), [env.state.copy()]
    while env.live.any():
        with torch.no_grad():
            act = policy(data.standardize(torch.as_tensor(obs)), torch.as_tensor(rew, dtype=torch.float32))
        obs, rew, _, _, info = env.step(act.numpy())
        states.append(env.state.copy())
        if info["diverged"].any():
            raise SystemExit(f"the physics broke on task {tasks[info['diverged']][0]}: there is no episode to draw")
    env.close()
    return data.family, tasks, data.task_params[tasks], np.stack(states, 1)


def first_context(data, protocol, tasks):
    """The context of the protocol's first episode on some test tasks -> context [B, K, context_dim], mask [B, K]."""
    context, mask, _ = dc.initial_context(data, protocol, data.test_ids, 1)
    if context is None:
        raise SystemExit(f"--protocol {protocol}: these data have no such context")
    rows = [list(data.test_ids).index(task) for task in tasks]
    return context[rows, :, : data.context_dim], mask[rows]


def key_of(params):
    """params [B, P] -> color key: of the angle in two dimensions, else of the first parameter; what it shows."""
    plot = pyplot()
    if params.shape[1] != 2:
        value, limits, colors, what = params[:, 0], (None, None), plot.cm.viridis, "first parameter of the task"
    else:
        value, what = np.degrees(np.arctan2(params[:, 1], params[:, 0])) % 360, "angle of the task [degrees]"
        limits = (0, 360 if value.max() > 181 else 180)  # all directions, or goals on a half circle
        hues = plot.cm.hsv(np.linspace(0, 1 if limits[1] == 360 else 0.8, 256))
        colors = plot.matplotlib.colors.ListedColormap(0.85 * hues[:, :3])  # dark enough on white
    key = plot.cm.ScalarMappable(plot.Normalize(*limits), colors)
    key.set_array(value)
    key.autoscale_None()
    return key, what


def draw_paths(axis, family, tasks, params, states):
    """Each task's path in the plane, and where it should lead: a goal, or a direction. -> `key_of` the tasks."""
    if not isinstance(family, (dc.Point, dc.Ant)):
        raise SystemExit("--figure: only point robots and ants move in a plane; use --frames (other robots) or --z")
    plane = states if isinstance(family, dc.Point) else states[..., 1:3]  # [B, H + 1, 2]
    size, (key, what) = np.linalg.norm(plane, axis=-1).max(), key_of(params)
    for line, param, color in zip(plane, params, key.to_rgba(key.get_array())):
        axis.plot(*line.T, color=color, linewidth=1.2)
        if isinstance(family, dc.PointRobot):
            axis.plot(*param, "x", color=color)
            what = "angle of the goal (x) [degrees]"
        elif isinstance(family, dc.AntDir):
            axis.plot(*np.outer(param, (0, size)), ":", color=color, linewidth=0.8)
            what = "direction to walk (dotted) [degrees]"
    axis.set(aspect="equal", xlabel="x [m]", ylabel="y [m]")
    return key, what


def embedded(script, agent, data, args):
    """-> z of up to ten episodes of each test task, on its two principal components [R, 2], and the parameters of their
    tasks [R, P]."""
    if not hasattr(script, "embed"):
        remedy = "write embed(agent, context, mask), as focal.py does"
        raise SystemExit(f"--z: {script.__name__}.py has no z to draw; {remedy}, or leave this run out")
    z, tasks = dc.label_contexts(data, partial(script.embed, agent), data.test_ids)
    centered = z - z.mean(0)
    return (centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:2].T).numpy(), data.task_params[tasks]


def draw_z(axis, points, params):
    key, what = key_of(params)
    axis.scatter(*points.T, color=key.to_rgba(key.get_array()), s=12)
    axis.set(xlabel="first principal component of z", ylabel="second")
    return key, what


def draw_panels(runs, path, draw, *looks, rows=("",)):
    """Panels, a column per run and a row per look, named by `rows`: what `draw` makes, on an axis, of what the look
    finds in the run. draw -> color key and its name, or None."""
    size = {"figsize": (3.4 * len(runs), 3.4 * len(looks)), "layout": "compressed"}
    figure, axes = pyplot().subplots(len(looks), len(runs), squeeze=False, **size)
    for look, row, line in zip(looks, rows, axes):
        for axis, run_dir in zip(line, runs):
            key = draw(axis, *revisit(run_dir, look))
            axis.set_title(run_dir.resolve().parent.name + row)
    if key:
        figure.colorbar(key[0], ax=axes, label=key[1], shrink=0.8)
    families = {run_dir.resolve().parent.parent.name for run_dir in runs}
    figure.suptitle(f"{', '.join(sorted(families))}, unseen tasks", weight="bold")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def renderer_of(family):
    """-> function of a state [S] and the point that the camera looks at [3]: a picture [240, 320, 3]."""
    import mujoco

    if not isinstance(family, dc.Mujoco):
        raise SystemExit("--frames, --strip: only MuJoCo's robots have a body; use --figure (point robots) or --z")
    try:
        renderer = mujoco.Renderer(family.model, 240, 320)
    except Exception as error:  # whatever its graphics library says
        what = f"MuJoCo cannot draw without a window here ({error})"
        raise SystemExit(f"--frames, --strip: {what}; install EGL and set MUJOCO_GL=egl")
    body, camera = mujoco.MjData(family.model), mujoco.MjvCamera()

    def render(state, center, distance=6.0, elevation=-30):
        mujoco.mj_setState(family.model, body, state, mujoco.mjtState.mjSTATE_FULLPHYSICS)
        mujoco.mj_forward(family.model, body)
        camera.lookat[:], camera.distance, camera.elevation = center, distance, elevation
        renderer.update_scene(body, camera)
        return renderer.render()

    return render


def draw_frames(family, tasks, states, folder):
    """Pictures folder/task21-000.png .. of every step; the camera follows the robot."""
    render = renderer_of(family)
    folder.mkdir(parents=True, exist_ok=True)
    for task, episode in zip(tasks, states):
        for t, state in enumerate(episode):
            center = state[1:4] if isinstance(family, dc.Ant) else [state[1], 0, 0.5]
            pyplot().imsave(folder / f"task{task}-{t:03d}.png", render(state, center))
    print(f"{len(tasks)} x {states.shape[1]} pictures in {folder}")


ARROW = {"arrowstyle": "->", "color": "red", "linewidth": 2}  # the task's direction


def draw_strip(family, params, states, path, count=5):
    """A row per task: `count` pictures of the first 40 steps from above, by a camera that stands still."""
    render = renderer_of(family)
    figure, grid = pyplot().subplots(
        len(states), count, figsize=(2 * count, 1.6 * len(states)), squeeze=False, layout="constrained"
    )
    for row, param, episode in zip(grid, params, states):
        for axis, t in zip(row, np.linspace(0, 40, count).astype(int)):
            axis.imshow(render(episode[t], [0, 0, 0], distance=13.0, elevation=-90))
            axis.annotate("", 0.42 * np.array([320, 240]) * (param * [1, -1] + 1.19), (160, 120), arrowprops=ARROW)
            axis.set(xticks=[], yticks=[], xlabel=f"{family.dt * t:.1f} s")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="finished runs")
    parser.add_argument("--figure", type=picture, help="where to write the paths (png)")
    parser.add_argument("--z", type=picture, help="where to write the embeddings (png)")
    parser.add_argument("--frames", type=Path, help="folder for the pictures of the first run's robot (png)")
    parser.add_argument("--strip", type=picture, help="where to write five pictures of the first run's ant (png)")
    parser.add_argument("--tasks", type=int, nargs="+", help="test tasks; by default all")
    parser.add_argument(
        "--protocol", choices=("iid", "ood", "ood_random"), nargs="+", default=["iid"], help="contexts of the paths"
    )
    args = parser.parse_args()
    if not (args.figure or args.z or args.frames or args.strip):
        parser.error("nothing to draw: give --figure, --z, --frames or --strip")
    for run_dir in args.runs:
        if not (run_dir / "result.json").exists():
            raise SystemExit(f"{run_dir} is no finished run")
    if args.figure:
        looks = [partial(play, args.tasks, protocol=protocol) for protocol in args.protocol]
        draw_panels(args.runs, args.figure, draw_paths, *looks, rows=[f", {p} context" for p in args.protocol])
    if args.z:
        draw_panels(args.runs, args.z, draw_z, embedded)
    if args.frames or args.strip:
        family, tasks, params, states = revisit(args.runs[0], partial(play, args.tasks, protocol=args.protocol[0]))
        if args.frames:
            draw_frames(family, tasks, states, args.frames)
        if args.strip and not isinstance(family, dc.AntDir):
            raise SystemExit("--strip: it is for ant-dir, whose tasks are directions; use --frames")
        if args.strip:
            draw_strip(family, params, states, args.strip)


if __name__ == "__main__":
    with dc.one_line_errors():
        main()

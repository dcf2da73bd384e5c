#!/bin/bash
#SBATCH --cpus-per-task=1 --time=1:00:00 --requeue --open-mode=append --output=slurm-%A_%a.out --signal=B:USR1@60
# A run per line of a list, from the repository's root:  sbatch --array=1-75 benchmark/slurm.sh benchmark/ant-dir.txt
# A minute before the time is over Slurm sends USR1. The run saves its checkpoint and is queued again; there it goes on.
# After scancel, which sends TERM to the run as well, it saves and ends.
export OMP_NUM_THREADS=1
command=$(python benchmark/missing.py "$@" --line "$SLURM_ARRAY_TASK_ID") || exit
[ -z "$command" ] && exit
trap 'kill -TERM $run; wait $run; scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; exit' USR1
trap 'wait $run; exit' TERM
bash -c "exec $command" &
run=$!
wait $run

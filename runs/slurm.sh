#!/usr/bin/env bash
#SBATCH --job-name=lost --nodes=1 --gpus-per-node=8 --time=24:00:00
#SBATCH --exclusive --mem=0 --signal=USR1@300 --requeue --open-mode=append
# Submit it from this project's folder, with its environment active:
#     sbatch runs/slurm.sh --model 350m
# The job takes as many turns as it needs. Five minutes before the end of one, SLURM sends SIGUSR1, torchrun passes it
# on, the run saves and stops, and the job is queued again. A run that failed is not: read the log first.
# Don't give --resume never or --resume PATH: each turn would begin there again.

# torchrun gives its processes 240 s to stop, before torch 2.12 only 30 s
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
# srun would give all processes together one core: it no longer takes this over from the job
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_ON_NODE:-1}
out=${OUT:-out}
begun=$(mktemp)
srun torchrun --standalone --nproc_per_node="${PROCESSES:-gpu}" --signals-to-handle=SIGUSR1,SIGTERM,SIGINT \
    train.py --out_dir "$out" "$@"
if [ "$out/status.json" -nt "$begun" ] && grep -q '"state": "stopped"' "$out/status.json"; then  # in this turn
    scontrol requeue "$SLURM_JOB_ID"
fi

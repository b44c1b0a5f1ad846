#!/usr/bin/env bash
#SBATCH --job-name=lost --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --time=24:00:00
#SBATCH --exclusive --mem=0 --signal=USR1@300 --requeue --open-mode=append
# Submit it from this project's folder, with its environment active:
#     sbatch runs/slurm.sh --model 350m
#     sbatch --nodes=4 runs/slurm.sh --model 13b --shard 8        # four machines, a copy of the model on each
# The job takes as many turns as it needs. Five minutes before the end of one, SLURM sends SIGUSR1, torchrun passes it
# on, the run saves and stops, and the job is queued again. A run that failed is not: read the log first.
# Don't give --resume never or --resume PATH: each turn would begin there again.

# torchrun gives its processes 240 s to stop, before torch 2.12 only 30 s
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
# srun would give all processes together one core: it no longer takes this over from the job
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_ON_NODE:-1}
# one machine whose torchrun fails ends the others'
export SLURM_KILL_BAD_EXIT=1
# the out_dir whose status.json is read below
out=${OUT:-out}
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
        --out_dir) next=$((i + 1)); out=${!next} ;;
        --out_dir=*) out=${!i#*=} ;;
    esac
done
begun=$(mktemp)
nodes=${SLURM_JOB_NUM_NODES:-1}
meet=(--standalone)
if [ "$nodes" -gt 1 ]; then
    # the first machine holds the store; each has the ranks of its place in the list, so that --shard 8 stays inside one
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    meet=(--nnodes="$nodes" --master_addr="$first" --master_port="$((20000 + SLURM_JOB_ID % 10000))")
fi
srun bash -c 'exec torchrun ${SLURM_NODEID:+--node_rank=$SLURM_NODEID} "$@"' torchrun \
    "${meet[@]}" --nproc_per_node="${PROCESSES:-gpu}" --signals-to-handle=SIGUSR1,SIGTERM,SIGINT \
    train.py "$@" --out_dir "$out"
if [ "$out/status.json" -nt "$begun" ] && grep -q '"state": "stopped"' "$out/status.json"; then  # in this turn
    scontrol requeue "$SLURM_JOB_ID"
fi

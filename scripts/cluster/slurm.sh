#!/usr/bin/env bash
# One run on several machines of a SLURM cluster, every GPU of each:
#   sbatch --nodes 2 scripts/cluster/slurm.sh recipe.yaml
# A base that does not fit on one GPU is shared out among all of them; what follows the recipe goes to `lora train`:
#   sbatch --nodes 2 scripts/cluster/slurm.sh recipe.yaml --set train.parallel=fsdp
# SLURM warns before the time is up, the run saves within one step, and the job queues itself again to go on.
# The run folder has to be on storage that all machines share.
#SBATCH --job-name=lora
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail

recipe=${1:?usage: sbatch scripts/cluster/slurm.sh RECIPE [OPTION...]}
shift
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resumable=75

status=0
srun lora train "$recipe" --resume --processes "${SLURM_GPUS_ON_NODE:-8}" \
    --nodes "$SLURM_NNODES" --rendezvous "$first:29500" "$@" || status=$?
if [ "$status" -eq "$resumable" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

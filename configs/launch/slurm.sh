#!/bin/bash
#SBATCH --job-name=lskip
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains on all GPUs of a job, one task each, and goes on in the next job where the time of this one ends:
#
#     sbatch slurm.sh --config scratch_7b.yaml --run_folder runs/7b
#
# SIGUSR1 comes five minutes before the end: the run saves, and ends with exit code 138.
set -uo pipefail
run=runs/fit
for ((i = 1; i < $#; i++)); do
    [[ ${!i} == --run_folder ]] && next=$((i + 1)) && run=${!next}
done
resume=()
[[ -e $run/checkpoints/last.ckpt ]] && resume=(--ckpt_path last)
srun --kill-on-bad-exit=1 python -m lskip fit "$@" "${resume[@]}"
code=$?
if [[ $code == 138 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code

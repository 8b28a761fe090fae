sbatch --dependency=singleton <<'END_OF_JOB'
#!/usr/bin/env bash
#SBATCH --job-name=sweep-clip-0-5-seed-1-c05a68
#SBATCH --output=/shared/sweep/clip=0.5,seed=1/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --partition=gpu
set -u
export FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 bash -c 'exec python -m tpo_jax.train --config=/shared/sweep/clip=0.5,seed=1/config.json --workdir=/shared/sweep/clip=0.5,seed=1 --coordinator="$FIRST:12321" --num_processes="$SLURM_NTASKS" --process_id="$SLURM_PROCID"' &
step=$!
trap 'kill -TERM "$step"' TERM
while wait "$step"; status=$?; kill -0 "$step" 2>/dev/null; do :; done
echo "status $status"
[ "$status" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
END_OF_JOB

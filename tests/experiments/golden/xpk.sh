xpk workload create \
  --workload=sweep-clip-0-5-seed-1-815e7b \
  --project=my-project \
  --zone=us-west4-a \
  --cluster=pod \
  --tpu-type=v5litepod-16 \
  --num-slices=1 \
  --docker-image=gcr.io/me/tpo \
  --priority=medium \
  --max-restarts=9 \
  --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 \
  '--command=python -m tpo_jax.train --config=gs://bucket/sweep/clip=0.5,seed=1/config.json --workdir=gs://bucket/sweep/clip=0.5,seed=1 & pid=$!; trap '"'"'kill -TERM $pid'"'"' TERM; while wait $pid; status=$?; kill -0 $pid 2>/dev/null; do :; done; case $status in 0|75) exit $status ;; *) exit 1 ;; esac'

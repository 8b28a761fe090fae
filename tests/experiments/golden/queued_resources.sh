set -uo pipefail
name=sweep-clip-0-5-seed-1-815e7b
where=(--project=my-project --zone=us-west4-a --quiet)
tpus=(gcloud compute tpus)
stopping=

state() { "${tpus[@]}" queued-resources describe "$name" "${where[@]}" \
  --format='value(state.state)' 2>/dev/null; }
release() { "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force; }
on_workers() { "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"; }

acquire() {
  "${tpus[@]}" queued-resources create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot || return
  while [ -z "$stopping" ]; do
    case "$(state)" in
      ACTIVE) on_workers true; return ;;
      FAILED) echo "$name: the request failed" >&2; return 1 ;;
      SUSPENDED) return 75 ;;
    esac
    sleep 0
  done
  return 75
}

# Training saves and ends with 75; the loop below then ends as well.
stop() { stopping=1; on_workers 'pkill -TERM -f tpo_jax.train'; }
trap stop TERM INT
trap release EXIT

while [ -z "$stopping" ]; do
  status=0
  [ "$(state)" = ACTIVE ] || { release 2>/dev/null; acquire; status=$?; }
  if [ "$status" -eq 0 ]; then
    on_workers 'cd tpo_jax && python -m tpo_jax.train --config=gs://bucket/sweep/clip=0.5,seed=1/config.json --workdir=gs://bucket/sweep/clip=0.5,seed=1' &
    training=$!
    while wait "$training"; status=$?; kill -0 "$training" 2>/dev/null; do :; done
    # A signal interrupts `wait`; if training has ended meanwhile, its own status is still there.
    [ -z "$stopping" ] || [ "$status" -le 128 ] || { wait "$training"; status=$?; }
    [ "$status" -eq 75 ] || [ "$(state)" = ACTIVE ] || status=75  # taken away without a word
  fi
  echo "$name: status $status"
  [ "$status" -eq 75 ] || exit "$status"
done
exit 75

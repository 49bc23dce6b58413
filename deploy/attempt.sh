#!/usr/bin/env bash
# One attempt at a run, on the node of the driver: begins it, or goes on with it where it has been begun.
#
#   deploy/attempt.sh RUNS RUN RECIPE|- [SECTION.KEY=VALUE ...]
#
# The run directory is RUNS/RUN/RUN-<time>-<hex>, in a folder of its own, so that a later attempt finds it wherever it
# runs: as the next Ray job (submit.sh), as a RayJob that is tried again, or as a Slurm job that was requeued. RECIPE
# `-` only goes on. Two attempts at once are no harm: the second is refused by the lock of the run directory.
set -euo pipefail

die() { echo "attempt.sh: $*" >&2; exit 2; }

[ $# -ge 3 ] || die "usage: attempt.sh RUNS RUN RECIPE|- [SECTION.KEY=VALUE ...]"
runs=$1 run=$2 recipe=$3
place=$runs/$run
shift 3

found=()
for config in "$place"/*/config.yaml; do
  [ -e "$config" ] && found+=("$(dirname "$config")")
done

settings=()
for setting in "$@"; do
  settings+=(--set "$setting")
done

case ${#found[@]} in
  0)
    [ "$recipe" != - ] || die "nothing to resume: no run directory in $place; is $runs the storage that all nodes share?"
    mkdir -p "$place" || die "cannot make $place: RUNS must be storage that all nodes share and may write"
    settings=(--config "$recipe" --set "run.name=$run" --set "run.directory=$place" ${settings[@]+"${settings[@]}"})
    ;;
  1)
    settings=(--resume "${found[0]}" ${settings[@]+"${settings[@]}"})
    ;;
  *)
    die "$place holds several run directories, one is expected: ${found[*]}"
    ;;
esac
echo "attempt.sh: python -m services.train ${settings[*]}" >&2
# exec: a SIGTERM must reach the driver, which drains, and not a shell that waits for it.
exec "${DGPO_PYTHON:-python}" -m services.train --json "${settings[@]}"

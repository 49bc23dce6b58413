#!/usr/bin/env bash
# Submits a run to a Ray cluster as a job, or the next attempt at one.
#
#   deploy/submit.sh [OPTIONS] RECIPE [SECTION.KEY=VALUE ...]          a new run
#   deploy/submit.sh [OPTIONS] --resume RUN [SECTION.KEY=VALUE ...]    go on with a run, from its newest checkpoint
#
#   --runs DIR       where run directories are, on storage that all nodes share; else DGPO_RUNS
#   --name RUN       name of a new run; else RECIPE and the time
#   --address URL    of the cluster's dashboard; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265
#   --driver PLACE   `auto`: a node with the resource dgpo_driver, else the head; `head`: the head, whatever it has
#   --attempt N      number of this attempt; else one more than the cluster knows of
#                    A head that has just started knows of no node: it is asked again for DGPO_NODES_WAIT_S (30) seconds
#   --no-wait        return when the job is submitted, do not follow its log
#   --print          print the command and do not run it
#
# The command that is run is printed first: plain `ray job submit`, with deploy/runtime_env.yaml and attempt.sh.
# Submission ids are RUN-attempt-N: Ray takes none twice. Exits as `ray job submit` does, 2 for wrong usage.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly DRIVER=dgpo_driver
readonly SHARE=0.01

die() { echo "submit.sh: $*" >&2; exit 2; }
usage() { sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p;}' deploy/submit.sh >&2; exit 2; }

runs=${DGPO_RUNS:-} name='' resume='' attempt='' driver=auto wait=yes run_it=yes
address=${RAY_API_SERVER_ADDRESS:-${RAY_ADDRESS:-http://127.0.0.1:8265}}
while [ $# -gt 0 ]; do
  case $1 in
    --runs | --name | --address | --driver | --attempt | --resume)
      if [ $# -lt 2 ] || [ -z "$2" ]; then die "$1 needs a value"; fi
      case $1 in
        --runs) runs=$2 ;;
        --name) name=$2 ;;
        --address) address=$2 ;;
        --driver) driver=$2 ;;
        --attempt) attempt=$2 ;;
        --resume) resume=$2 ;;
      esac
      shift 2
      ;;
    --no-wait) wait=no; shift ;;
    --print) run_it=no; shift ;;
    --) shift; break ;;
    -*) usage ;;
    *) break ;;
  esac
done

if [ -n "$resume" ]; then
  [ -z "$name" ] || die "--name is for a new run; a resumed one keeps its name"
  run=$resume recipe=-
else
  [ $# -ge 1 ] || usage
  recipe=$1
  shift
  case $recipe in
    /*) [ -f "$recipe" ] && die "$recipe: give a recipe inside of $PWD: only this folder goes along with the job" ;;
  esac
  [ -f "$recipe" ] || [ -f "recipes/$recipe.yaml" ] || die "no recipe $recipe: give a YAML file in $PWD, or a name in recipes/"
  run=${name:-$(basename "$recipe" .yaml)-$(date -u +%Y%m%d-%H%M%S)}
fi
[[ $run =~ ^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$ ]] || die "run $run: use 1 to 64 letters, digits, _ . -, a letter or digit first"
[ -n "$runs" ] || die "where do runs go? --runs DIR, or export DGPO_RUNS=DIR: storage that all nodes share. The job's own folder is deleted after it"
case $runs in /*) ;; *) die "--runs $runs: give an absolute path, it is another machine's" ;; esac
case $driver in auto | head) ;; *) die "--driver $driver: auto or head" ;; esac
[[ -z $attempt || $attempt =~ ^[1-9][0-9]*$ ]] || die "--attempt $attempt: a number from 1 on"
for setting in "$@"; do
  case $setting in
    [a-z]*=*) ;;
    *) die "$setting: expected SECTION.KEY=VALUE" ;;
  esac
  case $setting in
    run.name=* | run.directory=*) die "$setting: say it with --name and --runs, so that a later attempt finds the run" ;;
  esac
done
command -v ray > /dev/null || die "no ray on the PATH: activate the environment that it is installed in (. .venv/bin/activate)"

# A server that asks for tokens refuses clients that do not know of it, and the mode is no part of the address.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ]; then
  token_file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
  [ -s "$token_file" ] || die "no token for the cluster: export RAY_AUTH_TOKEN (the one its nodes were started with),
  or put it into $token_file. For a new cluster: ray get-auth-token --generate, and the same token and
  RAY_AUTH_MODE=token on every node before ray start. A cluster without tokens: export RAY_AUTH_MODE=disabled"
fi

scratch=$(mktemp -d) beside=''
trap 'kill $beside 2> /dev/null || true; rm -rf "$scratch"' EXIT
# Standard output of `ray ...`, or a reason that says what to do; Ray itself gives a traceback.
ask() {
  local said
  said=$(mktemp -d "$scratch/XXXXXX")
  if ray "$@" --address "$address" > "$said/out" 2> "$said/err"; then
    # `ray job list` answers on standard error.
    cat "$said/out" "$said/err"
    return
  fi
  local why
  why=$(grep -hE 'Authentication|Failed to connect|Error' "$said/err" "$said/out" | tail -n 1 || true)
  case $why in
    *Authentication*)
      die "the cluster at $address refuses this client: $why
  The token must be the one that its nodes were started with (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
  ~/.ray/auth_token), and RAY_AUTH_MODE=token set for server and client alike; here it is $RAY_AUTH_MODE" ;;
    *connect*)
      die "no Ray dashboard answers at $address: start the cluster (ray start --head), open the tunnel
  (kubectl port-forward, ssh -L 8265:127.0.0.1:8265 HEAD), or give --address" ;;
    *) die "ray $1 $2 failed: ${why:-$(tail -n 1 "$said/err")}" ;;
  esac
}

if [ "$driver" = auto ]; then
  # Beside the other: each takes Ray seconds to begin with. Its complaints come after the other's.
  ask list nodes --format json --limit 10000 > "$scratch/nodes" 2> "$scratch/complaints" &
  beside=$!
fi
jobs=$(ask job list)
# "N STATUS" of the newest attempt that the cluster knows of.
newest=$(printf '%s' "$jobs" | python3 -c '
import re, sys
found = re.findall(r"submission_id=\x27" + re.escape(sys.argv[1]) + r"-attempt-(\d+)\x27.*?status=<JobStatus\.(\w+)", sys.stdin.read(), re.S)
if found:
    print(*max(found, key=lambda one: int(one[0])))
' "$run")
number=${newest%% *} status=${newest##* }
case $status in
  PENDING | RUNNING) die "attempt $number of $run is $status: follow it (ray job logs -f $run-attempt-$number) or stop it first
  (ray job stop $run-attempt-$number), which writes a checkpoint" ;;
esac
if [ -z "$resume" ] && [ -n "$newest" ]; then
  die "there is a run $run already (attempt $number, $status): --resume $run, or another --name"
fi
attempt=${attempt:-$((${number:-0} + 1))}

# Where the driver goes, by what `ray list nodes` said.
driver_place() {
  python3 -c '
import json, sys
text = sys.stdin.read()
found = json.JSONDecoder().raw_decode(text, text.index("["))[0] if "[" in text else []
nodes = [n for n in found if n["state"] == "ALIVE"]
gpu_head = any(n["is_head_node"] and n["resources_total"].get("GPU") for n in nodes)
here = any(n["resources_total"].get(sys.argv[1]) for n in nodes)
print("nowhere" if not nodes else "resource" if here else "gpu" if gpu_head and len(nodes) > 1 else "head")
' "$DRIVER" < "$scratch/nodes"
}

# Without resources of its own Ray puts a driver on the head; with CPUs it would go wherever those are free, GPU nodes
# among them. So only nodes that were started for it are asked for.
entry=()
if [ "$driver" = auto ]; then
  wait "$beside" || { cat "$scratch/complaints" >&2; exit 2; }
  beside=''
  place=$(driver_place)
  # A head that has just started answers before it knows of any node.
  give_up=$((SECONDS + ${DGPO_NODES_WAIT_S:-30}))
  while [ "$place" = nowhere ] && [ "$SECONDS" -lt "$give_up" ]; do
    sleep 1
    ask list nodes --format json --limit 10000 > "$scratch/nodes"
    place=$(driver_place)
  done
  case $place in
    resource) entry=(--entrypoint-resources "{\"$DRIVER\": $SHARE}") ;;
    gpu) die "no node offers $DRIVER, and the head, where Ray puts a driver, has GPUs. Start a node without GPUs with
  ray start --resources='{\"$DRIVER\": 1}', or accept it: --driver head" ;;
    nowhere) die "the cluster at $address does not tell its nodes: is it still starting? (ray list nodes)" ;;
    head) echo "submit.sh: no node offers $DRIVER: the driver goes to the head" >&2 ;;
  esac
fi

command=(ray job submit --address "$address" --submission-id "$run-attempt-$attempt" --runtime-env deploy/runtime_env.yaml
  ${entry[@]+"${entry[@]}"})
[ "$wait" = yes ] || command+=(--no-wait)
command+=(-- bash deploy/attempt.sh "$runs" "$run" "$recipe" "$@")
{
  printf 'RAY_AUTH_MODE=%s' "$RAY_AUTH_MODE"
  printf ' %q' "${command[@]}"
  printf '\n'
}
[ "$run_it" = yes ] || exit 0
rm -rf "$scratch"
trap - EXIT
exec "${command[@]}"

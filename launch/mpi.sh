#!/bin/bash
# Training under Open MPI 4, one process a GPU: launch/mpi.sh MPIRUN-FLAGS -- CONFIG.yaml [--section.setting value ...]
#   launch/mpi.sh -n 16 --hostfile hosts -- configs/gpt_1b.yaml --mesh.data 16
# Start it on the first of the hosts: JAX's process 0 is looked for on the machine that mpirun runs on.
# SIGTERM, SIGUSR1 or Ctrl-C to this script let the run finish its step and save; a second one ends it at once. mpirun
# itself kills its processes a second after it is told to end, so the script tells one of them, which tells the others.
set -uo pipefail
LAUNCH=${LAUNCH:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
. "$LAUNCH/environment.sh"

options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  options+=("$1")
  shift
done
shift
if [ $# = 0 ] || [ ${#options[@]} = 0 ]; then
  echo "usage: launch/mpi.sh MPIRUN-FLAGS -- CONFIG.yaml [--section.setting value ...], such as -n 8 -- configs/gpt_1b.yaml" >&2
  exit 2
fi
if ! command -v mpirun > /dev/null; then
  echo "error: no mpirun: install Open MPI 4, or start by launch/ssh.sh" >&2
  exit 2
fi
case $(mpirun --version 2> /dev/null | head -n 1) in
  *'Open MPI) 4.'*) ;;
  *'Open MPI) '*) echo "warning: not Open MPI 4: JAX finds its processes there by the package mpi4py alone" >&2 ;;
  *) echo "error: this mpirun is not Open MPI's, and JAX does not know its processes: start by launch/ssh.sh" >&2; exit 2 ;;
esac
# to the other machines; mpirun passes nothing on by itself
for name in $(passed_on); do options+=(-x "$name"); done
[ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
# otherwise each process has one core, and reading data needs more
options+=(--bind-to none)

# a group of its own: a terminal's Ctrl-C and a scheduler's signal reach this script alone
setsid mpirun "${options[@]}" "$PYTHON" -m jaxtron.train "$@" < /dev/null &
mpirun=$!
told=0
tell() {
  told=$((told + 1))
  for process in $(pgrep -P "$mpirun"); do
    # not the connections to other machines, which are mpirun's children too
    if tr '\0' '\n' < "/proc/$process/environ" 2> /dev/null | grep -q '^OMPI_COMM_WORLD_RANK='; then
      kill -TERM "$process" && return
    fi
  done
  # none has begun, or none is here
  [ "$told" = 1 ] && echo "jaxtron: no process of the run on $(hostname): ending mpirun, without a checkpoint" >&2
  kill -TERM "$mpirun" 2> /dev/null
}
trap tell TERM INT USR1
while true; do
  wait "$mpirun"
  code=$?
  # a signal ends the wait, not the run
  kill -0 "$mpirun" 2> /dev/null || break
done
wait "$mpirun" 2> /dev/null
ended=$?
[ $ended = 127 ] || code=$ended
[ "$(meaning_of "$code")" = over ] || echo "jaxtron: exit code $code ($(meaning_of "$code")): the same command continues from the last checkpoint" >&2
exit "$code"

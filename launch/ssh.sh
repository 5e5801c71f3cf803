#!/bin/bash
# Training over SSH, one process a machine with all its GPUs:
#   launch/ssh.sh HOSTS CONFIG.yaml [--section.setting value ...]
# HOSTS: names with commas, or a file with one a line (# begins a comment). The first has process 0, and the others have to
# reach its port (PORT, 29400). All need this directory at the same place, and a key that asks for no password.
# SIGTERM, SIGUSR1 or Ctrl-C to this script, its end and a lost connection let the run finish its step and save.
#   SSH='ssh -i key -p 2222' for other flags; DOCTOR=0 begins without asking the doctor.
set -uo pipefail
LAUNCH=${LAUNCH:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
. "$LAUNCH/environment.sh"

if [ $# -lt 2 ]; then
  echo "usage: launch/ssh.sh HOSTS CONFIG.yaml [--section.setting value ...], with HOSTS such as n1,n2 or a file" >&2
  exit 2
fi
if [ -f "$1" ]; then
  mapfile -t hosts < <(sed 's/#.*//' "$1" | awk 'NF { print $1 }')
else
  IFS=, read -ra hosts <<< "$1"
fi
shift
for host in "${hosts[@]:-}"; do
  if [[ ! $host =~ ^[A-Za-z0-9_][A-Za-z0-9_.:@%-]*$ ]]; then
    echo "error: these are no names of hosts: ${hosts[*]-}; give n1,n2 or a file with one a line" >&2
    exit 2
  fi
done
if [ -n "$(printf '%s\n' "${hosts[@]}" | sort | uniq -d)" ]; then
  echo "error: a host is named twice, and each has one process: $(printf '%s\n' "${hosts[@]}" | sort | uniq -d | xargs)" >&2
  exit 2
fi
read -ra ssh <<< "${SSH:-ssh}"
# no question that nobody answers; a machine that is gone is noticed after two minutes at most
ssh+=(-T -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=8)
address=${hosts[0]##*@}:${PORT:-29400}

variables=
for name in $(passed_on); do variables+="export $name=$(printf %q "${!name}"); "; done
# The standard input there ends with this script, or its connection: then the run is told, by the shell beside it.
# Its exit code comes back as that of ssh.
remote() { # module, number, words of the command line
  local module=$1 number=$2
  shift 2
  printf '%s' "cd $(printf %q "$PWD") || exit 2; $variables" \
    "exec 3<&0; $(printf '%q ' "$PYTHON" -m "$module" "$@" --runtime.coordinator_address "$address" \
      --runtime.num_processes ${#hosts[@]} --runtime.process_id "$number")< /dev/null 3<&- & run=\$!; " \
    "{ while read -r _ <&3; do :; done; kill -TERM \$run; } 2> /dev/null & watch=\$!; " \
    "wait \$run; code=\$?; kill \$watch 2> /dev/null; exit \$code"
}

scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
mkfifo "$scratch/open"
lifeline=
stop() {
  # the end of what they read, once
  [ -z "$lifeline" ] || exec {lifeline}>&-
  lifeline=
}
trap stop TERM INT USR1
# all hosts at once; the exit code: an error's before that of those it ended, 255 where a machine is not reached
everywhere() { # module, words of the command line
  local module=$1 number code
  shift
  rm -f "$scratch"/code.*
  # both ends now, so that one who comes late finds the end of what was stopped before
  exec {lifeline}<> "$scratch/open" {reader}< "$scratch/open"
  for number in "${!hosts[@]}"; do
    # without the end of the line, which only the script may hold; and deaf, for the line is how they are told
    (
      trap : TERM INT USR1
      exec {lifeline}>&-
      setsid "${ssh[@]}" "${hosts[number]}" "bash -c $(printf %q "$(remote "$module" "$number" "$@")")" \
        <&"$reader" > >(setsid sed -u "s/^/${hosts[number]}: /") 2>&1
      code=$?
      echo $code > "$scratch/code.$number"
      if [ $code = 255 ]; then
        echo "jaxtron: ssh to ${hosts[number]} failed, or its connection was lost: stopping the others" >&2
        kill -USR1 $$
      fi
    ) &
  done
  exec {reader}<&-
  # a signal ends a wait, not the run
  while [ "$(cat "$scratch"/code.* 2> /dev/null | wc -l)" -lt ${#hosts[@]} ]; do wait; done
  stop
  for code in 1 2 255 75 137 134 139 143 138 130; do
    if grep -qx $code "$scratch"/code.*; then return $code; fi
  done
  return "$(sort -n "$scratch"/code.* | tail -n 1)"
}

if [ "${DOCTOR:-1}" != 0 ]; then
  everywhere jaxtron.doctor "$@" || exit $?
fi
everywhere jaxtron.train "$@"
code=$?
[ "$(meaning_of "$code")" = over ] || echo "jaxtron: exit code $code ($(meaning_of "$code")): the same command continues from the last checkpoint" >&2
exit "$code"

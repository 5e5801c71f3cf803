#!/bin/bash
# Copies files that all machines read to a disk of this one, once: launch/stage.sh SOURCE TARGET [SOURCE TARGET ...]
# Several processes of a machine may call it at once; one copies, the others wait. A copy that is whole is not repeated,
# one that was interrupted begins again; a target is there under its name only when it is whole. Give the run the target's name
# (--data.path). Objects of gs:// and s3:// need no copy: data.path reads them.
set -euo pipefail

if [ $# = 0 ] || [ $(($# % 2)) = 1 ]; then
  echo "usage: launch/stage.sh SOURCE TARGET [SOURCE TARGET ...]" >&2
  exit 2
fi
while [ $# -gt 0 ]; do
  source=$1 target=${2%/}
  shift 2
  if [ ! -e "$source" ]; then
    echo "error: $(hostname): there is no $source to copy; is the shared file system mounted here?" >&2
    exit 2
  fi
  if ! mkdir -p "$(dirname "$target")"; then
    echo "error: $(hostname): cannot make $(dirname "$target"); choose a TARGET on a disk of this machine" >&2
    exit 2
  fi
  (
    flock 9
    # what a copy is of: names, sizes and times of all files
    print=$(cd "$(dirname "$source")" && find -L "$(basename "$source")" -type f -printf '%p %s %T@\n' | sort | sha256sum)
    if [ -e "$target" ] && [ "$(cat "$target.staged" 2> /dev/null)" = "$print" ]; then exit 0; fi
    if [ -e "$target" ] && [ ! -e "$target.staged" ]; then
      echo "error: $(hostname): $target is there and no copy of ours: remove it, or choose another TARGET" >&2
      exit 2
    fi
    needed=$(du -skL "$source" | cut -f1) free=$(df -Pk "$(dirname "$target")" | awk 'NR == 2 { print $4 }')
    if [ "$needed" -gt "$free" ]; then
      echo "error: $(hostname): $source needs $((needed / 1024)) MiB and $(dirname "$target") has $((free / 1024)): make room" >&2
      exit 2
    fi
    rm -rf "$target" "$target.staged" "$target.part"
    cp -RLp -T "$source" "$target.part"
    mv -T "$target.part" "$target"
    echo "$print" > "$target.staged"
    echo "staged $source to $(hostname):$target ($((needed / 1024)) MiB in $SECONDS s)"
  ) 9> "$target.lock" || exit $?
done

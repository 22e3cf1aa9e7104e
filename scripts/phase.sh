#!/bin/sh
# phase.sh NAME COMMAND...: run a command, say what it is and how long it took, keep its exit status.
name=$1
shift
printf '== %s: %s\n' "$name" "$*"
begun=$(date +%s)
"$@"
status=$?
printf -- '-- %s: %s s%s\n' "$name" "$(($(date +%s) - begun))" \
  "$([ "$status" -eq 0 ] || echo ", FAILED with exit status $status")"
exit "$status"
